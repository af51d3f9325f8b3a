"""The progress display on a terminal and in a log file."""

import io
import math

import pytest
from rich.console import Console

from meshwright.train.metrics.progress_display import LiveProgress, PlainProgress, clock_time, open_progress, sparkline

VALUES = {"loss": 3.25, "tokens_per_second": 12345.6, "grad_norm": 0.5, "learning_rate": 1e-3, "mfu": 0.705}


def console(*, terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=120, color_system=None)


def test_a_log_file_gets_one_line_for_each_logged_step():
    page = console(terminal=False)
    with open_progress(25, 0, True, interval=10, console=page) as progress:
        for step in range(1, 26):
            progress.update(step, VALUES)
    lines = page.file.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/25", "step 10/25", "step 20/25", "step 25/25"]
    assert lines[0] == "step 1/25  loss 3.2500  12,346 tokens/s  grad_norm 0.500  lr 1.00e-03  mfu 70.5%"


def test_a_resumed_run_shows_its_first_step():
    page = console(terminal=False)
    with open_progress(200, 101, True, interval=50, console=page) as progress:
        for step in (102, 103):
            progress.update(step, VALUES)
    assert page.file.getvalue().startswith("step 102/200") and page.file.getvalue().count("\n") == 1


def test_notes_are_printed_unchanged():
    page = console(terminal=False)
    with open_progress(2, 0, True, console=page) as progress:
        progress.note("x[bold] = 1" + 120 * "0")
    assert page.file.getvalue() == "x[bold] = 1" + 120 * "0" + "\n"


def test_other_processes_show_nothing(capsys):
    with open_progress(2, 0, False) as progress:
        progress.update(1, VALUES)
        progress.note("plan")
    assert capsys.readouterr().out == ""


def rendered(progress, page):
    page.print(progress.render())
    return page.file.getvalue()


def test_the_time_left_does_not_count_compilation():
    now, page = [0.0], console(terminal=True)
    progress = LiveProgress(20, 0, page, clock=lambda: now[0])
    now[0] = 100.0  # compiled
    progress.update(1, VALUES)
    now[0] = 110.0
    progress.update(3, VALUES)
    text = rendered(progress, page)
    assert "step 3/20" in text and "1:50 elapsed" in text and "1:25 left" in text
    assert "loss 3.2500" in text and "mfu 70.5%" in text


def test_the_live_display_draws_a_cross_for_a_loss_of_nan():
    page = console(terminal=True)
    progress = LiveProgress(20, 0, page)
    for step, loss in enumerate([3.0, math.nan, 2.0], start=1):
        progress.update(step, {"loss": loss, "skipped": float(loss != loss)})
    assert "█×▁" in rendered(progress, page)


def test_a_terminal_gets_the_live_display_and_a_pipe_the_plain_one():
    assert isinstance(open_progress(2, 0, True, console=console(terminal=True)), LiveProgress)
    assert isinstance(open_progress(2, 0, True, console=console(terminal=False)), PlainProgress)


@pytest.mark.parametrize(
    "values, expected", [([1, 2, 3], "▁▅█"), ([5, 5], "▁▁"), ([], ""), ([math.inf, math.nan], "××")]
)
def test_sparkline(values, expected):
    assert sparkline(values) == expected


@pytest.mark.parametrize(
    "seconds, expected", [(41.6, "0:42"), (3909, "1:05:09"), (266_400, "3d 02:00"), (math.nan, "-:--")]
)
def test_clock_time(seconds, expected):
    assert clock_time(seconds) == expected

"""What a model writes while it trains: answers that are compared, a user's measures, and turns of a conversation."""

import json
import sys

import numpy as np
import pytest
from support.equivalence import tiny

from meshwright.configs.errors import UserError
from meshwright.configs.loader import merged
from meshwright.train.core.event_log import read_events
from meshwright.train.core.process_env import ProcessInfo
from meshwright.train.data import assemble
from meshwright.train.data.chat import find_template
from meshwright.train.data.tokenizer import byte_tokenizer
from meshwright.train.infer import generation_eval
from meshwright.train.infer.generation_eval import end_of_turn, metric_functions, numbers
from meshwright.train.infer.inference_session import evaluate, generate
from meshwright.train.run import train


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MESHWRIGHT_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def run_of(directory, *, answer="ab", **changes):
    """A run on conversations with one and the same answer, which is soon known by heart."""
    talks = [[{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": answer}] for n in range(40)]
    (directory / "talks.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    base = {
        "steps": 60,
        "recipe": {"name": "sft"},
        "model": {"vocab": 264, "embed": 32},
        "data": {
            "source": "jsonl", "path": str(directory / "talks.jsonl"), "format": "messages", "template": "plain",
            "tokenizer": {"bytes": True}, "packing": {"method": "best-fit"}, "sequence_length": 64, "held_out": 0.2,
        },
        "optimizer": {"learning_rate": 0.03},
        "evaluation": {"start": True, "answers": 4, "prompts": ["77?"], "sample_tokens": 8, "temperature": 0.0},
        "logging": {"every": 20, "tensorboard": False},
    }  # fmt: skip
    return tiny(**merged(base, changes))


def test_a_conversation_is_learned_to_its_end(tmp_path, monkeypatch, capsys):
    """From no answer to exact ones, in the run, from its directory, and by a measure of the user's."""
    (tmp_path / "scoring.py").write_text(
        "def length(all):\n    return {'longest': max(len(one['answer']) for one in all)}"
    )
    monkeypatch.chdir(tmp_path)
    config = run_of(tmp_path, evaluation={"metrics": ["scoring:length"]})
    summary = train(config, process_info=ProcessInfo(), root=tmp_path / "runs")
    assert summary.initial_metrics["held_out_exact_match"] == 0 and summary.metrics["held_out_exact_match"] == 1
    assert summary.metrics["longest"] == 2
    samples = {
        event["step"]: event["text"] for event in read_events(tmp_path / "runs/run") if event["event"] == "sample"
    }
    assert samples[60] == "ab" and samples[0] != "ab"
    settings = {"temperature": 0.0, "top_k": None, "top_p": None, "seed": 0}
    assert generate(tmp_path / "runs/run", ["12?"], tokens=9, **settings) == ["ab"]
    assert evaluate(tmp_path / "runs/run", [])["longest"] == 2
    sys.modules.pop("scoring")


def test_questions_are_what_stands_before_the_last_answer(tmp_path):
    data = assemble.build(run_of(tmp_path).data, seed=0)
    tokenizer = byte_tokenizer()
    for prompt, expected in data.held_out.questions(3):
        assert tokenizer.decode(prompt).endswith("?\n\n### Assistant:\n") and prompt[0] == tokenizer.bos
        assert tokenizer.decode_all(expected) == "ab<|endoftext|>"
    assert len(data.held_out.questions(3)) == 3


def test_a_turn_ends_where_the_template_says():
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    assert end_of_turn(find_template("plain", tokenizer=None, tokens=names), byte_tokenizer()) == 256


def scored(answers):
    return {"score": np.float32(0.5)}


def broken(answers):
    return {"score": "high"}


def infinite(answers):
    return {"score": float("nan")}


def test_a_measure_returns_numbers_by_name(monkeypatch):
    assert numbers(scored, scored([])) == {"score": 0.5}
    for wrong, message in ((broken, "not all numbers"), (infinite, "returned nan as score; return finite")):
        with pytest.raises(UserError, match=message):
            numbers(wrong, wrong([]))
    with pytest.raises(UserError, match=r"returned 3; return e.g. \{'length': 3.0\}"):
        numbers(scored, 3)


def test_a_measure_that_is_not_there_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"nowhere:f: No module named 'nowhere'; modules are looked up from"):
        metric_functions(["nowhere:f"])
    with pytest.raises(UserError, match=r"numbrs matches nothing; .*Did you mean numbers\?"):
        metric_functions([f"{generation_eval.__name__}:numbrs"])
    with pytest.raises(UserError, match=r"not of the form module:function"):
        run_of(tmp_path, evaluation={"metrics": ["scoring.length"]})
    with pytest.raises(UserError, match=r"evaluation.answers: 0, but evaluation.metrics"):
        run_of(tmp_path, evaluation={"metrics": ["a:b"], "answers": 0})
    with pytest.raises(UserError, match=r"texts without data.prompt ask"):
        tiny(evaluation={"answers": 3})

"""Streams: read once in windows, and then as exact as data on disk."""

from collections import Counter

import pytest

from meshwright.configs.errors import MeshwrightError, UserError
from meshwright.configs.sections.data import DataConfig
from meshwright.train.data.assemble import build_data
from meshwright.train.data.streaming_source import DocumentStream
from meshwright.train.data.synthetic import synthetic_documents

TEXTS = [synthetic_documents(50)[index] for index in range(50)]


class Remote:
    """A remote collection that counts its requests, and fails at document `broken`."""

    def __init__(self, texts=TEXTS, broken=None):
        self.texts, self.broken = texts, broken
        self.opened, self.sent = [], 0

    def __call__(self, skip):
        self.opened.append(skip)
        for index in range(skip, len(self.texts)):
            if index == self.broken:
                raise OSError("connection reset")
            self.sent += 1
            yield self.texts[index]


def open_stream(remote, cache):
    return DocumentStream(remote, size=8, fingerprint="remote", cache=cache)


def windows(stream, count):
    return [list(stream.window(number)) for number in range(count)]


def test_windows_hold_the_documents_in_order_and_the_last_is_short(cache):
    read = windows(open_stream(Remote(), cache), 8)
    assert sum(read, start=[]) == TEXTS  # noqa: RUF017
    assert [len(window) for window in read] == [8] * 6 + [2, 0]


def test_a_window_is_requested_once(cache):
    windows(open_stream(Remote(), cache), 3)
    remote = Remote()
    assert windows(open_stream(remote, cache), 4)[3] == TEXTS[24:32]
    assert (remote.opened, remote.sent) == ([24], 8)


def test_one_connection_serves_consecutive_windows(cache):
    remote = Remote()
    windows(open_stream(remote, cache), 5)
    assert remote.opened == [0]


def test_a_broken_connection_names_the_document_and_the_next_run_continues_there(cache):
    stream = open_stream(Remote(broken=13), cache)
    stream.window(0)
    with pytest.raises(MeshwrightError, match=r"data.path: .*document 8: connection reset"):
        stream.window(1)
    remote = Remote()
    assert windows(open_stream(remote, cache), 2)[1] == TEXTS[8:16]
    assert remote.opened == [8]


def test_the_same_stream_continues_after_a_broken_connection(cache):
    remote = Remote(broken=13)
    stream = open_stream(remote, cache)
    with pytest.raises(MeshwrightError):
        windows(stream, 2)
    remote.broken = None
    assert tuple(stream.window(1)) == tuple(TEXTS[8:16])


def test_a_window_another_process_read_leaves_no_gap(cache):
    ours, theirs = open_stream(Remote(), cache), open_stream(Remote(), cache)
    ours.window(0)
    theirs.window(1)
    assert [tuple(ours.window(1)), tuple(ours.window(2))] == [tuple(TEXTS[8:16]), tuple(TEXTS[16:24])]


@pytest.fixture
def dataset_path(tmp_path):
    """The texts as a data set on disk."""
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(str(tmp_path / "saved"))
    return str(tmp_path / "saved")


def build(dataset_path, seed=0, **settings):
    common = {
        "source": "hf",
        "path": dataset_path,
        "streaming": True,
        "tokenizer": {"bytes": True},
        "sequence_length": 64,
    }
    return build_data(DataConfig(**common | {"packing": {"window": 8}, "held_out": 0.2} | settings), seed=seed)


def predicted_tokens(data, indices):
    """The targets of some samples, as counts of documents' first lines."""
    counts = Counter()
    for index in indices:
        row = data.train.row(index)
        counts.update(row["targets"][row["loss_weights"] == 1].tolist())
    return counts


def epoch_rows(data):
    """Rows of an epoch, found by reading past the end of the stream."""
    data.train.row(10_000)
    return data.train.rows_per_epoch()


@pytest.mark.parametrize("epoch", [0, 1, 3])
def test_every_epoch_predicts_every_document_that_is_not_held_out(dataset_path, cache, epoch):
    data = build(dataset_path)
    rows = epoch_rows(data)
    held_out = set(data.held_out.texts())
    counts = predicted_tokens(data, range(epoch * rows, (epoch + 1) * rows))
    assert 1 <= len(held_out) <= 8, "from the first window"
    assert counts[256] == len(TEXTS) - len(held_out), "one end a document"
    assert counts == predicted_tokens(data, range(rows))


def test_samples_are_a_function_of_seed_and_index(dataset_path, cache):
    first, second = build(dataset_path), build(dataset_path)
    rows = epoch_rows(first)
    order = [rows + 3, 5, 0, 2 * rows - 1]

    def tokens(data, indices):
        return [data.train.row(index)["tokens"].tolist() for index in indices]

    assert tokens(first, order) == tokens(second, reversed(order))[::-1]
    assert tokens(first, range(rows)) != tokens(first, range(rows, 2 * rows))
    assert tokens(first, range(rows)) != tokens(build(dataset_path, seed=1), range(rows))


@pytest.mark.parametrize("settings", [{}, {"documents": 30}], ids=["all", "the first 30"])
def test_a_resumed_run_reads_the_samples_of_an_uninterrupted_one(dataset_path, tmp_path, settings):
    uninterrupted = build(dataset_path, cache=str(tmp_path / "one"), **settings)
    epoch_rows(uninterrupted)  # read to the end first: what comes later must not change what was before
    before, after = (build(dataset_path, cache=str(tmp_path / "two"), **settings) for _ in range(2))
    reached = before.train.rows_per_epoch()
    samples = [
        (before if index < reached else after).train.row(index) for index in range(2 * epoch_rows(uninterrupted))
    ]
    for index, sample in enumerate(samples):
        assert sample["tokens"].tolist() == uninterrupted.train.row(index)["tokens"].tolist(), index


def test_training_starts_before_the_stream_has_ended(dataset_path, cache):
    data = build(dataset_path)
    data.train.row(0)
    assert data.train.rows_per_epoch() < epoch_rows(data)
    assert data.summary["documents"] == 8


def test_a_stream_of_one_window_is_shuffled_in_every_epoch(dataset_path, cache):
    data = build(dataset_path, packing={"window": 100})
    rows = epoch_rows(data)
    first, second = ([data.train.row(start + i)["tokens"].tolist() for i in range(rows)] for start in (0, rows))
    assert first != second


def test_only_the_first_documents_of_a_stream(dataset_path, cache):
    data = build(dataset_path, documents=20, held_out=0)
    assert predicted_tokens(data, range(epoch_rows(data)))[256] == 20


def test_a_held_out_document_is_not_trained_on_when_it_occurs_again(tmp_path, cache):
    import datasets

    datasets.Dataset.from_dict({"text": TEXTS[:8] * 3}).save_to_disk(str(tmp_path / "copies"))
    data = build(str(tmp_path / "copies"), held_out=1e-6, sequence_length=4096)
    (held_out,) = data.held_out.texts()
    trained = "".join(data.tokenizer.decode_all(data.train.row(index)["targets"]) for index in range(epoch_rows(data)))
    assert held_out not in trained
    assert trained.count("<|endoftext|>") == 3 * 7


def test_a_stream_without_text_is_refused(tmp_path, cache):
    import datasets

    datasets.Dataset.from_dict({"text": ["", ""]}).save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(UserError, match=r"data: .*empty"):
        build(str(tmp_path / "empty"))


def test_files_that_changed_are_read_again(tmp_path, cache):
    for text in ("first version", "other version"):
        (tmp_path / "files").mkdir(exist_ok=True)
        (tmp_path / "files" / "train.jsonl").write_text("".join(f'{{"text": "{text} {n}"}}\n' for n in range(20)))
        data = build(str(tmp_path / "files"), held_out=0, sequence_length=16)
        assert data.tokenizer.decode(data.train.row(0)["targets"][:13]) == text


def test_a_missing_column_of_a_stream_lists_what_there_is(dataset_path, cache):
    with pytest.raises(UserError, match=r"data\.field .*row 0\): body matches nothing; there are text"):
        build(dataset_path, field="body")

"""Samples by number: a function of (seed, epoch, index), every token once per epoch, none held out."""

from collections import Counter

import numpy as np
import pytest

from meshwright.train.data.dataset import HeldOutDataset, HeldOutSource, ShuffledDataset
from meshwright.train.data.packing import PACKERS

LENGTHS = [5, 2, 21, 9, 3, 8, 4, 12, 6, 30]


def make_dataset(stores, packing, *, seed=0, documents=None):
    store = stores(LENGTHS)
    return ShuffledDataset(
        store, np.arange(len(store)) if documents is None else documents, packing=packing, key=(seed, 1)
    )


def content(dataset, indices):
    """The rows as comparable values, in order."""
    return [tuple(dataset.row(index)["targets"].tolist()) for index in indices]


def predicted_tokens(dataset, indices):
    """How often each token is a target, over some samples."""
    counts = Counter()
    for index in indices:
        row = dataset.row(index)
        counts.update(row["targets"][row["loss_weights"] == 1].tolist())
    return counts


@pytest.mark.parametrize("method", PACKERS)
@pytest.mark.parametrize("epoch", [0, 1, 5])
def test_an_epoch_predicts_every_token_once(stores, packings, method, epoch):
    dataset = make_dataset(stores, packings(method))
    rows = dataset.rows_per_epoch(epoch)
    counts = predicted_tokens(dataset, range(epoch * rows, (epoch + 1) * rows))
    assert counts == Counter(stores(LENGTHS).tokens.tolist())


@pytest.mark.parametrize("method", PACKERS)
def test_the_same_integers_give_the_same_sample(stores, packings, method):
    once, second = (make_dataset(stores, packings(method)) for _ in range(2))
    indices = [0, 40, 2, 17, 1]
    assert content(once, indices) == content(second, reversed(indices))[::-1]


def test_another_seed_or_epoch_gives_another_order(stores, packings):
    dataset = make_dataset(stores, packings())
    rows = dataset.rows_per_epoch()
    first = content(dataset, range(rows))
    assert first != content(dataset, range(rows, 2 * rows))
    assert first != content(make_dataset(stores, packings(), seed=1), range(rows))


def test_rows_of_each_epoch_are_visited_in_a_different_order(stores, packings):
    """Each document is a row and a window, so only the order of rows is shuffled."""
    dataset = ShuffledDataset(stores([8] * 9), np.arange(9), packing=packings()._replace(window=1), key=(0, 1))
    first, second = content(dataset, range(9)), content(dataset, range(9, 18))
    assert first != second
    assert sorted(first) == sorted(second)


def windows_of(dataset):
    """The documents that ever shared a row, directly or through others: found by reading 20 epochs."""
    groups = []
    for index in range(20 * dataset.rows_per_epoch()):
        documents = {int(token) // 100 for token in dataset.row(index)["targets"] if token >= 100}
        touched = [group for group in groups if group & documents]
        groups = [group for group in groups if not group & documents] + [documents.union(*touched)]
    return {frozenset(group) for group in groups}


def test_the_seed_assigns_documents_to_windows_once(stores, packings):
    windows = windows_of(make_dataset(stores, packings()))
    assert max(len(window) for window in windows) == 3
    assert len(windows) >= 4
    assert windows != windows_of(make_dataset(stores, packings(), seed=1))


def test_held_out_rows_hold_the_other_documents_in_order_then_padding(stores, packings):
    store, packing = stores(LENGTHS), packings()
    out = np.array([2, 7, 9])
    held_out = HeldOutDataset([HeldOutSource(None, store, out), HeldOutSource(None, store, out[:1])], packing=packing)
    training = np.setdiff1d(np.arange(len(LENGTHS)), out)
    trained = set(predicted_tokens(make_dataset(stores, packing, documents=training), range(50))) - {1}
    evaluated = predicted_tokens(held_out, range(held_out.padded_rows(16)))
    assert not trained & set(evaluated)
    assert evaluated.total() == held_out.tokens == 21 + 12 + 30 + 21
    assert held_out.row(0)["targets"].tolist() == [300, 301, 302, 303, 304, 305, 306, 307]
    assert held_out.padded_rows(16) % 16 == 0
    assert not held_out.row(held_out.rows)["loss_weights"].any()
    assert held_out.row(held_out.rows - 1)["loss_weights"].any()


def test_held_out_bytes_are_those_of_its_texts(stores, packings):
    texts = ["xyz" * n for n in range(len(LENGTHS))]
    held_out = HeldOutDataset([HeldOutSource(texts, stores(LENGTHS), np.array([1, 4]))], packing=packings())
    assert list(held_out.texts()) == [texts[1], texts[4]]
    assert held_out.bytes == 4 * (LENGTHS[1] + LENGTHS[4])  # as the store counted them
    assert held_out.documents == 2

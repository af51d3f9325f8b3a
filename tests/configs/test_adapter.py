"""Several adapters in a configuration: what each inherits, the run it is alone, and what is refused."""

import pytest

from meshwright.configs.adapter_runs import adapter_rows, single_adapter_run, widest_adapter
from meshwright.configs.errors import UserError
from meshwright.configs.loader import dump_yaml, merge_trees, parse_yaml, validate_tree

TWO = {
    "adapter": {"rank": 4, "alpha": 8.0, "targets": ["q", "v"]},
    "adapters": {
        "sums": {"rows": 6, "data": {"path": "sums.jsonl"}},
        "words": {"rows": 2, "rank": 8, "targets": ["o"], "learning_rate": 0.5, "data": {"path": "words.jsonl"}},
    },
    "data": {"source": "jsonl", "format": "messages", "packing": {"method": "best-fit"}, "global_batch": 8},
}


def test_each_inherits_and_says_what_differs():
    """The same once resolved and read again: what the run directory keeps is the run."""
    config = validate_tree(TWO)
    words = single_adapter_run(config, "words")
    assert (words.adapter.rank, words.adapter.alpha, words.adapter.targets) == (8, 8.0, ["o"])
    assert (words.optimizer.learning_rate, words.data.global_batch, words.adapters) == (0.5, 2, {})
    assert (words.data.source, words.data.path, words.data.format) == ("jsonl", "words.jsonl", "messages")
    assert single_adapter_run(config, "sums").optimizer == config.optimizer
    assert [source.path for source in config.all_data.sources] == ["sums.jsonl", "words.jsonl"]
    assert validate_tree(parse_yaml(dump_yaml(config), origin="")) == config
    wide = widest_adapter({name: single_adapter_run(config, name).adapter for name in config.adapters})
    assert (wide.rank, wide.targets) == (8, ["q", "v", "o"])


def test_without_rows_they_share_evenly():
    """And one that says nothing is what the section adapter says."""
    config = validate_tree({"adapter": {}, "adapters": {"a": {}, "b": None}, "data": {"global_batch": 6}})
    assert adapter_rows(config) == {"a": 3, "b": 3}
    assert single_adapter_run(config, "b").adapter == config.adapter


REFUSED = {
    "data.global_batch: 9, but adapters have 6 [+] 2 = 8 rows; set it to 8": {"data": {"global_batch": 9}},
    "adapters.sums.rows: not set, and others are": {"adapters": {"sums": {"rows": None}}},
    "not divisible by 2 adapters": {
        "adapters": {"sums": {"rows": None}, "words": {"rows": None}},
        "data": {"global_batch": 9},
    },
    "adapter.method: dora beside several adapters .sums, words.; set it to lora": {"adapter": {"method": "dora"}},
    "adapter.start: pissa beside several": {"adapter": {"start": "pissa"}},
    "recipe.name: reward beside several": {"recipe": {"name": "reward"}},
    "mesh.pipe: 2 beside several adapters": {"mesh": {"pipe": 2, "devices": 2}},
    "mesh.replica: 2 beside several": {"mesh": {"replica": 2, "devices": 2}, "outer": {"name": "diloco", "every": 5}},
    "elastic.deterministic: True beside several": {"elastic": {"deterministic": True}},
    "privacy: set beside several": {"privacy": {"epsilon": 8.0, "delta": 1e-5, "clip": 1.0}},
    "data.mixture: 1 beside several": {"data": {"mixture": [{"source": "stdlib"}]}},
    "adapter: null beside adapters .sums, words.": {"adapter": None},
    "adapters: 'a/b' must be letters": {"adapters": {"a/b": {}}},
    "adapters.words.data.path: not set": {"adapters": {"words": {"data": {"path": None}}}},
    "data.packing.method: concat cuts": {"data": {"packing": {"method": "concat"}}},
    "adapters.words.rank: 0": {"adapters": {"words": {"rank": 0}}},
    "adapters.words.data.paht: unknown key": {"adapters": {"words": {"data": {"paht": "x"}}}},
    "optimizer.name: adafactor takes means": {"optimizer": {"name": "adafactor"}},
    "optimizer.learning_rate: 0 beside": {"optimizer": {"learning_rate": 0}},
}


@pytest.mark.parametrize(("message", "changes"), REFUSED.items(), ids=REFUSED)
def test_what_cannot_be_trained_together_is_refused(message, changes):
    with pytest.raises(UserError, match=message):
        validate_tree(merge_trees(TWO, changes))


def test_how_several_are_multiplied_means_nothing_for_one():
    with pytest.raises(UserError, match=r"adapter\.product: ragged is for several adapters"):
        validate_tree({"adapter": {"product": "ragged"}})

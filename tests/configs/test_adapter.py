"""Several adapters in a configuration: inherited settings, single runs, and refused conflicts."""

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


def test_each_adapter_inherits_what_it_does_not_set():
    """And the resolved configuration, as a run directory keeps it, loads as an equal one."""
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


def test_adapters_without_rows_get_equal_shares():
    """And an adapter without settings has those of the section adapter."""
    config = validate_tree({"adapter": {}, "adapters": {"a": {}, "b": None}, "data": {"global_batch": 6}})
    assert adapter_rows(config) == {"a": 3, "b": 3}
    assert single_adapter_run(config, "b").adapter == config.adapter


REFUSED = {
    r"data.global_batch: 9.* 8": {"data": {"global_batch": 9}},
    "adapters.sums.rows: null": {"adapters": {"sums": {"rows": None}}},
    "data.global_batch: 9 .* 2 adapters": {
        "adapters": {"sums": {"rows": None}, "words": {"rows": None}},
        "data": {"global_batch": 9},
    },
    "adapter.method: dora with .*lora": {"adapter": {"method": "dora"}},
    "adapter.start: pissa with": {"adapter": {"start": "pissa"}},
    "recipe.name: reward with": {"recipe": {"name": "reward"}},
    "mesh.pipe: 2 with": {"mesh": {"pipe": 2, "devices": 2}},
    "mesh.replica: 2 with": {"mesh": {"replica": 2, "devices": 2}, "outer": {"name": "diloco", "every": 5}},
    "elastic.deterministic: True with": {"elastic": {"deterministic": True}},
    "privacy: set with": {"privacy": {"epsilon": 8.0, "delta": 1e-5, "clip": 1.0}},
    "data.mixture: 1 with": {"data": {"mixture": [{"source": "stdlib"}]}},
    "adapter: null with .*sums, words": {"adapter": None},
    "adapters: 'a/b' ": {"adapters": {"a/b": {}}},
    "adapters.words.data.path: null": {"adapters": {"words": {"data": {"path": None}}}},
    "data.packing.method: concat": {"data": {"packing": {"method": "concat"}}},
    "adapters.words.rank: 0": {"adapters": {"words": {"rank": 0}}},
    "adapters.words.data.paht: unknown key": {"adapters": {"words": {"data": {"paht": "x"}}}},
    "optimizer.name: adafactor": {"optimizer": {"name": "adafactor"}},
    "optimizer.learning_rate: 0 with": {"optimizer": {"learning_rate": 0}},
}


@pytest.mark.parametrize(("message", "changes"), REFUSED.items(), ids=REFUSED)
def test_settings_that_several_adapters_cannot_have_are_refused(message, changes):
    with pytest.raises(UserError, match=message):
        validate_tree(merge_trees(TWO, changes))


def test_product_has_no_effect_on_one_adapter_and_is_refused():
    with pytest.raises(UserError, match=r"adapter\.product: ragged"):
        validate_tree({"adapter": {"product": "ragged"}})

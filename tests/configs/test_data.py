"""The section data: exactly one tokenizer, and no setting that the source ignores."""

import pytest
from pydantic import ValidationError

from meshwright.configs.sections.base import Section
from meshwright.configs.sections.data import DataConfig

REFUSED = {
    "file source without a path": ({"source": "jsonl"}, "data.path: null"),
    "path that stdlib ignores": ({"path": "x"}, "data.path: 'x'"),
    "column that text ignores": ({"source": "text", "path": "x", "field": "body"}, "data.field: 'body'"),
    "streaming of local files": ({"source": "text", "path": "x", "streaming": True}, "data.streaming: True"),
    "separator that cuts nowhere": ({"source": "text", "path": "x", "separator": ""}, "data.separator: ''"),
    "source beside a mixture": ({"source": "stdlib", "mixture": [{}]}, "data.source: 'stdlib' with data.mixture"),
    "bad entry of a mixture": ({"mixture": [{}, {"source": "hf"}]}, "data.mixture.1.path: null"),
    "two tokenizers": ({"tokenizer": {"bytes": True, "file": "t.json"}}, "file and bytes set"),
    "no tokenizer": ({"tokenizer": {}}, "data.tokenizer: nothing set"),
    "training to no size": ({"tokenizer": {"train": "bpe"}}, "data.tokenizer.vocab: None"),
    "size without training": ({"tokenizer": {"bytes": True, "vocab": 300}}, "data.tokenizer.vocab: 300"),
    "weight of nothing": ({"mixture": [{"weight": 0}]}, "greater than 0"),
    "everything held out": ({"held_out": 1.0}, "less than 1"),
    "window of no documents": ({"packing": {"window": 0}}, "greater than or equal to 1"),
    "vocabulary below the bytes": ({"tokenizer": {"train": "bpe", "vocab": 100}}, "greater than or equal to 258"),
}


@pytest.mark.parametrize(("settings", "message"), REFUSED.values(), ids=REFUSED)
def test_a_mistake_names_key_and_value(settings, message):
    with pytest.raises(ValidationError, match=message.replace(".", r"\.")):
        DataConfig(**settings)


def test_a_dumped_section_loads_again():
    config = DataConfig(mixture=[{"weight": 2}, {"source": "text", "path": "x", "separator": "\n\n"}], held_out=0)
    assert DataConfig(**config.model_dump(mode="json")) == config


def test_one_source_is_a_mixture_of_one():
    (only,) = DataConfig(source="text", path="x").sources
    assert (only.kind, only.path, only.weight) == ("text", "x", 1.0)
    assert DataConfig().sources[0].kind == "stdlib"


def test_every_key_is_documented():
    for name, field in DataConfig.model_fields.items():
        assert field.description or issubclass(field.annotation, Section), name

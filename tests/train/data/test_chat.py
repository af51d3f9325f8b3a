"""Conversations: tokens and mask equal those of transformers, with and without generation tags."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from meshwright.configs.errors import UserError
from meshwright.train.data.chat import find_template
from meshwright.train.data.encoding import encode_parts
from meshwright.train.data.tokenizer import byte_tokenizer, load_tokenizer

HERE = Path(__file__).parent / "fixtures" / "chat"
EXPECTED = json.loads((HERE / "expected.json").read_text())
WORDS = re.compile(r"\{% (end)?generation %\}")


@pytest.fixture(scope="module")
def template():
    return find_template(None, tokenizer=str(HERE), tokens={})


def tokens_and_mask(template, talk, **more):
    (encoded,) = encode_parts([template.render_with_loss_mask(talk, origin="here", **more)], load_tokenizer(HERE))
    mask = [1] * len(encoded.tokens)
    for start, stop in encoded.loss_mask_zeros:
        mask[start:stop] = [0] * (stop - start)
    return [encoded.opener, *encoded.tokens], [0, *mask]


@pytest.mark.parametrize("talk", EXPECTED, ids=["one turn", "several"])
@pytest.mark.parametrize("words", [True, False], ids=["generation words", "turn by turn"])
def test_tokens_and_mask_are_those_of_transformers(template, talk, words):
    """Without the tags, the mask is found by rendering every turn."""
    selected = template if words else replace(template, source=WORDS.sub("", template.source))
    assert tokens_and_mask(selected, talk["messages"]) == (talk["ids"], talk["learned"])


@pytest.mark.parametrize("words", [True, False], ids=["generation words", "turn by turn"])
def test_only_turns_after_the_prompt_are_learned(template, words):
    selected = template if words else replace(template, source=WORDS.sub("", template.source))
    talk = EXPECTED[1]
    ids, mask = tokens_and_mask(selected, talk["messages"], first=3)
    last = "4\n<|im_end|>"
    assert ids == talk["ids"]
    assert load_tokenizer(HERE).decode_all([token for token, one in zip(ids, mask, strict=True) if one]) == last


def test_a_template_that_rewrites_earlier_turns_needs_generation_tags(template):
    forgetful = replace(
        template,
        source="{% for m in messages %}{% if loop.last or m.role == 'user' %}{{ m.content }}<|im_end|>"
        "{% endif %}{% endfor %}",
    )
    with pytest.raises(UserError, match=r"data.template: .*\{% generation %\}"):
        forgetful.render_with_loss_mask(EXPECTED[1]["messages"], origin="a.jsonl line 2")


def test_the_error_of_a_conversation_without_learned_text_shows_it_rendered(template):
    with pytest.raises(UserError, match=r"data.format: a.jsonl line 3: .*Rendered: '<s><\|im_start\|>user"):
        template.render_with_loss_mask([{"role": "user", "content": "Hi"}], origin="a.jsonl line 3")


def test_a_turn_that_never_ends_is_refused(template):
    endless = replace(template, source=template.source.replace("+ '<|im_end|>' }}{% endgen", "}}{% endgen"))
    with pytest.raises(UserError, match=r"data.template: .*special token"):
        tokens_and_mask(endless, EXPECTED[0]["messages"])


def test_the_error_of_a_template_is_quoted(template):
    strict = replace(template, source="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="roles must alternate"):
        strict.render_with_loss_mask(EXPECTED[0]["messages"], origin="here")


def test_the_plain_template_works_with_any_tokenizer():
    """It starts with bos, and every turn of the assistant ends with eos, which is learned."""
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    plain, tokenizer = find_template("plain", tokenizer=None, tokens=names), byte_tokenizer()
    (part,) = encode_parts([plain.render_with_loss_mask(EXPECTED[1]["messages"], origin="here")], tokenizer)
    assert part.opener == tokenizer.bos and list(part.tokens).count(tokenizer.eos) == 2
    text = tokenizer.decode_all(part.tokens)
    assert text.startswith("### System:\nBe brief. <|im_end|>\n\n### User:\n1+1?\n\n### Assistant:\n")
    prompt = plain.prompt(EXPECTED[1]["messages"][:2])
    assert ("<|endoftext|>" + text).startswith(prompt) and prompt.endswith("### Assistant:\n")


def test_an_unknown_template_lists_what_there_is():
    with pytest.raises(UserError, match=r"data.template: plian matches nothing; .* Did you mean plain"):
        find_template("plian", tokenizer=None, tokens={})

"""Evaluation by generation: answers are compared, the user's metrics are validated, turns of a conversation end."""

import json
import sys

import numpy as np
import pytest
from support.equivalence import tiny

from meshwright.configs.errors import UserError
from meshwright.configs.loader import merge_trees
from meshwright.train.core.event_log import read_events
from meshwright.train.core.process_env import ProcessInfo
from meshwright.train.data import assemble
from meshwright.train.data.chat import find_template
from meshwright.train.data.tokenizer import byte_tokenizer
from meshwright.train.infer import generation_eval
from meshwright.train.infer.generation_eval import end_of_turn, load_metrics, validate_scores
from meshwright.train.infer.inference_session import evaluate, generate
from meshwright.train.run import train


def run_config(directory, *, answer="ab", **changes):
    """A run on conversations that all have the same answer, which is soon learned."""
    conversations = [
        [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": answer}] for n in range(40)
    ]
    (directory / "talks.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in conversations))
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
    return tiny(**merge_trees(base, changes))


def test_a_conversation_is_learned_to_its_end(tmp_path, monkeypatch, capsys):
    """Exact match goes from 0 to 1 in the run, and the user's metric is computed in the run and from its directory."""
    (tmp_path / "scoring.py").write_text(
        "def length(all):\n    return {'longest': max(len(item['answer']) for item in all)}"
    )
    monkeypatch.chdir(tmp_path)
    config = run_config(tmp_path, evaluation={"metrics": ["scoring:length"]})
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


def test_a_question_is_the_conversation_before_the_last_answer(tmp_path):
    data = assemble.build_data(run_config(tmp_path).data, seed=0)
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


def test_a_metric_returns_numbers_by_name(monkeypatch):
    assert validate_scores(scored, scored([])) == {"score": 0.5}
    for wrong, message in ((broken, "must be a number"), (infinite, "returned nan as score; return finite")):
        with pytest.raises(UserError, match=message):
            validate_scores(wrong, wrong([]))
    with pytest.raises(UserError, match=r"returned 3; return e.g. \{'length': 3.0\}"):
        validate_scores(scored, 3)


def test_a_metric_that_does_not_exist_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"nowhere:f: No module named 'nowhere'; modules are looked up from"):
        load_metrics(["nowhere:f"])
    with pytest.raises(UserError, match=r"validate_score matches nothing; .*Did you mean validate_scores\?"):
        load_metrics([f"{generation_eval.__name__}:validate_score"])
    with pytest.raises(UserError, match=r"not of the form module:function"):
        run_config(tmp_path, evaluation={"metrics": ["scoring.length"]})
    with pytest.raises(UserError, match=r"evaluation.answers: 0, but evaluation.metrics"):
        run_config(tmp_path, evaluation={"metrics": ["a:b"], "answers": 0})
    with pytest.raises(UserError, match=r".*data.prompt"):
        tiny(evaluation={"answers": 3})

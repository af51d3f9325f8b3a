"""Weights in and out: a Hugging Face directory becomes a run, a run becomes a Hugging Face directory."""

import dataclasses
import json
from contextlib import closing
from pathlib import Path
from typing import Any

from ...checkpoint.interop import huggingface, peft
from ...checkpoint.storage import Storage
from ...configs.errors import UserError
from ...configs.huggingface import config_json
from ...configs.loader import validated
from ...configs.sections.model import ModelConfig
from ...models.adapters.attach import merge_adapters, split_trained
from ...models.families.safetensors_files import COMPANIONS, copy_companions
from ...models.families.weight_names import SEQUENCE_CLASSIFIERS
from ...parallel.mesh import make_mesh
from ...parallel.state import combine
from ..core.process_env import ProcessInfo
from ..core.run_directory import open_directory
from ..core.run_paths import newest_island
from ..engine import runtime
from ..engine.program import build
from .inference_session import opened, read

# An imported run keeps weights and nothing else: this rule has no state.
WEIGHTS_ONLY = {"name": "sgd", "b1": 0.0}
SEEDED = ("vera", "shira")  # adapters with numbers that are neither trained nor the base model's


def import_directory(source: Path, run: Path, *, adapter: Path | None = None) -> Path:
    """Make `run`, a run directory with one checkpoint, from the model in `source`; `generate` and `evaluate` take it.

    `adapter` is a directory of PEFT's, whose adapter the run then has. Raises UserError where one of them cannot be
    represented exactly, or `run` exists.
    """
    absent_or_empty(run)
    model = ModelConfig.model_validate({"from": str(source.absolute())})
    length = min(256, made_for(model) or 256)
    found = None if adapter is None else peft.read(adapter, model, kind=huggingface.format_kind(model))
    if found is not None and found.adapter.method in SEEDED:
        raise UserError(
            f"{adapter}: {found.adapter.method} needs the random numbers in its file, and a run makes its own by the "
            "seed; merge the adapter in PEFT, and import the model"
        )
    config = validated(
        {
            "name": run.name,
            "model": {"from": str(source.absolute())},
            "data": {"sequence_length": length},
            "optimizer": WEIGHTS_ONLY,
        }
        | ({} if found is None else {"adapter": found.adapter.model_dump()})
    )
    runtime.start(config, ProcessInfo())
    program = build(config, make_mesh(config.mesh))
    state = program.initialize()
    if found is not None:
        tree = peft.load_adapters(combine(state.params, state.frozen), found, model)
        params, frozen = split_trained(tree, model, found.adapter)
        state = dataclasses.replace(state, params=params, frozen=frozen)
    open_directory(config, root=run.parent)
    copy_companions(source, run)
    with closing(Storage(run / "checkpoints", layout=program.layout)) as storage:
        storage.save(state, step=0, data={"corpus": "", "samples": 0, "origin": program.origin})
    return run


def export_run(run: Path, target: Path, *, limit: int, adapter: str | None = None) -> list[str]:
    """Write the newest checkpoint of `run` to `target`, files of at most `limit` bytes; the names written.

    `adapter` is which of several is merged.

    Raises UserError where no format of transformers holds the model exactly, or `target` exists.
    """
    absent_or_empty(target)
    run = newest_island(run)
    program, state = opened(read(run, []), run, adapter=adapter)
    config = program.config
    params = merge_adapters(program.dequantized_weights(state), config.model, config.adapter)
    dtype = str(params["embed"]["embedding"].dtype)
    tree = config_json(
        config.model, positions=max(config.data.sequence_length, made_for(config.model) or 0), dtype=dtype
    )
    tree |= token_ids(run)
    if "score" in params:
        params = {name: part for name, part in params.items() if name != "head"}
        tree |= scoring(tree["model_type"])
    target.mkdir(parents=True, exist_ok=True)
    files = huggingface.write(params, config.model, target, kind=tree["model_type"], limit=limit)
    (target / "config.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    return ["config.json", *(file.name for file in files), *copy_companions(run, target, names=COMPANIONS)]


def scoring(kind: str) -> dict[str, Any]:
    """What config.json says of a model of `kind` that scores. Raises UserError where transformers has none."""
    if kind not in SEQUENCE_CLASSIFIERS:
        raise UserError(
            f"recipe.name: reward made a model of format {kind}, and transformers scores only with {', '.join(SEQUENCE_CLASSIFIERS)}"
        )
    return {"architectures": [SEQUENCE_CLASSIFIERS[kind]], "id2label": {"0": "score"}, "label2id": {"score": 0}}


def export_adapter(run: Path, target: Path, *, adapter: str | None = None) -> list[str]:
    """Write the adapter of the newest checkpoint of `run` to `target` as PEFT keeps it; the names written.

    `adapter` is which of several; None: each, to a directory of its name in `target`.

    Raises UserError where the run has no adapter, PEFT has no file for its method, or `target` exists.
    """
    absent_or_empty(target)
    run = newest_island(run)
    config = read(run, [])
    if config.adapter is None:
        raise UserError(f"adapter: {run} has none, it trained the whole model; use `meshwright checkpoint export`")
    if config.recipe.name == "reward":
        raise UserError(
            f"recipe.name: reward trained a score beside the adapter of {run}, and its file has no place for one; "
            "use `meshwright checkpoint export`, which merges it"
        )
    if config.quantization is not None and config.adapter.start != "zero":
        raise UserError(
            f"adapter.start: {config.adapter.start} with quantization: the adapter belongs to a base that only this "
            "run has; use `meshwright checkpoint export`, which merges it"
        )
    kind = config_json(config.model, positions=config.data.sequence_length, dtype="float32")["model_type"]
    if config.adapters and adapter is None:
        return [f"{one}/{file}" for one in config.adapters for file in export_adapter(run, target / one, adapter=one)]
    program, state = opened(config, run, adapter=adapter)
    config = program.config

    def started() -> Any:
        first = program.initialize()
        return combine(first.params, first.frozen)

    target.mkdir(parents=True, exist_ok=True)
    tree = program.dequantized_weights(state)
    names = peft.write(tree, config.model, config.adapter, target, kind=kind, initial_tree=started)
    return [*names, *copy_companions(run, target)]


def absent_or_empty(directory: Path) -> None:
    """Raise UserError where something is there already."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists; choose another name, nothing is overwritten")


def made_for(model: ModelConfig) -> int | None:
    """Tokens of the longest row the model's origin was made for, if that is still there and says so."""
    if model.origin is None or not (file := Path(model.origin) / "config.json").is_file():
        return None
    tree = json.loads(file.read_text(encoding="utf-8"))
    return tree.get("max_position_embeddings") or tree.get("n_positions")


def token_ids(run: Path) -> dict[str, Any]:
    """`bos_token_id` and the like of the run's tokenizer; {} where it has none."""
    from ..data.tokenizer import load

    if not (run / "tokenizer.json").is_file():
        return {}
    tokenizer = load(run)
    return {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}

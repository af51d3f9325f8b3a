"""Import and export of weights: a Hugging Face directory becomes a run, and a run becomes a Hugging Face directory."""

import dataclasses
import json
from contextlib import closing
from pathlib import Path
from typing import Any

from ...checkpoint.interop import huggingface, peft
from ...checkpoint.storage import Storage
from ...configs.errors import UserError
from ...configs.huggingface import to_config_json
from ...configs.loader import validate_tree
from ...configs.run import RunConfig
from ...configs.sections.model import ModelConfig
from ...models.adapters.attach import split_trained
from ...models.adapters.merge import merge_adapters
from ...models.families.huggingface_names import SEQUENCE_CLASSIFIERS
from ...models.families.safetensors_files import COMPANIONS, copy_companions
from ...parallel.mesh import make_mesh
from ...parallel.state import combine
from ..core.process_env import ProcessInfo
from ..core.run_directory import open_directory
from ..core.run_paths import newest_island
from ..data.tokenizer import load_tokenizer
from ..engine import runtime
from ..engine.program import build
from .inference_session import inference_config, load_program

# An imported run holds weights and nothing else: this optimizer has no state.
WEIGHTS_ONLY = {"name": "sgd", "b1": 0.0}
SEEDED = ("vera", "shira")  # adapters with random arrays that are neither trained nor the base model's


def config_for(source: Path, **sections: Any) -> RunConfig:
    """The configuration of a run whose model is the one in `source`, with more `sections`."""
    model = {"from": str(source.absolute())}
    length = min(256, origin_length(ModelConfig.model_validate(model)) or 256)
    return validate_tree({"model": model, "data": {"sequence_length": length}} | sections)


def import_directory(source: Path, run: Path, *, adapter: Path | None = None) -> Path:
    """Create the run directory `run`, with one checkpoint, from the model in `source`.

    `generate` and `evaluate` read it. `adapter` is a PEFT directory, whose adapter the run then has. Raises UserError
    if one of them cannot be represented exactly, or if `run` exists.
    """
    check_empty(run)
    sections: dict[str, Any] = {"name": run.name, "optimizer": WEIGHTS_ONLY}
    if adapter is not None:
        model = config_for(source).model
        peft_adapter = peft.read(adapter, model, kind=huggingface.format_kind(model))
        if peft_adapter.adapter.method in SEEDED:
            raise UserError(
                f"{adapter}: {peft_adapter.adapter.method} needs the random numbers in its file, and a run draws its "
                "own from the seed; merge the adapter in PEFT, and import the model"
            )
        sections["adapter"] = peft_adapter.adapter.model_dump()
    config = config_for(source, **sections)
    runtime.start(config, ProcessInfo())
    program = build(config, make_mesh(config.mesh))
    state = program.initialize()
    if adapter is not None:
        tree = peft.load_adapters(combine(state.params, state.frozen), peft_adapter, model)
        params, frozen = split_trained(tree, model, peft_adapter.adapter)
        state = dataclasses.replace(state, params=params, frozen=frozen)
    open_directory(config, root=run.parent)
    copy_companions(source, run)
    with closing(Storage(run / "checkpoints", layout=program.layout)) as storage:
        storage.save(state, step=0, data={"corpus": "", "samples": 0, "origin": program.origin})
    return run


def export_run(run: Path, target: Path, *, limit: int, adapter: str | None = None) -> list[str]:
    """Write the newest checkpoint of `run` to `target` in files of at most `limit` bytes; return the file names.

    The adapter is merged; `adapter` chooses one of several. Raises UserError if no format of transformers holds the
    model exactly, or if `target` exists.
    """
    check_empty(target)
    run = newest_island(run)
    program, state = load_program(inference_config(run, []), run, adapter=adapter)
    config, model = program.config, program.config.model
    params = merge_adapters(program.dequantized_weights(state), model, config.adapter)
    dtype = str(params["embed"]["embedding"].dtype)
    positions = max(config.data.sequence_length, origin_length(model) or 0)
    tree = to_config_json(model, positions=positions, dtype=dtype)
    if (run / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(run)
        tree |= {"bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos, "pad_token_id": tokenizer.pad}
    if "score" in params:
        params = {name: part for name, part in params.items() if name != "head"}
        tree |= classifier_config(tree["model_type"])
    target.mkdir(parents=True, exist_ok=True)
    files = huggingface.write(params, model, target, kind=tree["model_type"], limit=limit)
    (target / "config.json").write_text(json.dumps(tree, indent=2) + "\n", encoding="utf-8")
    return ["config.json", *(file.name for file in files), *copy_companions(run, target, names=COMPANIONS)]


def classifier_config(kind: str) -> dict[str, Any]:
    """The part of config.json for a reward model of format `kind`. Raises UserError if transformers has none."""
    if kind not in SEQUENCE_CLASSIFIERS:
        raise UserError(
            f"recipe.name: reward made a model of format {kind}, and transformers has reward models only of "
            f"{', '.join(SEQUENCE_CLASSIFIERS)}; train a model of one of these families"
        )
    return {"architectures": [SEQUENCE_CLASSIFIERS[kind]], "id2label": {"0": "score"}, "label2id": {"score": 0}}


def export_adapter(run: Path, target: Path, *, adapter: str | None = None) -> list[str]:
    """Write the adapter of the newest checkpoint of `run` to `target` in PEFT's format; return the file names.

    `adapter` chooses one of several; None: each of them goes to a directory of its name in `target`. Raises UserError
    if the run has no adapter, if PEFT has no format for its method, or if `target` exists.
    """
    check_empty(target)
    run = newest_island(run)
    config = inference_config(run, [])
    if config.adapter is None:
        raise UserError(
            f"adapter: {run} has none, because all weights were trained; use `meshwright checkpoint export`"
        )
    if config.recipe.name == "reward":
        raise UserError(
            f"recipe.name: reward trained a score head with the adapter of {run}, and PEFT's file cannot hold it; "
            "use `meshwright checkpoint export`, which merges it"
        )
    if config.quantization is not None and config.adapter.start != "zero":
        raise UserError(
            f"adapter.start: {config.adapter.start} with quantization: the adapter belongs to a base that only this "
            "run has; use `meshwright checkpoint export`, which merges it"
        )
    kind = to_config_json(config.model, positions=config.data.sequence_length, dtype="float32")["model_type"]
    if config.adapters and adapter is None:
        return [
            f"{name}/{file}" for name in config.adapters for file in export_adapter(run, target / name, adapter=name)
        ]
    program, state = load_program(config, run, adapter=adapter)
    config = program.config

    def initial_tree() -> Any:
        initial = program.initialize()
        return combine(initial.params, initial.frozen)

    target.mkdir(parents=True, exist_ok=True)
    tree = program.dequantized_weights(state)
    names = peft.write(tree, config.model, config.adapter, target, kind=kind, initial_tree=initial_tree)
    return [*names, *copy_companions(run, target)]


def check_empty(directory: Path) -> None:
    """Raise UserError if `directory` exists and is not an empty directory."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} exists; choose another name, nothing is overwritten")


def origin_length(model: ModelConfig) -> int | None:
    """The longest row, in tokens, that config.json of the model's origin names; None if it names none or is gone."""
    if model.origin is None or not (file := Path(model.origin) / "config.json").is_file():
        return None
    tree = json.loads(file.read_text(encoding="utf-8"))
    return tree.get("max_position_embeddings") or tree.get("n_positions")

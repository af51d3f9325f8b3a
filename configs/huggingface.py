"""A Hugging Face config.json <-> the section model. Without JAX, so that a mistake is reported before JAX is imported.

A `HuggingFaceFormat` describes one `model_type` of transformers by tables: its names of our keys, the defaults of
absent keys, and keys of which this decoder supports only one value. Anything else is refused with key and value: a
model is never imported approximately. Both spellings of rope are read (`rope_scaling` of version 4, `rope_parameters`
of version 5); version 4 is written, because both versions read it.

    to_model_section(json.loads(text)) -> {"family": "qwen3", "layers": 28, ...}          to_config_json(model) -> {...}
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import yaml

from .errors import UserError
from .hf_rope import read_rope, write_rope

logger = logging.getLogger(__name__)
Tree = Mapping[str, Any]

SOFTCAPS = ("attention_softcap", "logit_softcap")

# Keys that may differ between the model of a run and that of a file: they do not change what the weights compute.
NOT_IN_FILES = {"family", "from", "vocab_multiple", "dropout", "attention", "scan"}


@dataclass(frozen=True)
class HuggingFaceFormat:
    """One `model_type` of transformers; `huggingface.yaml` describes the fields."""

    architecture: str
    family: str
    defaults: Tree
    fixed: Tree
    keys: Mapping[str, str]
    windows: Literal["none", "all", "types"] = "none"


@cache
def read_tables() -> tuple[dict[str, HuggingFaceFormat], frozenset[str]]:
    """(model_type -> its format, keys without effect) of `huggingface.yaml`."""
    tables = yaml.safe_load((Path(__file__).parent / "huggingface.yaml").read_text(encoding="utf-8"))
    formats = {kind: HuggingFaceFormat(**fields) for kind, fields in tables["formats"].items()}
    return formats, frozenset(tables["ignored"])


def read_model_section(directory: str | Path) -> dict[str, Any]:
    """The section model of the config.json in `directory`. Raises UserError where it cannot be read."""
    file = Path(directory).expanduser() / "config.json"
    try:
        tree = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"model.from: {directory} has no readable config.json ({error.strerror}); "
            "set it to a Hugging Face model directory, with config.json and "
            f"*.safetensors{download_hint(str(directory))}"
        ) from None
    except ValueError as error:
        raise UserError(f"model.from: {file} is not JSON: {error}; copy the file again") from None
    return to_model_section(tree)


def download_hint(name: str) -> str:
    """A hint how to download a `name` of the form `owner/model`; nothing is downloaded here."""
    hub = name.count("/") == 1 and name[0] not in "./~" and not Path(name).exists()
    return f" (`hf download {name} --local-dir {name}` fetches one of the hub's)" if hub else ""


def find_format(tree: Tree) -> tuple[str, Tree]:
    """(model_type, the part of the file about the decoder). Raises UserError for an unknown model_type."""
    if tree.get("auto_map"):
        raise unsupported_error("auto_map", tree["auto_map"], "its own code decides what it computes")
    if tree.get("quantization_config"):
        raise unsupported_error("quantization_config", tree["quantization_config"], "weights are read unquantized only")
    if tree.get("model_type") == "gemma3" and "text_config" in tree:  # with an image tower, which is left out
        tree = {"model_type": "gemma3_text"} | tree["text_config"]
    kind = str(tree.get("model_type"))
    formats, _ = read_tables()
    if kind not in formats:
        raise UserError.no_match("model.from: config.json: model_type", [kind], candidates=formats)
    return kind, tree


def to_model_section(tree: Tree) -> dict[str, Any]:
    """Our section model for a config.json. Raises UserError with their key where no exact import is possible."""
    kind, tree = find_format(tree)
    form = read_tables()[0][kind]
    tree = {**form.defaults, **tree}
    check_fixed(form, tree)
    section: dict[str, Any] = {"family": form.family}
    section |= {ours: tree[theirs] for ours, theirs in form.keys.items() if tree.get(theirs) is not None}
    section |= {ours: None for ours in SOFTCAPS if form.keys.get(ours) in tree and ours not in section}
    section.setdefault("tied_embeddings", False)
    if form.family == "gpt2":
        return {"mlp": 4 * tree["n_embd"]} | section
    section["rope"] = read_rope(tree, local="gemma3" in kind)
    section["windows"] = read_windows(form, tree)
    if "query_pre_attn_scalar" in tree:
        section["attention_scale"] = tree["query_pre_attn_scalar"] ** -0.5
    if kind == "llama":
        section |= llama_biases(tree)
    return section


def check_fixed(form: HuggingFaceFormat, tree: Tree) -> None:
    """Raise UserError for a value that is not supported; log a warning for unknown keys."""
    for key, only in form.fixed.items():
        choices = only if isinstance(only, list) else [only]
        if key in tree and tree[key] not in choices:
            raise unsupported_error(
                key, tree[key], f"only {' or '.join(map(repr, choices))} is what this decoder computes"
            )
    known_keys = read_tables()[1] | set(form.keys.values()) | form.fixed.keys() | {"attention_bias", "mlp_bias"}
    if unknown := sorted(key for key in tree.keys() - known_keys if tree[key] not in (None, False, "", [], {})):
        logger.warning("config.json: not read: %s", ", ".join(f"{key}={tree[key]!r:.40}" for key in unknown))


def unsupported_error(key: str, value: Any, why: str) -> UserError:
    """The error for a model that we would compute differently from transformers."""
    return UserError(f"model.from: config.json: {key}: {value!r:.120}: {why}; use another model")


def llama_biases(tree: Tree) -> dict[str, bool]:
    """Our keys for `attention_bias` and `mlp_bias`, which must be equal."""
    attention, mlp = bool(tree.get("attention_bias")), bool(tree.get("mlp_bias"))
    if attention != mlp:
        raise unsupported_error("attention_bias", attention, f"mlp_bias is {mlp}, but this decoder has both or neither")
    return {"qkv_bias": attention, "linear_bias": mlp}


def read_windows(form: HuggingFaceFormat, tree: Tree) -> list[int | None]:
    """`model.windows`: the shortest pattern whose repetition gives the layers of the file."""
    window, layers = tree.get("sliding_window"), tree["num_hidden_layers"]
    if form.windows == "none":
        return [None]
    if form.windows == "all":
        return [window]
    if kinds := tree.get("layer_types"):
        if unknown := set(kinds) - {"full_attention", "sliding_attention"}:
            raise unsupported_error(
                "layer_types", sorted(unknown), "only full_attention and sliding_attention are known"
            )
        by_layer = [window if kind == "sliding_attention" else None for kind in kinds]
    elif pattern := tree.get("sliding_window_pattern") or tree.get("_sliding_window_pattern"):
        by_layer = [None if (layer + 1) % pattern == 0 else window for layer in range(layers)]
    else:
        first = tree.get("max_window_layers", layers) if tree.get("use_sliding_window") else layers
        by_layer = [window if layer >= first else None for layer in range(layers)]
    return shortest_pattern(by_layer)


def shortest_pattern(items: list[Any]) -> list[Any]:
    """The shortest list whose repetition begins with `items`.

    >>> shortest_pattern([1024, None, 1024, None, 1024])
    [1024, None]
    """
    return next(
        items[:length]
        for length in range(1, len(items) + 1)
        if all(item == items[index % length] for index, item in enumerate(items))
    )


def to_config_json(model: Any, *, positions: int, dtype: str) -> dict[str, Any]:
    """A config.json that reads back as `model` (a ModelConfig). Raises UserError where no format can express it.

    The family's own format is tried first. `positions` is the longest row of the model in tokens, `dtype` that of the
    tensors.
    """
    formats, _ = read_tables()
    first = [kind for kind, form in formats.items() if form.family == model.family]
    differing = {}
    for kind in [*first, *(kind for kind in formats if kind not in first)]:
        tree = write_format(kind, model, positions=positions, dtype=dtype)
        if not (differing.setdefault(kind, changed_keys(model, tree))):
            return tree
    raise UserError(
        f"model.family: {first[0]} in transformers cannot express "
        f"{', '.join(f'model.{key}: {getattr(model, key)}' for key in differing[first[0]])}, nor can another format; "
        "train with the values of the family to export"
    )


def write_format(kind: str, model: Any, *, positions: int, dtype: str) -> dict[str, Any]:
    """The config.json of format `kind` that comes closest to `model`."""
    form = read_tables()[0][kind]
    sizes = {"kv_heads": model.key_value_heads, "head_dim": model.head_width}
    tree: dict[str, Any] = {"architectures": [form.architecture], "model_type": kind, "torch_dtype": dtype}
    # Without them transformers assumes default ids, which a small vocabulary does not have.
    tree |= dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    tree |= {theirs: sizes.get(ours, getattr(model, ours)) for ours, theirs in form.keys.items()}
    tree |= {key: only[-1] if isinstance(only, list) else only for key, only in form.fixed.items()}
    if form.family == "gpt2":
        return tree
    tree |= {"max_position_embeddings": positions} | write_rope(model.rope, local="gemma3" in kind)
    layers = [model.windows[layer % len(model.windows)] for layer in range(model.layers)]
    tree["sliding_window"] = next((window for window in layers if window is not None), None)
    if form.windows == "types":
        tree["layer_types"] = ["full_attention" if window is None else "sliding_attention" for window in layers]
        tree["use_sliding_window"] = tree["sliding_window"] is not None
    if "query_pre_attn_scalar" in form.defaults:
        scale = model.head_width**-0.5 if model.attention_scale is None else model.attention_scale
        tree["query_pre_attn_scalar"] = round(scale**-2)
    if kind == "llama":
        tree |= {"attention_bias": model.qkv_bias, "mlp_bias": model.linear_bias}
    return tree


def changed_keys(model: Any, tree: Tree) -> list[str]:
    """Keys of the section model in which the model of `tree` differs from `model`."""
    try:
        other = type(model).model_validate(to_model_section(tree))
    except (UserError, ValueError):
        return ["family"]
    ours, theirs = effective_settings(model), effective_settings(other)
    return [key for key in ours if ours[key] != theirs[key]]


def effective_settings(model: Any) -> dict[str, Any]:
    """The settings that decide what the weights compute, normalized so that equal models have equal settings."""
    settings = {key: value for key, value in model.model_dump().items() if key not in NOT_IN_FILES}
    settings |= {"kv_heads": model.key_value_heads, "head_dim": model.head_width}
    settings["windows"] = [model.windows[layer % len(model.windows)] for layer in range(model.layers)]
    if model.attention_scale is None:
        settings["attention_scale"] = model.head_width**-0.5
    if model.position_encoding != "learned":
        del settings["max_positions"]
    if model.rope.scaling in ("none", "linear"):
        settings["rope"] = {key: settings["rope"][key] for key in ("theta", "local_theta", "scaling", "factor")}
    return settings

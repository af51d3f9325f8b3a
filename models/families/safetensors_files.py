"""Safetensors files of a model directory: reads rectangles of tensors, writes shards of limited size with an index.

model.safetensors, or model-00001-of-00003.safetensors ... with model.safetensors.index.json
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...configs.errors import UserError, first_line
from .huggingface_regions import Index

INDEX = "model.safetensors.index.json"
# Other files of a directory that belong to the weights; they are copied unchanged.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model",
    "vocab.json", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip

SAMPLES, SAMPLE_BYTES = 1024, 1 << 16  # of a file, for its fingerprint; the first sample holds the header

# Tensors that are not weights of the decoder: buffers of old files, and image towers.
NOT_WEIGHTS = ("rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias")
OTHER_TOWERS = ("vision_tower.", "multi_modal_projector.", "model.vision_tower.", "model.multi_modal_projector.")

# Other names of the same tensor: in GPT-2's first files, and in models with an image tower.
ALIASES: tuple[Callable[[str], str], ...] = (
    lambda name: name,
    lambda name: name.removeprefix("transformer."),
    lambda name: f"language_model.{name}",
    lambda name: name.replace("model.", "model.language_model.", 1),
)


class WeightFiles:
    """The tensors of a directory by transformers' names. A tensor is read when it is asked for, not before."""

    def __init__(self, directory: str | Path):
        """Raises UserError where there are no safetensors files, or one cannot be opened."""
        self.directory = Path(directory).expanduser()
        self._handles: dict[Path, Any] = {}
        self._files = locate_tensors(self.directory)

    def __iter__(self) -> Any:
        return iter(self._files)

    def resolve_name(self, tensor: str) -> str:
        """The name of `tensor` in the files. Raises UserError where they do not have it."""
        name = next((alias(tensor) for alias in ALIASES if alias(tensor) in self._files), None)
        if name is None:
            raise UserError.no_match(f"model.from: {self.directory}: tensor", [tensor], candidates=self._files)
        return name

    def shape(self, tensor: str) -> tuple[int, ...]:
        """The shape of `tensor`."""
        return tuple(self._slice(tensor).get_shape())

    def read_region(self, tensor: str, index: Index) -> np.ndarray:
        """The rectangle `index` of `tensor`, without reading the rest. Raises UserError for a quantized tensor."""
        source = self._slice(tensor)
        if source.get_dtype() not in ("F64", "F32", "F16", "BF16"):
            raise UserError(
                f"model.from: {self.directory}: {tensor} is {source.get_dtype()}, a quantized weight; "
                "set it to the model's unquantized files"
            )
        return source[index]

    def fingerprint(self) -> str:
        """A hash that identifies the weights: of all names, shapes and offsets, and of samples of every file."""
        import xxhash

        state = xxhash.xxh3_128()
        for file in sorted(set(self._files.values())):
            size = file.stat().st_size
            with open(file, "rb") as content:
                for offset in range(0, size, max(size // SAMPLES, SAMPLE_BYTES)):
                    content.seek(offset)
                    state.update(content.read(SAMPLE_BYTES))
            state.update(str(size).encode())
        return state.hexdigest()

    def _slice(self, tensor: str) -> Any:
        name = self.resolve_name(tensor)
        file = self._files[name]
        if file not in self._handles:
            self._handles[file] = open_safetensors(file)
        return self._handles[file].get_slice(name)


def open_safetensors(file: Path) -> Any:
    """The memory-mapped file. Raises UserError where it is not a safetensors file."""
    from safetensors import SafetensorError, safe_open

    try:
        return safe_open(file, "numpy")
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.from: {file} cannot be read: {first_line(error)}; copy it again") from None


def locate_tensors(directory: Path) -> dict[str, Path]:
    """Tensor -> the file that holds it. Raises UserError where the directory lacks a file."""
    index, single = directory / INDEX, directory / "model.safetensors"
    if index.is_file():
        try:
            files = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        except (ValueError, KeyError) as error:
            raise UserError(f"model.from: {index} has no readable weight_map ({error!r}); copy it again") from None
        if missing := sorted({name for name in files.values() if not (directory / name).is_file()}):
            raise UserError(f"model.from: {directory} lacks {', '.join(missing)}, which its index names; copy it again")
        return {tensor: directory / name for tensor, name in files.items()}
    if not single.is_file():
        raise UserError(
            f"model.from: {directory} holds no model.safetensors and no {INDEX}; save the model again with "
            "safetensors, because pickled weights (*.bin) are never loaded"
        )
    return dict.fromkeys(open_safetensors(single).keys(), single)


def check_complete(files: WeightFiles, shapes: Mapping[str, tuple[int, ...]], *, tied: bool) -> None:
    """Raise UserError where a tensor is missing, has another shape than in `shapes`, or is unknown."""
    for tensor, expected in shapes.items():
        if (shape := files.shape(tensor)) != expected:
            raise UserError(
                f"model.from: {files.directory}: {tensor} is {list(shape)}, but the model section implies "
                f"{list(expected)}; leave the sizes to config.json"
            )
    used = {files.resolve_name(tensor) for tensor in shapes} | ({"lm_head.weight"} if tied else set())
    unused = [name for name in files if name not in used]
    unused = [name for name in unused if not name.endswith(NOT_WEIGHTS) and not name.startswith(OTHER_TOWERS)]
    if unused:
        raise UserError(
            f"model.from: {files.directory}: {', '.join(sorted(unused)[:4])} ({len(unused)} in all) do not "
            "belong to the model that its config.json describes, so the import would not be exact; use another model"
        )


def split_into_shards(sizes: Mapping[str, int], *, limit: int) -> list[list[str]]:
    """Names in order, in groups whose sizes add up to at most `limit` bytes, or that hold one name.

    >>> split_into_shards({"a": 3, "b": 2, "c": 2, "d": 9}, limit=5)
    [['a', 'b'], ['c'], ['d']]
    """
    groups: list[list[str]] = [[]]
    remaining = limit
    for name, size in sizes.items():
        if groups[-1] and size > remaining:
            groups.append([])
            remaining = limit
        groups[-1].append(name)
        remaining -= size
    return groups


def write_shards(
    directory: Path, sizes: Mapping[str, int], get: Callable[[str], np.ndarray], *, limit: int
) -> list[Path]:
    """Write every tensor of `sizes` (name -> bytes), a shard of at most `limit` bytes in memory at a time."""
    from safetensors.numpy import save_file

    groups = split_into_shards(sizes, limit=limit)
    names = ["model.safetensors"]
    if len(groups) > 1:
        names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    for name, group in zip(names, groups, strict=True):
        save_file({tensor: get(tensor) for tensor in group}, directory / name, metadata={"format": "pt"})
    if len(groups) > 1:
        files = {tensor: name for name, group in zip(names, groups, strict=True) for tensor in group}
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": files}
        (directory / INDEX).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return [directory / name for name in names]


def copy_companions(source: str | Path, target: Path, *, names: Iterable[str] = COMPANIONS) -> list[str]:
    """Copy the tokenizer, chat template and generation settings that exist; returns the names of the copied files."""
    import shutil

    existing = [name for name in names if (Path(source).expanduser() / name).is_file()]
    for name in existing:
        shutil.copyfile(Path(source).expanduser() / name, target / name)
    return existing

"""The manifest of a checkpoint: its arrays and their fingerprints. It is written last, and commits the checkpoint.

    CHECKPOINTS/12/manifest.json        the manifest of the checkpoint of step 12
    CHECKPOINTS/.parts-12/0.json        the part from process 0; the parts are merged once the arrays are on disk

The file is one line of JSON, {"body": ..., "fingerprint": xxh3 of the body}, and must be that line byte for byte.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from .errors import DamagedCheckpoint
from .fingerprints import Index

VERSION = 1
NAME = "manifest.json"


@dataclass(frozen=True)
class LogicalArray:
    """One logical array of a checkpoint."""

    path: str  # of the array of the run that holds it
    index: list[int | list[int | None]]  # index into that array: integers, and [start, stop] for slices
    shape: list[int]
    dtype: str
    blocks: list[str | None]  # fingerprints in order; None in a part: hashed by another process


@dataclass(frozen=True)
class Manifest:
    """The content of a checkpoint. The field names are the keys of the JSON."""

    step: int
    layout: str  # name of the run layout the arrays are stored in
    data: dict[str, Any]  # position in the data, a few integers
    stored: dict[str, list[Any]]  # path -> [shape, dtype] of every array as stored
    arrays: dict[str, LogicalArray]  # by canonical name
    rest: dict[str, LogicalArray]  # by path: whole arrays of the run, where `arrays` do not cover all elements
    version: int = VERSION

    def all_entries(self) -> dict[str, LogicalArray]:
        """Return `arrays` by canonical name and `rest` by path together."""
        return {**self.arrays, **{f"{path} (as stored)": entry for path, entry in self.rest.items()}}


def index_to_json(index: Index) -> list[int | list[int | None]]:
    """Convert an index to JSON.

    >>> encoded((2, slice(None, 61)))
    [2, [None, 61]]
    """
    return [[entry.start, entry.stop] if isinstance(entry, slice) else int(entry) for entry in index]


def index_from_json(index: Sequence[Any]) -> Index:
    """Invert `index_to_json`."""
    return tuple(slice(*entry) if isinstance(entry, list) else entry for entry in index)


def manifest_text(manifest: Manifest) -> str:
    """Return the content of the file."""
    body = json.dumps(asdict(manifest), sort_keys=True, separators=(",", ":"))
    return f'{{"body":{body},"fingerprint":"{xxhash.xxh3_64_hexdigest(body.encode())}"}}\n'


def parse_manifest(text: str) -> Manifest:
    """Parse a manifest. Raises ValueError unless `text` is exactly what `manifest_text` writes."""
    body = json.loads(text)["body"]
    if body["version"] != VERSION:
        raise ValueError(f"it has version {body['version']}, but this program reads version {VERSION}")
    entries = {key: {name: LogicalArray(**entry) for name, entry in body[key].items()} for key in ("arrays", "rest")}
    manifest = Manifest(**{**body, **entries})
    if manifest_text(manifest) != text:
        raise ValueError("its own fingerprint does not match")
    return manifest


def read(directory: Path) -> Manifest:
    """Read the manifest of the checkpoint in `directory`. Raises DamagedCheckpoint if it is missing or damaged."""
    try:
        manifest = parse_manifest((directory / NAME).read_bytes().decode())
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"checkpoint {directory}: {NAME} is missing") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedCheckpoint(f"checkpoint {directory}: {NAME} is damaged: {str(error)[:120]}") from error
    if str(manifest.step) != directory.name:
        raise DamagedCheckpoint(f"checkpoint {directory}: {NAME} is of step {manifest.step}")
    return manifest


def write(directory: Path, manifest: Manifest) -> None:
    """Write the manifest atomically, even if the power fails."""
    write_durably(directory / NAME, manifest_text(manifest))


def write_durably(file: Path, text: str) -> None:
    """Replace `file` atomically, and wait until it is on the disk."""
    draft = file.with_name(f".{file.name}.draft")
    with draft.open("w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(draft, file)
    descriptor = os.open(file.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def merge_parts(parts: Sequence[Manifest]) -> Manifest:
    """Merge the parts of all processes. Raises DamagedCheckpoint if no part has the fingerprint of a block."""
    first = parts[0]
    for part in parts:
        if (part.step, part.data, part.stored) != (first.step, first.data, first.stored):
            raise DamagedCheckpoint(f"checkpoint {first.step}: its processes saved different arrays or data")
    return replace(
        first,
        arrays=merge_blocks([part.arrays for part in parts], step=first.step),
        rest=merge_blocks([part.rest for part in parts], step=first.step),
    )


def merge_blocks(parts: Sequence[Mapping[str, LogicalArray]], *, step: int) -> dict[str, LogicalArray]:
    """Return entries with the fingerprints of all processes."""
    result = {}
    for name, entry in parts[0].items():
        blocks = [next((hash_ for hash_ in hashes if hash_ is not None), None)
                  for hashes in zip(*(part[name].blocks for part in parts), strict=True)]  # fmt: skip
        if None in blocks:
            raise DamagedCheckpoint(f"checkpoint {step}: no process hashed block {blocks.index(None)} of {name}")
        result[name] = replace(entry, blocks=blocks)
    return result

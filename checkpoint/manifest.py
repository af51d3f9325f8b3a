"""The manifest of a checkpoint: what is in it and its fingerprints, written last. With it a checkpoint is committed.

    CHECKPOINTS/12/manifest.json        the manifest, inside the checkpoint it vouches for
    CHECKPOINTS/.parts-12/0.json        what process 0 saw of step 12; merged once the arrays are there

The file is one line of JSON, {"body": ..., "fingerprint": xxh3 of the body}, and must be that line byte for byte.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from .errors import DamagedCheckpoint
from .fingerprints import Index

VERSION = 1
NAME = "manifest.json"


@dataclass(frozen=True)
class Logical:
    """One logical array of a checkpoint."""

    path: str  # of the run's array that holds it
    index: list[int | list[int | None]]  # where in that array: integers, and [start, stop] for slices
    shape: list[int]
    dtype: str
    blocks: list[str | None]  # fingerprints, in order; None in a part: another process's


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint holds. `arrays` are by canonical name; `rest` are whole run arrays that no name covers."""

    step: int
    layout: str  # name of the run layout the arrays are stored in
    data: dict[str, Any]  # the data's integers
    stored: dict[str, list[Any]]  # path -> [shape, dtype] of every array as stored
    arrays: dict[str, Logical]
    rest: dict[str, Logical]
    version: int = VERSION

    def everything(self) -> dict[str, Logical]:
        """Canonical name, or path of a whole run array -> entry."""
        return {**self.arrays, **{f"{path} (as stored)": entry for path, entry in self.rest.items()}}


def encoded(index: Index) -> list[int | list[int | None]]:
    """An index as JSON.

    >>> encoded((2, slice(None, 61)))
    [2, [None, 61]]
    """
    return [[part.start, part.stop] if isinstance(part, slice) else int(part) for part in index]


def decoded(index: Sequence[Any]) -> Index:
    """The inverse of `encoded`."""
    return tuple(slice(*part) if isinstance(part, list) else part for part in index)


def text_of(manifest: Manifest) -> str:
    """The one line that is the file."""
    body = json.dumps(asdict(manifest), sort_keys=True, separators=(",", ":"))
    return f'{{"body":{body},"fingerprint":"{xxhash.xxh3_64_hexdigest(body.encode())}"}}\n'


def parsed(text: str) -> Manifest:
    """The manifest that `text` spells. Raises ValueError where it is not exactly what `text_of` writes."""
    body = json.loads(text)["body"]
    if body["version"] != VERSION:
        raise ValueError(f"version {body['version']}, and this program reads version {VERSION}")
    made = {key: {name: Logical(**entry) for name, entry in body[key].items()} for key in ("arrays", "rest")}
    manifest = Manifest(**{**body, **made})
    if text_of(manifest) != text:
        raise ValueError("its own fingerprint does not match")
    return manifest


def read(directory: Path) -> Manifest:
    """The manifest of the checkpoint in `directory`. Raises DamagedCheckpoint where there is none that is whole."""
    try:
        manifest = parsed((directory / NAME).read_bytes().decode())
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"checkpoint {directory}: {NAME} is missing") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise DamagedCheckpoint(f"checkpoint {directory}: {NAME} is damaged: {str(error)[:120]}") from error
    if str(manifest.step) != directory.name:
        raise DamagedCheckpoint(f"checkpoint {directory}: {NAME} is of step {manifest.step}")
    return manifest


def write(directory: Path, manifest: Manifest) -> None:
    """Write the manifest so that it is there whole or not at all, also after a loss of power."""
    write_whole(directory / NAME, text_of(manifest))


def write_whole(file: Path, text: str) -> None:
    """Replace `file` atomically and durably."""
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


def merged(parts: Sequence[Manifest]) -> Manifest:
    """One manifest of what each process saw. Raises DamagedCheckpoint where a block was seen by nobody."""
    first = parts[0]
    for part in parts:
        if (part.step, part.data, part.stored) != (first.step, first.data, first.stored):
            raise DamagedCheckpoint(f"checkpoint {first.step}: its processes saved different things")
    return Manifest(
        **{
            **vars(first),
            "arrays": joined([part.arrays for part in parts], step=first.step),
            "rest": joined([part.rest for part in parts], step=first.step),
        }
    )


def joined(parts: Sequence[Mapping[str, Logical]], *, step: int) -> dict[str, Logical]:
    """Entries with the blocks of all processes."""
    result = {}
    for name, entry in parts[0].items():
        seen = [next((one for one in block if one is not None), None)
                for block in zip(*(part[name].blocks for part in parts), strict=True)]  # fmt: skip
        if None in seen:
            raise DamagedCheckpoint(f"checkpoint {step}: nobody saw block {seen.index(None)} of {name}")
        result[name] = Logical(**{**vars(entry), "blocks": seen})
    return result

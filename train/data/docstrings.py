"""Fine-tuning data that is on every machine: docstrings of Python's standard library, and their functions.

A row is shaped for the format it is asked for: a prompt and a completion, a conversation, the function against that of
another docstring, or a function that is or is not the docstring's.
"""

import ast
import json
import logging
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .disk_cache import cache_entry
from .documents import digest
from .formats import RowReader
from .text_files import open_standard_library

logger = logging.getLogger(__name__)
LONGEST_DOCSTRING, LONGEST_FUNCTION = 300, 800  # characters: a few hundred tokens together
Pairs = list[tuple[str, str]]


def docstring_pairs(source: str) -> Iterator[tuple[str, str]]:
    """(first paragraph of the docstring, function without it) of every documented function in a module.

    >>> list(pairs('def f(x):\\n    "Twice x."\\n    return 2 * x'))
    [('Twice x.', 'def f(x):\\n    return 2 * x\\n')]
    """
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or not (said := ast.get_docstring(node)):
            continue
        first = node.body[0]
        if lines[first.lineno - 1][: first.col_offset].strip():  # on the line of the def
            continue
        kept = [*lines[node.lineno - 1 : first.lineno - 1], *lines[first.end_lineno : node.end_lineno]]
        function = textwrap.dedent("\n".join(kept)) + "\n"
        said = said.split("\n\n")[0].strip()
        if said and len(said) <= LONGEST_DOCSTRING and len(function) <= LONGEST_FUNCTION:
            yield said, function


def library_pairs(cache: Path) -> tuple[Pairs, str]:
    """All pairs of the standard library, each once, in the order of its files; and their fingerprint."""
    modules = open_standard_library()
    key = digest("docstrings-1", modules.fingerprint, str(LONGEST_DOCSTRING), str(LONGEST_FUNCTION))

    def write(directory: Path) -> None:
        logger.info("reading the docstrings of %d modules", len(modules))
        found: dict[tuple[str, str], None] = {}
        for number, path in enumerate(modules.paths):
            if "test" in path.parts or "tests" in path.parts:  # some distributions leave them out
                continue
            try:
                found |= dict.fromkeys(docstring_pairs(modules[number]))
            except (SyntaxError, ValueError):  # templates of code, and files that are wrong on purpose
                continue
        (directory / "pairs.json").write_text(json.dumps(list(found)), encoding="utf-8")

    def read(directory: Path) -> Pairs:
        return [tuple(pair) for pair in json.loads((directory / "pairs.json").read_text(encoding="utf-8"))]

    return cache_entry(cache / "docstrings" / key, read=read, write=write), key


def make_prompt(docstring: str) -> str:
    """What a docstring asks for."""
    return "".join(f"# {line.strip()}\n" for line in docstring.splitlines())


def _completion(docstring: str, function: str, other_function: str, index: int) -> dict[str, Any]:
    return {"prompt": make_prompt(docstring), "completion": function}


def _messages(docstring: str, function: str, other_function: str, index: int) -> dict[str, Any]:
    asked = {"role": "user", "content": f"Write a Python function. {docstring}"}
    return {"messages": [asked, {"role": "assistant", "content": function}]}


def _preference(docstring: str, function: str, other_function: str, index: int) -> dict[str, Any]:
    return {"prompt": make_prompt(docstring), "chosen": function, "rejected": other_function}


def _unpaired(docstring: str, function: str, other_function: str, index: int) -> dict[str, Any]:
    good = index % 2 == 0
    return {"prompt": make_prompt(docstring), "completion": function if good else other_function, "label": good}


ROW_BUILDERS: dict[str, Callable[[str, str, str, int], dict[str, Any]]] = {
    "prompt-completion": _completion,
    "messages": _messages,
    "preference": _preference,
    "unpaired": _unpaired,
}


@dataclass(frozen=True)
class DocstringDocuments:
    """One document a function."""

    pairs: Pairs
    reader: RowReader
    key: str

    @property
    def fingerprint(self) -> str:
        return digest("docstrings", self.key, self.reader.fingerprint)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> str:
        said, function = self.pairs[index]
        other = self.pairs[(index + len(self.pairs) // 2) % len(self.pairs)][1]  # of another module
        row = ROW_BUILDERS[self.reader.format](said, function, other, index)
        return self.reader.document(row, origin=f"function {index} of the standard library")

"""Fine-tuning data that every machine has: docstrings of Python's standard library and their functions.

A row has the configured format: a prompt and a completion, a conversation, a pair of the function and that of another
docstring, or either of them with a label.
"""

import ast
import json
import logging
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .disk_cache import cache_entry
from .documents import Documents, digest
from .formats import RowReader
from .text_files import open_standard_library

logger = logging.getLogger(__name__)
LONGEST_DOCSTRING, LONGEST_FUNCTION = 300, 800  # characters; a few hundred tokens together
Pairs = list[tuple[str, str]]


def docstring_pairs(source: str) -> Iterator[tuple[str, str]]:
    """(first paragraph of the docstring, function without it) of every documented function in a module.

    >>> list(docstring_pairs('def f(x):\\n    "Twice x."\\n    return 2 * x'))
    [('Twice x.', 'def f(x):\\n    return 2 * x\\n')]
    """
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef) or len(node.body) < 2 or not (docstring := ast.get_docstring(node)):
            continue
        first = node.body[0]
        if lines[first.lineno - 1][: first.col_offset].strip():  # the docstring is on the line of the def
            continue
        rest = [*lines[node.lineno - 1 : first.lineno - 1], *lines[first.end_lineno : node.end_lineno]]
        function = textwrap.dedent("\n".join(rest)) + "\n"
        docstring = docstring.split("\n\n")[0].strip()
        if docstring and len(docstring) <= LONGEST_DOCSTRING and len(function) <= LONGEST_FUNCTION:
            yield docstring, function


def library_pairs(cache: Path) -> tuple[Pairs, str]:
    """(all pairs of the standard library, each once, in the order of its files; their fingerprint)."""
    paths, modules = open_standard_library()
    key = digest("docstrings-1", modules.fingerprint, str(LONGEST_DOCSTRING), str(LONGEST_FUNCTION))

    def write(directory: Path) -> None:
        logger.info("reading the docstrings of %d modules", len(modules))
        unique: dict[tuple[str, str], None] = {}
        for number, path in enumerate(paths):
            if "test" in path.parts or "tests" in path.parts:  # some distributions lack them
                continue
            try:
                unique |= dict.fromkeys(docstring_pairs(modules[number]))
            except (SyntaxError, ValueError):  # templates, and files with deliberate mistakes
                continue
        (directory / "pairs.json").write_text(json.dumps(list(unique)), encoding="utf-8")

    def read(directory: Path) -> Pairs:
        return [tuple(pair) for pair in json.loads((directory / "pairs.json").read_text(encoding="utf-8"))]

    return cache_entry(cache / "docstrings" / key, read=read, write=write), key


def make_prompt(docstring: str) -> str:
    """The prompt for a function: its docstring as a comment."""
    return "".join(f"# {line.strip()}\n" for line in docstring.splitlines())


def _completion_row(docstring: str, function: str, other_function: str, index: int) -> dict[str, Any]:
    return {"prompt": make_prompt(docstring), "completion": function}


def _messages_row(docstring: str, function: str, other_function: str, index: int) -> dict[str, Any]:
    request = {"role": "user", "content": f"Write a Python function. {docstring}"}
    return {"messages": [request, {"role": "assistant", "content": function}]}


def _preference_row(docstring: str, function: str, other_function: str, index: int) -> dict[str, Any]:
    return {"prompt": make_prompt(docstring), "chosen": function, "rejected": other_function}


def _unpaired_row(docstring: str, function: str, other_function: str, index: int) -> dict[str, Any]:
    label = index % 2 == 0
    return {"prompt": make_prompt(docstring), "completion": function if label else other_function, "label": label}


ROW_BUILDERS: dict[str, Callable[[str, str, str, int], dict[str, Any]]] = {
    "prompt-completion": _completion_row,
    "messages": _messages_row,
    "preference": _preference_row,
    "unpaired": _unpaired_row,
}


def docstring_documents(reader: RowReader, *, cache: Path) -> Documents:
    """The documents, one a function of the standard library, as rows of the reader's format."""
    pairs, key = library_pairs(cache)

    def read(index: int) -> str:
        docstring, function = pairs[index]
        other_function = pairs[(index + len(pairs) // 2) % len(pairs)][1]  # of another module
        row = ROW_BUILDERS[reader.format](docstring, function, other_function, index)
        return reader.document(row, origin=f"function {index} of the standard library")

    return Documents(len(pairs), read, digest("docstrings", key, reader.fingerprint))

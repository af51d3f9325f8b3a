"""The command line as its help tells it: verbs, arguments, options and their defaults."""

import re
from pathlib import Path

from compatibility.commands import run_cli


def help_texts(directory: Path) -> dict[str, str]:
    """`verb subverb` -> its help, as plain text of 100 columns; "" is that of `meshwright` itself."""
    texts, waiting = {}, [""]
    while waiting:
        results = run_cli(*([*words.split(), "--help"] for words in waiting), cwd=directory)
        told = dict(zip(waiting, (result.output for result in results), strict=True))
        texts |= told
        waiting = [f"{words} {verb}".strip() for words, text in told.items() for verb in entries(text, "Commands")]
    return dict(sorted(texts.items()))


def entries(text: str, heading: str) -> dict[str, str]:
    """First word or words -> description of the entries under `heading`, wrapped lines joined."""
    found: dict[str, str] = {}
    section, name = "", ""
    for line in text.splitlines():
        if re.match(r"\S.*:$", line):
            section = line[:-1]
        elif section == heading and (entry := re.match(r"  (\S.*?)(?:  +(.*))?$", line)):
            name = entry[1]
            found[name] = entry[2] or ""
        elif section == heading and line.strip():
            found[name] = f"{found[name]} {line.strip()}".strip()
    return found


def interface(text: str) -> dict[str, list[str]]:
    """What a user may type after one verb, without the sentences: arguments, options with defaults, verbs below it."""
    return {
        "arguments": [spelled(name, words) for name, words in entries(text, "Arguments").items()],
        "options": sorted(spelled(name, words) for name, words in entries(text, "Options").items()),
        "commands": sorted(entries(text, "Commands")),
    }


def spelled(name: str, description: str) -> str:
    """An argument's or an option's name with its default, `--tokens [default: 64]`.

    >>> spelled("--draw PATH", "Write a picture.  [default: a.svg]")
    '--draw [default: a.svg]'
    """
    names = " ".join(re.findall(r"(?:^|(?<=[ ,/]))--?[a-z][\w-]*", name)) or name.split()[0]
    marks = re.findall(r"\[(default: [^\]]*|required)", description)
    return " ".join([names, *(f"[{mark.split(';')[0]}]" for mark in marks)])

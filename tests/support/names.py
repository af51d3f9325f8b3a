"""Names that do not say what they are, found in the source outside tests.

python tests/support/names.py        # none, says `tests/test_house.py`
"""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
ROOMS = ("configs", "models", "memory", "parallel", "checkpoint", "train", "benchmarks")

# Bare participles, pronouns and adjectives: a reader has to look up of what.
VAGUE = """
    absent ahead alike alone another answered answering any anyone anything apart arranged asked audited bad begun
    beside born both brought budgeted came chosen closed come completed counted cut dealt done drawn due each ended
    ending entered enters everyone everyones everything evaluated every existing filed folded found fresh given
    go goes gone good grown guarded half heard held here it joined keep kept known left lent lift lifted lost made
    met mine moved near nobody nothing old one opened other others ours owed owing own parted parting picked place
    places proven recovered referenced said seen sent several settled shared shown so somebody some spending spent
    spread stored struck taken tell telling theirs them there they thing things told together wanted weighed went what
    which whole whom who wired wrapped"""
# Words of a dialect for which the field has others: see the glossary of docs/contracts.md.
DIALECT = """
    beaten beginnings drift drifts endings journal journals keeper keepers letter letters meeting meetings
    next_one office piece pieces sitting sittings stuff at_hand vouch vouching word words"""
FORBIDDEN = frozenset((VAGUE + DIALECT).split())
PARTICIPLE = re.compile(r"[A-Z]?[a-z]+ed")
NO_PARTICIPLES = frozenset(["embed", "exceed", "feed", "need", "proceed", "seed", "speed"])
# Names of published schedules, which are also their registered names.
TERMS = frozenset(["interlaced", "interleaved"])

# Names that hold: of arrays in checkpoints, and of entries in files.
PUBLIC = frozenset(
    [
        "checkpoint/manifest.py: field Manifest.stored",
        "train/doctor/findings.py: field Problem.what",
        "train/optim/adalora_schedule.py: field RanksState.kept",
        "train/optim/sparse_finetuning.py: field ElementsState.kept",
    ]
)


def vague_names():
    """Sorted lines `file: kind name`, one for each name that does not say what it is."""
    found = set()
    for room in ROOMS:
        for file in (ROOT / room).rglob("*.py"):
            path = file.relative_to(ROOT).as_posix()
            found |= {f"{path}: {kind} {name}" for kind, name in _names(file, path)}
    assert found >= PUBLIC, f"no longer there: {sorted(PUBLIC - found)}"
    return sorted(found - PUBLIC)


def _names(file, path):
    if _is_vague(file.stem, action=True):
        yield "module", file.stem
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ClassDef):
            if _is_vague(node.name, action=True):
                yield "class", node.name
            if not path.startswith(("configs/sections/", "configs/run.py")):  # keys of the YAML file
                yield from (("field", f"{node.name}.{name}") for name in _fields(node) if _is_vague(name))
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            is_state = "property" in [ast.unparse(decorator) for decorator in node.decorator_list]
            if _is_vague(node.name, action=not is_state):
                yield "function", node.name
            if not path.startswith("train/cli/"):  # options that users type
                yield from (("parameter", f"{node.name}({name})") for name in _parameters(node) if _is_vague(name))


def _is_vague(name, *, action=False):
    """Whether a name says nothing; any participle in -ed will do for a state (`enabled`), not for an `action`."""
    word = name.lower().strip("_")
    participle = action and PARTICIPLE.fullmatch(name.strip("_")) and word not in NO_PARTICIPLES | TERMS
    return word in FORBIDDEN or bool(participle)


def _fields(node):
    return [
        item.target.id for item in node.body if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
    ]


def _parameters(node):
    arguments = node.args
    several = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return [argument.arg for argument in several if argument is not None]


if __name__ == "__main__":
    print("\n".join(vague_names()))

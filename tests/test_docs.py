"""The pages are held to the code: links, paths, configurations, commands, keys, and tables that copy the code's."""

import re
import shlex
import textwrap
from pathlib import Path

import pytest
import typer
import yaml
from typer.testing import CliRunner

from meshwright.configs import loader, names, run
from meshwright.configs.aliases import key_aliases
from meshwright.configs.errors import UserError
from meshwright.configs.sections import adapter, data, model, outer, parallel, recipe, training
from meshwright.memory.policy import PRESETS
from meshwright.models.attention.registry import IMPLEMENTATIONS
from meshwright.parallel.outer.wire_formats import WIRE_FORMATS
from meshwright.parallel.pipeline.tables.schedules.registry import SCHEDULES
from meshwright.parallel.sequence.attend import STRATEGIES
from meshwright.parallel.sharding import ACTIVATION_RULES, WEIGHT_RULES
from meshwright.train.cli.main import app
from meshwright.train.core.run_directory import MAY_CHANGE
from meshwright.train.data.packing import PACKERS
from meshwright.train.data.sources import SOURCES
from meshwright.train.optim import optimizer_chain

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]}
ROOMS = ("configs", "models", "memory", "parallel", "checkpoint", "train", "benchmarks", "tests", "docs")

FENCE = re.compile(r"^ *```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
PATH = re.compile(rf"(?:{'|'.join(ROOMS)})/[\w./*-]*(?:::\w+)?")
KEY = re.compile(rf"((?:{'|'.join(run.RunConfig.model_fields)})(?:\.\w+)+)(?:[:=] ?(.+))?")
SUFFIXES = ("py", "yaml", "json", "jsonl", "html", "md", "toml")

each_page = pytest.mark.parametrize("page", PAGES)


def blocks(page, language):
    """The fenced blocks of a page in one language, without their indentation."""
    found = [textwrap.dedent(text) for kind, text in FENCE.findall(PAGES[page]) if kind == language]
    return [text.replace("path/to/model", str(ROOT / "tests/models/families/fixtures/llama3")) for text in found]


def words(page):
    """What stands in backticks outside of blocks."""
    return CODE.findall(FENCE.sub("", PAGES[page]))


def table(page, heading):
    """Rows of the first table behind the line that begins with `| heading |`: the words in backticks of each cell."""
    lines = iter(PAGES[page].splitlines())
    for line in lines:
        if line.startswith(f"| {heading} |"):
            break
    rows = []
    for line in lines:
        if not line.startswith("|"):
            break
        rows.append([CODE.findall(cell) for cell in line.strip("|").split("|")])
    return rows[1:]


def anchors(text):
    """The addresses of a page's headings, as they are made of their words."""
    heads = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


def test_every_page_is_in_the_index_once():
    linked = re.findall(r"^\| \[[^\]]*\]\(([\w/-]+\.md)\)", PAGES["docs/README.md"], re.MULTILINE)
    assert sorted(linked) == sorted({str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md")} - {"README.md"})


@pytest.mark.parametrize("index", sorted(DOCS.glob("*/README.md")), ids=lambda index: index.parent.name)
def test_every_page_of_a_folder_is_in_the_folders_index_once(index):
    linked = re.findall(r"^\| \[[^\]]*\]\(([\w-]+\.md)\)", index.read_text(), re.MULTILINE)
    assert sorted(linked) == sorted({page.name for page in index.parent.glob("*.md")} - {"README.md"})


@each_page
def test_every_link_leads_somewhere(page):
    for target in LINK.findall(FENCE.sub("", PAGES[page])):
        if target.startswith("http"):
            continue
        file, _, anchor = target.partition("#")
        there = (ROOT / page).parent / file if file else ROOT / page
        assert there.exists(), f"{target}: no such file"
        assert not anchor or anchor in anchors(there.read_text()), f"{target}: no such heading"


@each_page
def test_every_path_and_test_in_backticks_exists(page):
    for word in words(page):
        if PATH.fullmatch(word):
            path, _, test = word.partition("::")
            found = list(ROOT.glob(path.rstrip("/")))
            assert found, f"{word}: no such path"
            known = re.findall(r"def (\w+)\(", found[0].read_text()) if test else [""]
            assert test in known, f"{word}: no such test"


@each_page
def test_every_name_said_to_be_in_a_file_is_in_it(page):
    for name, path in re.findall(r"`(\w+)` in\s`([\w/]+\.py)`", PAGES[page]):
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), f"{name}: not in {path}"


@each_page
def test_every_key_in_backticks_is_in_the_schema(page):
    known = {*loader.schema_keys(), *key_aliases().values()}
    for word in words(page):
        if (match := KEY.fullmatch(word)) and match[1].rpartition(".")[2] not in SUFFIXES:
            assert match[1] in known, f"{word}: unknown key"
            if match[2] and not match[2].isupper():  # PROJECT stands for a word of the reader's
                value_of(match[1], match[2])


def value_of(key, text):
    """The value is one the key takes; whether it fits a run that has nothing else does not matter."""
    value = yaml.safe_load(text)
    try:
        loader.validate_tree(loader.nest_value(key.split("."), value))
    except UserError as error:
        assert not str(error).startswith((f"{key}: {value!r}: ", f"{key}: unknown")), str(error)


@each_page
def test_every_configuration_validates(page):
    for block in blocks(page, "yaml"):
        tree = yaml.safe_load(block)
        assert isinstance(tree, dict) and tree.keys() & {"extends", *run.RunConfig.model_fields}, block
        base = loader.read_tree(loader.RECIPES / tree.pop("extends")) if "extends" in tree else {}
        loader.validate_tree(loader.merge_trees(base, tree))


def commands(page):
    """(words after `meshwright`, the line printed below) of every command of the page's console blocks."""
    for block in blocks(page, "console"):
        lines = [*block.splitlines(), ""]
        for number, line in enumerate(lines):
            if line.startswith("$ meshwright "):
                yield shlex.split(line.partition(" > ")[0], comments=True)[2:], lines[number + 1]


@each_page
def test_every_command_parses_and_says_what_is_printed(page):
    for arguments, printed in commands(page):
        command = typer.main.get_command(app)
        while hasattr(command, "commands"):
            assert arguments[0] in command.commands, f"{arguments[0]}: no such verb"
            command, *arguments = command.commands[arguments[0]], *arguments[1:]
        parsed = command.make_context(command.name, list(arguments)).params  # refuses unknown options
        if parsed.get("config") in loader.recipe_names():
            if printed.startswith("meshwright: "):
                with pytest.raises(UserError) as mistake:
                    loader.load_config(parsed["config"], overrides=parsed["overrides"])
                assert printed == f"meshwright: {mistake.value}"
            else:
                loader.load_config(parsed["config"], overrides=parsed["overrides"] or ())


@each_page
def test_every_row_of_a_table_has_as_many_cells_as_its_head(page):
    for rows in re.findall(r"(?:^\|.*\|$\n?)+", FENCE.sub("", PAGES[page]), re.MULTILINE):
        head, *others = rows.splitlines()
        assert not [row for row in others if row.count("|") != head.count("|")]


def test_every_section_has_its_page():
    rows = table("docs/configuration.md", "section")
    assert {name for row in rows for name in row[0]} == {
        key.partition(".")[0] for key in list(loader.schema_keys()) if "." in key
    }


def test_what_may_change_under_one_name_is_what_the_page_says():
    told = PAGES["docs/configuration.md"].partition("## What may change under one name")[2]
    fixed, free = (set(CODE.findall(part)) for part in told.partition("These may change")[::2])
    sections = {name for name in run.RunConfig.model_fields if name != "name"}
    assert free & sections == set(MAY_CHANGE)
    assert fixed & sections == sections - set(MAY_CHANGE)


def test_a_schedule_that_is_printed_is_the_one_that_is_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where pictures go
    shown = [block for block in blocks("docs/pipeline.md", "console") if "\ndevice 0" in block]
    assert shown
    for block in shown:
        command, _, printed = block.removeprefix("$ meshwright ").partition("\n")
        made = CliRunner(env={"COLUMNS": "120"}).invoke(app, shlex.split(command)).output
        lines = [line.rstrip() for line in made.splitlines() if not line.endswith(": written")]
        assert lines == printed.splitlines()


@each_page
def test_every_verb_in_backticks_exists(page):
    verbs = typer.main.get_command(app).commands
    for word in words(page):
        if word.startswith("meshwright ") and not word.split()[1].isupper():
            assert word.split()[1] in verbs, word


def test_other_tools_keys_are_those_the_errors_know():
    rows = [row for line in re.findall(r"^\| (`.*) \|$", PAGES["docs/coming-from.md"], re.MULTILINE)
            for row in [CODE.findall(line)]]  # fmt: skip
    assert [tuple(row) for row in rows] == list(key_aliases().items())


def choices(section, field):
    """The words a key of the schema takes."""
    return section.model_fields[field].annotation.__args__


# Page, heading of the first column -> what that column must list.
LISTED = {
    "families": ("docs/models.md", "family", model.FAMILIES),
    "attention": ("docs/attention.md", "`model.attention`", IMPLEMENTATIONS),
    "presets": ("docs/memory.md", "`memory.policy`", choices(parallel.MemoryConfig, "policy")),
    "strategies": ("docs/parallelism.md", "`sequence.parallel`", STRATEGIES),
    "axes": ("docs/parallelism.md", "axis", names.MESH_AXES),
    "sources": ("docs/data.md", "`data.source`", SOURCES),
    "formats": ("docs/data.md", "`data.format`", data.FORMAT_COLUMNS),
    "recipes": ("docs/finetune/README.md", "`recipe.name`", recipe.RECIPE_KEYS),
    "packers": ("docs/data.md", "`data.packing.method`", PACKERS),
    "adapters": ("docs/finetune/adapters.md", "`adapter.method`", adapter.METHOD_KEYS),
    "outer": ("docs/lowcomm.md", "`outer.name`", outer.RULES),
    "wires": ("docs/lowcomm.md", "`outer.wire`", WIRE_FORMATS),
    "optimizers": ("docs/optimizers.md", "`optimizer.name`", optimizer_chain.RULES),
    "schedules": ("docs/pipeline.md", "schedule", SCHEDULES),
}


@pytest.mark.parametrize(("page", "heading", "listed"), LISTED.values(), ids=LISTED)
def test_a_table_lists_what_there_is(page, heading, listed):
    assert sorted(row[0][0] for row in table(page, heading)) == sorted(listed)


@pytest.mark.parametrize(
    ("heading", "rules"), [("weight dimension", WEIGHT_RULES), ("activation dimension", ACTIVATION_RULES)]
)
def test_sharding_rules_are_the_codes(heading, rules):
    wanted = {name: [axes] if isinstance(axes, str) else list(axes or ()) for name, axes in rules.items()}
    assert {row[0][0]: row[1] for row in table("docs/parallelism.md", heading)} == wanted


def test_presets_keep_what_the_page_says():
    kept = {row[0][0]: row[1] for row in table("docs/memory.md", "`memory.policy`")}
    for name, decisions in PRESETS.items():
        assert kept[name] == [tensor for tensor, decision in decisions.items() if decision == "keep"], name
    emitted = re.search(r"^    (block_in  .*)$", PAGES["docs/memory.md"], re.MULTILINE)[1].split()
    assert tuple(emitted) == names.POLICY_TENSORS


def test_axes_that_are_not_built_say_so():
    lines = re.findall(r"^\| `(\w+)` \| .* \| no: .* \|$", PAGES["docs/parallelism.md"], re.MULTILINE)
    assert lines == list(parallel.UNBUILT_AXES)


def test_every_schedule_and_source_is_named():
    page = PAGES["docs/optimizers.md"]
    assert all(f"`{name}`" in page for name in choices(training.OptimizerConfig, "schedule"))
    assert set(SOURCES) == set(data.Source.__args__)

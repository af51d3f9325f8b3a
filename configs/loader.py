"""Loads YAML files and `key=value` overrides as a `RunConfig`, with `extends`, and explains mistakes."""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, ValidationError

from .aliases import find_alias
from .errors import UserError
from .run import RunConfig

RECIPES = Path(__file__).parent / "recipes"
# Pydantic's names of the members of a union.
TYPE_NAME = re.compile(r"(constrained|function)-.*|literal\[.*\]|(int|float|str|bool)")


def load_config(config: str | Path, *, overrides: Iterable[str] = ()) -> RunConfig:
    """The run of `config` (a YAML file, or the name of a shipped recipe) with `key.sub=value` overrides.

    The file that it `extends` is read first. Raises UserError with one line per mistake.
    """
    return validate_tree(apply_overrides(read_tree(find_config(config)), overrides))


def apply_overrides(tree: dict[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return `tree` with `overrides` (key.sub=value, a value in YAML). Raises UserError on another form."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise UserError(f"{override!r} is not of the form key.sub=value, such as steps=500")
        tree = merge_trees(tree, nest_value(key.split("."), parse_yaml(value, origin=override)))
    return tree


def find_config(config: str | Path) -> Path:
    """The file that `config` names: a path, or a recipe of `meshwright recipes ls`. Raises UserError for neither."""
    for path in (Path(config), RECIPES / f"{config}.yaml"):
        if path.is_file():
            return path
    raise UserError(f"CONFIG: {missing_config_message(str(config), where=Path.cwd())}")


def missing_config_message(config: str, *, where: Path) -> str:
    """The message for a `config` that is neither a file, from the directory `where`, nor a recipe."""
    path = where / config
    if (path / "config.json").is_file():
        return f"{config} is the directory of a model; name a YAML file with model.from: {config}"
    if path.is_dir():
        return f"{config} is a directory; name a YAML file"
    if of_kind := [name for name in recipe_names() if name.startswith(f"{config}/")]:
        return f"{config} is a folder of recipes; name one of {', '.join(of_kind)}"
    neighbours = sorted(str(file.relative_to(where)) for file in path.parent.glob("*.yaml")) if path.suffix else []
    similar = difflib.get_close_matches(config, [*neighbours, *recipe_names()], n=1)
    hint = f" Did you mean {similar[0]}?" if similar else ""
    return f"{config} is neither a file (from {where}) nor a shipped recipe; `meshwright recipes ls` lists those.{hint}"


def recipe_names() -> list[str]:
    """Names of the shipped recipes, e.g. `quickstart`, `pretrain/llama-1b`."""
    return sorted(str(path.relative_to(RECIPES).with_suffix("")) for path in RECIPES.rglob("*.yaml"))


def copy_recipe(recipe: Path, target: Path) -> None:
    """Copy the recipe's text to `target`, with the file that it extends as the name of a shipped recipe."""

    def by_recipe_name(line: re.Match) -> str:
        return f"extends: {find_base(recipe, line[1]).resolve().relative_to(RECIPES.resolve())}"

    target.write_text(
        re.sub(r"^extends: (\S+)$", by_recipe_name, recipe.read_text(encoding="utf-8"), flags=re.MULTILINE)
    )


def read_tree(path: Path, *, extended_by: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings in `path` on top of those in the file that it extends."""
    path = path.resolve()
    if path in extended_by:
        raise UserError(f"extends: {path.name} extends itself through {' -> '.join(p.name for p in extended_by)}")
    try:
        tree = parse_yaml(path.read_text(encoding="utf-8"), origin=path.name)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}; give a YAML file in UTF-8") from error
    if tree is None:
        tree = {}
    if not isinstance(tree, dict):
        raise UserError(f"{path.name}: {tree!r} is not a mapping of keys to values, such as steps: 500")
    base = tree.pop("extends", None)
    return (
        tree if base is None else merge_trees(read_tree(find_base(path, base), extended_by=(*extended_by, path)), tree)
    )


def find_base(path: Path, base: Any) -> Path:
    """The file `base` that `path` extends: relative to `path`, or a recipe, `finetune/lora.yaml` or `finetune/lora`."""
    if not isinstance(base, str):
        raise UserError(f"{path.name}: extends: {base!r} is not a name; name one file, or one shipped recipe")
    for file in (path.parent / base, RECIPES / base, RECIPES / f"{base}.yaml"):
        if file.is_file():
            return file
    raise UserError(f"{path.name}: extends: {missing_config_message(base, where=path.parent)}")


class UniqueKeyLoader(yaml.SafeLoader):
    """YAML without duplicate keys: the last would win, but the reader of a long file sees the first."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in lines and key.tag != "tag:yaml.org,2002:merge":
                message = f"{key.value} is a duplicate of line {lines[key.value]}; remove one of them"
                raise yaml.constructor.ConstructorError(None, None, message, key.start_mark)
            lines[key.value] = key.start_mark.line + 1
        return super().construct_mapping(node, deep)


# YAML 1.1 without its numbers in base 60, in which 24:00:00 is 86400, and would be read as so many minutes.
NUMBERS = {
    "tag:yaml.org,2002:int": r"[-+]?(0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)",
    "tag:yaml.org,2002:float": (
        r"[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+][0-9]+)?|\.[0-9][0-9_]*([eE][-+][0-9]+)?|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"
    ),
}
UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [(tag, re.compile(f"(?:{NUMBERS[tag]})$") if tag in NUMBERS else form) for tag, form in forms]
    for first, forms in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def parse_yaml(text: str, *, origin: str) -> Any:
    """YAML -> Python. Raises UserError with the line of the mistake."""
    try:
        return yaml.load(text, Loader=UniqueKeyLoader)
    except yaml.YAMLError as error:
        message = " ".join(str(error).split()).replace('in "<unicode string>", ', "at ")
        raise UserError(f"{origin}: not valid YAML: {message}") from error


def merge_trees(base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
    """`override` on top of `base`: mappings are merged key by key, anything else is replaced."""
    result = dict(base)
    for key, value in override.items():
        is_mapping = isinstance(result.get(key), Mapping) and isinstance(value, Mapping)
        result[key] = merge_trees(result[key], value) if is_mapping else value
    return result


def nest_value(keys: list[str], value: Any) -> dict[str, Any]:
    """`["a", "b"], 1 -> {"a": {"b": 1}}`"""
    return {keys[0]: value if len(keys) == 1 else nest_value(keys[1:], value)}


def validate_tree(tree: Mapping[str, Any]) -> RunConfig:
    """The typed configuration. Raises UserError, one line per mistake, each naming key, value and remedy."""
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        lines: dict[str, str] = {}  # one for each value; it joins the messages of all types of a union
        for item in error.errors():
            line = explain_error(item)
            start = line[: len(line) - len(item["msg"])]
            lines[start] = f"{lines[start]}; or {line[len(start) :]}" if start in lines else line
        raise UserError("\n".join(lines.values())) from None


def explain_error(item: Mapping[str, Any]) -> str:
    """One line about one mistake; `item` is one of pydantic's error records."""
    key = ".".join(str(part) for part in item["loc"] if not TYPE_NAME.fullmatch(str(part)))
    if item["type"] == "extra_forbidden":
        return f"{key}: unknown key.{suggest_key(key)}"
    if item["type"] in ("model_type", "model_attributes_type", "dict_type"):
        example = next((name for name in schema_keys() if name.rpartition(".")[0] == key), "KEY").rpartition(".")[2]
        return f"{key}: {item['input']!r}: input should be a mapping of keys to values, such as {{{example}: ...}}"
    if item["type"] == "value_error":
        message = str(item["ctx"]["error"])  # checks of sections name their key, checks of single values do not
        return message if not key or message.partition(":")[0] in set(schema_keys()) else f"{key}: {message}"
    if item["type"] in ("list_type", "tuple_type"):
        return f"{key}: {item['input']!r}: input should be a list, such as [{item['input']}]"
    return f"{key}: {item['input']!r}: {item['msg'][0].lower()}{item['msg'][1:]}"


def suggest_key(key: str) -> str:
    """` Did you mean ...?` for an unknown key: an alias from another tool, a similar name, or another section."""
    all_keys = list(schema_keys())
    parent, _, leaf = key.rpartition(".")
    if (ours := find_alias(leaf)) in all_keys:
        return f" Did you mean {ours}?"
    section = ""  # of the key, without names of adapters and numbers of list entries
    for part in parent.split("."):
        longer = f"{section}.{part}".lstrip(".")
        section = longer if longer in all_keys else section
    leaves = [name.rpartition(".")[2] for name in all_keys if name.rpartition(".")[0] == section]
    siblings = {name: f"{parent}.{name}".lstrip(".") for name in leaves}
    sibling = difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)
    elsewhere = sorted((name for name in all_keys if name.rpartition(".")[2] == leaf), key=len)
    candidates = [name for name in all_keys if name != parent and not (section and name.startswith(f"{section}."))]
    similar = difflib.get_close_matches(key, candidates, n=1, cutoff=0.6)
    if suggestions := [siblings[sibling[0]]] if sibling else elsewhere[:1] or similar:
        return f" Did you mean {suggestions[0]}?"
    return f" There are {', '.join(sorted(siblings))}." if siblings else ""


def schema_keys(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every key of the schema, dotted: `mesh`, `mesh.data`, ..."""
    for attribute, field in section.model_fields.items():
        name = field.alias or attribute
        yield prefix + name
        for kind in (field.annotation, *get_args(field.annotation)):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from schema_keys(kind, f"{prefix}{name}.")


def dump_yaml(config: RunConfig) -> str:
    """The resolved configuration as YAML, which loads as an equal configuration."""
    return yaml.safe_dump(config.model_dump(mode="json", exclude_defaults=False), sort_keys=False)

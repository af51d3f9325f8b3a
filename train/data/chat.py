"""Conversations as text: the chat template of a tokenizer, and the loss mask of its output: which parts have a loss.

    template = find_template("plain", tokenizer=...)
    template.render_with_loss_mask(messages, origin="file.jsonl line 7")

Templates are Jinja, rendered as in transformers. The text between `{% generation %}` and `{% endgeneration %}` is
learned. A template without these tags is rendered for every turn of the assistant up to the turn and with it, and the
difference is learned; this needs a template that never changes the text of earlier turns.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ...configs.errors import UserError, first_line
from .documents import digest
from .marked_text import MARK, Part, check_unmarked

Message = Mapping[str, Any]

# For tokenizers without a template: needs only the special token that ends a document.
PLAIN = """\
{{ bos_token }}{% for message in messages %}### {{ message['role'] | capitalize }}:
{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{% else %}{{ message['content'] }}

{% endif %}{% endfor %}{% if add_generation_prompt %}### Assistant:
{% endif %}"""
TEMPLATES = {"plain": PLAIN}


@dataclass(frozen=True)
class Template:
    """A chat template and the special tokens it may name."""

    source: str
    tokens: Mapping[str, str]  # bos_token, eos_token, ... -> how the tokenizer spells them
    origin: str  # for errors

    @property
    def fingerprint(self) -> str:
        return digest("chat-1", self.source, json.dumps(dict(self.tokens), sort_keys=True))

    def render(self, messages: Sequence[Message], *, tools: Any = None, reply: bool = False) -> str:
        """The conversation as text, with `MARK` around the parts inside generation tags.

        `reply`: up to where the assistant's next turn starts. Raises UserError where the template fails.
        """
        import jinja2

        try:
            return self._jinja_template.render(
                messages=messages, tools=tools, add_generation_prompt=reply, **self.tokens
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise UserError(
                f"data.template: {self.origin} cannot render this conversation: {error}; use another"
            ) from None

    def prompt(self, messages: Sequence[Message]) -> str:
        """The text that the assistant's next turn continues."""
        return self.render(messages, reply=True).replace(MARK, "")

    def render_with_loss_mask(
        self, messages: Sequence[Message], *, first: int = 0, tools: Any = None, origin: str
    ) -> Part:
        """The conversation as a part, whose loss mask is 1 in the assistant's turns from message number `first` on.

        Raises UserError, with the rendered text, where nothing is learned.
        """
        for message in messages:
            check_unmarked(json.dumps(message, ensure_ascii=False, default=str), origin=origin)
        if re.search(r"\{%-?\s*generation\s*-?%\}", self.source):
            text = self.render(messages, tools=tools)
            text = _unmark_head(text, self.render(messages[:first], tools=tools)) if first else text
        else:
            text = self._by_turns(messages, first=first, tools=tools, origin=origin)
        part = Part(tuple(text.split(MARK)), rendered=True)
        if not part.learned.strip():
            raise UserError(
                f"data.format: {origin}: no part of this conversation is learned, because it has no turn of the "
                "assistant with content, or the template skips it; repair or remove the row. Rendered: "
                f"{part.text[:400]!r}"
            )
        return part

    def _by_turns(self, messages: Sequence[Message], *, first: int, tools: Any, origin: str) -> str:
        text, position, spans = self.render(messages, tools=tools), 0, []
        for number, message in enumerate(messages):
            if message["role"] != "assistant" or number < first:
                continue
            before = self.render(messages[:number], tools=tools, reply=True)
            after = self.render(messages[: number + 1], tools=tools)
            if not (after.startswith(before) and text.startswith(after.rstrip())):
                raise UserError(
                    f"data.template: {self.origin} changes the text of earlier turns when more follow ({origin}), so "
                    "the assistant's part is unknown; put {% generation %} and {% endgeneration %} around it in a copy "
                    "of the template, and set data.template to that file"
                )
            spans += [text[position : len(before)], text[len(before) : len(after.rstrip())]]
            position = len(after.rstrip())
        return MARK.join([*spans, text[position:]])

    @cached_property
    def _jinja_template(self) -> Any:
        import jinja2

        try:
            return _environment().from_string(self.source)
        except jinja2.TemplateError as error:
            raise UserError(
                f"data.template: {self.origin} is not a Jinja template: {first_line(error)}; repair it"
            ) from None


def _unmark_head(text: str, head: str) -> str:
    """`text` without the marks of its first messages, which `head` is a rendering of."""
    count = head.count(MARK)
    parts = text.split(MARK)
    return MARK.join(["".join(parts[: count + 1]), *parts[count + 1 :]])


def find_template(configured: str | None, *, tokenizer: str | None, tokens: Mapping[str, str]) -> Template | None:
    """`data.template` (a name in TEMPLATES, or a file), else the template in the directory `tokenizer`, else None.

    `tokens` are special tokens for directories that do not name them.
    """
    directory = None if tokenizer is None else Path(tokenizer).expanduser()
    directory = directory.parent if directory is not None and directory.is_file() else directory
    config = {} if directory is None else _json(directory / "tokenizer_config.json")
    specials = dict(tokens) | _special_tokens(config)
    if configured in TEMPLATES:
        return Template(TEMPLATES[configured], specials, configured)
    if configured is not None:
        file = Path(configured).expanduser()
        if not file.is_file():
            raise UserError.no_match("data.template", [configured], candidates=[*TEMPLATES, "a Jinja file"])
        return Template(file.read_text(encoding="utf-8"), specials, configured)
    if directory is None:
        return None
    if (file := directory / "chat_template.jinja").is_file():
        return Template(file.read_text(encoding="utf-8"), specials, str(file))
    source = config.get("chat_template") or _json(directory / "chat_template.json").get("chat_template")
    if isinstance(source, list):  # several, by name
        source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
    return None if source is None else Template(source, specials, str(directory))


def _json(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    texts = {key: value["content"] if isinstance(value, dict) else value for key, value in named.items()}
    return {key: text for key, text in texts.items() if isinstance(text, str)}


def _environment() -> Any:
    """A Jinja environment as in transformers, with the generation tags."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        tags = {"generation"}

        def parse(self, parser: Any) -> Any:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.CallBlock(self.call_method("mark"), [], [], body).set_lineno(line)

        def mark(self, caller: Any) -> str:
            return MARK + caller() + MARK

    def refuse(message: str) -> None:
        raise TemplateError(message)

    def as_json(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = as_json
    environment.globals["raise_exception"] = refuse
    # Without `strftime_now` templates write a fixed date, so that the training text does not depend on the day.
    return environment

"""Formats: the conversion of a row of a table to a document. One table, by `data.format`.

    reader = make_reader(source, template)        reader.document({"messages": [...]}, origin="a.jsonl line 3")

Conversations are rendered by a chat template; prompts and answers that are strings need none.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ...configs.errors import UserError
from ...configs.sections.data import FORMAT_COLUMNS, SourceConfig
from .chat import Template
from .documents import Documents, digest
from .marked_text import Example, Part, check_unmarked, make_part, parse_document, write_document

Row = Mapping[str, Any]
SHAREGPT_ROLES = {  # `from` in ShareGPT -> OpenAI's role
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "function_call": "assistant", "system": "system", "observation": "tool", "tool": "tool",
}  # fmt: skip


class RowFields(NamedTuple):
    """The fields of a row, by our names of columns."""

    row: Row  # our name of a column -> value; without optional columns that are absent or null
    template: Template | None
    origin: str
    names: Mapping[str, str]  # our name of a column -> its name in the data set, for errors

    def text(self, name: str) -> str:
        """The text in column `name`."""
        return check_text(self.row[name], field=self.names[name], origin=self.origin)

    def chat(self, messages: Sequence[Row], *, first: int = 0) -> Part:
        """The conversation as a part; turns from message `first` on are learned."""
        if self.template is None:
            raise UserError(
                "data.template: null, and the tokenizer has no chat template, but the data are conversations; set it "
                "to a Jinja file, or to plain, which needs no special tokens"
            )
        return self.template.render_with_loss_mask(
            [check_message(message, origin=self.origin) for message in messages],
            first=first,
            tools=self.row.get("tools"),
            origin=self.origin,
        )

    def answer(self, prompt: Any, answer: Any) -> Part:
        """A prompt and an answer as a part; both are texts, or both are lists of messages."""
        if isinstance(prompt, list) and isinstance(answer, list):
            return self.chat([*prompt, *answer], first=len(prompt))
        if not (isinstance(prompt, str) and isinstance(answer, str)):
            raise UserError(
                f"data.format: {self.origin}: prompt {prompt!r:.40} and answer {answer!r:.40} are not both texts or "
                "both lists of messages; repair or remove the row"
            )
        return make_part(
            *(check_text(text, field="text", origin=self.origin) for text in (prompt, answer)), origin=self.origin
        )


def format_text(fields: RowFields) -> str:
    """text: the whole document is learned, or what follows a prompt."""
    if "prompt" not in fields.row:
        return fields.text("text")
    return write_document([make_part(fields.text("prompt"), fields.text("text"), origin=fields.origin)])


def format_messages(fields: RowFields) -> str:
    """messages, as in OpenAI's API: [{role, content}, ...]."""
    return write_document([fields.chat(fields.row["messages"])])


def format_sharegpt(fields: RowFields) -> str:
    """sharegpt: [{from: human | gpt | system | observation, value}, ...], and a column `system`."""
    turns = [{"role": "system", "content": fields.row["system"]}] if fields.row.get("system") else []
    for turn in fields.row["conversations"]:
        if turn.get("from") not in SHAREGPT_ROLES:
            raise UserError.no_match(
                f"data.format ({fields.origin}): from", [str(turn.get("from"))], candidates=SHAREGPT_ROLES
            )
        turns.append({"role": SHAREGPT_ROLES[turn["from"]], "content": turn.get("value")})
    return write_document([fields.chat(turns)])


def format_alpaca(fields: RowFields) -> str:
    """alpaca: instruction, input, output, `system`, and earlier turns [[user, assistant], ...] in `history`."""
    turns = [{"role": "system", "content": fields.row["system"]}] if fields.row.get("system") else []
    for question, answer in fields.row.get("history", []):
        turns += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    request = "\n".join(filter(None, [fields.text("instruction"), fields.row.get("input")]))
    turns += [{"role": "user", "content": request}, {"role": "assistant", "content": fields.text("output")}]
    return write_document([fields.chat(turns)])


def format_completion(fields: RowFields) -> str:
    """prompt-completion: both are texts, or both are lists of messages."""
    return write_document([fields.answer(fields.row["prompt"], fields.row["completion"])])


def format_preference(fields: RowFields) -> str:
    """preference: a chosen and a rejected answer; `margin` is how much better the chosen one is."""
    chosen, rejected = fields.row["chosen"], fields.row["rejected"]
    prompt = fields.row.get("prompt")
    if prompt is None:
        if not (isinstance(chosen, list) and isinstance(rejected, list)):
            raise UserError(
                f"data.format: {fields.origin}: no prompt, which only lists of messages can share; add a column prompt"
            )
        same = [message == other for message, other in zip(chosen, rejected, strict=False)]
        common = same.index(False) if False in same else len(same)
        prompt, chosen, rejected = chosen[:common], chosen[common:], rejected[common:]
    pair = [fields.answer(prompt, answer) for answer in (chosen, rejected)]
    return write_document(pair, label=float(fields.row.get("margin", 0.0)))


def format_unpaired(fields: RowFields) -> str:
    """unpaired: prompt, completion, and a label, whether the completion is desirable."""
    label = fields.row["label"]
    if label not in (True, False):
        raise UserError(f"data.format: {fields.origin}: label {label!r:.40} is neither true nor false; repair the row")
    return write_document([fields.answer(fields.row["prompt"], fields.row["completion"])], label=1.0 if label else -1.0)


FORMATS: dict[str, Callable[[RowFields], str]] = {
    "text": format_text,
    "messages": format_messages,
    "sharegpt": format_sharegpt,
    "alpaca": format_alpaca,
    "prompt-completion": format_completion,
    "preference": format_preference,
    "unpaired": format_unpaired,
}


@dataclass(frozen=True)
class RowReader:
    """Converts rows of one source to documents."""

    format: str
    names: Mapping[str, str]  # our name of a column -> its name in the data set
    needed: tuple[str, ...]  # our names of required columns
    template: Template | None

    @property
    def fingerprint(self) -> str:
        named = [f"{ours}={theirs}" for ours, theirs in sorted(self.names.items())]
        return digest(self.format, *named, "" if self.template is None else self.template.fingerprint)

    def document(self, row: Row, *, origin: str) -> str:
        """The document of a row. Raises UserError where a column is missing or has a value of another type."""
        self.columns(row, where=f" ({origin})")
        ours = {name: row[theirs] for name, theirs in self.names.items() if row.get(theirs) is not None}
        # The format refuses a required column that is null; optional ones are left out.
        ours |= {name: None for name in self.needed if name not in ours}
        return FORMATS[self.format](RowFields(ours, self.template, origin, self.names))

    def columns(self, available: Iterable[str], *, where: str = "") -> list[str]:
        """The columns to read of a table. Raises UserError where a required one is missing."""
        available = list(available)
        for name in self.needed:
            if self.names[name] not in available:
                key = {"text": "data.field", "prompt": "data.prompt"} if self.format == "text" else {}
                raise UserError.no_match(
                    key.get(name, f"data.columns.{name}") + where, [self.names[name]], candidates=available
                )
        return [theirs for theirs in dict.fromkeys(self.names.values()) if theirs in available]


def make_reader(source: SourceConfig, template: Template | None = None) -> RowReader:
    """The reader of the rows of `source`."""
    needed, optional = FORMAT_COLUMNS[source.format]
    names = {name: source.columns.get(name, name) for name in (*needed, *optional)}
    if source.format == "text":
        names = {"text": source.field} | ({} if source.prompt is None else {"prompt": source.prompt})
        needed = tuple(names)
    return RowReader(source.format, names, needed, template)


def check_text(value: Any, *, field: str, origin: str) -> str:
    """`value`. Raises UserError where it is not Unicode text without marks."""
    if not isinstance(value, str):
        raise UserError(
            f"data.field: {field} of {origin} is {value!r:.40}, not text; remove the row, or set data.field (or "
            "data.columns) to a column of text"
        )
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can contain half of a surrogate pair, which no encoding can write
        raise UserError(
            f"data.field: {field} of {origin} is not Unicode text: character {error.start} is "
            f"{value[error.start]!r}; repair or remove the row"
        ) from None
    return check_unmarked(value, origin=origin)


def check_message(message: Any, *, origin: str) -> dict[str, Any]:
    """The message with its content as one text. Raises UserError where it has no role or other content than text."""
    if not (isinstance(message, Mapping) and isinstance(message.get("role"), str)):
        raise UserError(f"data.format: {origin}: {message!r:.60} is not a message; write {{role: user, content: ...}}")
    content = message.get("content")
    if isinstance(content, list):
        if any(part.get("type", "text") != "text" for part in content):
            raise UserError(f"data.format: {origin}: {content!r:.60} is not only text; remove the row")
        content = "".join(part["text"] for part in content)
    present = {key: value for key, value in message.items() if value is not None}
    return present | {"content": "" if content is None else check_text(content, field="content", origin=origin)}


def pair_mismatched(documents: Documents) -> Documents:
    """Pair each example with the answer of the next example to another prompt.

    KTO measures its rewards from the likelihood of such mismatched answers.
    """

    def read(index: int) -> str:
        example: Example = parse_document(documents[index])
        (part,) = example.parts
        (next_part,) = parse_document(documents[(index + 1) % len(documents)]).parts
        mismatched = Part((*part.spans[:1], *next_part.spans[1:]), part.rendered)
        return write_document([part, mismatched], label=example.label)

    return Documents(len(documents), read, digest("mismatched", documents.fingerprint))

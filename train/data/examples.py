"""Examples: a prompt the model reads, and what it is to learn to say. One string, cut at a mark.

    joined("Q: 1+1? A:", " 2")  ->  "Q: 1+1? A:\\ufdd0 2"          divided(...)  ->  ("Q: 1+1? A:", " 2")

The two parts are encoded by themselves: a prompt has the tokens it has when a text is continued from it. The mark is a
code point that Unicode keeps for the inside of programs; a document without one is learned whole.
"""

from ...configs.errors import UserError

MARK = "\ufdd0"


def joined(prompt: str, completion: str, *, origin: str) -> str:
    """Both parts as one document. Raises UserError where there is nothing to learn, or the mark is taken."""
    if not completion:
        raise UserError(
            f"data.field: {origin}: nothing follows the prompt {prompt[-40:]!r}, so nothing of it would be learned; "
            "repair or remove the row"
        )
    if MARK in prompt or MARK in completion:
        raise UserError(f"data.field: {origin} holds the code point {MARK!r}, which no text may; remove it")
    return prompt + MARK + completion


def divided(document: str) -> tuple[str, str]:
    """(prompt, what is learned) of a document; no prompt where it has no mark."""
    prompt, mark, completion = document.partition(MARK)
    return (prompt, completion) if mark else ("", document)

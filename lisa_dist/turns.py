"""Turns as a chat template takes them: with texts, or with lists of parts."""

from collections.abc import Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

# What a template raises by itself, and what the expressions in it raise on turns that it was not written for.
OF_TEMPLATES = (TemplateError, TypeError, ArithmeticError, LookupError, AttributeError)
_WORD = "content-of-a-turn"


def takes_parts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the template has contents as lists of parts alone, as those of models that see do, and no texts."""
    turn = {"role": "user", "content": _WORD}
    return tokenizer.chat_template is not None and not _shows(tokenizer, turn) and _shows(tokenizer, _in_parts(turn))


def as_taken(turns: Sequence[dict[str, Any]], parts: bool) -> list[dict[str, Any]]:
    """The turns for `apply_chat_template`: contents as lists of parts where the template takes those."""
    return [_in_parts(turn) if parts else turn for turn in turns]


def _in_parts(turn: dict[str, Any]) -> dict[str, Any]:
    return turn | {"content": [{"type": "text", "text": turn["content"]}]}


def _shows(tokenizer: PreTrainedTokenizerBase, turn: dict[str, Any]) -> bool:
    try:
        return _WORD in str(tokenizer.apply_chat_template([turn], tokenize=False))
    except OF_TEMPLATES:  # one that refuses it, or adds what is no text
        return False

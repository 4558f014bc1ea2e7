"""Formats of rows, told apart by their columns; a row of any becomes a list of turns.

    alpaca              instruction, output; input, system, history as they are there
    sharegpt            conversations of from/value; system
    messages            messages of role/content; system
    prompt_completion   prompt, completion: texts, or lists of turns and system
    question_answer     question, answer; system
    text                text, for continued pre-training

A turn is {"role": ..., "content": ...}: system, user and assistant, tool for what a tool has answered. A row of text is
one turn of the role "text". Where a model has no chat template, a prompt and a completion that are texts are taken as
they are written: turns of the roles "prompt" and "completion".
"""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence

from lisa_dist.config import UserError

_TOLD = 5  # bad rows that an error names
ROLES = ("system", "user", "assistant", "tool")
_SAME_ROLE = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant"}
_SAME_ROLE |= {"model": "assistant", "bot": "assistant", "observation": "tool", "developer": "system"}


class RowError(ValueError):
    """What is wrong with a row; whoever knows its file and number says them."""


def refuse_rows(problems: Iterable[str], number: int, num_rows: int, said: str) -> None:
    """Raise UserError for so many bad rows of a source, with the first few of them."""
    told = [f"  {problem}" for problem in itertools.islice(problems, _TOLD)]
    if number > _TOLD:
        told.append(f"  and {number - _TOLD} more")
    raise UserError(
        f"{said}: {number} of {num_rows} rows cannot be used:\n"
        + "\n".join(told)
        + "\nMend them, or leave them out with --skip_bad_rows true."
    )


def detect(columns: Sequence[str]) -> str | None:
    """The first format whose columns are all there; None where there is none."""
    for name, (needed, _) in FORMATS.items():
        if set(needed) <= set(columns):
            return name
    return None


def to_turns(row: Mapping, name: str) -> list[dict[str, str]]:
    """The turns of a row of a format; RowError where it breaks a rule."""
    turns = FORMATS[name][1](row)
    if turns[0]["role"] not in ("text", "prompt"):
        _check_order(turns)
    return turns


def _alpaca(row: Mapping) -> list[dict[str, str]]:
    turns = _system(row)
    for number, pair in enumerate(_list(row, "history") if row.get("history") else [], start=1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise RowError(f"history has no pair of texts at {number}")
        turns += _pair(*pair)
    parts = (_text(row, "instruction"), _text(row, "input") if row.get("input") is not None else "")
    return turns + _pair("\n\n".join(part for part in parts if part.strip()), _answer(row, "output"))


def _sharegpt(row: Mapping) -> list[dict[str, str]]:
    return _system(row) + _turns(row, "conversations", "from", "value")


def _messages(row: Mapping) -> list[dict[str, str]]:
    return _system(row) + _turns(row, "messages", "role", "content")


def _prompt_completion(row: Mapping) -> list[dict[str, str]]:
    if isinstance(row.get("prompt"), (list, tuple)) or isinstance(row.get("completion"), (list, tuple)):
        turns = _turns(row, "prompt", "role", "content") + _turns(row, "completion", "role", "content")
        return _system(row) + turns
    written = {"prompt": _text(row, "prompt"), "completion": _answer(row, "completion")}
    if _system(row):
        raise RowError(
            "has a system text beside a prompt that is a text; to have turns of them give "
            "--dataset_columns question=prompt answer=completion"
        )
    return [{"role": role, "content": content} for role, content in written.items()]


def _question_answer(row: Mapping) -> list[dict[str, str]]:
    return _system(row) + _pair(_text(row, "question"), _answer(row, "answer"))


def _plain_text(row: Mapping) -> list[dict[str, str]]:
    return [{"role": "text", "content": _answer(row, "text")}]


# Of a format: the columns that it needs, and the function from a row to its turns; those that need more come first.
FORMATS: dict[str, tuple[tuple[str, ...], Callable[[Mapping], list[dict[str, str]]]]] = {
    "messages": (("messages",), _messages),
    "sharegpt": (("conversations",), _sharegpt),
    "prompt_completion": (("prompt", "completion"), _prompt_completion),
    "alpaca": (("instruction", "output"), _alpaca),
    "question_answer": (("question", "answer"), _question_answer),
    "text": (("text",), _plain_text),
}
# Columns that a format also reads, where there are some.
_ALSO_READ = {
    "messages": ("system",),
    "sharegpt": ("system",),
    "prompt_completion": ("system",),  # beside lists
    "alpaca": ("input", "system", "history"),
    "question_answer": ("system",),
}


def describe_columns(format_name: str, columns: Iterable[str]) -> str:
    """The columns that a format reads, and those that it leaves."""
    read = (*FORMATS[format_name][0], *_ALSO_READ.get(format_name, ()))
    left = [column for column in columns if column not in read]
    used = ", ".join(column for column in columns if column in read)
    return f"{format_name} ({used}" + (f"; not read: {', '.join(left)})" if left else ")")


def _pair(user: str, assistant: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _system(row: Mapping) -> list[dict[str, str]]:
    system = _text(row, "system") if row.get("system") is not None else ""
    return [{"role": "system", "content": system}] if system.strip() else []


def _turns(row: Mapping, column: str, role_key: str, content_key: str) -> list[dict[str, str]]:
    """The turns of a list in a column; keys of the other way of writing them, role/content or from/value, do too."""
    turns = []
    for number, turn in enumerate(_list(row, column), start=1):
        where = f"turn {number} of {column}"
        if not isinstance(turn, Mapping):
            raise RowError(f"{where} is {_kind(turn)}, not an object with {role_key} and {content_key}")
        keys = (
            (role_key, content_key)
            if role_key in turn
            else ("role", "content")
            if "role" in turn
            else ("from", "value")
        )
        for key, wanted in zip(keys, (role_key, content_key), strict=True):
            if turn.get(key) is None:
                raise RowError(f"{where} has no {wanted if wanted not in turn else key}")
            if not isinstance(turn[key], str):
                raise RowError(f"{key} of {where} is {_kind(turn[key])}, not a text")
        role = _SAME_ROLE.get(turn[keys[0]].lower(), turn[keys[0]].lower())
        if role not in ROLES:
            known = ", ".join([*ROLES, *_SAME_ROLE])
            raise RowError(f"{where} has the unknown role {turn[keys[0]]!r}; known are {known}")
        if role == "assistant" and not turn[keys[1]].strip():
            raise RowError(f"{where} is an empty answer")
        turns.append({"role": role, "content": turn[keys[1]]})
    return turns


def _check_order(turns: list[dict[str, str]]) -> None:
    roles = [turn["role"] for turn in turns]
    if roles.count("system") > 1:
        raise RowError(f"has {roles.count('system')} system turns; one is allowed, and comes first")
    if "system" in roles[1:]:
        raise RowError(f"has its system turn at place {roles.index('system') + 1}; it must come first")
    if "assistant" not in roles:
        raise RowError("has no assistant turn: there is nothing to learn")


def _list(row: Mapping, column: str) -> list:
    value = _present(row, column)
    if not isinstance(value, (list, tuple)):
        raise RowError(f"{column} is {_kind(value)}, not a list")
    if not value:
        raise RowError(f"{column} is an empty list")
    return list(value)


def _text(row: Mapping, column: str) -> str:
    value = _present(row, column)
    if not isinstance(value, str):
        raise RowError(f"{column} is {_kind(value)}, not a text")
    return value


def _answer(row: Mapping, column: str) -> str:
    value = _text(row, column)
    if not value.strip():
        raise RowError(f"{column} is empty: there is nothing to learn")
    return value


def _present(row: Mapping, column: str) -> object:
    if row.get(column) is None:
        raise RowError(f"has no {column}")
    return row[column]


def _kind(value: object) -> str:
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return names.get(type(value), type(value).__name__)

"""Formats of examples, recognized by their columns; an example of any format becomes a list of turns.

A turn is {"role": ..., "content": ...} with the role system, user, assistant or tool, for the output of a tool. The
assistant's may have `tool_calls`, and an example of turns `tools`, both in transformers' form. An example of
text is one turn of the role "text". A prompt and a completion that are texts are turns of the roles "prompt"
and "completion": for a model without a chat template they are concatenated as they are.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lisa_dist.errors import UserError

_NUM_SHOWN = 5  # invalid examples that an error lists
ROLES = ("system", "user", "assistant", "tool")
_SAME_ROLE = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant"}
_SAME_ROLE |= {"model": "assistant", "bot": "assistant", "observation": "tool", "developer": "system"}
_CALLS = "function_call"  # the role of a turn whose text is the JSON of calls, in ShareGPT's form
_SAME_ROLE |= {_CALLS: "assistant"}
_KINDS = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
# Columns by their names in a format, tried where they are those of none.
_SYNONYMS = ({"input": "question", "output": "answer"}, {"response": "completion"})


class ExampleError(ValueError):
    """Why an example is invalid; the caller knows its file and line."""


def refuse_examples(problems: Sequence[str], num_examples: int, source: str) -> None:
    """Raise UserError that lists the first invalid examples of a source."""
    shown = [f"  {problem}" for problem in problems[:_NUM_SHOWN]]
    if len(problems) > _NUM_SHOWN:
        shown.append(f"  and {len(problems) - _NUM_SHOWN} more")
    raise UserError(
        f"{source}: {len(problems)} of {num_examples} examples are invalid:\n"
        + "\n".join(shown)
        + "\nCorrect them, or skip them with --skip_bad_rows true."
    )


def detect(columns: Sequence[str]) -> str | None:
    """The first format whose required columns are all present; None if there is none."""
    return next((name for name, (needed, *_) in FORMATS.items() if set(needed) <= set(columns)), None)


def columns_of_format(columns: Iterable[str]) -> tuple[tuple[str, str], ...]:
    """Pairs of a format's names and these columns, of another case or with synonyms; none where there is no need."""
    columns = [*columns]
    if detect(columns) is not None:
        return ()
    by_case = {column.lower(): column for column in columns}
    for synonyms in ({}, *_SYNONYMS):
        named = {synonyms.get(name, name): column for name, column in by_case.items()}
        if detect([*named]) is not None:
            return tuple((name, column) for name, column in named.items() if name != column)
    return ()


def to_turns(example: Mapping, format_name: str) -> list[dict[str, Any]]:
    """The turns of an example. Raises ExampleError if it does not follow the format."""
    turns = FORMATS[format_name][2](example)
    roles = [turn["role"] for turn in turns]
    if roles[0] in ("text", "prompt"):
        return turns
    if roles.count("system") > 1:
        raise ExampleError(f"has {roles.count('system')} system turns; at most one is allowed, as the first turn")
    if "system" in roles[1:]:
        raise ExampleError(f"has a system turn as turn {roles.index('system') + 1}; it must be the first")
    if "assistant" not in roles:
        raise ExampleError("has no assistant turn, so there is nothing to train on")
    return turns


def tools_of(example: Mapping, format_name: str) -> list[dict[str, Any]] | None:
    """The tools of an example, None where it has none. Raises ExampleError for what describes no functions."""
    given = example.get("tools") if "tools" in FORMATS[format_name][1] else None
    return to_functions(given, "tools") or None if given else None


def to_functions(given: Any, place: str, are_calls: bool = False) -> list[dict[str, Any]]:
    """Tools or calls in transformers' form, of OpenAI's, of functions alone, or of the JSON of them.

    The arguments of calls become objects, as chat templates take them. Raises ExampleError that names the `place`.
    """
    listed, functions = _of_json(given, place), []
    for number, entry in enumerate(listed if isinstance(listed, (list, tuple)) else [listed], start=1):
        entry = {key: value for key, value in entry.items() if value is not None} if isinstance(entry, Mapping) else {}
        function = entry.pop("function", None)
        if function is None:
            entry, function = {}, entry
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str) or not function["name"]:
            raise ExampleError(f"entry {number} of {place} is no function with a name")
        if are_calls:
            arguments = _of_json(function.get("arguments") or {}, f"the arguments of {function['name']} in {place}")
            if not isinstance(arguments, Mapping):
                raise ExampleError(f"{place} has arguments of {function['name']} that are no object")
            function = {**function, "arguments": arguments}
        functions.append({"type": "function", **entry, "function": function})
    try:
        json.dumps(functions, allow_nan=False, ensure_ascii=False).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise ExampleError(f"{place} has what is no JSON ({error})") from error
    return functions


def _of_json(given: Any, place: str) -> Any:
    try:
        return json.loads(given) if isinstance(given, str) else given
    except (ValueError, RecursionError) as error:
        raise ExampleError(f"{place} is no JSON ({error})") from error


def _alpaca(example: Mapping) -> list[dict[str, str]]:
    turns = _system(example)
    for number, pair in enumerate(_list(example, "history") if example.get("history") else [], start=1):
        if not isinstance(pair, (list, tuple)) or len(pair) != 2 or not all(isinstance(part, str) for part in pair):
            raise ExampleError(f"entry {number} of history is not a pair of texts")
        turns += _pair(*pair)
    parts = (_text(example, "instruction"), _text(example, "input") if example.get("input") is not None else "")
    return turns + _pair("\n\n".join(part for part in parts if part.strip()), _answer(example, "output"))


def _prompt_completion(example: Mapping) -> list[dict[str, str]]:
    if any(isinstance(example.get(column), (list, tuple)) for column in ("prompt", "completion")):
        return _system(example) + _turns(example, "prompt") + _turns(example, "completion")
    texts = {"prompt": _text(example, "prompt"), "completion": _answer(example, "completion")}
    if _system(example):
        raise ExampleError(
            "has a system text, but its prompt is a text and not a list of turns; to use the chat template, give "
            "--dataset_columns question=prompt answer=completion"
        )
    return [{"role": role, "content": content} for role, content in texts.items()]


def _question_answer(example: Mapping) -> list[dict[str, str]]:
    return _system(example) + _pair(_text(example, "question"), _answer(example, "answer"))


# The required columns of each format, the optional ones, and the function from an example to turns; formats with more
# columns come first.
FORMATS: dict[str, tuple[tuple[str, ...], tuple[str, ...], Callable[[Mapping], list[dict[str, str]]]]] = {
    "messages": (("messages",), ("system", "tools"), lambda row: _system(row) + _turns(row, "messages")),
    "sharegpt": (
        ("conversations",),
        ("system", "tools"),
        lambda row: _system(row) + _turns(row, "conversations", "from", "value"),
    ),
    "prompt_completion": (("prompt", "completion"), ("system", "tools"), _prompt_completion),  # with lists of turns
    "alpaca": (("instruction", "output"), ("input", "system", "history"), _alpaca),
    "question_answer": (("question", "answer"), ("system",), _question_answer),
    "text": (("text",), (), lambda row: [{"role": "text", "content": _answer(row, "text")}]),
}


def describe_columns(format_name: str, columns: Iterable[str], more: Sequence[str] = ()) -> str:
    """The columns that a format reads, `more` that are read beside them, and those that are ignored."""
    required, optional, _ = FORMATS[format_name]
    read = (*required, *optional, *more)
    ignored = [column for column in columns if column not in read]
    used = ", ".join(column for column in columns if column in read)
    return f"{format_name} ({used}" + (f"; ignored: {', '.join(ignored)})" if ignored else ")")


def _pair(user: str, assistant: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _system(example: Mapping) -> list[dict[str, str]]:
    system = _text(example, "system") if example.get("system") is not None else ""
    return [{"role": "system", "content": system}] if system.strip() else []


def _turns(example: Mapping, column: str, role_key: str = "role", content_key: str = "content") -> list[dict[str, Any]]:
    """The turns in a list column, with the given keys or the other pair of role/content and from/value."""
    turns = []
    for number, turn in enumerate(_list(example, column), start=1):
        place = f"turn {number} of {column}"
        if not isinstance(turn, Mapping):
            raise ExampleError(f"{place} is {_kind(turn)}, not an object with {role_key} and {content_key}")
        keys = ("role", "content") if "role" in turn else ("from", "value")
        if role_key in turn:
            keys = (role_key, content_key)
        calls, role = turn.get("tool_calls"), turn.get(keys[0])
        if role == _CALLS and turn.get(keys[1]):
            calls, turn = turn[keys[1]], {**turn, keys[1]: ""}
        calls = to_functions(calls, f"tool_calls of {place}", are_calls=True) if calls else []
        if calls and turn.get(keys[1]) is None:  # as OpenAI has it
            turn = {**turn, keys[1]: ""}
        for key, expected in zip(keys, (role_key, content_key), strict=True):
            if turn.get(key) is None:
                raise ExampleError(f"{place} has no {expected if expected not in turn else key}")
            if not isinstance(turn[key], str):
                raise ExampleError(f"{key} of {place} is {_kind(turn[key])}, not text")
        role = _SAME_ROLE.get(turn[keys[0]].lower(), turn[keys[0]].lower())
        if role not in ROLES:
            known = ", ".join([*ROLES, *_SAME_ROLE])
            raise ExampleError(f"{place} has the unknown role {turn[keys[0]]!r}; known roles are {known}")
        if calls and role != "assistant":
            raise ExampleError(
                f"{place} has tool_calls, and its role is {role}; those of the assistant alone are taken"
            )
        if role == "assistant" and not calls and not turn[keys[1]].strip():
            raise ExampleError(f"{place} is an empty answer")
        if role == "assistant" and (turn.get("weight") == 0 or turn.get("train") is False):
            raise ExampleError(f"{place} is not to be trained on (weight 0, or train false), but every answer is here")
        found = {"role": role, "content": turn[keys[1]]}
        if calls:
            found["tool_calls"] = calls
        if role == "tool":  # which some templates show
            found |= {key: turn[key] for key in ("name", "tool_call_id") if isinstance(turn.get(key), str)}
        turns.append(found)
    return turns


def _list(example: Mapping, column: str) -> list:
    value = _value(example, column, (list, tuple), "a list")
    if not value:
        raise ExampleError(f"{column} is an empty list")
    return list(value)


def _text(example: Mapping, column: str) -> str:
    return _value(example, column, (str,), "text")


def _answer(example: Mapping, column: str) -> str:
    value = _text(example, column)
    if not value.strip():
        raise ExampleError(f"{column} is empty, so there is nothing to train on")
    return value


def _value(example: Mapping, column: str, kinds: tuple[type, ...], expected: str) -> Any:
    value = example.get(column)
    if value is None:
        raise ExampleError(f"has no {column}")
    if not isinstance(value, kinds):
        raise ExampleError(f"{column} is {_kind(value)}, not {expected}")
    return value


def _kind(value: object) -> str:
    return _KINDS.get(type(value), type(value).__name__)

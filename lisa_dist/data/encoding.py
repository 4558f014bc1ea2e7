"""From turns to token ids and labels. Labels are the assistant's turns, with their end, and -100 elsewhere.

The chat template is the tokenizer's own, or a plain one for a model without a template. Templates that mark the
assistant's tokens ({% generation %}), or of which TRL has such a version, define the labels. With other templates, an
assistant's turn is the text that rendering it adds to the turns before it.
"""

import hashlib
import json
from collections.abc import Sequence
from itertools import groupby
from typing import Any, cast

from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from lisa_dist.data.chat_template import PLAIN_TEMPLATE
from lisa_dist.data.formats import ExampleError, refuse_examples
from lisa_dist.errors import UserError
from lisa_dist.turns import OF_TEMPLATES, as_taken, takes_parts

IGNORED = -100  # the label of a token without loss, as everywhere in transformers
LONG_EXAMPLES = ("auto", "truncate", "drop")
_VERSION = 5  # increase it with any change of the encoding: older caches are then not used
# The status of an encoded example; any other status is why the example is invalid.
_WHOLE, _CUT, _NEXT_PART, _TOO_LONG, _NO_LABELS = "whole", "cut", "next part", "too long", "no labels"


class Encoder:
    """Encodes turns by one tokenizer as token ids and labels, two lists of one length.

    With `assistant_only` the labels of all but the assistant's turns are -100. `marked_template` is a template that
    marks them, or None where they are found by rendering turn after turn. Raises UserError for a slow tokenizer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, assistant_only: bool):
        self._tokenizer, self._assistant_only = tokenizer, assistant_only
        self._special = list(tokenizer.get_added_vocab())
        self._plain = str(tokenizer.chat_template).endswith(PLAIN_TEMPLATE)
        self._shown: set[str] = set()  # of tools and tool_calls, those that the template is known to show
        self._in_parts = not self._plain and takes_parts(tokenizer)
        self.marked_template = self._find_marked_template() if assistant_only and not self._plain else None
        if not tokenizer.is_fast:
            raise UserError(
                f"the tokenizer {type(tokenizer).__name__} does not give the positions of its tokens in a text; use a "
                "fast tokenizer."
            )

    def fingerprint(self) -> str:
        """A hash of everything that the encoding depends on."""
        tokenizer: Any = self._tokenizer  # its type does not declare `backend_tokenizer`
        parts = [tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), str(self._assistant_only)]
        parts += [json.dumps(tokenizer.special_tokens_map, default=str, sort_keys=True), str(_VERSION)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def encode(self, turns: Sequence[dict[str, Any]], tools: list | None = None) -> tuple[list[int], list[int]]:
        """Token ids and labels. Raises ExampleError if the chat template cannot render the turns."""
        has = _tools_in(turns, tools)
        if not has <= self._shown:  # what the template does with those of one example it does with all
            check_tools_shown(self._tokenizer, turns, tools)
            self._shown |= has
        first = turns[0]["role"]
        if first == "text":
            return self._encode_text(turns[0]["content"], 0)
        if first == "prompt" and self._plain:
            prompt = turns[0]["content"]
            return self._encode_text(prompt + turns[1]["content"], len(prompt) if self._assistant_only else 0)
        if first == "prompt":
            roles = {"prompt": "user", "completion": "assistant"}
            turns = [turn | {"role": roles[turn["role"]]} for turn in turns]
        if self.marked_template is not None:
            return self._encode_marked(turns, tools, self.marked_template)
        text, spans = self._render(turns, tools)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        if not self._assistant_only:
            return ids, list(ids)
        labels = [IGNORED] * len(ids)
        for index, (begin, end) in enumerate(encoded["offset_mapping"]):
            if begin < end and any(first <= begin < last for first, last in spans):
                labels[index] = ids[index]
        _check_labels(labels)
        return ids, labels

    def describe(self, ids: Sequence[int], labels: Sequence[int]) -> list[tuple[str, bool]]:
        """An example as pieces of text, each with whether its tokens have labels."""
        pieces = []
        for has_labels, tokens in groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != IGNORED):
            text = self._tokenizer.decode([token for token, _ in tokens], clean_up_tokenization_spaces=False)
            pieces.append((cast(str, text), has_labels))
        return pieces

    def _find_marked_template(self) -> str | None:
        if has_generation_markers(self._tokenizer.chat_template):
            return self._tokenizer.chat_template
        try:
            return get_training_chat_template(self._tokenizer)
        except (ValueError, *OF_TEMPLATES):  # TRL has none, or it fails, as it will on rows
            return None

    def _encode_text(self, text: str, prompt_length: int) -> tuple[list[int], list[int]]:
        """A text without template, and the end-of-text token. Tokens that begin before prompt_length have no labels."""
        encoded = self._tokenizer(text, return_offsets_mapping=True)
        ids, starts = list(encoded["input_ids"]), [begin for begin, _ in encoded["offset_mapping"]]
        end = self._tokenizer.eos_token_id
        if end is not None and (not ids or ids[-1] != end):
            ids.append(end)
            starts.append(len(text))
        elif end is not None:
            starts[-1] = len(text)
        return ids, [token if start >= prompt_length else IGNORED for token, start in zip(ids, starts, strict=True)]

    def _encode_marked(
        self, turns: Sequence[dict[str, Any]], tools: list | None, template: str
    ) -> tuple[list[int], list[int]]:
        settings: Any = {"chat_template": template, "return_dict": True, "return_assistant_tokens_mask": True}
        try:
            encoded: Any = self._tokenizer.apply_chat_template(as_taken(turns, self._in_parts), tools, **settings)
        except OF_TEMPLATES as error:
            raise ExampleError(f"the chat template refuses it: {error}") from error
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        labels = [token if marked else IGNORED for token, marked in zip(ids, mask, strict=True)]
        _check_labels(labels)
        return ids, labels

    def _render(self, turns: Sequence[dict[str, Any]], tools: list | None) -> tuple[str, list[tuple[int, int]]]:
        """The text of all turns, and the spans of the assistant's turns in it."""
        try:
            text = self._apply(turns, tools)
            if not self._assistant_only:
                return text, []
            spans = []
            for number, turn in enumerate(turns):
                if turn["role"] != "assistant":
                    continue
                after = self._apply(turns[: number + 1], tools)
                if number:
                    before = self._apply(turns[:number], tools, add_generation_prompt=True)
                elif not turn["content"].strip():
                    raise ExampleError("begins with a tool call; put a turn of the user before it")
                else:  # no template renders no turns
                    before = after.partition(turn["content"].strip())[0]
                end = self._end_of_turn(before, after, text, [turn["content"].strip(), *_names(turn.get("tool_calls"))])
                if end is None:
                    raise ExampleError(
                        f"the chat template renders turn {number + 1} differently once later turns follow, so the "
                        "assistant's tokens cannot be found; give --train_on_inputs true, or a template with "
                        "{% generation %} by --chat_template_path"
                    )
                spans.append((len(before), end))
        except OF_TEMPLATES as error:
            raise ExampleError(f"the chat template refuses it: {error}") from error
        return text, spans

    def _apply(self, turns: Sequence[dict[str, Any]], tools: list | None, add_generation_prompt: bool = False) -> str:
        given: Any = {"tools": tools, "tokenize": False, "add_generation_prompt": add_generation_prompt}
        return cast(str, self._tokenizer.apply_chat_template(as_taken(turns, self._in_parts), **given))

    def _end_of_turn(self, before: str, after: str, text: str, said: list[str]) -> int | None:
        """Where in `text`, that of all turns, a turn ends; None if its end cannot be found.

        `before` and `after` are the text without and with the turn, both without later turns; it has
        the texts `said`. Some templates end the last turn with text that they omit once turns follow. The turn then
        ends with its last special token that is in both texts.
        """
        if not (text.startswith(before) and after.startswith(before)):
            return None
        common = _common_prefix(after, text)
        ends = [common.rfind(token) + len(token) for token in self._special if token in common[len(before) :]]
        last = max(ends, default=None)
        if common != after:
            return last if last is not None and all(part in common[len(before) : last] for part in said) else None
        # A line break after the end of a turn belongs to the next turn.
        return last if last is not None and not common[last:].strip() else len(common)


def check_tools_shown(tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, Any]], tools: Any) -> None:
    """Raise UserError where the chat template leaves out the tools or the tool calls of an example."""

    def rendered(turns: Sequence[dict[str, Any]], tools: Any) -> Any:
        try:
            return tokenizer.apply_chat_template(as_taken(turns, parts), tools=tools, tokenize=False)
        except OF_TEMPLATES:  # it looks at them; what it refuses is said of the example
            return None

    parts = takes_parts(tokenizer)
    bare = [{key: value for key, value in turn.items() if key != "tool_calls"} for turn in turns]
    for name in sorted(_tools_in(turns, tools)):
        without = rendered(turns, None) if name == "tools" else rendered(bare, tools)
        if without is not None and without == rendered(turns, tools):
            raise UserError(
                f"--dataset_name has examples with {name}, and the chat template leaves them out: take a tokenizer "
                "whose template shows them, for --task sft by --chat_template_path, or examples without."
            )


def _tools_in(turns: Sequence[dict[str, Any]], tools: Any) -> set[str]:
    has = {"tools": tools, "tool_calls": any(turn.get("tool_calls") for turn in turns)}
    return {name for name, given in has.items() if given}


def _names(functions: list[dict[str, Any]] | None) -> list[str]:
    return [function["function"]["name"] for function in functions or ()]


def _common_prefix(first: str, second: str) -> str:
    pairs = zip(first, second, strict=False)
    return first[: next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))]


def encode_examples(
    examples: Dataset,
    encoder: Encoder,
    source: str,
    max_length: int | None = None,
    long_examples: str = "auto",
    skip_invalid: bool = False,
    num_proc: int | None = None,
) -> tuple[Dataset, list[str]]:
    """The columns input_ids, labels and origin of examples of turns; and lines about those that were cut or skipped.

    Examples longer than max_length are truncated or dropped; with `auto` a text is split into several examples, and all
    others are truncated. An example without labels is dropped. Raises UserError if none is left.
    """
    if long_examples not in LONG_EXAMPLES:
        raise UserError(f"--long_examples {long_examples}: unknown; choose one of {', '.join(LONG_EXAMPLES)}.")

    def encode(batch: dict[str, list]) -> dict[str, list]:
        columns: dict[str, list] = {name: [] for name in ("input_ids", "labels", "origin", "length", "status")}
        for turns, tools, origin in zip(batch["turns"], batch["tools"], batch["origin"], strict=True):
            parts: list[tuple[list[int], list[int], str]]
            try:
                ids, labels = encoder.encode(turns, tools)
            except ExampleError as error:
                parts, length = [([], [], str(error))], 0
            else:
                splits = long_examples == "auto" and turns[0]["role"] == "text"
                parts, length = _limit_length(ids, labels, max_length, long_examples == "drop", splits), len(ids)
            for ids, labels, status in parts:
                for name, value in zip(columns, (ids, labels, origin, length, status), strict=True):
                    columns[name].append(value)
        return columns

    key = [examples._fingerprint, encoder.fingerprint(), str(max_length), long_examples]
    encoded = examples.map(
        encode,
        batched=True,
        remove_columns=examples.column_names,
        num_proc=num_proc,
        new_fingerprint=hashlib.sha256("\0".join(key).encode()).hexdigest()[:32],
        desc="Tokenizing",
    )
    status = list(encoded["status"])
    lines = _report_invalid(encoded, status, len(examples), source, skip_invalid)
    lines += _report_long(encoded, status, max_length)
    kept = [index for index, value in enumerate(status) if value in (_WHOLE, _CUT, _NEXT_PART)]
    if not kept:
        raise UserError(
            f"{source}: none of {len(examples)} examples can be used: {'; '.join(lines)}. Raise --max_length."
        )
    return encoded.select(kept).select_columns(["input_ids", "labels", "origin"]), lines


def _report_invalid(
    encoded: Dataset, status: Sequence[str], num_examples: int, source: str, skip_invalid: bool
) -> list[str]:
    """A line about examples that could not be encoded, if there are some; UserError unless `skip_invalid`."""
    valid = (_WHOLE, _CUT, _NEXT_PART, _TOO_LONG, _NO_LABELS)
    invalid = [index for index, value in enumerate(status) if value not in valid]
    if not invalid:
        return []
    if not skip_invalid:
        problems = (f"{encoded[index]['origin']} {status[index]}" for index in invalid)
        refuse_examples(problems, len(invalid), num_examples, source)
    return [f"{len(invalid)} examples skipped, such as {encoded[invalid[0]]['origin']} {status[invalid[0]]}"]


def _check_labels(labels: Sequence[int]) -> None:
    if all(label == IGNORED for label in labels):
        raise ExampleError("has no answer in what the chat template makes of it; give another by --chat_template_path")


def _limit_length(
    ids: list[int], labels: list[int], max_length: int | None, drop: bool, splits: bool
) -> list[tuple[list[int], list[int], str]]:
    """An example as one or several of at most max_length tokens, each with its status."""
    if max_length is None or len(ids) <= max_length:
        return [(ids, labels, _WHOLE)]
    if drop:
        return [([], [], _TOO_LONG)]
    if not splits:
        ids, labels = ids[:max_length], labels[:max_length]
        # The first label has no token before it to be predicted from.
        has_labels = any(label != IGNORED for label in labels[1:])
        return [(ids, labels, _CUT) if has_labels else ([], [], _NO_LABELS)]
    return [
        (ids[start : start + max_length], labels[start : start + max_length], _NEXT_PART if start else _CUT)
        for start in range(0, len(ids), max_length)
        if len(ids) - start > 1
    ]


def _report_long(encoded: Dataset, status: Sequence[str], max_length: int | None) -> list[str]:
    """A line about examples longer than max_length, if there are some: their number, the longest, their outcomes."""
    counts = {value: status.count(value) for value in (_CUT, _NEXT_PART, _TOO_LONG, _NO_LABELS)}
    num_long = counts[_CUT] + counts[_TOO_LONG] + counts[_NO_LABELS]
    if not num_long:
        return []
    lengths = list(encoded["length"])
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    outcomes = [f"{counts[_TOO_LONG]} dropped"] if counts[_TOO_LONG] else []
    if counts[_NEXT_PART]:
        outcomes.append(f"{counts[_CUT]} split into {counts[_CUT] + counts[_NEXT_PART]}")
    elif counts[_CUT]:
        outcomes.append(f"{counts[_CUT]} truncated")
    if counts[_NO_LABELS]:
        outcomes.append(f"{counts[_NO_LABELS]} dropped, as no label was left")
    place = f"{encoded[longest]['origin']} has {lengths[longest]}"
    return [f"{num_long} examples have more than {max_length} tokens ({place}): {', '.join(outcomes)}"]

"""From turns to token ids and labels. Labels are the assistant's turns, with their end, and -100 elsewhere.

The chat template is the tokenizer's own, or a plain one for a model without a template. Templates that mark the
assistant's tokens ({% generation %}), or of which TRL has such a version, define the labels. With other templates, an
assistant's turn is the text that rendering it adds to the turns before it.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, cast

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from lisa_dist.data.formats import ExampleError, refuse_examples
from lisa_dist.data.readers import ORIGIN
from lisa_dist.errors import UserError
from lisa_dist.files import read_text
from lisa_dist.turns import OF_TEMPLATES, as_taken, takes_parts

IGNORED = -100  # the label of a token without loss, as everywhere in transformers
LONG_EXAMPLES = ("auto", "truncate", "drop")
_VERSION = 6  # increase it with any change of the encoding: older caches are then not used
# The status of an encoded example; any other status is why the example is invalid.
_WHOLE, _CUT, _NEXT_PART, _TOO_LONG, _NO_LABELS = "whole", "cut", "next part", "too long", "no labels"
_KEPT = (_WHOLE, _CUT, _NEXT_PART)
# A question, a line break, the answer and the end-of-text token.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}"
    "{% elif message['role'] == 'system' %}{{ '\\n\\n' }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)


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
        ids, has_label = self._encode_turns(turns, tools)
        if self._assistant_only and not any(has_label):
            raise ExampleError(
                "has no answer in what the chat template makes of it; give another by --chat_template_path"
            )
        return ids, [token if marked else IGNORED for token, marked in zip(ids, has_label, strict=True)]

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

    def _encode_turns(self, turns: Sequence[dict[str, Any]], tools: list | None) -> tuple[list[int], list[Any]]:
        """Token ids, and which of them have labels."""
        if self.marked_template is not None:
            settings = {"return_dict": True, "return_assistant_tokens_mask": True}
            encoded: Any = self._apply(turns, chat_template=self.marked_template, tools=tools, **settings)
            return encoded["input_ids"], encoded["assistant_masks"]
        text = self._render(turns, tools)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        if not self._assistant_only:
            return encoded["input_ids"], [True] * len(encoded["input_ids"])
        spans = self._find_spans(turns, tools, text)
        within = [
            begin < end and any(first <= begin < last for first, last in spans)
            for begin, end in encoded["offset_mapping"]
        ]
        return encoded["input_ids"], within

    def _find_spans(self, turns: Sequence[dict[str, Any]], tools: list | None, text: str) -> list[tuple[int, int]]:
        """The spans of the assistant's turns in the text of all turns."""
        spans = []
        for number, turn in enumerate(turns):
            if turn["role"] != "assistant":
                continue
            after, content = self._render(turns[: number + 1], tools), turn["content"].strip()
            if number:
                before = self._render(turns[:number], tools, add_generation_prompt=True)
            elif not content:
                raise ExampleError("begins with a tool call; put a turn of the user before it")
            else:  # no template renders no turns
                before = after.partition(content)[0]
            functions = [call["function"]["name"] for call in turn.get("tool_calls") or ()]
            end = self._end_of_turn(before, after, text, [content, *functions])
            if end is None:
                raise ExampleError(
                    f"the chat template renders turn {number + 1} differently once later turns follow, so the "
                    "assistant's tokens cannot be found; give --train_on_inputs true, or a template with "
                    "{% generation %} by --chat_template_path"
                )
            spans.append((len(before), end))
        return spans

    def _render(self, turns: Sequence[dict[str, Any]], tools: list | None, add_generation_prompt: bool = False) -> str:
        rendered = self._apply(turns, tools=tools, tokenize=False, add_generation_prompt=add_generation_prompt)
        return cast(str, rendered)

    def _apply(self, turns: Sequence[dict[str, Any]], **given: Any) -> Any:
        """What the chat template makes of turns. Raises ExampleError where it refuses them."""
        try:
            return self._tokenizer.apply_chat_template(as_taken(turns, self._in_parts), **given)
        except OF_TEMPLATES as error:
            raise ExampleError(f"the chat template refuses it: {error}") from error

    def _end_of_turn(self, before: str, after: str, text: str, said: list[str]) -> int | None:
        """Where in `text`, that of all turns, a turn ends; None if its end cannot be found.

        `before` and `after` are the text without and with the turn, both without later turns; it has
        the texts `said`. Some templates end the last turn with text that they omit once turns follow. The turn then
        ends with its last special token that is in both texts.
        """
        if not (text.startswith(before) and after.startswith(before)):
            return None
        common = os.path.commonprefix([after, text])  # noqa: RUF071 - of texts, character by character
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

    def encode(batch: dict[str, list]) -> dict[str, list]:
        columns: dict[str, list] = {name: [] for name in ("input_ids", "labels", ORIGIN, "length", "status")}
        for turns, tools, origin in zip(batch["turns"], batch["tools"], batch[ORIGIN], strict=True):
            try:
                parts, length = encode_parts(encoder, turns, tools, max_length, long_examples)
            except ExampleError as error:
                parts, length = [([], [], str(error))], 0
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
    lines = []
    if invalid := [index for index, value in enumerate(status) if value not in (*_KEPT, _TOO_LONG, _NO_LABELS)]:
        origins = encoded[ORIGIN]
        problems = [f"{origins[index]} {status[index]}" for index in invalid]
        if not skip_invalid:
            refuse_examples(problems, len(examples), source)
        lines.append(f"{len(invalid)} examples skipped, such as {problems[0]}")
    lines += _report_long(encoded, status, max_length)
    kept = [index for index, value in enumerate(status) if value in _KEPT]
    if not kept:
        raise UserError(
            f"{source}: none of {len(examples)} examples can be used: {'; '.join(lines)}. Raise --max_length."
        )
    return encoded.select(kept).select_columns(["input_ids", "labels", ORIGIN]), lines


def encode_parts(
    encoder: Encoder, turns: Sequence[dict[str, Any]], tools: Any, max_length: int | None, long_examples: str
) -> tuple[list[tuple[list[int], list[int], str]], int]:
    """Token ids and labels of an example, or of each of its parts, with a status, and its length; none where it goes.

    Raises ExampleError if the chat template cannot render the turns.
    """
    ids, labels = encoder.encode(turns, tools)
    splits = long_examples == "auto" and turns[0]["role"] == "text"
    return _limit_length(ids, labels, max_length, long_examples == "drop", splits), len(ids)


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
    counts = Counter(status)
    num_long = counts[_CUT] + counts[_TOO_LONG] + counts[_NO_LABELS]
    if not num_long:
        return []
    lengths = list(encoded["length"])
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    cut = f"{counts[_CUT]} truncated"
    if counts[_NEXT_PART]:
        cut = f"{counts[_CUT]} split into {counts[_CUT] + counts[_NEXT_PART]}"
    outcomes = {
        f"{counts[_TOO_LONG]} dropped": counts[_TOO_LONG],
        cut: counts[_CUT],
        f"{counts[_NO_LABELS]} dropped, as no label was left": counts[_NO_LABELS],
    }
    place = f"{encoded[longest][ORIGIN]} has {lengths[longest]}"
    told = ", ".join(outcome for outcome, count in outcomes.items() if count)
    return [f"{num_long} examples have more than {max_length} tokens ({place}): {told}"]


def set_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> str:
    """Set the template of `--chat_template_path`, or the plain one if there is none; returns a description of it.

    Raises UserError if the path is neither a template nor a tokenizer with one.
    """
    if path is None:
        if tokenizer.chat_template is not None:
            return "the tokenizer's own"
        if tokenizer.eos_token is None:
            raise UserError("the tokenizer has no chat template and no end-of-text token: give --chat_template_path.")
        adds_bos = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if adds_bos else "") + PLAIN_TEMPLATE
        return "plain, as the model has none"
    if Path(path).suffix in (".jinja", ".j2"):
        tokenizer.chat_template = read_text("--chat_template_path", path)
        return path
    try:
        other = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--chat_template_path {path}: is not a .jinja file, and no tokenizer of that name can be loaded "
            f"({type(error).__name__})."
        ) from error
    if other.chat_template is None:
        raise UserError(f"--chat_template_path {path}: that tokenizer has no chat template.")
    unknown = sorted(set(other.get_added_vocab()) - set(tokenizer.get_vocab()))
    missing = [token for token in unknown if token in str(other.chat_template)]
    if missing:
        raise UserError(
            f"--chat_template_path {path}: its template uses the tokens {', '.join(missing)}, which the model does not "
            "have."
        )
    tokenizer.chat_template = other.chat_template
    return f"that of {path}"

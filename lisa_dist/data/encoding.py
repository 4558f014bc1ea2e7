"""From turns to tokens, and which of them count for the loss: what the assistant says, and the end of its turn.

The chat template is the tokenizer's own, or the plain one where a model has none. A template that marks what the
assistant says ({% generation %}), or of which TRL has a version that does, is taken at its word. With any other, an
assistant's turn is what rendering it adds to what was rendered before it.
"""

import hashlib
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from datasets import Dataset
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, has_generation_markers

from lisa_dist.config import UserError
from lisa_dist.data.formats import RowError, refuse_rows

IGNORED = -100  # the label of a token that does not count, as everywhere in transformers
LONG_EXAMPLES = ("auto", "truncate", "drop")
_VERSION = 1  # another one for any change of what is encoded: caches of others are not taken
# What has become of an example; anything else is what was wrong with it.
_WHOLE, _CUT, _MORE, _TOO_LONG, _NOTHING_LEFT = "whole", "cut", "more", "too long", "nothing left"
# A question, a line break, the answer, the end of the text; before it what the tokenizer begins texts with.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}"
    "{% elif message['role'] == 'system' %}{{ '\\n\\n' }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
)


def set_chat_template(tokenizer: PreTrainedTokenizerBase, path: str | None) -> str:
    """Give the tokenizer the template of `--chat_template_path`, or the plain one where it has none; says which it has.

    Raises UserError where the path is neither a template nor a tokenizer that has one.
    """
    if path is None:
        if tokenizer.chat_template is not None:
            return "the tokenizer's own"
        if tokenizer.eos_token is None:
            raise UserError("the tokenizer has no chat template and no end-of-text token: give --chat_template_path.")
        begins = tokenizer.bos_token_id is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
        tokenizer.chat_template = ("{{ bos_token }}" if begins else "") + PLAIN_TEMPLATE
        return "plain: the model has none of its own"
    if Path(path).suffix in (".jinja", ".j2"):
        try:
            tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--chat_template_path {path}: cannot be read ({error}).") from error
        return path
    try:
        other = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise UserError(
            f"--chat_template_path {path}: is no .jinja file, and no tokenizer of that name can be reached "
            f"({type(error).__name__})."
        ) from error
    if other.chat_template is None:
        raise UserError(f"--chat_template_path {path}: that tokenizer has no chat template.")
    lacking = sorted(set(other.get_added_vocab()) - set(tokenizer.get_vocab()))
    used = [token for token in lacking if token in str(other.chat_template)]
    if used:
        raise UserError(
            f"--chat_template_path {path}: its template needs the tokens {', '.join(used)}, which the model does not "
            "have."
        )
    tokenizer.chat_template = other.chat_template
    return f"that of {path}"


class Encoder:
    """Turns to token ids and labels, both lists of integers of one length, by one tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, assistant_only: bool):
        self._tokenizer, self._assistant_only = tokenizer, assistant_only
        self._special = list(tokenizer.get_added_vocab())
        self._plain = str(tokenizer.chat_template).endswith(PLAIN_TEMPLATE)
        self._marked = self._template_with_marks() if assistant_only and not self._plain else None
        if not tokenizer.is_fast:
            raise UserError(f"the tokenizer {type(tokenizer).__name__} does not tell where its tokens lie in a text.")

    def fingerprint(self) -> str:
        """The same for encoders that encode alike."""
        tokenizer = self._tokenizer
        parts = [tokenizer.backend_tokenizer.to_str(), str(tokenizer.chat_template), str(self._assistant_only)]
        parts += [json.dumps(tokenizer.special_tokens_map, default=str, sort_keys=True), str(_VERSION)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def encode(self, turns: Sequence[dict[str, str]]) -> tuple[list[int], list[int]]:
        """Token ids, and of each the id again if it counts for the loss, else -100. RowError where a template fails."""
        first = turns[0]["role"]
        if first == "text":
            return self._encode_written(turns[0]["content"], 0)
        if first == "prompt" and self._plain:
            prompt = turns[0]["content"]
            return self._encode_written(prompt + turns[1]["content"], len(prompt) if self._assistant_only else 0)
        if first == "prompt":
            roles = {"prompt": "user", "completion": "assistant"}
            turns = [turn | {"role": roles[turn["role"]]} for turn in turns]
        if self._marked is not None:
            return self._encode_marked(turns)
        text, spans = self._render(turns)
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = encoded["input_ids"]
        if not self._assistant_only:
            return ids, list(ids)
        labels = [IGNORED] * len(ids)
        for index, (begin, end) in enumerate(encoded["offset_mapping"]):
            if begin < end and any(first <= begin < last for first, last in spans):
                labels[index] = ids[index]
        return ids, labels

    def describe(self, ids: Sequence[int], labels: Sequence[int]) -> list[tuple[str, bool]]:
        """An example as text, in pieces that count for the loss and pieces that do not."""
        pieces = []
        for counts, tokens in groupby(zip(ids, labels, strict=True), lambda pair: pair[1] != IGNORED):
            text = self._tokenizer.decode([token for token, _ in tokens], clean_up_tokenization_spaces=False)
            pieces.append((text, counts))
        return pieces

    def _template_with_marks(self) -> str | None:
        if has_generation_markers(self._tokenizer.chat_template):
            return self._tokenizer.chat_template
        try:
            return get_training_chat_template(self._tokenizer)
        except ValueError:  # TRL knows none
            return None

    def _encode_written(self, text: str, prompt_length: int) -> tuple[list[int], list[int]]:
        """A text as it is written, and the end of it; what begins before prompt_length does not count."""
        encoded = self._tokenizer(text, return_offsets_mapping=True)
        ids, starts = list(encoded["input_ids"]), [begin for begin, _ in encoded["offset_mapping"]]
        end = self._tokenizer.eos_token_id
        if end is not None and (not ids or ids[-1] != end):
            ids.append(end)
            starts.append(len(text))
        elif end is not None:
            starts[-1] = len(text)
        return ids, [token if start >= prompt_length else IGNORED for token, start in zip(ids, starts, strict=True)]

    def _encode_marked(self, turns: Sequence[dict[str, str]]) -> tuple[list[int], list[int]]:
        arguments = {"chat_template": self._marked, "return_dict": True, "return_assistant_tokens_mask": True}
        try:
            encoded = self._tokenizer.apply_chat_template(list(turns), **arguments)
        except TemplateError as error:
            raise RowError(f"the chat template says: {error}") from error
        ids, mask = encoded["input_ids"], encoded["assistant_masks"]
        return ids, [token if counts else IGNORED for token, counts in zip(ids, mask, strict=True)]

    def _render(self, turns: Sequence[dict[str, str]]) -> tuple[str, list[tuple[int, int]]]:
        """The text of all turns, and where in it the assistant's lie."""
        try:
            text = self._apply(turns)
            if not self._assistant_only:
                return text, []
            spans = []
            for number, turn in enumerate(turns):
                if turn["role"] != "assistant":
                    continue
                before = self._apply(turns[:number], add_generation_prompt=True)
                after = self._apply(turns[: number + 1])
                end = self._end_of_turn(before, after, text, turn["content"])
                if end is None:
                    raise RowError(
                        f"the chat template renders turn {number + 1} otherwise within the whole than up to there, so "
                        "what the assistant says cannot be told; give --train_on_inputs true, or a template with "
                        "{% generation %} by --chat_template_path"
                    )
                spans.append((len(before), end))
        except TemplateError as error:
            raise RowError(f"the chat template says: {error}") from error
        return text, spans

    def _apply(self, turns: Sequence[dict[str, str]], add_generation_prompt: bool = False) -> str:
        return self._tokenizer.apply_chat_template(
            list(turns), tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def _end_of_turn(self, before: str, after: str, text: str, content: str) -> int | None:
        """Where in the text a turn ends that begins after `before`; None where it cannot be told.

        `after` is the text up to and with the turn. Some templates end it as the last one, with what is not in the
        whole text: then the turn ends with the last token of its own that both have.
        """
        said = _common_prefix(after, text)
        if not (text.startswith(before) and after.startswith(before)):
            return None
        ends = [said.rfind(token) + len(token) for token in self._special if token in said[len(before) :]]
        last = max(ends, default=None)
        if said != after:
            return last if last is not None and content.strip() in said[len(before) : last] else None
        # The line break after the end of a turn belongs to what follows.
        return last if last is not None and not said[last:].strip() else len(said)


def _common_prefix(one: str, other: str) -> str:
    pairs = zip(one, other, strict=False)
    return one[: next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))]


def encode_rows(
    rows: Dataset,
    encoder: Encoder,
    said: str,
    max_length: int | None = None,
    long_examples: str = "auto",
    skip_bad_rows: bool = False,
    num_proc: int | None = None,
) -> tuple[Dataset, list[str]]:
    """The columns input_ids, labels and origin for rows of turns, none longer than max_length; and lines of long ones.

    Long ones are cut at their end (`truncate`) or left out (`drop`); with `auto` a text is cut into several examples,
    and all else at its end. One that has no token left that counts is left out. Raises UserError where none is left.
    """
    if long_examples not in LONG_EXAMPLES:
        raise UserError(f"--long_examples {long_examples}: unknown; choose one of {', '.join(LONG_EXAMPLES)}.")

    def encode(batch: dict[str, list]) -> dict[str, list]:
        examples: dict[str, list] = {name: [] for name in ("input_ids", "labels", "origin", "length", "fate")}
        for turns, origin in zip(batch["turns"], batch["origin"], strict=True):
            try:
                ids, labels = encoder.encode(turns)
            except RowError as error:
                pieces, length = [([], [], str(error))], 0
            else:
                split = long_examples == "auto" and turns[0]["role"] == "text"
                pieces, length = _fit(ids, labels, max_length, long_examples == "drop", split), len(ids)
            for ids, labels, fate in pieces:
                for name, value in zip(examples, (ids, labels, origin, length, fate), strict=True):
                    examples[name].append(value)
        return examples

    key = [rows._fingerprint, encoder.fingerprint(), str(max_length), long_examples]
    encoded = rows.map(
        encode,
        batched=True,
        remove_columns=rows.column_names,
        num_proc=num_proc,
        new_fingerprint=hashlib.sha256("\0".join(key).encode()).hexdigest()[:32],
        desc="Tokenizing",
    )
    fates = encoded["fate"]
    kept = [index for index, fate in enumerate(fates) if fate in (_WHOLE, _CUT, _MORE)]
    bad = [index for index, fate in enumerate(fates) if fate not in (_WHOLE, _CUT, _MORE, _TOO_LONG, _NOTHING_LEFT)]
    if bad and not skip_bad_rows:
        refuse_rows((f"{encoded[index]['origin']} {fates[index]}" for index in bad), len(bad), len(rows), said)
    lines = [f"{len(bad)} rows left out, such as {encoded[bad[0]]['origin']} {fates[bad[0]]}"] if bad else []
    lines += _tell_long(encoded, fates, max_length)
    if not kept:
        raise UserError(f"{said}: no row is left of {len(rows)}: {'; '.join(lines)}. Raise --max_length.")
    return encoded.select(kept).select_columns(["input_ids", "labels", "origin"]), lines


def _fit(
    ids: list[int], labels: list[int], max_length: int | None, drop: bool, split: bool
) -> list[tuple[list[int], list[int], str]]:
    """An example in no more than max_length tokens, or in several of so many; with what has become of it."""
    if max_length is None or len(ids) <= max_length:
        return [(ids, labels, _WHOLE)]
    if drop:
        return [([], [], _TOO_LONG)]
    if not split:
        ids, labels = ids[:max_length], labels[:max_length]
        # The first label has no token before it that could foretell it.
        return [(ids, labels, _CUT) if any(label != IGNORED for label in labels[1:]) else ([], [], _NOTHING_LEFT)]
    cuts = range(0, len(ids), max_length)
    return [
        (ids[at : at + max_length], labels[at : at + max_length], _MORE if at else _CUT)
        for at in cuts
        if len(ids) - at > 1
    ]


def _tell_long(encoded: Dataset, fates: Sequence[str], max_length: int | None) -> list[str]:
    """One line where rows were longer than max_length: how many, the longest, what became of them."""
    number = {fate: sum(found == fate for found in fates) for fate in (_CUT, _MORE, _TOO_LONG, _NOTHING_LEFT)}
    num_long = number[_CUT] + number[_TOO_LONG] + number[_NOTHING_LEFT]
    if not num_long:
        return []
    lengths = encoded["length"]
    longest = max(range(len(lengths)), key=lengths.__getitem__)
    outcomes = [f"{number[_TOO_LONG]} left out"] if number[_TOO_LONG] else []
    if number[_MORE]:
        outcomes.append(f"{number[_CUT]} cut into {number[_CUT] + number[_MORE]}")
    elif number[_CUT]:
        outcomes.append(f"{number[_CUT]} cut")
    if number[_NOTHING_LEFT]:
        outcomes.append(f"{number[_NOTHING_LEFT]} left out, as nothing that counts was left")
    longest = f"{encoded[longest]['origin']} has {lengths[longest]}"
    return [f"{num_long} rows have more than {max_length} tokens ({longest}): {', '.join(outcomes)}"]

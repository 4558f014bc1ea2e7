"""The answers of a model: prompts of turns, MT-Bench's questions in batches, and their file, which all ranks fill.

    model_answer/MODEL.jsonl    question_id, answer_id, model_id, choices, tstamp, made_with

The format is that of FastChat's llm_judge, plus `made_with`. A run that was interrupted, on any number of ranks,
continues from the file.
"""

import hashlib
import json
import math
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from lisa_dist.distributed.collectives import gather
from lisa_dist.errors import UserError
from lisa_dist.files import replacing
from lisa_dist.turns import as_taken, takes_parts

# By category; that of the others is 0.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
TEMPERATURES |= dict.fromkeys(("reasoning", "math", "coding", "extraction"), 0.0)


def encode_turns(tokenizer: PreTrainedTokenizerBase, turns: Sequence[dict[str, str]]) -> list[int]:
    """The tokens of turns in the tokenizer's chat template, up to where the model's answer begins."""
    taken: Any = as_taken(turns, takes_parts(tokenizer))
    text = str(tokenizer.apply_chat_template(taken, tokenize=False, add_generation_prompt=True))
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def context_of(model: PreTrainedModel) -> float:
    """The most tokens that a model takes; infinity where its config does not say."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


class AnswerWriter:
    """Answers questions in batches. An answer does not depend on its batch: each question has its own generator.

    A token is the argmax of logit / temperature + Gumbel noise, which samples at that temperature; no other sampling
    setting applies. The batch size changes the last bits of logits, which may decide between two nearly equal tokens.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, max_new_tokens: int):
        self._model: Any = model  # its type does not declare `generate`
        self._tokenizer, self._seed, self._max_new_tokens = tokenizer, seed, max_new_tokens
        ends = model.generation_config.eos_token_id
        self._ends = sorted({*(ends if isinstance(ends, list) else [ends]), tokenizer.eos_token_id} - {None})
        self.num_too_long = 0  # turns without an answer, as their prompt fills the context

    def answer(self, questions: Sequence[dict]) -> list[list[str]]:
        """The answers to both turns of each question."""
        chats: list[list[dict]] = [[] for _ in questions]
        for turn in (1, 2):
            for chat, question in zip(chats, questions, strict=True):
                chat.append({"role": "user", "content": question["turns"][turn - 1]})
            for chat, text in zip(chats, self._answer_turn(questions, chats, turn), strict=True):
                chat.append({"role": "assistant", "content": text})
        return [[chat[1]["content"], chat[3]["content"]] for chat in chats]

    def _answer_turn(self, questions: Sequence[dict], chats: list[list[dict]], turn: int) -> list[str]:
        """Together those that have room for equally many tokens."""
        prompts = [encode_turns(self._tokenizer, chat) for chat in chats]
        rooms = [min(self._max_new_tokens, context_of(self._model) - len(prompt)) for prompt in prompts]
        texts = [""] * len(prompts)
        for room in set(rooms):
            batch = [index for index, of_prompt in enumerate(rooms) if of_prompt == room]
            if room <= 0:
                self.num_too_long += len(batch)
                continue
            chosen = [prompts[index] for index in batch], [questions[index] for index in batch]
            for index, text in zip(batch, self._generate(*chosen, turn, int(room)), strict=True):
                texts[index] = text
        return texts

    def _generate(self, prompts: list[list[int]], questions: list[dict], turn: int, max_new_tokens: int) -> list[str]:
        device, width = self._model.device, max(map(len, prompts))
        pad = self._tokenizer.pad_token_id if self._tokenizer.pad_token_id is not None else self._ends[0]
        ids = torch.tensor([[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=device)
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
        samplings = []
        for question in questions:
            digest = hashlib.sha256(f"{self._seed} {question['question_id']} {turn}".encode()).digest()
            generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))
            samplings.append((TEMPERATURES[question["category"]], generator))
        with torch.no_grad():
            generated = self._model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=self._ends,
                pad_token_id=pad,
                logits_processor=LogitsProcessorList([SampleByTemperature(samplings)]),
            )
        texts = self._tokenizer.batch_decode(generated[:, width:], skip_special_tokens=True)
        return [text.strip() for text in texts]


class SampleByTemperature(LogitsProcessor):
    """Makes the sampled token's score the largest. Each sequence has a temperature and a generator; 0 is greedy."""

    def __init__(self, samplings: list[tuple[float, torch.Generator]]):
        self._samplings = samplings

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores of shape (sequences, vocabulary), in fp32."""
        noisy = scores.clone()
        for index, (temperature, generator) in enumerate(self._samplings):
            if temperature > 0:
                exponential = torch.empty_like(scores[index]).exponential_(generator=generator)
                noisy[index] = scores[index] / temperature - exponential.clamp_min(1e-30).log()
        return noisy


def read_lines(path: Path) -> list[dict]:
    """The lines of a .jsonl file, none where there is no file. Raises UserError for one that is not JSON."""
    lines = []
    # What follows the last line break is empty, or was cut short.
    for number, text in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else (), 1):
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: is not JSON ({error}); move the file away.") from error
    return lines


def write_lines(path: Path, lines: Iterable[dict]) -> None:
    """Write a whole .jsonl file in one step."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as new:
        new.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


class AnswerFile:
    """A model's answers in `folder`. `made_with` are the settings that answers depend on.

    Raises UserError for saved ones made with other settings. Lines that name no settings, as FastChat's, are accepted.
    """

    def __init__(self, folder: Path, model_id: str, made_with: dict):
        self._path, self.model_id, self._made_with = folder / f"{model_id}.jsonl", model_id, made_with
        self.saved = {line["question_id"]: line for line in read_lines(self._path)}
        for line in self.saved.values():
            theirs = line.get("made_with", made_with)
            if differing := [name for name in made_with if theirs.get(name) != made_with[name]]:
                raise UserError(
                    f"{self._path}: has answers made with other {', '.join(differing)}; move it away, or give another "
                    "--output_dir."
                )

    def answer(
        self,
        questions: list[dict],
        load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
        batch_size: int,
    ) -> dict[int, list[str]]:
        """Both turns of the answer to each question, by its id; all ranks call it, and each answers a share.

        `load` gives model and tokenizer; it is called only if an answer is missing. After every batch rank 0 saves what
        all have made.
        """
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        lines = gather(self.saved)[0]  # hosts may not share the file, which is rank 0's
        missing = [question for question in questions if question["question_id"] not in lines]
        num_too_long, start = 0, time.monotonic()
        if missing:
            writer = AnswerWriter(*load(), self._made_with["seed"], self._made_with["max_new_tokens"])
            bar = tqdm(total=len(missing), desc="MT-Bench answers", disable=rank != 0)
            for begin in range(0, len(missing), batch_size * world_size):
                batch = missing[begin : begin + batch_size * world_size]
                share = batch[rank::world_size]
                made = [self._line(*pair) for pair in zip(share, writer.answer(share), strict=True)]
                lines |= {line["question_id"]: line for of_rank in gather(made) for line in of_rank}
                if rank == 0:
                    write_lines(self._path, [lines[number] for number in sorted(lines)])
                bar.update(len(batch))
            bar.close()
            num_too_long = sum(gather(writer.num_too_long))
        if rank == 0:
            summary = f"mt_bench: {len(missing)} answers made, {len(questions) - len(missing)} were saved already"
            summary += f", in {time.monotonic() - start:.0f} s: {self._path}"
            if num_too_long:
                summary += f"; {num_too_long} turns have no answer, as their prompt fills the model's context"
            print(summary, flush=True)
        return {one["question_id"]: lines[one["question_id"]]["choices"][0]["turns"] for one in questions}

    def _line(self, question: dict, turns: list[str]) -> dict:
        return {
            "question_id": question["question_id"],
            "answer_id": uuid.uuid4().hex,
            "model_id": self.model_id,
            "choices": [{"index": 0, "turns": turns}],
            "tstamp": time.time(),
            "made_with": self._made_with,
        }

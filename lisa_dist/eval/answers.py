"""The answers of a model to MT-Bench, made by all ranks and saved as they come.

    model_answer/MODEL.jsonl    question_id, answer_id, model_id, choices, tstamp, made_with

The format is that of FastChat's llm_judge, plus `made_with`. Each rank appends to its own file, tmp-RANK-MODEL.jsonl. A
run that was interrupted, on any number of ranks, continues from these files.
"""

import re
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from torch import distributed as dist
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lisa_dist.distributed.collectives import gather
from lisa_dist.errors import UserError
from lisa_dist.eval.generation import AnswerWriter
from lisa_dist.eval.jsonl import append_line, read_saved, remove_cut_line, turns_of, write_lines


@dataclass(frozen=True)
class Answers:
    """Both turns of each answer by question_id, the model's name, and a sentence about how they came."""

    turns: dict[int, list[str]]
    model_id: str
    summary: str


class AnswerFile:
    """The file of a model's answers in `folder`. `made_with` are the settings that answers depend on."""

    def __init__(self, folder: Path, model_id: str, made_with: dict):
        self._folder, self._model_id, self._made_with = folder, model_id, made_with
        self._path = folder / f"{model_id}.jsonl"

    def read(self) -> dict[int, dict]:
        """The saved lines by question_id, also those of a run that was interrupted.

        Raises UserError for lines made with other settings. Lines that name no settings, as FastChat's, are accepted.
        """
        saved = {}
        for path in (self._path, *self._rank_files()):
            for line in read_saved(path):
                made_with = line.get("made_with", self._made_with)
                differing = [name for name in self._made_with if made_with.get(name) != self._made_with[name]]
                if differing:
                    raise UserError(
                        f"{path}: has answers made with other {', '.join(differing)}; move it away, or give another "
                        "--output_dir."
                    )
                saved[line["question_id"]] = line
        return saved

    def answer(
        self,
        questions: list[dict],
        load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
        saved: dict[int, dict],
        batch_size: int,
    ) -> Answers:
        """Answer both turns of every question that is not `saved`; all ranks call it, and each answers a share.

        `load` gives model and tokenizer; it is called only if an answer is missing.
        """
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        saved = _merge_ranks(saved)
        missing = [question for question in questions if question["question_id"] not in saved]
        num_too_long, start = 0, time.monotonic()
        self._folder.mkdir(parents=True, exist_ok=True)
        if missing:
            writer = AnswerWriter(*load(), self._made_with["seed"], self._made_with["max_new_tokens"])
            saved |= self._answer_share(writer, missing[rank::world_size], rank, batch_size)
            saved = _merge_ranks(saved)
            num_too_long = sum(gather(writer.num_too_long))
        if rank == 0:
            write_lines(self._path, [saved[number] for number in sorted(saved)])
            for path in self._rank_files():
                path.unlink(missing_ok=True)
        gather(None)  # no rank leaves before the file is there
        summary = f"{len(missing)} answers made, {len(questions) - len(missing)} were saved already"
        summary += f", in {time.monotonic() - start:.0f} s: {self._path}"
        if num_too_long:
            summary += f"; {num_too_long} turns have no answer, as their prompt fills the model's context"
        turns = {question["question_id"]: turns_of(saved[question["question_id"]]) for question in questions}
        return Answers(turns, self._model_id, summary)

    def _answer_share(self, writer: AnswerWriter, share: list[dict], rank: int, batch_size: int) -> dict[int, dict]:
        """Lines by question_id, appended to this rank's file batch by batch."""
        lines, path = {}, self._folder / f"tmp-{rank}-{self._model_id}.jsonl"
        remove_cut_line(path)
        with tqdm(total=len(share), desc="MT-Bench answers", disable=rank != 0) as bar:
            for begin in range(0, len(share), batch_size):
                batch = share[begin : begin + batch_size]
                for question, turns in zip(batch, writer.answer(batch), strict=True):
                    line = lines[question["question_id"]] = {
                        "question_id": question["question_id"],
                        "answer_id": uuid.uuid4().hex,
                        "model_id": self._model_id,
                        "choices": [{"index": 0, "turns": turns}],
                        "tstamp": time.time(),
                        "made_with": self._made_with,
                    }
                    append_line(path, line)
                bar.update(len(batch))
        return lines

    def _rank_files(self) -> list[Path]:
        """Files of ranks whose answers are not in the file yet."""
        pattern = re.compile(rf"tmp-\d+-{re.escape(self._model_id)}\.jsonl")
        return sorted(p for p in self._folder.iterdir() if pattern.fullmatch(p.name)) if self._folder.is_dir() else []


def _merge_ranks(lines: dict[int, dict]) -> dict[int, dict]:
    return {number: line for rank_lines in gather(lines) for number, line in rank_lines.items()}

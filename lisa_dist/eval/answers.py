"""The answers of a model to MT-Bench, made by all ranks and saved as they come.

    model_answer/MODEL.jsonl    question_id, answer_id, model_id, choices, tstamp, made_with

The format is that of FastChat's llm_judge, plus `made_with`. A run that was interrupted, on any number of ranks,
continues from the file.
"""

import json
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path

from torch import distributed as dist
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lisa_dist.distributed.collectives import gather
from lisa_dist.errors import UserError
from lisa_dist.eval.generation import AnswerWriter
from lisa_dist.files import replacing


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

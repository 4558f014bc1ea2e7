"""MT-Bench: answers of both turns, and single-answer grading by a judge, in the files of FastChat's llm_judge.

    model_answer/MODEL.jsonl            question_id, answer_id, model_id, choices, tstamp; and by what it was made
    model_judgment/JUDGE_single.jsonl   question_id, model, judge, user_prompt, judgment, score, turn, tstamp

Answers and verdicts are written as they come, and what is there is not made again. A verdict counts for the very words
that it was asked about.

Source: Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (arXiv 2306.05685).
"""

import json
import os
import re
import statistics
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from torch import distributed as dist
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lisa_dist.config import UserError
from lisa_dist.distributed.collectives import gather
from lisa_dist.eval.answers import TEMPERATURES, AnswerWriter
from lisa_dist.eval.judge import Judge, JudgeError, parse_rating
from lisa_dist.eval.rows import lacks_text, read_rows
from lisa_dist.files import replacing
from lisa_dist.text import format_columns

WITH_REFERENCE = ("math", "reasoning", "coding")  # categories that are judged beside a reference answer
# Prompts of the judge, by whether there is a reference, and by turn.
_PROMPTS = {
    (False, 1): "single-v1",
    (True, 1): "single-math-v1",
    (False, 2): "single-v1-multi-turn",
    (True, 2): "single-math-v1-multi-turn",
}
_FIELDS = {"question", "answer", *(f"{what}_{n}" for what in ("question", "answer", "ref_answer") for n in (1, 2))}


@dataclass(frozen=True)
class Answers:
    """Answers by question, both turns of each; the model's name; and a sentence on what was done."""

    turns: dict[int, list[str]]
    model_id: str
    said: str


class MTBench:
    """The questions in `data_dir`/mt_bench; with `judged` the judge's prompts and the reference answers too.

    `limit` takes so many questions, or below 1 a part of them, in turn from the categories. Raises UserError naming
    file and row for what is missing.
    """

    def __init__(self, data_dir: str, limit: int | float | None = None, judged: bool = True):
        folder = Path(data_dir) / "mt_bench"
        questions = read_rows(folder / "question.jsonl", _check_question)
        if limit is not None:
            limit = max(1, int(len(questions) * limit)) if limit < 1 else int(limit)
        self.questions = _spread(questions)[:limit]
        self._prompts, self._references = {}, {}
        if not judged:
            return
        path = folder / "judge_prompts.jsonl"
        self._prompts = {row["name"]: row for row in read_rows(path, _check_prompt)}
        for name in _PROMPTS.values():
            if name not in self._prompts:
                raise UserError(f"{path}: has no prompt of the name {name}.")
            fields = {field for _, field, _, _ in Formatter().parse(self._prompts[name]["prompt_template"])} - {None}
            if fields - _FIELDS:
                raise UserError(f"{path}: {name} has {{{min(fields - _FIELDS)}}}, which nothing can be put in for.")
        if any(question["category"] in WITH_REFERENCE for question in self.questions):
            path = folder / "reference_answer_gpt-4.jsonl"
            self._references = {row["question_id"]: _turns_of(row) for row in read_rows(path, _check_answer)}
            for question in self.questions:
                if question["category"] in WITH_REFERENCE and question["question_id"] not in self._references:
                    raise UserError(
                        f"{path}: has no answer to question {question['question_id']}, which is of the category "
                        f"{question['category']}."
                    )

    def answers_there(self, folder: Path, model_id: str, made_with: dict) -> dict[int, dict]:
        """Lines by question that this run, or one before it that was cut, has left in `folder`.

        Raises UserError where they were made with something else than `made_with` says; lines of other programs do not
        say it, and are taken as they are.
        """
        there = {}
        for path in (folder / f"{model_id}.jsonl", *_parts(folder, model_id)):
            for line in _read_lines(path):
                theirs = line.get("made_with", made_with)
                differing = [name for name in made_with if theirs.get(name) != made_with[name]]
                if differing:
                    raise UserError(
                        f"{path}: has answers made with other {', '.join(differing)}; move it away, or give another "
                        "--output."
                    )
                there[line["question_id"]] = line
        return there

    def answer(
        self,
        load: Callable[[], tuple[PreTrainedModel, PreTrainedTokenizerBase]],
        there: dict[int, dict],
        folder: Path,
        model_id: str,
        made_with: dict,
        batch_size: int,
    ) -> Answers:
        """Both turns of every question, by all ranks together, each with a share; all ranks call it.

        `there` is what `answers_there` found; `load` gives model and tokenizer where an answer is lacking.
        """
        rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        there = {number: line for of_rank in gather(there) for number, line in of_rank.items()}
        lacking = [question for question in self.questions if question["question_id"] not in there]
        too_long, begun = 0, time.monotonic()
        folder.mkdir(parents=True, exist_ok=True)
        if lacking:
            writer = AnswerWriter(*load(), made_with["seed"], made_with["max_new_tokens"])
            there |= self._answer_share(writer, lacking[rank::world_size], folder, model_id, made_with, batch_size)
            there = {number: line for of_rank in gather(there) for number, line in of_rank.items()}
            too_long = sum(gather(writer.too_long))
        path = folder / f"{model_id}.jsonl"
        if rank == 0:
            _write_lines(path, [there[number] for number in sorted(there)])
            for part in _parts(folder, model_id):
                part.unlink(missing_ok=True)
        gather(None)  # no rank leaves before the file is there
        said = f"{len(lacking)} answers made, {len(self.questions) - len(lacking)} were there"
        said += f", in {time.monotonic() - begun:.0f} s: {path}"
        if too_long:
            said += f"; {too_long} turns have no answer, as the question fills all positions of the model"
        turns = {question["question_id"]: _turns_of(there[question["question_id"]]) for question in self.questions}
        return Answers(turns, model_id, said)

    def _answer_share(
        self, writer: AnswerWriter, share: list[dict], folder: Path, model_id: str, made_with: dict, batch_size: int
    ) -> dict[int, dict]:
        """Lines by question, written to a file of this rank's as they come."""
        rank, lines = dist.get_rank() if dist.is_initialized() else 0, {}
        path = folder / f"tmp-{rank}-{model_id}.jsonl"
        _mend(path)
        with tqdm(total=len(share), desc="MT-Bench answers", disable=rank != 0) as bar:
            for begin in range(0, len(share), batch_size):
                batch = share[begin : begin + batch_size]
                for question, turns in zip(batch, writer.answer(batch), strict=True):
                    line = lines[question["question_id"]] = {
                        "question_id": question["question_id"],
                        "answer_id": uuid.uuid4().hex,
                        "model_id": model_id,
                        "choices": [{"index": 0, "turns": turns}],
                        "tstamp": time.time(),
                        "made_with": made_with,
                    }
                    _append(path, line)
                bar.update(len(batch))
        return lines

    def judge(self, judge: Judge, answers: Answers, folder: Path, parallel: int) -> tuple[dict, str]:
        """A verdict on each turn of every answer, in numbers and as a table; one process calls it.

        Raises JudgeError where the judge cannot be had; what was judged before stays.
        """
        path = folder / f"{judge.model.replace('/', '_')}_single.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        asked = {}
        for question in self.questions:
            for turn in (1, 2):
                asked[question["question_id"], turn] = self._ask(question, turn, answers.turns)
        verdicts, of_others = {}, []
        for line in _read_lines(path):
            key = (line["question_id"], line["turn"])
            if line["model"] != answers.model_id:
                of_others.append(line)
            elif key in asked and line["user_prompt"] == asked[key][2]:
                verdicts[key] = line
        lacking = [key for key in asked if key not in verdicts]
        _mend(path)
        writing, stopped = threading.Lock(), threading.Event()

        def judge_one(key: tuple[int, int]) -> None:
            name, system, user = asked[key]
            if stopped.is_set():
                return
            try:
                said = judge.ask(system, user)
            except JudgeError:
                stopped.set()
                raise
            line = {
                "question_id": key[0],
                "model": answers.model_id,
                "judge": [judge.model, name],
                "user_prompt": user,
                "judgment": said,
                "score": parse_rating(said),
                "turn": key[1],
                "tstamp": time.time(),
            }
            with writing:
                _append(path, line)
                verdicts[key] = line
                bar.update()

        try:
            with (
                tqdm(total=len(lacking), desc="MT-Bench verdicts") as bar,
                ThreadPoolExecutor(parallel) as pool,
            ):
                try:
                    for future in [pool.submit(judge_one, key) for key in lacking]:
                        future.result()
                finally:
                    pool.shutdown(cancel_futures=True)
        except JudgeError as error:
            raise JudgeError(
                f"{str(error).rstrip('.')}. {len(verdicts)} of {len(asked)} verdicts are in {path}; the same command "
                "goes on from there."
            ) from error
        _write_lines(path, [*of_others, *(verdicts[key] for key in asked)])
        return self._outcome(verdicts, judge.model)

    def _ask(self, question: dict, turn: int, answers: dict[int, list[str]]) -> tuple[str, str, str]:
        """The prompt's name, its system message, and what the judge is asked."""
        number = question["question_id"]
        with_reference = question["category"] in WITH_REFERENCE
        name = _PROMPTS[with_reference, turn]
        words = {f"{what}_{n}": texts[n - 1] for what, texts in _named(question, answers[number]) for n in (1, 2)}
        if with_reference:
            words |= {f"ref_answer_{n}": self._references[number][n - 1] for n in (1, 2)}
        words |= {"question": question["turns"][0], "answer": answers[number][0]}
        prompt = self._prompts[name]
        return name, prompt["system_prompt"], prompt["prompt_template"].format(**words)

    def _outcome(self, verdicts: dict[tuple[int, int], dict], judge: str) -> tuple[dict, str]:
        categories = list(dict.fromkeys(question["category"] for question in self.questions))
        rows, content = [], {}
        for category in [*categories, "all"]:
            numbers = [q["question_id"] for q in self.questions if category in (q["category"], "all")]
            scores = {n: {turn: verdicts[n, turn]["score"] for turn in (1, 2)} for n in numbers}
            parsed = {n: [score for score in of_turns.values() if score > 0] for n, of_turns in scores.items()}
            means = [statistics.fmean(found) for found in parsed.values() if found]
            found = {
                "turn_1": _mean(of_turns[1] for of_turns in scores.values()),
                "turn_2": _mean(of_turns[2] for of_turns in scores.values()),
                "both": _mean(score for of_turns in scores.values() for score in of_turns.values()),
                "stderr": statistics.stdev(means) / len(means) ** 0.5 if len(means) > 1 else None,
                "verdicts": sum(map(len, parsed.values())),
                "unparsable": 2 * len(numbers) - sum(map(len, parsed.values())),
            }
            content[category] = found
            shown = [found[name] for name in ("turn_1", "turn_2", "both", "stderr")]
            cells = ["none" if value is None else f"{value:.2f}" for value in shown]
            rows.append((category, *cells, str(found["verdicts"]), str(found["unparsable"])))
        header = ("mt_bench", "turn 1", "turn 2", "both", "standard error", "verdicts", "unparsable")
        about = {"judge": judge, "items": len(self.questions)}
        return about | {"scores": content}, format_columns([header, *rows])


def _spread(questions: list[dict]) -> list[dict]:
    """One of each category, another of each, and so on: the first few are of all kinds."""
    places, seen = {}, {}
    for question in questions:
        seen[question["category"]] = places[question["question_id"]] = seen.get(question["category"], 0) + 1
    return sorted(questions, key=lambda question: places[question["question_id"]])


def _named(question: dict, answer: list[str]) -> Iterator[tuple[str, list[str]]]:
    yield "question", question["turns"]
    yield "answer", answer


def _mean(scores: Iterator[float]) -> float | None:
    """Of those that could be parsed."""
    parsed = [score for score in scores if score > 0]
    return statistics.fmean(parsed) if parsed else None


def _turns_of(line: dict) -> list[str]:
    return line["choices"][0]["turns"]


def _check_question(row: dict) -> str | None:
    problem = lacks_text(row, "category")
    if problem is None and row["category"] not in TEMPERATURES:
        return f"category must be one of {', '.join(TEMPERATURES)}, not {row['category']}"
    if problem is None and type(row.get("question_id")) is not int:
        return "question_id must be a number"
    return problem or _lacks_turns(row)


def _check_answer(row: dict) -> str | None:
    if type(row.get("question_id")) is not int:
        return "question_id must be a number"
    choices = row.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return "choices must be a list with an object that has turns"
    return _lacks_turns(choices[0])


def _check_prompt(row: dict) -> str | None:
    return lacks_text(row, "name", "system_prompt", "prompt_template")


def _lacks_turns(row: dict) -> str | None:
    turns = row.get("turns")
    whole = isinstance(turns, list) and len(turns) == 2 and all(isinstance(one, str) and one.strip() for one in turns)
    return None if whole else "turns must be two texts that are not empty"


def _parts(folder: Path, model_id: str) -> list[Path]:
    """Files of ranks that have answered their shares, of a run that was cut too."""
    of_ranks = re.compile(rf"tmp-\d+-{re.escape(model_id)}\.jsonl")
    return sorted(path for path in folder.iterdir() if of_ranks.fullmatch(path.name)) if folder.is_dir() else []


def _read_lines(path: Path) -> list[dict]:
    """Of a .jsonl file that grows; nothing where it is not there. A last line that was cut is left out."""
    if not path.exists():
        return []
    texts = path.read_text(encoding="utf-8").split("\n")
    lines = []
    for number, text in enumerate(texts[:-1], 1):  # what follows the last line break is empty, or was cut
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise UserError(f"{path}, row {number}: is not JSON ({error}); move the file away.") from error
    return lines


def _mend(path: Path) -> None:
    """Take away the end of a last line that was cut, for others to follow."""
    if path.exists():
        whole = path.read_bytes()
        os.truncate(path, whole.rfind(b"\n") + 1)


def _append(path: Path, line: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def _write_lines(path: Path, lines: list[dict]) -> None:
    with replacing(path) as beside:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        beside.write_text(text, encoding="utf-8")

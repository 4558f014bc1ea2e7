"""A judge's verdicts on the answers to MT-Bench, saved as they come, and their scores.

    model_judgment/JUDGE_single.jsonl   question_id, model, judge, user_prompt, judgment, score, turn, tstamp

The format is that of FastChat's llm_judge. A saved verdict counts only for the exact words that it was asked about.
"""

import statistics
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from lisa_dist.eval.answers import Answers
from lisa_dist.eval.jsonl import append_line, read_saved, remove_cut_line, write_lines
from lisa_dist.eval.judge import Judge, JudgeError, parse_rating
from lisa_dist.eval.mt_bench import JudgeRequest, MTBench
from lisa_dist.text import format_columns

_Key = tuple[int, int]  # question_id and turn


def judge_answers(
    bench: MTBench, judge: Judge, answers: Answers, folder: Path, parallel: int, rating: str = "last"
) -> tuple[dict, str]:
    """A verdict on each turn of every answer; returns scores and a table of them. One process calls it.

    `rating` is which one of a judgment counts, also of a saved one.
    Raises JudgeError where the judge cannot be reached; the verdicts until then stay saved.
    """
    path = folder / f"{judge.model.replace('/', '_')}_single.jsonl"
    folder.mkdir(parents=True, exist_ok=True)
    requests = {
        (question["question_id"], turn): bench.judge_request(question, turn, answers.turns[question["question_id"]])
        for question in bench.questions
        for turn in (1, 2)
    }
    verdicts: dict[_Key, dict] = {}
    other_models = []
    for line in read_saved(path):
        key = (line["question_id"], line["turn"])
        if line["model"] != answers.model_id:
            other_models.append(line)
        elif key in requests and line["user_prompt"] == requests[key].user:
            verdicts[key] = line | {"score": parse_rating(line["judgment"], rating)}
    remove_cut_line(path)
    try:
        _ask_for_missing(judge, answers.model_id, requests, verdicts, path, parallel, rating)
    except JudgeError as error:
        raise JudgeError(
            f"{str(error).rstrip('.')}. {len(verdicts)} of {len(requests)} verdicts are saved in {path}; the same "
            "command continues from there."
        ) from error
    write_lines(path, [*other_models, *(verdicts[key] for key in requests)])
    scores = _score(bench.questions, verdicts)
    return {"judge": judge.model, "items": len(bench.questions), "scores": scores}, _format_table(scores)


def _ask_for_missing(
    judge: Judge,
    model_id: str,
    requests: dict[_Key, JudgeRequest],
    verdicts: dict[_Key, dict],
    path: Path,
    parallel: int,
    rating: str,
) -> None:
    """Ask for the verdicts that are missing, several at a time; each is appended to the file and to `verdicts`."""
    missing = [key for key in requests if key not in verdicts]
    lock, failed = threading.Lock(), threading.Event()

    def ask(key: _Key) -> None:
        if failed.is_set():
            return
        request = requests[key]
        try:
            judgment = judge.ask(request.system, request.user)
        except JudgeError:
            failed.set()
            raise
        line = {
            "question_id": key[0],
            "model": model_id,
            "judge": [judge.model, request.prompt_name],
            "user_prompt": request.user,
            "judgment": judgment,
            "score": parse_rating(judgment, rating),
            "turn": key[1],
            "tstamp": time.time(),
        }
        with lock:
            append_line(path, line)
            verdicts[key] = line
            bar.update()

    with tqdm(total=len(missing), desc="MT-Bench verdicts") as bar, ThreadPoolExecutor(parallel) as pool:
        try:
            for future in [pool.submit(ask, key) for key in missing]:
                future.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _score(questions: list[dict], verdicts: dict[_Key, dict]) -> dict[str, dict]:
    """Mean scores by category and of all questions. The standard error is that of the questions' means."""
    scores = {}
    for category in [*dict.fromkeys(question["category"] for question in questions), "all"]:
        numbers = [q["question_id"] for q in questions if category in (q["category"], "all")]
        turns = {turn: [verdicts[number, turn]["score"] for number in numbers] for turn in (1, 2)}
        question_means = [mean for pair in zip(*turns.values(), strict=True) if (mean := _mean(pair)) is not None]
        num_parsed = sum(score > 0 for score in turns[1] + turns[2])
        num_means = len(question_means)
        scores[category] = {
            "turn_1": _mean(turns[1]),
            "turn_2": _mean(turns[2]),
            "both": _mean(turns[1] + turns[2]),
            "stderr": statistics.stdev(question_means) / num_means**0.5 if num_means > 1 else None,
            "verdicts": num_parsed,
            "unparsable": 2 * len(numbers) - num_parsed,
        }
    return scores


def _format_table(scores: dict[str, dict]) -> str:
    lines = [("mt_bench", "turn 1", "turn 2", "both", "standard error", "verdicts", "unparsable")]
    for category, found in scores.items():
        values = [found[name] for name in ("turn_1", "turn_2", "both", "stderr")]
        turn_1, turn_2, both, error = ["none" if value is None else f"{value:.2f}" for value in values]
        lines.append((category, turn_1, turn_2, both, error, str(found["verdicts"]), str(found["unparsable"])))
    return format_columns(lines)


def _mean(scores: Iterable[float]) -> float | None:
    """The mean of the scores that could be parsed; None if there is none."""
    parsed = [score for score in scores if score > 0]
    return statistics.fmean(parsed) if parsed else None

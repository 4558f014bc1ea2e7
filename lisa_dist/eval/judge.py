"""A judge behind an OpenAI-compatible endpoint; its verdicts on the answers to MT-Bench, and their scores.

    model_judgment/JUDGE_single.jsonl   question_id, model, judge, user_prompt, judgment, score, turn, tstamp

The format is that of FastChat's llm_judge. A saved verdict counts only for the exact words that it was asked about.
"""

import http.client
import json
import re
import statistics
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from lisa_dist.errors import UserError
from lisa_dist.eval.answers import read_lines, write_lines
from lisa_dist.eval.mt_bench import JudgeRequest, MTBench
from lisa_dist.text import format_columns

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each further try
# As in FastChat, but for which match counts: single brackets only where there are no double ones.
_RATINGS = (re.compile(r"\[\[(\d+(?:\.\d+)?)\]\]"), re.compile(r"\[(\d+(?:\.\d+)?)\]"))
_HINTS = {
    401: "export JUDGE_API_KEY",
    403: "export JUDGE_API_KEY",
    404: "the endpoint's address ends with /v1, and --judge_model is one of GET /models there",
}
_Key = tuple[int, int]  # question_id and turn


class JudgeError(UserError):
    """The judge gives no verdict: the message names the endpoint and the reason."""


class Judge:
    """Asks for judgments, with retries where they may help; several threads may ask at a time, until one gives up."""

    def __init__(self, url: str, model: str, timeout: float, max_tokens: int, key: str | None = None):
        self.model, self._max_tokens = model, max_tokens
        self._name = f"--judge_url {url}"
        self._url, self._timeout = f"{url.rstrip('/')}/chat/completions", timeout
        if not re.match(r"https?://[^/]", url):
            raise UserError(f"{self._name}: must begin with http:// or https://, such as http://localhost:8000/v1.")
        self._headers = {"Content-Type": "application/json"}
        if key:
            self._headers["Authorization"] = f"Bearer {key}"
        # A redirect would take the key and the questions elsewhere.
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._given_up, self._failure = threading.Event(), JudgeError()

    def ask(self, system: str, user: str) -> str:
        """The judgment at temperature 0, which may be empty.

        Retries time-outs, lost connections, HTTP 429 and 5xx, and responses that are no chat completion. Raises
        JudgeError after the last try, and at once for errors that a retry cannot change; then in all threads the same.
        """
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        body = {"model": self.model, "messages": messages, "temperature": 0, "max_tokens": self._max_tokens}
        body["stream"] = False
        request = urllib.request.Request(self._url, json.dumps(body).encode(), self._headers, method="POST")
        for wait in (0.0, *WAITS):
            if self._given_up.wait(wait):
                break
            try:
                content = b""
                with self._opener.open(request, timeout=self._timeout) as response:
                    content = response.read()
                return json.loads(content)["choices"][0]["message"]["content"] or ""
            except urllib.error.HTTPError as error:
                reason = f"HTTP {error.code} {error.reason}: {error.read(300).decode(errors='replace').strip()}"
                if error.code != 429 and error.code < 500:
                    self._give_up(f"{reason}; {_HINTS.get(error.code, 'see --judge_model')}.")
                    break
            except TimeoutError:
                reason = f"timed out after {self._timeout:g} s (--judge_timeout)"
            except (OSError, http.client.HTTPException) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            except (ValueError, LookupError, TypeError):
                reason = f"the response is no chat completion: {content[:80]!r}"
        else:
            self._give_up(f"no verdict in {len(WAITS) + 1} tries ({reason})")
        raise self._failure

    def _give_up(self, reason: str) -> None:
        self._failure = JudgeError(f"{self._name}: {reason}")
        self._given_up.set()


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        return None


def parse_rating(judgment: str, which: str = "last") -> float:
    """The last rating, or the first, in [[...]] or, without one, in [...]; -1 where there is none from 1 to 10."""
    found = next((ratings for pattern in _RATINGS if (ratings := pattern.findall(judgment))), ["-1"])
    rating = float(found[0 if which == "first" else -1])
    return rating if 1 <= rating <= 10 else -1.0


def judge_answers(
    bench: MTBench,
    judge: Judge,
    model_id: str,
    answers: dict[int, list[str]],
    folder: Path,
    parallel: int,
    rating: str = "last",
) -> tuple[dict, str]:
    """A verdict on each turn of every answer of a model; returns scores and a table of them. One process calls it.

    `answers` has both turns by question_id. `rating` is which one of a judgment counts, also of a saved one.
    Raises JudgeError where the judge cannot be reached; the verdicts until then stay saved.
    """
    path = folder / f"{judge.model.replace('/', '_')}_single.jsonl"
    requests = {
        (question["question_id"], turn): bench.judge_request(question, turn, answers[question["question_id"]])
        for question in bench.questions
        for turn in (1, 2)
    }
    verdicts: dict[_Key, dict] = {}
    other_models = []
    for line in read_lines(path):
        key = (line["question_id"], line["turn"])
        if line["model"] != model_id:
            other_models.append(line)
        elif key in requests and line["user_prompt"] == requests[key].user:
            verdicts[key] = line | {"score": parse_rating(line["judgment"], rating)}

    def save() -> None:
        write_lines(path, [*other_models, *(verdicts[key] for key in requests if key in verdicts)])

    save()  # scores by another rating
    try:
        missing = {key: request for key, request in requests.items() if key not in verdicts}
        for key, judgment in _ask(judge, missing, parallel):
            verdicts[key] = {
                "question_id": key[0],
                "model": model_id,
                "judge": [judge.model, requests[key].prompt_name],
                "user_prompt": requests[key].user,
                "judgment": judgment,
                "score": parse_rating(judgment, rating),
                "turn": key[1],
                "tstamp": time.time(),
            }
            save()
    except JudgeError as error:
        raise JudgeError(
            f"{str(error).rstrip('.')}. {len(verdicts)} of {len(requests)} verdicts are saved in {path}; the same "
            "command continues from there."
        ) from error
    scores = _score(bench.questions, verdicts)
    return {"judge": judge.model, "items": len(bench.questions), "scores": scores}, _format_table(scores)


def _ask(judge: Judge, requests: dict[_Key, JudgeRequest], parallel: int) -> Iterable[tuple[_Key, str]]:
    """Judgments as they come, several asked for at a time; raises JudgeError behind those that came before it."""
    failures = []
    with ThreadPoolExecutor(parallel) as pool:
        futures = {pool.submit(judge.ask, request.system, request.user): key for key, request in requests.items()}
        try:
            for future in tqdm(as_completed(futures), total=len(futures), desc="MT-Bench verdicts"):
                try:
                    yield futures[future], future.result()
                except JudgeError as error:
                    failures.append(error)
        finally:
            pool.shutdown(cancel_futures=True)
    if failures:
        raise failures[0]


def _score(questions: list[dict], verdicts: dict[_Key, dict]) -> dict[str, dict]:
    """Mean scores by category and of all questions. The standard error is that of the questions' means."""
    scores = {}
    for category in [*dict.fromkeys(question["category"] for question in questions), "all"]:
        numbers = [q["question_id"] for q in questions if category in (q["category"], "all")]
        turns = {turn: [verdicts[number, turn]["score"] for number in numbers] for turn in (1, 2)}
        question_means = [mean for pair in zip(*turns.values(), strict=True) if (mean := _mean(pair)) is not None]
        num_parsed, num_means = sum(score > 0 for score in turns[1] + turns[2]), len(question_means)
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

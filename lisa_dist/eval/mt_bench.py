"""MT-Bench: its questions, its reference answers, and the prompts that a judge grades single answers by.

Read from the files of FastChat's llm_judge:

    question.jsonl                  question_id, category, turns
    judge_prompts.jsonl             name, system_prompt, prompt_template
    reference_answer_gpt-4.jsonl    question_id, choices

Source: Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (arXiv 2306.05685).
"""

from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from string import Formatter

from lisa_dist.errors import UserError
from lisa_dist.eval.answers import TEMPERATURES
from lisa_dist.eval.benchmark_files import one_of, read_entries, text

WITH_REFERENCE = ("math", "reasoning", "coding")  # categories that are judged against a reference answer
# Prompts of the judge, by whether there is a reference answer, and by turn.
_PROMPTS = {
    (False, 1): "single-v1",
    (True, 1): "single-math-v1",
    (False, 2): "single-v1-multi-turn",
    (True, 2): "single-math-v1-multi-turn",
}
_FIELDS = {"question", "answer", *(f"{text}_{n}" for text in ("question", "answer", "ref_answer") for n in (1, 2))}


def _number(value: object) -> str | None:
    return None if type(value) is int else "must be a number"


def _two_turns(value: object) -> str | None:
    is_pair = isinstance(value, list) and len(value) == 2 and not any(map(text, value))
    return None if is_pair else "must be two texts that are not empty"


_QUESTION = {"category": one_of(*TEMPERATURES), "question_id": _number, "turns": _two_turns}
_REFERENCE = {"question_id": _number, "choices": [{"turns": _two_turns}]}
_PROMPT = dict.fromkeys(("name", "system_prompt", "prompt_template"), text)


@dataclass(frozen=True)
class JudgeRequest:
    """What a judge is asked about one turn of an answer."""

    prompt_name: str
    system: str
    user: str


class MTBench:
    """The questions in `data_dir`/mt_bench; with `judged` also the judge's prompts and the reference answers.

    `limit` is a number of questions, or below 1 a fraction of them, taken from the categories in turn. Raises UserError
    naming the file and the line of what is missing.
    """

    def __init__(self, data_dir: str, limit: int | float | None = None, judged: bool = True):
        folder = Path(data_dir) / "mt_bench"
        questions = read_entries(folder / "question.jsonl", _QUESTION)
        if limit is not None:
            limit = max(1, int(len(questions) * limit)) if limit < 1 else int(limit)
        categories: dict[str, list[dict]] = {}
        for question in questions:
            categories.setdefault(question["category"], []).append(question)
        # The first of each category, then the second of each, and so on.
        in_turn = [one for group in zip_longest(*categories.values()) for one in group if one is not None]
        self.questions = in_turn[:limit]
        self._prompts = _read_prompts(folder / "judge_prompts.jsonl") if judged else {}
        self._references: dict[int, list[str]] = {}  # by question_id
        with_reference = [question for question in self.questions if question["category"] in WITH_REFERENCE]
        if judged and with_reference:
            path = folder / "reference_answer_gpt-4.jsonl"
            entries = [entry for entry in read_entries(path, _REFERENCE) if entry["choices"]]
            self._references = {entry["question_id"]: entry["choices"][0]["turns"] for entry in entries}
            for question in with_reference:
                number, category = question["question_id"], question["category"]
                if number not in self._references:
                    raise UserError(f"{path}: has no answer to question {number} of the category {category}.")

    def judge_request(self, question: dict, turn: int, answer: list[str]) -> JudgeRequest:
        """What a judge is asked about turn 1 or 2 of an answer, given both turns."""
        fields = {"question": question["turns"][0], "answer": answer[0]}
        texts = {"question": question["turns"], "answer": answer}
        with_reference = question["category"] in WITH_REFERENCE
        if with_reference:
            texts["ref_answer"] = self._references[question["question_id"]]
        fields |= {f"{name}_{n}": turn_text for name, turns in texts.items() for n, turn_text in enumerate(turns, 1)}
        prompt = self._prompts[_PROMPTS[with_reference, turn]]
        return JudgeRequest(prompt["name"], prompt["system_prompt"], prompt["prompt_template"].format(**fields))


def _read_prompts(path: Path) -> dict[str, dict]:
    """The judge's prompts by name."""
    prompts = {entry["name"]: entry for entry in read_entries(path, _PROMPT)}
    for name in _PROMPTS.values():
        if name not in prompts:
            raise UserError(f"{path}: has no prompt named {name}.")
        fields = {field for _, field, _, _ in Formatter().parse(prompts[name]["prompt_template"]) if field is not None}
        if fields - _FIELDS:
            raise UserError(f"{path}: {name} has the unknown field {{{min(fields - _FIELDS)}}}.")
    return prompts

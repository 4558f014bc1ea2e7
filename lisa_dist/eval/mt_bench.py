"""MT-Bench: its questions, its reference answers, and the prompts that a judge grades single answers by.

Read from the files of FastChat's llm_judge:

    question.jsonl                  question_id, category, turns
    judge_prompts.jsonl             name, system_prompt, prompt_template
    reference_answer_gpt-4.jsonl    question_id, choices

Source: Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (arXiv 2306.05685).
"""

from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from lisa_dist.errors import UserError
from lisa_dist.eval.benchmark_files import check_texts, read_entries
from lisa_dist.eval.generation import TEMPERATURES
from lisa_dist.eval.jsonl import turns_of

WITH_REFERENCE = ("math", "reasoning", "coding")  # categories that are judged against a reference answer
# Prompts of the judge, by whether there is a reference answer, and by turn.
_PROMPTS = {
    (False, 1): "single-v1",
    (True, 1): "single-math-v1",
    (False, 2): "single-v1-multi-turn",
    (True, 2): "single-math-v1-multi-turn",
}
_FIELDS = {"question", "answer", *(f"{text}_{n}" for text in ("question", "answer", "ref_answer") for n in (1, 2))}


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
        questions = read_entries(folder / "question.jsonl", _check_question)
        if limit is not None:
            limit = max(1, int(len(questions) * limit)) if limit < 1 else int(limit)
        self.questions = _alternate_categories(questions)[:limit]
        self._prompts: dict[str, dict] = {}
        self._references: dict[int, list[str]] = {}
        if judged:
            self._prompts = _read_prompts(folder / "judge_prompts.jsonl")
            with_reference = [question for question in self.questions if question["category"] in WITH_REFERENCE]
            if with_reference:
                self._references = _read_references(folder / "reference_answer_gpt-4.jsonl", with_reference)

    def judge_request(self, question: dict, turn: int, answer: list[str]) -> JudgeRequest:
        """What a judge is asked about turn 1 or 2 of an answer, given both turns."""
        with_reference = question["category"] in WITH_REFERENCE
        fields = {"question": question["turns"][0], "answer": answer[0]}
        fields |= {f"question_{n}": text for n, text in enumerate(question["turns"], 1)}
        fields |= {f"answer_{n}": text for n, text in enumerate(answer, 1)}
        if with_reference:
            fields |= {f"ref_answer_{n}": text for n, text in enumerate(self._references[question["question_id"]], 1)}
        name = _PROMPTS[with_reference, turn]
        prompt = self._prompts[name]
        return JudgeRequest(name, prompt["system_prompt"], prompt["prompt_template"].format(**fields))


def _read_prompts(path: Path) -> dict[str, dict]:
    """The judge's prompts by name."""
    prompts = {entry["name"]: entry for entry in read_entries(path, _check_prompt)}
    for name in _PROMPTS.values():
        if name not in prompts:
            raise UserError(f"{path}: has no prompt named {name}.")
        fields = {field for _, field, _, _ in Formatter().parse(prompts[name]["prompt_template"]) if field is not None}
        if fields - _FIELDS:
            raise UserError(f"{path}: {name} has the unknown field {{{min(fields - _FIELDS)}}}.")
    return prompts


def _read_references(path: Path, questions: list[dict]) -> dict[int, list[str]]:
    """The reference answers, which each of the questions must have, by question_id."""
    references = {entry["question_id"]: turns_of(entry) for entry in read_entries(path, _check_answer)}
    for question in questions:
        if question["question_id"] not in references:
            raise UserError(
                f"{path}: has no answer to question {question['question_id']} of the category {question['category']}."
            )
    return references


def _alternate_categories(questions: list[dict]) -> list[dict]:
    """The first question of each category, then the second of each, and so on."""
    seen: dict[str, int] = {}
    positions: dict[int, int] = {}
    for question in questions:
        seen[question["category"]] = positions[question["question_id"]] = seen.get(question["category"], 0) + 1
    return sorted(questions, key=lambda question: positions[question["question_id"]])


def _check_question(entry: dict) -> str | None:
    problem = check_texts(entry, "category")
    if problem is None and entry["category"] not in TEMPERATURES:
        return f"category must be one of {', '.join(TEMPERATURES)}, not {entry['category']}"
    if problem is None and type(entry.get("question_id")) is not int:
        return "question_id must be a number"
    return problem or _check_turns(entry)


def _check_answer(entry: dict) -> str | None:
    if type(entry.get("question_id")) is not int:
        return "question_id must be a number"
    choices = entry.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return "choices must be a list with an object that has turns"
    return _check_turns(choices[0])


def _check_prompt(entry: dict) -> str | None:
    return check_texts(entry, "name", "system_prompt", "prompt_template")


def _check_turns(entry: dict) -> str | None:
    turns = entry.get("turns")
    if isinstance(turns, list) and len(turns) == 2 and all(isinstance(turn, str) and turn.strip() for turn in turns):
        return None
    return "turns must be two texts that are not empty"

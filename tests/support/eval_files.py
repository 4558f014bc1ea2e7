"""Benchmark files of a few rows each, in the layout of the real ones, and an MT-Bench of two questions in each kind."""

import json
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PROMPTS = {
    "single-v1": "Rate.\n{question}\n{answer}",
    "single-math-v1": "Rate.\n{question}\n{ref_answer_1}\n{answer}",
    "single-v1-multi-turn": "{question_1}\n{answer_1}\n{question_2}\n{answer_2}",
    "single-math-v1-multi-turn": "{question_1}\n{ref_answer_1}\n{question_2}\n{ref_answer_2}\n{answer_1}\n{answer_2}",
}


def write_lines(path: Path, rows: list[dict]) -> None:
    """A .jsonl file, its folder made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def subjects() -> list[str]:
    """Of MMLU, as the shipped task files name them."""
    groups = sorted((ROOT / "lisa_dist" / "eval" / "eval_tasks").glob("mmlu_*.yaml"))
    return [task["dataset_kwargs"]["subject"] for group in groups for task in yaml.safe_load(group.read_text())["task"]]


def write_benchmarks(folder: Path, items: int = 3) -> None:
    """All that --data_dir may hold but MT-Bench."""
    sums = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(items + 9)]
    write_lines(folder / "gsm8k" / "train.jsonl", sums[items:])
    write_lines(folder / "gsm8k" / "test.jsonl", sums[:items])
    for split in ("dev", "test"):
        rows = [
            {"subject": subject, "question": f"{split} {n}?", "choices": ["a", "b", "c", "d"], "answer": n % 4}
            for subject in subjects()
            for n in range(items)
        ]
        write_lines(folder / "mmlu" / f"{split}.jsonl", rows)
    for name in ("aqua-rat", "sat-math", "logiqa-en"):
        rows = [
            {"passage": None, "question": f"{n}?", "options": ["(A)x", "(B)yy"], "label": "AB"[n % 2]}
            for n in range(items)
        ]
        write_lines(folder / "agieval" / f"{name}.jsonl", rows)
    rows = [
        {"sentence": f"{n}: the _ is here.", "option1": "cat", "option2": "dog", "answer": "12"[n % 2]}
        for n in range(items)
    ]
    write_lines(folder / "winogrande" / "dev.jsonl", rows)
    decisions = {str(n): ("yes", "no", "maybe")[n % 3] for n in range(items + 2)}
    abstracts = {
        name: {"QUESTION": f"{name}?", "CONTEXTS": ["One.", "Two."], "final_decision": decision}
        for name, decision in decisions.items()
    }
    (folder / "pubmedqa").mkdir(exist_ok=True)
    (folder / "pubmedqa" / "ori_pqal.json").write_text(json.dumps(abstracts))
    truth = {name: decisions[name] for name in [*decisions][:items]}
    (folder / "pubmedqa" / "test_ground_truth.json").write_text(json.dumps(truth))


def write_mt_bench(folder: Path, categories: tuple[str, ...] = ("writing", "math")) -> None:
    """Questions 1, 2, ... of the categories in turn, two of each; prompts of the judge; reference answers to all."""
    numbers = range(1, 2 * len(categories) + 1)
    questions = [
        {
            "question_id": number,
            "category": categories[(number - 1) // 2],
            "turns": [f"First of {number}?", f"Second of {number}?"],
        }
        for number in numbers
    ]
    write_lines(folder / "mt_bench" / "question.jsonl", questions)
    references = [
        {"question_id": number, "choices": [{"index": 0, "turns": [f"right {number}", f"right again {number}"]}]}
        for number in numbers
    ]
    write_lines(folder / "mt_bench" / "reference_answer_gpt-4.jsonl", references)
    prompts = [
        {"name": name, "system_prompt": "Judge.", "prompt_template": template} for name, template in PROMPTS.items()
    ]
    write_lines(folder / "mt_bench" / "judge_prompts.jsonl", prompts)

"""Evaluate a model on lm-evaluation-harness' tasks and on MT-Bench, on one device or several.

arguments.py         the flags
benchmark_files.py   examples of the benchmarks, from the user's files
harness.py           tasks of lm-evaluation-harness
mt_bench.py          questions, reference answers and the judge's prompts of MT-Bench
answers.py           the model's answers: made by all ranks, saved as they come
generation.py        a batch of answers
verdicts.py          the judge's verdicts on the answers, and their scores
judge.py             an OpenAI-compatible endpoint
results.py           results.json
"""

import functools
import os
from collections.abc import Sequence
from importlib.util import find_spec

from lisa_dist.errors import SharedError, UserError
from lisa_dist.eval.answers import AnswerFile, Answers
from lisa_dist.eval.arguments import MT_BENCH, EvalArguments
from lisa_dist.eval.judge import Judge
from lisa_dist.eval.model import LazyModel, describe_weights
from lisa_dist.eval.mt_bench import MTBench
from lisa_dist.eval.process_group import join_ranks, leave_ranks, on_all_ranks
from lisa_dist.eval.results import Results
from lisa_dist.eval.verdicts import judge_answers
from lisa_dist.text import format_columns


def run(arguments: EvalArguments) -> None:
    """Check the files, load the model, evaluate; rank 0 writes results.json and prints a table."""
    device, started_ranks = join_ranks()
    results = on_all_ranks(lambda: Results(arguments))
    names = [name for name in arguments.names if name != MT_BENCH]
    tasks = on_all_ranks(lambda: _load_tasks(names, arguments)) if names else {}
    bench = on_all_ranks(lambda: _MTBenchRun(arguments)) if MT_BENCH in arguments.names else None
    model, is_first = LazyModel(arguments.model, arguments.dtype, device), os.environ["RANK"] == "0"
    if tasks:
        _evaluate_tasks(arguments, model, tasks, results if is_first else None)
    answers = bench.answer(model) if bench is not None else None
    if started_ranks:
        leave_ranks()
    if bench is not None and is_first:  # a judge is slow, and one rank is enough to ask it
        assert answers is not None
        bench.judge(answers, results)


class _MTBenchRun:
    """MT-Bench as the flags ask for it; files and earlier answers are checked at once."""

    def __init__(self, arguments: EvalArguments):
        assert arguments.data_dir is not None
        self._arguments, self._folder = arguments, arguments.folder / MT_BENCH
        self._judge: Judge | None = None
        if arguments.judge_url is not None:
            assert arguments.judge_model is not None
            key = os.environ.get("JUDGE_API_KEY")
            limits = arguments.judge_timeout, arguments.judge_max_tokens
            self._judge = Judge(arguments.judge_url, arguments.judge_model, *limits, key)
        self._bench = MTBench(arguments.data_dir, arguments.limit, judged=self._judge is not None)
        made_with = {name: getattr(arguments, name) for name in ("seed", "max_new_tokens", "dtype")}
        made_with["weights"] = describe_weights(arguments.model)
        self._file = AnswerFile(self._folder / "model_answer", arguments.model_id, made_with)
        self._saved = self._file.read()

    def answer(self, model: LazyModel) -> Answers:
        """All ranks call it."""
        load = functools.partial(model.load, "--tasks mt_bench")
        answers = self._file.answer(self._bench.questions, load, self._saved, int(self._arguments.batch_size))
        if os.environ["RANK"] == "0":
            print(f"mt_bench: {answers.summary}", flush=True)
        return answers

    def judge(self, answers: Answers, results: Results) -> None:
        """One rank calls it."""
        if self._judge is None:
            print("mt_bench: for verdicts give the same command with --judge_url and --judge_model", flush=True)
            return
        folder = self._folder / "model_judgment"
        how = self._arguments.judge_parallel, self._arguments.judge_rating
        scores, table = judge_answers(self._bench, self._judge, answers, folder, *how)
        results.add(MT_BENCH, scores)
        print(f"\n{table}\n{results.summary}", flush=True)


def _load_tasks(names: Sequence[str], arguments: EvalArguments) -> dict:
    if find_spec("lm_eval") is None:
        raise UserError(f"--tasks {','.join(names)}: needs lm-eval: pip install 'lisa_dist[eval]'.")
    from lisa_dist.eval import harness  # takes seconds to import, and needs the extra

    return harness.load_tasks(names, arguments.data_dir, arguments.num_fewshot)


def _evaluate_tasks(arguments: EvalArguments, model: LazyModel, tasks: dict, results: Results | None) -> None:
    """All ranks call it, with `results` on rank 0 alone."""
    from lisa_dist.eval import harness

    loaded, tokenizer = model.load("--apply_chat_template" if arguments.apply_chat_template else None)
    batch_size = arguments.batch_size if arguments.batch_size == "auto" else int(arguments.batch_size)
    ranked = harness.RankedModel(loaded, tokenizer, batch_size)
    try:
        outcome = harness.evaluate(
            ranked,
            tasks,
            limit=arguments.limit,
            num_fewshot=arguments.num_fewshot,
            seed=arguments.seed,
            apply_chat_template=arguments.apply_chat_template,
        )
    except UserError as error:  # too few items for the ranks, which every rank finds
        raise SharedError(str(error)) from error
    if results is None:
        return
    assert outcome is not None, "rank 0 has the outcome"
    lines: list[tuple[str, ...]] = [("task", "metric", "score", "standard error", "items", "examples")]
    for name in tasks:
        scores = harness.scores(outcome, name)
        results.add(name, scores)
        lines += _format_scores(name, scores)
        for part, part_scores in scores.get("parts", {}).items():
            lines += _format_scores(f"  {part}", part_scores)
    print(f"\n{format_columns(lines)}", flush=True)
    if outcome["cut"]:
        print(f"some prompts were longer than the model's {ranked.max_length} tokens and were cut at the start")
    print(results.summary, flush=True)


def _format_scores(name: str, scores: dict) -> list[tuple[str, ...]]:
    """One line per metric."""
    shots = "various" if scores["shots"] is None else str(scores["shots"])
    lines: list[tuple[str, ...]] = []
    for metric, score in scores["scores"].items():
        error = "none" if score["stderr"] is None else f"{score['stderr']:.4f}"
        lines.append((name, metric, f"{score['value']:.4f}", error, str(scores["items"]), shots))
    return lines

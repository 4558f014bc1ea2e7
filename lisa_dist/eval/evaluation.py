"""Evaluate a model on lm-evaluation-harness' tasks and on MT-Bench, on one device or several; results.json."""

import functools
import json
import os
from collections.abc import Callable, Sequence
from datetime import datetime, timedelta
from importlib import metadata
from importlib.util import find_spec

import torch
from torch import distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lisa_dist.distributed.collectives import sharing_errors
from lisa_dist.distributed.ranks import set_rank
from lisa_dist.errors import SharedError, UserError
from lisa_dist.eval.answers import AnswerFile
from lisa_dist.eval.arguments import MT_BENCH, EvalArguments
from lisa_dist.eval.judge import Judge, judge_answers
from lisa_dist.eval.model import describe_weights, load_model
from lisa_dist.eval.mt_bench import MTBench
from lisa_dist.files import check_folder, replacing
from lisa_dist.run_folder import read_object
from lisa_dist.text import format_columns

# A rank with short items waits for the others; the launcher ends it if one of them dies.
_TIMEOUT = timedelta(days=7)
# Model and tokenizer; of a flag that needs a chat template, which is refused without one.
_Load = Callable[[str | None], tuple[PreTrainedModel, PreTrainedTokenizerBase]]


def run(arguments: EvalArguments) -> None:
    """Check the files, load the model, evaluate; rank 0 writes results.json and prints a table."""
    set_rank()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    starts_ranks = int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized()
    if starts_ranks:
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=_TIMEOUT)
    names = [name for name in arguments.names if name != MT_BENCH]
    with sharing_errors():
        results = Results(arguments)
        tasks = _load_tasks(names, arguments) if names else {}
        mt_bench = _read_mt_bench(arguments) if MT_BENCH in arguments.names else None

    @functools.cache
    def load_once() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        with sharing_errors():
            loaded = load_model(arguments.model, arguments.dtype, device)
        return loaded

    def load(template_flag: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        model, tokenizer = load_once()
        if template_flag is not None and tokenizer.chat_template is None:
            raise SharedError(f"{template_flag}: the tokenizer of {arguments.model} has no chat template.")
        return model, tokenizer

    if tasks:
        _evaluate_tasks(arguments, load, tasks, results)
    if mt_bench is not None:
        bench, file, judge = mt_bench
        load_for_chats = functools.partial(load, f"--tasks {MT_BENCH}")
        answers = file.answer(bench.questions, load_for_chats, int(arguments.batch_size))
    is_first = os.environ["RANK"] == "0"
    if starts_ranks:  # all wait for all: ranks that just exit break the others' gloo connections
        dist.barrier()
        dist.destroy_process_group()
    if mt_bench is None or not is_first:  # a judge is slow, and one rank is enough to ask it
        return
    if judge is None:
        print("mt_bench: for verdicts give the same command with --judge_url and --judge_model", flush=True)
        return
    folder, how = arguments.folder / MT_BENCH / "model_judgment", (arguments.judge_parallel, arguments.judge_rating)
    scores, table = judge_answers(bench, judge, file.model_id, answers, folder, *how)
    results.add(MT_BENCH, scores)
    print(f"\n{table}\nwrote {results.path}", flush=True)


class Results:
    """results.json in `--output_dir`: scores, settings and versions of each task, added one by one, of one model."""

    def __init__(self, arguments: EvalArguments):
        self._arguments, self.path = arguments, arguments.folder / "results.json"
        check_folder("--output_dir", arguments.folder)
        content = read_object(self.path) if self.path.exists() else {}
        if content.get("model", arguments.model) != arguments.model:
            raise UserError(
                f"--output_dir {arguments.folder}: has results of {content['model']}; give another folder for those of "
                f"{arguments.model}."
            )
        self._tasks = content.get("tasks", {})

    def add(self, name: str, scores: dict) -> None:
        """Write the scores of a task, in place of those that were there of it."""
        names = ["data_dir", "limit", "batch_size", "dtype", "seed"]
        names += ["max_new_tokens"] if name == MT_BENCH else ["num_fewshot", "apply_chat_template"]
        settings = {key: getattr(self._arguments, key) for key in names}
        settings |= {"weights": describe_weights(self._arguments.model), "ranks": int(os.environ["WORLD_SIZE"])}
        packages = ["lisa_dist", "torch", "transformers", *([] if name == MT_BENCH else ["lm_eval"])]
        versions = {package: metadata.version(package) for package in packages}
        when = datetime.now().astimezone().isoformat(timespec="seconds")
        self._tasks[name] = scores | {"settings": settings, "versions": versions, "when": when}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.path) as path:
            path.write_text(json.dumps({"model": self._arguments.model, "tasks": self._tasks}, indent=1) + "\n")


def _load_tasks(names: Sequence[str], arguments: EvalArguments) -> dict:
    if find_spec("lm_eval") is None:
        raise UserError(f"--tasks {','.join(names)}: needs lm-eval: pip install 'lisa_dist[eval]'.")
    from lisa_dist.eval import harness  # takes seconds to import, and needs the extra

    return harness.load_tasks(names, arguments.data_dir, arguments.num_fewshot)


def _evaluate_tasks(arguments: EvalArguments, load: _Load, tasks: dict, results: Results) -> None:
    """All ranks call it; rank 0 has the outcome."""
    from lisa_dist.eval import harness

    batch_size = arguments.batch_size if arguments.batch_size == "auto" else int(arguments.batch_size)
    loaded = load("--apply_chat_template" if arguments.apply_chat_template else None)
    model = harness.RankedModel(*loaded, batch_size)
    how = {name: getattr(arguments, name) for name in ("limit", "num_fewshot", "seed", "apply_chat_template")}
    outcome = harness.evaluate(model, tasks, **how)
    if outcome is None:
        return
    lines: list[tuple[str, ...]] = [("task", "metric", "score", "standard error", "items", "examples")]
    for name in tasks:
        scores = harness.scores(outcome, name)
        results.add(name, scores)
        lines += _format_scores(name, scores)
        for part, part_scores in scores.get("parts", {}).items():
            lines += _format_scores(f"  {part}", part_scores)
    print(f"\n{format_columns(lines)}", flush=True)
    if outcome["cut"]:
        print(f"some prompts were longer than the model's {model.max_length} tokens and were cut at the start")
    print(f"wrote {results.path}", flush=True)


def _format_scores(name: str, scores: dict) -> list[tuple[str, ...]]:
    """One line per metric."""
    shots = "various" if scores["shots"] is None else str(scores["shots"])
    lines: list[tuple[str, ...]] = []
    for metric, score in scores["scores"].items():
        error = "none" if score["stderr"] is None else f"{score['stderr']:.4f}"
        lines.append((name, metric, f"{score['value']:.4f}", error, str(scores["items"]), shots))
    return lines


def _read_mt_bench(arguments: EvalArguments) -> tuple[MTBench, AnswerFile, Judge | None]:
    """Files, earlier answers and the judge, checked at once."""
    assert arguments.data_dir is not None
    judge = None
    if arguments.judge_url is not None and arguments.judge_model is not None:
        limits = arguments.judge_timeout, arguments.judge_max_tokens
        judge = Judge(arguments.judge_url, arguments.judge_model, *limits, os.environ.get("JUDGE_API_KEY"))
    bench = MTBench(arguments.data_dir, arguments.limit, judged=judge is not None)
    made_with = {name: getattr(arguments, name) for name in ("seed", "max_new_tokens", "dtype")}
    made_with["weights"] = describe_weights(arguments.model)
    return bench, AnswerFile(arguments.folder / MT_BENCH / "model_answer", arguments.model_id, made_with), judge

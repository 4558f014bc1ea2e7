"""Tasks of lm-evaluation-harness, from the hub or from files, on this rank's items. No other module imports it.

The harness deals items out to ranks and gathers what each found; three things are added. A loaded model may be one rank
of any process group, on CPUs too, where the harness's own would have every rank evaluate everything. Examples are drawn
as one rank draws them: the harness draws on each rank anew, so that the prompts of an item, and with them scores, would
change with the number of ranks. And progress is shown by rank 0 alone.
"""

import contextlib
import difflib
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from lm_eval import evaluator
from lm_eval.api import task as task_module
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lisa_dist.config import UserError
from lisa_dist.distributed.collectives import gather

TASK_FILES = Path(__file__).with_name("eval_tasks")
# What the harness warns of and what is meant here: a model that is loaded, and tasks that read `--data_dir`.
_EXPECTED = ("Passed an already-initialized model", "`pretrained` model kwarg is not of type", "Custom kwargs can be")
_EXPECTED += ("Overwriting default num_fewshot",)
_CUT = ("exceeds model's maximum length", "Left truncation applied")  # of a prompt that is longer than the model takes


class RankedModel(HFLM):
    """A loaded model as the harness takes one, on one rank of a process group where there is one."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | str):
        with _warnings():
            super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        if dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, flat, one after another; each of one shape."""
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor)
        return torch.cat([part.reshape(-1) for part in parts])

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world_size > 1:
            dist.barrier()


def load_tasks(names: Sequence[str], data_dir: str | None, num_fewshot: int | None) -> dict[str, list[Task | Group]]:
    """Tasks and groups by the names that were asked for, their data read.

    Of `lisa_dist/eval/eval_tasks` with `data_dir`, else the harness's own, from the hub. Raises UserError for a name
    that is not known, a file that is missing or lacks an answer, and a hub that cannot be reached.
    """
    with _warnings():
        if data_dir is None:
            manager = TaskManager()
        else:
            manager = TaskManager(include_path=TASK_FILES, include_defaults=False, metadata={"data_dir": data_dir})
        for name in names:
            if name not in manager.all_tasks:
                near = difflib.get_close_matches(name, manager.all_tasks, n=1)
                hint = f"did you mean {near[0]}?" if near else "docs/evaluation.md lists them."
                also = "" if data_dir is None else f"; with --data_dir there are {', '.join(shipped_tasks())}"
                raise UserError(f"--tasks {name}: no such task{also}; {hint}")
        loaded = {}
        for name in names:
            try:
                found = manager.load(name)
            except OSError as error:
                raise UserError(
                    f"--tasks {name}: its rows cannot be had from the hub ({error}); give --data_dir with files of "
                    "them, as docs/evaluation.md says, or set HF_HUB_OFFLINE=1 where they are cached."
                ) from error
            loaded[name] = [found["groups"][name]] if name in found["groups"] else [*found["tasks"].values()]
    for task in _leaves(loaded) if num_fewshot else ():
        said = f"--num_fewshot {num_fewshot} for {task.task_name}"
        if isinstance(task.doc_to_target(task.eval_docs[0]), list):  # which the harness has no words for in an example
            raise UserError(f"{said}: its items have lists of answers, and it takes no examples; leave it out.")
        if task.config.num_fewshot != 0 and len(task.sampler.df) < num_fewshot:
            raise UserError(
                f"{said}: there are {len(task.sampler.df)} rows to take examples from; give fewer, or the file of them "
                "that docs/evaluation.md names."
            )
    return loaded


def shipped_tasks() -> list[str]:
    """Names of tasks and groups that read `--data_dir`."""
    return sorted(path.stem for path in TASK_FILES.glob("*.yaml"))


def evaluate(
    model: RankedModel,
    tasks: dict[str, list[Task | Group]],
    *,
    limit: int | float | None = None,
    num_fewshot: int | None = None,
    seed: int = 1234,
    apply_chat_template: bool = False,
) -> dict | None:
    """What the harness returns, with `samples`, and whether prompts were `cut`, on rank 0; None on the others.

    All ranks call it. `limit` is items of each task, or below 1 a part of them; `num_fewshot` None leaves each task its
    own. Raises UserError where a task has fewer items than there are ranks.
    """
    for task in _leaves(tasks):
        items = len(task.eval_docs)
        if limit is not None:
            items = min(items, math.ceil(items * limit) if limit < 1 else int(limit))
        if items < model.world_size:
            raise UserError(
                f"{task.task_name}: {items} items for {model.world_size} ranks; each rank needs one: raise --limit, or "
                "give fewer --gpus."
            )
        if model.world_size > 1:
            _draw_as_one_rank(task)
    with _warnings() as warnings, _unasked():
        results = evaluator.simple_evaluate(
            model=model,
            tasks=[one for found in tasks.values() for one in found],
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            num_fewshot=num_fewshot,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            apply_chat_template=apply_chat_template,
        )
    cut = any(gather(warnings.cut))
    return None if results is None else results | {"cut": cut}


def scores(results: dict, name: str) -> dict:
    """Of a task or group: its scores by metric, each a value with its standard error, items, shots, and its parts.

    A standard error is None where the harness has none, as of one item; shots are None where parts differ. Names are
    the stock tasks'.
    """
    found, by_metric = results["results"][name], {}
    for key, value in found.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr"):
            continue
        error = found.get(f"{metric}_stderr,{kind}")
        label = metric if kind == "none" else f"{metric}, {kind}"
        by_metric[label] = {"value": float(value), "stderr": float(error) if isinstance(error, int | float) else None}
    parts = {_stock_name(part): scores(results, part) for part in results["group_subtasks"].get(name, [])}
    if not parts:
        return {"scores": by_metric, "items": results["n-samples"][name]["effective"], "shots": results["n-shot"][name]}
    items, shots = sum(part["items"] for part in parts.values()), {part["shots"] for part in parts.values()}
    return {"scores": by_metric, "items": items, "shots": shots.pop() if len(shots) == 1 else None, "parts": parts}


def _stock_name(name: str) -> str:
    """Without the name of the group that defines it, which the harness puts before."""
    return name.rpartition("::")[2]


def _leaves(tasks: dict[str, list[Task | Group]]) -> Iterator[Task]:
    for found in tasks.values():
        for one in found:
            yield from one.get_all_tasks() if isinstance(one, Group) else [one]


def _draw_as_one_rank(task: Task) -> None:
    """Have a task build the requests of all items, so that each has the examples that it has on one rank; keep a share.

    Items go round the ranks as the harness deals them out.
    """
    build = task.build_all_requests

    def build_share(*, rank: int, world_size: int, **settings) -> None:
        build(rank=0, world_size=1, **settings)
        task._instances = [one for one in task._instances if one.doc_id % world_size == rank]

    task.build_all_requests = build_share


class _Warnings(logging.Filter):
    """The harness warns of all but what is meant here; that prompts were cut is noted once, not for each."""

    def __init__(self):
        super().__init__()
        self.cut = False

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()
        self.cut |= any(words in said for words in _CUT)
        return not any(words in said for words in (*_EXPECTED, *_CUT))


@contextlib.contextmanager
def _warnings() -> Iterator[_Warnings]:
    names = ("models.huggingface", "models.utils", "models.utils_hf", "api.task", "evaluator")
    loggers = [logging.getLogger(f"lm_eval.{name}") for name in names]
    warnings = _Warnings()
    for logger in loggers:
        logger.addFilter(warnings)
    try:
        yield warnings
    finally:
        for logger in loggers:
            logger.removeFilter(warnings)


@contextlib.contextmanager
def _unasked() -> Iterator[None]:
    """No bar for the prompts of each task, of which MMLU has 57 and every rank its own; no call of git either."""
    bar, commit = task_module.tqdm, evaluator.get_git_commit_hash
    task_module.tqdm, evaluator.get_git_commit_hash = functools.partial(bar, disable=True), lambda: None
    try:
        yield
    finally:
        task_module.tqdm, evaluator.get_git_commit_hash = bar, commit

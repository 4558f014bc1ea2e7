"""Tasks of lm-evaluation-harness, from the hub or from files, on this rank's share of the items.

Only this module imports lm-eval. The harness divides items among ranks and gathers their results. Three things are
added:

- A loaded model may be a rank of any process group, also on CPUs. The harness itself would evaluate everything on every
  rank.
- Few-shot examples are sampled as on one rank. The harness samples them on each rank separately, so prompts, and with
  them scores, would change with the number of ranks.
- Rank 0 alone shows progress.
"""

import contextlib
import difflib
import functools
import logging
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from lm_eval import evaluator
from lm_eval.api import task as task_module
from lm_eval.api.group import Group
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from torch import distributed as dist
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lisa_dist.distributed.collectives import gather
from lisa_dist.errors import SharedError, UserError
from lisa_dist.patches import patch, patched

TASK_FILES = Path(__file__).with_name("eval_tasks")
# Warnings of the harness about what is intended here: a loaded model, and tasks that read `--data_dir`.
_EXPECTED = (
    "Passed an already-initialized model",
    "`pretrained` model kwarg is not of type",
    "Custom kwargs can be",
    "Overwriting default num_fewshot",
)
_CUT = ("exceeds model's maximum length", "Left truncation applied")  # a prompt longer than the model's context


class RankedModel(HFLM):
    """A loaded model for the harness, as one rank of the process group, if there is one."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, batch_size: int | str):
        with _warnings():
            super().__init__(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch_size)
        if dist.is_initialized():
            self._rank, self._world_size = dist.get_rank(), dist.get_world_size()

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensors of all ranks, which have one shape, flattened and concatenated."""
        return torch.tensor(gather(tensor.tolist())).flatten()

    def barrier(self) -> None:
        """Wait for all ranks."""
        gather(None)


def load_tasks(names: Sequence[str], data_dir: str | None, num_fewshot: int | None) -> dict[str, list[Task | Group]]:
    """Tasks and groups by the requested names, with their data read.

    With `data_dir` those of `lisa_dist/eval/eval_tasks`, else the harness' own, from the hub. Raises UserError for an
    unknown name, a file that is missing or lacks an answer, and a hub that cannot be reached.
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
                shipped = ", ".join(sorted(path.stem for path in TASK_FILES.glob("*.yaml")))
                also = "" if data_dir is None else f"; with --data_dir there are {shipped}"
                raise UserError(f"--tasks {name}: no such task{also}; {hint}")
        loaded = {}
        for name in names:
            try:
                content = manager.load(name)
            except OSError as error:
                way_out = (
                    "unset HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else "set HF_HUB_OFFLINE=1 where they are cached"
                )
                raise UserError(
                    f"--tasks {name}: its data cannot be loaded from the hub ({error}); give --data_dir with its "
                    f"files, as docs/evaluation.md says, or {way_out}."
                ) from error
            loaded[name] = [content["groups"][name]] if name in content["groups"] else [*content["tasks"].values()]
    if not num_fewshot:
        return loaded
    for task in _leaves(loaded):
        flag = f"--num_fewshot {num_fewshot} for {task.task_name}"
        if isinstance(task.doc_to_target(task.eval_docs[0]), list):  # which the harness cannot write in a prompt
            raise UserError(f"{flag}: its items have lists of answers, so it takes no examples; leave the flag out.")
        if task.config.num_fewshot != 0 and len(task.sampler.df) < num_fewshot:
            raise UserError(
                f"{flag}: there are only {len(task.sampler.df)} examples; give a smaller number, or the file of "
                "examples that docs/evaluation.md names."
            )
    return loaded


def evaluate(
    model: RankedModel,
    tasks: dict[str, list[Task | Group]],
    limit: int | float | None = None,
    seed: int = 1234,
    **settings: Any,
) -> dict | None:
    """On rank 0 the harness' results, with `samples`, and `cut`: whether prompts were cut; None on other ranks.

    All ranks call it. `limit` is a number of items per task, or below 1 a fraction of them; `settings` are those of
    `simple_evaluate`. Raises SharedError, on every rank, for a task with fewer items than ranks.
    """
    for task in _leaves(tasks):
        items = len(task.eval_docs)
        if limit is not None:
            items = min(items, math.ceil(items * limit) if limit < 1 else int(limit))
        if items < model.world_size:
            raise SharedError(
                f"{task.task_name}: {items} items for {model.world_size} ranks; each rank needs one: raise --limit, or "
                "give fewer --gpus."
            )
        if model.world_size > 1:
            _sample_as_one_rank(task)
    with (
        _warnings() as heard,
        # A bar for each task and rank, of which MMLU would have 57 on each; and a call of git.
        patched(task_module, "tqdm", functools.partial(task_module.tqdm, disable=True), of="eval_extras"),
        patched(evaluator, "get_git_commit_hash", lambda: None, of="eval_extras"),
    ):
        results = evaluator.simple_evaluate(
            model=model,
            tasks=[part for parts in tasks.values() for part in parts],
            task_manager=TaskManager(include_defaults=False),
            limit=limit,
            **dict.fromkeys(("numpy_random_seed", "torch_random_seed", "fewshot_random_seed"), seed),
            **settings,
        )
    cut = any(gather(heard.cut))
    return None if results is None else results | {"cut": cut}


def scores(results: dict, name: str) -> dict:
    """Scores of a task or group by metric, each a value and a standard error; its items, shots and parts.

    A standard error is None where the harness has none, as for one item. Shots are None where parts differ. Names are
    those of the harness' own tasks: a group that defines a task has put its own before it.
    """
    values, by_metric = results["results"][name], {}
    for key, value in values.items():
        metric, _, kind = key.partition(",")
        if not kind or metric.endswith("_stderr"):
            continue
        error = values.get(f"{metric}_stderr,{kind}")
        label = metric if kind == "none" else f"{metric}, {kind}"
        by_metric[label] = {"value": float(value), "stderr": float(error) if isinstance(error, int | float) else None}
    parts = {part.rpartition("::")[2]: scores(results, part) for part in results["group_subtasks"].get(name, [])}
    if not parts:
        return {"scores": by_metric, "items": results["n-samples"][name]["effective"], "shots": results["n-shot"][name]}
    items, shots = sum(part["items"] for part in parts.values()), {part["shots"] for part in parts.values()}
    return {"scores": by_metric, "items": items, "shots": shots.pop() if len(shots) == 1 else None, "parts": parts}


def _leaves(tasks: dict[str, list[Task | Group]]) -> Iterator[Task]:
    for parts in tasks.values():
        for part in parts:
            yield from part.get_all_tasks() if isinstance(part, Group) else [part]


def _sample_as_one_rank(task: Task) -> None:
    """Make a task build the requests of all items, with the few-shot examples of one rank, and keep this rank's share.

    Items go to the ranks in turn, as the harness divides them.
    """
    build = task.build_all_requests

    def build_share(*, rank: int, world_size: int, **settings: Any) -> None:
        build(rank=0, world_size=1, **settings)
        share = [request for request in task._instances if request.doc_id % world_size == rank]
        patch(task, "_instances", share, of="few_shots")

    patch(task, "build_all_requests", build_share, of="few_shots")


class _Warnings(logging.Handler):
    """Prints warnings but the expected ones, and notes once, in place of once per prompt, that prompts were cut."""

    cut = False

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        self.cut |= any(words in message for words in _CUT)
        if not any(words in message for words in (*_EXPECTED, *_CUT)):
            print(message, flush=True)


@contextlib.contextmanager
def _warnings() -> Iterator[_Warnings]:
    """What the harness warns of in the body."""
    logger, warnings = logging.getLogger("lm_eval"), _Warnings(logging.WARNING)
    logger.addHandler(warnings)
    logger.propagate = False
    try:
        yield warnings
    finally:
        logger.removeHandler(warnings)
        logger.propagate = True

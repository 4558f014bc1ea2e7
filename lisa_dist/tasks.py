"""What `--task` may be: what each task trains on, by the columns of its rows, which are those of TRL's formats."""

import ast
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lisa_dist.errors import UserError

SFT, GRPO, REWARD, KTO = "sft", "grpo", "reward", "kto"
_PAIRS = ("chosen", "rejected")


@dataclass(frozen=True)
class Task:
    """One task: what it is, and the columns of which its rows have all of one set; `prompt` may stand beside any."""

    what: str
    columns: tuple[tuple[str, ...], ...] = ()  # of sft those of data/formats.py


TASKS = {
    SFT: Task("supervised fine-tuning"),
    "dpo": Task("direct preference optimization, against the model as it was", (_PAIRS,)),
    KTO: Task(
        "Kahneman-Tversky optimization, against the model as it was", (("prompt", "completion", "label"), _PAIRS)
    ),
    "orpo": Task("odds-ratio preference optimization, without a reference model", (_PAIRS,)),
    REWARD: Task("a reward model, with a score in the place of the head", (_PAIRS,)),
    GRPO: Task("group relative policy optimization, by reward functions", (("prompt",),)),
}
PAIRED = ("dpo", "orpo", REWARD)  # whose steps run both answers of a pair
WITH_REFERENCE = ("dpo", KTO)
# Flags, with what stands for none, of examples that are tokenized here; those of the other tasks TRL tokenizes.
OF_SFT: dict[str, Any] = {"loss": "auto", "dataset_format": None, "long_examples": "auto"}
OF_SFT |= {"train_on_inputs": False, "streaming": False}


def check_task(task: str) -> str:
    """The same task. Raises UserError for one that there is not."""
    if task not in TASKS:
        raise UserError(f"--task {task}: unknown; choose one of {', '.join(TASKS)}.")
    return task


def tasks_for(columns: Iterable[str]) -> list[str]:
    """The tasks, of those whose rows TRL tokenizes, that rows with these columns serve."""
    there = set(columns)
    return [name for name, task in TASKS.items() if any(there.issuperset(needed) for needed in task.columns)]


def describe_columns_of(task: str) -> str:
    """The columns that a task's rows have."""
    return ", or ".join(", ".join(needed) for needed in TASKS[task].columns)


def check_rewards_given(task: str, rewards: Sequence[str] | None) -> None:
    """Raise UserError for rewards that grpo lacks, another task has, or no file or function is; nothing is run."""
    if task != GRPO and rewards:
        raise UserError(
            f"--reward_funcs {' '.join(rewards)} with --task {task}: it is for --task {GRPO}; leave it out."
        )
    if task == GRPO and not rewards:
        raise UserError("--reward_funcs is missing: give a file with a function of completions, such as rewards.py.")
    for given in rewards or ():
        path, name = split_reward(given)
        if path is not None:
            _check_function(given, path, name)


def has_reference(task: str, method: str, beta: float | None, is_precomputed: bool) -> bool:
    """Whether the model as it was stands beside the one that trains; with adapters it is the one without them."""
    has_it = task in WITH_REFERENCE or (task == GRPO and bool(beta))
    return has_it and method != "lora" and not is_precomputed


def split_reward(given: str) -> tuple[Path | None, str]:
    """The file and the function of `rewards.py:name`; None and the word itself where it names no file."""
    file, mark, name = given.rpartition(":")
    if not mark:
        file, name = given, "reward"
    return (Path(file), name) if file.endswith(".py") else (None, given)


def _check_function(given: str, path: Path, name: str) -> None:
    flag = f"--reward_funcs {given}"
    if not path.is_file():
        raise UserError(f"{flag}: no such file.")
    try:
        tree = ast.parse(path.read_bytes(), str(path))
    except (SyntaxError, ValueError) as error:
        raise UserError(f"{flag}: is not Python ({error}).") from error
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}
    # What else may bind a name there: classes, imports, assignments. Where none does once it is run, that is told then.
    others = [node for one in tree.body if not isinstance(one, ast.FunctionDef) for node in ast.walk(one)]
    bound = {getattr(node, part, None) for node in others for part in ("name", "asname", "id")}
    if name not in functions and bound.isdisjoint((name, "*")):
        first = next(iter(functions), "")
        there = f"it has {', '.join(functions)}; name one as {path}:{first}" if functions else "it has none"
        raise UserError(f"{flag}: has no function {name}; {there}.")
    if name in functions and functions[name].args.kwarg is None:
        raise UserError(f"{flag}: {name} must take all columns of the rows: def {name}(completions, **columns).")


def refuse_flags_of_sft(task: str, given: Mapping[str, Any]) -> None:
    """Raise UserError for a flag that has no effect on a task whose rows TRL tokenizes."""
    for name, default in OF_SFT.items():
        if given.get(name, default) != default:
            raise UserError(f"--{name} {given[name]} with --task {task}: it is for --task {SFT}; leave it out.")

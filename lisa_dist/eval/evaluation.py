"""A model's scores on lm-evaluation-harness' tasks and on MT-Bench, on one device or several."""

import functools
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import distributed as dist
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from lisa_dist.distributed.collectives import gather
from lisa_dist.distributed.ranks import set_rank
from lisa_dist.errors import SharedError, UserError
from lisa_dist.eval.judge import Judge
from lisa_dist.eval.mt_bench import Answers, MTBench
from lisa_dist.files import replacing
from lisa_dist.text import format_columns

MT_BENCH = "mt_bench"
_DTYPES = ("auto", "float32", "bfloat16", "float16")
_PATIENCE = timedelta(days=7)  # a rank whose items are short waits for the others; the launcher ends it if one dies


@dataclass
class EvalArguments:
    """What is asked of `lisa-dist eval`."""

    model: str = field(metadata={"help": "Folder of a model, of a checkpoint or of an adapter, or a model of the hub."})
    tasks: str = field(metadata={"help": "Names with commas between: mmlu, agieval, winogrande, gsm8k, ..., mt_bench."})
    data_dir: str | None = field(
        default=None, metadata={"help": "Folder with the tasks' files; left out, the rows come from the hub."}
    )
    limit: float | None = field(
        default=None, metadata={"help": "Items of each task, or below 1 a part of them; questions of mt_bench."}
    )
    num_fewshot: int | None = field(
        default=None, metadata={"help": "Examples before each item; left out, as many as the task has of its own."}
    )
    apply_chat_template: bool = field(
        default=False, metadata={"help": "Put prompts into the tokenizer's chat template; mt_bench always does."}
    )
    batch_size: str = field(default="8", metadata={"help": "Prompts at a time on each rank, or auto for what fits."})
    dtype: str = field(default="auto", metadata={"help": f"Of the weights: {', '.join(_DTYPES)}; auto: as saved."})
    seed: int = field(default=1234, metadata={"help": "Of the examples that are drawn, and of sampled answers."})
    gpus: int | None = field(default=None, metadata={"help": "Ranks to start on this host, each with a share."})
    output: str | None = field(default=None, metadata={"help": "Folder of the results; by default under eval/."})
    max_new_tokens: int = field(default=1024, metadata={"help": "Tokens of an answer of mt_bench."})
    judge_url: str | None = field(
        default=None, metadata={"help": "OpenAI-compatible endpoint, such as http://localhost:8000/v1."}
    )
    judge_model: str | None = field(default=None, metadata={"help": "The judge's name at that endpoint."})
    judge_parallel: int = field(default=4, metadata={"help": "Questions to the judge at a time."})
    judge_timeout: float = field(default=120.0, metadata={"help": "Seconds for a verdict."})
    judge_max_tokens: int = field(
        default=2048, metadata={"help": "Tokens of a verdict; a judge that thinks needs more."}
    )

    def __post_init__(self):
        self.names = [name.strip() for name in self.tasks.split(",") if name.strip()]
        if not self.names or len(set(self.names)) < len(self.names):
            raise UserError(f"--tasks {self.tasks}: give names with commas between, each once, such as mmlu,gsm8k.")
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise UserError(f"--data_dir {self.data_dir}: no such folder.")
        if self.limit is not None and (self.limit <= 0 or (self.limit > 1 and self.limit != int(self.limit))):
            raise UserError(f"--limit {self.limit}: a number of items, or a part of them below 1, such as 0.1.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(f"--num_fewshot {self.num_fewshot}: 0 or more.")
        if self.batch_size != "auto" and not re.fullmatch(r"[1-9]\d*", self.batch_size):
            raise UserError(f"--batch_size {self.batch_size}: a number of prompts, or auto.")
        if self.dtype not in _DTYPES:
            raise UserError(f"--dtype {self.dtype}: unknown; choose one of {', '.join(_DTYPES)}.")
        for name in ("max_new_tokens", "judge_parallel", "judge_timeout", "judge_max_tokens"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be more than 0.")
        if (self.judge_url is None) != (self.judge_model is None):
            raise UserError("--judge_url and --judge_model: give both, or neither to write the answers alone.")
        if self.judge_url is not None and MT_BENCH not in self.names:
            raise UserError(f"--judge_url {self.judge_url}: it is for --tasks mt_bench.")
        if MT_BENCH in self.names and self.data_dir is None:
            raise UserError("--tasks mt_bench: needs --data_dir, with mt_bench/question.jsonl: docs/evaluation.md.")
        if MT_BENCH in self.names and self.batch_size == "auto":
            raise UserError("--batch_size auto with --tasks mt_bench: give a number.")

    @property
    def model_id(self) -> str:
        """The model's name without its folders or owner; a checkpoint's with that of its run."""
        path = Path(self.model).resolve() if Path(self.model).is_dir() else Path(self.model)
        return f"{path.parent.name}-{path.name}" if re.fullmatch(r"checkpoint-\d+", path.name) else path.name

    @property
    def folder(self) -> Path:
        """Where results go."""
        return Path("eval", self.model_id) if self.output is None else Path(self.output)


def run(arguments: EvalArguments) -> None:
    """Check the files, load the model, evaluate; rank 0 writes results.json and prints a table."""
    device, joined = _join_ranks()
    results = _on_all_ranks(lambda: Results(arguments))
    asked = [name for name in arguments.names if name != MT_BENCH]
    tasks = _on_all_ranks(lambda: _load_tasks(asked, arguments)) if asked else {}
    bench = _on_all_ranks(lambda: _Bench(arguments)) if MT_BENCH in arguments.names else None
    model, first = _Model(arguments, device), os.environ["RANK"] == "0"
    if tasks:
        _evaluate_tasks(arguments, model, tasks, results if first else None)
    answers = bench.answer(model) if bench is not None else None
    if joined:  # ranks that simply exit tear down gloo under each other's feet
        dist.barrier()
        dist.destroy_process_group()
    if bench is not None and first:  # a judge takes its time, and needs one rank
        bench.judge(answers, results)


class Results:
    """results.json: what has been found of one model, a task's with all that it was found by; tasks come one by one."""

    def __init__(self, arguments: EvalArguments):
        self._arguments = arguments
        self._path = arguments.folder / "results.json"
        try:
            arguments.folder.mkdir(parents=True, exist_ok=True)
            if not os.access(arguments.folder, os.W_OK):
                raise PermissionError(13, "no permission to write")
            content = json.loads(self._path.read_text(encoding="utf-8")) if self._path.exists() else {}
        except OSError as error:
            raise UserError(f"--output {arguments.folder}: {error.strerror}; give another folder.") from error
        except ValueError as error:
            raise UserError(f"{self._path}: is not JSON ({error}); move it away.") from error
        if content.get("model", arguments.model) != arguments.model:
            raise UserError(
                f"--output {arguments.folder}: has results of {content['model']}; give another folder for those of "
                f"{arguments.model}."
            )
        self._tasks = content.get("tasks", {})

    def add(self, name: str, found: dict) -> None:
        """Write what was found of a task, in the place of what was there of it."""
        names = ["data_dir", "limit", "batch_size", "dtype", "seed"]
        names += ["max_new_tokens"] if name == MT_BENCH else ["num_fewshot", "apply_chat_template"]
        settings = {key: getattr(self._arguments, key) for key in names}
        settings["weights"] = describe_weights(self._arguments.model)
        packages = ["lisa_dist", "torch", "transformers", *([] if name == MT_BENCH else ["lm_eval"])]
        versions = {package: metadata.version(package) for package in packages}
        ranks = int(os.environ.get("WORLD_SIZE", "1"))
        when = datetime.now().astimezone().isoformat(timespec="seconds")
        self._tasks[name] = found | {"settings": settings | {"ranks": ranks}, "versions": versions, "when": when}
        with replacing(self._path) as path:
            path.write_text(json.dumps({"model": self._arguments.model, "tasks": self._tasks}, indent=1) + "\n")

    @property
    def said(self) -> str:
        """Where it is."""
        return f"wrote {self._path}"


class _Model:
    """The model and its tokenizer, loaded when they are first needed."""

    def __init__(self, arguments: EvalArguments, device: torch.device):
        self._arguments, self._device, self._loaded = arguments, device, None

    def load(self, needs_template: str | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """All ranks call it. Raises UserError where what `needs_template` finds none."""
        if self._loaded is None:
            self._loaded = _on_all_ranks(lambda: load_model(self._arguments.model, self._arguments.dtype, self._device))
        if needs_template is not None and self._loaded[1].chat_template is None:
            raise SharedError(f"{needs_template}: the tokenizer of {self._arguments.model} has no chat template.")
        return self._loaded


class _Bench:
    """MT-Bench as the flags want it: its files checked, and those of a run before."""

    def __init__(self, arguments: EvalArguments):
        self._arguments, self._folder, self._judge = arguments, arguments.folder / MT_BENCH, None
        if arguments.judge_url is not None:
            key = os.environ.get("JUDGE_API_KEY")
            limits = arguments.judge_timeout, arguments.judge_max_tokens
            self._judge = Judge(arguments.judge_url, arguments.judge_model, *limits, key)
        self._bench = MTBench(arguments.data_dir, arguments.limit, judged=self._judge is not None)
        self._made_with = {name: getattr(arguments, name) for name in ("seed", "max_new_tokens", "dtype")}
        self._made_with["weights"] = describe_weights(arguments.model)
        self._about = self._folder / "model_answer", arguments.model_id, self._made_with
        self._there = self._bench.answers_there(*self._about)

    def answer(self, model: _Model) -> Answers:
        """All ranks call it."""
        batch_size = int(self._arguments.batch_size)
        load = functools.partial(model.load, "--tasks mt_bench")
        answers = self._bench.answer(load, self._there, *self._about, batch_size)
        if os.environ["RANK"] == "0":
            print(f"mt_bench: {answers.said}", flush=True)
        return answers

    def judge(self, answers: Answers, results: Results) -> None:
        """One rank calls it."""
        if self._judge is None:
            print("mt_bench: for verdicts give the same command with --judge_url and --judge_model", flush=True)
            return
        folder = self._folder / "model_judgment"
        content, table = self._bench.judge(self._judge, answers, folder, self._arguments.judge_parallel)
        results.add(MT_BENCH, content)
        print(f"\n{table}\n{results.said}", flush=True)


def load_model(
    name: str, dtype: str = "auto", device: torch.device | str = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a folder or of the hub, ready to evaluate, and its tokenizer; an adapter merged into its base.

    Raises UserError where there is none.
    """
    base, adapter = name, Path(name) / "adapter_config.json"
    if adapter.is_file():
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(name if (Path(name) / "tokenizer_config.json").is_file() else base)
    except (OSError, ValueError) as error:
        what = name if base == name else f"{base}, the base of the adapter {name}"
        raise UserError(
            f"{what}: no such folder with a model, and no such model can be reached on the hub "
            f"({type(error).__name__}: {str(error).splitlines()[0]})."
        ) from error
    if base != name:
        from peft import PeftModel

        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:  # tokens that came with the adapter
            model.resize_token_embeddings(len(tokenizer))
        model = PeftModel.from_pretrained(model, name).merge_and_unload()
    return model.to(device).eval(), tokenizer


def describe_weights(name: str) -> str:
    """What tells these weights from others that lay, or will lie, in the same folder: times and sizes of the files.

    Of a model of the hub, its name: a new revision is not told from an old one.
    """
    folder = Path(name)
    if not folder.is_dir():
        return name
    files = sorted(path for path in folder.iterdir() if path.suffix in (".safetensors", ".bin"))
    return ", ".join(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)


def _load_tasks(names: Sequence[str], arguments: EvalArguments) -> dict:
    if find_spec("lm_eval") is None:
        raise UserError(f"--tasks {','.join(names)}: needs lm-eval: pip install 'lisa_dist[eval]'.")
    from lisa_dist.eval import harness  # which takes seconds to import, and is not there without the extra

    return harness.load_tasks(names, arguments.data_dir, arguments.num_fewshot)


def _evaluate_tasks(arguments: EvalArguments, model: _Model, tasks: dict, results: Results | None) -> None:
    """All ranks; `results` on rank 0."""
    from lisa_dist.eval import harness

    loaded, tokenizer = model.load("--apply_chat_template" if arguments.apply_chat_template else None)
    batch_size = arguments.batch_size if arguments.batch_size == "auto" else int(arguments.batch_size)
    ranked = harness.RankedModel(loaded, tokenizer, batch_size)
    try:
        found = harness.evaluate(
            ranked,
            tasks,
            limit=arguments.limit,
            num_fewshot=arguments.num_fewshot,
            seed=arguments.seed,
            apply_chat_template=arguments.apply_chat_template,
        )
    except UserError as error:  # of the number of items, which all ranks find
        raise SharedError(str(error)) from error
    if results is None:
        return
    lines = [("task", "metric", "score", "standard error", "items", "examples")]
    for name in tasks:
        of_task = harness.scores(found, name)
        results.add(name, of_task)
        lines += _lines_of(name, of_task)
        lines += [line for part, about in of_task.get("parts", {}).items() for line in _lines_of(f"  {part}", about)]
    print(f"\n{format_columns(lines)}", flush=True)
    if found["cut"]:
        print(
            f"some prompts are longer than the {ranked.max_length} tokens of the model, and were cut at their beginning"
        )
    print(results.said, flush=True)


def _lines_of(name: str, found: dict) -> list[tuple[str, ...]]:
    """A line of the table for each metric."""
    shots = "various" if found["shots"] is None else str(found["shots"])
    lines = []
    for metric, score in found["scores"].items():
        error = "none" if score["stderr"] is None else f"{score['stderr']:.4f}"
        lines.append((name, metric, f"{score['value']:.4f}", error, str(found["items"]), shots))
    return lines


def _on_all_ranks(function: Callable):
    """What the function returns; where it raises a UserError on any rank, all raise the first of them."""
    problem, value = None, None
    try:
        value = function()
    except UserError as error:
        problem = str(error)
    found = next(filter(None, gather(problem)), None)
    if found is not None:
        raise SharedError(found)
    return value


def _join_ranks() -> tuple[torch.device, bool]:
    """This rank's device, once the ranks have met, and whether they did so here."""
    set_rank()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    joins = int(os.environ["WORLD_SIZE"]) > 1 and not dist.is_initialized()
    if joins:
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl", timeout=_PATIENCE)
    return device, joins

"""The flags of an evaluation, checked before any file is read."""

import re
from dataclasses import dataclass, field
from pathlib import Path

from lisa_dist.definitions import setting
from lisa_dist.errors import UserError

MT_BENCH = "mt_bench"
_DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class EvalArguments:
    """Flags of `lisa-dist eval`."""

    model: str = field(metadata={"help": "Folder of a model, of a checkpoint or of an adapter, or a model of the hub."})
    tasks: str = field(metadata={"help": "Separated by commas: mmlu, agieval, winogrande, gsm8k, ..., mt_bench."})
    data_dir: str | None = setting(None, "Folder with the tasks' files; left out, the data comes from the hub.")
    limit: float | None = setting(None, "Items per task, or below 1 a fraction of them; of mt_bench questions.")
    num_fewshot: int | None = setting(None, "Few-shot examples in each prompt; left out, the task's own number.")
    apply_chat_template: bool = setting(False, "Apply the tokenizer's chat template to prompts; mt_bench always does.")
    batch_size: str = setting("8", "Prompts per batch on each rank, or auto for what fits.")
    dtype: str = setting("auto", f"Of the weights: {', '.join(_DTYPES)}; auto: as saved.")
    seed: int = setting(1234, "Seed of the few-shot examples and of sampled answers.")
    gpus: int | None = setting(None, "Ranks to start on this host; each evaluates a share.")
    output_dir: str | None = setting(None, "Folder of the results; left out, eval/MODEL.", aliases=["--output"])
    max_new_tokens: int = setting(1024, "Tokens per answer of mt_bench.")
    judge_url: str | None = setting(None, "OpenAI-compatible endpoint; its key is taken from JUDGE_API_KEY.")
    judge_model: str | None = setting(None, "The judge's name at that endpoint.")
    judge_parallel: int = setting(4, "Parallel requests to the judge.")
    judge_timeout: float = setting(120.0, "Seconds for a verdict.")
    judge_rating: str = setting("last", "Which rating of a judgment counts, last or first (FastChat's).")
    judge_max_tokens: int = setting(2048, "Tokens per verdict; a judge that reasons first needs more.")

    def __post_init__(self) -> None:
        self.names = [name.strip() for name in self.tasks.split(",") if name.strip()]
        if not self.names or len(set(self.names)) < len(self.names):
            raise UserError(f"--tasks {self.tasks}: give names separated by commas, each once, such as mmlu,gsm8k.")
        if self.data_dir is not None and not Path(self.data_dir).is_dir():
            raise UserError(f"--data_dir {self.data_dir}: no such folder.")
        if self.limit is not None and (self.limit <= 0 or (self.limit > 1 and self.limit != int(self.limit))):
            raise UserError(f"--limit {self.limit}: give a number of items, or a fraction below 1, such as 0.1.")
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise UserError(f"--num_fewshot {self.num_fewshot}: must be 0 or more.")
        if self.batch_size != "auto" and not re.fullmatch(r"[1-9]\d*", self.batch_size):
            raise UserError(f"--batch_size {self.batch_size}: give a number of prompts, or auto.")
        for name, known in (("dtype", _DTYPES), ("judge_rating", ("last", "first"))):
            if getattr(self, name) not in known:
                raise UserError(f"--{name} {getattr(self, name)}: unknown; choose one of {', '.join(known)}.")
        for name in ("max_new_tokens", "judge_parallel", "judge_timeout", "judge_max_tokens"):
            if getattr(self, name) <= 0:
                raise UserError(f"--{name} {getattr(self, name)}: must be more than 0.")
        if (self.judge_url is None) != (self.judge_model is None):
            raise UserError("--judge_url and --judge_model: give both, or neither to write answers without verdicts.")
        if self.judge_url is not None and MT_BENCH not in self.names:
            raise UserError(f"--judge_url {self.judge_url}: needs --tasks mt_bench.")
        if MT_BENCH in self.names and self.data_dir is None:
            raise UserError("--tasks mt_bench: needs --data_dir, with mt_bench/question.jsonl: docs/evaluation.md.")
        if MT_BENCH in self.names and self.batch_size == "auto":
            raise UserError("--batch_size auto with --tasks mt_bench: give a number.")

    @property
    def model_id(self) -> str:
        """The model's name without folders or owner; of a checkpoint, with the name of its run."""
        path = Path(self.model).resolve() if Path(self.model).is_dir() else Path(self.model)
        return f"{path.parent.name}-{path.name}" if re.fullmatch(r"checkpoint-\d+", path.name) else path.name

    @property
    def folder(self) -> Path:
        """The folder of the results."""
        return Path("eval", self.model_id) if self.output_dir is None else Path(self.output_dir)

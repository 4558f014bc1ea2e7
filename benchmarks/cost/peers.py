"""What does a step of LISA cost here and in other trainers? CPU seconds and live tensors on the same work.

python -m benchmarks.cost.peers --model .quickstart/model --dataset gsm8k/train.jsonl

Every peer is installed from PyPI in an environment of its own, once, and is started by its own command line. The
methods take turns, a whole run each. A run has two periods of K steps; of the second, which begins with a switch, the
CPU seconds of all ranks and threads count, and the tensors that live after its last step. All run in fp32 without
checkpointing, on examples of --length tokens, of which about half count for the loss.
"""

import argparse
import json
import os
import random
import re
import socket
import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
import yaml
from transformers import AutoConfig, AutoTokenizer

from benchmarks.common.ranks import ON_CPU, run_on_cpu
from benchmarks.common.results import parser_of, positive, write_results
from benchmarks.tables.rows import show
from lisa_dist.errors import UserError

ROOT = Path(__file__).parents[2]
PROBE = ROOT / "benchmarks" / "common" / "peer_probe.py"
OURS = "lisa-dist"
ENVIRONMENTS = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "lisa_dist" / "peers"
# What pip installs for each peer; torch is this environment's, so that all trainers have the same kernels.
PEERS = {
    "ms-swift": ("ms-swift>=4.6,<4.7", "deepspeed>=0.19,<0.20"),
    "soup-cli": ("soup-cli[train]>=0.77,<0.78",),
    "llamafactory": ("llamafactory>=0.9.5,<0.10", "badam>=1.4,<1.5"),
}
TOLD = ("torch", "transformers", "trl", "accelerate", "deepspeed", "badam", OURS, *PEERS)  # packages whose versions are
SYSTEM = "You solve problems."  # SmolLM2's template has a system turn of its own where there is none
FIXED = {  # flags of the Trainer, which all but soup have
    "num_train_epochs": 1,  # of as many examples as a run has steps, since soup does not count steps
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "optim": "adamw_torch_fused",
    "weight_decay": 0.01,
    "lr_scheduler_type": "constant",
    "bf16": "false",
    "fp16": "false",  # which ms-swift takes under DeepSpeed for fp32
    "use_cpu": "true",
    "report_to": "none",
    "save_strategy": "no",
}


@dataclass(frozen=True)
class Trainer:
    """A trainer's command line, on so many ranks."""

    name: str
    peer: str  # its environment: of PEERS, or OURS
    module: str
    ranks: int = 1

    @property
    def baseline(self) -> str:
        """The trainer that it is compared with: ours on as many ranks."""
        return next(trainer.name for trainer in TRAINERS if trainer.peer == OURS and trainer.ranks == self.ranks)


TRAINERS = (
    Trainer("lisa_dist", OURS, "lisa_dist"),
    Trainer("ms-swift", "ms-swift", "swift.cli.sft"),
    Trainer("soup", "soup-cli", "soup_cli.cli"),
    Trainer("LLaMA-Factory, BAdam", "llamafactory", "llamafactory.cli"),
    Trainer("lisa_dist, ZeRO-2, 2 ranks", OURS, "lisa_dist", 2),
    Trainer("ms-swift, ZeRO-2, 2 ranks", "ms-swift", "swift.cli.sft", 2),
)


def words_of(trainer: Trainer, arguments: argparse.Namespace, folder: Path) -> list[str]:
    """The words behind a trainer's name; what it reads besides, this writes into the folder."""
    model, data = Path(arguments.model).resolve(), folder / "rows.jsonl"
    gamma, interval = arguments.gamma, arguments.interval
    longest = 2 * arguments.length  # a peer's template may have a token more
    if trainer.peer == "soup-cli":
        return soup_words(arguments, model, folder)
    flags = FIXED | {"learning_rate": arguments.lr, "logging_steps": interval, "output_dir": folder / "out"}
    if trainer.peer == OURS:
        flags |= {"lisa_activated_layers": gamma, "lisa_interval_steps": interval, "deepspeed": "zero2"}
        flags |= {"model_name_or_path": model, "dataset_name": data, "dtype": "float32", "max_length": longest}
        return ["train", *as_flags(flags | {"gradient_checkpointing": "false"})]
    if trainer.peer == "ms-swift":
        flags |= {"lisa_activated_layers": gamma, "lisa_step_interval": interval, "tuner_type": "full"}
        flags |= {"model": model, "model_type": AutoConfig.from_pretrained(model).model_type, "template": "chatml"}
        flags |= {"dataset": data, "split_dataset_ratio": 0, "max_length": longest, "torch_dtype": "float32"}
        flags |= {"gradient_checkpointing": "false", "dataloader_num_workers": 0}
        return as_flags(flags | ({"deepspeed": "zero2"} if trainer.ranks > 1 else {}))
    tags = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    rows = {"file_name": data.name, "formatting": "sharegpt", "columns": {"messages": "messages"}}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": rows | {"tags": tags | {"system_tag": "system"}}}))
    flags |= {"stage": "sft", "do_train": "true", "finetuning_type": "full", "model_name_or_path": model}
    flags |= {"use_badam": "true", "badam_switch_mode": "random", "badam_switch_interval": interval}
    flags |= {"dataset_dir": folder, "dataset": "rows", "template": "chatml", "cutoff_len": longest}
    return ["train", *as_flags(flags | {"disable_gradient_checkpointing": "true"})]


def as_flags(settings: dict) -> list[str]:
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def soup_words(arguments: argparse.Namespace, model: Path, folder: Path) -> list[str]:
    """soup has a file of its own kind, and no flags."""
    data = {"train": "rows.jsonl", "format": "chatml", "max_length": 2 * arguments.length, "val_split": 0.0}
    training = {"epochs": 1, "batch_size": 1, "gradient_accumulation_steps": 1, "quantization": "none"}
    training |= {"lr": arguments.lr, "scheduler": "constant", "warmup_ratio": 0.0, "weight_decay": 0.01}
    training |= {"optimizer": FIXED["optim"], "logging_steps": arguments.interval, "lisa_enabled": True}
    training |= {"lisa_num_layers": arguments.gamma, "lisa_interval_steps": arguments.interval}
    config = {"base": str(model), "task": "sft", "data": data | {"train_on_responses_only": True}, "output": "out"}
    (folder / "soup.yaml").write_text(yaml.safe_dump(config | {"training": training}))
    return ["train", "--config", "soup.yaml", "--yes"]


def make_rows(arguments: argparse.Namespace, count: int) -> list[dict]:
    """So many examples of exactly --length tokens, cut at the answer's end, the nearest to half of them labels."""
    tokenizer, found = AutoTokenizer.from_pretrained(arguments.model), []
    if "<|im_start|>" not in (tokenizer.chat_template or ""):
        raise UserError(f"--model {arguments.model}: its chat template is not ChatML; take SmolLM2 or Qwen.")

    def length_of(messages: list[dict]) -> int:
        return len(tokenizer.apply_chat_template(messages, return_dict=False))

    for row in map(json.loads, Path(arguments.dataset).read_text(encoding="utf-8").splitlines()):
        asked = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": row["question"]}]
        answer = tokenizer(row["answer"], add_special_tokens=False)["input_ids"]
        kept = len(answer) + arguments.length - length_of([*asked, {"role": "assistant", "content": row["answer"]}])
        messages = [*asked, {"role": "assistant", "content": tokenizer.decode(answer[: max(kept, 0)])}]
        if 0 < kept <= len(answer) and length_of(messages) == arguments.length:
            found.append((abs(kept - arguments.length // 2), len(found), {"messages": messages}))
    if len(found) < count:
        raise UserError(
            f"--dataset {arguments.dataset}: {len(found)} examples can be cut to --length {arguments.length} tokens, "
            f"and {count} are needed; take fewer tokens or steps, or another file."
        )
    return [row for *_, row in sorted(found)[:count]]


def python_of(peer: str, environments: Path) -> Path:
    """The Python of an environment, which is made where it is not there. Raises UserError where pip cannot."""
    if peer == OURS:
        return Path(sys.executable)
    folder = environments / peer
    python, done = folder / "bin" / "python", folder / "installed.txt"
    wanted = [*PEERS[peer], f"torch=={torch.__version__.partition('+')[0]}"]
    if not done.is_file() or done.read_text().splitlines() != wanted:
        print(f"{folder}: installing {', '.join(wanted)}", flush=True)
        if not python.exists():
            venv.create(folder, symlinks=True)
        pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", *wanted]
        installed = subprocess.run(pip, capture_output=True, text=True)
        if installed.returncode:
            raise UserError(f"{peer}: pip cannot install it in {folder}: {last_error(installed.stderr)}")
        if torch.version.cuda is None:  # which PyPI's torchaudio needs when it is imported, but not without this file
            for library in folder.glob("lib/*/site-packages/torchaudio/lib/_torchaudio*.so"):
                library.unlink()
        done.write_text("\n".join(wanted) + "\n")
    return python


def versions_of(python: Path) -> dict[str, str]:
    """Versions of what is installed there among TOLD."""
    code = (
        "import json, sys\nfrom importlib.metadata import distributions\n"
        "found = {one.metadata['Name'].lower().replace('_', '-'): one.version for one in distributions()}\n"
        "print(json.dumps({name: found[name] for name in sys.argv[1:] if name in found}))"
    )
    return json.loads(subprocess.check_output([python, "-c", code, *TOLD], text=True, env=environment_of(python)))


def last_error(output: str) -> str:
    """The last line that begins with an error, after which a launcher may say more; or the last at all."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it said nothing"]
    errors = [line for line in lines if re.match(r"(\[rank\d+\]: )?[\w.]*(Error|ERROR|Exception): ", line)]
    return (errors or lines)[-1][:300]


def environment_of(python: Path, caches: Path | None = None) -> dict[str, str]:
    """A run's variables: one thread, no hub, this repository's package for its trainer alone, a folder of caches."""
    made = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | ON_CPU
    made |= {"TOKENIZERS_PARALLELISM": "false", "USE_HF": "1", "PATH": f"{python.parent}:{os.environ['PATH']}"}
    if python == Path(sys.executable):
        made["PYTHONPATH"] = str(ROOT)
    else:  # DeepSpeed builds its operators anew for every environment, and a folder that all shared would hold one
        made["TORCH_EXTENSIONS_DIR"] = str(python.parents[1] / "torch_extensions")
    if caches is not None:
        made |= {"HF_HOME": str(caches / "hf"), "MODELSCOPE_CACHE": str(caches / "modelscope")}
    return made


def command_of(trainer: Trainer, python: Path, record: Path, steps: int, words: list[str]) -> list[str]:
    """The probe around the trainer's command line, under torch's launcher where there are ranks."""
    launcher = []
    if trainer.ranks > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        launcher = ["-m", "torch.distributed.run", f"--nproc_per_node={trainer.ranks}", f"--master_port={port}"]
    return [str(python), *launcher, str(PROBE), str(record), str(steps), trainer.module, *words]


def measure(trainer: Trainer, arguments: argparse.Namespace, rows: list[dict]) -> dict:
    """One run: of its second period CPU seconds a step, of all ranks; live bytes of the largest rank."""
    python, steps = python_of(trainer.peer, arguments.environments), 2 * arguments.interval
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        used = rows[: steps * trainer.ranks]
        (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in used))
        command = command_of(trainer, python, folder / "record", steps, words_of(trainer, arguments, folder))
        started = {"cwd": folder, "env": environment_of(python, folder), "stdin": subprocess.DEVNULL}
        run = subprocess.run(command, **started, capture_output=True, text=True)
        records = [json.loads(path.read_text()) for path in sorted(folder.glob("record.*"))]
    if len(records) < trainer.ranks:
        raise UserError(f"{trainer.name}: {last_error(run.stdout + run.stderr)}")
    batches = [batch for record in records for batch in record["batches"][-arguments.interval :]]
    return {
        "cpu_seconds_per_step": sum(mean(record["seconds"][-arguments.interval :]) for record in records),
        "live_bytes": max(record["live_bytes"] for record in records),
        "tokens": mean(rows * length for rows, length, _ in batches),  # of a rank and step
        "labels": mean(labels for *_, labels in batches),
    }


def take_turns(trainers: list[Trainer], arguments: argparse.Namespace, rows: list[dict], figures: dict) -> None:
    """Rounds of a run each, every round in an order of its own; a trainer that fails once is not run again."""
    order = random.Random(0)
    for number in range(arguments.rounds):
        for trainer in order.sample(trainers, len(trainers)):
            found = figures["arms"][trainer.name]
            if "not_run" in found:
                continue
            try:
                found["runs"].append(measure(trainer, arguments, rows))
                said = f"{found['runs'][-1]['cpu_seconds_per_step']:.2f} CPU s a step"
            except UserError as error:
                found["not_run"] = said = str(error)
            print(f"round {number + 1}, {trainer.name}: {said}", flush=True)
            write_results(arguments.results, figures, quiet=True)  # in case a later one is cut


def main() -> None:
    """Install the peers, let all trainers take turns, print the table."""
    run_on_cpu()
    parser = parser_of(__doc__, "peers")
    data = os.environ.get("LISA_DIST_DATA")
    data = data and f"{data}/gsm8k/train.jsonl"
    parser.add_argument("--model", required=True, help="folder, with a ChatML template")
    parser.add_argument("--dataset", default=data, required=not data, help="question/answer examples, .jsonl")
    parser.add_argument(
        "--environments", type=Path, default=ENVIRONMENTS, help="folder of the peers' environments: 6 GB"
    )
    parser.add_argument(
        "--trainers",
        nargs="+",
        choices=[trainer.name for trainer in TRAINERS],
        default=[trainer.name for trainer in TRAINERS],
    )
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--interval", type=positive, default=5, help="K; a run has twice as many steps")
    parser.add_argument("--gamma", type=positive, default=2, help="layers of a period; BAdam has one block")
    parser.add_argument("--length", type=positive, default=256, help="tokens of an example")
    parser.add_argument("--lr", type=float, default=1e-4)
    arguments = parser.parse_args()
    if arguments.interval < 2:
        parser.error("--interval 1: tensors are counted between two steps of a period; take 2 or more")
    trainers = [trainer for trainer in TRAINERS if trainer.name in arguments.trainers]
    try:
        rows = make_rows(arguments, 2 * arguments.interval * max(trainer.ranks for trainer in trainers))
    except UserError as error:
        parser.error(str(error))
    settings = {name: getattr(arguments, name) for name in ("rounds", "interval", "gamma", "length", "lr")}
    settings["model"] = Path(arguments.model).name
    figures = {"settings": settings, "versions": {}, "arms": {}}
    for trainer in trainers:
        figures["arms"][trainer.name] = {"peer": trainer.peer, "baseline": trainer.baseline, "runs": []}
    for peer in dict.fromkeys(trainer.peer for trainer in trainers):
        try:
            figures["versions"][peer] = versions_of(python_of(peer, arguments.environments))
        except UserError as error:
            print(error, flush=True)
            for trainer in (trainer for trainer in trainers if trainer.peer == peer):
                figures["arms"][trainer.name]["not_run"] = str(error)
    take_turns(trainers, arguments, rows, figures)
    write_results(arguments.results, figures)
    show("peers", figures)


if __name__ == "__main__":
    main()

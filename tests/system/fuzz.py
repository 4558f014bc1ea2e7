"""Fuzzing of what users give: command lines, recipes, models, data, checkpoints' state files, logs, names.

    python tests/system/fuzz.py [--cases 2400] [--seed 0] [--kinds flags,recipes] [--case flags:17]

A case is generated from the seed, its kind and its number, and run in this process up to the first training step. It
ends well, or by a UserError of one line. The table counts outcomes; exit status 1 for any traceback, for a message of
several lines, and for a case that hangs.
"""

import argparse
import collections
import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUTCOMES = ("ok", "refused", "several lines", "hangs", "traceback")
PATIENCE = 20  # seconds of the CPU, or tenths of a second asleep at a stretch, after which a case hangs
NUMBERS = (
    *("0", "-1", "-5", "1", "2", "7", "0.5", "-0.5", "1.5", "1e-5", "1e400", "nan", "inf", "-inf", "10000000000000000"),
    *("١٢", "12", "²", "1_0", "0x10", "1e3", "", " ", "-0", "1,5", "NaN", "5 ", "+3", "--", "99999999999999999999999"),
)
TEXTS = (
    *("a: b", "*x", "&x", "a #b", "null", "~", "2024-01-01", "yes", "no", "true", "1e5", "0x1F", "1:30", "", " ", "-"),
    *("{a: 1}", "[a]", "'", '"', "a'b", "%x", "@x", "`x", "!x", "? x", ": x", "- x", "|", ">", "#", "a\nb", "a\\nb"),
    *(
        "{{title}}",
        "{0}",
        "{",
        "}",
        "é",
        "日本",
        "\u2028",
        "\x7f",
        "a\tb",
        "auto",
        "none",
        "all",
        "/dev/null",
        "/proc/x",
    ),
    *("..", ".", "a/b", "~/x", "$HOME", "{}", "[]", '{"a": 1}', '{"stage": 3', "x" * 300, "a=b", "a,b", "8"),
)
YAML = (
    *("null", "~", "", "[1, 2]", "[]", "[[1]]", "[null]", "{a: 1}", "{}", "{a: {b: [1]}}", "2024-01-01", "yes", "no"),
    *("2001-12-14t21:59:43.10-05:00", ".nan", ".inf", "-.inf", "1:30", "0x10", "0o17", "1_000", "1e5", "1e-5", "'5'"),
    *(
        "!!binary aGk=",
        "!!set {a, b}",
        "!!python/object:os.system x",
        "&a [*a]",
        "*b",
        "a: b",
        "|\n  a\n  b",
        "-1",
        "0",
    ),
    *(
        "3.5",
        "1" * 30,
        "true",
        "false",
        "'true'",
        "[a, b]",
        "- 1",
        "{",
        "\x00",
        "é",
        "!!float x",
        "!!omap [a: 1]",
        "on",
    ),
)


class Hang(BaseException):
    """A case has taken too long."""


class Reached(BaseException):
    """A run has come to its first step."""


@dataclass
class Place:
    """A folder with a model, data, a checkpoint and a run's files, which cases copy and damage."""

    folder: Path

    def __post_init__(self) -> None:
        from models import save_tiny_llama

        save_tiny_llama(self.folder / "model")
        rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(6)]
        self._write("rows.jsonl", "\n".join(map(json.dumps, rows)) + "\n")
        self._write("rows.json", json.dumps(rows))
        self._write("rows.csv", "question,answer\n" + "".join(f"{n} + 1?,{n + 1}\n" for n in range(6)))
        self._write("rows.tsv", "question\tanswer\n" + "".join(f"{n} + 1?\t{n + 1}\n" for n in range(6)))
        self._write("rows.txt", "\n".join(f"{n} + 1 is {n + 1}" for n in range(6)))
        turns = [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}] * 4
        self._write("turns.jsonl", "\n".join(map(json.dumps, turns)) + "\n")
        alpaca = [{"instruction": "add", "input": "1", "output": "2", "history": [["a", "b"]]}] * 4
        self._write("alpaca.jsonl", "\n".join(map(json.dumps, alpaca)) + "\n")
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), self.folder / "rows.parquet")
        self._checkpoint(self.folder / "checkpoint-2")
        self._run_files(self.folder / "run")

    def _write(self, name: str, text: str) -> None:
        (self.folder / name).write_text(text, encoding="utf-8")

    def _checkpoint(self, folder: Path) -> None:
        """As save_checkpoint writes one, as far as it is read before an engine is there."""
        from lisa_dist import LisaConfig
        from lisa_dist.files import describe_file, write_json

        shutil.copytree(self.folder / "model", folder)
        (folder / "trainer_state.json").write_text(json.dumps({"global_step": 2, "log_history": []}))
        (folder / "scheduler.pt").write_bytes(b"not read")
        (folder / "lisa_optimizer-0-of-1.safetensors").write_bytes(b"not read")
        lisa = {"config": LisaConfig().to_dict(), "period": 0, "layers": [1, 2], "blocks": []}
        state: dict[str, Any] = {"format": 1, "saved_at": 1.0, "world_size": 1, "rows_per_step": 8, "zero_stage": 2}
        state |= {
            "model": "LlamaForCausalLM",
            "lisa": lisa,
            "counters": {},
            "learning_rates": {"embed/decay": {"lr": 1}},
        }
        state |= {
            "engine": {"global_steps": 2, "global_samples": 16, "skipped_steps": 0},
            "versions": {"lisa_dist": "0"},
        }
        files = {path.name: describe_file(path) for path in folder.iterdir()}
        write_json(folder / "lisa_state.json", state | {"files": files})

    def _run_files(self, folder: Path) -> None:
        folder.mkdir()
        log = [
            {"step": n, "loss": 2.0, "eval_loss": 2.1, "learning_rate": 1e-5, "tokens_per_second": 5.0} for n in (1, 2)
        ]
        log += [{"step": 2, "train_runtime": 3.0, "memory_bytes": 10**9}]
        periods = [
            {"period": n, "step": 2 * n, "layers": [n], "blocks": ["head"], "probabilities": [0.5, 0.5]}
            | {"state_bytes_per_rank": 1000, "seconds": 0.1}
            for n in (0, 1)
        ]
        movement = [{"period": 0, "step": 2, "blocks": {"embed": {"relative": 0.1}, "layers.1": {"relative": 0.2}}}]
        parts = ("weights", "always_on_states", "active_states", "gradients", "buffers", "gathered", "activations")
        memory = dict.fromkeys((*parts, "logits", "temporary", "peak"), 1000)
        run = {"command": "lisa-dist train", "began": "2026", "method": "lisa", "model": "m", "devices": "CPU"}
        run |= {"flags": {"--a": 1, "--b": [1, 2]}, "given": ["--a"], "versions": {"torch": "2"}, "parameters": 10**6}
        run |= {"num_layers": 2, "resumed": [{"began": "2027", "command": "lisa-dist train"}]}
        for name, content in (
            ("trainer_state.json", json.dumps({"global_step": 2, "log_history": log})),
            ("lisa_run.json", json.dumps(run)),
            ("lisa_log.jsonl", "".join(json.dumps(line) + "\n" for line in periods)),
            ("lisa_movement.jsonl", "".join(json.dumps(line) + "\n" for line in movement)),
            ("lisa_memory.json", json.dumps({"planned": memory, "measured": memory})),
            ("lisa_norms.csv", "block,weight_norm,update_norm,moved_norm\nembed,1,1,1\nlayers.0,1,2,3\nhead,1,1,1\n"),
        ):
            (folder / name).write_text(content, encoding="utf-8")

    def words(self, out: Path, **changes: object) -> list[str]:
        """A command line that works."""
        values: dict[str, object] = {
            "model_name_or_path": self.folder / "model",
            "dataset_name": self.folder / "rows.jsonl",
            "output_dir": out,
            "max_steps": 2,
            "max_length": 32,
            "report_to": "none",
        }
        return [word for name, value in (values | changes).items() for word in (f"--{name}", str(value))]


# What is damaged.


def damage_bytes(draws: random.Random, path: Path) -> None:
    """Cut, change, repeat or replace bytes of a file, or put something that is no file in its place."""
    raw = path.read_bytes()
    at = draws.randrange(len(raw) + 1)
    how = draws.choice(
        ["cut", "cut", "flip", "insert", "empty", "binary", "repeat", "absent", "folder", "fifo", "zeros"]
    )
    if how in ("absent", "folder", "fifo"):
        path.unlink()
        if how == "folder":
            path.mkdir()
        elif how == "fifo":
            os.mkfifo(path)
        return
    junk = draws.choice(
        [b"\x00", b"\xff\xfe", b"{", b"}", b"]", b'"', b"\n", b"NaN", b"null", b"[" * 5000, b"\xed\xa0\x80", b"-"]
    )
    path.write_bytes(
        {
            "cut": raw[:at],
            "flip": raw[:at] + bytes([draws.randrange(256)]) + raw[at + 1 :],
            "insert": raw[:at] + junk + raw[at:],
            "empty": b"",
            "binary": draws.randbytes(200),
            "repeat": raw[at:] + raw,
            "zeros": bytes(100),
        }[how]
    )


ODD: tuple[Any, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "x",
    "{{flags}}",
    [],
    [1],
    {},
    {"a": 1},
    [[]],
)


def damage_value(draws: random.Random, value: Any, depth: int = 0) -> Any:
    """The same JSON value with one part missing, of another kind, or out of its range."""
    if isinstance(value, dict) and value and (depth == 0 or draws.random() < 0.8):
        key = draws.choice(list(value))
        if draws.random() < 0.2:
            return {name: one for name, one in value.items() if name != key}
        return value | {key: damage_value(draws, value[key], depth + 1)}
    if isinstance(value, list) and value and draws.random() < 0.8:
        at = draws.randrange(len(value))
        return [*value[:at], damage_value(draws, value[at], depth + 1), *value[at + 1 :]]
    return draws.choice(ODD)


def damage_json(draws: random.Random, path: Path) -> None:
    """Change a value in a JSON file, or in one line of a .jsonl, or its bytes."""
    if draws.random() < 0.35:
        damage_bytes(draws, path)
        return
    text = path.read_bytes().decode("utf-8", errors="replace")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    at = draws.randrange(len(lines))
    try:
        lines[at] = json.dumps(damage_value(draws, json.loads(lines[at])))
    except ValueError:  # it is damaged already
        damage_bytes(draws, path)
        return
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# The kinds: each runs one case in an empty folder, and says in a word or two what it was.


def begin(words: list[str]) -> None:
    """A run up to its first step; as `lisa-dist train`, without its ranks."""
    from lisa_dist.run import trainer
    from lisa_dist.run.arguments import parse_arguments
    from lisa_dist.run.run import run

    build = trainer.build_trainer

    def build_and_stop(*args: Any) -> None:
        build(*args)
        raise Reached

    trainer.build_trainer = build_and_stop
    try:
        run(parse_arguments(words), words)
    finally:
        trainer.build_trainer = build


def fuzz_flags(draws: random.Random, place: Place, folder: Path) -> str:
    from lisa_dist.run.arguments import run_parser

    actions = [action for action in run_parser()._actions if action.nargs != 0 and action.dest not in _NOT_FUZZED]
    numeric = [action for action in actions if getattr(action.type, "__name__", "") in ("int", "float")]
    changes: dict[str, str] = {}
    for _ in range(draws.choice((1, 1, 2))):
        action = draws.choice(numeric if draws.random() < 0.6 else actions)
        changes[action.dest] = draws.choice(NUMBERS if action in numeric or draws.random() < 0.2 else TEXTS)
    words = place.words(folder / "out", **changes)
    if draws.random() < 0.1:
        words.insert(draws.randrange(len(words)), draws.choice(TEXTS))
    note(words)
    begin(words)
    return ""


# Of the hub, of other hosts, or what reaches out of the process.
_NOT_FUZZED = (
    "help",
    "help_all",
    "push_to_hub",
    "log_level",
    "log_level_replica",
    "report_to",
    "debug",
    "dataset_num_proc",
)


def fuzz_paths(draws: random.Random, place: Place, folder: Path) -> str:
    (folder / "file").write_text("x")
    os.mkfifo(folder / "fifo")
    (folder / "empty").mkdir()
    (folder / "loop").symlink_to(folder / "loop")
    (folder / "gone").symlink_to(folder / "nothing")
    paths = ["file", "fifo", "empty", "loop", "gone", "file/below", "absent", "absent/below", "empty/new", "x" * 300]
    flags = ("output_dir", "model_name_or_path", "dataset_name", "eval_dataset_name", "deepspeed", "lisa_weights_file")
    flag = draws.choice((*flags, "chat_template_path", "resume_from_checkpoint", "config"))
    path = draws.choice([*(str(folder / name) for name in paths), "/dev/null", "/dev/zero", "/proc/self/x", ""])
    if draws.random() < 0.3:
        path += draws.choice((".jsonl", ".json", ".txt", ".jinja", ".csv", ".parquet", ".yaml", "#3", "/"))
        if path.startswith(str(folder)) and len(Path(path).name) < 200 and not Path(path).exists():
            with contextlib.suppress(OSError):
                draws.choice((os.mkfifo, os.mkdir, lambda one: Path(one).write_text("")))(path)
    words = place.words(folder / "out", **{flag: path})
    if flag == "lisa_weights_file":
        words += ["--lisa_sampler", "weighted"]
    words += ["--method", draws.choice(("lisa", "lisa", "full", "lora"))]
    note(words)
    begin(words)
    return ""


def fuzz_recipes(draws: random.Random, place: Place, folder: Path) -> str:
    from lisa_dist.run.arguments import run_parser

    names = [action.dest for action in run_parser()._actions if action.nargs != 0 and action.dest not in _NOT_FUZZED]
    words = place.words(folder / "out")
    values = {word[2:]: value for word, value in zip(words[::2], words[1::2], strict=True)}
    for _ in range(draws.choice((1, 1, 2))):
        values[draws.choice((*names, *values, "env", "1", "null"))] = draws.choice(YAML)
    path = folder / "recipe.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in values.items()), encoding="utf-8")
    if draws.random() < 0.1:
        damage_bytes(draws, path)
    note(path.read_bytes()[:600] if path.is_file() else path)
    begin(["--config", str(path)])
    return ""


def fuzz_models(draws: random.Random, place: Place, folder: Path) -> str:
    model = folder / "model"
    shutil.copytree(place.folder / "model", model)
    for _ in range(draws.choice((1, 1, 2))):
        names = sorted(path.name for path in model.iterdir() if path.is_file())
        name = draws.choice(names)
        note(name)
        (damage_json if name.endswith(".json") else damage_bytes)(draws, model / name)
    if draws.random() < 0.1:
        (model / "model.safetensors").unlink(missing_ok=True)
        index = {
            "metadata": {},
            "weight_map": {"lm_head.weight": draws.choice(("gone.safetensors", "../x", 3, None, ""))},
        }
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    begin(place.words(folder / "out", model_name_or_path=model, method=draws.choice(("lisa", "full", "lora"))))
    return ""


def fuzz_data(draws: random.Random, place: Place, folder: Path) -> str:
    from transformers import AutoTokenizer

    from lisa_dist.data.dataset import DataArguments, load_data
    from lisa_dist.data.encoding import set_chat_template

    name = draws.choice(sorted(path.name for path in place.folder.iterdir() if path.is_file()))
    path = folder / name
    shutil.copyfile(place.folder / name, path)
    for _ in range(draws.choice((1, 1, 2))):
        if path.is_file() and path.stat().st_size:
            with contextlib.suppress(ValueError):  # it was damaged before
                (damage_json if name.endswith(("json", "jsonl")) else damage_bytes)(draws, path)
    if draws.random() < 0.05 and path.exists():
        path = path.rename(folder / f"{name}.gz")
    note(path, path.read_bytes()[:300] if path.is_file() else "")
    given = str(folder if draws.random() < 0.1 else path) + draws.choice(("", "", "", "#2", "#²", "#99"))
    flags = {"dataset_format": draws.choice((None, None, None, "alpaca", "text", "messages", "sharegpt"))}
    tokenizer = AutoTokenizer.from_pretrained(place.folder / "model")
    set_chat_template(tokenizer, None)
    arguments = DataArguments(
        [given], skip_bad_rows=draws.random() < 0.3, eval_rows=draws.choice((0, 0, 1, 0.5)), **flags
    )
    load_data(arguments, tokenizer, max_length=draws.choice((None, 1, 8, 32)), seed=0)
    return ""


def fuzz_states(draws: random.Random, place: Place, folder: Path) -> str:
    from lisa_dist.files import read_json, write_json

    checkpoint = folder / "out" / "checkpoint-2"
    shutil.copytree(place.folder / "checkpoint-2", checkpoint)
    state = checkpoint / "lisa_state.json"
    if draws.random() < 0.6:  # a foreign one, whose sum fits
        content = read_json(state)
        damaged = damage_value(draws, content)
        write_json(state, damaged)
        note({name: one for name, one in damaged.items() if content.get(name) != one}, set(content) - set(damaged))
    else:
        path = draws.choice((state, state, *sorted(checkpoint.iterdir())))
        damage_bytes(draws, path)
        note(path.name)
    if draws.random() < 0.5:
        from lisa_dist.commands.export import main

        main(str(checkpoint), str(folder / "exported"))
        return ""
    resume = draws.choice(("true", "auto", str(checkpoint)))
    begin(
        place.words(
            folder / "out", resume_from_checkpoint=resume, method=draws.choice(("lisa", "lisa", "full", "lora"))
        )
    )
    return ""


def fuzz_logs(draws: random.Random, place: Place, folder: Path) -> str:
    from lisa_dist.commands.report import main

    run = folder / "run"
    shutil.copytree(place.folder / "run", run)
    for _ in range(draws.choice((1, 1, 2))):
        path = draws.choice(
            sorted(path for path in run.iterdir() if path.suffix in (".json", ".jsonl") and path.is_file())
        )
        note(path.name)
        with contextlib.suppress(ValueError):  # it was damaged before
            damage_json(draws, path)
    main(str(run))
    page = (run / "report.html").read_text(encoding="utf-8")
    assert "<html" in page
    return ""


def fuzz_norms(draws: random.Random, place: Place, folder: Path) -> str:
    from lisa_dist.commands.norms import main

    run = folder / "run"
    shutil.copytree(place.folder / "run", run)
    for name in ("lisa_norms.csv", "lisa_run.json"):
        if draws.random() < 0.7:
            (damage_json if name.endswith("json") else damage_bytes)(draws, run / name)
    main([str(run), "--out", str(folder / "norms")])
    return ""


def fuzz_init(draws: random.Random, place: Place, folder: Path) -> str:
    """What `init` is given comes back from its recipe."""
    import yaml

    from lisa_dist.commands.init import main

    model = str(place.folder / "model")
    given = {
        name: draws.choice(TEXTS) or "x" for name in draws.sample(("dataset_name", "output_dir"), draws.choice((1, 2)))
    }
    if draws.random() < 0.3:
        name = draws.choice(TEXTS)
        model = str(folder / "models" / (name or "x"))
        with contextlib.suppress(OSError):
            shutil.copytree(place.folder / "model", model, dirs_exist_ok=True)
    path = folder / "recipe.yaml"
    words = ["--model", model, "--gpu_memory", "4GiB", "--recipe", str(path)]
    words += [f"--{name}={value}" for name, value in given.items()]
    note(words)
    main(words)
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    expected = given | {"model_name_or_path": model}
    assert {name: recipe[name] for name in expected} == expected, recipe
    return ""


def fuzz_verbs(draws: random.Random, place: Place, folder: Path) -> str:
    """Flags of the other verbs."""
    from lisa_dist.commands import check, eval, plan
    from lisa_dist.config import LisaConfig
    from lisa_dist.eval.arguments import EvalArguments
    from lisa_dist.flags import FlagParser
    from lisa_dist.memory.plan import PlanArguments, load_model_config

    verb, types = draws.choice((("plan", (PlanArguments, LisaConfig)), ("eval", (EvalArguments,)), ("check", ())))
    model = str(place.folder / "model")
    words = {"plan": ["--model", model], "eval": [model, "--tasks", "mmlu"], "check": []}[verb]
    if verb == "check":
        (folder / "recipe.yaml").write_text(f"output_dir: {draws.choice(YAML)}\ndataset_name: {draws.choice(YAML)}\n")
        words = ["--config", str(folder / "recipe.yaml"), *draws.choice(([], ["--output_dir", draws.choice(TEXTS)]))]
    else:
        actions = [one for one in FlagParser(types, "", {})._actions if one.nargs != 0 and one.dest != "json"]
        for action in draws.sample(actions, 2):
            words += [f"--{action.dest}={draws.choice(NUMBERS if draws.random() < 0.6 else TEXTS)}"]
    note(verb, words)
    if verb == "eval":
        eval.parse(words)
    elif verb == "plan":
        arguments, _ = FlagParser(types, plan.USAGE, plan.HELP).parse(words)
        load_model_config(arguments.model)
    else:
        known, rest = FlagParser(check.ARGUMENTS, check.USAGE, check.HELP).parse_known_args(words)
        arguments = check.CheckArguments(**vars(known))
        check.compared_files(arguments.config, check.flags_of_run(arguments, rest))
    return ""


Kind = Callable[[random.Random, Place, Path], str]
# The kinds, and their parts of all cases.
KINDS: dict[str, tuple[Kind, float]] = {
    "flags": (fuzz_flags, 0.25),
    "recipes": (fuzz_recipes, 0.2),
    "paths": (fuzz_paths, 0.1),
    "models": (fuzz_models, 0.05),
    "data": (fuzz_data, 0.1),
    "states": (fuzz_states, 0.05),
    "logs": (fuzz_logs, 0.1),
    "norms": (fuzz_norms, 0.02),
    "init": (fuzz_init, 0.03),
    "verbs": (fuzz_verbs, 0.1),
}
_notes: list[str] = []


def note(*about: object) -> None:
    """Keep what a case is, for its traceback."""
    _notes.append(" ".join(map(str, about)))


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """Variables and folder of the process are restored; a case that hangs is ended.

    Not by the clock: on a machine with other work a case may wait long for the CPU.
    """
    environment, here, done = dict(os.environ), Path.cwd(), threading.Event()

    def ring(*_: object) -> None:
        if not done.is_set():  # and not a moment too late
            raise Hang

    signal.signal(signal.SIGUSR2, ring)
    threading.Thread(target=_watch, args=(done, threading.get_native_id(), threading.get_ident()), daemon=True).start()
    try:
        yield
    finally:
        done.set()
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(here)


def _watch(done: threading.Event, number: int, thread: int) -> None:
    """Wake a thread that sleeps in every sample, or that has computed for too long."""
    sleeps, began = 0, time.process_time()
    while not done.wait(0.1):
        state = Path(f"/proc/self/task/{number}/stat").read_text().rpartition(")")[2].split()[0]
        sleeps = sleeps + 1 if state == "S" else 0
        if sleeps > PATIENCE or time.process_time() - began > PATIENCE:
            signal.pthread_kill(thread, signal.SIGUSR2)  # a call that sleeps in another thread would go on
            return


def run_case(kind: str, number: int, seed: int, place: Place) -> tuple[str, str]:
    """The outcome of one case, and what is to be said of it."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    from lisa_dist.errors import UserError

    _notes.clear()
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, as_before():
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                os.chdir(folder)
                KINDS[kind][0](random.Random(f"{seed} {kind} {number}"), place, Path(folder))
        except UserError as error:
            return judge_message(str(error))
        except SystemExit as error:
            return ("ok", "") if error.code in (0, None) else judge_message(said.getvalue().strip())
        except Reached:
            return "ok", ""
        except Hang:
            return "hangs", traceback.format_exc()
        except Exception:  # noqa: BLE001 - a bug of any kind is the finding: it is counted, shown, and ends the fuzz by 1
            return "traceback", traceback.format_exc()
        finally:
            unset_hf_deepspeed_config()
    return "ok", ""


def judge_message(message: str) -> tuple[str, str]:
    """A message is one line, but for the list of examples that are invalid."""
    one_line = len(message.splitlines()) == 1 or "examples are invalid:" in message
    return "refused" if one_line else "several lines", message


def fuzz(cases: int, seed: int, kinds: tuple[str, ...] = tuple(KINDS), show: Callable[[str], None] = print) -> dict:
    """Run so many cases, in parts of the kinds; the number of each kind's outcomes. Says what was no good."""
    counts: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in kinds}
    total = sum(KINDS[kind][1] for kind in kinds)
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        for kind in kinds:
            for number in range(max(1, round(cases * KINDS[kind][1] / total))):
                outcome, about = run_case(kind, number, seed, place)
                counts[kind][outcome] += 1
                if outcome not in ("ok", "refused"):
                    show(f"--case {kind}:{number} {outcome}: {' | '.join(_notes)[:1500]}\n{about[-2500:]}")
    return counts


def format_counts(counts: dict) -> str:
    """A table: a line for each kind, a column for each outcome."""
    from lisa_dist.text import format_columns

    lines = [["kind", "cases", *OUTCOMES]]
    for kind, found in [*counts.items(), ("all", sum(counts.values(), collections.Counter()))]:
        lines.append([kind, str(sum(found.values())), *(str(found[outcome]) for outcome in OUTCOMES)])
    return format_columns(lines)


def set_up() -> None:
    """One CPU rank, no hub, caches that go with the process."""
    root = Path(__file__).parents[2]
    sys.path[:0] = [str(root), str(root / "tests" / "support")]
    caches = tempfile.mkdtemp(prefix="lisa_dist_fuzz_")
    os.environ.update(DS_ACCELERATOR="cpu", HF_HUB_OFFLINE="1", HF_HOME=caches, TMPDIR=caches, OMP_NUM_THREADS="1")
    os.environ.update(TOKENIZERS_PARALLELISM="false", CUDA_VISIBLE_DEVICES="")
    tempfile.tempdir = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2400)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--case", help="one alone, such as flags:17, with what it says")
    given = parser.parse_args()
    set_up()
    if given.case:
        kind, _, number = given.case.partition(":")
        with tempfile.TemporaryDirectory() as folder:
            outcome, about = run_case(kind, int(number), given.seed, Place(Path(folder)))
        print(*_notes, outcome, about, sep="\n")
        return
    counts = fuzz(given.cases, given.seed, tuple(given.kinds.split(",")))
    print(format_counts(counts))
    bad = sum(found[outcome] for found in counts.values() for outcome in OUTCOMES if outcome not in ("ok", "refused"))
    sys.stdout.flush()
    os._exit(1 if bad else 0)  # gloo's threads, as in lisa_dist.distributed.launching


if __name__ == "__main__":
    main()

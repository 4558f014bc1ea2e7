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
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

OUTCOMES = ("ok", "refused", "several lines", "hangs", "traceback")
PATIENCE = 60  # seconds after which a case hangs: many times what it takes on a machine that has other work
# Flags of the hub, of other hosts, or that reach out of the process.
NOT_FUZZED = {"help", "help_all", "push_to_hub", "log_level", "log_level_replica", "report_to", "debug"}
NOT_FUZZED |= {"dataset_num_proc"}
NUMBERS = str.split("0 -1 -5 1 2 7 0.5 -0.5 1.5 1e-5 1e400 nan inf -inf 10000000000000000 ١٢ 12 ² 1_0 0x10 1e3 -0 1,5")
NUMBERS += ["", " ", "5 ", "NaN", "+3", "--", "9" * 23]
TEXTS = str.split(
    "*x &x null ~ 2024-01-01 yes no true 1e5 0x1F 1:30 - [a] ' \" a'b %x @x `x !x | > # a\\nb {{title}} {0}"
)
TEXTS += str.split("{ } é 日本 auto none all /dev/null /proc/x .. . a/b ~/x $HOME {} [] a=b a,b 8")
TEXTS += ["a: b", "a #b", "", " ", "{a: 1}", "? x", ": x", "- x", "a\nb", "\u2028", "\x7f", "a\tb", '{"a": 1}']
TEXTS += ['{"stage": 3', "x" * 300]
YAML = str.split(
    "null ~ [] [[1]] [null] {} 2024-01-01 yes no 2001-12-14t21:59:43.10-05:00 .nan .inf -.inf 1:30 0x10 on"
)
YAML += str.split("0o17 1_000 1e5 1e-5 '5' *b -1 0 3.5 true false 'true' { é")
YAML += [
    "",
    "[1, 2]",
    "{a: 1}",
    "1" * 30,
    "{a: {b: [1]}}",
    "!!binary aGk=",
    "!!set {a, b}",
    "&a [*a]",
    "a: b",
    "[a, b]",
]
YAML += ["|\n  a\n  b", "- 1", "\x00", "!!float x", "!!omap [a: 1]", "!!python/object:os.system x"]
ODD = [None, True, -1, 0, 1.5, 10**30, float("nan"), float("inf"), "", "x", "{{flags}}", [], [1], {}, {"a": 1}, [[]]]
JUNK = [b"\x00", b"\xff\xfe", b"{", b"}", b"]", b'"', b"\n", b"NaN", b"null", b"[" * 5000, b"\xed\xa0\x80", b"-"]


class Hang(BaseException):
    """A case has taken too long."""


class Reached(BaseException):
    """A run has come to its first step."""


class Place:
    """A folder with a model, data, and the checkpoint and the files of a run, which cases copy and damage."""

    def __init__(self, folder: Path):
        import pyarrow
        import pyarrow.parquet
        from models import save_tiny_llama

        self.folder = folder
        save_tiny_llama(folder / "model")
        rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(6)]
        turns = [{"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}] * 4
        alpaca = [{"instruction": "add", "input": "1", "output": "2", "history": [["a", "b"]]}] * 4
        for name, lines in (("rows", rows), ("turns", turns), ("alpaca", alpaca)):
            (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")
        (folder / "rows.json").write_text(json.dumps(rows))
        for kind, between in (("csv", ","), ("tsv", "\t"), ("txt", " is ")):
            lines = [between.join(one) for one in (rows[0], *(row.values() for row in rows))]
            (folder / f"rows.{kind}").write_text("\n".join(lines) + "\n")
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")

    def add_run(self) -> None:
        """Train for four steps, in a fork of this process, which has imported what it takes."""
        import lisa_dist.commands.train as command

        run = self.folder / "run"
        changes = {"max_steps": 4, "lisa_interval_steps": 2, "save_strategy": "steps", "save_steps": 2}
        changes |= {"lisa_sampler": "adaptive"}
        words = self.words(run, **changes, eval_rows=2, eval_strategy="steps", eval_steps=1, logging_steps=1)
        command.end_process = lambda: os._exit(0)  # without what this process does at its own end
        process = multiprocessing.get_context("fork").Process(target=command.main, args=(words,))
        process.start()
        process.join()
        (run / "checkpoint-2").rename(self.folder / "checkpoint-2")
        about = json.loads((run / "lisa_run.json").read_text())
        resume = {"began": "2027", "command": "lisa-dist train", "before": {"--seed": 1}}
        (run / "lisa_run.json").write_text(json.dumps(about | {"resumed": [resume]}))
        norms = "block,weight_norm,update_norm,moved_norm\nembed,1,1,1\nlayers.0,1,2,3\nhead,1,1,1\n"
        (run / "lisa_norms.csv").write_text(norms)

    def words(self, out: Path, **changes: object) -> list[str]:
        """A command line that works."""
        values: dict[str, object] = {"model_name_or_path": self.folder / "model", "output_dir": out, "max_steps": 2}
        values |= {"dataset_name": self.folder / "rows.jsonl", "max_length": 32, "report_to": "none"}
        return [word for name, value in (values | changes).items() for word in (f"--{name}", str(value))]


# What is damaged


def damage_bytes(draws: random.Random, path: Path) -> None:
    """Cut, change, repeat or replace bytes of a file, or put something that is no file in its place."""
    raw = path.read_bytes()
    at = draws.randrange(len(raw) + 1)
    made = {"absent": lambda _: None, "folder": os.mkdir, "fifo": os.mkfifo}
    content = {"cut": raw[:at], "flip": raw[:at] + draws.randbytes(1) + raw[at + 1 :], "repeat": raw[at:] + raw}
    content |= {"insert": raw[:at] + draws.choice(JUNK) + raw[at:], "binary": draws.randbytes(200)}
    content |= {"empty": b"", "zeros": bytes(100)}
    how = draws.choice(["cut", *content, *made])
    if how in made:
        path.unlink()
        made[how](path)
    else:
        path.write_bytes(content[how])


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


def damage(draws: random.Random, path: Path) -> None:
    """Change a value in a JSON file, or in one line of a .jsonl; of that and of every other kind of file its bytes."""
    if path.suffix in (".json", ".jsonl") and draws.random() < 0.65:
        text = path.read_bytes().decode("utf-8", errors="replace")
        lines = text.splitlines() if path.suffix == ".jsonl" else [text]
        with contextlib.suppress(ValueError, IndexError):  # it is damaged already
            at = draws.randrange(len(lines))
            lines[at] = json.dumps(damage_value(draws, json.loads(lines[at])))
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
            return
    damage_bytes(draws, path)


def damage_some(draws: random.Random, folder: Path, *patterns: str) -> None:
    """One file of a folder or two, of these names."""
    for _ in range(draws.choice((1, 1, 2))):
        files = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.is_file())
        path = draws.choice(files)
        note(path.name)
        damage(draws, path)


# The kinds: each runs one case in an empty folder


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


def fuzzed_flags() -> list[argparse.Action]:
    from lisa_dist.run.arguments import run_parser

    return [action for action in run_parser()._actions if action.nargs != 0 and action.dest not in NOT_FUZZED]


def fuzz_flags(draws: random.Random, place: Place, folder: Path) -> None:
    actions = fuzzed_flags()
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


def fuzz_paths(draws: random.Random, place: Place, folder: Path) -> None:
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
    words += ["--lisa_sampler", "weighted"] if flag == "lisa_weights_file" else []
    words += ["--method", draws.choice(("lisa", "lisa", "full", "lora"))]
    note(words)
    begin(words)


def fuzz_recipes(draws: random.Random, place: Place, folder: Path) -> None:
    words = place.words(folder / "out")
    values = {word[2:]: value for word, value in zip(words[::2], words[1::2], strict=True)}
    names = [action.dest for action in fuzzed_flags()]
    for _ in range(draws.choice((1, 1, 2))):
        values[draws.choice((*names, *values, "env", "1", "null"))] = draws.choice(YAML)
    path = folder / "recipe.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in values.items()), encoding="utf-8")
    if draws.random() < 0.1:
        damage_bytes(draws, path)
    note(path.read_bytes()[:600] if path.is_file() else path)
    begin(["--config", str(path)])


def fuzz_models(draws: random.Random, place: Place, folder: Path) -> None:
    model = folder / "model"
    shutil.copytree(place.folder / "model", model)
    damage_some(draws, model, "*")
    if draws.random() < 0.1:
        (model / "model.safetensors").unlink(missing_ok=True)
        file = draws.choice(("gone.safetensors", "../x", 3, None, ""))
        index = {"metadata": {}, "weight_map": {"lm_head.weight": file}}
        (model / "model.safetensors.index.json").write_text(json.dumps(index))
    begin(place.words(folder / "out", model_name_or_path=model, method=draws.choice(("lisa", "full", "lora"))))


def fuzz_data(draws: random.Random, place: Place, folder: Path) -> None:
    from transformers import AutoTokenizer

    from lisa_dist.data.dataset import DataArguments, load_data
    from lisa_dist.data.encoding import set_chat_template

    name = draws.choice(sorted(path.name for path in place.folder.iterdir() if path.is_file()))
    path = folder / name
    shutil.copyfile(place.folder / name, path)
    for _ in range(draws.choice((1, 1, 2))):
        if path.is_file() and path.stat().st_size:
            damage(draws, path)
    if draws.random() < 0.05 and path.exists():
        path = path.rename(folder / f"{name}.gz")
    note(path, path.read_bytes()[:300] if path.is_file() else "")
    given = str(folder if draws.random() < 0.1 else path) + draws.choice(("", "", "", "#2", "#²", "#99"))
    flags = {"dataset_format": draws.choice((None, None, None, "alpaca", "text", "messages", "sharegpt"))}
    flags |= {"skip_bad_rows": draws.random() < 0.3, "eval_rows": draws.choice((0, 0, 1, 0.5))}
    tokenizer = AutoTokenizer.from_pretrained(place.folder / "model")
    set_chat_template(tokenizer, None)
    load_data(DataArguments([given], **flags), tokenizer, max_length=draws.choice((None, 1, 8, 32)), seed=0)


def fuzz_states(draws: random.Random, place: Place, folder: Path) -> None:
    from lisa_dist.commands.export import main
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
        main(str(checkpoint), str(folder / "exported"))
    else:
        resume = {"resume_from_checkpoint": draws.choice(("true", "auto", str(checkpoint)))}
        begin(place.words(folder / "out", method=draws.choice(("lisa", "lisa", "full", "lora")), **resume))


def fuzz_logs(draws: random.Random, place: Place, folder: Path) -> None:
    from lisa_dist.commands import norms, report

    run = folder / "run"
    shutil.copytree(place.folder / "run", run)
    if draws.random() < 0.15:
        for name in ("lisa_norms.csv", "lisa_run.json"):
            if draws.random() < 0.7:
                note(name)
                damage(draws, run / name)
        norms.main([str(run), "--out", str(folder / "norms")])
    else:
        damage_some(draws, run, "lisa_*.json*", "trainer_state.json")
        report.main(str(run))
        assert "<html" in (run / "report.html").read_text(encoding="utf-8")


def fuzz_init(draws: random.Random, place: Place, folder: Path) -> None:
    """What `init` is given comes back from its recipe."""
    import yaml

    from lisa_dist.commands.init import main

    model = str(place.folder / "model")
    names = draws.sample(("dataset_name", "output_dir"), draws.choice((1, 2)))
    given = {name: draws.choice(TEXTS) or "x" for name in names}
    if draws.random() < 0.3:
        model = str(folder / "models" / (draws.choice(TEXTS) or "x"))
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


def fuzz_verbs(draws: random.Random, place: Place, folder: Path) -> None:
    """Flags of the other verbs."""
    from lisa_dist.commands import check, eval, plan
    from lisa_dist.flags import FlagParser
    from lisa_dist.memory.plan import load_model_config

    model = str(place.folder / "model")
    verb, words = draws.choice((("plan", ["--model", model]), ("eval", [model, "--tasks", "mmlu"]), ("check", [])))
    if verb == "check":
        (folder / "recipe.yaml").write_text(f"output_dir: {draws.choice(YAML)}\ndataset_name: {draws.choice(YAML)}\n")
        words = ["--config", str(folder / "recipe.yaml"), *draws.choice(([], ["--output_dir", draws.choice(TEXTS)]))]
    else:
        types = {"plan": plan, "eval": eval}[verb].ARGUMENTS
        actions = [one for one in FlagParser(types, "", {})._actions if one.nargs != 0 and one.dest != "json"]
        for action in draws.sample(actions, 2):
            words += [f"--{action.dest}={draws.choice(NUMBERS if draws.random() < 0.6 else TEXTS)}"]
    note(verb, words)
    if verb == "eval":
        eval.parse(words)
    elif verb == "plan":
        arguments, _ = FlagParser(plan.ARGUMENTS, plan.USAGE, plan.HELP).parse(words)
        load_model_config(arguments.model)
    else:
        known, rest = FlagParser(check.ARGUMENTS, check.USAGE, check.HELP).parse_known_args(words)
        arguments = check.CheckArguments(**vars(known))
        check.compared_files(arguments.config, check.flags_of_run(arguments, rest))


Kind = Callable[[random.Random, Place, Path], None]
# The kinds, and their parts of all cases.
KINDS: dict[str, tuple[Kind, float]] = {
    "flags": (fuzz_flags, 0.25),
    "recipes": (fuzz_recipes, 0.2),
    "paths": (fuzz_paths, 0.1),
    "models": (fuzz_models, 0.05),
    "data": (fuzz_data, 0.1),
    "states": (fuzz_states, 0.05),
    "logs": (fuzz_logs, 0.12),
    "init": (fuzz_init, 0.03),
    "verbs": (fuzz_verbs, 0.1),
}
_notes: list[str] = []


def note(*about: object) -> None:
    """Keep what a case is, for its traceback."""
    _notes.append(" ".join(map(str, about)))


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """Variables and folder of the process are restored; a case that hangs is ended."""

    def ring(*_: object) -> None:
        raise Hang

    environment, here = dict(os.environ), Path.cwd()
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        os.environ.clear()
        os.environ.update(environment)
        os.chdir(here)


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


def fuzz(cases: int, seed: int, kinds: tuple[str, ...], place: Place) -> dict[str, collections.Counter[str]]:
    """Run so many cases, in parts of the kinds; the number of each kind's outcomes. Prints what was no good."""
    counts: dict[str, collections.Counter[str]] = {kind: collections.Counter() for kind in kinds}
    total = sum(KINDS[kind][1] for kind in kinds)
    for kind in kinds:
        for number in range(max(1, round(cases * KINDS[kind][1] / total))):
            outcome, about = run_case(kind, number, seed, place)
            counts[kind][outcome] += 1
            if outcome not in ("ok", "refused"):
                print(f"--case {kind}:{number} {outcome}: {' | '.join(_notes)[:1500]}\n{about[-2500:]}")
    return counts


def exit_status(counts: dict[str, collections.Counter[str]]) -> int:
    """1 where anything was no good."""
    return int(any(found[outcome] for found in counts.values() for outcome in OUTCOMES[2:]))


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
    from lisa_dist.text import format_columns

    kind, _, number = (given.case or "").partition(":")
    kinds = (kind,) if kind else tuple(given.kinds.split(","))
    with tempfile.TemporaryDirectory() as folder:
        place = Place(Path(folder))
        if {"logs", "states"} & {*kinds}:
            place.add_run()
        if kind:
            print(*run_case(kind, int(number), given.seed, place), *_notes, sep="\n")
            return
        counts = fuzz(given.cases, given.seed, kinds, place)
    counts["all"] = sum(counts.values(), collections.Counter())
    lines = [[kind, str(found.total()), *(str(found[one]) for one in OUTCOMES)] for kind, found in counts.items()]
    print(format_columns([["kind", "cases", *OUTCOMES], *lines]), flush=True)
    os._exit(exit_status(counts))  # gloo's threads would outlive an exit


if __name__ == "__main__":
    main()

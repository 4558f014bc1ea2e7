"""Commands of README and docs are run in the order of their page, with a tiny model in the place of a large one.

Those of make, pip and benchmarks are looked up; test_examples.py runs examples, test_slurm.py srun and sbatch.
"""

import io
import json
import os
import re
import shlex
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from eval_files import write_benchmarks, write_lines, write_mt_bench
from models import save_tiny_llama
from ranks import OF_RANKS
from runs import ROOT, run_well

from lisa_dist import cli
from lisa_dist.commands import eval as eval_command
from lisa_dist.flags import first_argument_as, task_of
from lisa_dist.run.task_configs import CONFIGS

PAGES = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
PAGES += ["benchmarks/REPORT.md", "benchmarks/cost/GPU.md", "SECURITY.md"]
PAGES += ["examples/README.md", "examples/continued_pretraining/README.md"]
# Looked up alone: test_mt_bench.py starts the first two's program, test_serving.py asks vLLM, and Ollama is not run.
SERVING = (
    "transformers serve path/to/judge",
    "transformers serve runs/1 --port 8000",
    "vllm serve runs/1 --port 8000",
    "ollama create mine -f Modelfile",
)
OF_OTHERS = tuple(command.split()[0] for command in SERVING)
PROGRAMS = ("make", "pip", "python", "deepspeed", "torchrun", "lisa-dist", "tensorboard", *OF_OTHERS)
COMMAND = re.compile(rf"^(?:{'|'.join(PROGRAMS)})\s")
# Every run takes so few steps, of a model that is small enough for CPUs.
SMALL = {"max_steps": "2", "max_length": "64", "per_device_train_batch_size": "2", "gradient_accumulation_steps": "1"}
SMALL |= {"report_to": "none"}
SMALL_LAYERS = 6  # of save_tiny_llama's model
# What a reader has under a name of his own.
THERE = {
    "runs/llama3.1-8b/checkpoint-200": "runs/llama3.1-8b/checkpoint-2",
    "runs/1/checkpoint-100": "runs/llama3.1-8b/checkpoint-2",
    "x.yaml": "recipe.yaml",
    "path/to/config.json": "model_dir/config.json",
    "models/llama2-70b": "llama2-70b",
    "models/llama3.1-8b": "llama3.1-8b",
}
REWARDS = re.compile(r"^```python\n(def reward.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#\s]+)(?:#([^)]*))?\)")


def commands(page: Path) -> list[str]:
    """Commands of code blocks, and of the text where they are whole: with flags or files, and no words to fill in."""
    found = []
    for place in re.finditer(r"^```\w*\n(.*?)^```|`([^`\n]+)`", page.read_text(encoding="utf-8"), re.M | re.S):
        for line in (place[1] or place[2]).replace("\\\n", " ").splitlines():
            line = " ".join(line.split("  #")[0].split())
            mentioned = place[2] and (len(line.split()) < 3 or re.search(r"\b[A-Z_]{4,}\b|\bN\b|\.\.\.|--help", line))
            if COMMAND.match(line) and not mentioned:
                found.append(line)
    return found


FOUND = {page: commands(ROOT / page) for page in PAGES if commands(ROOT / page)}
DONE: set[str] = set()  # pages repeat some


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cpu_ops) -> Path:
    """Where a reader stands: files of the names that the pages use."""
    folder = tmp_path_factory.mktemp("docs")
    save_tiny_llama(folder / "model_dir")
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(200)]
    pairs = [{"prompt": f"{n} + 1? ", "chosen": str(n + 1), "rejected": str(n)} for n in range(50)]
    kto = [{"prompt": f"{n} + 1? ", "completion": str(n + n % 2), "label": bool(n % 2)} for n in range(50)]
    for name, lines in (("rows", rows), ("gsm8k", rows), ("pairs", pairs), ("kto", kto)):
        write_lines(folder / f"{name}.jsonl", lines)
    (folder / "rewards.py").write_text(REWARDS.search((ROOT / "docs" / "tasks.md").read_text())[1])
    alpaca = [{"instruction": f"{n} + 1?", "input": "", "output": str(n + 1)} for n in range(2000)]
    (folder / "alpaca.json").write_text(json.dumps(alpaca))
    (folder / "books").mkdir()
    for name in ("books/one.txt", "text.txt", "my_text.txt"):
        (folder / name).write_text("\n".join(f"line {n} of a book" for n in range(200)))
    write_benchmarks(folder / "data")
    write_mt_bench(folder / "data")
    (folder / "axolotl.yaml").write_text("base_model: org/model\nlisa_n_layers: 2\n")
    recipe = {"model_name_or_path": "MODEL", "dataset_name": "rows.jsonl", "output_dir": "runs/1"}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return folder


def run_flags(words: list[str], folder: Path) -> None:
    """A training run with these flags, small; the launchers themselves are started in test_train.py."""
    flags = [str(ROOT / word) if word.startswith(("launch/", "examples/")) else word for word in words]
    flags = ["--config", "recipe.yaml", *flags[1:]] if flags[:1] == ["..."] else first_argument_as("--config", flags)
    flags = [THERE.get(flag, flag) for flag in flags]
    task = task_of(flags)
    known = {one.name for one in fields(CONFIGS[task])} | {"model_name_or_path"}
    small = SMALL | {"model_name_or_path": str(folder / "model_dir")}
    small |= {"per_device_train_batch_size": "4"} if task == "grpo" else {}
    flags += [word for name, value in small.items() if name in known for word in (f"--{name}", value)]
    recipe = {}
    if "--config" in flags:
        recipe = yaml.safe_load((folder / flags[flags.index("--config") + 1]).read_text())
    if recipe.get("lisa_activated_layers", 0) > SMALL_LAYERS:  # of the large model's
        flags += ["--lisa_activated_layers", str(SMALL_LAYERS)]
    if "--dataset_name" not in flags:
        flags += ["--dataset_name", "rows.jsonl"]
    if "full" not in flags and "lora" not in flags:  # the recipe is of bf16, without masters; other methods need not be
        flags += ["--bf16", "true"]
    if "gpu_memory" not in recipe:
        flags += ["--checkpointed_layers", "none"]  # for auto there is no GPU to ask
    if "--output_dir" not in flags:
        flags += ["--output_dir", "runs/llama3.1-8b"]
    if "--resume_from_checkpoint" not in flags:  # a reader of several pages has folders of his own
        flags += ["--overwrite_output_dir", "true"]
    run_well(flags, folder)


def run_cli(words: list[str], monkeypatch) -> None:
    """A verb of lisa-dist that trains nothing."""
    words = [THERE.get(word, word) for word in words]
    if words[0] == "chat":
        monkeypatch.setattr("sys.stdin", io.StringIO("1 + 1?\n"))
    if words[0] == "convert":
        Path(words[2]).unlink(missing_ok=True)
    if "--recipe" in words:
        Path("recipe.yaml").unlink()  # nothing is written over
    monkeypatch.setattr(cli.sys, "argv", ["lisa-dist", *words])
    cli.main()


def run_eval(words: list[str], monkeypatch) -> None:
    """An evaluation of the tiny model on a few rows of a folder, without test_mt_bench.py's ranks and judge."""
    flags = eval_command.parse(words)
    data = flags.data_dir or "data"  # where a reader has none, the hub's questions
    words = ["eval", "model_dir", "--tasks", flags.tasks, "--data_dir", data, "--max_new_tokens", "4"]
    with monkeypatch.context() as of_this_run:
        for name in OF_RANKS:
            of_this_run.setenv(name, "0")  # for the context to take away what the run sets
            of_this_run.delenv(name)
        of_this_run.setattr(cli.sys, "argv", ["lisa-dist", *words, "--limit", "1"])
        cli.main()


@pytest.mark.xdist_group("docs")  # what a page leaves behind is used by the next
@pytest.mark.full
@pytest.mark.parametrize("page", FOUND)
def test_every_command_of(page, folder, monkeypatch, capsys):
    monkeypatch.chdir(folder)
    makefile, examples = (ROOT / "Makefile").read_text(), (ROOT / "tests" / "system" / "test_examples.py").read_text()
    for command in [command for command in FOUND[page] if command not in DONE]:
        DONE.add(command)
        words = shlex.split(command)
        script = next((word for word in words if word.endswith(".py")), "")
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), command
        elif words[0] == "pip":
            assert words[2] == "-e", command
            known = (".", ".[gpu]", ".[eval]", ".[flash]")  # the Makefile's is another
            assert words[3] in known, command
        elif words[0] == "tensorboard":
            assert words[1:] == ["--logdir", "runs"]
        elif words[:2] == ["lisa-dist", "train"]:
            run_flags(shlex.split(re.sub(r" --gpus \d+", "", command))[2:], folder)
        elif words[:2] == ["lisa-dist", "eval"]:
            run_eval(words[2:], monkeypatch)
        elif words[0] == "lisa-dist":
            run_cli(words[1:], monkeypatch)
        elif script == "launch/train.py":
            run_flags(words[words.index(script) + 1 :], folder)
        elif words[0] in OF_OTHERS:
            assert command in SERVING
        elif script.startswith("llama.cpp/"):
            program = (ROOT / "tests" / "plugins" / "test_serving.py").read_text()
            assert all(f'"{word}"' in program or f"/{word}" in program for word in (script, *words[3::2], words[-1])), (
                command
            )
        elif script.startswith("examples/"):
            assert Path(script).name in examples, f"{command}: no test runs it"
        elif script.startswith("tests/"):  # the campaign: an hour, of which test_architectures.py runs a part
            assert f'"{words[2]}"' in (ROOT / script).read_text(), command
        elif words[0] == "python" and words[2].startswith("benchmarks."):  # each takes minutes
            script = ROOT / f"{words[2].replace('.', '/')}.py"
            common = [ROOT / "benchmarks" / "common" / name for name in ("results.py", "runs.py")]
            text = "".join(path.read_text() for path in (script, *common))
            flags = [word for word in words if word.startswith("--")]
            assert all(f'"{flag}"' in text or f'"{flag[2:]}": ' in text for flag in flags), command
        else:
            assert words[:2] == ["python", "-c"], f"{command}: nothing runs it"
            exec(words[2], {})
    capsys.readouterr()


@pytest.mark.xdist_group("docs")
def test_tests_of_a_group_stay_on_one_worker(request):
    """The suffix is what pytest-xdist goes by; with a pytest that it does not know, there is none and no word of it."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        assert request.node.nodeid.endswith("@docs")


def test_there_are_commands_to_run():
    assert len(FOUND["README.md"]) >= 10
    assert {"checkpoints", "data", "memory", "method"} <= {Path(page).stem for page in FOUND}


@pytest.mark.parametrize("name", [*PAGES, "launch/README.md", "CONTRIBUTING.md"])
def test_links_lead_somewhere(name):
    page = ROOT / name
    for target, anchor in LINK.findall(page.read_text(encoding="utf-8")):
        if target.startswith("http"):
            continue
        path = page.parent / target
        assert path.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name} links to {target}#{anchor}"


def test_code_that_contributing_names_is_there():
    """Files from the root or from lisa_dist, and the class or function that is named after one."""
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    roots = (ROOT, ROOT / "lisa_dist")
    files = re.findall(r"`([\w./]+(?:\.py|/))`", page)
    assert len(files) > 20
    assert [name for name in files if not any((root / name).exists() for root in roots)] == []
    named = re.findall(r"`(\w+/[\w/]+\.py)`,\s+`(?:[A-Z]\w+\.)?(\w+)`", page)
    assert len(named) >= 4  # the step, the switch, the resume, a run
    for file, name in named:
        path = next(root / file for root in roots if (root / file).exists())
        assert re.search(rf"^ *(?:def|class) {name}\b", path.read_text(encoding="utf-8"), re.MULTILINE), (file, name)

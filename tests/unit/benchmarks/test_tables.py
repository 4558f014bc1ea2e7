"""The tables of README and docs are what benchmarks/results says, and benchmarks/REPORT.md has every benchmark."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.tables import index, parts, quality, write
from benchmarks.tables.runs import runs_at_best

ROOT = Path(__file__).parents[3]
PAGES = [path.relative_to(ROOT) for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))]
PAGES.append(Path("benchmarks/REPORT.md"))
MARKED = re.compile(r"^<!-- table: (.*) -->\n((?:\|.*\n)+)<!-- end -->$", re.MULTILINE)
ASKED = {"numel"}  # numbers in results that a table looks its figures up by
ON_PAGES = [(page, found[1]) for page in PAGES for found in MARKED.finditer((ROOT / page).read_text(encoding="utf-8"))]


@pytest.fixture
def copy(tmp_path, capsys) -> Path:
    """Pages, scripts and results, to be changed; the pages are what the results say."""
    for path in (*PAGES, *(path.relative_to(ROOT) for path in (ROOT / "benchmarks").glob("*/*.py"))):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, tmp_path / path)
    shutil.copytree(ROOT / "benchmarks" / "results", tmp_path / "benchmarks" / "results")
    write.main([], tmp_path)
    capsys.readouterr()
    return tmp_path


def check(root: Path, capsys) -> list[str]:
    """What --check names; it says so by its exit status too."""
    before = {page: (root / page).read_bytes() for page in PAGES}
    try:
        write.main(["--check"], root)
        status = 0
    except SystemExit as exit:
        status = exit.code
    named = capsys.readouterr().out.splitlines()
    assert bool(status) == bool(named), status
    assert before == {page: (root / page).read_bytes() for page in PAGES}, "--check writes nothing"
    return named


def names_in(lines: list[str]) -> set[str]:
    """The tables that --check has named, of all pages."""
    return {name for line in lines for name in line.split(": ")[1].split(", ")}


def error_of(root: Path) -> str:
    """What it says of pages or results that no table can be made of, having written nothing."""
    before = {page: (root / page).read_bytes() for page in PAGES}
    with pytest.raises(SystemExit) as stopped:
        write.main([], root)
    assert before == {page: (root / page).read_bytes() for page in PAGES}
    return stopped.value.code


def test_the_pages_are_what_the_results_say(capsys):
    assert check(ROOT, capsys) == [], "python -m benchmarks.tables.write writes them"


def test_every_table_is_on_a_page():
    assert {name for _, name in ON_PAGES} == {*parts.TABLES, "index"}


def change_a_digit(page: Path, name: str) -> None:
    """Of this table of the page: its last one."""
    text = page.read_text(encoding="utf-8")
    marked = next(found for found in MARKED.finditer(text) if found[1] == name)
    at = marked.end(2) - 1 - re.search(r"\d", marked[2][::-1]).start()
    assert text[at].isdigit()
    page.write_text(f"{text[:at]}{(int(text[at]) + 1) % 10}{text[at + 1 :]}", encoding="utf-8")


@pytest.mark.parametrize("at_once", [[one] for one in ON_PAGES[:2]] + [ON_PAGES], ids=["first", "second", "all"])
def test_a_digit_on_a_page(at_once, copy, capsys):
    before = {page: (copy / page).read_bytes() for page in PAGES}
    expected: dict[Path, list[str]] = {}
    for page, name in at_once:
        change_a_digit(copy / page, name)
        expected.setdefault(page, []).append(name)
    named = check(copy, capsys)
    assert sorted(named) == sorted(f"{page}: {', '.join(names)}" for page, names in expected.items())
    write.main([], copy)
    assert before == {page: (copy / page).read_bytes() for page in PAGES}


@pytest.mark.parametrize(
    ("arm", "results", "said"),
    [
        ("full", "quality", "5 of 5"),
        ("lora r16", "quality_smollm2", "adapters"),
        ("lisa 2 as published", "quality_smollm2", "2 of 30"),
        ("lisa in lora's memory", "quality_smollm2", "14 of 30"),
        ("lisa in lora's memory", "quality", "5 of 5: full training with small states"),
        ("lisa in lora's, embed frozen", "quality", "5 of 5"),
        ("lisa modules 14 fixed, embed frozen", "quality_smollm2", "modules of 14 of 30"),
        ("embed and head", "quality", "0 of 5"),
        ("fixed 2", "quality", "2 of 5"),
    ],
)
def test_what_compares_methods_names_the_layers_that_train(arm, results, said):
    assert quality.layers_that_train(arm, parts.Benchmarks(ROOT / "benchmarks").results(results)["figures"]) == said


def test_a_figure_in_the_results(copy, capsys):
    path = copy / "benchmarks" / "results" / "quality.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    runs = results["figures"]["runs"]
    quality.runs_at_best("full", runs)[0]["held_out"] -= 0.001
    path.write_text(json.dumps(results), encoding="utf-8")
    assert {"experiments", "headline_quality"} <= names_in(check(copy, capsys))


def test_no_table_stays_when_all_figures_change(copy, capsys):
    rng = random.Random(0)
    names = {name for _, name in ON_PAGES}

    def changed(value, name=""):
        if isinstance(value, dict):
            return {key: changed(one, key) for key, one in value.items()}
        if isinstance(value, list):
            return [changed(one) for one in value]
        measured = isinstance(value, int | float) and not isinstance(value, bool) and name not in ASKED
        return type(value)(value * rng.uniform(1.5, 2)) if measured else value

    for path in (copy / "benchmarks" / "results").glob("*.json"):
        results = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(results | {"figures": changed(results["figures"])}), encoding="utf-8")
    assert names_in(check(copy, capsys)) == names - {"index"}, "the index has links alone"


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("<!-- table: nothing -->\n<!-- end -->\n", "README.md: there is no table nothing; there are "),
        ("<!-- table: zero_switch -->\n| 1 |\n", "README.md: the table zero_switch has no <!-- end -->."),
        (
            "<!-- table: zero_switch -->\n<!-- table: norms_ends -->\n<!-- end -->\n",
            "the table zero_switch has no <!-- ",
        ),
        ("<!-- table:zero_switch -->\n<!-- end -->\n", "README.md: there is an <!-- end --> that no line "),
    ],
)
def test_what_a_page_may_not_have(added, said, copy):
    with (copy / "README.md").open("a", encoding="utf-8") as page:
        page.write(added)
    assert said in error_of(copy)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "benchmarks/REPORT.md: table kernels_forms: there is no benchmarks/results/forms.json."),
        ("{", "benchmarks/results/forms.json is no JSON ("),
        ('{"figures": {}}', "table kernels_forms: its results have another shape than it reads (KeyError("),
        ('{"figures": [1]}', "table kernels_forms: its results have another shape than it reads (TypeError("),
        (
            '{"figures": {"fp32, torch AdamW": 1}}',
            "table kernels_forms: its results have another shape than it reads (",
        ),
    ],
)
def test_results_that_no_table_can_be_made_of(text, said, copy):
    path = copy / "benchmarks" / "results" / "forms.json"
    if text is None:
        path.unlink()
    else:
        path.write_text(text)
    assert said in error_of(copy)


@pytest.mark.parametrize(
    ("name", "broken"), [("speed", []), ("speed", {"zero1": {"full": {"steps": []}}}), ("switch", []), ("memory", {})]
)
def test_figures_of_another_shape_are_named(name, broken, copy):
    path = copy / "benchmarks" / "results" / f"{name}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"figures": broken}))
    assert "its results have another shape than it reads (" in error_of(copy)


@pytest.mark.parametrize(
    ("script", "figures", "said"),
    [
        ("gpu_correct", {"kernels": "-", "checks": {"a": {"passed": True}, "b": {"passed": False}}}, "1 of 2 checks "),
        ("gpu_train", dict.fromkeys(("planned", "measured", "allocated", "reserved", "tokens_per_second"), 2**30)
         | {"num_alloc_retries": 3}, "GiB planned 1.00, measured 1.00, allocated 1.00, reserved 1.00; 3 retries"),
        ("gpu_ranks", {"ranks": 2, "arms": {"zero2": {"step": 0.5}, "zero3": {"not_run": ""}}}, "GPUs: zero2 0.500 s"),
    ],
)  # fmt: skip
def test_what_other_scripts_for_gpus_gave_is_told(script, figures, said):
    assert said in index.sentence(script, figures)


def test_runs_that_are_not_there(copy):
    for name, table, said in (
        ("quality", "headline_quality", "the results of quality.py have no run of full"),
        ("choosing", "choosing_gamma", "choosing.json has no run {"),
    ):
        path = copy / "benchmarks" / "results" / f"{name}.json"
        results = json.loads(path.read_text(encoding="utf-8"))
        runs = results["figures"]["runs"] if name == "quality" else results["figures"]
        for key in [key for key in runs if "full" in key or "lisa_activated_layers" in key]:
            del runs[key]
        path.write_text(json.dumps(results), encoding="utf-8")
        with pytest.raises(parts.TableError, match=f"table {table}: {re.escape(said)}"):
            write.make(table, parts.Benchmarks(copy / "benchmarks"))


def test_the_index_has_every_script_and_every_result():
    folder = ROOT / "benchmarks"
    (rows,) = (found[2] for found in MARKED.finditer((folder / "REPORT.md").read_text("utf-8")) if found[1] == "index")
    links = re.findall(r"\]\(([^)]+)\)", rows)
    paths = [path for room in ("cost", "quality") for path in (folder / room).glob("*.py")]
    scripts = {f"{path.parent.name}/{path.name}" for path in paths if "__main__" in path.read_text(encoding="utf-8")}
    assert len(scripts) > 10
    assert sorted(links) == sorted([*scripts, *(f"results/{path.name}" for path in folder.glob("results/*.json"))])


def test_a_new_benchmark_in_the_index(copy):
    folder = copy / "benchmarks"
    (folder / "cost" / "new.py").write_text('"""What is new? Nothing.\n\nMore of it.\n"""\ndef main(): pass\n')
    write.main([], copy)
    about = "| [new](cost/new.py) | What is new? Nothing. |"
    assert f"{about} not run yet | |\n" in (folder / "REPORT.md").read_text()
    results = {"command": "python -m benchmarks.cost.new", "machine": "m", "device": "a GPU", "figures": {}}
    for name in ("new_gpu", "new"):
        (folder / "results" / f"{name}.json").write_text(json.dumps(results))
    write.main([], copy)
    links = "[new](results/new.json), [new_gpu](results/new_gpu.json)"
    assert f"{about} {links} | a GPU |\n" in (folder / "REPORT.md").read_text()


def test_the_table_of_importance_is_of_ranks():
    """Equal values share a rank; a measure that orders sets as their losses do has 1, the other way round -1."""
    assert quality.ranks([3.0, 1.0, 3.0, 2.0]) == [2.5, 0.0, 2.5, 1.0]
    fixed = {"0,1, seed 0": 3.0, "0,1, seed 1": 2.0, "0,2, seed 0": 1.9, "0,2, seed 1": 2.1, "1,2, seed 0": 1.0}
    measures = {"like it": [1.0, 2.0, 5.0], "against it": [2.0, 1.0, 0.5], "neither": [1.0, 1.0, 1.25]}
    _, *lines = quality.importance_table({"fixed": fixed, "measures": measures})
    assert lines[:2] == [["like it", "+1.00"], ["against it", "-1.00"]]
    assert lines[2][1] == "+0.87"  # ranks 0, 1.5, 1.5 with 0, 1, 2


def test_tables_of_quality():
    """The best rate is that of the first seed; steps and right answers have columns where every arm has some."""
    run = {"token_accuracy": 0.5, "seconds_per_step": 0.1, "peak_bytes": 2**30, "solved": None, "steps": 431}
    losses = {"full, 0.004, seed 0": 1.2, "full, 0.004, seed 1": 1.4, "full, 0.002, seed 0": 1.3}
    losses |= {"full, 0.002, seed 1": 1.0, "lisa 2 K 5, 0.032, seed 0": 1.1}
    figures = {"settings": {}, "runs": {key: run | {"held_out": loss} for key, loss in losses.items()}}
    header, *lines = quality.quality_table(figures, ["full", "lisa 2 K 5"])
    assert lines == [
        ["LISA, gamma 2, K 5", "2 of all", "3.2e-2", "1.1000", "one seed", "50.0%"],
        ["full", "all", "4e-3", "1.3000", "0.1414", "50.0%"],
    ]
    figures["settings"] = {"seconds": 60.0, "gpu": True}
    figures["runs"]["full, 0.004, seed 1"] |= {"solved": 0.25, "steps": 433, "peak_bytes": 2**31}
    with_costs, *lines = quality.quality_table(figures, ["full", "lisa 2 K 5"])
    assert with_costs == [*header, "steps", "s a step", "GiB at the peak"]
    assert [row[6:] for row in lines] == [["431", "0.100", "1.00"], ["432", "0.100", "2.00"]]
    figures["runs"]["lisa 2 K 5, 0.032, seed 0"]["solved"] = 0.5
    with_all, *lines = quality.quality_table(figures, ["full", "lisa 2 K 5"])
    assert with_all == [*header, "answers right", "steps", "s a step", "GiB at the peak"]
    assert [row[6] for row in lines] == ["50.0%", "25.0%"]


def test_seeds_that_a_cut_sweep_has_left_out_are_no_error():
    """Two processes may have ended seeds 0 and 2, and not 1."""
    figures = {f"full, 0.004, seed {seed}": {"held_out": float(seed)} for seed in (0, 2)}
    assert [run["held_out"] for run in runs_at_best("full", figures)] == [0.0, 2.0]


def test_the_claim_of_the_readme_is_what_its_table_says():
    """The one figure of losses in prose: the gap to full training with as many layers as fit."""
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    rows = next(found[2] for found in MARKED.finditer(page) if found[1] == "headline_quality").splitlines()
    cells = {row.split(" | ")[0].strip("| "): row.split(" | ")[1:] for row in rows}
    (fitted,) = (name for name in cells if name.startswith("LISA, as many layers as fit"))
    gaps = [float(re.match(r"[\d.]+", one)[0]) - float(re.match(r"[\d.]+", full)[0])
            for one, full in zip(cells[fitted], cells["full training"], strict=True)]  # fmt: skip
    assert len(gaps) == 4
    claimed = re.search(r"LISA was within ([\d.]+) of full training's held-out loss on every\s+task", page)
    assert max(gaps) <= float(claimed[1])

"""The tables of README and docs are what benchmarks/results says, and benchmarks/REPORT.md has every benchmark."""

import json
import random
import re
import shutil
from pathlib import Path

import pytest
from matplotlib.image import imread

from benchmarks.cost import policies
from benchmarks.tables import pictures, rows, write
from benchmarks.tables.outcomes import key_of
from benchmarks.tables.render import Benchmarks, TableError
from benchmarks.tables.rows import TABLES

ROOT = Path(__file__).parents[3]
PAGES = [path.relative_to(ROOT) for pattern in write.PAGES for path in sorted(ROOT.glob(pattern))]
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
    assert {name for _, name in ON_PAGES} == {*TABLES, "index"}


def change_a_digit(page: Path, name: str) -> None:
    """Change the last digit of this table of the page."""
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


def test_a_figure_in_the_results(copy, capsys):
    path = copy / "benchmarks" / "results" / "decision.json"
    results = json.loads(path.read_text(encoding="utf-8"))
    results["figures"]["methods"]["full"]["tasks"]["stories_gsm8k"]["losses"][0] -= 0.01
    path.write_text(json.dumps(results), encoding="utf-8")
    assert names_in(check(copy, capsys)) == {"grid", "headline_quality"}


def test_no_table_stays_when_all_figures_change(copy, capsys):
    rng = random.Random(0)

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
    assert names_in(check(copy, capsys)) == {name for _, name in ON_PAGES} - {"index"}


SWITCH = "<!-- table: zero_switch -->\n"


@pytest.mark.parametrize(
    ("added", "said"),
    [
        ("<!-- table: nothing -->\n<!-- end -->\n", "README.md: there is no table nothing; there are "),
        (f"{SWITCH}| 1 |\n", "README.md: the table zero_switch has no <!-- end -->."),
        (f"{SWITCH}<!-- table: norms_ends -->\n<!-- end -->\n", "the table zero_switch has no <!-- "),
        ("<!-- table:zero_switch -->\n<!-- end -->\n", "README.md: there is an <!-- end --> that no line "),
    ],
)
def test_what_a_page_may_not_have(added, said, copy):
    with (copy / "README.md").open("a", encoding="utf-8") as page:
        page.write(added)
    assert said in error_of(copy)


def test_results_that_are_not_there(copy):
    (copy / "benchmarks" / "results" / "decision.json").unlink()
    with pytest.raises(TableError, match="table grid: its results are missing"):
        write.make("grid", Benchmarks(copy / "benchmarks"))


def test_every_picture_of_the_pages_is_drawn_from_results(tmp_path):
    """But the one that docs/draw_architecture.py draws."""
    shown = {name for page in PAGES for name in re.findall(r"!\[.*\]\((?:.*/)?(.*\.png)\)", (ROOT / page).read_text())}
    assert shown == set(pictures.PICTURES) == {path.name for path in (ROOT / "docs").glob("*.png")}
    for name, (results, draw) in pictures.PICTURES.items():
        benchmarks = Benchmarks(ROOT / "benchmarks")
        draw(*(benchmarks.results(one)["figures"] for one in results), path=tmp_path / name)
        assert (imread(tmp_path / name)[..., :3].min(axis=2) < 0.9).mean() > 0.01, name


def test_rows_of_policies_are_those_of_their_script():
    rows = Benchmarks(ROOT / "benchmarks").results("policies")["figures"]["rows"]
    assert [row[0] for row in rows] == [name for name, *_ in policies.POLICIES]
    peaks = {name: row for name, *row in rows}
    ascending = ("QLoRA,", "LoRA, rank 16", "adapters, rank 16", "LoRA, embed and head", "full training")
    names = [next(name for name in peaks if name.startswith(beginning)) for beginning in ascending]
    for one in zip(*(peaks[name] for name in names), strict=True):
        assert list(one) == sorted(one)


def test_the_index_has_every_script_and_every_result():
    folder = ROOT / "benchmarks"
    (index,) = (found[2] for found in MARKED.finditer((folder / "REPORT.md").read_text("utf-8")) if found[1] == "index")
    links = re.findall(r"\]\(([^)]+)\)", index)
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
    row = "[new](results/new.json), [new_gpu](results/new_gpu.json) | a GPU |\n"
    assert f"{about} {row}" in (folder / "REPORT.md").read_text()
    (folder / "cost" / "new.py").unlink()
    write.main([], copy)
    assert f"| new | measured once, by a script that is gone | {row}" in (folder / "REPORT.md").read_text()


def test_a_table_on_another_page(copy, capsys):
    """Its marks are found wherever they stand."""
    page, other = copy / "benchmarks" / "REPORT.md", copy / "docs" / "kernels.md"
    marked = next(found for found in MARKED.finditer(page.read_text()) if found[1] == "kernels_adamw")
    page.write_text(page.read_text().replace(marked[0], ""))
    other.write_text("<!-- table: kernels_adamw -->\n<!-- end -->\n")
    write.main([], copy)
    assert other.read_text() == marked[0] + "\n"


def test_front_has_the_points_that_no_other_is_below_and_left_of():
    points = [(1.0, 5.0), (2.0, 4.0), (2.0, 6.0), (3.0, 4.0), (4.0, 1.0)]
    assert pictures.front_of(points) == [(1.0, 5.0), (2.0, 4.0), (4.0, 1.0)]


def test_tables_of_test_losses_and_of_rates():
    """The rate is chosen by the validation loss of the first seed; differences are paired by seed."""

    def runs(method: str, losses: dict[tuple[int, int], tuple[float, float]]) -> dict:
        return {
            key_of(method, rung, seed): {"validation": validation, "test": test}
            for (rung, seed), (validation, test) in losses.items()
        }

    lora = runs("lora 16", {(2, 0): (1.0, 1.5), (2, 1): (1.1, 1.7), (3, 0): (1.3, 1.2)})
    sampled = runs("sampled 1/3, ends", {(1, 0): (0.9, 1.3), (1, 1): (0.8, 1.4)})
    tasks = {"runs": lora | sampled}, {"runs": runs("lora 16", {(0, 0): (1.0, 2.0)})}
    names = {"lora 16": "LoRA", "sampled 1/3, ends": "LISA"}
    assert list(rows.test_losses({"baseline": "lora 16", "methods": names}, *tasks)) == [
        ("LoRA", "1.600 ± 0.100", "2.000"),
        ("LISA", "1.350 ± 0.050 (-0.250 ± 0.050)", "-"),
    ]
    assert list(rows.best_rates(names, *tasks)) == [("LoRA", 4e-3, 1e-3), ("LISA", 2e-3, None)]

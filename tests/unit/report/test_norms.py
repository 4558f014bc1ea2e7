"""`lisa-dist norms`: the norms of runs side by side, and what it says of files that have none."""

import json
import re
from pathlib import Path

import pytest
from matplotlib.colors import to_rgb
from matplotlib.image import imread

from lisa_dist import cli
from lisa_dist.run_folder import NORMS, PRODUCT

GOOD = "block,weight_norm,update_norm,moved_norm\nembed,50,0.1,1\nlayers.0,2,0.5,2\nlayers.1,4,0.7,3\nrest,1,0,0\n"
LORA = (
    "block,weight_norm,update_norm,moved_norm,product_norm\nembed,50,0,0,0\nlayers.0,2,0.25,2,1.5\n"
    "layers.1,4,0.35,3,2.5\nhead,40,7,8,9\nrest,1,0,0,0\n"
)


def call(monkeypatch, *words) -> None:
    monkeypatch.setattr(cli.sys, "argv", ["lisa-dist", "norms", *map(str, words)])
    cli.main()


def leave(folder: Path, text: str, method: str | None = None) -> Path:
    folder.mkdir(parents=True)
    (folder / "lisa_norms.csv").write_text(text)
    if method:
        (folder / "lisa_run.json").write_text(json.dumps({"method": method}))
    return folder


def test_runs_side_by_side(tmp_path, monkeypatch, capsys):
    full, lora = leave(tmp_path / "a=1", GOOD, "full"), leave(tmp_path / "b", LORA, "lora")
    leave(tmp_path / "c", GOOD)
    words = [full, lora, f"wide={lora}", tmp_path / "b" / "lisa_norms.csv", tmp_path / "c"]
    call(monkeypatch, *words, "--out", tmp_path / "out")
    lines = (tmp_path / "out" / "norms.csv").read_text().splitlines()
    of_lora = [f"{label}.{name}" for label in ("lora", "wide", "lora_2") for name in (*NORMS, PRODUCT)]
    of_full = [f"{label}.{name}" for label in ("full", "c") for name in NORMS]
    assert lines[0] == ",".join(["block", *of_full[:3], *of_lora, *of_full[3:]])
    assert lines[2] == "layers.0," + ",".join(["2.0,0.5,2.0", *["2.0,0.25,2.0,1.5"] * 3, "2.0,0.5,2.0"])
    assert lines[4] == "head," + ",".join([",,", *["40.0,7.0,8.0,9.0"] * 3, ",,"])
    assert [line.split(",")[0] for line in lines[1:]] == ["embed", "layers.0", "layers.1", "head", "rest"]
    said = capsys.readouterr().out
    assert re.search(r"^weight norm w\(l\) +full +50 +3 +- +16\.7 +-$", said, re.M)
    assert re.search(r"^update of a step +wide +0 +0\.3 +7 +0 +23\.3$", said, re.M)
    assert re.search(r"^adapter product +lora_2 +0 +2 +9 +0 +4\.5$", said, re.M)
    assert f"wrote {tmp_path / 'out' / 'norms.csv'}" in said


def test_the_figure_has_every_run_in_every_panel(tmp_path, monkeypatch):
    runs = leave(tmp_path / "a", GOOD, "full"), leave(tmp_path / "b", LORA, "lora")
    call(monkeypatch, *runs, "--out", tmp_path / "out")
    picture = imread(tmp_path / "out" / "norms.png")[..., :3]
    assert picture.shape[:2] == (960, 1440)
    below = 60  # the legend, which has the colours too
    rows, columns = (slice(below, 500), slice(500, None)), (slice(720), slice(720, None))
    panels = [picture[row, column] for row in rows for column in columns]
    seen = [
        [int((abs(panel - to_rgb(colour)) < 0.02).all(axis=2).sum()) for panel in panels] for colour in ("C0", "C1")
    ]
    # The weights of both are the same, so that only the last can be seen, and one has no adapters.
    assert [count > 200 for count in seen[0]] == [False, True, True, False]
    assert [count > 200 for count in seen[1]] == [True] * 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty; give the lisa_norms.csv of a run that was trained with --layer_norms 1."),
        ("layer,norm\n0,1\n", "begins with 'layer,norm', not with block,weight_norm,update_norm,moved_norm"),
        (GOOD.splitlines()[0] + "\n", "has no decoder layer; give"),
        (GOOD.replace("50,", ""), "line 2 does not have 3 numbers"),
        (GOOD.replace("50,", "many,"), "line 2 does not have 3 numbers"),
        (GOOD.replace("50,", "nan,"), "line 2 has a norm that is negative or not finite"),
        (GOOD.replace("layers.1", "layers.0"), "line 4 begins with 'layers.0', which is not a block, or is repeated"),
        (GOOD.replace("layers.1", "layer 1"), "line 4 begins with 'layer 1', which is not a block"),
        ("\n", "is empty"),
        (GOOD.replace("layers.1,4,0.7,3\n", ""), "1 decoder layers, but 2 in"),
        (None, "there is no lisa_norms.csv in"),
    ],
)
def test_bad_input_is_named(tmp_path, monkeypatch, capsys, text, said):
    good, bad = leave(tmp_path / "good", GOOD, "full"), tmp_path / "bad"
    bad.mkdir() if text is None else leave(bad, text)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, good, bad, "--out", tmp_path / "out")
    assert ended.value.code == 2
    line = capsys.readouterr().out
    assert line.startswith("lisa-dist norms: ")
    assert str(bad) in line
    assert said in line
    assert len(line.splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_bad_words_are_named(tmp_path, monkeypatch, capsys):
    run = leave(tmp_path / "run", GOOD, "full")
    (tmp_path / "file").write_text("")
    broken = leave(tmp_path / "broken", GOOD)
    (broken / "lisa_run.json").write_text("{")
    for words, said in (
        ([run], "the following arguments are required: --out"),
        (["--out", tmp_path], "the following arguments are required: RUN"),
        ([f"a/b={run}", "--out", tmp_path], "a label may contain letters, digits, _ and - only"),
        ([f"a={run}", f"a={run}", "--out", tmp_path], "the label a is given twice"),
        ([tmp_path / "nowhere", "--out", tmp_path], "nowhere: no such file or folder."),
        ([tmp_path, "--out", tmp_path], "there is no lisa_norms.csv in"),
        ([tmp_path / "no.csv", "--out", tmp_path], "no.csv: no such file or folder."),
        ([broken, "--out", tmp_path], "lisa_run.json: cannot be read"),
        ([run, "--out", tmp_path / "file"], "cannot be written"),
    ):
        with pytest.raises(SystemExit) as ended:
            call(monkeypatch, *words)
        assert ended.value.code == 2
        assert said in capsys.readouterr().out

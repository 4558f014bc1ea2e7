"""The report of a run: what is in it, and that a browser shows it."""

import html
import json
import os
import re
import shutil
import subprocess
import threading
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path

import numpy
import pytest
from matplotlib.image import imread
from models import save_tiny_llama
from ranks import PATIENCE
from runs import check_run, flags_for, on_two_ranks

from lisa_dist import cli
from lisa_dist.commands.report import main
from lisa_dist.errors import UserError
from lisa_dist.report.html import as_svg, title_of, write_report
from lisa_dist.report.plots import BLUE, ORANGE, PLOTS, THEMES, plot_of_runs, plot_visits, with_style
from lisa_dist.report.run_files import RunFiles, read_run
from lisa_dist.report.serve import server_of
from lisa_dist.run_folder import STEPS_NAME, hide_secrets, without_secrets, write_run

ALL = ["loss", "layers", "visits", "movement", "learning_rate", "gradient_norm", "memory", "speed"]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Where the pictures are on a page of some width, and how wide it would like to be.
WRAPPER = """<body style="margin:0"><iframe src="report.html" style="border:0;width:{width}px;height:6000px"></iframe>
<pre id="found"></pre><script>
document.querySelector("iframe").onload = event => {{
  const page = event.target.contentDocument;
  const boxes = [...page.querySelectorAll("figure")].map(figure => {{
    const box = [...figure.querySelectorAll("svg")].find(svg => svg.clientWidth).getBoundingClientRect();
    return [figure.ariaLabel, box.x, box.y, box.width, box.height];
  }});
  const pointed = page.querySelector("figure[data-points]"), box = pointed.getBoundingClientRect();
  const at = {{clientX: box.x + box.width / 2, clientY: box.y + 10}};
  pointed.dispatchEvent(new page.defaultView.PointerEvent("pointermove", at));
  const tip = pointed.querySelector("output").textContent;
  const found = {{boxes, tip, width: page.documentElement.scrollWidth, requests: page.defaultView.performance
    .getEntriesByType("resource").map(entry => entry.name).filter(name => !name.startsWith("data:"))}};
  document.getElementById("found").textContent = JSON.stringify(found);
}};
</script></body>"""


pytestmark = pytest.mark.xdist_group("report")  # one run


@pytest.fixture(scope="module")
def folder(tmp_path_factory, cpu_ops) -> Path:
    """The output of a run on two ranks: 60 steps in 12 periods."""
    folder = tmp_path_factory.mktemp("report")
    save_tiny_llama(folder / "model")
    rows = [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(64)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {"max_steps": 60, "eval_steps": 20, "lisa_interval_steps": 5, "save_strategy": "steps", "save_steps": 40}
    changes |= {"deepspeed": "zero1", "optim": "adamw_8bit", "report_to": "tensorboard"}
    said = on_two_ranks(flags_for(folder, folder / "out", **changes), folder, report=True)
    check_run(said, folder / "out", list(range(0, 60, 5)))
    assert len(re.findall(r"^step \d+/60 .*  loss .* tokens/s .* left$", said, re.M)) == 60
    return folder / "out"


@pytest.fixture
def out(folder, tmp_path) -> Path:
    """A copy of it."""
    return shutil.copytree(folder, tmp_path / "out")


def test_a_link_in_the_place_of_a_plot_is_replaced(out, tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    (out / "report" / "loss.png").unlink()
    (out / "report" / "loss.png").symlink_to(precious)
    write_report(out)
    assert precious.read_text() == "mine"
    assert imread(out / "report" / "loss.png").size > 0


def test_the_report_has_all_of_the_run(folder):
    page = (folder / "report.html").read_text()
    assert re.findall(r'<section id="(\w+)">', page) == [*ALL, "data", "settings"]
    assert not re.findall(r'(?:src|href|srcset)="(?!data:|#)', page), "it needs nothing but itself"
    assert "{{" not in page
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    held_out = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    for said in (
        f"{held_out[0]:.4f} → {held_out[-1]:.4f}",
        "lisa-dist train --gpus 2 --model_name_or_path",
        "<th>--lisa_interval_steps</th><td>5</td>",
        "<th>deepspeed</th>",
        "question_answer (question, answer), 64 examples",
        "\n&gt; ",
    ):
        assert said in page, said
    for name in ALL:
        picture = imread(folder / "report" / f"{name}.png")[..., :3]
        assert picture.shape[1] > 1000
        coloured = (picture.max(axis=2) - picture.min(axis=2) > 0.3).mean()
        assert 0.002 < coloured < 0.9, f"{name}: no line and no bar"


def test_logs_have_what_the_report_shows(folder):
    assert list((folder / "runs").glob("*/events.out.tfevents.*")), "TensorBoard's"
    history = [entry for entry in read_run(folder).log if "loss" in entry]
    assert all(entry["tokens_per_second"] > 0 and entry["memory_bytes"] > 2**27 for entry in history)
    periods = read_run(folder).periods
    for entry in history[10:]:
        period = periods[(entry["step"] - 1) // 5]
        active = [entry[f"lisa/active_layers/layer_{layer:02d}"] for layer in range(6)]
        assert active == [int(layer in period["layers"]) for layer in range(6)], entry["step"]
        before = periods[(entry["step"] - 1) // 5 - 1]
        for name in ["embed", *(f"layer_{layer:02d}" for layer in before["layers"])]:
            assert entry[f"lisa/update_norm/{name}"] > 0


@pytest.mark.full
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
@pytest.mark.parametrize("width", [1280, 375])
def test_a_browser_shows_every_plot(folder, tmp_path, width):
    shutil.copy(folder / "report.html", tmp_path)
    (tmp_path / "page.html").write_text(WRAPPER.format(width=width))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    options += [f"--user-data-dir={tmp_path / 'browser'}", "--virtual-time-budget=10000", "--window-size=1280,6000"]
    address = (tmp_path / "page.html").as_uri()
    command = [BROWSER, *options, f"--screenshot={tmp_path / 'shot.png'}", "--force-device-scale-factor=1", address]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    asked = subprocess.run(
        [BROWSER, *options, "--dump-dom", address], check=True, capture_output=True, timeout=PATIENCE
    )
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', asked.stdout.decode())[1].replace("&gt;", ">"))
    assert found["width"] <= width, "it has to be scrolled sideways"
    assert found["requests"] == []
    assert re.fullmatch(r"training [\d.]+ at \d+, training, smoothed .* at \d+, held out [\d.]+ at \d+", found["tip"])
    assert [title for title, *_ in found["boxes"]] == [title for _, title, *_ in PLOTS]
    shot = imread(tmp_path / "shot.png")[..., :3]
    for title, x, y, box_width, box_height in found["boxes"]:
        assert box_width > 0.8 * min(width, 960), title
        plot = shot[round(y) : round(y + box_height), round(x) : round(x + box_width)]
        saturation = plot.max(axis=2) - plot.min(axis=2)
        assert (saturation > 0.3).mean() > 0.002, f"{title}: no line and no bar"
        assert (plot.min(axis=2) < 0.6).any(axis=1).mean() > 0.3, f"{title}: nothing is written on it"


def test_a_run_that_was_cut_has_the_report_of_its_checkpoint(out, tmp_path):
    for name in ("trainer_state.json", "report.html", "lisa_memory.json"):
        (out / name).unlink()
    main(str(out))
    found = re.findall(r'<section id="(\w+)">', (out / "report.html").read_text())
    assert found == [name for name in [*ALL, "data", "settings"] if name != "memory"]
    assert read_run(out).last_step == 60  # save_steps 40, and the last step
    # Of a run that ended, went on and was cut again, the checkpoint is the newer one.
    older = json.loads((out / "checkpoint-60" / "trainer_state.json").read_text())
    older["log_history"] = older["log_history"][:5]
    (out / "trainer_state.json").write_text(json.dumps(older))
    os.utime(out / "trainer_state.json", (0, 0))
    assert read_run(out).last_step == 60

    (out / "lisa_run.json").write_text("{")
    with pytest.raises(ValueError, match=r"lisa_run\.json: cannot be read"):
        write_report(out)
    with pytest.raises(ValueError, match=r"no trainer_state\.json in it"):
        write_report(tmp_path)


def test_what_another_run_left_is_no_part_of_a_new_one(out):
    first = read_run(out).run
    (out / "lisa_norms.csv").touch()
    write_run(out, {"began": "now", "command": "lisa-dist train more", "method": "lisa"}, resumes=True)
    resumed = read_run(out)
    assert resumed.run["began"] == first["began"]
    assert resumed.run["resumed"] == [{"began": "now", "command": "lisa-dist train more"}]
    assert resumed.periods
    assert (out / "lisa_norms.csv").exists()
    page = write_report(out).read_text()
    assert "lisa-dist train --gpus 2" in page
    assert "# resumed now\nlisa-dist train more" in page
    assert "time since the last resume" in page
    rate = {"--learning_rate": 3e-3, "--resume_from_checkpoint": "true"}
    again = {"began": "later", "command": "lisa-dist train again", "method": "lisa", "flags": first["flags"] | rate}
    (out / "lisa_run.json").write_text(json.dumps(first))
    write_run(out, again, resumes=True)
    then = first["flags"]["--learning_rate"]
    assert read_run(out).run["resumed"][0]["before"] == {"--learning_rate": then}
    page = write_report(out).read_text()
    assert f"<th>--learning_rate</th><td>{then:g}; 0.003 since later</td>" in page
    write_run(out, {"began": "now", "method": "full"})
    assert not (out / "lisa_norms.csv").exists()
    with pytest.raises(UserError, match=r"there is no trainer_state\.json in it or in a checkpoint of it"):
        read_run(out)
    (out / "trainer_state.json").write_text('{"log_history": []}')
    assert not read_run(out).periods
    assert read_run(out).memory is None


SECRETS = (
    "token hub_token api_key apiKey OPENAI_API_KEY password client_secret secret-key accessToken clientSecret passwd"
)


def test_secrets_are_left_out():
    words = ["--hub_token", "hf_secret", "--max_steps", "3", "--push_to_hub_token=hf_secret"]
    assert without_secrets(words) == ["--hub_token", "***", "--max_steps", "3", "--push_to_hub_token=***"]
    given, left = (json.dumps({"token": word, "revision": "main"}) for word in ("hf_secret", "***"))
    words = ["--model_init_kwargs", given, f"--model_init_kwargs={given}", "--run_name", "hf_" + 30 * "a"]
    assert without_secrets(words) == ["--model_init_kwargs", left, f"--model_init_kwargs={left}", "--run_name", "***"]
    plain = ["--eos_token", "<|im_end|>", "--average_tokens_across_devices", "true", "--chat={% if a %}", '{"b":1}']
    assert without_secrets(plain) == plain, "the command that repeats the run"
    for name in SECRETS.split():
        assert hide_secrets({"a": [{name: "mine"}], "n": 3}) == {"a": [{name: "***"}], "n": 3}, name
        assert hide_secrets(json.dumps([{name: "mine"}])) == json.dumps([{name: "***"}]), name
    plain = {"token": None, "use_auth_token": True, "pad_token": "<pad>", "max_tokens": "8", "tokenizer": "a"}
    plain |= {"eosToken": "<e>", "keys": ["k"], "path": "task-hf_x/sk-1"}
    assert hide_secrets(plain) == plain


def test_charts_have_the_page_s_ground_and_legends_beside_bars():
    figure = with_style(lambda figure: plot_visits(long_run(), figure), narrow=True)
    (axes,) = figure.axes
    figure.draw_without_rendering()
    assert axes.get_legend().get_window_extent().y0 >= axes.get_window_extent().y1 - 1
    svg = as_svg(figure, "visits")
    assert svg.startswith("<svg")
    assert "#ffffff" not in svg, "a ground of its own, on which a dark page has light text"
    colors = set(re.findall(r"var\(--c[0-9a-f]{6}, (#[0-9a-f]{6})\)", svg))
    assert {BLUE, ORANGE} < colors <= THEMES.keys()
    assert not re.findall(r"[:(] ?#[0-9a-f]{6}", re.sub(r"var\(.*?\)", "", svg)), "every color is the page's"
    assert set(re.findall(r'(?:id="|href="#|url\(#)(\w+)-', svg)) == {"visits"}


def test_the_name_of_a_run_is_no_markup():
    name = "--><script>alert(1)</script>"
    run = RunFiles(Path(), {}, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}])
    svg = as_svg(with_style(lambda figure: plot_of_runs({name: run}, "loss", False, figure)), "loss")
    assert "script" not in svg
    assert "legend" in svg


def long_run() -> RunFiles:
    """100,000 steps in 5,000 periods of a model of 80 layers."""
    draws, constant = numpy.random.default_rng(0), {"learning_rate": 1e-5, "tokens_per_second": 1e4}
    log = [
        {"step": step, "loss": 2 + draws.random(), "grad_norm": draws.random()} | constant
        for step in range(10, 100_001, 10)
    ]
    drawn = [draws.choice(80, 2, replace=False).tolist() for _ in range(5000)]
    periods = [{"step": 20 * n, "layers": layers, "blocks": ["embed", "head"]} for n, layers in enumerate(drawn)]
    movement = [{"period": 0, "step": 20, "blocks": {"embed": {"relative": 0.1}, "layers.79": {"relative": 0.2}}}]
    return RunFiles(Path(), {"num_layers": 80}, log, periods, movement)


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("name", [name for name in ALL if name != "memory"])
def test_a_long_run_of_a_large_model_can_be_drawn(name, narrow):
    plot = next(plot for one, _, _, plot, _ in PLOTS if one == name)
    figure = with_style(lambda figure: plot(long_run(), figure), narrow)
    assert len(as_svg(figure, name)) < 700_000
    figure.canvas.draw()
    axes = figure.axes[0]
    assert all(len(line.get_xdata()) <= 2000 for line in axes.lines)
    assert len(axes.patches) <= 100
    for axis in (axes.xaxis, axes.yaxis):
        labels = [label.get_window_extent() for label in axis.get_ticklabels() if label.get_text()]
        assert not any(one.overlaps(following) for one, following in pairwise(labels))


def test_a_run_of_full_training_has_no_plots_of_lisa():
    run = RunFiles(Path(), {"num_layers": 6}, [{"step": 1, "loss": 2.0, "learning_rate": 1e-5}])
    drawn = [name for name, _, _, plot, _ in PLOTS if with_style(lambda figure: plot(run, figure)).axes]  # noqa: B023
    assert drawn == ["loss", "learning_rate"]


def test_the_norm_of_a_step_that_was_left_out_is_no_damage(out):
    state = json.loads((out / "trainer_state.json").read_text())
    losses = [entry for entry in state["log_history"] if "grad_norm" in entry]
    losses[3]["grad_norm"] = float("nan")
    (out / "trainer_state.json").write_text(json.dumps(state))
    run = read_run(out)
    assert run.problems == []
    assert len(run.series("grad_norm")[0]) == len(losses) - 1


def test_a_reader_may_point_at_lines(folder):
    """The page's script has the points of the log, and where the axes are."""
    page = (folder / "report.html").read_text()
    found = re.findall(r'aria-label="([\w ]*)" data-points="(.*?)">', page)
    assert [title for title, _ in found] == ["Loss", "Learning rate", "Gradient norm", "Speed"]
    history = [entry for entry in read_run(folder).log if "loss" in entry]
    for title, data in found:
        sizes = json.loads(html.unescape(data))
        assert sizes.keys() == {"narrow", "wide"}
        for chart in sizes.values():
            assert 0 < chart["left"] < 0.3 < chart["width"] < 1 - chart["left"]
            assert (chart["from"], chart["to"]) == (0, 60)
        name = {"Loss": "loss", "Learning rate": "learning_rate", "Gradient norm": "grad_norm"}.get(title)
        if name is not None:
            expected = [[entry["step"], pytest.approx(entry[name], rel=1e-4)] for entry in history]
            assert sizes["wide"]["lines"][0]["points"] == expected


def test_the_title_names_the_model_and_its_data(folder, tmp_path):
    page = (folder / "report.html").read_text()
    assert "<title>model on rows.jsonl</title>" in page
    assert title_of(RunFiles(tmp_path / "x")) == "x"
    many = RunFiles(tmp_path, run={"model": "a/b", "flags": {"--dataset_name": [f"d/{n}.jsonl" for n in range(5)]}})
    assert title_of(many) == "b on 0.jsonl, 1.jsonl, 2.jsonl and 2 more"


def test_answers_are_shown_from_the_first_to_the_last(out):
    lines = [{"step": step, "prompt": "1 < 2?", "answer": said} for step, said in ((0, "no"), (30, "-"), (60, "<yes>"))]
    (out / "lisa_answers.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 1}\n')
    write_report(out)
    page = (out / "report.html").read_text()
    assert "<th>1 &lt; 2?</th><td><p><b>step 0</b> no</p><p><b>step 60</b> &lt;yes&gt;</p></td>" in page
    assert "lisa_answers.jsonl: line 4 is damaged" in page
    write_run(out, {})
    assert not (out / "lisa_answers.jsonl").exists(), "a new run has its own"


def test_several_runs_are_one_page(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    record = json.loads((other / "lisa_run.json").read_text())
    record["flags"] |= {"--lisa_interval_steps": 7, "--learning_rate": 0.5}
    (other / "lisa_run.json").write_text(json.dumps(record))
    answers = [{"step": step, "prompt": "1 + 1?", "answer": f"<{step}>"} for step in (0, 60)]
    (other / "lisa_answers.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in answers))
    main(str(folder), str(other))
    assert capsys.readouterr().out == "wrote lisa_runs.html\n"
    page = (tmp_path / "lisa_runs.html").read_text()
    assert re.findall(r'<section id="(\w+)">', page) == [
        "loss", "eval_loss", "grad_norm", "figures", "answers", "settings"
    ]  # fmt: skip
    assert "<tr><th>1 + 1?</th><td></td><td>&lt;60&gt;</td></tr>" in page, "the last answer of each"
    assert "<tr><th>--lisa_interval_steps</th><td>5</td><td>7</td></tr>" in page
    assert "<th>--lisa_activated_layers</th>" not in page, "it does not differ"
    assert "<tr><th>steps</th><td>60</td><td>60</td></tr>" in page
    data = json.loads(html.unescape(re.search(r'data-points="(.*?)"', page)[1]))
    assert [line["name"] for line in data["wide"]["lines"]] == [folder.name, "other"]
    for words, said in (([folder, folder], "a run is given twice"), ([folder, tmp_path], "there is no trainer_state")):
        with pytest.raises(SystemExit, match="2"):
            main(*map(str, words))
        assert said in capsys.readouterr().out


def get(port: int, path: str = "/", method: str = "GET", **headers: str) -> tuple[int, str]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request(method, path, headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()


@pytest.fixture
def served(out):
    """A server of the report of a copy of the run."""
    with server_of([str(out)], "0") as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield server.server_address[1]
        server.shutdown()


def test_a_served_report_follows_the_run(out, served):
    status, page = get(served)
    assert status == 200
    assert 'http-equiv="refresh"' not in page, "the run has ended"
    for path in (out / "trainer_state.json", *out.glob("checkpoint-*/trainer_state.json")):
        path.unlink()
    lines = (out / STEPS_NAME).read_text().splitlines(keepends=True)
    assert [json.loads(line)["step"] for line in lines if "loss" in json.loads(line)] == list(range(1, 61))
    (out / STEPS_NAME).write_text("".join(lines[:30]))  # while it goes on, before it has saved
    _, page = get(served)
    assert '<meta http-equiv="refresh" content="10">' in page
    last = json.loads(lines[29])["step"]
    assert f"<dt>steps</dt><dd>{last}</dd>" in page
    (out / STEPS_NAME).write_text("".join(lines[:31]) + "{")
    assert f"<dt>steps</dt><dd>{json.loads(lines[30])['step']}</dd>" in get(served)[1]


def test_nothing_else_is_served(served):
    assert get(served, "/lisa_run.json")[0] == get(served, "/../lisa_run.json")[0] == 404
    assert get(served, method="POST")[0] == get(served, method="PUT")[0] == 501
    assert get(served, Host="example.com:80")[0] == 403
    assert get(served, Host=f"localhost:{served}")[0] == 200


def test_what_cannot_be_served_is_refused(out, served, tmp_path, monkeypatch, capsys):
    alone = "the page is for this machine alone; give a port, up to 65535, and forward it to others by ssh -L."
    for words, said in {
        (out, "--serve", "0.0.0.0:80"): f"--serve 0.0.0.0:80: {alone}",
        (out, "--serve", "65536"): f"--serve 65536: {alone}",
        (out, "--serve", served): f"--serve {served}: the port cannot be had (Address already in use); give another.",
        (tmp_path / "none", "--serve"): f"{tmp_path / 'none'}: no such folder.",
        ("--serve",): "--serve: give OUTPUT_DIR [OUTPUT_DIR ...] [--serve [PORT]].",
        (out, "--serve", 1, 2): f"{out} --serve 1 2: give OUTPUT_DIR [OUTPUT_DIR ...] [--serve [PORT]].",
    }.items():
        monkeypatch.setattr("sys.argv", ["lisa-dist", "report", *map(str, words)])
        with pytest.raises(SystemExit, match="2"):
            cli.main()
        assert capsys.readouterr().out.endswith(f"lisa-dist report: {said}\n")

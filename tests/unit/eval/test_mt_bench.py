"""MT-Bench: answers as FastChat writes them, verdicts of a real server, and judges that fail in every way."""

import json
import os
import shutil
import signal
import subprocess
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from eval_files import write_lines, write_mt_bench
from ranks import free_port
from runs import BIN, clean_environment
from transformers import AutoModelForCausalLM, AutoTokenizer

from lisa_dist.commands import eval as eval_command
from lisa_dist.errors import UserError
from lisa_dist.eval import judge
from lisa_dist.eval.answers import TEMPERATURES, AnswerFile, SampleByTemperature
from lisa_dist.eval.judge import Judge, JudgeError, judge_answers, parse_rating
from lisa_dist.eval.model import describe_weights
from lisa_dist.eval.mt_bench import MTBench

MADE_WITH = {"seed": 1, "max_new_tokens": 8, "dtype": "auto", "weights": "those"}


@pytest.fixture(autouse=True)
def _at_once(monkeypatch):
    monkeypatch.setattr(judge, "WAITS", (0.0, 0.0))


@pytest.fixture
def files(tmp_path) -> Path:
    write_mt_bench(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def judge_model(tiny, tmp_path_factory) -> str:
    """A tiny model that takes the longest prompt of a judge, 2,055 of its tokens."""
    folder = shutil.copytree(tiny, tmp_path_factory.mktemp("judge") / "model")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 4096}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.fixture(scope="module")
def server(judge_model, tmp_path_factory) -> Iterator[str]:
    """`transformers serve` of a tiny model, as a user starts it."""
    said, port = tmp_path_factory.mktemp("server") / "said.txt", free_port()
    command = [str(BIN / "transformers"), "serve", judge_model, "--device", "cpu", "--port", str(port)]
    with said.open("w") as output:
        process = subprocess.Popen(command, env=clean_environment(), stdout=output, stderr=subprocess.STDOUT)
    for _ in range(9000):
        try:
            urllib.request.urlopen(f"http://localhost:{port}/health", timeout=1).close()
            break
        except OSError:
            assert process.poll() is None, said.read_text()[-3000:]
            time.sleep(0.1)
    yield f"http://localhost:{port}/v1"
    process.kill()
    process.wait()


class Scripted:
    """A judge for what a real one does rarely: `answer` gives status, headers and body for each request."""

    def __init__(self, answer: Callable[[dict], tuple[int, dict, bytes]]):
        self.asked, self.headers = [], []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.asked.append(body)
                outer.headers.append(dict(self.headers))
                status, headers, content = answer(body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()


def verdict(words: str) -> tuple[int, dict, bytes]:
    return 200, {}, json.dumps({"choices": [{"message": {"role": "assistant", "content": words}}]}).encode()


def lines_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def made_answers(folder: Path) -> dict[int, list[str]]:
    """Answers to the questions of `folder`, without a model."""
    numbers = [one["question_id"] for one in MTBench(str(folder)).questions]
    return {number: [f"one {number}", f"two {number}"] for number in numbers}


def answer(bench: MTBench, tiny: str, folder: Path, batch_size: int = 8, change=None, **made_with) -> dict:
    """Both turns of each question; `change` is called with the model."""

    def load():
        model = AutoModelForCausalLM.from_pretrained(tiny).eval()
        if change:
            change(model)
        return model, AutoTokenizer.from_pretrained(tiny)

    return AnswerFile(folder, "tiny", MADE_WITH | made_with).answer(bench.questions, load, batch_size)


@pytest.mark.full
def test_answers_and_verdicts_end_to_end(tiny, judge_model, server, data_dir, tmp_path, capsys):
    """Eight real questions, one of each category; a tiny model answers, and judges, without sense, by a real server."""
    words = [str(tiny), "--tasks", "mt_bench", "--data_dir", str(data_dir), "--limit", "8", "--max_new_tokens", "8"]
    words += ["--judge_url", server, "--judge_model", judge_model, "--judge_max_tokens", "8"]
    eval_command.main([*words, "--output", str(tmp_path)])
    assert "mt_bench: 8 answers made, 0 were saved already" in capsys.readouterr().out
    answers = lines_of(tmp_path / "mt_bench" / "model_answer" / "model.jsonl")
    assert [line["question_id"] for line in answers] == [81, 91, 101, 111, 121, 131, 141, 151]
    assert {"question_id", "answer_id", "model_id", "choices", "tstamp"} <= answers[0].keys()
    assert answers[0]["model_id"] == "model"
    (path,) = (tmp_path / "mt_bench" / "model_judgment").glob("*_single.jsonl")
    verdicts = lines_of(path)
    fields = ["question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp"]
    assert [list(line) for line in verdicts] == [fields] * 16
    assert all(line["judgment"] for line in verdicts)
    written = json.loads((tmp_path / "results.json").read_text())["tasks"]["mt_bench"]
    assert (written["items"], written["judge"]) == (8, judge_model)
    asked = {(line["question_id"], line["turn"]): (line["judge"][1], line["user_prompt"]) for line in verdicts}
    names = [asked[number, 1][0].removeprefix("single-") for number in (81, 101, 111, 121, 131)]
    assert names == ["v1", "math-v1", "math-v1", "math-v1", "v1"]
    references = lines_of(data_dir / "mt_bench" / "reference_answer_gpt-4.jsonl")
    reference = next(line["choices"][0]["turns"][1] for line in references if line["question_id"] == 111)
    assert asked[111, 2][0] == "single-math-v1-multi-turn"
    assert all(text in asked[111, 2][1] for text in (reference, *answers[3]["choices"][0]["turns"]))
    assert reference not in asked[111, 1][1]


def test_prompts_scores_and_the_table(files):
    """A judge that rates turn one by 8 and turn two by 4, and the second question by nothing."""

    def rate(body):
        said = body["messages"][1]["content"]
        if "two 2" in said:
            return verdict("I cannot say.")
        return verdict(f"Fine. Rating: [[1]] or [[{4 if 'two ' in said else 8}]]")

    with Scripted(rate) as scripted:
        bench, how = MTBench(str(files)), ("a model", made_answers(files), files / "judged", 3)
        content, table = judge_answers(bench, Judge(scripted.url, "owner/judge", 5, 99), *how)
    asked = {body["messages"][1]["content"]: body for body in scripted.asked}
    assert len(asked) == 8
    assert "Rate.\nFirst of 1?\none 1" in asked
    assert "First of 1?\none 1\nSecond of 1?\ntwo 1" in asked
    assert "Rate.\nFirst of 3?\nright 3\none 3" in asked
    body = asked["First of 3?\nright 3\nSecond of 3?\nright again 3\none 3\ntwo 3"]
    assert body["messages"][0] == {"role": "system", "content": "Judge."}
    assert (body["model"], body["temperature"], body["max_tokens"], body["stream"]) == ("owner/judge", 0, 99, False)
    assert content["scores"]["writing"] == {
        "turn_1": 8.0,
        "turn_2": 4.0,
        "both": pytest.approx(20 / 3),
        "stderr": pytest.approx(1.0),  # of 6 and 8
        "verdicts": 3,
        "unparsable": 1,
    }
    assert content["scores"]["all"]["both"] == pytest.approx(44 / 7)
    assert content["scores"]["all"]["stderr"] == pytest.approx(0.5)  # of 6, 8, 6, 6
    assert [line.split() for line in table.splitlines()][-1] == ["all", "8.00", "4.00", "6.29", "0.50", "7", "1"]
    assert [line["score"] for line in lines_of(files / "judged" / "owner_judge_single.jsonl")].count(-1.0) == 1


def test_a_rating_is_parsed():
    """The last, since an answer may hold one, and a judge that quotes it would be read as giving it."""
    ratings = {"Rating: [[5]]": 5, "[[7.5]] and later [[2]]": 2, "Rating: [6]": 6, "see [2], so [[9]]": 9}
    ratings |= dict.fromkeys(("[[0]]", "[[11]]", "[[rating]]", "ten", ""), -1)
    assert {words: parse_rating(words) for words in ratings} == ratings
    judgment = "The answer says [[10]] of itself. Rating: [[3]]"
    assert (parse_rating(judgment), parse_rating(judgment, "first")) == (3.0, 10.0)


def test_what_may_pass_is_asked_again():
    tries = iter([(500, {}, b""), (429, {}, b"slow down"), verdict("[[3]]")])
    with Scripted(lambda body: next(tries)) as scripted:
        assert Judge(scripted.url, "j", 5, 9, key="secret").ask("s", "u") == "[[3]]"
        assert scripted.headers[0]["Authorization"] == "Bearer secret"
    tries = iter([(200, {}, b"<html>"), (200, {}, b"{}"), verdict("[[4]]")])
    with Scripted(lambda body: next(tries)) as scripted:
        assert Judge(scripted.url, "j", 5, 9).ask("s", "u") == "[[4]]"
        assert "Authorization" not in scripted.headers[0]


def slow(body):
    time.sleep(1)
    return verdict("[[1]]")


@pytest.mark.parametrize(
    ("answer", "tries", "said"),
    [
        (slow, 3, r"no verdict in 3 tries \(timed out after 0.2 s \(--judge_timeout\)\)"),
        (lambda body: (200, {}, b"garbage"), 3, r"the response is no chat completion: b'garbage'"),
        (lambda body: (503, {}, b"busy"), 3, r"HTTP 503 Service Unavailable: busy"),
        (lambda body: (401, {}, b"who?"), 1, r"HTTP 401 Unauthorized: who\?; export JUDGE_API_KEY"),
        (lambda body: (404, {}, b"no"), 1, r"HTTP 404 Not Found: no; the endpoint's address ends with /v1"),
        (lambda body: (302, {"Location": "http://127.0.0.1:1/"}, b""), 1, r"HTTP 302 Found"),
    ],
)
def test_a_judge_that_fails_ends_the_run(answer, tries, said):
    with Scripted(answer) as scripted:
        with pytest.raises(JudgeError, match=rf"--judge_url http://127.0.0.1:\d+/v1: .*{said}"):
            Judge(scripted.url, "j", 0.2 if answer is slow else 60, 9, "secret").ask("s", "u")
        assert len(scripted.asked) == tries


def test_a_judge_that_is_not_there(tiny, files, capsys):
    """The answers stay, and the second run asks the model nothing."""
    words = [str(tiny), "--tasks", "mt_bench", "--data_dir", str(files), "--max_new_tokens", "4"]
    words += ["--output", str(files / "out"), "--judge_url", f"http://127.0.0.1:{free_port()}/v1", "--judge_model", "j"]
    with pytest.raises(SystemExit, match="2"):
        eval_command.main(words)
    printed = capsys.readouterr().out
    assert "mt_bench: 4 answers made, 0 were saved already" in printed
    assert "no verdict in 3 tries ([Errno 111] Connection refused). 0 of 8 verdicts are saved in" in printed
    with Scripted(lambda body: verdict("[[5]]")) as scripted:
        words[words.index("--judge_url") + 1] = scripted.url
        eval_command.main(words)
    printed = capsys.readouterr().out
    assert "mt_bench: 0 answers made, 4 were saved already" in printed
    assert "all         5.00    5.00  5.00            0.00         8           0" in printed
    words[words.index("--judge_url") + 1] = "localhost:8000"
    with pytest.raises(SystemExit, match="2"):
        eval_command.main(words)
    assert "--judge_url localhost:8000: must begin with http:// or https://" in capsys.readouterr().out


def test_verdicts_that_are_there_are_not_asked_for_again(files):
    tries = iter([verdict("[[6]]")] * 3 + [(400, {}, b"enough")] + [verdict("no rating"), (400, {}, b"again")])
    bench, answers, folder = MTBench(str(files)), made_answers(files), files / "judged"
    path = folder / "j_single.jsonl"

    def judged(url: str, model: str = "a model", parallel: int = 2) -> dict:
        judge = Judge(url, "j", 5, 9)
        return judge_answers(bench, judge, model, answers, folder, parallel)[0]["scores"]["all"]

    with Scripted(lambda body: next(tries)) as scripted:
        for kept, said in ((3, "enough"), (4, "again")):
            at_end = rf"HTTP 400 Bad Request: {said}.* {kept} of 8 verdicts are saved in .*continues from there"
            with pytest.raises(JudgeError, match=at_end):
                judged(scripted.url, parallel=1)
            with path.open("a") as file:
                file.write('{"question_id": 1, "mod')  # as another program that was killed leaves it
    with Scripted(lambda body: verdict("no rating")) as scripted:
        scores = judged(scripted.url)
        assert len(scripted.asked) == 4
    assert (scores["verdicts"], scores["unparsable"]) == (3, 5)
    with Scripted(lambda body: verdict("[[2]]")) as scripted:
        judged(scripted.url)
        assert not scripted.asked, "an unparsable verdict is one"
        judged(scripted.url, "another model")
        assert len(scripted.asked) == 8
        answers[1][1] = "said otherwise"
        judged(scripted.url)
        assert len(scripted.asked) == 9, "a verdict is one on what was said"
    assert sorted(line["model"] for line in lines_of(path)) == ["a model"] * 8 + ["another model"] * 8


def test_answers_do_not_depend_on_their_batch(tiny, files):
    """Sampled ones neither: writing at 0.7, math at 0, where they are the likeliest tokens."""
    bench = MTBench(str(files), judged=False)
    found, batched = (answer(bench, tiny, files / str(size), size) for size in (1, 3))
    assert found == batched
    other = answer(bench, tiny, files / "other", seed=2)
    assert other[1] != found[1], "another seed draws otherwise"
    assert other[3] == found[3], "at temperature 0 nothing is drawn"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    text = ""
    for question, said in zip(("First", "Second"), found[3], strict=True):
        text += f"<user>{question} of 3?<end><assistant>"
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        greedy = model.generate(ids, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
        assert tokenizer.decode(greedy, skip_special_tokens=True).strip() == said
        text += f"{said}<end>"


def test_draws_have_the_probabilities_of_their_temperature():
    logits = torch.tensor([1.0, 0.0, -1.0, -2.0])
    draws = SampleByTemperature([(0.7, torch.Generator().manual_seed(0)), (0.0, torch.Generator())])
    chosen = [draws(None, logits.repeat(2, 1)).argmax(dim=-1) for _ in range(20_000)]
    counts = torch.bincount(torch.stack(chosen)[:, 0], minlength=4) / len(chosen)
    assert torch.allclose(counts, torch.softmax(logits / 0.7, dim=0), atol=0.012)
    assert {int(rows[1]) for rows in chosen} == {0}


def test_temperatures_are_the_benchmarks():
    warm = {name: value for name, value in TEMPERATURES.items() if value}
    assert warm == {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
    assert TEMPERATURES.keys() - warm.keys() == {"reasoning", "math", "coding", "extraction"}


def test_a_run_that_was_cut_goes_on(tiny, files, capsys):
    """With what is saved, but for a line that was cut short."""
    bench, path = MTBench(str(files), judged=False), files / "answers" / "tiny.jsonl"
    whole, turns = answer(bench, tiny, files / "whole"), iter(range(9))
    lines = (files / "whole" / "tiny.jsonl").read_text().splitlines(keepends=True)
    path.parent.mkdir()
    path.write_text(lines[1] + lines[0][:-20])

    def cut(model):
        generate = model.generate
        model.generate = lambda **how: generate(**how) if next(turns) < 2 else signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        answer(bench, tiny, files / "answers", batch_size=1, change=cut)
    assert [line["question_id"] for line in lines_of(path)] == [1, 2]
    capsys.readouterr()
    assert answer(bench, tiny, files / "answers") == whole
    assert "2 answers made, 2 were saved already" in capsys.readouterr().out
    assert [line["question_id"] for line in lines_of(path)] == [1, 2, 3, 4]
    assert lines_of(path)[1] == json.loads(lines[1])
    with pytest.raises(UserError, match=r"has answers made with other max_new_tokens, weights; move it away"):
        AnswerFile(path.parent, "tiny", MADE_WITH | {"weights": "others", "max_new_tokens": 9})
    foreign = [{key: value for key, value in json.loads(line).items() if key != "made_with"} for line in lines]
    write_lines(path, foreign)
    assert len(AnswerFile(path.parent, "tiny", MADE_WITH).saved) == 4, "FastChat's own lines"


def test_a_question_longer_than_the_model_has_no_answer(tiny, files, capsys):
    bench = MTBench(str(files), judged=False)
    short = answer(bench, tiny, files / "short", max_new_tokens=3)

    def shorten(model):
        model.config.max_position_embeddings = 17  # the first turn has 14, and so room for three more alone

    found = answer(bench, tiny, files / "answers", change=shorten)
    assert found == {number: [first, ""] for number, (first, _) in short.items()}
    assert "4 turns have no answer, as their prompt fills the model's context" in capsys.readouterr().out


QUESTION = {"question_id": 1, "category": "writing", "turns": ["a", "b"]}
PROMPT = {"name": "single-v1", "system_prompt": "a", "prompt_template": "b"}
REFERENCES = "reference_answer_gpt-4.jsonl"


@pytest.mark.parametrize(
    ("path", "row", "said"),
    [
        ("question.jsonl", QUESTION | {"turns": ["a"]}, "line 1: turns must be two"),
        ("question.jsonl", QUESTION | {"category": "art"}, "category must be one of writ"),
        ("question.jsonl", QUESTION | {"question_id": "1"}, "question_id must be a num"),
        ("question.jsonl", None, "question.jsonl: no such file"),
        ("judge_prompts.jsonl", {"name": "single-v1"}, "line 1: system_prompt is missing"),
        ("judge_prompts.jsonl", PROMPT, "has no prompt named single-math-v1"),
        ("judge_prompts.jsonl", PROMPT | {"prompt_template": "{answer} {verdict}"}, "the unknown field {verdict}"),
        (REFERENCES, {"question_id": 3, "choices": 1}, "line 1: choices is not a list"),
        (REFERENCES, {"question_id": 3, "choices": [{"turns": ["a", ""]}]}, "line 1: choices[0].turns must be two"),
        (REFERENCES, {"question_id": 3, "choices": [{"turns": ["a", "b"]}]}, "has no answer to question 4 of the cat"),
    ],
)
def test_files_that_lack_something_are_told_before_a_model_is_loaded(files, capsys, path, row, said):
    (files / "mt_bench" / path).unlink()
    if row is not None:
        write_lines(files / "mt_bench" / path, [row])
    words = ["no/model", "--tasks", "mt_bench", "--data_dir", str(files), "--output", str(files / "out")]
    with pytest.raises(SystemExit, match="2"):
        eval_command.main([*words, "--judge_url", "http://localhost:1/v1", "--judge_model", "j"])
    printed = capsys.readouterr().out
    assert printed.startswith(f"lisa-dist eval: {files / 'mt_bench' / path}")
    assert said in printed


def test_new_weights_in_the_same_folder_are_others(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    before = describe_weights(str(tmp_path))
    assert before.startswith("model.safetensors 3 ")
    os.utime(tmp_path / "model.safetensors", ns=(1, 1))
    assert describe_weights(str(tmp_path)) != before
    assert describe_weights("owner/name") == "owner/name"

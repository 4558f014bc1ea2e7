"""`lisa-dist eval` on the harness' tasks: the shipped files, the scores, the ranks, what cannot be evaluated."""

import functools
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from eval_files import subjects, write_benchmarks, write_lines, write_mt_bench
from lm_eval import simple_evaluate
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from peft import LoraConfig, get_peft_model
from ranks import run_ranks
from runs import ROOT, on_two_ranks
from transformers import AutoModelForCausalLM

from lisa_dist.commands import eval as eval_command
from lisa_dist.errors import UserError
from lisa_dist.eval import benchmark_files, harness
from lisa_dist.eval.arguments import EvalArguments
from lisa_dist.eval.model import load_model

CLI = ROOT / "lisa_dist" / "cli.py"
TASKS = "mmlu,agieval,winogrande,gsm8k,pubmedqa"
STOCK = Path(harness.evaluator.__file__).parent / "tasks"
STOCK_FILES = {
    "agieval_aqua_rat": "agieval/aqua-rat.yaml",
    "agieval_logiqa_en": "agieval/logiqa-en.yaml",
    "agieval_sat_math": "agieval/sat-math.yaml",
    "winogrande": "winogrande/default.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
    "pubmedqa": "pubmedqa/pubmedqa.yaml",
} | {f"mmlu_{subject}": f"mmlu/default/mmlu_{subject}.yaml" for subject in subjects()}
# Where the rows come from, and what a task is called in a table.
OURS = {"task", "task_alias", "tag", "custom_dataset", "dataset_path", "dataset_name", "dataset_kwargs", "metadata"}
# Compared by the words they give.
BY_WORDS = {"description", "doc_to_text", "doc_to_target", "doc_to_choice", "process_results", "fewshot_config"}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    write_benchmarks(folder)
    return folder


@pytest.fixture(autouse=True)
def _no_entries_of_another_test():
    benchmark_files._read_mmlu.cache_clear()


def manager_of(data_dir: Path) -> TaskManager:
    return TaskManager(include_path=harness.TASK_FILES, include_defaults=False, metadata={"data_dir": str(data_dir)})


def test_shipped_tasks_are_the_stock_tasks_word_for_word(files):
    loaded = manager_of(files).load(TASKS.split(","))["tasks"]
    ours = {name.rpartition("::")[2]: task for name, task in loaded.items()}
    assert ours.keys() == STOCK_FILES.keys()
    for name, task in ours.items():
        stock = load_yaml(STOCK / STOCK_FILES[name])
        for key in ("dataset_path", "dataset_name", "tag"):
            stock.pop(key, None)
        stock |= {key: task.config[key] for key in ("custom_dataset", "dataset_kwargs")}
        stock["metadata"] = {"data_dir": str(files)}
        stock = ConfigurableTask(config=stock)
        differ = {
            key
            for key in vars(task.config)
            if key not in OURS | BY_WORDS and getattr(task.config, key) != getattr(stock.config, key)
        }
        if name == "pubmedqa":  # whose files name test rows and others; the stock task's validation rows are not used
            differ -= {"validation_split"}
        assert not differ, f"{name} is another task than {STOCK_FILES[name]}"
        assert task.fewshot_cfg.sampler == stock.fewshot_cfg.sampler
        assert len(task.eval_docs) == len(stock.eval_docs)
        # WinoGrande has no rows to take examples from here, and the harness cannot write those of AGIEval.
        shots = 0 if name.startswith(("winogrande", "agieval")) else 2
        for one in (task, stock):
            one.set_fewshot_seed(1234)
        for doc in task.eval_docs.select(range(3)):
            assert task.fewshot_context(doc, shots) == stock.fewshot_context(doc, shots)
            assert task.doc_to_target(doc) == stock.doc_to_target(doc)
            if task.OUTPUT_TYPE == "multiple_choice":
                assert task.doc_to_choice(doc) == stock.doc_to_choice(doc)
                found = [(-float(n), False) for n in range(len(task.doc_to_choice(doc)))]
            else:
                found = ["1,000. #### 18"]
            assert task.process_results(doc, found) == stock.process_results(doc, found)


def test_groups_are_the_stock_groups():
    for group in ("mmlu", "mmlu_stem", "mmlu_other", "mmlu_social_sciences", "mmlu_humanities"):
        stock = load_yaml(STOCK / "mmlu" / "default" / f"_{group}.yaml")
        ours = load_yaml(harness.TASK_FILES / f"{group}.yaml")
        for key in ("aggregate_metric_list", "metadata", "group_alias"):
            assert ours.get(key) == stock.get(key)
        if group == "mmlu":
            assert ours["task"] == stock["task"]
            continue
        tagged = {
            one["task"]
            for path in (STOCK / "mmlu" / "default").glob("mmlu_*.yaml")
            if (one := load_yaml(path))["tag"] in stock["task"]
        }
        assert {task["task"] for task in ours["task"]} == tagged
    stock, ours = load_yaml(STOCK / "agieval" / "agieval_en.yaml"), load_yaml(harness.TASK_FILES / "agieval.yaml")
    assert ours["aggregate_metric_list"] == stock["aggregate_metric_list"]
    assert set(ours["task"]) < set(stock["task"])


def test_rows_of_agieval_are_its_prompts(data_dir):
    """As the stock task has them in its column `query`; AGIEval's zero-shot prompt, here by hand."""
    (row,) = benchmark_files.agieval(str(data_dir), "sat-math")["test"].select([0])
    assert row["query"].startswith(
        "Q: If $\\frac{x-1}{3}=k$ and $k=3$, what is the value of $x ?$ Answer Choices: (A)2"
    )
    assert row["query"].endswith(" (D)10\nA: Among A through D, the answer is")
    assert row["gold"] == [3]
    (row,) = benchmark_files.agieval(str(data_dir), "logiqa-en")["test"].select([0])
    assert row["query"].startswith("In the planning of a new district in a township, ")
    assert ".Q: Based on the above statement, " in row["query"], "passage and question, nothing between them"


@pytest.mark.full
def test_scores_are_those_of_a_direct_call(data_dir, tmp_path, monkeypatch):
    """Ten items of each task, of MMLU one of each subject of stem: log-likelihoods, answers, scores, to the digit."""
    model, ours = data_dir / "models" / "stories260k-hf", {}

    def listening(*args, **settings):
        found = evaluate(*args, **settings)
        ours["samples"] = ours.get("samples", {}) | found["samples"]
        return found

    evaluate = harness.evaluate
    monkeypatch.setattr(harness, "evaluate", listening)
    for limit, tasks in ((10, "agieval,winogrande,gsm8k,pubmedqa"), (1, "mmlu_stem")):
        words = ["--tasks", tasks, "--data_dir", str(data_dir), "--limit", str(limit), "--batch_size", "10"]
        eval_command.main([str(model), *words, "--output", str(tmp_path)])
        direct = simple_evaluate(
            model=HFLM(pretrained=str(model), device="cpu", batch_size=10),
            tasks=tasks.split(","),
            task_manager=manager_of(data_dir),
            limit=limit,
        )
        for name, samples in direct["samples"].items():
            assert len(samples) == limit * (2 if name == "gsm8k" else 1)
            for theirs, mine in zip(samples, ours["samples"][name], strict=True):
                assert mine["resps"] == theirs["resps"]
                assert mine["arguments"] == theirs["arguments"]
        written = json.loads((tmp_path / "results.json").read_text())["tasks"]
        for name in tasks.split(","):
            assert written[name]["scores"]
            for metric, score in written[name]["scores"].items():
                key, _, kind = metric.partition(", ")
                assert score["value"] == direct["results"][name][f"{key},{kind or 'none'}"]
                error = direct["results"][name][f"{key}_stderr,{kind or 'none'}"]
                assert score["stderr"] == (None if error == "N/A" else error)
    assert written.keys() == {"agieval", "winogrande", "gsm8k", "pubmedqa", "mmlu_stem"}, "the first run's are kept"
    assert (written["mmlu_stem"]["items"], written["mmlu_stem"]["shots"], written["gsm8k"]["shots"]) == (19, 0, 5)
    assert written["mmlu_stem"]["parts"]["mmlu_anatomy"]["items"] == 1
    assert written["gsm8k"]["settings"]["limit"] == 10
    assert written["gsm8k"]["versions"].keys() == {"lisa_dist", "torch", "transformers", "lm_eval"}


def samples_of(model_dir: str, data_dir: str, tasks: list[str], limit: int) -> tuple[list[int], dict | None]:
    """On a rank, or alone: the items that were evaluated here; and of all, what was asked and answered, and scores."""
    ranked = harness.RankedModel(*load_model(model_dir, "float32"), 1)
    loaded = harness.load_tasks(tasks, data_dir, 2)
    loaded["gsm8k"][0].config.generation_kwargs["max_gen_toks"] = 16
    results = harness.evaluate(ranked, loaded, limit=limit, num_fewshot=2)
    here = sorted({one.doc_id for one in loaded["gsm8k"][0].instances})
    if results is None:
        return here, None
    samples = {
        name: sorted((one["doc_id"], one["filter"], str(one["arguments"]), str(one["filtered_resps"])) for one in found)
        for name, found in results["samples"].items()
    }
    return here, {"samples": samples, "scores": {name: harness.scores(results, name) for name in tasks}}


def samples_of_a_rank(model_dir: str, data_dir: str, *what) -> tuple[list[int], dict | None]:
    """The same, once it is refused to evaluate fewer items than there are ranks."""
    with pytest.raises(UserError, match="winogrande: 1 items for 2 ranks; each rank needs one: raise --limit"):
        model = harness.RankedModel(*load_model(model_dir, "float32"), 1)
        harness.evaluate(model, harness.load_tasks(["winogrande"], data_dir, None), limit=1)
    return samples_of(model_dir, data_dir, *what)


def test_two_ranks_find_what_one_finds(tiny, files):
    """Three items for two ranks, with examples that are drawn: each item has those that it has on one rank."""
    tasks = ["gsm8k", "pubmedqa"]
    _, alone = samples_of(str(tiny), str(files), tasks, 3)
    (first, found), (second, nothing) = run_ranks(samples_of_a_rank, 2, str(tiny), str(files), tasks, 3)
    assert (first, second, nothing) == ([0, 2], [1], None)
    assert found["samples"] == alone["samples"]
    for name in tasks:
        for metric, score in alone["scores"][name]["scores"].items():
            assert found["scores"][name]["scores"][metric] == pytest.approx(score, rel=1e-12)
    assert len(alone["samples"]["gsm8k"]) == 6, "three items, two ways to read an answer"


@pytest.mark.full
def test_two_ranks_share_tasks_and_mt_bench(tiny, tmp_path):
    write_benchmarks(tmp_path)
    write_mt_bench(tmp_path)
    out = tmp_path / "out"
    words = ["eval", str(tiny), "--tasks", "winogrande,mt_bench", "--data_dir", str(tmp_path)]
    words += ["--max_new_tokens", "4", "--output", str(out)]
    assert "for verdicts give the same command with --judge_url" in on_two_ranks(words, tmp_path, CLI)
    assert "mt_bench:" not in (tmp_path / "1.txt").read_text()
    written = json.loads((out / "results.json").read_text())["tasks"]
    assert (written["winogrande"]["settings"]["ranks"], written["winogrande"]["items"]) == (2, 3)
    answers = (out / "mt_bench" / "model_answer" / "model.jsonl").read_text().splitlines()
    assert [json.loads(line)["question_id"] for line in answers] == [1, 2, 3, 4]
    assert [path.name for path in (out / "mt_bench" / "model_answer").iterdir()] == ["model.jsonl"]
    words[2:] = ["--tasks", "gsm8k", "--data_dir", "nowhere"]
    on_two_ranks(words, tmp_path, CLI, status=2)


def test_a_chat_template_makes_turns_of_prompts(tiny, files):
    tasks = harness.load_tasks(["pubmedqa"], str(files), None)
    found = harness.evaluate(harness.RankedModel(*load_model(str(tiny)), 2), tasks, limit=1, apply_chat_template=True)
    (sample,) = found["samples"]["pubmedqa"]
    assert sample["arguments"][0][0].startswith("<user>Abstract: One.\nTwo.\nQuestion: 0?\nAnswer:<end>")


def test_an_adapter_is_merged_into_its_base(tiny, tmp_path):
    torch.manual_seed(0)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=2, init_lora_weights=False))
    model.save_pretrained(tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny)
    tokens = torch.arange(8)[None]
    merged, tokenizer = load_model(str(tmp_path / "adapter"))
    assert type(merged).__name__ == "LlamaForCausalLM"
    assert tokenizer.chat_template is not None
    with torch.no_grad():
        assert torch.allclose(merged(tokens).logits, model.eval()(tokens).logits, atol=1e-5)
        base = AutoModelForCausalLM.from_pretrained(tiny)(tokens).logits
        assert not torch.allclose(merged(tokens).logits, base, atol=1e-2)
    shutil.move(tmp_path / "adapter" / "adapter_config.json", tmp_path / "config.json")
    config["base_model_name_or_path"] = "nowhere/nothing"
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(
        UserError, match=r"nowhere/nothing, the base of the adapter .*: no such folder, and no such model"
    ):
        load_model(str(tmp_path / "adapter"))


SUM, CHOICE = {"question": "1 + 1?", "answer": "2\n#### 2"}, {"subject": "anatomy", "question": "?", "answer": 0}
CHOICES = CHOICE | {"choices": [*"abcd"]}
GAP = {"sentence": "a _.", "option1": "b", "option2": "c", "answer": "3"}
ABSTRACT = {"QUESTION": "?", "CONTEXTS": ["One."], "final_decision": "yes"}
ABSTRACTS = {str(number): ABSTRACT for number in range(3)}
OPTIONS = {"question": "?", "options": ["(A)1", "(B)2"]}


@pytest.mark.parametrize(
    ("path", "content", "said"),
    [
        ("gsm8k/test.jsonl", [SUM, {"question": "1 + 1?"}], "test.jsonl, line 2: answer is missing"),
        ("gsm8k/test.jsonl", [SUM | {"answer": " "}], "line 1: answer must be text that is not empty"),
        ("gsm8k/test.jsonl", [SUM | {"answer": "two"}], "line 1: answer must end with #### and the number"),
        ("gsm8k/train.jsonl", None, "train.jsonl: no such file; docs/evaluation.md says where"),
        ("gsm8k/test.jsonl", "{", "test.jsonl, line 1: is not JSON"),
        ("gsm8k/test.jsonl", "", "test.jsonl: is empty"),
        ("gsm8k/test.jsonl", "[1]", "line 1: it is not an object: [1]"),
        ("mmlu/test.jsonl", [CHOICE], "line 1: choices must be four texts"),
        ("mmlu/dev.jsonl", [CHOICES | {"answer": None}], "dev.jsonl, line 1: answer is missing"),
        ("mmlu/test.jsonl", [CHOICES | {"answer": 4}], "answer must be the index of a choice, 0 to 3: 4"),
        ("mmlu/test.jsonl", [CHOICES], "test.jsonl of mmlu has no example with"),
        ("agieval/aqua-rat.jsonl", [OPTIONS], "line 1: label is missing"),
        ("agieval/aqua-rat.jsonl", [OPTIONS | {"label": "C"}], "label must be the letter of an option, not 'C'"),
        ("winogrande/dev.jsonl", [GAP], 'line 1: answer must be one of 1, 2: "3"'),
        ("pubmedqa/test_ground_truth.json", {"0": "x"}, 'truth.json: 0 must be one of yes, no, maybe: "x"'),
        ("pubmedqa/test_ground_truth.json", {"x": "yes"}, "truth.json, x: ori_pqal.json has no such abstract"),
        ("pubmedqa/test_ground_truth.json", {}, "test_ground_truth.json: is empty"),
        ("pubmedqa/ori_pqal.json", {"0": ABSTRACT}, "test_ground_truth.json, 1: ori_pqal.json has no"),
        ("pubmedqa/ori_pqal.json", ABSTRACTS | {"0": {"QUESTION": "?"}}, "pqal.json: 0.CONTEXTS must be texts"),
        ("pubmedqa/ori_pqal.json", ABSTRACTS, "ori_pqal.json, 1: final_decision and test_ground_truth.json differ"),
    ],
)
def test_files_without_answers_are_told_before_a_model_is_loaded(tmp_path, capsys, path, content, said):
    write_benchmarks(tmp_path)
    (tmp_path / path).unlink()
    if isinstance(content, list):
        write_lines(tmp_path / path, content)
    elif content is not None:
        (tmp_path / path).write_text(content if isinstance(content, str) else json.dumps(content))
    words = ["no/model", "--tasks", path.partition("/")[0], "--data_dir", str(tmp_path)]
    with pytest.raises(SystemExit, match="2"):
        eval_command.main([*words, "--output", str(tmp_path / "out")])
    (printed,) = capsys.readouterr().out.splitlines()
    assert printed.startswith("lisa-dist eval: ")
    assert said in printed


def test_without_a_hub_the_way_out_is_files(monkeypatch, capsys, tmp_path):
    """The stock file of a task; the hub is out of reach, as everywhere in these tests."""
    stock = functools.partial(TaskManager, include_path=STOCK / "gsm8k", include_defaults=False)
    monkeypatch.setattr(harness, "TaskManager", stock)
    with pytest.raises(SystemExit, match="2"):
        eval_command.main(["no/model", "--tasks", "gsm8k", "--output", str(tmp_path)])
    printed = capsys.readouterr().out
    assert "--tasks gsm8k: its data cannot be loaded from the hub (Couldn't reach 'openai/gsm8k' on the Hub" in printed
    assert "give --data_dir with its files, as docs/evaluation.md says, or unset HF_HUB_OFFLINE." in printed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--tasks", "gsm8k"], "arguments are required: --model"),
        (["m"], "arguments are required: --tasks"),
        (["m", "--tasks", ","], "--tasks ,: give names separated by commas"),
        (["m", "--tasks", "gsm8k,gsm8k"], "each once"),
        (["m", "--tasks", "gsm8k", "--data_dri", "x"], "--data_dri: no such flag; did you mean --data_dir?"),
        (["m", "--tasks", "gsm8k", "--data_dir", "nowhere"], "--data_dir nowhere: no such folder"),
        (["m", "--tasks", "gsm8k", "--limit", "0"], "--limit 0.0: give a number of items"),
        (["m", "--tasks", "gsm8k", "--limit", "2.5"], "--limit 2.5: give a number of items"),
        (["m", "--tasks", "gsm8k", "--num_fewshot", "-1"], "--num_fewshot -1: must be 0 or more"),
        (["m", "--tasks", "gsm8k", "--batch_size", "none"], "--batch_size none: give a number of prompts, or auto"),
        (["m", "--tasks", "gsm8k", "--dtype", "fp8"], "--dtype fp8: unknown; choose one of auto, float32"),
        (["m", "--tasks", "gsm8k", "--judge_timeout", "0"], "--judge_timeout 0.0: must be more than 0"),
        (["m", "--tasks", "mt_bench"], "--tasks mt_bench: needs --data_dir"),
        (["m", "--tasks", "gsm8k", "--judge_url", "http://x"], "--judge_url and --judge_model: give both"),
        (["m", "--tasks", "gsm8k", "--gpus", "none"], "--gpus none: give a number of GPUs"),
        (["m", "--tasks", "gsm8k", "--gpus", "2", "--limmit", "2"], "--limmit: no such flag; did you mean --limit?"),
        (["m", "--tasks", "gsm9k", "--data_dir", "FILES"], "--tasks gsm9k: no such task; with --data_dir there are"),
        (["m", "--tasks", "winogrande", "--data_dir", "FILES", "--num_fewshot", "5"], "there are only 0 examples"),
        (["m", "--tasks", "agieval", "--data_dir", "FILES", "--num_fewshot", "5"], "it takes no examples; leave the"),
        (["no/model", "--tasks", "winogrande", "--data_dir", "FILES"], "no/model: no such folder, and no such model"),
    ],
)
def test_what_cannot_be_evaluated_is_one_line(files, tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="2"):
        eval_command.main([str(files) if word == "FILES" else word for word in words])
    printed = capsys.readouterr().out
    assert printed.startswith("lisa-dist eval: ")
    assert said in printed


def test_results_stay_with_their_model(tiny, files, tmp_path, capsys):
    words = ["--tasks", "pubmedqa", "--data_dir", str(files), "--output", str(tmp_path / "out")]
    eval_command.main([str(tiny), *words])
    assert "pubmedqa     acc  " in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        eval_command.main(["another", *words])
    assert f"has results of {tiny}; give another folder for those of another" in capsys.readouterr().out
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="2"):
        eval_command.main([str(tiny), *words[:-1], str(tmp_path / "file")])
    assert "file is no folder; give another." in capsys.readouterr().out


def test_results_have_names_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "one" / "checkpoint-20").mkdir(parents=True)
    named = {
        model: EvalArguments(model, "gsm8k").folder for model in ("runs/one/checkpoint-20", "runs/one", "owner/name")
    }
    assert [str(folder) for folder in named.values()] == ["eval/one-checkpoint-20", "eval/one", "eval/name"]


@pytest.mark.parametrize("words", [["pubmedqa", "--apply_chat_template"], ["mt_bench"]])
def test_a_model_without_a_chat_template(data_dir, tmp_path, capsys, words):
    write_benchmarks(tmp_path)
    write_mt_bench(tmp_path)
    words = ["--tasks", *words, "--data_dir", str(tmp_path), "--output", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match="2"):
        eval_command.main([str(data_dir / "models" / "stories260k-hf"), *words])
    flag = words[2] if words[2] == "--apply_chat_template" else "--tasks mt_bench"
    assert re.search(f"{flag}: the tokenizer of .*stories260k-hf has no chat template", capsys.readouterr().out)

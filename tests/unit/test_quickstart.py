"""The quickstart's training pairs and sample prompts."""

import json
import runpy
import sys
import sysconfig
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "launch" / "quickstart.py"


def test_sample_prompts_are_not_in_the_training_pairs(tmp_path, monkeypatch):
    """They are questions of the same kind, about functions of the library of this Python."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").touch()  # a model that is there is not written again
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--output_dir", str(tmp_path), "--num_pairs", "1000000"])
    script = runpy.run_path(str(SCRIPT), run_name="__main__")
    recipe = yaml.safe_load((ROOT / "launch" / "recipes" / "quickstart.yaml").read_text(encoding="utf-8"))
    assert len(set(recipe["sample_prompt"])) == 3
    questions = {json.loads(line)["prompt"] for line in (tmp_path / "pairs.jsonl").read_text().splitlines()}
    assert not questions.intersection(recipe["sample_prompt"])
    library = Path(sysconfig.get_paths()["stdlib"])
    assert {pair["prompt"] for pair in script["docstring_pairs"](library)} == questions.union(recipe["sample_prompt"])

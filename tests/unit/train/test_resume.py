"""What a resumed run may have other than the run of its checkpoint, and what not."""

import random
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from models import tiny_llama
from torch.utils.data import IterableDataset
from transformers import TrainingArguments

from lisa_dist.files import write_json
from lisa_dist.run_folder import IDENTITY_NAME
from lisa_dist.train.resume import Beginning, check_beginning, compare_identity, describe_identity, fingerprint

ROWS = [{"input_ids": [number, number + 1], "labels": [-100, number + 1]} for number in range(10)]


def identity(rows=ROWS, config=None, **changes) -> dict:
    args = TrainingArguments(
        **{"output_dir": "unused", "use_cpu": True, "learning_rate": 1e-3, "max_steps": 10} | changes
    )
    return describe_identity(args, config or tiny_llama().config, rows)


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of a run."""
    write_json(tmp_path / IDENTITY_NAME, identity())
    return tmp_path


@pytest.mark.parametrize(
    "rows",
    [
        ROWS[::-1],
        ROWS[:-1],
        [ROWS[0] | {"labels": ROWS[0]["input_ids"]}, *ROWS[1:]],
        [ROWS[0] | {"input_ids": [5]}, *ROWS[1:]],
    ],
    ids=["reversed", "fewer", "other labels", "shorter"],
)
def test_other_data_is_refused_unless_it_begins_anew(folder, rows):
    assert compare_identity(folder, identity(list(ROWS)), False) == ([], 1.0)
    with pytest.raises(ValueError, match=r"its run had other data: .*examples.* --ignore_data_skip true") as error:
        compare_identity(folder, identity(rows), False)
    assert "\n" not in str(error.value)
    differing, factor = compare_identity(folder, identity(rows), True)
    assert len(differing) == 1
    assert factor == 1.0


@pytest.mark.parametrize("name", ["seed", "data_seed"])
def test_other_seeds_are_refused(folder, name):
    with pytest.raises(ValueError, match=rf"its run had other data: --{name} 7 \(it had (42|None)\)"):
        compare_identity(folder, identity(**{name: 7}), False)


def test_another_model_is_refused(folder):
    config = tiny_llama().config
    config.rms_norm_eps, config.use_cache, config.architectures = 0.5, False, ["Another"]
    with pytest.raises(ValueError, match=r"its run had another model: rms_norm_eps 0.5 \(it had 1e-06\)\. Give"):
        compare_identity(folder, identity(config=config), True)


def test_other_hyperparameters_take_effect_and_are_listed(folder):
    now = identity(learning_rate=5e-4, adam_beta2=0.9, lr_scheduler_type="cosine", output_dir="elsewhere")
    changed, factor = compare_identity(folder, now, False)
    assert changed == [
        "--learning_rate 0.0005 (it had 0.001)",
        "--lr_scheduler_type cosine (it had linear)",
        "--adam_beta2 0.9 (it had 0.999)",
    ]
    assert factor == 0.5


def test_an_older_checkpoint_has_nothing_to_compare(tmp_path):
    assert compare_identity(tmp_path, identity(), False) == ([], 1.0)


def test_a_fingerprint_is_of_values_whatever_holds_them():
    assert fingerprint(ROWS) == fingerprint(Dataset.from_list(ROWS))
    assert fingerprint(ROWS) == fingerprint([{name: torch.tensor(each) for name, each in row.items()} for row in ROWS])
    long = [{"input_ids": [number]} for number in range(10_000)]
    assert fingerprint(long) != fingerprint([*long[1:], long[0]])


def test_what_is_not_the_same_twice_has_no_fingerprint():
    class Augmented(list):
        def __getitem__(self, number):
            return {"input_ids": [random.random()]}

    assert fingerprint(Augmented(ROWS)) is None
    assert fingerprint(iter(ROWS)) is None
    assert fingerprint(None) is None


class Stream(IterableDataset):
    def __iter__(self):
        return iter(())


@pytest.mark.parametrize(
    ("rows", "strategy", "said"),
    [
        ([], "random", ""),
        (
            [],
            "group_by_length",
            "this resume is not bit for bit: --train_sampling_strategy group_by_length groups rows",
        ),
        (Stream(), "random", "this resume is not bit for bit: of streamed rows the Trainer knows"),
    ],
)
def test_a_resume_that_is_not_exact_says_so(capsys, rows, strategy, said):
    args, accelerator = SimpleNamespace(train_sampling_strategy=strategy), SimpleNamespace(print=print)
    trainer = SimpleNamespace(args=args, train_dataset=rows, accelerator=accelerator)
    check_beginning(trainer, Beginning())
    assert not capsys.readouterr().out
    check_beginning(trainer, Beginning(Path("checkpoint-2"), {}))
    told = capsys.readouterr().out
    assert told.startswith(said)
    assert bool(told) == bool(said)

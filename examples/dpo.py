r"""LISA under TRL's DPOTrainer.

deepspeed examples/dpo.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct --dataset_name pairs.jsonl \
    --deepspeed ds_configs/zero2.json --output_dir runs/dpo

Rows have `prompt`, `chosen` and `rejected`: texts, or lists of `role` and `content`. The reference model is the one
that training begins with. All flags of TRL's DPOConfig and of LisaConfig work. On CPU ranks set DS_ACCELERATOR=cpu and
give `--use_cpu true --bf16 false`.
"""

from dataclasses import dataclass, field

from datasets import load_dataset
from transformers import HfArgumentParser
from trl import DPOConfig, DPOTrainer

from lisa_dist import LisaConfig, LisaMixin


@dataclass
class Arguments:
    """What to train, on which rows."""

    model_name_or_path: str = field(metadata={"help": "Folder, or model of the hub."})
    dataset_name: str = field(metadata={"help": "A .jsonl file of prompt, chosen and rejected."})


class LisaDPOTrainer(LisaMixin, DPOTrainer):
    """DPO by LISA."""


def main() -> None:
    """Train and save."""
    parser = HfArgumentParser((Arguments, LisaConfig, DPOConfig))
    arguments, lisa_config, training_args = parser.parse_args_into_dataclasses()
    trainer = LisaDPOTrainer(
        model=arguments.model_name_or_path,
        args=training_args,
        train_dataset=load_dataset("json", data_files=arguments.dataset_name, split="train"),
        lisa_config=lisa_config,
    )
    trainer.train(resume_from_checkpoint=training_args.resume_from_checkpoint)
    trainer.save_model()
    trainer.save_state()
    trainer.accelerator.wait_for_everyone()
    trainer.end()


if __name__ == "__main__":
    main()

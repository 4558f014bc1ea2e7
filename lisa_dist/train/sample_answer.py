"""`--sample_prompt`: one prompt answered before and after training, for people to see what has been learnt."""

from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lisa_dist.train.monitoring import MonitoredMixin
from lisa_dist.zero.stage3 import forget_module_order


class SampleCallback(TrainerCallback):
    """Answers one prompt before and after training; all ranks take part, as ZeRO-3 gathers weights for it."""

    def __init__(self, trainer: MonitoredMixin, prompt: str):
        self._trainer = trainer
        self._prompt = prompt

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._answer("before")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer.stopped_by is None:
            self._answer("after")

    def _answer(self, when: str) -> None:
        trainer, tokenizer = self._trainer, self._trainer.processing_class
        inputs = {"text": self._prompt}
        if tokenizer.chat_template is not None:
            turn = [{"role": "user", "content": self._prompt}]
            inputs = {"text": tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)}
        encoded = tokenizer(**inputs, return_tensors="pt", add_special_tokens=tokenizer.chat_template is None)
        model = trainer.model_wrapped.module
        training = model.training
        model.eval()
        with torch.no_grad():
            generated = model.generate(
                **encoded.to(trainer.args.device),
                max_new_tokens=64,
                do_sample=False,
                synced_gpus=trainer.args.world_size > 1,
            )
        model.train(training)
        forget_module_order(trainer.model_wrapped)
        answer = tokenizer.decode(generated[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)
        trainer.accelerator.print(f"\n{when} training, asked: {self._prompt}\nanswer: {answer.strip()}\n")

"""`--sample_prompt`: prompts answered before and after training, for people to see what has been learnt."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from lisa_dist.files import warning_of_failure
from lisa_dist.run_folder import ANSWERS_NAME
from lisa_dist.train.run_mixin import RunMixin
from lisa_dist.turns import as_taken, takes_parts
from lisa_dist.zero.stage3 import asking


class SampleCallback(TrainerCallback):
    """Answers prompts before and after training; all ranks take part, as ZeRO-3 gathers weights for it."""

    def __init__(self, trainer: RunMixin, prompts: Sequence[str]):
        self._trainer = trainer
        self._prompts = prompts

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self._answer_all("before", state.global_step)

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self._trainer.stopped_by is None:
            self._answer_all("after", state.global_step)

    def _answer_all(self, when: str, step: int) -> None:
        trainer = self._trainer
        for prompt in self._prompts:
            answer = self._answer(prompt)
            trainer.accelerator.print(f"\n{when} training, asked: {prompt}\nanswer: {answer}\n")
            if trainer.is_world_process_zero():
                path = Path(trainer.args.output_dir, ANSWERS_NAME)
                with warning_of_failure(str(path)), path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, "prompt": prompt, "answer": answer}) + "\n")

    def _answer(self, prompt: str) -> str:
        trainer: Any = self._trainer
        processing = trainer.processing_class
        tokenizer = getattr(processing, "tokenizer", processing)  # of a processor
        inputs = {"text": prompt}
        if tokenizer.chat_template is not None:
            turns = as_taken([{"role": "user", "content": prompt}], takes_parts(tokenizer))
            inputs = {"text": tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)}
        encoded = tokenizer(**inputs, return_tensors="pt", add_special_tokens=tokenizer.chat_template is None)
        with asking(trainer.model_wrapped) as model:
            generated = model.generate(
                **encoded.to(trainer.args.device),
                max_new_tokens=64,
                do_sample=False,
                synced_gpus=trainer.args.world_size > 1,
            )
        return tokenizer.decode(generated[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True).strip()

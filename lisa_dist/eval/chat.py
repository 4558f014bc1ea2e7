"""A talk with a model in the terminal: answers stream as they are generated."""

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lisa_dist.errors import UserError
from lisa_dist.turns import as_taken, takes_parts

HELP = "/reset begins anew, /exit or an end of input ends; all else is said to the model"


def find_model(name: str) -> str:
    """The model of a run, or the name as it is: of a run that has saved none yet, its newest checkpoint."""
    folder = Path(name)
    if not folder.is_dir() or _is_model(folder):
        return name
    checkpoints = [path for path in folder.glob("checkpoint-*") if _is_model(path)]
    numbered = [path for path in checkpoints if path.name.rpartition("-")[2].isascii() and path.name[11:].isdigit()]
    if not numbered:
        raise UserError(f"{name}: there is no model in it and no checkpoint; give a run's output_dir, or a model.")
    return str(max(numbered, key=lambda path: int(path.name[11:])))


def _is_model(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("config.json", "adapter_config.json"))


class Chat:
    """Turns of a user and of a model; a model without a chat template goes on with the text."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float
    ):
        self._model: Any = model  # its type does not declare `generate`
        self._tokenizer, self._max_new_tokens, self._temperature = tokenizer, max_new_tokens, temperature
        self._turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forget all turns."""
        self._turns = []

    def say(self, text: str) -> str:
        """The answer, which is printed as it comes."""
        self._turns.append({"role": "user", "content": text})
        if self._tokenizer.chat_template is None:
            encoded = self._tokenizer(text, return_tensors="pt")
        else:
            turns = as_taken(self._turns, takes_parts(self._tokenizer))
            prompt = self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            encoded = self._tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
        self._check_room(encoded["input_ids"].shape[1])
        sampling: dict[str, Any] = {"do_sample": False}
        if self._temperature > 0:
            sampling = {"do_sample": True, "temperature": self._temperature}
        streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        with torch.no_grad():
            generated = self._model.generate(
                **encoded.to(self._model.device), max_new_tokens=self._max_new_tokens, streamer=streamer, **sampling
            )
        answer = str(self._tokenizer.decode(generated[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
        answer = answer.strip()
        self._turns.append({"role": "assistant", "content": answer})
        return answer

    def _check_room(self, length: int) -> None:
        """Raise UserError where the turns and an answer are longer than the model's context."""
        positions = getattr(self._model.config.get_text_config(), "max_position_embeddings", None)
        if positions is not None and length + self._max_new_tokens > positions:
            self._turns.pop()
            raise UserError(
                f"{length} tokens were said, and the model's context has {positions}, with {self._max_new_tokens} for "
                "the answer; /reset begins anew."
            )


def talk(chat: Chat, lines: Iterable[str], prompt: Callable[[], None]) -> None:
    """Answer lines until they end; `prompt` is called before each."""
    prompt()
    for line in lines:
        text = line.encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()
        if text == "/exit":
            return
        if text == "/reset":
            chat.reset()
        elif text.startswith("/"):
            print(HELP)
        elif text:
            try:
                chat.say(text)
            except UserError as error:
                print(error)
            except KeyboardInterrupt:  # of this answer; another one at the prompt ends the talk
                print()
        prompt()
        sys.stdout.flush()

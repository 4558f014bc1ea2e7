"""A talk with a model in the terminal: answers stream as they are generated."""

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from lisa_dist.errors import UserError
from lisa_dist.eval.answers import context_of, encode_turns

HELP = "/reset begins anew, /exit or an end of input ends; all else is said to the model"


def find_model(name: str) -> str:
    """The model of a run, or the name as it is: of a run that has saved none yet, its newest checkpoint."""
    folder = Path(name)
    if not folder.is_dir() or _is_model(folder):
        return name
    checkpoints = [path for path in folder.iterdir() if re.fullmatch(r"checkpoint-\d+", path.name) and _is_model(path)]
    if not checkpoints:
        raise UserError(f"{name}: there is no model in it and no checkpoint; give a run's output_dir, or a model.")
    return str(max(checkpoints, key=lambda path: int(path.name.rpartition("-")[2])))


def _is_model(folder: Path) -> bool:
    return any((folder / file).is_file() for file in ("config.json", "adapter_config.json"))


class Chat:
    """Turns of a user and of a model; a model without a chat template goes on with the text."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float
    ):
        self._model: Any = model  # its type does not declare `generate`
        self._tokenizer, self._max_new_tokens = tokenizer, max_new_tokens
        self._sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        self.turns: list[dict[str, str]] = []

    def say(self, text: str) -> str:
        """The answer, which is printed as it comes.

        Raises UserError where the turns and an answer are longer than the model's context.
        """
        turns = [*self.turns, {"role": "user", "content": text}]
        has_template = self._tokenizer.chat_template is not None
        prompt = encode_turns(self._tokenizer, turns) if has_template else self._tokenizer(text)["input_ids"]
        positions = context_of(self._model)
        if len(prompt) + self._max_new_tokens > positions:
            raise UserError(
                f"{len(prompt)} tokens were said, and the model's context has {positions}, with {self._max_new_tokens} "
                "for the answer; /reset begins anew."
            )
        ids = torch.tensor([prompt], device=self._model.device)
        streamer = TextStreamer(self._tokenizer, skip_prompt=True, skip_special_tokens=True)
        how = {"max_new_tokens": self._max_new_tokens, "streamer": streamer} | self._sampling
        with torch.no_grad():
            generated = self._model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **how)
        answer = str(self._tokenizer.decode(generated[0, len(prompt) :], skip_special_tokens=True)).strip()
        self.turns = [*turns, {"role": "assistant", "content": answer}]
        return answer


def talk(chat: Chat, lines: Iterable[str], prompt: Callable[[], None]) -> None:
    """Answer lines until they end; `prompt` is called before each."""
    prompt()
    for line in lines:
        text = line.encode("utf-8", "surrogateescape").decode("utf-8", "replace").strip()
        if text == "/exit":
            return
        if text == "/reset":
            chat.turns.clear()
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

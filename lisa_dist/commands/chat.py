"""`lisa-dist chat`: talk with a model, or with that of a run, in the terminal."""

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from lisa_dist.commands import exit_on_error
from lisa_dist.definitions import setting
from lisa_dist.errors import UserError
from lisa_dist.eval.chat import HELP as KEYS
from lisa_dist.eval.chat import Chat, find_model, talk
from lisa_dist.eval.model import load_model
from lisa_dist.flags import FlagParser, first_argument_as

USAGE = "lisa-dist chat RUN_OR_MODEL [--flag value ...]"
HELP = {"The model and its answers": ("model", "max_new_tokens", "temperature", "dtype", "seed")}


@dataclass
class ChatArguments:
    """Flags of `lisa-dist chat`."""

    model: str = field(metadata={"help": "A run's output_dir, a checkpoint, a folder, or a model of the hub."})
    max_new_tokens: int = setting(256, "Tokens of an answer at most.")
    temperature: float = setting(0.7, "Of sampled words; 0 for the likeliest.")
    dtype: str = setting("auto", "Of the weights, as torch names it; auto: as saved.")
    seed: int = setting(0, "Of sampled answers.")

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise UserError(f"--max_new_tokens {self.max_new_tokens}: an answer has 1 token or more.")
        if self.temperature < 0:
            raise UserError(f"--temperature {self.temperature}: is not negative; 0 for the likeliest words.")
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise UserError(f"--dtype {self.dtype}: unknown; give auto or a name of torch's, such as bfloat16.")


ARGUMENTS = (ChatArguments,)


def main(argv: Sequence[str]) -> None:
    """Load the model and talk."""
    with exit_on_error("lisa-dist chat"):
        (arguments,) = FlagParser(ARGUMENTS, USAGE, HELP).parse(first_argument_as("--model", argv))
        name = find_model(arguments.model)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        model, tokenizer = load_model(name, arguments.dtype, device)
        torch.manual_seed(arguments.seed)
        print(f"{name}; {KEYS}")
        chat = Chat(model, tokenizer, arguments.max_new_tokens, arguments.temperature)
        with contextlib.suppress(KeyboardInterrupt):
            talk(chat, sys.stdin, lambda: print("> ", end="", flush=True))

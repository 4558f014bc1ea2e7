"""Reads what another tool is started with: YAML, JSON, or a shell script with one command and its flags."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from lisa_dist.errors import UserError
from lisa_dist.files import read_text, read_yaml

AXOLOTL, LLAMA_FACTORY, SWIFT, LMFLOW = "axolotl", "llamafactory", "ms-swift", "lmflow"
TOOLS = (AXOLOTL, LLAMA_FACTORY, SWIFT, LMFLOW)
# Keys that one tool alone has, or words of its command, in the order in which they are looked for.
_SIGNS = (
    (AXOLOTL, {"base_model", "lisa_n_layers", "micro_batch_size", "sequence_len"}),
    (LLAMA_FACTORY, {"stage", "finetuning_type", "use_badam", "cutoff_len", "llamafactory-cli"}),
    (LMFLOW, {"use_lisa", "dataset_path", "conversation_template", "lisa_interval_steps", "examples/finetune.py"}),
    (SWIFT, {"tuner_type", "train_type", "lisa_step_interval", "split_dataset_ratio", "swift", "model"}),
)
_ENDS = re.compile(r"\|.*|\d*>.*|&+|;")  # of a command: what is done with its output, or the next one
# A quotation or a word, which stays, or a comment behind neither.
_COMMENT = re.compile(r"""('[^']*'|"(?:\\.|[^"\\])*"|\\.|[^\s'"#\\][^\s'"\\]*)|(?<!\S)#.*""")
_LONGEST_QUOTATION = 30  # lines
_LAUNCHERS = ("deepspeed", "torchrun", "accelerate", "python", "python3")
_OF_LAUNCH = ("NPROC_PER_NODE", "USE_HF")  # variables of ms-swift that say what flags say elsewhere


def read(path: str) -> dict[str, Any]:
    """The keys of a configuration, or the flags of a script's command. Raises UserError for a file that is neither."""
    if Path(path).suffix in (".yaml", ".yml", ".json"):
        found = read_yaml("", path)
        if not isinstance(found, dict):
            raise UserError(f"{path}: must hold keys and values.")
        return {str(key): value for key, value in found.items()}
    return _read_script(path)


def tool_of(given: dict[str, Any]) -> str | None:
    """Whose keys they are; None where it cannot be told."""
    return next((tool for tool, signs in _SIGNS if signs & given.keys()), None)


def _read_script(path: str) -> dict[str, Any]:
    text = re.sub(r"\\[ \t]*\n", " ", read_text("", path))
    variables: dict[str, str] = {}
    commands: list[list[str]] = []
    for words in _lines_of_words(text):
        while words and re.fullmatch(r"(export|set|local)|\w+=.*", words[0]):
            name, is_set, value = words.pop(0).partition("=")
            if value.startswith("("):
                raise UserError(f"{path}: {name} is an array of bash; write its words out behind the command.")
            if is_set:
                variables.setdefault(name, value)  # what follows is of a loop over the script's own words
        words = [part for word in words for part in _parts(word, variables)]
        if words and words[0] in _LAUNCHERS:  # whose own flags are before the program
            del words[: next((number for number, word in enumerate(words) if word.endswith(".py")), 0)]
        commands.append(words)
    longest = max(commands, key=lambda words: sum(word.startswith("--") for word in words), default=[])
    if not any(word.startswith("--") for word in longest):
        raise UserError(f"{path}: holds no command with flags, and is no .yaml, .yml or .json.")
    given = {name: _value(_expanded(variables[name], variables)) for name in _OF_LAUNCH if name in variables}
    return _flags([_expanded(word, variables) for word in longest]) | given


def _lines_of_words(text: str) -> Iterator[list[str]]:
    """The words of each line, or of several where a quotation goes on; without comments."""
    lines = text.splitlines()
    while lines:
        for number in range(1, min(len(lines), _LONGEST_QUOTATION) + 1):
            try:
                words = shlex.split(_COMMENT.sub(r"\1", "\n".join(lines[:number])))
            except ValueError:  # no closing quotation yet
                continue
            yield words
            break
        else:  # what is quoted never ends: no command of flags
            number = 1
        del lines[:number]


def _parts(word: str, variables: dict[str, str]) -> list[str]:
    """A word, or the flags that it stands for where a variable holds several."""
    value = variables.get(found[1], "") if (found := re.fullmatch(r"\$\{?(\w+)\}?", word)) else ""
    return shlex.split(value) if value.lstrip().startswith("--") else [word]


def _expanded(word: str, variables: dict[str, str]) -> str:
    return re.sub(r"\$\{(\w+)\}|\$(\w+)", lambda found: variables.get(found[1] or found[2], found[0]), word)


def _flags(words: list[str]) -> dict[str, Any]:
    """`--a 1 --b --c x y` as YAML would have it; words before the first flag are keys too, which nothing is said of."""
    found: dict[str, Any] = {}
    name, values = None, []
    for word in [*words, "--"]:
        if _ENDS.fullmatch(word):
            word = "--"
        if not word.startswith("--"):
            if name is None:
                found[word] = None
            else:
                values.append(word)
            continue
        if name is not None:
            found[name] = True if not values else _value(values[0]) if len(values) == 1 else list(map(_value, values))
        if word == "--":
            break
        name, is_set, value = word.removeprefix("--").partition("=")
        values = [value] if is_set else []
    return found


def _value(word: str) -> Any:
    if "\n" in word or " #" in word:  # a text, which YAML would fold or cut
        return word
    try:
        value = json.loads(word) if word[:1] in "[{" else yaml.safe_load(word)
    except (ValueError, yaml.YAMLError):
        return word
    if isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+", value):
        return float(value)
    return value

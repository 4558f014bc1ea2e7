"""Files of answers and verdicts that grow a line at a time, and may end in a line that a kill cut short."""

import json
import os
from collections.abc import Iterable
from pathlib import Path

from lisa_dist.errors import UserError
from lisa_dist.files import replacing


def read_saved(path: Path) -> list[dict]:
    """The complete lines of a file; none where there is no file. Raises UserError for a line that is not JSON."""
    if not path.exists():
        return []
    texts = path.read_text(encoding="utf-8").split("\n")
    lines = []
    for number, text in enumerate(texts[:-1], 1):  # what follows the last line break is empty, or was cut short
        try:
            lines.append(json.loads(text))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: is not JSON ({error}); move the file away.") from error
    return lines


def remove_cut_line(path: Path) -> None:
    """Remove a last line that was cut short, so that lines can be appended."""
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def append_line(path: Path, line: dict) -> None:
    """Append a line, flushed to disk."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def write_lines(path: Path, lines: Iterable[dict]) -> None:
    """Write a whole file in one step."""
    with replacing(path) as new:
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        new.write_text(text, encoding="utf-8")


def turns_of(line: dict) -> list[str]:
    """Both turns of a line of answers."""
    return line["choices"][0]["turns"]

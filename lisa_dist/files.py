"""Files that are complete or absent: with checksums, flushed to disk, replaced in one step. All of it is local."""

import contextlib
import errno
import hashlib
import itertools
import json
import math
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from safetensors import SafetensorError

from lisa_dist.errors import UserError
from lisa_dist.text import in_one_line

CACHE = "LISA_DIST_CACHE"  # the variable of the folder of what need not be computed again
_MOST_NODES = 100_000  # of a YAML file, with its aliases written out


class SaveError(UserError):
    """A file could not be written: the message names it, the rank and the reason."""


class DamagedError(UserError):
    """A checkpoint is not as it was written: the message names the file."""


def read_regular(path: Path) -> str:
    """The text of a file. OSError for anything else too: to open a pipe, or to read a device, may take forever."""
    if path.exists() and not path.is_file():
        raise OSError(errno.EINVAL, "it is a folder, a pipe or a device, and no file", str(path))
    return path.read_text(encoding="utf-8")


def read_text(flag: str, path: str | Path) -> str:
    """The text of a file that the user names by a flag. Raises UserError where it is not one in UTF-8."""
    given = f"{flag} {path}".lstrip()
    try:
        return read_regular(Path(path))
    except FileNotFoundError as error:
        raise UserError(f"{given}: no such file.") from error
    except OSError as error:
        raise UserError(f"{given}: cannot be read ({error.strerror}).") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{given}: is no text in UTF-8 ({error.reason} at byte {error.start}).") from error


def read_yaml(flag: str, path: str | Path) -> Any:
    """What a YAML file holds. Raises UserError where it cannot be read, or gives a key twice."""
    try:
        loader = yaml.SafeLoader(read_text(flag, path))
        node = loader.get_single_node()
        if node is None:
            return None
        if _num_nodes(node, {}) > _MOST_NODES:
            raise UserError(f"{flag} {path}: its aliases stand for more than {_MOST_NODES} values; write them out.")
        return loader.construct_document(node)
    except UserError:
        raise
    # The last three are of PyYAML's constructors, for a value that is not what its tag says, and of deep nesting.
    except (yaml.YAMLError, ValueError, AttributeError, KeyError, RecursionError) as error:
        raise UserError(f"{flag} {path}: is not YAML ({in_one_line(error)}).") from error


def _num_nodes(node: yaml.Node, counted: dict[int, float]) -> float:
    """The nodes of a document with its aliases written out, without end for one in itself."""
    if id(node) not in counted:
        counted[id(node)] = math.inf
        parts: Any = node.value if isinstance(node, yaml.CollectionNode) else []
        if isinstance(node, yaml.MappingNode):
            _check_keys([key for key, _ in node.value])
            parts = itertools.chain.from_iterable(node.value)
        counted[id(node)] = 1 + sum(_num_nodes(part, counted) for part in parts)
    return counted[id(node)]


def _check_keys(keys: list[yaml.Node]) -> None:
    """Raise YAMLError for a key that is given twice, of which PyYAML takes the last."""
    lines: dict[tuple[str, str], int] = {}
    for key in keys:
        if key.tag == "tag:yaml.org,2002:merge":  # `<<`, of which PyYAML takes all
            continue
        name = (key.tag, str(key.value))
        if name in lines:
            line = key.start_mark.line + 1
            raise yaml.YAMLError(f"the key {name[1]} is given twice, in the lines {lines[name]} and {line}")
        lines[name] = key.start_mark.line + 1


def cache_folder() -> Path | None:
    """Where this package writes what it need not compute again; None where it is to write nothing."""
    given = os.environ.get(CACHE)
    if given is None:
        given = os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "lisa_dist")
    folder = os.path.expanduser(given)
    return Path(folder) if folder and not folder.startswith("~") else None  # "~": a user without a home


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write `content` with a checksum of itself, flushed to disk."""
    content = content | {"checksum": _checksum(content)}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    make_durable(path)


def read_json(path: Path) -> dict[str, Any]:
    """What `write_json` wrote. Raises DamagedError when it is anything else."""
    try:
        content = json.loads(read_regular(path))
    except OSError as error:
        raise DamagedError(f"{path} cannot be read ({error.strerror}).") from error
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged: not JSON ({error}).") from error
    if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
        raise DamagedError(f"{path} is damaged: its checksum does not fit its content.")
    return content


def find_foreign_name(names: Iterable[object]) -> object | None:
    """The first name that leads out of the folder it is read in, absolute or by `..`; links are not looked at."""
    for name in names:
        path = PurePosixPath(name if isinstance(name, str) and "\0" not in name else "..")  # no file's name either
        if path.is_absolute() or ".." in path.parts:
            return name
    return None


def make_durable(path: Path) -> None:
    """Make the bytes of a file durable; or the names in a folder: those of its files, or of one just renamed in it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to the path this gives, which becomes `path`, itself and not where it leads, once it is complete."""
    staged = path.with_name(f"tmp-{path.name}")
    staged.unlink(missing_ok=True)
    try:
        yield staged
        make_durable(staged)
        set_mode_by_umask(staged)
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


@contextlib.contextmanager
def naming_lost_files(folder: Path) -> Iterator[None]:
    """Raise SaveError where the body meets a file of a run's folder that the file system refuses, or a full one."""
    try:
        yield
    except OSError as error:
        name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else None
        # A write to a file that is open already does not say which it is.
        full = name is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG)
        if not full and (name is None or not Path(name).absolute().is_relative_to(folder.absolute())):
            raise
        raise SaveError(
            f"{name or folder} could not be written ({error.strerror}); checkpoints are untouched. Mend it, and go on "
            "with --resume_from_checkpoint true."
        ) from error


@contextlib.contextmanager
def warning_of_failure(what: str) -> Iterator[None]:
    """Print a warning instead of raising what code that describes a run may raise: it never costs a model."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RuntimeError) as error:
        why = in_one_line(error) or type(error).__name__
        print(f"warning: {what} could not be written ({why}); weights and checkpoints are not affected.", flush=True)


def is_disk_error(error: BaseException) -> bool:
    """Whether a file system refused a write; some writers report it in exceptions of their own kinds."""
    messages = [os.strerror(number) for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)]
    messages += ["iostream error", "unexpected pos", "PytorchStreamWriter"]  # torch.save's
    return isinstance(error, OSError | SafetensorError) or any(message in str(error) for message in messages)


def set_mode_by_umask(path: Path) -> None:
    """The mode that the user's umask wants; temporary files and safetensors are their owner's alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def describe_file(path: Path, flush: bool = False) -> dict[str, Any]:
    """Size and SHA-256 of a file, which is flushed to disk if asked for."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        if flush:
            os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest.hexdigest()}


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def check_new_file(flag: str, path: str) -> None:
    """Raise UserError for a file to write that is there already."""
    if os.path.lexists(path):
        raise UserError(f"{flag} {path}: is there already; move it away, or give another name.")


def check_folder(flag: str, folder: Path, must_be_there: bool = False) -> None:
    """Raise UserError for a folder that is none, or in which nothing can be written; nothing is made there."""
    flag = f"{flag} {folder}"
    try:
        with contextlib.suppress(FileNotFoundError):
            folder.stat()  # a name that is too long, or below a file
        # A link to nothing is there too, and no folder can be made of it.
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(path))
        if not there.is_dir() or (must_be_there and there != folder.absolute()):
            raise UserError(f"{flag}: {folder if must_be_there else there} is no folder; give another.")
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise UserError(f"{flag}: nothing can be written there ({error.strerror}); give another folder.") from error

"""The images of a row, looked at before a run begins."""

import contextlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lisa_dist.data.formats import ExampleError
from lisa_dist.text import in_one_line

COLUMNS = ("images", "image")
_NUM_SHOWN = 100  # characters of what is no image


def images_of(example: Mapping[str, Any], folder: Path | None) -> list[Any]:
    """The images of a row: paths, from `folder` on, bytes, or images that `datasets` has opened; files are looked at.

    Raises ExampleError with what is wrong of them.
    """
    given = next((example[name] for name in COLUMNS if example.get(name) is not None), None)
    images = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    if not images:
        raise ExampleError("has no image")
    return [_checked(image, folder) for image in images]


def _checked(image: Any, folder: Path | None) -> Any:
    """An image by its path or its bytes, or one that `datasets` has opened. Raises ExampleError for what is neither."""
    import PIL.Image  # for rows with images alone

    given = image if isinstance(image, Mapping) else {"bytes" if isinstance(image, bytes) else "path": image}
    path, content = given.get("path"), given.get("bytes")
    if isinstance(image, PIL.Image.Image):
        return image
    if isinstance(content, bytes):  # whose path is a name
        if not _is_image(io.BytesIO(content)):
            raise ExampleError("has an image whose bytes are no image that can be read")
        return {"path": None, "bytes": content}
    if not isinstance(path, str) or content is not None:
        raise ExampleError(f"has an image that is neither a path nor bytes: {in_one_line(image)[:_NUM_SHOWN]}")
    found = Path(path) if folder is None else folder / path
    if ".." in Path(path).parts:
        raise ExampleError(f"has an image {path}: leads out of its folder; give the path from / on")
    if not found.is_file():
        raise ExampleError(f"has an image {path}: no such file")
    if not _is_image(found):
        raise ExampleError(f"has an image {path}: is no image that can be read")
    return str(found)


def _is_image(file: Any) -> bool:
    import PIL.Image

    # Which reads what kind of file it is, and how large the image.
    with contextlib.suppress(OSError, PIL.Image.DecompressionBombError), PIL.Image.open(file):
        return True
    return False

"""The images of a row, looked at before a run begins."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lisa_dist.data.formats import ExampleError

COLUMNS = ("images", "image")


def images_of(example: Mapping[str, Any], folder: Path | None) -> list[Any]:
    """The images of a row: paths, from `folder` on, which are looked at, or what `datasets` has of them.

    Raises ExampleError with what is wrong of them.
    """
    given = next((example[name] for name in COLUMNS if example.get(name) is not None), None)
    images = list(given) if isinstance(given, (list, tuple)) else [] if given is None else [given]
    if not images:
        raise ExampleError("has no image")
    found = []
    for image in images:
        if not isinstance(image, str):
            found.append(image)
            continue
        path = Path(image) if folder is None else folder / image
        problem = "no such file" if not path.is_file() else _why_no_image(path)
        if problem:
            raise ExampleError(f"has an image {image}: {problem}")
        found.append(str(path))
    return found


def _why_no_image(path: Path) -> str | None:
    import PIL.Image  # for rows with images alone

    # Which reads what kind of file it is, and how large the image.
    with contextlib.suppress(OSError, PIL.Image.DecompressionBombError), PIL.Image.open(path):
        return None
    return "is no image that can be read"

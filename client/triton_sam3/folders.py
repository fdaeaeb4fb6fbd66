"""A folder of images in, a folder of results out: what `triton-sam3 segment-dir` reads and writes.

folder/x.jpg    ─► output/x.jpg.json
folder/a/x.jpg  ─► output/a/x.jpg.json      (images in subfolders: only if named by prompts)
"""

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from .errors import ImageError, PromptError
from .geometry import POSTSCRIPT
from .many import Outcome

UNDECODED = {"BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
"""Formats that Pillow recognises but cannot decode by itself."""


def images_in(folder: Path) -> list[Path]:
    """The images in a folder, by suffix and without hidden files; ImageError if there are none."""
    if not folder.is_dir():
        raise ImageError(f"there is no folder {str(folder)!r}")
    readable = _suffixes()
    images = [p for p in folder.iterdir() if p.suffix.lower() in readable and p.is_file()]
    shown = sorted(path for path in images if not path.name.startswith("."))
    if not shown:
        raise ImageError(f"there are no images in {str(folder)!r}")
    return shown


def _suffixes() -> set[str]:
    Image.init()
    readable = Image.OPEN.keys() - {POSTSCRIPT} - UNDECODED
    return {suffix for suffix, name in Image.EXTENSION.items() if name in readable}


def read_prompts(folder: Path, path: Path) -> dict[Path, Any]:
    """Read the images that a JSON file names, with their prompts; PromptError says what is wrong
    with the file."""
    if not folder.is_dir():
        raise ImageError(f"there is no folder {str(folder)!r}")
    try:
        text = path.read_text(encoding="utf-8")
        by_name = json.loads(text, object_pairs_hook=partial(_once_each, path))
    except PromptError:
        raise
    except ValueError as error:
        raise PromptError(f"{str(path)!r} is not JSON: {error}") from error
    if not isinstance(by_name, dict) or not all(isinstance(v, dict) for v in by_name.values()):
        raise PromptError(f'{str(path)!r} must hold {{"image.jpg": {{"points": […]}}, …}}')
    prompts: dict[Path, Any] = {}
    for name, entry in by_name.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise PromptError(f"{str(path)!r} names {name!r}, which is not in {str(folder)!r}")
        if folder / name in prompts:
            raise PromptError(f"{str(path)!r} names {name!r} twice, in two ways")
        prompts[folder / name] = entry
    if not prompts:
        raise ImageError(f"{str(path)!r} names no image")
    return prompts


def _once_each(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; of a name that it has twice, Python would take the last value silently."""
    names = Counter(name for name, _ in pairs)
    for name, count in names.items():
        if count > 1:
            raise PromptError(f"{str(path)!r} names {name!r} twice: give all its prompts together")
    return dict(pairs)


def check_output(folder: Path, output: Path) -> None:
    """Reject a file, and a folder where the next run would read the results as images."""
    if output.exists() and not output.is_dir():
        raise ValueError(f"{str(output)!r} is a file, but the results need a folder")
    if output.resolve() == folder.resolve():
        raise ValueError(
            f"results cannot go into the folder of the images, {str(folder)!r}: choose another"
        )


def write(outcome: Outcome, folder: Path, output: Path, suffix: str) -> dict[str, Any]:
    """Write one outcome under `output`, at its image's path in `folder`; return a summary."""
    image = Path(str(outcome.image))
    try:
        result = outcome.unwrap()
        target = output / image.relative_to(folder).parent / f"{image.name}.{suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        result.save(target, image if suffix == "png" else None)
    except Exception as error:
        return {"image": str(image), "error": str(error)}
    return {"image": str(image), "output": str(target), "masks": len(result)}

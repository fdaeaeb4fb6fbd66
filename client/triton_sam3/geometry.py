"""From what a caller holds to what the encoder takes.

    path │ file │ bytes │ PIL image │ array ──load_image──► [H, W, 3] RGB ──resize──► [S, S, 3] RGB
    x, y in pixels ──to_fractions──► x / W, y / H

The image is stretched to a square without letterboxing, so fractions of its sides name the same
place before and after.
"""

from __future__ import annotations

import inspect
import io
import math
import os
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from typing import IO, Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, UnidentifiedImageError

from .errors import ImageError

ImageLike: TypeAlias = (
    str | os.PathLike[str] | bytes | bytearray | memoryview | IO[bytes] | Image.Image | NDArray[Any]
)
"""A file's path, its bytes, or the file open for reading; a PIL image; or an RGB uint8 array
[H, W, 3] (also [H, W], [H, W, 1], [H, W, 4], and bool masks [H, W])."""

ACCEPTED = (
    "accepted are a path, an image file's bytes, a file opened in binary mode, a PIL image, or a "
    "uint8 array H×W×3 in RGB order (also H×W, H×W×1, H×W×4)"
)

BINARY_MODE = "open it in binary mode, such as open(path, 'rb')"

POSTSCRIPT = "EPS"
"""The format that Pillow decodes by running another program, Ghostscript, on the file."""

MAX_QUOTED_LENGTH = 255
"""Longest path that a message quotes in full; image data passed as text is longer."""

SECRET_PARTS = re.compile(r"(?<=//)[^/]*@|\?.*", re.DOTALL)
"""A URL's password, and its query, which may be a signature: no message quotes them."""

STRIPS = 16
"""Strips in which a large image is shrunk, in parallel: the pixels of one stay in a core's caches,
whereas a whole photo passes through memory three times. A power of two: Pillow takes their borders
in single precision, and for most photos the result is the same as in one piece."""

MIN_STRIPED_PIXELS = 1 << 20
"""A smaller image is shrunk in one piece, in less time than threads take to start."""

_TURNS = tuple(threading.Lock() for _ in range(32))
"""Pillow decodes an image when its pixels are first needed, and neither that nor reading a file is
safe in two threads. One lock for each object would be enough, but images cannot be dictionary keys:
each takes one of these by its address."""

EXIF_TRANSPOSES: dict[Any, Image.Transpose] = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""The operation that undoes each EXIF orientation (tag 0x0112) except 1, upright."""


def load_image(image: ImageLike) -> NDArray[np.uint8]:
    """Return `image` as RGB uint8 [H, W, 3], C-contiguous, values 0 to 255.

    The EXIF orientation of paths, bytes and open files is applied; PIL images and arrays are used
    as they are, because the caller's coordinates are in their frame. Grey becomes three equal
    channels, alpha is dropped, a 16-bit file keeps its upper 8 bits, and only the first of several
    frames is used. A PIL image of 32-bit integers is read as 16-bit, and rejected if it may be
    8-bit. An array that already fits is returned as it is, not copied. An open file is read from
    its beginning if it can seek, and is left open.

    Raises ImageError for anything else, saying what is accepted.
    """
    if isinstance(image, np.ndarray):
        return _from_array(image)
    if isinstance(image, Image.Image):
        with _decoding("the PIL image"):  # it may not have been decoded yet
            _reject_postscript(image, "the PIL image")
            with _turn(image):
                image.load()
            return _from_pil(image, "the PIL image")
    if isinstance(image, (str, os.PathLike)):
        return _from_path(os.fsdecode(image))
    if isinstance(image, (bytes, bytearray, memoryview)):
        return _from_file(_copied(image), "the image data")
    if callable(getattr(image, "read", None)):
        return _from_file(_read(image), "the open file")
    raise ImageError(f"an image cannot be a {type(image).__name__}: {ACCEPTED}{_hint(image)}")


def _hint(image: Any) -> str:
    if hasattr(image, "numpy"):
        return "; convert a tensor to uint8 H×W×3, channels last, and pass tensor.cpu().numpy()"
    return ""


def _turn(shared: object) -> threading.Lock:
    """A lock to hold while an object that several threads may share is read."""
    return _TURNS[id(shared) // 16 % len(_TURNS)]


def _copied(data: bytes | bytearray | memoryview) -> io.BytesIO:
    with _decoding("the image data"):  # a memoryview may be released
        return io.BytesIO(bytes(data))


def _read(file: Any) -> io.BytesIO:
    """All of an open file; ImageError for one that does not give bytes."""
    if inspect.iscoroutinefunction(file.read):
        raise ImageError(
            f"a {type(file).__name__} is read asynchronously: pass its bytes, `await file.read()`"
        )
    with _decoding("the open file"):
        if isinstance(file, io.TextIOBase):  # reading it would fail on the first byte of a photo
            raise TypeError(BINARY_MODE)
        with _turn(file):
            with suppress(AttributeError, OSError):  # a stream
                file.seek(0)
            data = file.read()
        if not isinstance(data, (bytes, bytearray)):
            raise TypeError(BINARY_MODE)
        return io.BytesIO(data)


def _reject_postscript(image: Image.Image, name: str) -> None:
    """To be called before decoding. The first bytes of a file, not its name, say what it is."""
    if image.format == POSTSCRIPT:
        raise ImageError(
            f"{name} is PostScript, a program that would have to be run: convert it to an image "
            "file such as PNG first"
        )


def upright(image: Image.Image) -> Image.Image:
    """Rotate or flip an opened file by its EXIF orientation; one that cannot be read is ignored.

    `ImageOps.exif_transpose` would not do: it rewrites the EXIF data, and rejects a good picture
    when anything else in that data is damaged.
    """
    image.load()  # Pillow turns a TIFF as it decodes it, and drops the orientation only then
    try:
        turn = EXIF_TRANSPOSES.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # Pillow's EXIF reader raises a wide variety
        turn = None
    return image if turn is None else image.transpose(turn)


def resize(image: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Stretch RGB uint8 [H, W, 3] to [side, side, 3]: bilinear, antialiased, as the reference does.

    Within one grey level of torchvision's `Resize` on a float tensor, which is what SAM 3 uses.
    """
    height, width = image.shape[:2]
    if (height, width) == (side, side):
        return image
    if max(height, width) <= side:
        # Antialiasing changes nothing when no side shrinks, and OpenCV is faster.
        return np.asarray(cv2.resize(image, (side, side), interpolation=cv2.INTER_LINEAR), np.uint8)
    if height * width < MIN_STRIPED_PIXELS:
        return _rows(image, side, 0, side)
    strips = min(STRIPS, side)
    borders = [side * strip // strips for strip in range(strips + 1)]
    with ThreadPoolExecutor(min(strips, os.cpu_count() or 1)) as pool:
        rows = pool.map(partial(_rows, image, side), borders, borders[1:])
        return np.concatenate(list(rows))


def _rows(image: NDArray[np.uint8], side: int, top: int, bottom: int) -> NDArray[np.uint8]:
    """Rows top to bottom of the image at [side, side, 3], from the source rows they depend on."""
    height, width = image.shape[:2]
    scale = height / side
    reach = max(1.0, scale)  # of the filter, above and below a row
    first = max(0, math.floor(top * scale - reach))
    last = min(height, math.ceil(bottom * scale + reach))
    box = (0, top * scale - first, width, min(bottom * scale, height) - first)
    size = (side, bottom - top)
    part = Image.fromarray(image[first:last]).resize(size, Image.Resampling.BILINEAR, box)
    return np.asarray(part)


def to_fractions(xy: NDArray[np.floating[Any]], width: int, height: int) -> NDArray[np.float32]:
    """Turn pixels [..., 2] (x, y) into float32 fractions of the image's width and height."""
    # Divided in float32, as the reference does, so that the model sees exactly the same numbers.
    return xy.astype(np.float32) / np.array([width, height], np.float32)


def _from_array(array: NDArray[Any]) -> NDArray[np.uint8]:
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3, 4)):
        hint = "; move the channels last" if array.ndim == 3 and array.shape[0] in (1, 3, 4) else ""
        raise ImageError(f"an array of shape {array.shape} is not an image: {ACCEPTED}{hint}")
    if 0 in array.shape:
        raise ImageError(f"an array of shape {array.shape} has no pixels: {ACCEPTED}")
    if array.dtype == np.bool_:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8:
        raise ImageError(
            f"an array of {array.dtype} is not an image: {ACCEPTED}; "
            "scale it to 0..255 and convert it with .astype(numpy.uint8)"
        )
    if array.ndim == 2:
        array = array[:, :, np.newaxis]
    if array.shape[2] == 1:
        array = np.broadcast_to(array, (*array.shape[:2], 3))
    return np.ascontiguousarray(array[:, :, :3])


def _from_path(path: str) -> NDArray[np.uint8]:
    if "://" in path:
        url = _quoted(SECRET_PARTS.sub("", path))
        raise ImageError(f"{url} is a URL: download it first; {ACCEPTED}")
    name = _quoted(path)
    if os.path.isdir(path):  # noqa: PTH112 - Path.is_dir raises for a name that is too long
        raise ImageError(f"{name} is a folder: pass the path of one image file in it")
    if not os.path.isfile(path):  # noqa: PTH113 - as above
        hint = "; if this is image data as text, decode it and pass the bytes"
        raise ImageError(f"there is no file {name}{hint if len(path) > MAX_QUOTED_LENGTH else ''}")
    return _from_file(path, name)


def _from_file(file: str | io.BytesIO, name: str) -> NDArray[np.uint8]:
    with _decoding(name), Image.open(file) as image:
        _reject_postscript(image, name)
        return _from_pil(upright(image), name)


def _quoted(path: str) -> str:
    return repr(path if len(path) <= MAX_QUOTED_LENGTH else f"{path[:40]}…{path[-40:]}")


def _from_pil(image: Image.Image, name: str) -> NDArray[np.uint8]:
    if 0 in image.size:
        raise ImageError(f"{name} has no pixels: it is {image.width}×{image.height}")
    if image.mode == "F":
        raise ImageError(
            f"{name} holds floating-point values: scale it to 0..255 and convert it to 8 bits first"
        )
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode == "I":
            _check_depth(int(values.max()), name)
        return _from_array(_high_byte(values, name))
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # Pillow warns about going to RGB directly
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _check_depth(largest: int, name: str) -> None:
    """Reject 32-bit integers that may be 8-bit grey: their upper byte would be black."""
    if 0 < largest <= np.iinfo(np.uint8).max:
        raise ImageError(
            f"{name} holds 32-bit integers of at most {largest}, which may be 8-bit grey or dark "
            "16-bit grey: say which with .convert('L') or .convert('I;16')"
        )


def _high_byte(values: NDArray[Any], name: str) -> NDArray[np.uint8]:
    """Upper 8 bits of 16-bit grey; Pillow's own conversion clips at 255 instead."""
    if values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
        raise ImageError(
            f"{name} holds values beyond 16 bits: scale it to 0..255 and convert it to 8 bits first"
        )
    return (values >> 8).astype(np.uint8)


@contextmanager
def _decoding(name: str) -> Iterator[None]:
    """Turn whatever Pillow's decoders raise, which is a wide variety, into an ImageError.

    Only a lack of memory is not the image's fault.
    """
    try:
        yield
    except (ImageError, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"{name} has too many pixels to be opened safely: {error}") from error
    except UnidentifiedImageError as error:
        raise ImageError(f"{name} is not an image Pillow can read") from error
    except Exception as error:
        raise ImageError(f"{name} cannot be read: {str(error) or type(error).__name__}") from error

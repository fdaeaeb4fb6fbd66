"""Reads an image file, checking its header before any pixel is decoded.

bytes │ base64 ──► bytes ──► header: format, pixels, frames ──► RGB [H, W, 3], upright
"""

from __future__ import annotations

import base64
import binascii
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from sam3_shared.geometry import load_image, upright

MAX_SCANS = 25
"""Scans of a progressive JPEG, usually ten: each costs few bytes but a pass over all pixels."""

MAX_READS = 200_000
"""Reads that a decoder may make. A large file takes some ten thousand; one of empty chunks, or of a
JPEG's fill bytes, would take millions, each million taking a second."""

MAX_SEGMENTS = 10_000
"""Segments of a JPEG; each holds up to 64 KB, so a profile takes a few and a preview some ten."""

MAX_EXIF_SEGMENTS = 100
"""EXIF fits one segment, and a few cameras write more. Pillow appends each to all before it: a
thousand full ones take six seconds."""

MAX_COMPRESSED_CHUNKS = 100
"""Profiles and compressed texts of a PNG, usually one or two. Pillow inflates each to as much as a
megabyte before it tells the size of the image."""

_MARKER = re.compile(rb"\xff[^\x00\x01\xd0-\xd8\xff]")
"""Marker of a segment with a length: not a stuffed byte, restart or fill (ITU-T T.81, B.1.1)."""
_END_OF_IMAGE, _START_OF_SCAN, _APP1 = 0xD9, 0xDA, 0xE1
_JPEG, _EXIF = b"\xff\xd8\xff", b"Exif\0\0"
_PNG, _COMPRESSED_CHUNKS = b"\x89PNG\r\n\x1a\n", frozenset((b"iCCP", b"zTXt", b"iTXt"))
_DECODED = frozenset(
    (0xC0, 0xC1, 0xC2, 0xC3, 0xC4, 0xC9, 0xCA, 0xCC, _START_OF_SCAN, 0xDB, 0xDC, 0xDD, 0xFE)
) | frozenset(range(0xE0, 0xF0))
"""Markers of the segments that libjpeg reads; it rejects all others. But between restarts it skips
a reserved one (02 to BF) without the length stated after it, and so decodes scans that seem to lie
inside that segment."""

DATA_URL = re.compile(rb"data:[^,]{0,80};base64,")
"""The prefix that a browser puts before base64 (RFC 2397): a media type and its parameters."""


class InvalidFile(ValueError):
    """The file is not accepted; the message is the answer to the caller."""


@dataclass(frozen=True)
class Limits:
    """What is accepted: formats by Pillow's names, the rest as limits of one image."""

    formats: tuple[str, ...]
    max_bytes: int
    max_pixels: int
    max_side: int
    max_frames: int


class _Reads(BytesIO):
    """A file in memory that counts how often it is read."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._left = MAX_READS

    def read(self, size: int | None = -1, /) -> bytes:
        self._left -= 1
        if self._left < 0:
            raise InvalidFile(
                f"encoded_image is in more than the {MAX_READS} pieces that are accepted: re-save "
                "it without embedded non-image data"
            )
        return super().read(size)


def _check_jpeg(file: bytes) -> None:
    """Raise InvalidFile unless the first image of a JPEG is cheap to decode.

    What follows its end, such as the film that a phone appends, is not read. The segments are
    walked as libjpeg and Pillow walk them, so that none of them can hide another.
    """
    scans = exif = at = 0
    for _ in range(MAX_SEGMENTS):
        marker = _MARKER.search(file, at)
        if marker is None or file[marker.end() - 1] == _END_OF_IMAGE:
            return
        kind = file[marker.end() - 1]
        if kind not in _DECODED:
            raise InvalidFile(
                f"encoded_image has a JPEG marker that is not supported (FF {kind:02X}): re-save "
                "it as a baseline JPEG"
            )
        scans += kind == _START_OF_SCAN
        exif += kind == _APP1 and file.startswith(_EXIF, marker.end() + 2)
        if scans > MAX_SCANS:
            raise InvalidFile(
                f"encoded_image has more than the {MAX_SCANS} scans that are accepted: re-save "
                "it as a baseline JPEG"
            )
        if exif > MAX_EXIF_SEGMENTS:
            break
        at = marker.end() + int.from_bytes(file[marker.end() : marker.end() + 2], "big")
    raise InvalidFile(
        f"encoded_image has more than {MAX_SEGMENTS} segments, or {MAX_EXIF_SEGMENTS} of EXIF: "
        "re-save it without embedded non-image data"
    )


def _check_png(file: bytes) -> None:
    """Raise InvalidFile if a PNG has more to inflate than its pixels and a few texts.

    Each chunk is its length, kind, data and checksum (PNG 5.3); Pillow walks them in the same way.
    """
    at, compressed = len(_PNG), 0
    for _ in range(MAX_READS):  # with more chunks, Pillow reaches that limit itself
        length, kind = int.from_bytes(file[at : at + 4], "big"), file[at + 4 : at + 8]
        compressed += kind in _COMPRESSED_CHUNKS
        if compressed > MAX_COMPRESSED_CHUNKS:
            raise InvalidFile(
                f"encoded_image has more than the {MAX_COMPRESSED_CHUNKS} profiles and compressed "
                "texts that are accepted: re-save it without embedded non-image data"
            )
        at += 12 + length
        if at >= len(file):
            return


class FileReader:
    """Decodes image files within limits. Use one per process: it also sets Pillow's own limit."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        # Pillow checks the size in the header before its decoders allocate anything.
        Image.MAX_IMAGE_PIXELS = limits.max_pixels
        warnings.simplefilter("ignore")  # a file's metadata may cause a hundred thousand
        warnings.simplefilter("error", Image.DecompressionBombWarning)

    def read(self, data: bytes) -> NDArray[np.uint8]:
        """Decode a file, or base64 of one, to RGB [H, W, 3] with its EXIF orientation applied.

        Raises InvalidFile with a message that says what is wrong and what is accepted.
        """
        file = self._file(data)
        if file.startswith(_JPEG):  # before Pillow looks at its segments
            _check_jpeg(file)
        elif file.startswith(_PNG):
            _check_png(file)
        with self._decoding(), Image.open(_Reads(file), formats=self._limits.formats) as image:
            self._check_header(image)
            return np.asarray(load_image(upright(image)), np.uint8)

    def _file(self, data: bytes) -> bytes:
        # A file has non-ASCII bytes among its first few; base64 text has none.
        if not data.isascii():
            return self._within(data, self._limits.max_bytes)
        # Four characters per three bytes, line breaks, and the prefix of a data URL.
        self._within(data, self._limits.max_bytes * 7 // 5 + 100)
        return self._within(self._from_base64(data), self._limits.max_bytes)

    def _within(self, data: bytes, max_bytes: int) -> bytes:
        if len(data) > max_bytes:
            raise InvalidFile(
                f"encoded_image is larger than the {self._limits.max_bytes} bytes that are "
                "accepted: compress it more, or downscale it"
            )
        return data

    def _from_base64(self, text: bytes) -> bytes:
        url = DATA_URL.match(text)
        payload = text[url.end() if url else 0 :].translate(None, b" \t\r\n")
        try:
            return base64.b64decode(payload, validate=True)
        except binascii.Error as error:
            raise InvalidFile(
                f"encoded_image is neither a file nor base64: {self._expected}"
            ) from error

    def _check_header(self, image: Image.Image) -> None:
        if max(image.size) > self._limits.max_side:
            raise InvalidFile(
                f"encoded_image is {image.width}×{image.height}, but a side may have at most "
                f"{self._limits.max_side} pixels: crop or downscale it"
            )
        # The images after a phone's JPEG (MPO) are previews and depth maps, not frames.
        frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
        if frames > self._limits.max_frames:
            raise InvalidFile(
                f"encoded_image has {frames} frames, but at most {self._limits.max_frames} are "
                "accepted: send one frame as an image of its own"
            )

    @contextmanager
    def _decoding(self) -> Iterator[None]:
        """Turn whatever Pillow's decoders raise, which is a wide variety, into InvalidFile.

        Only a lack of memory is not the file's fault.
        """
        try:
            yield
        except (InvalidFile, MemoryError):
            raise
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
            raise InvalidFile(
                f"encoded_image has more than the {self._limits.max_pixels} pixels that are "
                "accepted: downscale it"
            ) from error
        except UnidentifiedImageError as error:
            raise InvalidFile(
                f"encoded_image is not in an accepted format: {self._expected}"
            ) from error
        except Exception as error:
            cause = error.__cause__ or error  # an ImageError's sentence is for the client's callers
            raise InvalidFile(
                f"encoded_image cannot be decoded ({cause}): {self._expected}"
            ) from error

    @property
    def _expected(self) -> str:
        formats = ", ".join(self._limits.formats)
        return f"send the bytes of a whole file ({formats}), or their base64"

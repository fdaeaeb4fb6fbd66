"""sam3_image_reader: reads files like the Python client, and what never reaches a decoder."""

from __future__ import annotations

import base64
import io
import os
import struct
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from tritonclient.utils import InferenceServerException

from export.repository import READER, SHARED, SHARED_PACKAGE, SHARED_SOURCE, WRITER, read_config
from server import TritonServer
from tests.model_repository.asking import Ask, Outputs, file_inputs, refusal
from tests.stubs import stubs
from triton_sam3 import Prompt
from triton_sam3.geometry import load_image, resize, to_fractions

POINT = [Prompt(points=[(2, 1)])]
EXIF_ORIENTATION = 0x0112


def read(ask: Ask, data: bytes) -> Outputs:
    return ask(READER, **file_inputs(data, POINT))


def refused(ask: Ask, data: bytes) -> str:
    return refusal(ask, READER, **file_inputs(data, POINT))


def saved(picture: Image.Image, form: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, form, **options)
    return file.getvalue()


def small(mode: str = "RGB") -> Image.Image:
    """Noise of 37×23 pixels."""
    noise = np.random.default_rng(5).integers(0, 256, (23, 37, 3), np.uint8)
    return Image.fromarray(noise).convert(mode)


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    return saved(small(), "JPEG", exif=exif)


MEGABYTE = zlib.compress(bytes(1 << 20), 9)
PROFILE = b"iCCPname\0\0" + MEGABYTE
TEXT = b"zTXtname\0\0" + MEGABYTE[:-4] + bytes(4)  # a wrong sum: Pillow does not count the text
INTERNATIONAL_TEXT = b"iTXtname\0\1\0\0\0" + MEGABYTE

FILES: dict[str, Callable[[], bytes]] = {
    "JPEG": lambda: saved(small(), "JPEG"),
    "JPEG, progressive": lambda: saved(small(), "JPEG", progressive=True),
    "JPEG, CMYK": lambda: saved(small("CMYK"), "JPEG"),
    "JPEG, grey": lambda: saved(small("L"), "JPEG"),
    "JPEG, several pictures": lambda: saved(
        small(), "MPO", save_all=True, append_images=[small().rotate(90)]
    ),
    "JPEG, lying on its side": lambda: turned(6),
    "JPEG, mirrored": lambda: turned(5),
    "JPEG, some filling": lambda: padded(1_000),
    "PNG, some empty chunks": lambda: commented(1_000),
    "PNG, some compressed texts": lambda: compressed(60, TEXT),
    "PNG": lambda: saved(small(), "PNG"),
    "PNG, alpha": lambda: saved(small("RGBA"), "PNG"),
    "PNG, palette": lambda: saved(small("P"), "PNG", transparency=3),
    "PNG, one bit": lambda: saved(small("1"), "PNG"),
    "PNG, 16 bits": lambda: saved(Image.fromarray(np.asarray(small("L"), np.uint16) * 257), "PNG"),
    "WebP": lambda: saved(small(), "WEBP"),
    "WebP, lossless with alpha": lambda: saved(small("RGBA"), "WEBP", lossless=True),
}
DISGUISES: dict[str, Callable[[bytes], bytes]] = {
    "base64": base64.b64encode,
    "base64 in lines": base64.encodebytes,
    "a data URL": lambda data: b"data:image/jpeg;base64," + base64.b64encode(data),
    "a data URL with parameters": lambda data: (
        b"data:image/jpeg;name=a b.jpg;charset=utf-8;base64," + base64.b64encode(data)
    ),
}


@pytest.mark.parametrize("make", FILES.values(), ids=FILES)
def test_pixels_are_the_same_as_the_clients(
    make: Callable[[], bytes], ask: Ask, image_side: int, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(make())
    expected = load_image(path)
    height, width = expected.shape[:2]
    answer = read(ask, path.read_bytes())
    np.testing.assert_array_equal(answer["image"][0], resize(expected, image_side))
    np.testing.assert_array_equal(answer["image_size"][0], [width, height])
    np.testing.assert_array_equal(
        answer["point_coords"][0, 0, 0], to_fractions(np.array([2.0, 1.0]), width, height)
    )


def test_a_photo_that_shrinks(ask: Ask, photo: Path, image_side: int) -> None:
    expected = resize(load_image(photo), image_side)
    np.testing.assert_array_equal(read(ask, photo.read_bytes())["image"][0], expected)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_motion_photo_is_read_as_its_picture(ask: Ask, progressive: bool) -> None:
    """Its video is not part of it, although some of its bytes look like a JPEG's scans."""
    plain = saved(small(), "JPEG", progressive=progressive)
    assert FILM.count(b"\xff\xda") > 25
    alone, filmed = (read(ask, data)["image"] for data in (plain, plain + FILM))
    np.testing.assert_array_equal(filmed, alone)


@pytest.mark.parametrize("disguise", DISGUISES.values(), ids=DISGUISES)
def test_base64_gives_the_same_as_the_file(disguise: Callable[[bytes], bytes], ask: Ask) -> None:
    plain, text = (read(ask, data) for data in (turned(6), disguise(turned(6))))
    for name, array in plain.items():
        np.testing.assert_array_equal(text[name], array)


def png(width: int, height: int, rows: int = 0) -> bytes:
    """A grey PNG whose header claims width×height but which has only the first rows, in black."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = zlib.compress(bytes((width + 1) * rows))
    chunks = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunks


def jpeg(width: int, height: int) -> bytes:
    """A JPEG whose header claims width×height."""
    data = bytearray(saved(small(), "JPEG"))
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def webp(width: int, height: int) -> bytes:
    """A WebP whose canvas claims width×height."""
    data = bytearray(saved(small("RGBA"), "WEBP", exif=Image.Exif().tobytes() or b"Exif\0\0"))
    assert data[12:16] == b"VP8X"
    data[24:30] = (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return bytes(data)


def scans(count: int, between: bytes = b"") -> bytes:
    """A progressive JPEG whose last scan is repeated, with segments before each repetition."""
    data = saved(small(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + (between + data[last:-2]) * count + data[-2:]


def exif_segments(count: int) -> bytes:
    """A JPEG that begins with segments of EXIF."""
    body = b"Exif\0\0" + bytes(8)
    segment = b"\xff\xe1" + (2 + len(body)).to_bytes(2, "big") + body
    picture = saved(small(), "JPEG")
    return picture[:2] + segment * count + picture[2:]


def comment(data: bytes) -> bytes:
    """A JPEG segment without information about the image."""
    return b"\xff\xfe" + struct.pack(">H", 2 + len(data)) + data


END_OF_IMAGE = b"\xff\xd9"
FILM = np.random.default_rng(0).bytes(4 << 20)
"""What a phone appends to a motion photo, as far as a JPEG reader can tell."""


def padded(octets: int) -> bytes:
    """A JPEG with fill bytes before its first segment, which are read one by one."""
    data = saved(small(), "JPEG")
    return data[:2] + b"\xff" * octets + data[2:]


def commented(chunks: int) -> bytes:
    """A PNG with empty private chunks."""
    data = saved(small(), "PNG")
    empty = struct.pack(">I4sI", 0, b"prVt", zlib.crc32(b"prVt"))
    return data[:33] + empty * chunks + data[33:]


def compressed(chunks: int, body: bytes) -> bytes:
    """A PNG with chunks that Pillow inflates, each with a checksum of its own."""
    data = saved(small(), "PNG")
    chunk = struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))
    return data[:33] + chunk * chunks + data[33:]


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("photo.png", saved(small(), "PNG"))
    return file.getvalue()


ANIMATION: dict[str, Any] = {"save_all": True, "append_images": [small().rotate(180)]}
PIXELS = "more than the 50000000 pixels that are accepted"
FRAMES = "has 2 frames, but at most 1 are accepted"
INFLATED = "more than the 100 profiles and compressed texts"
PIECES = "is in more than the 200000 pieces"
FORMATS = "not in an accepted format: send the bytes of a whole file (JPEG, PNG, WEBP)"
BOMBS: dict[str, Callable[[], bytes]] = {
    "PNG of 60000×60000": lambda: png(60_000, 60_000),
    "PNG, just too large and complete": lambda: png(7072, 7072, rows=7072),
    "JPEG": lambda: jpeg(65_500, 65_500),
    "WebP": lambda: webp(16_383, 16_383),
    "WebP, beyond its own format": lambda: webp(1 << 24, 1 << 24),
    "PNG, a long thread": lambda: png(2**31 - 1, 1),
}
REFUSED: dict[str, tuple[Callable[[], bytes], str]] = {
    "nothing": (lambda: b"", FORMATS),
    "a word": (lambda: b"photo.jpg", "neither a file nor base64"),
    "base64 of a word": (lambda: base64.b64encode(b"photo.jpg"), FORMATS),
    "zip": (zipped, FORMATS),
    "zip behind PNG's signature": (lambda: b"\x89PNG\r\n\x1a\n" + zipped(), FORMATS),
    "GIF": (lambda: saved(small("P"), "GIF"), FORMATS),
    "GIF, animated": (lambda: saved(small("P"), "GIF", **ANIMATION), FORMATS),
    "TIFF": (lambda: saved(small(), "TIFF"), FORMATS),
    "PNG, animated": (lambda: saved(small(), "PNG", **ANIMATION), FRAMES),
    "WebP, animated": (lambda: saved(small(), "WEBP", **ANIMATION), FRAMES),
    "PNG, truncated": (lambda: saved(small(), "PNG")[:-900], "cannot be decoded"),
    "JPEG, truncated": (lambda: saved(small(), "JPEG")[:-400], "cannot be decoded"),
    "WebP, truncated": (lambda: saved(small(), "WEBP")[:-300], "whole file"),
    "JPEG, scanned for ever": (lambda: scans(26), "more than the 25 scans"),
    "JPEG, scanned for ever, with an end in comments": (
        lambda: scans(26, comment(END_OF_IMAGE)),
        "more than the 25 scans",
    ),
    "JPEG, with scans where a reserved marker hides them": (
        lambda: scans(1, b"\xff\x02" + (2).to_bytes(2, "big")),
        "a JPEG marker that is not supported (FF 02)",
    ),
    "JPEG, with EXIF again and again": (
        lambda: exif_segments(101),
        "or 100 of EXIF",
    ),
    "JPEG, commented for ever": (lambda: scans(1, comment(b"") * 20_000), "10000 segments"),
    "JPEG, filled up": (lambda: padded(1_000_000), PIECES),
    "PNG, of empty chunks": (lambda: commented(200_000), PIECES),
    "PNG, of profiles": (lambda: compressed(101, PROFILE), INFLATED),
    "PNG, of compressed texts": (lambda: compressed(101, TEXT), INFLATED),
    "PNG, of international texts": (lambda: compressed(101, INTERNATIONAL_TEXT), INFLATED),
    "PNG, a thread": (lambda: png(1, 70_000, rows=2), "is 1×70000, but a side may have at most"),
    "too many bytes": (lambda: b"\xff" * (32 * 1024**2 + 1), "larger than the 33554432 bytes"),
    "too many bytes in base64": (
        lambda: base64.b64encode(b"\xff" * (32 * 1024**2 + 1)),
        "larger than the 33554432 bytes",
    ),
    "too much text": (lambda: b" " * (50 * 1024**2), "larger than the 33554432 bytes"),
    **{name: (make, PIXELS) for name, make in BOMBS.items() if not name.startswith("WebP")},
    # Whether the canvas or the frame in it is checked first depends on Pillow's version.
    **{name: (make, "encoded_image ") for name, make in BOMBS.items() if name.startswith("WebP")},
}


@pytest.mark.semantic(
    "thin clients",
    "what is no picture within the limits is refused before it is decoded",
    "the contract",
)
@pytest.mark.parametrize(("make", "words"), REFUSED.values(), ids=REFUSED)
def test_invalid_files_are_rejected_with_a_sentence(
    make: Callable[[], bytes], words: str, ask: Ask
) -> None:
    assert words in refused(ask, make())


def test_an_invalid_file_of_a_batch_is_named(ask: Ask) -> None:
    inputs = file_inputs(saved(small(), "JPEG"), POINT)
    pair = {name: np.concatenate([array, array]) for name, array in inputs.items()}
    pair["encoded_image"][1] = b"photo.jpg"
    assert refusal(ask, READER, **pair).endswith("(image 1 of the request)")


def test_a_file_does_not_fill_the_log(repository: Path) -> None:
    """EXIF entries that lie beyond its end: Pillow warns of each."""
    entry = struct.pack(">HHII", 0x010E, 2, 1 << 20, 1 << 20)
    exif = b"MM\0*" + struct.pack(">IH", 8, 5_000)
    exif += b"".join(struct.pack(">H", number) + entry[2:] for number in range(5_000))
    code = """
import sys
from files import FileReader, Limits
reader = FileReader(Limits(("PNG",), 1 << 25, 50_000_000, 65_535, 1))
print(reader.read(sys.stdin.buffer.read()).shape)
"""
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=repository / READER / "1",
        input=compressed(1, b"eXIf" + exif),
        capture_output=True,
        check=False,
    )
    assert (run.stdout, run.stderr) == (b"(23, 37, 3)\n", b"")


def test_the_largest_picture_is_read(ask: Ask) -> None:
    answer = read(ask, png(10_000, 5_000, rows=5_000))
    assert answer["image_size"].tolist() == [[10_000, 5_000]]


def peak_growth(processes: list[psutil.Process], act: Callable[[], object]) -> int:
    """How many bytes the processes' peak resident size rose above the current one."""
    for process in processes:
        Path(f"/proc/{process.pid}/clear_refs").write_text("5")
    before = sum(process.memory_info().rss for process in processes)
    act()
    peaks = [Path(f"/proc/{process.pid}/status").read_text() for process in processes]
    kilobytes = (int(text.partition("VmHWM:")[2].split()[0]) for text in peaks)
    return sum(kilobytes) * 1024 - before


@pytest.mark.semantic("thin clients", "a decompression bomb takes no memory", "bytes counted")
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="no peak of memory")
def test_a_decompression_bomb_takes_no_memory(server: TritonServer, ask: Ask) -> None:
    readers = stubs(server, READER)
    assert readers
    modest = png(5_000, 5_000, rows=5_000)
    assert peak_growth(readers, lambda: read(ask, modest)) > 25_000_000  # it would be seen
    for make in BOMBS.values():
        bomb = make()
        assert peak_growth(readers, lambda: refused(ask, bomb)) < 8_000_000  # noqa: B023


@pytest.mark.parametrize(
    ("points", "labels", "words"),
    [
        ([[[38, 1]]], [[1]], "points[0, 0] is (38, 1); x must be within 0…37 and y within 0…23"),
        ([[[1, 1], [1, -0.5]]], [[1, 0]], "points[0, 1] is (1, -0.5)"),
        ([[[float("nan"), 1]]], [[1]], "points[0, 0] is (nan, 1)"),
        ([[[0, 0], [float("inf"), 9]]], [[2, 3]], "points[0, 1] is (inf, 9)"),
        (
            [[[40, 1], [50, 9]]],
            [[2, 3]],
            "the box [40.0, 1.0, 50.0, 9.0] of object 0 lies entirely outside",
        ),
        ([[[9, 9], [5, 5]]], [[2, 3]], "of object 0 has its corners the wrong way round"),
        ([[[1, 1]]], [[1, 1]], "point_labels has shape [1, 2]; expected [1, 1]"),
        (np.empty((1 << 40, 0, 2)), np.empty((1 << 40, 0)), "give at least one object"),
    ],
)
def test_invalid_points_are_rejected(
    points: list[Any], labels: list[Any], words: str, ask: Ask
) -> None:
    inputs = {
        **file_inputs(saved(small(), "PNG"), POINT),
        "points": np.array([points], np.float32),
        "point_labels": np.array([labels], np.int32),
    }
    assert words in refusal(ask, READER, **inputs)


def test_a_box_may_be_a_line_as_in_the_client(ask: Ask) -> None:
    inputs = {
        **file_inputs(saved(small(), "PNG"), POINT),
        "points": np.array([[[[37, 0], [60, 23]]]], np.float32),
        "point_labels": np.array([[[2, 3]]], np.int32),
    }
    assert ask(READER, **inputs)["point_coords"].tolist() == [[[[1, 0], [1, 1]]]]


def test_padding_may_be_anywhere(ask: Ask) -> None:
    inputs = {
        **file_inputs(saved(small(), "PNG"), POINT),
        "points": np.array([[[[37, 23], [1e9, float("nan")]]]], np.float32),
        "point_labels": np.array([[[1, -1]]], np.int32),
    }
    assert ask(READER, **inputs)["point_coords"].tolist() == [[[[1, 1], [0, 0]]]]


SEEDS = (saved(small(), "JPEG"), saved(small(), "PNG"), saved(small("RGBA"), "WEBP"))


@st.composite
def broken_files(draw: st.DrawFn) -> bytes:
    """Noise, or a file cut short and with bytes overwritten, as bytes or in base64."""
    data = bytearray(draw(st.one_of(st.binary(max_size=200), st.sampled_from(SEEDS))))
    del data[draw(st.integers(0, len(data))) :]
    places = st.integers(0, max(0, len(data) - 1))
    for place, byte in draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=8)):
        data[place : place + 1] = bytes([byte])
    return base64.b64encode(data) if draw(st.booleans()) else bytes(data)


@given(broken_files())
@settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_arbitrary_bytes_give_an_image_or_a_sentence(
    ask: Ask, image_side: int, data: bytes
) -> None:
    try:
        answer = read(ask, data)
    except InferenceServerException as error:
        # An overwritten header may put the point outside; all other errors are about the file.
        assert error.status() == "StatusCode.INVALID_ARGUMENT"
        assert any(start in str(error.message()) for start in ("encoded_image ", "points["))
    else:
        assert answer["image"].shape == (1, image_side, image_side, 3)


@pytest.mark.parametrize(("model", "modules"), SHARED.items())
def test_the_code_shared_with_the_client_does_not_need_the_client(
    model: str, modules: tuple[str, ...], repository: Path
) -> None:
    version = repository / model / "1"
    for module in modules:
        copied = version / SHARED_PACKAGE / module
        assert copied.read_bytes() == (SHARED_SOURCE / module).read_bytes()
    names = [f"{SHARED_PACKAGE}.{module.removesuffix('.py')}" for module in modules]
    code = f"import sys; sys.modules['triton_sam3'] = None; import {', '.join(names)}"
    subprocess.run([sys.executable, "-c", code], cwd=version, check=True)


def test_the_mask_writer_accepts_every_image_that_the_reader_does(repository: Path) -> None:
    reader, writer = (read_config(repository, model).parameters for model in (READER, WRITER))
    for limit in ("max_pixels", "max_side"):
        assert reader[limit].string_value == writer[limit].string_value


def test_the_largest_file_can_be_sent_as_base64_in_lines(ask: Ask) -> None:
    """Which takes 1.37 times its bytes."""
    picture = saved(small(), "JPEG")
    largest = picture + bytes(32 * 1024**2 - len(picture))  # like a photo with its film
    assert read(ask, base64.encodebytes(largest))["image_size"].tolist() == [[37, 23]]

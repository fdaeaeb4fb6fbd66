"""Images and coordinates against Pillow, NumPy and the reference's own transforms."""

import io
import os
import random
import struct
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import skimage.data
import torch
from numpy.typing import NDArray
from PIL import EpsImagePlugin, Image
from sam3.model.sam3_image_processor import Sam3Processor
from torchvision.transforms import Resize, ToTensor

from triton_sam3.errors import ImageError
from triton_sam3.geometry import MIN_STRIPED_PIXELS, load_image, resize, to_fractions

ORIENTATION = 0x0112
"""EXIF tag; 1 upright … 8."""

UPRIGHT: dict[int, Callable[[NDArray[Any]], NDArray[Any]]] = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
    8: np.rot90,
}


@pytest.fixture
def photo() -> NDArray[np.uint8]:
    return np.ascontiguousarray(skimage.data.astronaut()[::8, ::5])


@pytest.fixture
def grey(photo: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(photo[:, :, 1])


def assert_image(image: NDArray[Any], expected: NDArray[Any]) -> None:
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image, expected)


def test_an_rgb_array_is_returned_without_a_copy(photo: NDArray[np.uint8]) -> None:
    loaded = load_image(photo)
    assert np.shares_memory(loaded, photo)
    assert_image(loaded, photo)


def test_other_arrays_become_rgb(photo: NDArray[np.uint8], grey: NDArray[np.uint8]) -> None:
    three = np.stack([grey] * 3, axis=2)
    assert_image(load_image(grey), three)
    assert_image(load_image(grey[:, :, None]), three)
    assert_image(load_image(np.dstack([photo, grey])), photo)
    assert_image(load_image(grey > 100), np.where(three > 100, 255, 0))
    assert_image(load_image(photo[::2, ::-1]), photo[::2, ::-1])


@pytest.mark.parametrize(
    ("array", "says"),
    [
        (np.zeros((4, 5, 3), np.float32), "array of float32.*accepted are.*scale it to 0..255"),
        (np.zeros((4, 5, 3), np.uint16), "array of uint16.*accepted are"),
        (np.zeros((4, 5, 2), np.uint8), r"shape \(4, 5, 2\) is not an image: accepted are"),
        (np.zeros((3, 40, 50), np.uint8), r"\(3, 40, 50\) is not.*move the channels last"),
        (np.zeros((1, 4, 5, 3), np.uint8), r"shape \(1, 4, 5, 3\) is not an image"),
        (np.zeros(7, np.uint8), r"shape \(7,\) is not an image"),
        (np.zeros((0, 5, 3), np.uint8), r"shape \(0, 5, 3\) has no pixels"),
    ],
)
def test_arrays_that_are_not_images_are_rejected(array: NDArray[Any], says: str) -> None:
    with pytest.raises(ImageError, match=says):
        load_image(array)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        (None, "cannot be a NoneType: accepted are a path"),
        ([[1, 2], [3, 4]], "cannot be a list: accepted are"),
        (b"\x89PNG", "the image data is not an image Pillow can read"),
        (b"", "the image data is not an image"),
        (io.BytesIO(b"no"), "the open file is not an image"),
        (io.StringIO("no"), "the open file cannot be read: open it in binary mode"),
        (torch.zeros(3, 4, 5), r"cannot be a Tensor: .*channels last, and pass tensor\.cpu\(\)"),
        (Path(__file__).parent, r"'.*/tests/client' is a folder: pass the path of one image file"),
        ("https://example.org/a.jpg", "'https://example.org/a.jpg' is a URL: download it first"),
        ("https://me:pw@example.org/a.jpg?signature=pw", "'https://example.org/a.jpg' is a URL"),
        ("/no/such/photo.jpg", "there is no file '/no/such/photo.jpg'"),
    ],
)
def test_values_that_are_not_images_are_rejected(value: Any, says: str) -> None:
    with pytest.raises(ImageError, match=says):
        load_image(value)


class Upload:
    """As of FastAPI."""

    async def read(self) -> bytes:
        return b""


@pytest.mark.filterwarnings("error")  # of a coroutine that nobody awaits
def test_a_file_that_is_read_asynchronously_names_the_remedy() -> None:
    upload: Any = Upload()
    with pytest.raises(
        ImageError, match=r"Upload is read asynchronously: pass its bytes, `await file"
    ):
        load_image(upload)


def test_a_photo_opened_as_text_names_the_remedy(photo: NDArray[np.uint8], tmp_path: Path) -> None:
    Image.fromarray(photo).save(tmp_path / "photo.jpg")
    expected_error = pytest.raises(
        ImageError, match="the open file cannot be read: open it in binary mode"
    )
    with (tmp_path / "photo.jpg").open(encoding="utf-8") as file, expected_error:
        load_image(file)  # type: ignore[arg-type]


def test_a_released_view_of_bytes_is_an_image_error() -> None:
    view = memoryview(b"image")
    view.release()
    with pytest.raises(ImageError, match=r"the image data cannot be read: .*released"):
        load_image(view)


@pytest.mark.parametrize("form", [bytes, bytearray, memoryview, io.BytesIO])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_bytes_are_turned_by_their_exif_orientation_like_files(
    tmp_path: Path, photo: NDArray[np.uint8], orientation: int, form: Callable[[bytes], Any]
) -> None:
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(photo).save(path, exif=exif)
    assert_image(load_image(form(path.read_bytes())), load_image(path))


def test_an_open_file_is_read_from_its_beginning_and_left_open(
    tmp_path: Path, photo: NDArray[np.uint8]
) -> None:
    path = tmp_path / "photo.png"
    Image.fromarray(photo).save(path)
    with path.open("rb") as file:
        file.read()
        assert_image(load_image(file), photo)
        assert_image(load_image(file), photo)
        assert not file.closed


@pytest.mark.parametrize("form", ["PNG", "JPEG", "TIFF"])
@pytest.mark.parametrize("opened", [Image.open, lambda file: file])
def test_threads_may_share_an_image_that_is_not_yet_decoded(form: str, opened: Any) -> None:
    noise = np.random.default_rng(3).integers(0, 256, (600, 800, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, form)
    expected = load_image(file.getvalue())
    with ThreadPoolExecutor(4) as pool:
        for _ in range(8):
            shared = opened(io.BytesIO(file.getvalue()))
            for loaded in pool.map(load_image, [shared] * 4):
                np.testing.assert_array_equal(loaded, expected)


def test_a_lack_of_memory_is_not_an_image_error(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (4, 4))
    monkeypatch.setattr(image, "load", Mock(side_effect=MemoryError))
    with pytest.raises(MemoryError):
        load_image(image)


def test_an_error_without_words_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.new("RGB", (4, 4))
    monkeypatch.setattr(image, "load", Mock(side_effect=ValueError))
    with pytest.raises(ImageError, match="cannot be read: ValueError"):
        load_image(image)


def test_a_stream_that_cannot_seek_is_read(photo: NDArray[np.uint8]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "PNG")
    reading, writing = os.pipe()
    os.write(writing, buffer.getvalue())  # less than a pipe holds
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        assert_image(load_image(stream), photo)


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "1", "CMYK", "YCbCr", "HSV", "PA"])
def test_pil_modes_become_rgb(photo: NDArray[np.uint8], mode: str) -> None:
    image = Image.fromarray(photo).convert(mode)
    assert_image(load_image(image), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_files_keep_the_upper_byte(
    tmp_path: Path, grey: NDArray[np.uint8], suffix: str
) -> None:
    path = tmp_path / f"deep.{suffix}"
    Image.fromarray(grey.astype(np.uint16) * 256 + 77).save(path)
    assert_image(load_image(path), np.stack([grey] * 3, axis=2))


def test_a_transparent_palette_file_is_read_without_a_warning(
    tmp_path: Path, photo: NDArray[np.uint8]
) -> None:
    path = tmp_path / "palette.png"
    image = Image.fromarray(photo).quantize(200)
    image.save(path, transparency=bytes(range(200)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = load_image(path)
    assert_image(loaded, np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_values_beyond_16_bits_are_rejected(mode: str) -> None:
    image = Image.new(mode, (3, 2), 70000)
    with pytest.raises(ImageError, match=r"the PIL image holds .*scale it to 0\.\.255"):
        load_image(image)


@pytest.mark.parametrize(("largest", "becomes"), [(0, 0), (256, 1), (65535, 255)])
def test_32_bit_integers_are_read_as_16_bit(largest: int, becomes: int) -> None:
    image = Image.new("I", (3, 2), largest)
    assert_image(load_image(image), np.full((2, 3, 3), becomes, np.uint8))


@pytest.mark.parametrize("largest", [1, 255])
def test_32_bit_integers_that_may_be_8_bit_are_rejected(largest: int) -> None:
    image = Image.new("I", (3, 2), largest)
    with pytest.raises(ImageError, match=rf"at most {largest}, which may be .*convert\('L'\)"):
        load_image(image)
    assert_image(load_image(image.convert("L")), np.full((2, 3, 3), largest, np.uint8))
    assert_image(load_image(image.convert("I;16")), np.zeros((2, 3, 3), np.uint8))


@pytest.mark.parametrize("data", ["iVBORw0KGgo" * 400, "\0" * 300])
def test_image_data_as_text_is_distinguished_from_a_path(data: str) -> None:
    with pytest.raises(ImageError, match=r"there is no file .*; if this is image data") as caught:
        load_image(data)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_files(
    tmp_path: Path, photo: NDArray[np.uint8], orientation: int
) -> None:
    path = tmp_path / "turned.png"
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(photo).save(path, exif=exif)
    assert_image(load_image(path), UPRIGHT[orientation](photo))
    assert_image(load_image(str(path)), UPRIGHT[orientation](photo))
    with Image.open(path) as image:  # its size is what its holder's coordinates refer to
        assert_image(load_image(image), photo)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_turned_once(tmp_path: Path, photo: NDArray[np.uint8], orientation: int) -> None:
    path = tmp_path / "turned.tiff"
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(photo).save(path, exif=exif)
    assert_image(load_image(path), UPRIGHT[orientation](photo))
    with Image.open(path) as image:  # Pillow turns it by itself, and says so from the beginning
        size = image.size
        assert load_image(image).shape[1::-1] == size


def tiff(*entries: tuple[int, int, int, bytes]) -> bytes:
    """EXIF of one directory; tag, type, count and value of each entry."""
    packed = (struct.pack("<HHI4s", *entry) for entry in entries)
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    return b"Exif\0\0" + head + b"".join(packed) + bytes(4)


ON_ITS_SIDE = (ORIENTATION, 3, 1, struct.pack("<HH", 6, 0))
DAMAGED_EXIF: dict[str, tuple[bytes, int]] = {
    "a width in letters": (tiff(ON_ITS_SIDE, (0x0100, 2, 4, b"abc\0")), 6),
    "a resolution in letters": (tiff(ON_ITS_SIDE, (0x011A, 2, 4, b"abc\0")), 6),
    "an orientation that is none": (tiff((ORIENTATION, 3, 1, struct.pack("<HH", 9, 0))), 1),
    "no directory": (b"Exif\0\0no directory", 1),
}


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(("exif", "orientation"), DAMAGED_EXIF.values(), ids=DAMAGED_EXIF)
def test_damaged_exif_does_not_reject_the_image(
    tmp_path: Path, photo: NDArray[np.uint8], exif: bytes, orientation: int
) -> None:
    path = tmp_path / "damaged.png"
    Image.fromarray(photo).save(path, exif=exif)
    assert_image(load_image(path), UPRIGHT[orientation](photo))


def test_an_image_of_too_many_pixels_is_rejected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (400, 300)).save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000)
    with pytest.raises(ImageError, match=r"bomb\.png' has too many pixels.*120000"):
        load_image(path)


def test_a_file_that_is_not_an_image_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("no picture")
    with pytest.raises(ImageError, match=r"notes\.txt' is not an image Pillow can read"):
        load_image(path)
    with pytest.raises(ImageError, match="is a folder"):
        load_image(tmp_path)


def test_postscript_is_not_run(
    tmp_path: Path, photo: NDArray[np.uint8], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pillow would start Ghostscript on it, where that is installed."""

    def run(*_: object, **__: object) -> None:
        raise AssertionError("Ghostscript was started")

    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", run)
    path = tmp_path / "photo.jpg"
    Image.fromarray(photo).save(path, "EPS")
    expected_error = pytest.raises(
        ImageError, match="is PostScript, a program that would have to be run"
    )
    with expected_error:
        load_image(path)
    with expected_error, Image.open(path) as image:
        load_image(image)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the damage
@pytest.mark.parametrize("suffix", ["PNG", "JPEG", "TIFF", "GIF", "WEBP", "BMP"])
def test_damaged_files_raise_only_image_errors(
    tmp_path: Path, photo: NDArray[np.uint8], suffix: str
) -> None:
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, suffix)
    chance = random.Random(0)
    refused = 0
    for number in range(60):
        damaged = bytearray(buffer.getvalue())
        if number % 2:
            del damaged[chance.randrange(len(damaged)) :]
        for _ in range(8):
            if damaged:
                damaged[chance.randrange(min(len(damaged), 400))] = chance.randrange(256)
        path = tmp_path / f"damaged{number}"
        path.write_bytes(damaged)
        try:
            load_image(path)
        except ImageError as error:
            refused += 1
            assert f"damaged{number}" in str(error)
    assert refused


def fine_strip() -> NDArray[np.uint8]:
    """A picture that shrinks by more than three across, grows down, and is full of detail."""
    return np.ascontiguousarray(np.tile(skimage.data.astronaut(), (2, 7, 1))[:900])


def fine_pole() -> NDArray[np.uint8]:
    """The same on its end."""
    return np.ascontiguousarray(np.rot90(fine_strip()))


@pytest.mark.parametrize("side", [1008, 336])
@pytest.mark.parametrize(
    "picture",
    [skimage.data.astronaut, skimage.data.coffee, skimage.data.chelsea, fine_strip, fine_pole],
)
def test_resize_is_within_a_grey_level_of_torchvision(
    picture: Callable[[], NDArray[np.uint8]], side: int
) -> None:
    image = picture()
    expected = Resize((side, side))(ToTensor()(image)) * 255
    ours = resize(image, side)
    assert ours.shape == (side, side, 3)
    assert ours.dtype == np.uint8
    difference = np.abs(ours - expected.permute(1, 2, 0).numpy())
    assert difference.max() <= 1.01  # each of two passes rounds to whole levels, half a level off
    assert difference.mean() < 0.3


@pytest.mark.parametrize("side", [224, 1008])
@pytest.mark.parametrize(
    "picture", [skimage.data.astronaut, skimage.data.coffee, skimage.data.chelsea]
)
def test_resize_is_within_a_grey_level_of_metas_processor(
    picture: Callable[[], NDArray[np.uint8]], side: int
) -> None:
    """`Sam3Processor` resizes octets too, unlike the predictor's own `set_image`. It rounds between
    its passes, as Pillow does for us where a picture shrinks; enlarged, ours is rounded once."""
    image = picture()
    processor = Sam3Processor(SimpleNamespace(), resolution=side, device="cpu")
    expected = processor.transform(torch.from_numpy(image).permute(2, 0, 1))
    theirs = ((expected + 1) * 127.5).round().permute(1, 2, 0).numpy()
    difference = np.abs(resize(image, side) - theirs)
    assert difference.max() <= 1
    assert (difference > 0).mean() < (0.01 if min(image.shape[:2]) > side else 0.3)


@pytest.mark.parametrize(
    ("height", "width", "side", "off"),
    [(3024, 4032, 1008, 0), (3000, 4000, 224, 0), (1501, 1013, 336, 1), (40_009, 33, 10, 1)],
)
def test_resizing_in_strips_gives_the_same_as_in_one_piece(
    height: int, width: int, side: int, off: int
) -> None:
    image = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    assert height * width >= MIN_STRIPED_PIXELS
    whole = Image.fromarray(image).resize((side, side), Image.Resampling.BILINEAR)
    ours = resize(image, side)
    assert ours.shape == (side, side, 3)
    assert np.abs(ours - np.asarray(whole, np.int16)).max() <= off


def test_resizing_an_image_of_that_size_copies_nothing(photo: NDArray[np.uint8]) -> None:
    square = np.ascontiguousarray(photo[:60, :60])
    assert resize(square, 60) is square


def test_fractions_are_the_same_as_the_references(reference: Any) -> None:
    transforms = reference(1008)
    xy = np.random.default_rng(0).uniform(0, 640, (500, 2))
    width, height = 641, 487
    expected = transforms.transform_coords(
        torch.as_tensor(xy, dtype=torch.float), normalize=True, orig_hw=(height, width)
    )
    ours = to_fractions(xy, width, height)
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours * np.float32(1008), expected.numpy())

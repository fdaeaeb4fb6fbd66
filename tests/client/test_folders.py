"""The images of a folder, what is asked about them, and where the results may go."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from triton_sam3.errors import ImageError, PromptError
from triton_sam3.folders import check_output, images_in, read_prompts, write
from triton_sam3.many import Outcome
from triton_sam3.prompts import Prompt
from triton_sam3.results import Segmentation


def test_hidden_files_and_files_that_are_not_images_are_left_out(tmp_path: Path) -> None:
    for name in ("b.PNG", "a.jpg", "._a.jpg", ".hidden.png", "notes.txt", "x.h5", "clip.mpg"):
        (tmp_path / name).touch()
    (tmp_path / "c").mkdir()
    (tmp_path / "d.jpg").mkdir()
    assert [path.name for path in images_in(tmp_path)] == ["a.jpg", "b.PNG"]


def test_a_folder_without_images_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "._a.jpg").touch()
    with pytest.raises(ImageError, match="there are no images in"):
        images_in(tmp_path)
    with pytest.raises(ImageError, match="there is no folder"):
        images_in(tmp_path / "a")


@pytest.mark.parametrize("name", ["../x.jpg", "/x.jpg", "a/../../x.jpg"])
def test_prompts_must_name_images_inside_the_folder(tmp_path: Path, name: str) -> None:
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps({"a/x.jpg": {}, name: {}}))
    with pytest.raises(PromptError, match=rf"names '{name}', which is not in"):
        read_prompts(tmp_path, prompts)


def test_results_are_not_written_among_the_images(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    check_output(tmp_path / "in", tmp_path / "in" / "masks")
    with pytest.raises(ValueError, match="cannot go into the folder of the images"):
        check_output(tmp_path / "in", tmp_path / "in" / ".." / "in")


def test_postscript_is_left_out(tmp_path: Path) -> None:
    """Pillow opens it by running Ghostscript; the client reads none, however it is named."""
    for name in ("a.jpg", "b.eps", "c.PS"):
        (tmp_path / name).touch()
    assert [path.name for path in images_in(tmp_path)] == ["a.jpg"]


def test_a_png_of_a_result_is_the_overlay(tmp_path: Path) -> None:
    image = tmp_path / "in" / "a.png"
    image.parent.mkdir()
    Image.new("RGB", (30, 20), (9, 90, 200)).save(image)
    logits, scores = np.ones((1, 16, 16), np.float16), np.ones(1, np.float32)
    result = Segmentation.from_logits(logits, scores, [Prompt(points=[(1, 1)])], (30, 20))
    line = write(Outcome(0, image, result), image.parent, tmp_path / "out", "png")
    written = np.asarray(Image.open(line["output"]))
    np.testing.assert_array_equal(written, result.draw(image))


def test_an_image_is_named_once(tmp_path: Path) -> None:
    """One of the two would be lost without a word."""
    prompts = tmp_path / "prompts.json"
    prompts.write_text('{"a.jpg": {"points": [[1, 2]]}, "./a.jpg": {"points": [[3, 4]]}}')
    with pytest.raises(PromptError, match=r"names './a.jpg' twice, in two ways"):
        read_prompts(tmp_path, prompts)
    prompts.write_text('{"a.jpg": {"points": [[1, 2]]}, "a.jpg": {"points": [[3, 4]]}}')
    with pytest.raises(PromptError, match=r"names 'a.jpg' twice: give all its prompts together"):
        read_prompts(tmp_path, prompts)
    prompts.write_text('{"a.jpg": {"points": [[1, 2]], "points": [[3, 4]]}}')
    with pytest.raises(PromptError, match=r"names 'points' twice"):
        read_prompts(tmp_path, prompts)

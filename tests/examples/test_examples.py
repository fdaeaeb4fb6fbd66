"""Every example, run as its first lines show, against the real server."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import numpy.typing as npt
import pytest
import skimage.data
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from benchmarks.faults.container import free_ports
from server import TritonServer
from tests.conftest import ROOT
from triton_sam3 import Client

EXAMPLES = ROOT / "examples"
Run = Callable[..., str]


@pytest.fixture
def run(server: TritonServer, tmp_path: Path) -> Run:
    """Run an example in an empty folder; its stdout, or its stderr if it should fail."""
    urls = {"TRITON_SAM3_URL": server.grpc_url, "TRITON_SAM3_HTTP_URL": server.http_url}

    def run_one(name: str, *args: object, fails: bool = False) -> str:
        interpreter = sys.executable if name.endswith(".py") else "sh"
        command = [interpreter, str(EXAMPLES / name), *map(str, args)]
        done = subprocess.run(
            command,
            cwd=tmp_path,
            env={**os.environ, **urls},
            capture_output=True,
            text=True,
            check=False,
        )
        assert bool(done.returncode) is fails, done.stderr
        return done.stderr if fails else done.stdout

    return run_one


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with coffee.jpg (600×400), chelsea.jpg (451×300) and coins.png (384×303)."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("coffee.jpg", "chelsea.jpg", "coins.png"):
        Image.fromarray(getattr(skimage.data, Path(name).stem)()).save(folder / name)
    return folder


def test_click_session(run: Run, photos: Path, tmp_path: Path) -> None:
    printed = run("click_session.py", photos / "coffee.jpg", "320,240", "60,40,0").splitlines()
    assert [line.split(":")[0] for line in printed] == ["320,240", "60,40,0", "one click undone"]
    first = printed[0].split("score ")[1]
    assert f"foreground {first}" in printed[2]  # back to the first answer
    drawn = np.asarray(Image.open(tmp_path / "clicks.png"))
    assert drawn.shape == skimage.data.coffee().shape
    assert (drawn != np.asarray(Image.open(photos / "coffee.jpg"))).any()


def test_click_session_takes_a_label(run: Run, photos: Path) -> None:
    photo = photos / "coffee.jpg"
    labelled, plain = (run("click_session.py", photo, click) for click in ("9,9,1", "9,9"))
    assert labelled.split(":")[1].split("\n")[0] == plain.split(":")[1].split("\n")[0]


def test_boxes_to_masks_without_its_file(run: Run) -> None:
    said = run("boxes_to_masks.py", "no.png", fails=True)  # after a warning from OpenCV itself
    assert said.splitlines()[-1] == "'no.png' is not an image that OpenCV can read"


def test_folder_to_coco_with_a_missing_image(run: Run, photos: Path, tmp_path: Path) -> None:
    images = [{"id": 0, "file_name": "coffee.jpg"}, {"id": 1, "file_name": "lost.jpg"}]
    boxes = [{"id": number, "image_id": number, "bbox": [20, 20, 90, 80]} for number in (0, 1)]
    (tmp_path / "boxes.json").write_text(json.dumps({"images": images, "annotations": boxes}))
    said = run("folder_to_coco.py", photos, "boxes.json", "masks.json", fails=True)
    assert said.endswith("1 of 2 images have no masks\n")
    written = json.loads((tmp_path / "masks.json").read_text())["annotations"]
    assert ["segmentation" in annotation for annotation in written] == [True, False]


def test_roboflow_block_on_a_small_photo(run: Run, tmp_path: Path) -> None:
    Image.fromarray(skimage.data.coffee()[:90, :120]).save(tmp_path / "small.png")
    run("roboflow_block.py", tmp_path / "small.png")


def test_curl_shows_the_servers_error(run: Run, photos: Path) -> None:
    said = run("curl.sh", photos / "coffee.jpg", 32000, 240, fails=True)
    assert '"error"' in said
    assert "32000" in said


def test_boxes_to_masks(run: Run, photos: Path, tmp_path: Path) -> None:
    printed = run("boxes_to_masks.py", photos / "coins.png").splitlines()
    assert len(printed) > 5
    assert all(line.startswith("coin: ") and line.endswith(" pixels") for line in printed)
    assert Image.open(tmp_path / "masks.png").size == (384, 303)


def test_folder_to_coco(run: Run, photos: Path, tmp_path: Path) -> None:
    sizes = {"coffee.jpg": (600, 400), "chelsea.jpg": (451, 300)}
    bboxes = [(0, [200, 100, 180, 160]), (1, [60, 40, 300, 220]), (0, [20, 20, 90, 80])]
    dataset: dict[str, Any] = {
        "images": [
            {"id": number, "file_name": name, "width": width, "height": height}
            for number, (name, (width, height)) in enumerate(sizes.items())
        ],
        "categories": [{"id": 3, "name": "thing"}],
        "annotations": [
            {"id": number, "image_id": image, "category_id": 3, "bbox": bbox, "iscrowd": 0}
            for number, (image, bbox) in enumerate(bboxes, start=1)
        ],
    }
    (tmp_path / "boxes.json").write_text(json.dumps(dataset))
    run("folder_to_coco.py", photos, "boxes.json", "masks.json")
    coco = COCO(str(tmp_path / "masks.json"))
    assert sorted(coco.getAnnIds()) == [1, 2, 3]
    for annotation in coco.loadAnns(coco.getAnnIds()):
        image = coco.loadImgs(annotation["image_id"])[0]
        mask = coco.annToMask(annotation)
        assert mask.shape == (image["height"], image["width"])
        assert mask.sum() == annotation["area"] > 0
        assert annotation["bbox"] == bboxes[annotation["id"] - 1][1]


def test_asyncio_clicks(run: Run, photos: Path) -> None:
    paths = [str(photos / name) for name in ("chelsea.jpg", "coffee.jpg", "coins.png")]
    printed = run("asyncio_clicks.py", *paths).splitlines()
    assert sorted(line.split(":")[0] for line in printed) == paths


def test_roboflow_block(run: Run, photos: Path) -> None:
    predictions = [
        json.loads(line) for line in run("roboflow_block.py", photos / "coffee.jpg").splitlines()
    ]
    assert {prediction["class"] for prediction in predictions} <= {"cup", "foreground"}
    assert predictions
    assert all(prediction["confidence"] >= 0.2 for prediction in predictions)


def test_curl(run: Run, photos: Path) -> None:
    said, answer = run("curl.sh", photos / "coffee.jpg", 320, 240).splitlines()
    assert said.startswith("the object at 320, 240 of 600,400 pixels: box ")
    outputs = {output["name"]: output["data"] for output in json.loads(answer)["outputs"]}
    (mask,) = outputs["masks"]
    assert coco_mask.decode(json.loads(mask)).shape == (400, 600)


@asynccontextmanager
async def page(server: TritonServer, photo: Path) -> AsyncIterator[aiohttp.ClientSession]:
    """Start the example's own server; yield a browser's session with it."""
    (port,) = free_ports(1)
    process = subprocess.Popen(
        [sys.executable, EXAMPLES / "browser.py", photo, str(port)],
        env={**os.environ, "TRITON_SAM3_URL": server.grpc_url},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert f":{port}" in await asyncio.to_thread(process.stdout.readline)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            yield session
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)
    assert process.returncode == 0


def drawn(answer: dict[str, Any]) -> npt.NDArray[np.bool_]:
    """The pixels that the page draws as the object."""
    data = base64.b64decode(answer["mask"].removeprefix("data:image/png;base64,"))
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGBA"))[..., 3] > 0


async def test_browser(server: TritonServer, photos: Path) -> None:
    photo = photos / "coffee.jpg"
    clicks: list[dict[str, Any]] = [
        {"x": 320, "y": 240, "positive": True},
        {"x": 60, "y": 40, "positive": False},
    ]
    with Client(server.grpc_url) as client, client.open(photo) as view:
        right = [view.click(**click) for click in clicks]
    async with page(server, photo) as browser:
        async with browser.get("/") as answer:
            assert "/clicks" in await answer.text()
        async with browser.get("/photo") as answer:
            assert Image.open(io.BytesIO(await answer.read())).size == (600, 400)
        async with browser.ws_connect("/clicks") as tab, browser.ws_connect("/clicks") as other:
            await other.send_json(clicks[0])
            others = await other.receive_json()  # alone: decoding in a batch may round differently
            for message in (*clicks, {"undo": True}, {"reset": True}, {**clicks[0], "x": 6000}):
                await tab.send_json(message)
            first, second, undone, reset, outside = [await tab.receive_json() for _ in range(5)]
    assert others == first
    for shown, expected in ((first, right[0]), (second, right[1]), (undone, right[0])):
        np.testing.assert_array_equal(drawn(shown), expected.masks[0])
        assert shown["scores"] == expected.scores.tolist()
    assert reset == {"mask": "", "scores": []}
    assert "6000" in outside["error"]


@pytest.mark.parametrize(
    "name", [path.name for path in EXAMPLES.glob("*.*") if path.suffix != ".html"]
)
def test_without_arguments_an_example_explains_itself(run: Run, name: str) -> None:
    said = run(name, fails=True)
    assert "Traceback" not in said
    assert f"examples/{name} " in said
    needed = {"click_session.py": 2, "folder_to_coco.py": 3, "curl.sh": 3}.get(name, 1)
    assert run(name, *["photo.jpg"] * (needed - 1), fails=True) == said


def test_every_example_is_run() -> None:
    tested = {name.removeprefix("test_") for name in globals() if name.startswith("test_")}
    assert {path.stem for path in EXAMPLES.iterdir() if path.is_file()} <= tested

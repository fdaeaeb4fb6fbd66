import json
from pathlib import Path

import pytest

from server import StartError, TritonServer
from server.health import canary_request, check_canary
from tests.server import tiny

SIDE = 28
INPUTS: tiny.Tensors = {
    "image": ("TYPE_UINT8", [SIDE, SIDE, 3]),
    "point_coords": ("TYPE_FP32", [-1, -1, 2]),
    "point_labels": ("TYPE_INT32", [-1, -1]),
}
SCORES: tiny.Tensors = {"iou_predictions": ("TYPE_FP32", [-1, -1])}
MODEL = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def answer(self, request):
        image, coords, labels = (
            pb_utils.get_input_tensor_by_name(request, name).as_numpy()
            for name in ("image", "point_coords", "point_labels")
        )
        assert image.shape == (1, {side}, {side}, 3) and not image.any()
        assert coords.tolist() == [[[[0.5, 0.5]]]] and labels.tolist() == [[[1]]]
        scores = np.full((1, 1, 3), {score}, np.float32)
        return pb_utils.InferenceResponse([pb_utils.Tensor("iou_predictions", scores)])
"""


def repository_with(folder: Path, score: str) -> Path:
    source = MODEL.format(side=SIDE, score=score)
    tiny.add_model(folder, "sam3_interactive", tiny.config("python", INPUTS, SCORES), python=source)
    return folder


def test_a_start_includes_one_click_on_a_blank_image(tmp_path: Path) -> None:
    server = TritonServer(repository_with(tmp_path, "0.5"))
    try:
        server.start()
        once = 'nv_inference_request_success{model="sam3_interactive",version="1"} 1\n'
        # Triton counts a request a moment after its answer.
        assert tiny.wait_for(lambda: once in tiny.get(server.metrics_url), seconds=10)
    finally:
        server.kill()


@pytest.mark.parametrize(
    ("score", "message"),
    [("np.nan", "without finite scores"), ("1 / 0", "canary inference failed: .*by zero")],
)
def test_a_failing_canary_fails_the_start(tmp_path: Path, score: str, message: str) -> None:
    server = TritonServer(repository_with(tmp_path, score))
    with pytest.raises(StartError, match=f"(?s){message}"):
        server.start()
    assert not server.is_alive()


def test_the_request_is_sized_by_the_config() -> None:
    config = {"input": [{"name": "image", "dims": ["14", "14", "3"]}]}
    header, pixels = canary_request(config)
    image = json.loads(header)["inputs"][0]
    assert image["shape"] == [1, 14, 14, 3]
    assert len(pixels) == image["parameters"]["binary_data_size"] == 14 * 14 * 3


@pytest.mark.parametrize(
    ("status", "answer", "message"),
    [
        (400, b'{"error":"labels are missing"}', "failed: labels are missing"),
        (502, b"<html>bad gateway</html>", "failed: <html>bad gateway</html>"),
        (200, b'{"outputs":[{"name":"iou_predictions","data":[]}]}', "without finite scores"),
        (200, b'{"outputs":[{"name":"iou_predictions","data":[0.1, NaN]}]}', "without finite"),
    ],
)
def test_bad_answers_fail_the_canary(status: int, answer: bytes, message: str) -> None:
    with pytest.raises(StartError, match=message):
        check_canary(status, answer)

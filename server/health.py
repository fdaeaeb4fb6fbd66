"""Checks a running server over plain HTTP: is it ready, and does it answer?"""

import http.client
import json
import math
from collections.abc import Mapping
from typing import Any

from server.errors import StartError

ENSEMBLE = "sam3_interactive"
IMAGE, COORDINATES, LABELS, SCORES = "image", "point_coords", "point_labels", "iou_predictions"


class Probe:
    """One server's HTTP endpoint."""

    def __init__(self, host: str, port: int) -> None:
        self._host, self._port = host, port

    def is_ready(self) -> bool:
        """Whether the server and every model report that they are ready."""
        try:
            return self.request("/v2/health/ready", timeout=5)[0] == http.client.OK
        except OSError:
            return False

    def canary(self, timeout: float) -> None:
        """Send one click in the middle of a black image through the ensemble, if there is one.

        timeout: seconds. Raises StartError if the answer is anything but finite scores, OSError
        if there is no answer.
        """
        status, config = self.request(f"/v2/models/{ENSEMBLE}/config", timeout)
        if status != http.client.OK:
            return  # another repository: being ready must suffice
        inference = canary_request(json.loads(config))
        check_canary(*self.request(f"/v2/models/{ENSEMBLE}/infer", timeout, inference))

    def request(
        self, path: str, timeout: float, inference: tuple[bytes, bytes] | None = None
    ) -> tuple[int, bytes]:
        """Status and body of the response to GET, or to an inference's JSON header and binary part.

        Raises OSError if there is none within `timeout` seconds.
        """
        connection = http.client.HTTPConnection(self._host, self._port, timeout=timeout)
        try:
            if inference is None:
                connection.request("GET", path)
            else:
                length = {"Inference-Header-Content-Length": str(len(inference[0]))}
                connection.request("POST", path, b"".join(inference), length)
            response = connection.getresponse()
            return response.status, response.read()
        except http.client.HTTPException as error:  # the server closed the connection mid-response
            raise ConnectionError(repr(error)) from error
        finally:
            connection.close()


def canary_request(config: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """The canary's JSON header and binary image, sized by the ensemble's config."""
    image = next(entry for entry in config["input"] if entry["name"] == IMAGE)
    shape = [1, *(int(side) for side in image["dims"])]
    pixels = bytes(math.prod(shape))
    header = {
        "inputs": [
            {
                "name": IMAGE,
                "datatype": "UINT8",
                "shape": shape,
                "parameters": {"binary_data_size": len(pixels)},
            },
            {"name": COORDINATES, "datatype": "FP32", "shape": [1, 1, 1, 2], "data": [0.5, 0.5]},
            {"name": LABELS, "datatype": "INT32", "shape": [1, 1, 1], "data": [1]},
        ],
        "outputs": [{"name": SCORES}],
    }
    return json.dumps(header).encode(), pixels


def check_canary(status: int, answer: bytes) -> None:
    """Raise StartError unless `answer` contains finite scores."""
    try:
        body = json.loads(answer)
    except ValueError:
        body = {"error": answer[:500].decode(errors="replace")}
    if status != http.client.OK:
        raise StartError(f"The canary inference failed: {body.get('error', body)}")
    scores = [value for output in body["outputs"] for value in output["data"]]
    if not scores or not all(isinstance(s, float | int) and math.isfinite(s) for s in scores):
        raise StartError(f"The canary inference answered without finite scores: {scores}")

"""Meta's complete predictor in a Triton Python backend: repository and caller."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import tritonclient.grpc as triton

from benchmarks.environment import ROOT
from benchmarks.peers import Click, Mask, Photo, best
from benchmarks.wire import tensor

MODEL = "sam3_whole"
SOURCES = Path(__file__).resolve().parent
PACKAGES = ("benchmarks", "export")
"""Packages of this checkout that the model imports."""


def write_repository(folder: Path, checkpoint: Path, device: str = "cpu") -> Path:
    """Write a model repository with the one model; returns `folder`."""
    version = folder / MODEL / "1"
    version.mkdir(parents=True)
    shutil.copy(SOURCES / "model.py", version)
    # Triton's stub ignores PYTHONPATH and looks for packages next to the model.
    for package in PACKAGES:
        (version / package).symlink_to(ROOT / package)
    parameters = {"checkpoint": str(checkpoint.resolve()), "device": device}
    lines = [
        f'parameters {{ key: "{key}" value: {{ string_value: "{value}" }} }}'
        for key, value in parameters.items()
    ]
    config = (SOURCES / "config.pbtxt").read_text()
    (folder / MODEL / "config.pbtxt").write_text("\n".join([config, *lines]) + "\n")
    return folder


class WholeInTriton:
    """The server keeps only the last image, so it cannot serve several photos at once."""

    def __init__(self, url: str) -> None:
        self._client = triton.InferenceServerClient(url.removeprefix("grpc://"))

    def open(self, photo: Photo) -> Click:
        middle = (photo.shape[1] / 2, photo.shape[0] / 2)
        self.ask(*middle, photo)
        return self.ask

    def ask(self, x: float, y: float, photo: Photo | None = None) -> Mask:
        """Click on a photo, or on the last one that the server received."""
        inputs = [
            tensor("point_coords", np.array([[x, y]], np.float32)),
            tensor("point_labels", np.ones(1, np.int32)),
        ]
        if photo is not None:
            inputs.append(tensor("image", photo))
        answer = self._client.infer(MODEL, inputs)
        return best(answer.as_numpy("masks"), answer.as_numpy("scores"))

    def close(self) -> None:
        self._client.close()

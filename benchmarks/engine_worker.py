"""The process behind `benchmarks.engine.Engine`: one JSON line in, one JSON line out.

python -m benchmarks.engine_worker REPOSITORY DEVICE onnxruntime|tensorrt|pytorch CHECKPOINT
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import environment  # noqa: F401 - before torch, as the served decoder does
import torch
from decoder import Decoder
from jobs import Job
from prompts import Limits, parse_prompts
from store import Features, ImageStore
from torch import Tensor

from benchmarks.accuracy import worst_mask_iou
from benchmarks.encoders import Encoder, OnnxRuntimeEncoder, pytorch_encoder
from benchmarks.figures import reason
from export import check
from export.architecture import InteractiveModel
from export.checkpoint import load
from export.encoder import FEATURES
from export.repository import DECODER, ENCODER, read_config


class Worker:
    """The encoder and decoder of one repository on one device."""

    def __init__(self, repository: Path, device: str, encoder: str, checkpoint: str) -> None:
        self._device = torch.device(device)
        self._checkpoint = Path(checkpoint)
        inputs = {tensor.name: tensor.dims for tensor in read_config(repository, ENCODER).input}
        self._side = int(inputs["image"][0])
        self._decoder = Decoder(repository / DECODER / "1" / "decoder.pt2", self._device)
        self._encode = self._make_encoder(repository, encoder)
        black = torch.zeros(1, self._side, self._side, 3, dtype=torch.uint8)
        self._features = self._embed(black).kept_copy()  # in the form in which a click finds them
        # As the server does at startup: later shapes are no longer checked against the traced ones.
        shapes = {n: tuple(t.shape) for n, t in self._features._asdict().items()}
        self._decoder.prepare(shapes, self._features.image_embed.dtype)
        self._limits = Limits(1024, 1024, self._features.high_res_feats_0.shape[-1])

    def encode(self, batch: int) -> float:
        shape = (batch, self._side, self._side, 3)
        images = torch.randint(0, 256, shape, dtype=torch.uint8, device=self._device)
        return self._time_on_device(lambda: self._encode(images))

    def decode(self, objects: int, images: int) -> float:
        coords = torch.rand(objects, 1, 2).numpy()
        labels = torch.ones(objects, 1, dtype=torch.int32).numpy()
        prompts = parse_prompts(coords, labels, None, self._limits)
        # Copies, which are read from different memory as different images are.
        kept = [self._features.kept_copy() for _ in range(images)]
        jobs = [Job(features, prompts, best_only=True) for features in kept]
        self._synchronize()
        started = time.perf_counter()
        for answers in [self._decoder.start(part) for part in self._decoder.split_batch(jobs)]:
            answers.by_job()
        return time.perf_counter() - started

    def keep(self, images: int) -> float:
        before = self._taken()
        store = ImageStore(max_bytes=sys.maxsize, max_idle_seconds=3600)
        for _ in range(images):
            store.keep(self._features)
        return float(self._taken() - before)

    def _taken(self) -> int:
        """Memory unavailable to others, including gaps between tensors."""
        torch.cuda.empty_cache()
        return torch.cuda.memory_reserved(self._device)

    def mask_iou(self) -> float:
        model = load(self._checkpoint)
        return min(self._worst_iou(model, photo) for photo in check.PHOTOS)

    def _worst_iou(self, model: InteractiveModel, photo: str) -> float:
        image = check.load_photo(photo, self._side)
        ours = tuple(f.cpu() for f in self._encode(torch.from_numpy(image)[None].to(self._device)))
        theirs = check.encode_reference(model, image)
        return worst_mask_iou(model, (ours[0], ours[1], ours[2]), theirs)

    def _make_encoder(self, repository: Path, encoder: str) -> Encoder:
        config = read_config(repository, ENCODER)
        if encoder != "pytorch":
            graph, compiled = repository / ENCODER / "1" / "model.onnx", encoder == "tensorrt"
            return OnnxRuntimeEncoder(graph, self._device, self._side, tensorrt=compiled)
        types = {10: torch.float16, 11: torch.float32}  # TYPE_FP16, TYPE_FP32
        return pytorch_encoder(self._checkpoint, types[config.output[0].data_type], self._device)

    def _embed(self, image: Tensor) -> Features:
        named = zip(FEATURES, self._encode(image.to(self._device)), strict=True)
        return Features(**{name: tensor[0] for name, tensor in named})

    def _synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _time_on_device(self, call: Callable[[], object]) -> float:
        if self._device.type != "cuda":
            started = time.perf_counter()
            call()
            return time.perf_counter() - started
        start = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        end = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._synchronize()
        start.record()
        call()
        end.record()
        self._synchronize()
        return float(start.elapsed_time(end)) / 1000


def main() -> None:
    # Keep what libraries print out of the answers.
    answers = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        try:
            worker = Worker(Path(sys.argv[1]), *sys.argv[2:5])
        except Exception as error:
            traceback.print_exc()
            print(json.dumps(reason(error)), file=answers, flush=True)
            return
        print(0, file=answers, flush=True)
        for line in sys.stdin:
            method, arguments = json.loads(line)
            try:
                answer: float | str = getattr(worker, method)(**arguments)
            except Exception as error:
                traceback.print_exc()
                answer = reason(error)
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()

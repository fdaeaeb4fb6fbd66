"""The decoder as Triton runs it: decodes requests together but answers each on its own.

requests ─► wire.parse_request ─► decoder.start (all at once; one by one if that fails)
                 │      ▲                │
        prompts.parse_prompts   store    ▼
                               .get/.keep ◄── wire.respond ─► responses
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import environment  # noqa: F401 - before torch
import triton_python_backend_utils as pb_utils
from decoder import Decoder
from jobs import Answers, Masks
from metrics import Metrics
from program import ProgramError, is_out_of_memory
from prompts import InvalidPrompt
from settings import SettingError, Settings
from store import ImageNotKept, ImageStore, StoreTooSmall
from wire import (
    InvalidEmbeddings,
    ParsedRequest,
    RequestTensors,
    error_response,
    parse_request,
    respond,
)

NOT_FOUND = (
    "image_id not found: it was never issued by this server or has been evicted; send the image "
    "again with keep_image"
)
OUT_OF_MEMORY = (
    "the decoder ran out of memory on this request; ask for fewer objects at a time, or try again "
    "later"
)
FAILED = "the decoder failed on this request; the server's log says why"


class Decoding(NamedTuple):
    """Requests that are decoded together, and their masks, which may still be on their way."""

    indices: list[int]
    answers: Answers


@dataclass
class Batch:
    """Requests that are started together, by their index."""

    parsed: dict[int, ParsedRequest] = field(default_factory=dict)
    """Valid requests without a response yet."""
    responses: dict[int, Any] = field(default_factory=dict)
    decodings: list[Decoding] = field(default_factory=list)


class TritonPythonModel:
    """One instance of sam3_prompt_decoder."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the program; a TritonModelException's sentence is what the server reports."""
        try:
            self._settings = Settings.from_config(args, json.loads(args["model_config"]))
            self._decoder = Decoder(self._settings.program, self._settings.device)
            self._decoder.prepare(self._settings.feature_shapes, self._settings.feature_dtype)
        except (SettingError, ProgramError) as error:
            raise pb_utils.TritonModelException(str(error)) from error
        if self._decoder.warning:
            pb_utils.Logger.log_warn(self._decoder.warning)
        self._store = ImageStore(
            max_bytes=self._settings.kept_images_bytes,
            max_idle_seconds=self._settings.kept_images_idle_seconds,
        )
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self._metrics = Metrics(self._store, labels)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request separately: a bad one gets an error, the others get their masks.

        While a GPU decodes one batch, the next is parsed and the one before is answered.
        """
        batches = [self._start(batch) for batch in self._decoder.split_batch(requests)]
        return [response for batch in batches for response in self._finish(batch)]

    def finalize(self) -> None:
        """Stop the metrics thread before Triton ends the process."""
        self._metrics.close()

    def _start(self, requests: Sequence[Any]) -> Batch:
        """Parse requests, reject invalid ones and start decoding the others."""
        batch = Batch()
        for i, request in enumerate(requests):
            try:
                batch.parsed[i] = self._parse(request)
            except Exception as error:
                batch.responses[i] = self._explain(error)
        batch.decodings = self._decode(batch, list(batch.parsed))
        return batch

    def _parse(self, request: Any) -> ParsedRequest:
        settings = self._settings
        tensors = RequestTensors(request)
        return parse_request(tensors, self._store, settings.limits, settings.device)

    def _decode(self, batch: Batch, indices: list[int]) -> list[Decoding]:
        """Start decoding these requests together.

        If that fails, they are started one by one, so that only the one at fault gets an error.
        """
        start, launches = time.perf_counter(), self._decoder.launches
        try:
            answers = self._decoder.start([job for i in indices for job in batch.parsed[i].jobs])
            self._count(start, self._decoder.launches - launches)
            return [Decoding(indices, answers)]
        except Exception as error:
            if len(indices) == 1:
                self._fail(batch, indices, error)
                return []
        # Outside the handler, where the exception no longer keeps its tensors alive.
        return [decoding for i in indices for decoding in self._decode(batch, [i])]

    def _finish(self, batch: Batch) -> list[Any]:
        """Wait for a batch's masks and return its responses, in the order of the requests."""
        for indices, answers in batch.decodings:
            start = time.perf_counter()
            try:
                masks = iter(answers.by_job())
            except Exception as error:  # a GPU reports errors only when its results are read
                self._fail(batch, indices, error)
                continue
            self._count(start, 0)
            for i in indices:
                parsed = batch.parsed.pop(i)
                batch.responses[i] = self._respond(parsed, [next(masks) for _ in parsed.jobs])
        return [batch.responses[i] for i in sorted(batch.responses)]

    def _count(self, start: float, launches: int) -> None:
        self._metrics.count_decoding(time.perf_counter() - start, launches)

    def _respond(self, parsed: ParsedRequest, masks: list[Masks]) -> Any:
        try:
            response = respond(parsed, masks, self._store)
        except Exception as error:
            return self._explain(error)
        self._metrics.count_request(parsed.objects)
        return response

    def _fail(self, batch: Batch, indices: Sequence[int], error: Exception) -> None:
        """Answer requests with an error."""
        for i in indices:
            del batch.parsed[i]
            batch.responses[i] = self._explain(error)

    def _explain(self, error: Exception) -> Any:
        """The error response: in full if the caller can act on it, else with details in the log."""
        codes = pb_utils.TritonError
        if isinstance(error, InvalidPrompt | InvalidEmbeddings | StoreTooSmall):
            if isinstance(error, InvalidEmbeddings):  # the caller's fault, or the encoder's
                self._metrics.count_failure()
                pb_utils.Logger.log_error(str(error))
            return error_response(str(error), codes.INVALID_ARG)
        if isinstance(error, ImageNotKept):
            return error_response(NOT_FOUND, codes.NOT_FOUND)
        self._metrics.count_failure()
        pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
        return error_response(OUT_OF_MEMORY if is_out_of_memory(error) else FAILED, codes.INTERNAL)

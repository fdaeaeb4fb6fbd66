"""The decoder as Triton runs it: loading, and answering requests together but each by itself.

requests ─► wire.read_question ─► decoder.start (all at once; one by one if that fails)
                 │      ▲                │
        prompts.parse_prompts   store    ▼
                               .get/.keep ◄── wire.respond ─► responses
"""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import environment  # noqa: F401 - before torch
import triton_python_backend_utils as pb_utils
from decoder import Decoder
from jobs import Answers, Masks
from metrics import Metrics
from program import ProgramError, is_out_of_memory
from prompts import InvalidPrompt
from settings import SettingError, Settings
from store import ImageNotKept, ImageStore, StoreTooSmall
from wire import Inputs, InvalidEmbeddings, Question, read_question, refuse, respond

NOT_FOUND = (
    "image_id not found: it was never issued by this server, or was forgotten; send the image "
    "again with keep_image"
)
OUT_OF_MEMORY = (
    "the decoder ran out of memory on this request; ask for fewer objects at a time, or again later"
)
FAILED = "the decoder failed on this request; the server's log says why"

Decoding = list[tuple[list[int], Answers]]
"""The numbers of questions that are decoded together, and their masks, maybe on their way."""


class TritonPythonModel:
    """One instance of sam3_prompt_decoder."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the program; a TritonModelException's sentence is what the server reports."""
        try:
            self._settings = Settings.of(args, json.loads(args["model_config"]))
            self._decoder = Decoder(self._settings.program, self._settings.device)
            self._decoder.check(self._settings.feature_shapes, self._settings.feature_dtype)
        except (SettingError, ProgramError) as error:
            raise pb_utils.TritonModelException(str(error)) from error
        if self._decoder.remark:
            pb_utils.Logger.log_warn(self._decoder.remark)
        self._store = ImageStore(
            max_bytes=self._settings.kept_images_bytes,
            max_idle_seconds=self._settings.kept_images_idle_seconds,
        )
        labels = {"model": args["model_name"], "version": args["model_version"]}
        self._metrics = Metrics(self._store, labels)

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Answer every request by itself: a bad one gets an error, the others their masks.

        In parts: while a GPU decodes one, the next is read and the one before is answered.
        """
        asked = [self._ask(part) for part in self._decoder.parts(requests)]
        return [answer for part in asked for answer in self._answer(*part)]

    def finalize(self) -> None:
        """End the metrics' thread before Triton takes the process down."""
        self._metrics.close()

    def _read(self, request: Any) -> Question:
        settings = self._settings
        return read_question(Inputs(request), self._store, settings.limits, settings.device)

    def _ask(self, requests: Sequence[Any]) -> tuple[list[Any], Decoding]:
        """Each request's question or refusal, and what is decoded of the questions."""
        questions = [self._attempt(self._read, request) for request in requests]
        good = [i for i, question in enumerate(questions) if isinstance(question, Question)]
        return questions, self._start(questions, good)

    def _start(self, questions: list[Any], good: list[int]) -> Decoding:
        """Start to decode the questions of these numbers together.

        What fails together is tried again one by one: only the guilty is refused, in its place.
        """
        start, launches = time.perf_counter(), self._decoder.launches
        try:
            started = self._decoder.start([job for i in good for job in questions[i].jobs])
            self._count(start, self._decoder.launches - launches)
            return [(good, started)]
        except Exception as error:
            if len(good) == 1:
                questions[good[0]] = self._explain(error)
                return []
        # Outside of the handler, where the failure no longer holds its tensors.
        return [one for i in good for one in self._start(questions, [i])]

    def _answer(self, questions: list[Any], decoding: Decoding) -> list[Any]:
        """The responses, in place of the questions."""
        for good, started in decoding:
            start = time.perf_counter()
            try:
                masks = iter(started.by_job())
            except Exception as error:  # of a GPU, which fails later than it is asked
                for i in good:
                    questions[i] = self._explain(error)
                continue
            self._count(start, 0)
            for i in good:
                own = [next(masks) for _ in questions[i].jobs]
                questions[i] = self._attempt(self._respond, questions[i], own)
        return questions

    def _count(self, start: float, launches: int) -> None:
        self._metrics.count_decoding(time.perf_counter() - start, launches)

    def _respond(self, question: Question, masks: list[Masks]) -> Any:
        response = respond(question, masks, self._store)
        self._metrics.count_request(question.objects)
        return response

    def _attempt(self, step: Callable[..., Any], *args: Any) -> Any:
        """The step's result, or the refusal of the one request that it was about."""
        try:
            return step(*args)
        except Exception as error:
            return self._explain(error)

    def _explain(self, error: Exception) -> Any:
        """Refuse a request: in full where the caller can do something, or else in the log."""
        codes = pb_utils.TritonError
        if isinstance(error, InvalidPrompt | InvalidEmbeddings | StoreTooSmall):
            return refuse(str(error), codes.INVALID_ARG)
        if isinstance(error, ImageNotKept):
            return refuse(NOT_FOUND, codes.NOT_FOUND)
        self._metrics.count_failure()
        pb_utils.Logger.log_error("".join(traceback.format_exception(error)))
        return refuse(OUT_OF_MEMORY if is_out_of_memory(error) else FAILED, codes.INTERNAL)

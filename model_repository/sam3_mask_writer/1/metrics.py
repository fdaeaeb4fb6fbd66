"""The mask writer's own metric on Triton's metrics endpoint: finished masks.

A request for many large masks takes longer than a probe waits, and Triton counts it only when it is
answered: until then, this counter shows that the writer is at work.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import triton_python_backend_utils as pb_utils

NAME = "sam3_masks_written_total"
PERIOD_SECONDS = 1.0


class Metrics:
    """The counter; both instances of the model share it, as Triton identifies it by its labels."""

    def __init__(self, labels: Mapping[str, str]) -> None:
        self._family = pb_utils.MetricFamily(
            name=NAME, description="Masks finished", kind=pb_utils.MetricFamily.COUNTER
        )
        self._metric = self._family.Metric(labels=dict(labels))
        self._written = 0
        self._published = time.monotonic()
        self._failed = False

    def count_mask(self) -> None:
        """Count a finished mask; publish at most once a second: it messages another process."""
        self._written += 1
        if time.monotonic() - self._published >= PERIOD_SECONDS:
            self.publish()

    def publish(self) -> None:
        """Send what was counted; if that fails, as without shared memory, it is sent next time."""
        self._published = time.monotonic()
        try:
            self._metric.increment(self._written)
            self._written, self._failed = 0, False
        except Exception as error:  # Triton has exception types of its own
            if not self._failed:  # once, not with every request
                pb_utils.Logger.log_warn(f"{NAME} is not up to date: {error}")
            self._failed = True

    def close(self) -> None:
        """Remove the metric from the endpoint."""
        del self._metric  # must be deleted before its family
        del self._family

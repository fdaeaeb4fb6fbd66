"""Requests as OpenTelemetry spans, where it is installed (the package's extra ``tracing``).

    the caller's span ── infer sam3_interactive (ours) ── the server's spans, under one trace id

A server started with ``--otlp-url`` traces every request that brings a trace, so it is brought only
where the caller's sampler wants it.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from .flow import Call, Infer

try:
    from opentelemetry import propagate, trace
except ImportError:
    _installed = False
else:
    _installed = True


@contextmanager
def traced(call: Call) -> Iterator[Call]:
    """A span around the sending of an inference, and the call with the headers that name it.

    Each try is a span of its own; one that fails has the error. Without OpenTelemetry, an SDK of
    it, or for a question that is no inference, it is the call as it was.
    """
    request = call.request
    if not _installed or not isinstance(request, Infer):
        yield call
        return
    with trace.get_tracer("triton_sam3").start_as_current_span(
        f"infer {request.model}",
        kind=trace.SpanKind.CLIENT,
        attributes={"triton.model_name": request.model},
    ) as span:
        headers: dict[str, str] = {}
        if span.get_span_context().trace_flags.sampled:
            propagate.inject(headers)
        yield replace(call, request=replace(request, headers={**request.headers, **headers}))

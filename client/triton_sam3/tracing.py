"""Requests as OpenTelemetry spans, if it is installed (the package's extra ``tracing``).

    the caller's span ── infer sam3_interactive (ours) ── the server's spans, under one trace id

A server started with ``--otlp-url`` traces every request that carries a trace context, so it is
sent only if the caller's sampler has sampled the trace.
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
    """Wrap the sending of an inference in a span; yield the call with the headers that name it.

    Each attempt is a span of its own; one that fails records the error. Without OpenTelemetry or an
    SDK for it, or for a call that is not an inference, the call is unchanged.
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

"""Requests as spans. That the server joins the trace is tests/docker/test_serve.py's."""

from collections.abc import Iterator
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.trace import SpanKind, StatusCode, TraceFlags

from triton_sam3 import tracing
from triton_sam3.errors import Overloaded
from triton_sam3.flow import Call, Flow, Infer, Query
from triton_sam3.retry import Retries
from triton_sam3.steps import perform, perform_async

REQUEST = Infer("sam3_interactive", {}, ("masks",), {"x-sam3-image": "digest"})


class Server:
    """Refuses the first tries, and remembers all."""

    def __init__(self, refusals: int = 0) -> None:
        self.refusals = refusals
        self.headers: list[dict[str, str]] = []

    def call(self, call: Call) -> Any:
        assert isinstance(call.request, Infer)
        self.headers.append(dict(call.request.headers))
        if len(self.headers) <= self.refusals:
            raise Overloaded("busy")
        return {}

    def close(self) -> None:
        raise AssertionError


class AsyncServer:
    def __init__(self) -> None:
        self.server = Server()

    async def call(self, call: Call) -> Any:
        return self.server.call(call)

    async def close(self) -> None:
        raise AssertionError


@pytest.fixture
def provider(monkeypatch: pytest.MonkeyPatch) -> TracerProvider:
    """In place of the process's own, which can be set only once."""
    made = TracerProvider()
    monkeypatch.setattr(trace, "get_tracer", made.get_tracer)
    return made


@pytest.fixture
def exported(provider: TracerProvider) -> InMemorySpanExporter:
    memory = InMemorySpanExporter()
    provider.add_span_processor(SimpleSpanProcessor(memory))
    return memory


def sent(retries: int = 0) -> Flow[Any]:
    return Retries(retries, base=0.001).send(REQUEST)


def traceparents(server: Server) -> Iterator[list[str]]:
    return (headers["traceparent"].split("-") for headers in server.headers)


def id_of(span: ReadableSpan) -> str:
    context = span.get_span_context()
    assert context is not None
    return trace.format_span_id(context.span_id)


def test_each_attempt_is_a_span_of_the_callers_trace(
    provider: TracerProvider, exported: InMemorySpanExporter
) -> None:
    server = Server(refusals=1)
    with provider.get_tracer("caller").start_as_current_span("click") as span:
        perform(sent(retries=1), server)
    refused, answered, _ = exported.get_finished_spans()
    assert [refused.name, answered.name] == ["infer sam3_interactive"] * 2
    assert {refused.kind, answered.kind} == {SpanKind.CLIENT}
    assert [refused.status.status_code, answered.status.status_code] == [
        StatusCode.ERROR,
        StatusCode.UNSET,
    ]
    for one, (_, trace_id, span_id, flags) in zip(
        (refused, answered), traceparents(server), strict=True
    ):
        assert int(trace_id, 16) == span.get_span_context().trace_id
        assert span_id == id_of(one)
        assert one.parent == span.get_span_context()
        assert int(flags, 16) & TraceFlags.SAMPLED


async def test_an_async_request_is_a_span_too(exported: InMemorySpanExporter) -> None:
    transport = AsyncServer()
    await perform_async(sent(), transport)
    (span,) = exported.get_finished_spans()
    ((_, _, span_id, _),) = traceparents(transport.server)
    assert span_id == id_of(span)


def test_the_server_does_not_trace_what_is_not_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    silent = TracerProvider(sampler=ALWAYS_OFF)
    monkeypatch.setattr(trace, "get_tracer", silent.get_tracer)
    server = Server()
    perform(sent(), server)
    assert server.headers == [{"x-sam3-image": "digest"}]


def test_without_an_sdk_nothing_is_added() -> None:
    server = Server()
    perform(sent(), server)
    assert server.headers == [{"x-sam3-image": "digest"}]


@pytest.mark.usefixtures("exported")
def test_queries_are_not_spans() -> None:
    sent = Call(Query("get_model_config", ("sam3_interactive",)), 1.0)
    with tracing.traced(sent) as call:
        assert call is sent


@pytest.mark.usefixtures("exported")
def test_without_opentelemetry_the_call_is_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracing, "_installed", False)
    sent = Call(REQUEST, 1.0)
    with tracing.traced(sent) as call:
        assert call is sent

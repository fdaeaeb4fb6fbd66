"""The four ways to reach Triton: gRPC and HTTP, blocking and async.

Each wraps one of tritonclient's clients and keeps its connections open between calls. A call is
an `Infer` or a `Query` value with its deadline; the answer is arrays by name or plain JSON. Closing
a transport makes the calls in flight, in other threads or tasks, raise `ClientUnusable`.
"""

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from types import ModuleType
from typing import Any, Protocol

import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio

from .contract import TENSORS
from .deadline import timeout
from .endpoint import Endpoint
from .errors import SAM3Error
from .flow import Array, Call, Infer, InSharedMemory, Query
from .http_session import guard
from .lifetime import closed_error, keep_in_forks
from .translation import translate

_MAX_MESSAGE_BYTES = 2**31 - 1
_GRPC_OPTIONS = [
    ("grpc.max_send_message_length", _MAX_MESSAGE_BYTES),
    ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
    # Reconnects to a restarted server within half a second; gRPC would wait up to two minutes.
    # (Not the *min* backoff: it bounds how long establishing a connection may take.)
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
    # A host that vanished is detected when it acknowledges nothing for 20 s (TCP_USER_TIMEOUT);
    # otherwise each call would wait for its own timeout, for a quarter of an hour. The pings
    # themselves are no more frequent than Triton tolerates, one every 300 s.
    ("grpc.keepalive_time_ms", 310_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # As over HTTP: the environment's http_proxy would be used even for a server on this host.
    ("grpc.enable_http_proxy", 0),
]
_MAX_HTTP_CONNECTIONS = 100


class Transport(Protocol):
    """A blocking connection to the server. Thread-safe."""

    def call(self, call: Call) -> Any: ...

    def close(self) -> None: ...


class AsyncTransport(Protocol):
    """An async connection to the server, for use from one event loop."""

    async def call(self, call: Call) -> Any: ...

    async def close(self) -> None: ...


def open_transport(endpoint: Endpoint, headers: Mapping[str, str]) -> Transport:
    """A blocking transport; nothing is sent before the first call."""
    return (GrpcTransport if endpoint.is_grpc else HttpTransport)(endpoint, headers)


def open_async_transport(endpoint: Endpoint, headers: Mapping[str, str]) -> AsyncTransport:
    """An async transport; nothing is sent before the first call."""
    return (AsyncGrpcTransport if endpoint.is_grpc else AsyncHttpTransport)(endpoint, headers)


class BaseTransport:
    """What the transports share: the URL to name in errors, and whether they are closed."""

    def __init__(self, endpoint: Endpoint) -> None:
        self._url = endpoint.url
        self._closed = False
        keep_in_forks(self)

    def failure(self, error: Exception, call: Call, started: float) -> SAM3Error:
        """The error a caller sees for `error`, raised by a call begun at `started`."""
        if self._closed:
            return closed_error(self._url)
        return translate(error, self._url, call.spent + time.monotonic() - started)


class AsyncBaseTransport(BaseTransport):
    """What the async transports share: each call is a task of its own, which closing cancels.

    gRPC cancels the task that awaits a call on a closed channel; if it were the caller's own, it
    would look as if somebody had cancelled it.
    """

    _client: Any

    def __init__(self, endpoint: Endpoint) -> None:
        super().__init__(endpoint)
        self._in_flight: set[asyncio.Task[Any]] = set()

    async def call(self, call: Call) -> Any:
        if self._closed:
            raise closed_error(self._url)
        started = time.monotonic()
        try:
            return await self._in_own_task(self._send(call))
        except Exception as error:
            raise self.failure(error, call, started) from error

    async def _in_own_task(self, work: Coroutine[Any, Any, Any]) -> Any:
        task = asyncio.ensure_future(work)
        self._in_flight.add(task)
        task.add_done_callback(self._done)
        try:
            await asyncio.wait([task])
            if task.cancelled():
                raise ConnectionError("the call was cancelled in flight")
            return task.result()
        finally:
            task.cancel()  # does nothing if it is done
            del task  # its error's traceback leads back here

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._in_flight.discard(task)
        if not task.cancelled():
            task.exception()  # retrieved here, as a cancelled caller will not

    async def _send(self, call: Call) -> Any:
        raise NotImplementedError

    async def close(self) -> None:
        self._closed = True
        if self._in_flight:
            for task in self._in_flight:
                task.cancel()
            await asyncio.wait(self._in_flight)
        await self._client.close()


class GrpcTransport(BaseTransport):
    def __init__(self, endpoint: Endpoint, headers: Mapping[str, str]) -> None:
        super().__init__(endpoint)
        self._headers = _lower(headers)
        self._client = _grpc_client(triton_grpc, endpoint)

    def call(self, call: Call) -> Any:
        started = time.monotonic()
        try:
            return self._send(call)
        except Exception as error:
            raise self.failure(error, call, started) from error

    def _send(self, call: Call) -> Any:
        request = call.request
        if isinstance(request, Infer):
            arguments = _infer_arguments(triton_grpc, request, self._headers)
            return _arrays(self._client.infer(**arguments, client_timeout=call.timeout), request)
        method, arguments = _grpc_query(self._client, request, self._headers)
        return method(*request.args, **arguments, client_timeout=call.timeout)

    def close(self) -> None:
        self._closed = True
        self._client.close()


class AsyncGrpcTransport(AsyncBaseTransport):
    def __init__(self, endpoint: Endpoint, headers: Mapping[str, str]) -> None:
        super().__init__(endpoint)
        self._headers = _lower(headers)
        self._client = _grpc_client(triton_grpc_aio, endpoint)

    async def _send(self, call: Call) -> Any:
        request = call.request
        if isinstance(request, Infer):
            arguments = _infer_arguments(triton_grpc, request, self._headers)
            return _arrays(
                await self._client.infer(**arguments, client_timeout=call.timeout), request
            )
        method, arguments = _grpc_query(self._client, request, self._headers)
        return await method(*request.args, **arguments, client_timeout=call.timeout)


class AsyncHttpTransport(AsyncBaseTransport):
    def __init__(self, endpoint: Endpoint, headers: Mapping[str, str]) -> None:
        super().__init__(endpoint)
        self._headers = _lower(headers)
        self._client = triton_http_aio.InferenceServerClient(
            endpoint.address,
            conn_limit=_MAX_HTTP_CONNECTIONS,
            conn_timeout=None,  # every call has its own deadline
            ssl=endpoint.tls is not None,
            ssl_context=endpoint.tls.context() if endpoint.tls else None,
        )
        guard(self._client)

    async def _send(self, call: Call) -> Any:
        request = call.request
        async with timeout(call.timeout):
            if isinstance(request, Infer):
                arguments = _infer_arguments(triton_http, request, self._headers)
                return _arrays(await self._client.infer(**arguments), request)
            method = getattr(self._client, request.method)
            return _json(await method(*request.args, headers=dict(self._headers)), request)


class LoopThread(threading.Thread):
    """Runs a transport's event loop: waiting for an answer in this thread would deadlock."""


class HttpTransport:
    """HTTP for blocking callers: the async transport on an event loop in a thread of its own.

    tritonclient's blocking HTTP client belongs to the thread that created it and has no deadline
    for a whole call; one event loop serves any number of threads over shared connections.
    """

    def __init__(self, endpoint: Endpoint, headers: Mapping[str, str]) -> None:
        self._url = endpoint.url
        self._closed = False
        self._lock = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = LoopThread(
            target=self._loop.run_forever, name="triton-sam3-http", daemon=True
        )
        self._thread.start()
        try:
            self._transport = _result(self._submit(_open_http(endpoint, headers)))
        except BaseException:
            self._stop()
            raise

    def call(self, call: Call) -> Any:
        with self._lock:  # a call submitted before the loop is told to stop is answered
            if self._closed:
                raise closed_error(self._url)
            future = self._submit(self._transport.call(call))
        try:
            return _result(future)
        finally:
            del future  # its error's traceback leads back here

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            future = self._submit(self._transport.close())
        try:
            _result(future)
        finally:
            self._stop()

    def _submit(self, work: Coroutine[Any, Any, Any]) -> "Future[Any]":
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _result(future: "Future[Any]") -> Any:
    try:
        return future.result()
    except BaseException:
        future.cancel()  # Ctrl-C: nobody waits for the answer any longer
        raise
    finally:
        del future


async def _open_http(endpoint: Endpoint, headers: Mapping[str, str]) -> AsyncHttpTransport:
    """Create the transport inside its event loop, as aiohttp requires."""
    return AsyncHttpTransport(endpoint, headers)


def _lower(headers: Mapping[str, str]) -> dict[str, str]:
    """gRPC accepts only lower-case names; HTTP ignores their case."""
    return {name.lower(): value for name, value in headers.items()}


def _grpc_client(module: ModuleType, endpoint: Endpoint) -> Any:
    tls = endpoint.tls
    files = (tls.authorities, tls.private_key, tls.certificate_chain) if tls else (None,) * 3
    root_certificates, private_key, certificate_chain = files
    return module.InferenceServerClient(
        endpoint.address,
        ssl=tls is not None,
        root_certificates=root_certificates,
        private_key=private_key,
        certificate_chain=certificate_chain,
        channel_args=_GRPC_OPTIONS,
    )


def _grpc_query(
    client: Any, query: Query, headers: dict[str, str]
) -> tuple[Callable[..., Any], dict[str, Any]]:
    arguments: dict[str, Any] = {"headers": headers}
    if query.method.startswith("get_"):
        arguments["as_json"] = True
    return getattr(client, query.method), arguments


def _infer_arguments(
    module: ModuleType, request: Infer, headers: Mapping[str, str]
) -> dict[str, Any]:
    return {
        "model_name": request.model,
        "inputs": [_input(module, name, value) for name, value in request.inputs.items()],
        "outputs": [module.InferRequestedOutput(name) for name in request.outputs],
        "headers": {**headers, **_lower(request.headers)},
    }


def _input(module: ModuleType, name: str, value: Array | InSharedMemory) -> Any:
    tensor = module.InferInput(name, list(value.shape), TENSORS[name].datatype)
    if isinstance(value, InSharedMemory):
        tensor.set_shared_memory(value.region, value.nbytes, value.offset)
    else:
        tensor.set_data_from_numpy(value)
    return tensor


def _json(answer: Any, query: Query) -> Any:
    """Return the answer if it has the type that the query's reader expects."""
    kind = list if query.method.endswith("_shared_memory_status") else dict
    if query.method.startswith("get_") and not isinstance(answer, kind):
        raise TypeError(f"expected a {kind.__name__}, got a {type(answer).__name__}")
    return answer


def _arrays(result: Any, request: Infer) -> dict[str, Array]:
    named = ((name, result.as_numpy(name)) for name in request.outputs)
    return {name: array for name, array in named if array is not None}

"""The four ways to reach Triton: gRPC and HTTP, blocking and awaitable.

Each wraps one of tritonclient's clients and keeps its connections open between calls. A call is
an `Infer` or a `Query` value with its deadline; the answer is arrays by name or plain JSON.
"""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Mapping
from types import ModuleType
from typing import Any, Protocol

import tritonclient.grpc as triton_grpc
import tritonclient.grpc.aio as triton_grpc_aio
import tritonclient.http as triton_http
import tritonclient.http.aio as triton_http_aio

from .contract import TENSORS
from .deadline import timeout
from .endpoint import Endpoint
from .errors import TransportError
from .flow import Array, Call, Infer, InSharedMemory, Query
from .translation import TRANSPORT_ERRORS, translate

_LARGEST_MESSAGE = 2**31 - 1
_GRPC_OPTIONS = [
    ("grpc.max_send_message_length", _LARGEST_MESSAGE),
    ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
    # A restarted server is found again within half a second; gRPC would wait up to two minutes.
    # (Not the *min* backoff: it bounds how long a connection may take to come about.)
    ("grpc.initial_reconnect_backoff_ms", 50),
    ("grpc.max_reconnect_backoff_ms", 500),
]
_HTTP_CONNECTIONS = 100


class Transport(Protocol):
    """A blocking way to the server, for use from several threads at once."""

    def call(self, call: Call) -> Any: ...

    def close(self) -> None: ...


class AsyncTransport(Protocol):
    """An awaitable way to the server, for use from one event loop."""

    async def call(self, call: Call) -> Any: ...

    async def close(self) -> None: ...


def open_transport(endpoint: Endpoint, headers: Mapping[str, str]) -> Transport:
    """A blocking transport; nothing is sent before the first call."""
    return (GrpcTransport if endpoint.is_grpc else HttpTransport)(endpoint, headers)


def open_async_transport(endpoint: Endpoint, headers: Mapping[str, str]) -> AsyncTransport:
    """An awaitable transport; nothing is sent before the first call."""
    return (AsyncGrpcTransport if endpoint.is_grpc else AsyncHttpTransport)(endpoint, headers)


def closed(url: str) -> TransportError:
    """What a closed client says."""
    return TransportError(f"this client of {url} is closed; make a new one")


class GrpcTransport:
    def __init__(self, endpoint: Endpoint, headers: Mapping[str, str]) -> None:
        self._url, self._headers = endpoint.url, _lower(headers)
        self._client = _grpc_client(triton_grpc, endpoint)

    def call(self, call: Call) -> Any:
        request = call.request
        try:
            if isinstance(request, Infer):
                arguments = _infer_arguments(triton_grpc, request, self._headers)
                result = self._client.infer(**arguments, client_timeout=call.timeout)
                return _arrays(result, request)
            method, arguments = _grpc_query(self._client, request, self._headers)
            return method(*request.args, **arguments, client_timeout=call.timeout)
        except TRANSPORT_ERRORS as error:
            raise translate(error, self._url, call.timeout) from error

    def close(self) -> None:
        self._client.close()


class AsyncGrpcTransport:
    def __init__(self, endpoint: Endpoint, headers: Mapping[str, str]) -> None:
        self._url, self._headers = endpoint.url, _lower(headers)
        self._client = _grpc_client(triton_grpc_aio, endpoint)

    async def call(self, call: Call) -> Any:
        request = call.request
        try:
            if isinstance(request, Infer):
                arguments = _infer_arguments(triton_grpc, request, self._headers)
                result = await self._client.infer(**arguments, client_timeout=call.timeout)
                return _arrays(result, request)
            method, arguments = _grpc_query(self._client, request, self._headers)
            return await method(*request.args, **arguments, client_timeout=call.timeout)
        except TRANSPORT_ERRORS as error:
            raise translate(error, self._url, call.timeout) from error

    async def close(self) -> None:
        await self._client.close()


class AsyncHttpTransport:
    def __init__(self, endpoint: Endpoint, headers: Mapping[str, str]) -> None:
        self._url, self._headers = endpoint.url, dict(headers)
        self._client = triton_http_aio.InferenceServerClient(
            endpoint.address,
            conn_limit=_HTTP_CONNECTIONS,
            conn_timeout=None,  # every call brings its own deadline
            ssl=endpoint.tls is not None,
            ssl_context=endpoint.tls.context() if endpoint.tls else None,
        )

    async def call(self, call: Call) -> Any:
        try:
            async with timeout(call.timeout):
                return await self._send(call.request)
        except TRANSPORT_ERRORS as error:
            raise translate(error, self._url, call.timeout) from error

    async def _send(self, request: Infer | Query) -> Any:
        if isinstance(request, Infer):
            arguments = _infer_arguments(triton_http, request, self._headers)
            return _arrays(await self._client.infer(**arguments), request)
        method = getattr(self._client, request.method)
        return await method(*request.args, headers=dict(self._headers))

    async def close(self) -> None:
        await self._client.close()


class HttpTransport:
    """HTTP for blocking callers: the awaitable transport on an event loop in a thread of its own.

    tritonclient's blocking HTTP client belongs to the thread that made it and knows no deadline
    for a whole call; one event loop serves any number of threads over shared connections.
    """

    def __init__(self, endpoint: Endpoint, headers: Mapping[str, str]) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="triton-sam3-http", daemon=True
        )
        self._thread.start()
        try:
            self._transport = self._run(_made(lambda: AsyncHttpTransport(endpoint, headers)))
        except BaseException:
            self._stop()
            raise

    def call(self, call: Call) -> Any:
        return self._run(self._transport.call(call))

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C: nobody waits for the answer any more
            raise

    def close(self) -> None:
        if self._loop.is_closed():
            return
        self._run(self._transport.close())
        self._stop()

    def _stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _made(make: Callable[[], AsyncHttpTransport]) -> AsyncHttpTransport:
    """Make the transport where aiohttp wants it: inside its event loop."""
    return make()


def _lower(headers: Mapping[str, str]) -> dict[str, str]:
    """gRPC accepts lower-case metadata keys only."""
    return {name.lower(): value for name, value in headers.items()}


def _grpc_client(module: ModuleType, endpoint: Endpoint) -> Any:
    tls = endpoint.tls
    files = (tls.root_certificates, tls.private_key, tls.certificate_chain) if tls else (None,) * 3
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
        "headers": {**headers, **request.headers},
    }


def _input(module: ModuleType, name: str, value: Array | InSharedMemory) -> Any:
    tensor = module.InferInput(name, list(value.shape), TENSORS[name].datatype)
    if isinstance(value, InSharedMemory):
        tensor.set_shared_memory(value.region, value.nbytes, value.offset)
    else:
        tensor.set_data_from_numpy(value)
    return tensor


def _arrays(result: Any, request: Infer) -> dict[str, Array]:
    named = ((name, result.as_numpy(name)) for name in request.outputs)
    return {name: array for name, array in named if array is not None}

"""The HTTP session under tritonclient: only the server named by the caller answers, uncompressed.

A redirect would take the caller's headers and image to another host. A compressed answer may unpack
to any size; and Triton compresses every answer, in vain, for a client that does not say otherwise.
"""

from http import HTTPStatus
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp

IDENTITY = "identity"
"""HTTP's name for no compression."""


class Redirected(aiohttp.ClientError):
    """The server says that the answer is elsewhere; the text is where, without query and user."""


class Compressed(aiohttp.ClientError):
    """The answer is compressed although nobody asked for it; the text is the encoding's name."""


def guard(client: Any) -> None:
    """Replace the session of a tritonclient.http.aio client, which follows redirects.

    To be called inside its event loop, before the first request.
    """
    unguarded: aiohttp.ClientSession = client._stub  # tritonclient has no parameter for it
    tracing = aiohttp.TraceConfig()
    tracing.on_request_redirect.append(_refuse_redirect)
    client._stub = aiohttp.ClientSession(
        connector=unguarded.connector,
        timeout=unguarded.timeout,
        headers={"Accept-Encoding": IDENTITY},
        auto_decompress=False,
        raise_for_status=_refuse_compression,
        trace_configs=[tracing],
    )
    unguarded.detach()


async def _refuse_redirect(
    _session: aiohttp.ClientSession, _context: Any, params: aiohttp.TraceRequestRedirectParams
) -> None:
    """aiohttp calls this before it follows; it follows nothing if this raises."""
    response = params.response
    response.close()
    target = urlsplit(urljoin(str(response.url), response.headers.get("Location", "")))
    host = target.netloc.rpartition("@")[2]
    raise Redirected(target._replace(netloc=host, query="", fragment="").geturl())


async def _refuse_compression(response: aiohttp.ClientResponse) -> None:
    """Only of answers that would be unpacked; an error's status says more than its encoding."""
    encoding = response.headers.get("Content-Encoding", IDENTITY)
    if response.status == HTTPStatus.OK and encoding != IDENTITY:
        response.close()  # older aiohttp would keep the connection, one of few
        raise Compressed(encoding)

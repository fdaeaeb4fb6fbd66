"""The HTTP session under tritonclient: only the server named by the caller answers, uncompressed.

A redirect would take the caller's headers and image to another host. A compressed answer may unpack
to any size, and Triton compresses every answer, to no use, unless the client asks it not to.
"""

from http import HTTPStatus
from typing import Any
from urllib.parse import urljoin, urlsplit

import aiohttp

IDENTITY = "identity"
"""HTTP's name for no compression."""


class Redirected(aiohttp.ClientError):
    """The server redirects; the text is the target's URL without its user and query."""


class Compressed(aiohttp.ClientError):
    """The answer is compressed although this was not requested; the text is the encoding."""


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
    """aiohttp calls this before it follows a redirect, and does not follow it if this raises."""
    response = params.response
    response.close()
    target = urlsplit(urljoin(str(response.url), response.headers.get("Location", "")))
    host = target.netloc.rpartition("@")[2]
    raise Redirected(target._replace(netloc=host, query="", fragment="").geturl())


async def _refuse_compression(response: aiohttp.ClientResponse) -> None:
    """Check only successful answers: of an error, the status matters more than the encoding."""
    encoding = response.headers.get("Content-Encoding", IDENTITY)
    if response.status == HTTPStatus.OK and encoding != IDENTITY:
        response.close()  # older aiohttp would keep the connection, one of few
        raise Compressed(encoding)

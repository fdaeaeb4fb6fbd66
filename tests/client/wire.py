"""A TCP proxy on loopback that counts what passes, and can end TLS as a load balancer does."""

import asyncio
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit


class Wire:
    """A running proxy; counts connections, and bytes sent to the server."""

    def __init__(self, target: str, tls: ssl.SSLContext | None) -> None:
        parts = urlsplit(target)
        self._target = (parts.hostname, parts.port)
        self._scheme, self._tls = parts.scheme, tls
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self.sent = 0
        self.connections = 0
        self.url = ""

    def _serve(self) -> None:
        with suppress(asyncio.CancelledError):
            self._loop.run_until_complete(self._main())
        if left := asyncio.all_tasks(self._loop):
            self._loop.run_until_complete(asyncio.wait(left))
        self._loop.close()

    async def _main(self) -> None:
        self._task = asyncio.current_task()
        server = await asyncio.start_server(self._accept, "127.0.0.1", 0, ssl=self._tls)
        port = server.sockets[0].getsockname()[1]
        host = "localhost" if self._tls else "127.0.0.1"  # the certificate's name
        self.url = f"{self._scheme}{'s' if self._tls else ''}://{host}:{port}"
        self._ready.set()
        await asyncio.Event().wait()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with suppress(asyncio.CancelledError):  # asyncio's streams print one that is let through
            up_reader, up_writer = await asyncio.open_connection(*self._target)
            await asyncio.gather(
                self._copy(reader, up_writer, counted=True),
                self._copy(up_reader, writer, counted=False),
            )

    async def _copy(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, counted: bool
    ) -> None:
        with suppress(OSError):
            while data := await reader.read(1 << 16):
                self.sent += len(data) if counted else 0
                writer.write(data)
                await writer.drain()
        with suppress(OSError):
            writer.close()

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(10)

    def stop(self) -> None:
        def cancel() -> None:
            for task in asyncio.all_tasks(self._loop):
                task.cancel()

        self._loop.call_soon_threadsafe(cancel)
        self._thread.join(10)


@contextmanager
def wire(target: str, tls: ssl.SSLContext | None = None) -> Iterator[Wire]:
    """Forward a fresh port to `target` (grpc://… or http://…); with `tls`, ends it here."""
    running = Wire(target, tls)
    running.start()
    try:
        yield running
    finally:
        running.stop()

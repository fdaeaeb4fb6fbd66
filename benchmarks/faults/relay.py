"""A misbehaving proxy: it cuts connections, or answers 502 instead of the server."""

from __future__ import annotations

import selectors
import socket
import struct
import threading
from contextlib import suppress

BAD_GATEWAY = (
    b"HTTP/1.1 502 Bad Gateway\r\nContent-Type: text/html\r\nContent-Length: 26\r\n"
    b"Connection: close\r\n\r\n<h1>502 Bad Gateway</h1>\r\n"
)
AT_ONCE = struct.pack("ii", 1, 0)
"""SO_LINGER: closing sends a reset instead of waiting for undelivered data."""


class Relay:
    """Passes bytes between callers and one port on loopback; a context manager."""

    def __init__(self, upstream: int) -> None:
        self._upstream = upstream
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
        self.port = int(self._listener.getsockname()[1])
        self._guard = threading.Lock()
        self._pairs: list[tuple[socket.socket, socket.socket]] = []
        self._stop = threading.Event()
        self.refusing = False
        """Whether new requests are answered 502."""
        self.cut = 0
        """Connections reset so far."""
        self.refused = 0
        """502s so far."""

    def reset_all(self) -> None:
        """Reset every connection, whatever is in flight on it."""
        with self._guard:
            pairs, self._pairs = self._pairs, []
        for pair in pairs:
            for end in pair:
                with suppress(OSError):
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, AT_ONCE)
                    end.shutdown(socket.SHUT_RD)  # wakes its thread, which closes it
            self.cut += 1

    def refuse(self, refusing: bool) -> None:
        """Start or stop answering 502, for requests on open connections too."""
        self.refusing = refusing
        if refusing:
            self.reset_all()

    def __enter__(self) -> Relay:
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()
        self.reset_all()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            work = self._answer_502 if self.refusing else self._pass_on
            threading.Thread(target=work, args=(caller,), daemon=True).start()

    def _answer_502(self, caller: socket.socket) -> None:
        """Read what the caller sends first; otherwise its library would only see a reset."""
        with caller, suppress(OSError):
            caller.settimeout(0.2)
            with suppress(TimeoutError):
                while caller.recv(1 << 16):
                    pass
            self.refused += 1
            caller.sendall(BAD_GATEWAY)

    def _pass_on(self, caller: socket.socket) -> None:
        try:
            server = socket.create_connection(("127.0.0.1", self._upstream), timeout=5)
        except OSError:
            caller.close()
            return
        with self._guard:
            self._pairs.append((caller, server))
        with caller, server, suppress(OSError), selectors.DefaultSelector() as ready:
            for one, other in ((caller, server), (server, caller)):
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                ready.register(one, selectors.EVENT_READ, other)
            self._pump(ready)
        with self._guard, suppress(ValueError):
            self._pairs.remove((caller, server))

    @staticmethod
    def _pump(ready: selectors.BaseSelector) -> None:
        """Forward data until either end is closed."""
        while True:
            for key, _ in ready.select():
                source, sink = key.fileobj, key.data
                assert isinstance(source, socket.socket)
                data = source.recv(1 << 16)
                if not data:
                    return
                sink.settimeout(5)
                sink.sendall(data)

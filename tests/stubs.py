"""The processes in which a server runs its Python models, and holding one for a moment."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import psutil

from server import TritonServer
from triton_sam3.contract import DECODER


def stubs(server: TritonServer, model: str) -> list[psutil.Process]:
    """Those that run `model`, one for each instance."""
    children = psutil.Process(server.pid).children(recursive=True)
    return [child for child in children if any(model in word for word in child.cmdline())]


@contextmanager
def suspended_model(server: TritonServer, model: str = DECODER) -> Iterator[None]:
    """What is asked of the model meanwhile waits, however fast the machine is.

    Only for a moment: a stub that says nothing for a second while it is asked is given up.
    """
    processes = stubs(server, model)
    assert processes
    try:
        for process in processes:
            process.suspend()
        yield
    finally:
        for process in processes:
            process.resume()

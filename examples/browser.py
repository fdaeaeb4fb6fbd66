"""Click on a photo in a browser: this serves the page and the back end that it needs.

python examples/browser.py photo.jpg [port]        then open http://127.0.0.1:8080

    browser ── WebSocket: a click as JSON ──► this process ── gRPC: a click, no pixels ──► Triton
            ◄────── its mask as a PNG ───────              ◄─────────── logits ───────────

Every tab has its own object, for as long as it is open. Needs only the client.
"""

import asyncio
import base64
import io
import os
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

import numpy as np
from aiohttp import WSMsgType, web
from PIL import Image

from triton_sam3 import AsyncClient, AsyncView, SAM3Error, Segmentation

URL = os.environ.get("TRITON_SAM3_URL", "grpc://127.0.0.1:8001")
PAGE = Path(__file__).with_suffix(".html")
BLUE, OPACITY = (30, 144, 255), 150


def png(result: Segmentation) -> str:
    """The mask in blue on a transparent background, as a data URL; empty if there is no object."""
    if not len(result):
        return ""
    picture = Image.fromarray(result.masks[0].view(np.uint8))
    picture.putpalette((0, 0, 0, *BLUE))
    file = io.BytesIO()
    picture.save(file, "PNG", bits=1, transparency=bytes([0, OPACITY]))
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def apply(view: AsyncView, message: dict[str, Any]) -> Awaitable[Segmentation]:
    """Do what a tab asks for: undo a click, reset, or add a click."""
    if message.get("undo"):
        return view.undo()
    if message.get("reset"):
        return view.reset()
    return view.click(message["x"], message["y"], positive=message["positive"])


async def clicks(client: AsyncClient, photo: str, tab: web.WebSocketResponse) -> None:
    """Answer one tab's clicks, each with the object's mask or the reason why there is none."""
    async with client.open(photo) as view:
        async for message in tab:
            if message.type is not WSMsgType.TEXT:
                continue
            try:
                result = await apply(view, message.json())
            except SAM3Error as error:
                await tab.send_json({"error": str(error)})
            else:
                mask = await asyncio.to_thread(png, result)
                await tab.send_json({"mask": mask, "scores": result.scores.tolist()})


def application(photo: str) -> web.Application:
    """Serve the page, its photo, and a WebSocket for each tab."""

    async def page(_: web.Request) -> web.FileResponse:
        return web.FileResponse(PAGE)

    async def picture(_: web.Request) -> web.FileResponse:
        return web.FileResponse(photo)  # browsers apply its EXIF orientation, as the client does

    async def tab(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse()
        await socket.prepare(request)
        try:
            await clicks(client, photo, socket)
        except SAM3Error as error:
            await socket.send_json({"error": str(error)})
        return socket

    client = AsyncClient(URL)
    app = web.Application()
    app.add_routes([web.get("/", page), web.get("/photo", picture), web.get("/clicks", tab)])
    app.on_cleanup.append(lambda _: client.close())
    return app


def main(photo: str, port: str = "8080") -> None:
    web.run_app(application(photo), host="127.0.0.1", port=int(port))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])

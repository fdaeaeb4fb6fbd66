"""Several people click on their own photos at once, through one asyncio client.

python examples/asyncio_clicks.py cat.jpg coffee.jpg
"""

import asyncio
import os
import sys

from triton_sam3 import AsyncClient

URL = os.environ.get("TRITON_SAM3_URL", "grpc://127.0.0.1:8001")


async def annotate(client: AsyncClient, photo: str) -> None:
    async with client.open(photo) as view:
        width, height = view.size
        await view.click(width / 2, height / 2)
        answer = await view.click(width / 20, height / 20, positive=False)
        print(f"{photo}: {answer[0].area} pixels, score {answer[0].score:.2f}")


async def main(*photos: str) -> None:
    async with AsyncClient(URL) as client:
        await asyncio.gather(*(annotate(client, photo) for photo in photos))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    asyncio.run(main(*sys.argv[1:]))

"""Files that are not images, or claim to be what they are not."""

from __future__ import annotations

import base64
import random
import struct
import zlib

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def png_bomb(width: int, height: int) -> bytes:
    """A PNG that claims width×height pixels but holds none of them."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(bytes(1000)))
    return PNG_SIGNATURE + chunk(b"IHDR", header) + pixels + chunk(b"IEND", b"")


def jpeg_bomb(jpeg: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header claims width×height pixels."""
    data = bytearray(jpeg)
    frame = data.index(b"\xff\xc0")
    data[frame + 5 : frame + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def bombs(jpeg: bytes) -> tuple[bytes, ...]:
    """Images that claim more pixels than are accepted."""
    return (
        png_bomb(60_000, 60_000),
        png_bomb(2**31 - 1, 1),
        png_bomb(2**31 - 1, 2**31 - 1),
        jpeg_bomb(jpeg, 65_500, 65_500),
    )


def no_images() -> tuple[bytes, ...]:
    """Bytes that are not in any accepted format."""
    return (
        b"",
        b"photo.jpg",
        b"https://example.com/photo.jpg",
        b"GIF89a" + bytes(40),
        b"II*\0" + bytes(40),
        b"PK\x03\x04" + bytes(40),
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
        b"data:image/png;base64,",
        base64.b64encode(b"photo.jpg"),
        b"\xff" * 1000,
        PNG_SIGNATURE,
        b"\xff\xd8\xff",
        b"RIFF\xff\xff\xff\xffWEBPVP8X",
    )


def damaged(file: bytes, rng: random.Random) -> bytes:
    """Truncate a file, overwrite or delete some of its bytes, or copy a piece of it elsewhere."""
    data = bytearray(file)
    for _ in range(rng.randint(1, 6)):
        place = rng.randrange(len(data)) if data else 0
        action = rng.randrange(4)
        if action == 0:
            data[place : place + 1] = rng.randbytes(1)
        elif action == 1:
            del data[place : place + rng.randint(1, 64)]
        elif action == 2:
            del data[len(data) - rng.randint(0, len(data) // 2) :]
        else:
            start = rng.randrange(len(data)) if data else 0
            data[place:place] = data[start : start + rng.randint(1, 64)]
    return base64.b64encode(data) if rng.random() < 0.3 else bytes(data)

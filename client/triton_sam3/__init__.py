"""Interactive segmentation with SAM 3 on a Triton server: points, boxes and masks in, masks out.

from triton_sam3 import Client

with Client("grpc://127.0.0.1:8001") as client:
    result = client.segment("photo.jpg", points=[(320, 240)])
    result.masks  # bool [1, H, W]

    with client.open("photo.jpg") as view:
        view.click(320, 240)
        view.click(100, 80, positive=False)
"""

from .aio import AsyncClient, AsyncView
from .block import run_block
from .client import Client
from .errors import (
    AccessDenied,
    ClientUnusable,
    DeadlineExceeded,
    ImageError,
    ImageNotKept,
    InvalidRequest,
    ModelUnavailable,
    Overloaded,
    PromptError,
    SAM3Error,
    ServerError,
    ServerUnreachable,
    TransportError,
)
from .formats import Polygon
from .geometry import ImageLike
from .many import Outcome
from .parsing import Box, Point
from .prompts import BoxesLike, PointsLike, Prompt
from .protocol import ServedModel
from .results import Mask, Segmentation
from .status import ModelStatus, ServerStatus
from .view import View

__all__ = [
    "AccessDenied",
    "AsyncClient",
    "AsyncView",
    "Box",
    "BoxesLike",
    "Client",
    "ClientUnusable",
    "DeadlineExceeded",
    "ImageError",
    "ImageLike",
    "ImageNotKept",
    "InvalidRequest",
    "Mask",
    "ModelStatus",
    "ModelUnavailable",
    "Outcome",
    "Overloaded",
    "Point",
    "PointsLike",
    "Polygon",
    "Prompt",
    "PromptError",
    "SAM3Error",
    "Segmentation",
    "ServedModel",
    "ServerError",
    "ServerStatus",
    "ServerUnreachable",
    "TransportError",
    "View",
    "run_block",
]

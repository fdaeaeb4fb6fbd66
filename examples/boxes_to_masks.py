"""Turn a detector's boxes into masks, with `supervision.Detections` on both sides.

python examples/boxes_to_masks.py coins.png       writes masks.png
"""

import os
import sys

import cv2
import numpy as np
import supervision as sv
from numpy.typing import NDArray

from triton_sam3 import Client

URL = os.environ.get("TRITON_SAM3_URL", "grpc://127.0.0.1:8001")


def detect(image: NDArray[np.uint8]) -> sv.Detections:
    """Stand in for your detector: treat bright spots as coins."""
    _, bright = cv2.threshold(image[:, :, 0], 0, 255, cv2.THRESH_BINARY + cv2.THRESH_OTSU)
    _, _, stats, _ = cv2.connectedComponentsWithStats(bright)
    x, y, width, height, _ = stats[1:][stats[1:, cv2.CC_STAT_AREA] > 500].T
    return sv.Detections(
        xyxy=np.stack([x, y, x + width, y + height], axis=1).astype(np.float32),
        class_id=np.zeros(len(x), int),
        data={"class_name": np.full(len(x), "coin")},
    )


def main(path: str) -> None:
    image = cv2.imread(path)
    if image is None:
        sys.exit(f"{path!r} is not an image that OpenCV can read")
    boxes = detect(image)
    with Client(URL) as client:  # all boxes are sent in one request
        result = client.segment(cv2.cvtColor(image, cv2.COLOR_BGR2RGB), boxes=boxes)
    detections = result.to_supervision()
    for name, area in zip(detections["class_name"], detections.area, strict=True):
        print(f"{name}: {area:.0f} pixels")
    annotator = sv.MaskAnnotator(color_lookup=sv.ColorLookup.INDEX)
    cv2.imwrite("masks.png", annotator.annotate(image, detections))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])

"""Add masks to a COCO data set that has only boxes.

python examples/folder_to_coco.py images/ boxes.json masks.json       writes masks.json
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from rich.progress import track

from triton_sam3 import Box, Client

URL = os.environ.get("TRITON_SAM3_URL", "grpc://127.0.0.1:8001")


def main(folder: str, boxes: str, masks: str) -> None:
    dataset = json.loads(Path(boxes).read_text())
    by_image: dict[int, list[Any]] = {image["id"]: [] for image in dataset["images"]}
    for annotation in dataset["annotations"]:
        by_image[annotation["image_id"]].append(annotation)

    images = [Path(folder, image["file_name"]) for image in dataset["images"]]
    prompts = [
        {"boxes": [Box.from_xywh(*a["bbox"]) for a in annotations]}
        for annotations in by_image.values()
    ]
    failed = 0
    with Client(URL) as client:
        # A threshold that drops nothing: each box gets a mask, however low its score.
        outcomes = track(
            client.segment_many(images, prompts, threshold=-1), "segmenting", len(images)
        )
        for outcome, annotations in zip(outcomes, by_image.values(), strict=True):
            if outcome.result is None:
                print(f"{images[outcome.index]}: {outcome.error}", file=sys.stderr)
                failed += 1
                continue
            for annotation, mask in zip(annotations, outcome.result, strict=True):
                annotation.update(segmentation=mask.rle(), area=mask.area)
    Path(masks).write_text(json.dumps(dataset))
    if failed:
        sys.exit(f"{failed} of {len(images)} images have no masks")


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])

"""Run a workflow step written for Roboflow's SAM 3 block on your own server, with the same output.

python examples/roboflow_block.py photo.jpg       prints its predictions, with masks as COCO RLE
"""

import json
import os
import sys

from PIL import Image

from triton_sam3 import Client, run_block

URL = os.environ.get("TRITON_SAM3_URL", "grpc://127.0.0.1:8001")

STEP = {
    "type": "roboflow_core/sam3_interactive@v1",
    "name": "segment",
    "images": "$inputs.image",
    "boxes": "$steps.detector.predictions",
    "points": "$inputs.points",
    "threshold": 0.2,
}


def main(photo: str) -> None:
    image = Image.open(photo)
    width, height = image.size
    box = {"x": 0.3 * width, "y": 0.4 * height, "width": width / 3, "height": height / 2}
    values = {
        "image": image,
        "points": [{"x": width / 2, "y": height / 2, "positive": True}],
        "$steps.detector.predictions": {"predictions": [{**box, "class": "cup"}]},
    }
    with Client(URL) as client:
        (output,) = run_block(client, STEP, inputs=values, serialize_results=True)
    for prediction in output["predictions"]["predictions"]:
        del prediction["points"]  # the outline, which is long
        print(json.dumps(prediction))


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])

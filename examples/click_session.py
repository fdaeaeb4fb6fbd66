"""Click on an object until its mask is right. The photo is encoded once; a click sends no pixels.

python examples/click_session.py photo.jpg 320,240 60,40,0       writes clicks.png

A click is x,y in pixels; ,0 marks background.
"""

import os
import sys

from triton_sam3 import Client

URL = os.environ.get("TRITON_SAM3_URL", "grpc://127.0.0.1:8001")


def main(photo: str, *clicks: str) -> None:
    with Client(URL) as client, client.open(photo) as view:
        for click in clicks:
            x, y, *label = map(float, click.split(","))
            answer = view.click(x, y, positive=label != [0])
            print(f"{click}: {answer[0].area} pixels, score {answer[0].score:.2f}")
        answer.save("clicks.png", image=photo)
        print(f"one click undone: {view.undo()}")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])

"""What torch reads of its environment, once: imported before it. What a caller has set stays.

On a CPU the decoder's threads share the cores with the encoder: spinning for long made a decode
five times slower on a busy machine. Without any spinning, waking them at each of a decode's steps
took as long as the small demo model's decode itself. Cores that rested while somebody looked at a
mask are late at each step: after 0.3 s a full-size click took 62 ms on two with 5000, and takes 31
ms with 20000.

On a GPU a kept image is three tensors of 2.7 to 5.3 MB in 16 bits. torch's allocator cuts such
from blocks of 20 MB, and what is left of a block fits no other: by its rules 80 GB hold 6,640
images, and 7,500 in segments that grow. Not measured: no GPU was at hand.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # GNU's OpenMP, torch's own: some 200 µs
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

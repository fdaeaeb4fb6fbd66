"""Variables that torch reads once, when imported: import this first. Values already set are kept.

On a CPU the decoder's threads share the cores with the encoder: long spinning made a decode five
times slower on a busy machine. Without any spinning, waking the threads at each step took as long
as the small demo model's decode itself. Cores that went idle while the user looked at a mask wake
late at each step: after 0.3 s a full-size click took 62 ms on two cores with a spin count of 5000,
and takes 31 ms with 20000.

On a GPU a kept image is three tensors of 2.7 to 5.3 MB in 16 bits. torch's allocator cuts them from
blocks of 20 MB, and the rest of a block fits no other tensor: by its rules 80 GB hold 6,640 images,
or 7,500 in expandable segments. Computed, not measured.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # GNU OpenMP, which torch ships: some 200 µs
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

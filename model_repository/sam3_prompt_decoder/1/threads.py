"""How the decoder's threads wait for each other. Imported before torch, which reads it once.

On a CPU they share the cores with the encoder: spinning for long made a decode five times slower on
a busy machine. Without any spinning, waking them at each of a decode's steps took as long as the
small demo model's decode itself.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # GNU's OpenMP, torch's own: some 50 µs

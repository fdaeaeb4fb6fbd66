"""How the decoder's threads wait for each other. Imported before torch, which reads it once.

On a CPU they share the cores with the encoder: spinning for long made a decode five times slower on
a busy machine. Without any spinning, waking them at each of a decode's steps took as long as the
small demo model's decode itself. Cores that rested while somebody looked at a mask are late at each
step: after 0.3 s a full-size click took 62 ms on two with 5000, and takes 31 ms with 20000.
"""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "20000")  # GNU's OpenMP, torch's own: some 200 µs

"""The only doors to other programs and their files."""

import os

# Threads of faiss that wait for work by spinning take the cores from XLA, which
# our searches call in turn with it: up to ten times slower on busy machines.
# OpenMP reads this when faiss is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

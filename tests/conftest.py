"""Settings of the whole suite: reproducible hypothesis cases, one thread, Triton's interpreter where no GPU is."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is defined, so before any import of ours

from hypothesis import HealthCheck, settings

settings.register_profile(
    "reproducible", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("reproducible")
torch.set_num_threads(1)  # two threads that wait for each other on a busy machine are many times slower

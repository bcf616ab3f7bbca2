"""Settings of the whole suite: reproducible hypothesis cases, one thread."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "reproducible", deadline=None, derandomize=True, max_examples=50, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("reproducible")
torch.set_num_threads(1)  # two threads that wait for each other on a busy machine are many times slower

"""How many discrete Gaussian values one core draws: noise multiplier 1 at a clip of 2^20 units."""

from __future__ import annotations

import time
from collections.abc import Callable

VALUES = 4_000_000
REPEATS = 5


def run(progress: Callable[[str], None]) -> dict[str, float]:
    """`noise_values_per_cpu_s`: the best of five draws of four million values, CPU time of one thread."""
    from common.privacy.noise import discrete_gaussian
    from common.privacy.sampling import Csprng

    discrete_gaussian(Csprng.from_os(), sigma=2.0**20, size=1)  # the table is built once per study
    best = float("inf")
    for repeat in range(REPEATS):
        progress(f"noise {repeat + 1}/{REPEATS}")
        start = time.thread_time()
        discrete_gaussian(Csprng.from_os(), sigma=2.0**20, size=VALUES)
        best = min(best, time.thread_time() - start)
    return {"noise_values_per_cpu_s": VALUES / best}

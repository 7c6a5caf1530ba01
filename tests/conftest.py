"""Settings of all tests: one thread, so that sums have one order, and no time limits inside hypothesis.

What hypothesis draws follows from the test alone, so that a commit passes or does not; `--hypothesis-profile=search`
draws anew in every run.
"""

import torch
from hypothesis import HealthCheck, settings

torch.set_num_threads(1)

settings.register_profile(
    "search", deadline=None, print_blob=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.register_profile("gossamer", settings.get_profile("search"), derandomize=True)
settings.load_profile("gossamer")

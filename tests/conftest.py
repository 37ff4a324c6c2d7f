"""Shared by all tests: one thread, and hypothesis without deadlines (a busy machine is not a failure)."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

from hypothesis import settings

settings.register_profile("uhd", deadline=None, max_examples=60, print_blob=True)
settings.load_profile("uhd")

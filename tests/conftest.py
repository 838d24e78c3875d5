"""Hypothesis, set once for every test: no time limits on shared machines, and the same examples for everyone."""

from hypothesis import settings

settings.register_profile("convolt", deadline=None, derandomize=True)
settings.load_profile("convolt")

"""Settings that all tests share."""

from __future__ import annotations

from hypothesis import settings

# The same examples in every run, and none that fails for being slow on a busy machine. To search further afield:
# make test ARGS="--hypothesis-profile=default".
settings.register_profile("ci", derandomize=True, deadline=None)
settings.load_profile("ci")

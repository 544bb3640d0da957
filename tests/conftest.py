"""Fixtures of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pool import ProcessPool


@pytest.fixture(scope="session")
def pool() -> Iterator[ProcessPool]:
    """Gloo processes for the whole run; none is started before a test asks."""
    processes = ProcessPool()
    yield processes
    processes.remove()

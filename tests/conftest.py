"""Fixtures and markers of all tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from pool import ProcessPool


def pytest_configure(config: pytest.Config) -> None:
    """Declare the markers."""
    config.addinivalue_line("markers", "full: the full product of layouts; not in CI (run with -m full)")


@pytest.fixture(scope="session")
def pool() -> Iterator[ProcessPool]:
    """Gloo processes for the whole run; none is started before a test asks."""
    processes = ProcessPool()
    yield processes
    processes.remove()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave the full product out unless ``-m`` names it."""
    if "full" in (config.getoption("-m") or ""):
        return
    kept = [item for item in items if "full" not in item.keywords]
    config.hook.pytest_deselected(items=[item for item in items if "full" in item.keywords])
    items[:] = kept

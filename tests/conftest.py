"""Fixtures of all tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from pool import ProcessPool


@pytest.fixture(autouse=True)
def no_handler_of_another_test() -> Iterator[None]:
    """An entry point's handler writes to the standard output of its own test, which is closed afterwards."""
    yield
    logging.getLogger("mindspeed_lora").handlers.clear()


@pytest.fixture(scope="session")
def pool() -> Iterator[ProcessPool]:
    """Gloo processes for the whole run; none is started before a test asks."""
    processes = ProcessPool()
    yield processes
    processes.remove()

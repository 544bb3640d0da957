"""One logger for the package; only rank 0 speaks (warnings and errors come from every rank)."""

from __future__ import annotations

import logging
import os
import sys

LOGGER_NAME = "mindspeed_lora"


def get_logger() -> logging.Logger:
    """The package's logger."""
    return logging.getLogger(LOGGER_NAME)


def configure_logging(rank: int | None = None) -> logging.Logger:
    """Print INFO on rank 0 and WARNING elsewhere to standard output, one line a message; called by entry points only.

    ``rank`` defaults to torchrun's ``RANK``.
    """
    rank = int(os.environ.get("RANK", "0")) if rank is None else rank
    # peft imports bitsandbytes where it is installed, which then warns of an optional kernel that nothing here calls
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    logger = get_logger()
    logger.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    logger.propagate = False
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(message)s" if rank == 0 else f"[rank {rank}] %(message)s"))
        logger.addHandler(handler)
    return logger

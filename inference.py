"""Ask a model, with or without an adapter; started by torchrun."""

from __future__ import annotations

import sys

from mindspeed_lora.arguments.cli import main

if __name__ == "__main__":
    sys.exit(main("inference.py"))

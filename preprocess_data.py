"""Turn instruction records into token files for training."""

from __future__ import annotations

import sys

from mindspeed_lora.arguments.cli import main

if __name__ == "__main__":
    sys.exit(main("preprocess_data.py"))

"""Convert checkpoints between Hugging Face and Megatron files; merge and export adapters."""

from __future__ import annotations

import sys

from mindspeed_lora.arguments.cli import main

if __name__ == "__main__":
    sys.exit(main("convert_ckpt.py"))

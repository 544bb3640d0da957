"""Fine-tune a model, with LoRA or all weights; started by torchrun."""

from __future__ import annotations

import sys

from mindspeed_lora.arguments.cli import main

if __name__ == "__main__":
    sys.exit(main("posttrain_gpt.py"))

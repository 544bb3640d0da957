"""Take the command lines of MindSpeed-LLM's convert_ckpt_v2.py onto convert_ckpt.py."""

from __future__ import annotations

import sys

from mindspeed_lora.arguments.cli import main
from mindspeed_lora.arguments.v2 import v2_arguments

if __name__ == "__main__":
    sys.exit(main("convert_ckpt.py", v2_arguments(sys.argv[1:])))

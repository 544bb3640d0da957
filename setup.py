"""Package metadata. Bounds here are the range that works; ``constraints.txt`` has the exact versions that are tested."""

from __future__ import annotations

from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

setup(
    name="mindspeed_lora",
    version="0.1.0",
    description="LoRA and full fine-tuning of large language models on Ascend NPU, CUDA and CPU, with MindSpeed-LLM's commands and formats",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["mindspeed_lora", "mindspeed_lora.*"]),
    package_data={"mindspeed_lora.data": ["templates.json"]},
    install_requires=[
        "torch>=2.7.1,<2.14",
        "transformers>=4.51",
        "peft>=0.15",
        "accelerate>=1.0",
        "datasets>=3.0",
        "lm_eval>=0.4.13",
        "numpy>=1.26",
        "pyarrow>=15",
        "safetensors>=0.4.3",
        "tensorboard>=2.15",
        "tqdm>=4.66",
    ],
    extras_require={
        "npu": ["torch_npu>=2.7.1,<2.14", "einops"],  # transformers 4 imports einops where there is an NPU
        "qlora": ["bitsandbytes>=0.45"],
        "cuda": [],  # PyPI's torch for Linux carries CUDA; the extra exists so that an install command can say what it is for
        "dev": ["pytest>=8", "hypothesis>=6.100", "ruff>=0.9", "mypy>=1.13"],
    },
)

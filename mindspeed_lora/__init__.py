"""LoRA and full-parameter fine-tuning with tensor, pipeline and data parallelism on NPU, CUDA and CPU."""

__version__ = "0.1.0"

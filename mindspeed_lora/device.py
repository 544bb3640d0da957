"""The one place that knows which accelerators exist: npu, cuda or cpu. ``torch_npu`` is imported here and nowhere else.

Everything goes through ``torch.accelerator`` where torch has it, with plain no-ops on CPU.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import platform
import resource
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from mindspeed_lora.errors import MindSpeedLoraError, UsageError

BACKENDS = {"npu": "cpu:gloo,npu:hccl", "cuda": "cpu:gloo,cuda:nccl", "cpu": "gloo"}
OLDEST_TORCH, NEWEST_TESTED_TORCH = (2, 7), (2, 13)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_KEPT_BLOCK_BYTES, _KEPT_BYTES = 32 << 20, 2**31 - 1  # the first is the largest that every glibc takes


def load_torch_npu() -> ModuleType:
    """Import ``torch_npu`` (extra ``npu``).

    Raises:
        MindSpeedLoraError: it is not installed, or CANN is not in the environment.
    """
    try:
        return importlib.import_module("torch_npu")
    except (ImportError, OSError) as error:
        raise MindSpeedLoraError(
            f"--device npu needs torch_npu, which did not import ({error}); install the pair of torch and torch_npu that "
            "the README lists for your CANN, and source CANN's set_env.sh first"
        ) from error


def torch_npu_installed() -> bool:
    """Whether the package is there (not whether it imports)."""
    return importlib.util.find_spec("torch_npu") is not None


def _npu_available() -> bool:
    if not torch_npu_installed():
        return False
    load_torch_npu()
    return bool(torch.get_device_module("npu").is_available())


def select_device_type(name: str = "auto") -> str:
    """Resolve ``--device``: "auto" takes npu, then cuda, then cpu.

    Raises:
        UsageError: the named device is not on this machine.
    """
    available = {"npu": _npu_available, "cuda": torch.cuda.is_available, "cpu": lambda: True}
    if name == "auto":
        return next(kind for kind, there in available.items() if there())
    if name not in available:
        raise UsageError(f"--device {name} is unknown; use auto, npu, cuda or cpu")
    if name == "npu":
        load_torch_npu()
    if not available[name]():
        raise UsageError(f"--device {name}: no such device is visible on this machine; use --device auto or cpu")
    return name


def select_device(name: str = "auto", local_rank: int = 0) -> torch.device:
    """The process's device, made current; ``local_rank`` is its index on this machine."""
    kind = select_device_type(name)
    if kind == "cpu":
        return torch.device("cpu")
    module = torch.get_device_module(kind)
    if local_rank >= module.device_count():
        raise UsageError(f"local rank {local_rank} has no {kind} device: it shows {module.device_count()}; lower --nproc_per_node")
    module.set_device(local_rank)
    return torch.device(kind, local_rank)


def collective_backend(device: torch.device) -> str:
    """Backend string for ``init_process_group``: CPU tensors always go over gloo."""
    return BACKENDS[device.type]


def synchronize(device: torch.device) -> None:
    """Wait for the device's queued work."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


def make_profiler(device: torch.device, record_shapes: bool, with_memory: bool, with_stack: bool) -> Any:
    """A profiler of host and device, not started: torch's, on an NPU torch_npu's; ``start``, ``stop``, ``export_chrome_trace``."""
    module = load_torch_npu().profiler if device.type == "npu" else torch.profiler
    kinds = ["CPU"] if device.type == "cpu" else ["CPU", device.type.upper()]
    activities = [getattr(module.ProfilerActivity, kind) for kind in kinds]
    return module.profile(activities=activities, record_shapes=record_shapes, profile_memory=with_memory, with_stack=with_stack)


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory held so far: by torch on a device, resident in the process on CPU."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def total_memory_bytes(device: torch.device) -> int:
    """Memory of the device (of the machine, on CPU)."""
    if device.type != "cpu":
        return int(torch.get_device_module(device).get_device_properties(device).total_memory)
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def free_memory_bytes(device: torch.device) -> int:
    """Memory of the device (of the machine, on CPU) that nobody holds now; what torch keeps in reserve counts as free."""
    if device.type != "cpu":
        module = torch.get_device_module(device)
        reserved = int(module.memory_reserved(device)) - int(module.memory_allocated(device))
        return int(module.mem_get_info(device)[0]) + reserved
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():  # sysconf's count leaves out what the page cache would give back
        fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
        if "MemAvailable" in fields:
            return int(fields["MemAvailable"].split()[0]) * 1024
    return total_memory_bytes(device) // 2


def keep_freed_memory() -> None:
    """Have glibc keep what tensors on a CPU free, for the next ones; nothing happens with another C library.

    It gives blocks of many MiB back to the system, and a step faults their pages in again: 17,000 times and 15 % of the time of an
    fp32 step of 60M parameters (benchmarks/RESULTS.md). The peak stays what it is.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        if libc.mallopt(_M_MMAP_THRESHOLD, _KEPT_BLOCK_BYTES):
            libc.mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


@functools.cache
def _cpu_fields() -> dict[str, str]:
    """What Linux tells of the first core (``flags``, ``vendor_id``, ...); empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").partition("\n\n")[0].splitlines()
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _cpu_flags() -> list[str]:
    return _cpu_fields().get("flags", "").split()


@functools.cache
def cpu_multiplies_fast(dtype: torch.dtype) -> bool:
    """Whether this CPU multiplies matrices of ``dtype``, bf16 or fp16, faster than fp32 ones.

    Arm's do, Intel's with AMX, and AMD's avx512_bf16 at twice fp32's rate; its fp16 takes 4 to 80 times as long as fp32.
    """
    if platform.machine().lower() in ("aarch64", "arm64"):
        return True
    if dtype == torch.float16:
        return "amx_fp16" in _cpu_flags()
    return "amx_bf16" in _cpu_flags() or _has_bf16_of_amd()


def small_bf16_products_are_slow() -> bool:
    """Whether bf16 matrices must be large to be multiplied fast, larger than flash attention's: AMD's avx512_bf16 (measured on Zen 5)."""
    return _has_bf16_of_amd()


def _has_bf16_of_amd() -> bool:
    return _cpu_fields().get("vendor_id") == "AuthenticAMD" and "avx512_bf16" in _cpu_flags()


@functools.cache
def mkl_leaves_units_idle() -> bool:
    """Whether oneDNN multiplies fp32 matrices faster than MKL, which on AMD takes 256 bits at a time: Zen 4 (1.1 times), Zen 5 (2)."""
    wide = _cpu_fields().get("vendor_id") == "AuthenticAMD" and "avx512f" in _cpu_flags()
    return wide and torch.backends.mkldnn.is_available()


def rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    """Random state of torch on the CPU and on the device, as tensors."""
    state = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        state[device.type] = torch.get_device_module(device).get_rng_state()
    return state


def set_rng_state(device: torch.device, state: dict[str, torch.Tensor]) -> None:
    """Restore what :func:`rng_state` returned; another device's part is left out."""
    torch.set_rng_state(state["cpu"])
    if device.type != "cpu" and device.type in state:
        torch.get_device_module(device).set_rng_state(state[device.type])


def torch_version() -> tuple[int, ...]:
    """Of the torch that runs, (major, minor)."""
    return tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])


def check_torch_version() -> str | None:
    """None for a tested torch, a warning for a newer one.

    Raises:
        MindSpeedLoraError: older than the oldest that works.
    """
    version = torch_version()
    if version < OLDEST_TORCH:
        raise MindSpeedLoraError(f"torch {torch.__version__} is too old: 2.7.1 is the oldest that works; pip install 'torch>=2.7.1,<2.14'")
    if version > NEWEST_TESTED_TORCH:
        return f"torch {torch.__version__} is newer than the newest tested (2.13); going on, compare a short run before a long one"
    return None

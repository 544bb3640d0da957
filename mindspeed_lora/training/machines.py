"""The machines that ``--dry-run`` knows, by public figures. Rates are per device; what a program reaches of them is a guess.

| name | source of the peaks |
|---|---|
| atlas-900-a2 | Huawei's own modelling tool, github.com/Ascend/msmodeling, tensor_cast/device.py (1e5a50b), ATLAS_800_A2_313T_64G: 8 |
|              | Ascend 910B3 of 64 GB; 20 cube cores, 294.9 TFLOP/s in bf16 (313 is fp16); HBM 1.6 TB/s; HCCS 196 GB/s one way to 7 |
|              | peers (28 GB/s each); RoCE 200 Gb/s; and its shares of 0.7, 0.6, 0.7. Measured on a 910B2 (24 cores): 0.85 to 0.89 of  |
|              | the peak for products of 4096 to 10240 (github.com/zzc0721/torch-performance-test-data, issue 109) |
| h100, h200 | NVIDIA H100 and H200 SXM data sheets: 8 devices, dense bf16, NVLink 4 900 GB/s both ways together, InfiniBand 400 Gb/s |
| rtx4090 | NVIDIA Ada white paper: one card, bf16 with fp32 accumulation |
| laptop | a laptop of 8 cores with AVX-512 at about 2.5 GHz and two channels of DDR5; fp32 |
"""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_lora.errors import UsageError


@dataclass(frozen=True)
class Machine:
    """``devices`` of one node. Bytes and FLOP/s per device; links are one way, per device.

    ``memory_bytes``: what a program sees. ``matmul_share`` and ``memory_share``: what large matmuls and streaming kernels reach of the
    peaks. ``launch_s``: host time of a kernel. ``mesh``: a node's devices have one link to each other one and no switch, so that a
    group of t of them uses t - 1 links of ``devices`` - 1.
    """

    name: str
    words: str
    devices: int
    memory_bytes: float
    flops: float
    bandwidth: float
    link: float  # inside a node
    network: float  # between nodes
    matmul_share: float
    memory_share: float = 0.75
    link_share: float = 0.75
    launch_s: float = 6e-6
    mesh: bool = False

    def link_between(self, group: int, devices: int) -> float:
        """Bytes/s, one way and per device, that a collective of ``group`` ranks reaches which lie within ``devices`` neighbours."""
        if devices > self.devices:
            return self.link_share * self.network
        return self.link_share * self.link * ((group - 1) / (self.devices - 1) if self.mesh and group > 1 else 1.0)

    @property
    def usable_bytes(self) -> float:
        """What tensors may take: the rest is the collectives' own buffers, the driver's context and fragmentation."""
        return 0.93 * self.memory_bytes


_GIB = float(1 << 30)
MACHINES = (
    Machine(
        name="atlas-900-a2",
        words="Atlas 900 A2 1x8 (Ascend 910B3, 64 GB)",
        devices=8,
        memory_bytes=61 * _GIB,
        flops=294.9e12,
        bandwidth=1.6e12,
        link=196e9,
        network=25e9,
        matmul_share=0.70,
        memory_share=0.60,
        link_share=0.70,
        launch_s=1.5e-5,
        mesh=True,
    ),
    Machine("h100", "8 x H100 SXM 80 GB", 8, 79 * _GIB, 989e12, 3.35e12, 450e9, 50e9, 0.70),
    Machine("h200", "8 x H200 SXM 141 GB", 8, 139 * _GIB, 989e12, 4.8e12, 450e9, 50e9, 0.70),
    Machine("rtx4090", "one RTX 4090 24 GB", 1, 23.5 * _GIB, 165e12, 1.008e12, 25e9, 1e9, 0.80),
    Machine("laptop", "a laptop's CPU, 8 cores, 16 GB", 1, 14 * _GIB, 0.6e12, 60e9, 10e9, 1e8, 0.60, launch_s=2e-6),
)


def find_machine(name: str) -> Machine:
    """The machine of that name.

    Raises:
        UsageError: there is none.
    """
    known = {machine.name: machine for machine in MACHINES}
    if name not in known:
        raise UsageError(f"--dry-run-machine {name}: unknown machine; use {', '.join(known)}, or leave it out for the memory alone")
    return known[name]

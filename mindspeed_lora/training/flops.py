"""Model FLOPs by one formula, and the peak rates of devices we know.

Per trained token: 2 per matmul parameter forward, 2 for the activation gradient, 2 for the weight gradient where the
parameter is trained; of a routed expert, times the share of tokens that pass through it. The head counts as a matmul, the
embedding look-up does not. Causal attention of a sample of length s: ``s^2 n (d + d_v)`` forward (scores and values, half of the
square), twice that backward; n heads, of size d in keys and d_v in values. Recomputation does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_lora.weights.config import ModelConfig
from mindspeed_lora.weights.lora_blocks import adapted_entries, trained_elements
from mindspeed_lora.weights.lora_spec import LoraSpec
from mindspeed_lora.weights.table import Row, WeightTable

# Dense bf16 FLOP/s of the vendor's data sheet, by a part of the device's name; others get no utilisation figure.
PEAK_FLOPS = {"910B3": 313e12, "910B2": 376e12, "910B4": 280e12, "H200": 989e12, "H100": 989e12, "A100": 312e12}


@dataclass(frozen=True)
class FlopsModel:
    """FLOPs of a training step as a function of tokens.

    ``per_token``: matmuls; ``attention``: factor of the sum of squared sample lengths.
    """

    per_token: float
    attention: float

    def core_attention(self, tokens: float, samples: int) -> float:
        """Attention FLOPs of ``samples`` samples of equal length, ``tokens`` together."""
        return self.attention * tokens * tokens / max(samples, 1)

    def total(self, tokens: float, samples: int) -> float:
        """All FLOPs, forward and backward."""
        return self.per_token * tokens + self.core_attention(tokens, samples)


def flops_model(config: ModelConfig, table: WeightTable, lora: LoraSpec | None, reference: bool = False) -> FlopsModel:
    """The formula for one model; with ``lora`` the base has no weight gradients, with ``reference`` it runs forward once more."""
    frozen, trained = 0.0, 0.0
    for row, _ in table.entries():
        matmul = len(row.part_shapes[0]) == 2 and row.place != "embedding"
        size = _share(config, row) * sum(shape[0] * shape[1] for shape in row.part_shapes) if matmul else 0.0
        frozen += size if lora else 0
        trained += 0 if lora else size
    if lora:
        trained += sum(_share(config, row) * trained_elements(row, module) for row, _, module in adapted_entries(table, lora))
    if config.tied_embeddings:
        head = config.vocab_size * config.hidden_size
        frozen, trained = (frozen + head, trained) if lora else (frozen, trained + head)
    attention = 3.0 * config.num_layers * config.num_attention_heads * (config.kv_channels + config.value_channels)
    per_token = 4.0 * frozen + 6.0 * trained
    if reference:
        per_token, attention = per_token + 2.0 * (frozen if lora else trained), attention * 4 / 3
    return FlopsModel(per_token, attention)


def _share(config: ModelConfig, row: Row) -> float:
    """Part of the tokens that pass through a tensor: of a routed expert's, those that choose it on average."""
    return 1.0 if row.expert is None or config.experts is None else config.experts.routing.top_k / config.experts.count


def peak_flops(device_name: str) -> float | None:
    """Dense bf16 peak of a device, None where it is not known."""
    return next((peak for part, peak in PEAK_FLOPS.items() if part in device_name), None)

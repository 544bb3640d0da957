"""Sorting rows by expert and back: values and gradients against autograd over plain indexing."""

from __future__ import annotations

import pytest
import torch

from mindspeed_lora.ops.permute import permute, sort_by_expert, unpermute

CHOICES = {
    "usual": torch.tensor([[3, 0], [0, 2], [3, 2], [2, 0], [0, 3]]),  # none takes expert 1
    "one takes all": torch.full((5, 1), 2),
    "one choice": torch.tensor([[1], [3], [1], [0], [3]]),
    "no token": torch.empty(0, 2, dtype=torch.int64),
}


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("name", CHOICES)
def test_values_and_gradients_equal_plain_indexing(name: str, weighted: bool) -> None:
    experts = CHOICES[name]
    torch.manual_seed(0)
    tokens = torch.randn(len(experts), 6, dtype=torch.float64, requires_grad=True)
    factors = torch.randn(4, 6, dtype=torch.float64)  # what each expert does
    weights = torch.rand(experts.shape, dtype=torch.float64, requires_grad=True) if weighted else None
    order = sort_by_expert(experts, 4)
    assert order.groups.lengths == tuple(int((experts == expert).sum()) for expert in range(4))

    rows = permute(tokens, order)
    got = unpermute(torch.cat([part * factor for part, factor in zip(order.groups.split(rows), factors, strict=True)]), order, weights)
    chosen = tokens.unsqueeze(1) * factors[experts]
    expected = (chosen if weights is None else chosen * weights.unsqueeze(-1)).sum(dim=1)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)

    inputs = [tensor for tensor in (tokens, weights) if tensor is not None]
    upstream = torch.randn_like(got)
    for one, other in zip(torch.autograd.grad(got, inputs, upstream), torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_rows_of_an_expert_keep_the_tokens_order() -> None:
    order = sort_by_expert(CHOICES["usual"], 4)
    assert order.tokens.tolist() == [0, 1, 3, 4, 1, 2, 3, 0, 2, 4]


def test_sixteen_bit_sums_are_rounded_once() -> None:
    """k rows of 1 + 1/256 sum to what fp32 gives, rounded: adding in bf16 would lose the small part of each."""
    experts = torch.arange(8).repeat(3, 1)
    order = sort_by_expert(experts, 8)
    rows = torch.full((24, 4), 1 + 1 / 128, dtype=torch.bfloat16)
    assert torch.equal(unpermute(rows, order), torch.full((3, 4), 8 * (1 + 1 / 128)).bfloat16())

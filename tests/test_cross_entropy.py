"""The loss head against torch's cross-entropy in float64: values, both gradients, padding rows, ranks, and its memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mindspeed_lora.parallel import cross_entropy
from mindspeed_lora.parallel.context import build_context, single_process_context

TOKENS, HIDDEN, ROWS, VOCABULARY = 33, 16, 640, 601  # 39 rows of padding: with 2 ranks the second holds them


def _inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "hidden": torch.randn(TOKENS, HIDDEN, generator=generator, dtype=torch.float64),
        "weight": 2 * torch.randn(ROWS, HIDDEN, generator=generator, dtype=torch.float64),
        "target": torch.randint(VOCABULARY, (TOKENS,), generator=generator),
        "grad": torch.rand(TOKENS, generator=generator),
    }


def _reference() -> dict[str, torch.Tensor]:
    t = _inputs()
    hidden, weight = t["hidden"].requires_grad_(), t["weight"].requires_grad_()
    losses = torch.nn.functional.cross_entropy(hidden @ weight[:VOCABULARY].t(), t["target"], reduction="none")
    losses.backward(t["grad"].double())
    return {"losses": losses.detach(), "hidden": hidden.grad, "weight": weight.grad}


def _run(tp_size: int, dtype: torch.dtype, chunk: int) -> dict[str, torch.Tensor]:
    """This rank's results with blocks of 256 columns and chunks of ``chunk`` tokens."""
    context = build_context(torch.device("cpu"), tp_size, 1, False) if tp_size > 1 else single_process_context()
    t = _inputs()
    hidden = t["hidden"].to(dtype).requires_grad_()
    weight = t["weight"].chunk(tp_size)[context.tp_rank].to(dtype).requires_grad_()
    saved, cross_entropy.tile_of = cross_entropy.tile_of, lambda _device: cross_entropy.Tile(chunk, 1)
    try:
        losses = cross_entropy.linear_cross_entropy(hidden, weight, t["target"], VOCABULARY, context)
        losses.backward(t["grad"])
    finally:
        cross_entropy.tile_of = saved
    return {"losses": losses.detach(), "hidden": hidden.grad, "weight": weight.grad}


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
@pytest.mark.parametrize(("tp_size", "chunk"), [(1, 64), (1, 10), (2, 64)])
def test_loss_and_gradients_equal_cross_entropy(pool: Any, tp_size: int, chunk: int, dtype: torch.dtype, tolerance: float) -> None:
    results = pool.run(_run, tp_size, tp_size, dtype, chunk)
    want = _reference()
    got = {
        "losses": results[0]["losses"],
        "hidden": sum(result["hidden"].double() for result in results),
        "weight": torch.cat([result["weight"] for result in results]),
    }
    assert all(torch.equal(result["losses"], got["losses"]) for result in results)
    for name, expected in want.items():
        if dtype == torch.bfloat16:  # the rounded inputs are another problem: only the size of the difference counts
            assert (got[name].double() - expected).norm() < tolerance * expected.norm(), name
        else:
            torch.testing.assert_close(
                got[name].double(), expected, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )
    assert not got["weight"][VOCABULARY:].any()


def test_no_tensor_is_as_large_as_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return result

    monkeypatch.setattr(cross_entropy, "tile_of", lambda _device: cross_entropy.Tile(1024, 1))
    tokens, vocabulary = 64, 8192
    hidden, weight = torch.randn(tokens, 8, requires_grad=True), torch.randn(vocabulary, 8)
    with Sizes():
        cross_entropy.linear_cross_entropy(hidden, weight, torch.arange(tokens), vocabulary, single_process_context()).sum().backward()
    assert largest <= max(tokens * 256 * 4, weight.nbytes)
    assert largest < tokens * vocabulary * 4


@pytest.mark.parametrize(
    ("dtype", "scale", "tolerance"), [(torch.float16, 2.0**16, 3e-3), (torch.bfloat16, 1.0, 2e-2), (torch.float32, 1.0, 1e-5)]
)
def test_sure_tokens_keep_their_gradient(dtype: torch.dtype, scale: float, tolerance: float) -> None:
    """Losses near 1e-5: nearly the whole sum is the target's, beside which 16 bits lose the others; fp16 loses them without the scale."""
    generator = torch.Generator().manual_seed(0)
    weight = (0.02 * torch.randn(512, 64, generator=generator)).to(dtype)
    target = torch.randint(512, (TOKENS,), generator=generator)
    hidden = (20 * weight[target] / weight[target].float().square().sum(1, keepdim=True)).to(dtype).requires_grad_()
    losses = cross_entropy.linear_cross_entropy(hidden, weight, target, 512, single_process_context())
    (losses.sum() * scale).backward()
    exact = hidden.detach().double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact @ weight.double().t(), target, reduction="none")
    expected.sum().backward()
    assert hidden.grad is not None and exact.grad is not None and hidden.grad.dtype == dtype and 0 < expected.detach().mean() < 1e-4
    assert (hidden.grad.double() / scale - exact.grad).norm() <= tolerance * exact.grad.norm()
    assert dtype == torch.bfloat16 or torch.allclose(losses.double(), expected, rtol=0.02, atol=0.0)


def test_without_a_trained_token_the_gradients_are_zero() -> None:
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(300, 8, requires_grad=True)
    cross_entropy.linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64), 290, single_process_context()).sum().backward()
    assert hidden.grad is not None and hidden.grad.shape == (0, 8)
    assert weight.grad is not None and not weight.grad.any()

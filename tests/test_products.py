"""Products in fp32 by MKL and by oneDNN: exact, and by the one that is faster on this CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mindspeed_lora import ops
from mindspeed_lora.lora.functions import ColumnLora, RowLora
from mindspeed_lora.ops import products
from mindspeed_lora.parallel.context import single_process_context
from mindspeed_lora.parallel.cross_entropy import linear_cross_entropy


def _draw(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture(params=["mkl", "onednn"])
def by_onednn(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Both ways of a CPU, whatever this one is."""
    if request.param == "onednn" and not torch.backends.mkldnn.is_available():
        pytest.skip("this torch has no oneDNN")
    monkeypatch.setattr(products, "mkl_leaves_units_idle", lambda: request.param == "onednn")
    return request.param == "onednn"


def _close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 7, 70])
def test_fp32_products_are_exact_of_parts_and_transposes_too(rows: int, by_onednn: bool) -> None:
    x, weight, bias, dy = _draw(rows, 48)[:, 4:28], _draw(90, 24)[10:80], _draw(70), _draw(70, rows).t()
    wide = [tensor.double() for tensor in (x, weight, bias, dy)]
    _close(products.times_transposed(x, weight, bias), wide[0] @ wide[1].t() + wide[2])
    _close(products.times(dy, weight), wide[3] @ wide[1])
    _close(products.transposed_times(dy, x, x.dtype), wide[3].t() @ wide[0])
    both = torch.zeros(rows, 94)
    products.times_transposed(x, weight, out=both[:, :70])
    products.times(dy, weight, out=both[:, 70:])
    _close(both, torch.cat([wide[0] @ wide[1].t(), wide[3] @ wide[1]], dim=1))
    total = _draw(rows, 24)
    want = total.double() + 0.5 * wide[3] @ wide[1]
    assert products.add_product(total, dy, weight, 0.5) is total
    _close(total, want)


class _Products(TorchDispatchMode):
    """Names of the operators that multiply matrices, as they run, and what oneDNN gets as weights."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.weights: list[torch.Tensor] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = function.name().partition(".")[0]
        if name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "mkldnn::_linear_pointwise"):
            self.names.add(name)
        if name == "mkldnn::_linear_pointwise":
            self.weights.append(args[1])
        return function(*args, **(kwargs or {}))


def _train_everything() -> None:
    """Forward and backward of every layer whose rows are as many as the tokens: LoRA, full-parameter, the loss head."""
    context = single_process_context(torch.device("cpu"))
    x, weight, a, b, bias = _draw(35, 2, 24), _draw(40, 24), _draw(4, 24), _draw(40, 4), _draw(40)
    trained = [tensor.clone().requires_grad_() for tensor in (x, a, b)]
    ColumnLora.apply(trained[0], weight, bias, trained[1], trained[2], 2.0, context).sum().backward()
    RowLora.apply(trained[0], weight, trained[1], trained[2], 2.0, context).sum().backward()
    ops.linear(trained[0], weight.clone().requires_grad_(), bias).sum().backward()
    head = weight.clone().requires_grad_()
    linear_cross_entropy(trained[0].flatten(0, 1), head, torch.arange(70) % 40, 40, context).sum().backward()


def test_every_fp32_product_of_training_goes_where_it_is_faster(by_onednn: bool) -> None:
    with _Products() as ran:
        _train_everything()
    if by_onednn:
        assert ran.names == {"mkldnn::_linear_pointwise", "aten::addmm_"}  # the latter adds u B^T to y, in place
    else:
        assert "mkldnn::_linear_pointwise" not in ran.names


def test_onednn_gets_no_weight_with_gaps(by_onednn: bool) -> None:
    """Of such a weight it makes each element by itself: 1.8 s where a dense one takes 1.5 ms."""
    x, weight = _draw(8, 24), _draw(40, 32)[:, :24]
    with _Products() as ran:
        _close(products.times_transposed(x, weight), x.double() @ weight.double().t())
        _close(products.times(x, _draw(24, 40)[:, 8:]), x.double() @ _draw(24, 40)[:, 8:].double())
        products.times_transposed(x, _draw(40, 24))
    assert len(ran.weights) == 3 * by_onednn
    assert all(given.is_contiguous() or given.t().is_contiguous() for given in ran.weights)

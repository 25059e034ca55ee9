"""Constants of a module: the same numbers, few lines, no name twice."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

import pytest
import torch

from shardwright.codegen.constants import Constants
from shardwright.ir.graph import Param, TensorType, Value


def param(name: str, tensor: torch.Tensor) -> Param:
    value = Value(name, TensorType(tuple(tensor.shape), tensor.dtype), False)
    return Param(name, value, kind="constant", data=_tuples(tensor.tolist()))


def _tuples(data: Any) -> Any:
    return tuple(map(_tuples, data)) if isinstance(data, list) else data


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.complex64])
@pytest.mark.parametrize("shape", [(), (3,), (300,), (1, 40), (40, 1), (7, 3, 5)])
def test_the_same_numbers(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for tensor in (torch.randn(shape, dtype=dtype), torch.full(shape, 1e-7, dtype=dtype)):
        constants = Constants()
        text = constants.text(param("rope.inv_freq", tensor))
        bound: dict[str, Any] = {}
        exec(dedent("\n".join(constants.lines())), bound)
        wide = torch.complex128 if dtype.is_complex else torch.float64  # as `verify` runs it
        assert torch.equal(torch.tensor(eval(text, bound), dtype=wide), tensor.to(wide))
        assert all(len(line) <= 100 for line in constants.lines())


def test_names() -> None:
    constants = Constants()
    one, other = torch.rand(50), torch.rand(50)
    few = [constants.text(param(name, one[:2])) for name in ("a.slopes", "b.slopes")]
    assert few[0] == few[1] and few[0].startswith("(0.")
    names = ("a.inv_freq", "b.inv_freq", "inv_freq", "c.inv-freq")
    long = [constants.text(param(name, other if name[0] == "b" else one)) for name in names]
    assert long == ["INV_FREQ_VALUES", "B_INV_FREQ_VALUES", "INV_FREQ_VALUES", "INV_FREQ_VALUES"]
    third = torch.rand(50)
    assert constants.text(param("inv_freq", third)) == "INV_FREQ_2_VALUES"
    assert len([line for line in constants.lines() if " = (" in line]) == 3

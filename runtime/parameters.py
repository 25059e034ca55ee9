"""The parameters of a generated module, and which tensors of the original model they make up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch

from .layers import of_layer

Kind: TypeAlias = Literal["parameter", "buffer", "constant"]


@dataclass(frozen=True, slots=True)
class Part:
    """Which part of an original tensor a parameter is: along `dim`, from `start` on."""

    name: str
    dim: int
    start: int


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter, buffer or constant of the original model: full shape, and how it is sharded.

    `buffer` is a persistent one; `constant` what no state dict carries, with its values in
    `data` as (nested) tuples of numbers.  `aliases` are further names of the same tensor.  A
    `part` of a tensor, such as the q of one weight for q, k and v, has the shape of the part;
    `aliases` are then names of the whole.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    spec: str
    kind: Kind = "parameter"
    aliases: tuple[str, ...] = ()
    data: object = None
    trainable: bool = True
    part: Part | None = None


@dataclass(frozen=True, slots=True)
class Original:
    """A tensor of the original model; `params` names what holds it, one after another in `dim`."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: Kind
    aliases: tuple[str, ...]
    dim: int
    params: tuple[str, ...]


def originals(table: Mapping[str, Param]) -> dict[str, Original]:
    """The tensors that the parameters of `table` make up, by original name, in its order.

    Raises ValueError where parts of a tensor are not all there, one after another.
    """
    found: dict[str, Original] = {}
    for name, param in table.items():
        part = param.part or Part(name, 0, 0)
        shape, earlier = list(param.shape), found.get(part.name)
        end = 0 if earlier is None else earlier.shape[part.dim]
        if part.start != end or (earlier is not None and param.part is None):
            raise ValueError(
                f"`{name}` begins at {part.start} in dim {part.dim} of `{part.name}`; the parts "
                f"before it end at {end}"
            )
        if earlier is not None:
            shape[part.dim] += end
        before = () if earlier is None else earlier.params
        found[part.name] = Original(
            tuple(shape), param.dtype, param.kind, param.aliases, part.dim, (*before, name)
        )
    return found


def param_of_layer(param: Param, index: int) -> Param:
    """`param` with the names in it, such as `layers.{0..3}.weight`, as they are in one layer."""
    aliases = tuple(of_layer(alias, index) for alias in param.aliases)
    part = param.part and replace(param.part, name=of_layer(param.part.name, index))
    return replace(param, aliases=aliases, part=part)

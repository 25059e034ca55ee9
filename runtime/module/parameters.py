"""The parameters of a generated module, and which tensors of the original model they make up."""

from __future__ import annotations

from collections.abc import Collection, Mapping
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


def matrices(table: Mapping[str, Param], others: Collection[str]) -> set[str]:
    """Names of the trained originals that are matrices, or stacks of them, but for `others`."""
    return {
        name
        for name, original in originals(table).items()
        if len(original.shape) in (2, 3)
        and original.kind == "parameter"
        and any(table[part].trainable for part in original.params)
        and name not in others
    }


@dataclass(frozen=True, slots=True)
class Stack:
    """A tensor that stacks all experts of a layer: weights (e, r, c) or biases (e, r).

    The matrices `roles` of an expert lie one after another along `dim`.  `transposed`: they are
    (in, out), where one expert's linear layer has (out, in).  `unclear` says what names and shapes
    do not tell about that, or is empty.
    """

    module: str  # `model.layers.0.mlp.experts`
    kind: Literal["weight", "bias"]
    roles: tuple[str, ...]
    shape: tuple[int, ...]
    transposed: bool
    unclear: str

    @property
    def dim(self) -> int:
        """The dim of output features."""
        return 2 if self.transposed else 1

    @property
    def rows(self) -> int:
        """Output features of one matrix."""
        return self.shape[self.dim] // len(self.roles)

    def matrix_shape(self) -> tuple[int, ...]:
        """The shape of one matrix, or bias, in the layer of one expert."""
        shape = [*self.shape]
        shape[self.dim] = self.rows
        return tuple(reversed(shape[1:])) if self.transposed else tuple(shape[1:])


_ROLES = {"gate_up_proj": ("gate", "up"), "down_proj": ("down",)}


def expert_stacks(table: Mapping[str, Original]) -> dict[str, Stack]:
    """The tensors of `table` that stack experts, by name: `<...>.experts.gate_up_proj` and so on.

    Names and the order of gate and up are those of transformers 5: in matrices (out, in) all gates
    come first.  In matrices (in, out) some models have pairs, so that the order is known only where
    the module keeps gate and up as parts.
    """
    named = {key: original for name, original in table.items() for key in (name, *original.aliases)}
    found: dict[str, Stack] = {}
    for name, original in named.items():
        module, _, leaf = name.rpartition(".")
        matrix = leaf.removesuffix("_bias")
        dims = 2 if matrix != leaf else 3
        if module.split(".")[-1] == "experts" and matrix in _ROLES and len(original.shape) == dims:
            across = _transposed(named, module)
            found[name] = _stack(original, module, _ROLES[matrix], across)
    return found


def _stack(original: Original, module: str, roles: tuple[str, ...], across: bool | None) -> Stack:
    """The stack that `original` is; `across` says whether matrices of `module` are (in, out)."""
    kind = "bias" if len(original.shape) == 2 else "weight"
    transposed = bool(across) and kind == "weight"
    unclear = ""
    if across is None:
        unclear = "shapes do not tell whether matrices are (out, in) or (in, out)"
    elif across and len(roles) > 1 and not _in_halves(original, 2 if transposed else 1):
        unclear = "name and shape do not tell whether gates come first or in pairs with ups"
    return Stack(module, kind, roles, original.shape, transposed, unclear)


def _transposed(named: Mapping[str, Original], module: str) -> bool | None:
    """Are the matrices of these experts (in, out)?  None where their shapes do not tell."""
    matrices = [named.get(f"{module}.{leaf}") for leaf in ("gate_up_proj", "down_proj")]
    shapes = [m.shape for m in matrices if m is not None and len(m.shape) == 3]
    if len(shapes) < 2:
        return None
    (_, rows, columns), (_, down_rows, down_columns) = shapes
    if (rows, columns) == (2 * down_columns, down_rows):
        return False
    return True if (rows, columns) == (down_columns, 2 * down_rows) else None


def _in_halves(original: Original, dim: int) -> bool:
    """Does the module keep gate and up, one after the other along `dim`, as parts?"""
    return len(original.params) == 2 and original.dim == dim


def param_of_layer(param: Param, index: int) -> Param:
    """`param` with the names in it, such as `layers.{0..3}.weight`, as they are in one layer."""
    aliases = tuple(of_layer(alias, index) for alias in param.aliases)
    part = param.part and replace(param.part, name=of_layer(param.part.name, index))
    return replace(param, aliases=aliases, part=part)

"""What an operator computes on one rank, in numbers of FLOPs and bytes: the cost model has the
seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Product:
    """`batch` matrix products [m, k] x [k, n] in one launch; `dtype` as torch writes it."""

    m: float
    n: float
    k: float
    batch: float
    dtype: str

    @property
    def flops(self) -> float:
        """A multiplication and an addition for each of batch x m x n x k."""
        return 2.0 * self.batch * self.m * self.n * self.k


@dataclass(frozen=True, slots=True)
class Scores:
    """Fused attention: `share` of all scores are computed, and the whole is done `times`, or
    `backward`, so many times as much.

    `values_in_keys`: the values are read with the keys.  `split_keys`: the keys of a few queries
    are shared out among all processors, as over a cache.
    """

    batch: int
    heads: int
    kv_heads: int
    queries: int
    keys: int
    head_dim: int
    dtype: str
    share: float = 1.0
    values_in_keys: bool = False
    split_keys: bool = False
    times: float = 1.0
    backward: bool = False

    @property
    def flops(self) -> float:
        """Two products for each query, key and number of a head."""
        pairs = float(self.batch * self.heads * self.queries * self.keys)
        return 4.0 * pairs * self.head_dim * self.share * self.times


@dataclass(frozen=True, slots=True)
class Stream:
    """A kernel that reads and writes `bytes` in all; its arithmetic hides behind that.

    `mixed`: it adds up rows or changes formats as it reads.
    """

    bytes: float
    mixed: bool = False

    @property
    def flops(self) -> float:
        """Not counted."""
        return 0.0


Kernel: TypeAlias = Product | Scores | Stream


@dataclass(frozen=True, slots=True)
class Kernels:
    """The kernels of one run, forward and backward: steps of kernels that follow one another.

    Most operators have one step; between those of a ring messages pass (`Traffic.hidden`).
    """

    forward: tuple[tuple[Kernel, ...], ...] = ()
    backward: tuple[tuple[Kernel, ...], ...] = ()

    @property
    def flops(self) -> float:
        """FLOPs of the forward pass."""
        return sum(kernel.flops for step in self.forward for kernel in step)


__all__ = ["Kernel", "Kernels", "Product", "Scores", "Stream"]

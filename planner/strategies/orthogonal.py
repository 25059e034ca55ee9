"""What Muon does with whole matrices: products of Newton-Schulz iterations, and the way to a
matrix's owner and back (`facts/orthogonal.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod

from ...facts.orthogonal import NUMBER_BYTES, ROUND_BYTES, STEPS, busiest, portions
from ...facts.spec import Spec, is_shard
from ...facts.work import Product
from ...ir.graph import Graph, Param, originals
from .network import Network
from .params import ParamRef
from .pricing import kernel_seconds
from .regions import scopes

_DTYPE = "torch.bfloat16"


@dataclass(frozen=True, slots=True)
class Matrix:
    """A trained parameter that is a matrix, a stack of them, or a `share` of such a one, whose
    `shape` is that of the original; `layers` have one."""

    shape: tuple[int, ...]
    share: float
    layers: int

    def received(self, spec: Spec, sizes: Sequence[int]) -> float:
        """Bytes that come to each rank in a step for one layer, where it is stored in `spec` on a
        mesh of `sizes`; of a stack that ranks share, each has the matrices that it owns."""
        ranks, numel = prod(sizes), prod(self.shape) * self.share
        stack = {0} if len(self.shape) > 2 else set[int]()
        pairs = list(zip(spec, sizes, strict=True))
        apart = prod(size for state, size in pairs if state in stack)
        cut = prod(size for state, size in pairs if is_shard(state) and state not in stack)
        there = numel / ranks * (1 - 1 / cut)
        back = numel / (cut * apart) - numel / (ranks * cut)
        return NUMBER_BYTES * (there + back)


def matrices_of(graph: Graph) -> dict[str, Matrix]:
    """The matrices of a graph, by the names of their values."""
    found: dict[str, Matrix] = {}
    for scope in scopes(graph):
        params = graph.params if scope.block is None else scope.block.params
        wholes = {whole.name: whole.value.type for whole in originals(params)}
        for param in params:
            if param.matrix:
                whole = wholes[_original(param)]
                share = param.value.type.numel / whole.numel
                found[param.value.name] = Matrix(whole.shape, share, scope.weight)
    return found


def received_bytes(graph: Graph, specs: Mapping[str, Spec], sizes: Sequence[int]) -> float:
    """Bytes that come to each rank in a step of Muon, on average, with parameters stored in
    `specs`."""
    return sum(
        matrix.layers * matrix.received(specs[name], sizes)
        for name, matrix in matrices_of(graph).items()
    )


class Orthogonal:
    """Seconds of all that in one graph on one network."""

    def __init__(self, graph: Graph, network: Network) -> None:
        self._network = network
        self._matrices = matrices_of(graph)

    def seconds(self, ref: ParamRef, spec: Spec) -> float:
        """Those that one layer's parameter adds to a step when stored in `spec`."""
        matrix = self._matrices[ref.param.value.name]
        computing = self._busiest_s * self._of_one(matrix) / self._of_all
        moved = matrix.received(spec, self._network.mesh.sizes)
        return computing + moved * self._byte_s if moved else computing

    @cached_property
    def _of_all(self) -> float:
        return sum(matrix.layers * self._of_one(matrix) for matrix in self._matrices.values())

    @cached_property
    def _busiest_s(self) -> float:
        """Of the rank whose matrices take longest."""
        ranks = self._network.mesh.ranks
        costs: list[float] = []
        for matrix in self._matrices.values():
            (count, *_), many = self._stack(matrix), matrix.layers
            parts = [last - first for first, last in portions(count, [], ranks)]
            one = self._of_one(matrix) / count
            costs += [one * part for part in parts] * many
        return busiest(costs, ranks)

    @cached_property
    def _byte_s(self) -> float:
        """Seconds of a byte that is received, in exchanges of the usual size."""
        sizes = self._network.mesh.sizes
        ranks, axes = prod(sizes), tuple(range(len(sizes)))
        given = ROUND_BYTES * ranks / (ranks - 1)  # all-to-all: so much is received of it
        return self._network.seconds("all_to_all", axes, given) / ROUND_BYTES

    @staticmethod
    def _stack(matrix: Matrix) -> tuple[int, int, int]:
        count, rows, columns = (1, *matrix.shape)[-3:]
        return count, rows, columns

    def _of_one(self, matrix: Matrix) -> float:
        """Seconds of the products of a parameter's matrices, one after the other."""
        count, rows, columns = self._stack(matrix)
        short, long = sorted((rows, columns))
        sizes = (short, short, long), (short, short, short), (short, long, short)
        products = (Product(m, n, k, count, _DTYPE) for m, n, k in sizes)
        return STEPS * matrix.share * sum(kernel_seconds(each, self._network) for each in products)


def _original(param: Param) -> str:
    return param.name if param.part is None else param.part.name


__all__ = ["Matrix", "Orthogonal", "matrices_of", "received_bytes"]

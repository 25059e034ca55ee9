"""Parameters are gathered ahead of their use, and their gradients scattered behind it.

A module knows the order in which it will use its gathered parameters.  While one is used the next
are on their way: at least as many bytes as the one in use has, so that links and cores work at the
same time, and no more than two parameters' worth of memory is taken for it.  In backward
`regather.py` does the same in reverse.

A gradient's reduce-scatter is waited for later, too.  Autograd runs backward in the reverse of the
order in which its nodes were made; the node that waits is made where the gathering is started, so
what was computed between that start and the use runs in backward while the gradient is on its way.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from ..mesh.collectives import Axis, Gathering
from ..mesh.transport import Transfer

if TYPE_CHECKING:
    from ..mesh.mesh import Mesh

_Key: TypeAlias = tuple[int, str, int]


class Gather(NamedTuple):
    """`axis.gather_parameter(parameter, dim, size)` that will come."""

    axis: Axis
    parameter: Tensor
    dim: int
    size: int | None = None

    @property
    def key(self) -> _Key:
        """Which use this is the gathering for."""
        return id(self.parameter), self.axis.name, self.dim


@dataclass(frozen=True, slots=True)
class Early:
    """A parameter on its way.

    `source` is the parameter, through a node that waits for the transfer in `gradient`, if
    backward puts one there.
    """

    gathering: Gathering
    source: Tensor
    gradient: list[Transfer]


class Ahead:
    """Starts gathering in the order of `gathers`, as far ahead as the module's text says."""

    def __init__(self, gathers: Iterable[Gather]) -> None:
        self._coming = deque(gather for gather in gathers if gather.axis.size > 1)
        self._ready: dict[_Key, Early] = {}
        self._bytes = 0

    def take(self, x: Tensor, axis: Axis, dim: int) -> Early | None:
        """What was started for this use, the next ones started; None if this was not foreseen."""
        key: _Key = (id(x), axis.name, dim)
        if key not in self._ready and any(gather.key == key for gather in self._coming):
            while key not in self._ready:  # the first of all, or two used in one statement
                self._start_next()
        early = self._ready.pop(key, None)
        if early is not None:
            wanted = early.gathering.nbytes
            self._bytes -= wanted
            while self._bytes < wanted and self._coming and self._coming[0].key not in self._ready:
                self._start_next()
        return early

    def finish(self) -> None:
        """Wait for what was started and never used."""
        for early in self._ready.values():
            early.gathering.transfer.finish()
        self._ready.clear()

    def _start_next(self) -> None:
        gather = self._coming.popleft()
        axis, x, dim, size = gather
        gradient: list[Transfer] = []
        source = x
        if torch.is_grad_enabled() and x.requires_grad:
            source = _Await.apply(x, gradient)
        gathering = axis.start_gather(x.detach(), dim, size, "forward")
        self._ready[gather.key] = Early(gathering, source, gradient)
        self._bytes += gathering.nbytes


class _Await(torch.autograd.Function):
    """`x` itself; backward waits for the transfer, if there is one, that fills its gradient in."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gradient: list[Transfer]) -> Tensor:
        ctx.gradient = gradient
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        while ctx.gradient:
            ctx.gradient.pop().finish()
        return grad_outputs[0], None


@contextmanager
def gathering_ahead(mesh: Mesh, gathers: Iterable[Gather]) -> Generator[None]:
    """Within, `Axis.gather_parameter` calls that come in the order of `gathers` are started early.

    Each use of a parameter must be the one named next for it; uses that are not named are
    gathered when they come.  Costs up to two parameters' bytes, and no further collectives.
    """
    ahead = Ahead(gathers)
    previous, mesh.ahead = mesh.ahead, ahead
    try:
        yield
    finally:
        mesh.ahead = previous
        ahead.finish()

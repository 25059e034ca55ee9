"""What collectives move: derived once, then priced, counted and printed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Traffic:
    """`times` collectives of one kind over `axes` of the mesh, each called with `bytes`.

    `bytes` follows `costmodel.collective`: the whole buffer for all-gather, reduce-scatter and
    all-reduce, one rank's buffer for all-to-all, the message for `send_recv`.  `backward`: of the
    backward pass.  `hidden`: they run behind what the operator computes, one after each of its
    steps but the last.  `told`: what they tell; operators that tell the same do it once per step.
    """

    kind: str
    axes: tuple[int, ...]
    bytes: float
    backward: bool = False
    times: int = 1
    hidden: bool = False
    told: str = ""


__all__ = ["Traffic"]

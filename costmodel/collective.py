"""Seconds of a collective over one or several mesh axes.

What each collective moves, over which links and in how many hops, its declaration says
(`facts/collectives.py`); here that becomes time.  Inside a node, with wire = the bytes that pass a
rank's links:

    seconds = launch_s + hops * hop_s + wire / rate + ramp_s_per_sqrt_byte * sqrt(wire) + own / copy

- rate = efficiency * bytes_per_s, or from `group_bytes_per_s` where it depends on how many GPUs
  take part.
- the square root is the bandwidth ramp: messages are cut into chunks over more and more channels.
- own = tensor_bytes / p: a rank also copies its own part from input to output, if `copies`.
- where ranks agree in pairs there is `exchange_s` more, growing in over the first 32 kB received:
  every pair of ranks agrees on a buffer before larger messages flow.

Across nodes, with `nodes` nodes of `local` ranks each (p = nodes * local): every GPU has its own
network card, and all GPUs of a node take part at once, each in its own group; so a group that
has `local` ranks in a node has just their `local` cards, whatever the other groups do.  Where the
GPUs of a node share cards (`node_bytes_per_s`), what comes in for all of them passes there too.
Meanwhile the links inside pass on the same chunks; the slower of the two counts, for chunks are
pipelined.  Hops inside and between nodes add up.

Where a group of as many ranks on as many nodes was measured on this very machine (`Measured`), what
was measured counts instead, in straight lines between its messages and beyond the largest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, log2, prod
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from ..facts.collectives import (
    Collective,
    Placement,
    find_collective,
    message_count,
    received_share,
)
from ..facts.mesh import Mesh
from .machines.cluster import Cluster, Link, Measured

_EXCHANGE_BYTES = 32e3  # half of `exchange_s` is paid here; all-to-all rows of nccl_*.csv

Floats: TypeAlias = NDArray[np.float64]
Number: TypeAlias = "float | Floats"


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisLink:
    """How the groups along one mesh axis (or several flattened) lie on the cluster.

    `size` ranks in a group, spread over `nodes` nodes, `local` of them in one node; `span` GPUs
    lie between the first and the last of a group in its node, both counted: they are all busy, as
    the groups in between run the same collective.  `groups` have ranks in one node.  `measured` is
    what such groups took.

    Invariants: local * nodes >= size; local <= span; all at least 1.
    """

    size: int
    nodes: int
    local: int
    span: int
    intra: Link
    inter: Link
    groups: int = 1
    measured: Measured | None = None

    def __post_init__(self) -> None:
        if min(self.size, self.nodes, self.local, self.groups) < 1 or self.local > self.span:
            raise ValueError(f"impossible group: {self}")
        if self.local * self.nodes < self.size:
            raise ValueError(f"{self.size} ranks do not fit {self.nodes} nodes x {self.local}")

    def __str__(self) -> str:
        if self.nodes == 1:
            return f"{self.size} ranks in a node"
        return f"{self.size} ranks over {self.nodes} nodes, {self.local} in each"


def axis_links(mesh: Mesh, cluster: Cluster) -> tuple[AxisLink, ...]:
    """The link of every mesh axis, outermost first.

    Ranks are numbered row by row (rank = 2 * dp + tp on a dp=4 x tp=2 mesh) and fill the nodes in
    that order, so the innermost axis lies inside a node where it fits.
    """
    return tuple(joint_link(mesh, cluster, (axis,)) for axis in range(len(mesh.axes)))


def joint_link(mesh: Mesh, cluster: Cluster, axes: tuple[int, ...]) -> AxisLink:
    """The link of a collective over several mesh axes taken as one group.

    Every group along the axes is laid out and the worst one kept, so that groups that straddle a
    node's edge (three ranks in a node of eight) count as crossing it.
    """
    if len(set(axes)) != len(axes) or not all(0 <= axis < len(mesh.axes) for axis in axes):
        raise ValueError(f"axes {axes} are not distinct axes of the mesh {mesh}")
    per_node = cluster.gpus_per_node
    others = [axis for axis in range(len(mesh.axes)) if axis not in axes]
    size = prod(mesh.sizes[axis] for axis in axes)
    ranks = np.arange(mesh.ranks).reshape(mesh.sizes).transpose(*others, *axes)
    groups = np.sort(ranks.reshape(-1, size), axis=1)
    node_of = groups // per_node
    nodes = int((np.diff(node_of, axis=1) > 0).sum(axis=1).max()) + 1 if size > 1 else 1
    local = ceil(size / nodes)
    starts = np.maximum(groups[:, :1], node_of * per_node)
    ends = np.minimum(groups[:, -1:], node_of * per_node + per_node - 1)
    span = int((ends - starts).max()) + 1
    return AxisLink(
        size=size,
        nodes=nodes,
        local=local,
        span=span,
        intra=cluster.intra_node,
        inter=cluster.inter_node,
        groups=max(min(per_node, mesh.ranks) // local, 1),
        measured=cluster.between(size, nodes),
    )


def wire_bytes(kind: str, tensor_bytes: Number, *sizes: int) -> Number:
    """Bytes that each rank receives over axes of `sizes`: what the runtime's counter counts.

    >>> wire_bytes("all_reduce", 1000.0, 4)
    1500.0
    """
    return tensor_bytes * received_share(kind, sizes)


def messages(kind: str, *sizes: int) -> int:
    """In how many messages they come, one after the other: what the runtime's counter counts."""
    return message_count(kind, sizes)


def staged_s(
    kind: str, tensor_bytes: float, axes: tuple[int, ...], links: Mapping[tuple[int, ...], AxisLink]
) -> float:
    """Seconds of a collective over mesh `axes`, one after the other those that it is made of."""
    stages = find_collective(kind).stages(tuple(links[axis,].size for axis in axes))
    if not stages:
        return float(collective_s(kind, tensor_bytes, links[axes]))
    return sum(
        staged_s(stage.name, stage.share * tensor_bytes, tuple(axes[i] for i in stage.axes), links)
        for stage in stages
    )


def collective_s(kind: str, tensor_bytes: Number, axis: AxisLink) -> Number:
    """Seconds of one collective; elementwise on arrays of bytes.

    0 for a group of one and for 0 bytes (nothing is launched); never falls as bytes grow.
    """
    collective = find_collective(kind)
    at = Placement(axis.size, axis.nodes, axis.local)
    data = np.asarray(tensor_bytes, dtype=float)
    if axis.size == 1:
        return _plain(0.0 * data)
    known = dict(() if axis.measured is None else axis.measured.seconds)
    if kind in known:
        return _plain(np.where(data > 0, _between(data, known[kind]), 0.0))
    moving = _inside_s(collective, data, axis, at)
    if axis.nodes > 1:
        moving = np.maximum(moving, _across_s(collective, data, axis, at))
    inside_hops, across_hops = collective.hops(at)
    launch = axis.intra.launch_s if axis.nodes == 1 else axis.inter.launch_s
    latency = launch + inside_hops * axis.intra.hop_s + across_hops * axis.inter.hop_s
    copying = data * (collective.copies / axis.size) / axis.intra.copy_bytes_per_s
    if collective.pairwise:
        wire = data * collective.received(axis.size)
        copying = copying + axis.intra.exchange_s * wire / (wire + _EXCHANGE_BYTES)
    return _plain(np.where(data > 0, latency + moving + copying, 0.0))


def _between(data: Floats, pairs: Sequence[tuple[float, float]]) -> Floats:
    """Seconds in straight lines between (bytes, seconds) `pairs`; beyond the last as before it, and
    below the first as of that."""
    sizes, seconds = np.array(pairs).T
    slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
    return np.interp(data, sizes, seconds) + slope * np.maximum(data - sizes[-1], 0.0)


def _inside_s(collective: Collective, data: Floats, axis: AxisLink, at: Placement) -> Floats:
    """Seconds that the links inside the node are busy."""
    link = axis.intra
    if axis.local == 1:
        return np.zeros_like(data)
    seconds = _transfer_s(data * collective.inside(at), _intra_rate(link, axis), link)
    in_switch = collective.in_switch(at)
    if in_switch and link.switch_reduce_bytes_per_s:
        added = _transfer_s(data * in_switch, link.switch_reduce_bytes_per_s, link)
        seconds = np.minimum(seconds, added)
    return seconds


def _across_s(collective: Collective, data: Floats, axis: AxisLink, at: Placement) -> Floats:
    """Seconds that each rank's network card is busy, and those that the ranks of a node share."""
    link = axis.inter
    cards = collective.cards(at) * axis.groups
    rate = min(link.efficiency * link.bytes_per_s, link.node_bytes_per_s / cards)
    return _transfer_s(data * collective.across(at), rate, link)


def _transfer_s(wire: Floats, rate: float, link: Link) -> Floats:
    return wire / rate + link.ramp_s_per_sqrt_byte * np.sqrt(wire)


def _intra_rate(link: Link, axis: AxisLink) -> float:
    """Bytes/s of one GPU inside a node, log-linear between the rows of the table.

    Without peer-to-peer links the rate falls with every busy GPU in between; with a link per pair
    of GPUs it grows with the group's own size.  The less of the two readings is right for both.
    """
    if not link.group_bytes_per_s:
        return link.efficiency * link.bytes_per_s
    counts = [log2(count) for count, _ in link.group_bytes_per_s]
    rates = [log2(rate) for _, rate in link.group_bytes_per_s]
    at = [log2(axis.local), log2(axis.span)]
    return float(2 ** np.interp(at, counts, rates).min())


def _plain(value: Floats) -> Number:
    """A float for a scalar, the array otherwise."""
    return float(value) if np.ndim(value) == 0 else value

"""Seconds of a collective over one or several mesh axes.

Bytes are counted as follows, for a group of p ranks:

| kind                         | `tensor_bytes`                        | received by each rank    |
|------------------------------|---------------------------------------|--------------------------|
| `all_gather`                 | the whole tensor, after the gather    | (p - 1) / p of it        |
| `reduce_scatter`             | the whole tensor, before the scatter  | (p - 1) / p of it        |
| `all_reduce`                 | the whole tensor                      | 2 (p - 1) / p of it      |
| `all_to_all`                 | one rank's buffer                     | (p - 1) / p of it        |
| `send_recv` (a ring's step)  | the message                           | all of it                |

Inside a node, with wire = the last column (`wire_bytes`):

    seconds = launch_s + hops * hop_s + wire / rate + ramp_s_per_sqrt_byte * sqrt(wire) + own / copy

- hops: a ring passes p - 1 neighbours, twice for all-reduce; all-to-all sends directly: 1.
- rate = efficiency * bytes_per_s, or from `group_bytes_per_s` where it depends on how many GPUs
  take part.
- the square root is the bandwidth ramp: messages are cut into chunks over more and more channels.
- own = tensor_bytes / p: a rank also copies its own part from input to output (not all-reduce).
- all-to-all has `exchange_s` more, growing in over the first 32 kB received: every pair of ranks
  agrees on a buffer before larger messages flow.
- a switch that adds (NVLink SHARP) moves (1 + 1/p) of the tensor instead; the faster one counts.

Across nodes, with `nodes` nodes of `local` ranks each (p = nodes * local): every GPU has its own
network card, and all GPUs of a node take part at once, each in its own group; so a group that
has `local` ranks in a node has just their `local` cards, whatever the other groups do.  Where the
GPUs of a node share cards (`node_bytes_per_s`), what comes in for all of them passes there too.

- all_gather, reduce_scatter, all_reduce: the ring crosses from node to node once per node and per
  card; what a node lacks, (nodes - 1) / nodes of the tensor, comes in over `local` cards, so each
  carries (nodes - 1) / nodes / local of it (twice for all-reduce).  Meanwhile the links inside
  pass on the same chunks; the slower of the two counts, for chunks are pipelined.
- all_to_all: (p - local) / p of a buffer goes over the rank's own card, (local - 1) / p inside.
- latency: hops inside, then nodes - 1 hops between nodes for a ring; NCCL's all-reduce is a tree
  between nodes, 2 ceil(log2 nodes) hops.  All-to-all talks to all its peers at once, with start-up
  counted as ceil(log2 nodes) hops (not measured).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2, prod
from typing import Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray

from ..facts.mesh import Mesh
from .machines.cluster import Cluster, Link

Collective: TypeAlias = Literal[
    "all_gather", "reduce_scatter", "all_reduce", "all_to_all", "send_recv"
]
COLLECTIVES: tuple[str, ...] = get_args(Collective)

_EXCHANGE_BYTES = 32e3  # half of `exchange_s` is paid here; all-to-all rows of nccl_*.csv

Floats: TypeAlias = NDArray[np.float64]
Number: TypeAlias = "float | Floats"


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisLink:
    """How the groups along one mesh axis (or several flattened) lie on the cluster.

    `size` ranks in a group, spread over `nodes` nodes, `local` of them in one node; `span` GPUs
    lie between the first and the last of a group in its node, both counted: they are all busy, as
    the groups in between run the same collective.  `groups` have ranks in one node.

    Invariants: local * nodes >= size; local <= span; all at least 1.
    """

    size: int
    nodes: int
    local: int
    span: int
    intra: Link
    inter: Link
    groups: int = 1

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
    )


def wire_bytes(kind: str, tensor_bytes: Number, size: int) -> Number:
    """Bytes that each of `size` ranks receives: what the runtime's counter counts.

    >>> wire_bytes("all_reduce", 1000.0, 4)
    1500.0
    """
    return tensor_bytes * _wire_share(kind, size)


def messages(kind: str, size: int) -> int:
    """In how many messages they come, one after the other: what the runtime's counter counts."""
    if kind == "send_recv":
        return 1
    return (size - 1) * (2 if kind == "all_reduce" else 1)


def collective_s(kind: str, tensor_bytes: Number, axis: AxisLink) -> Number:
    """Seconds of one collective; elementwise on arrays of bytes.

    0 for a group of one and for 0 bytes (nothing is launched); never falls as bytes grow.
    """
    share = _wire_share(kind, axis.size)
    data = np.asarray(tensor_bytes, dtype=float)
    if share == 0.0:
        return _plain(0.0 * data)
    if axis.nodes == 1:
        moving = _inside_s(kind, data, axis)
    else:
        moving = np.maximum(_inside_s(kind, data, axis), _across_s(kind, data, axis))
    inside_hops, across_hops = _hops(kind, axis)
    launch = axis.intra.launch_s if axis.nodes == 1 else axis.inter.launch_s
    latency = launch + inside_hops * axis.intra.hop_s + across_hops * axis.inter.hop_s
    own = 0.0 if kind in ("all_reduce", "send_recv") else 1.0 / axis.size
    copying = data * own / axis.intra.copy_bytes_per_s
    if kind == "all_to_all":
        wire = data * share
        copying = copying + axis.intra.exchange_s * wire / (wire + _EXCHANGE_BYTES)
    return _plain(np.where(data > 0, latency + moving + copying, 0.0))


def _wire_share(kind: str, size: int) -> float:
    if size < 1:
        raise ValueError(f"a group has at least one rank, got {size}")
    if kind == "send_recv":
        return 1.0 if size > 1 else 0.0
    shares = {"all_gather": 1, "reduce_scatter": 1, "all_to_all": 1, "all_reduce": 2}
    if kind not in shares:
        raise ValueError(f"unknown collective `{kind}`; expected one of {', '.join(COLLECTIVES)}")
    return shares[kind] * (size - 1) / size


def _inside_s(kind: str, data: Floats, axis: AxisLink) -> Floats:
    """Seconds that the links inside the node are busy."""
    link, p = axis.intra, axis.size
    if axis.local == 1:
        return np.zeros_like(data)
    share = (axis.local - 1) / p if kind == "all_to_all" else _wire_share(kind, p)
    rate = _intra_rate(link, axis)
    seconds = _transfer_s(data * share, rate, link)
    if kind == "all_reduce" and link.switch_reduce_bytes_per_s and axis.nodes == 1:
        in_switch = _transfer_s(data * (1 + 1 / p), link.switch_reduce_bytes_per_s, link)
        seconds = np.minimum(seconds, in_switch)
    return seconds


def _across_s(kind: str, data: Floats, axis: AxisLink) -> Floats:
    """Seconds that each rank's network card is busy, and those that the ranks of a node share."""
    link, p = axis.inter, axis.size
    cards = axis.local * axis.groups
    if kind == "send_recv":
        share, cards = 1.0, axis.groups  # a ring enters a node once
    elif kind == "all_to_all":
        share = (p - axis.local) / p
    else:
        ring = 2 if kind == "all_reduce" else 1
        share = ring * (axis.nodes - 1) / axis.nodes / axis.local
    rate = min(link.efficiency * link.bytes_per_s, link.node_bytes_per_s / cards)
    return _transfer_s(data * share, rate, link)


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


def _hops(kind: str, axis: AxisLink) -> tuple[int, int]:
    """Latency steps (inside nodes, between nodes)."""
    doublings = ceil(log2(axis.nodes))
    if kind == "send_recv":
        return (1, 0) if axis.nodes == 1 else (0, 1)
    if kind == "all_to_all":
        return (1 if axis.local > 1 else 0, doublings)
    if kind == "all_reduce":
        return (2 * (axis.local - 1), 2 * doublings)
    return (max(axis.size - axis.nodes, 0), axis.nodes - 1)


def _plain(value: Floats) -> Number:
    """A float for a scalar, the array otherwise."""
    return float(value) if np.ndim(value) == 0 else value

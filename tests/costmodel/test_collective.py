"""Collectives: ring arithmetic by hand, the layout of groups on nodes, properties."""

from __future__ import annotations

from dataclasses import replace
from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardwright.costmodel.collective import (
    AxisLink,
    axis_links,
    collective_s,
    joint_link,
    wire_bytes,
)
from shardwright.costmodel.machines.cluster import BUILT_IN, Cluster, Link, load_cluster
from shardwright.facts.collectives import COLLECTIVES
from shardwright.facts.mesh import Mesh

_FAST = Link(bytes_per_s=200e9, efficiency=0.5, launch_s=0.0, hop_s=0.0)  # 1e11 bytes/s
_SLOW = Link(bytes_per_s=1e10, efficiency=1.0, launch_s=0.0, hop_s=0.0)


def _axis(nodes: int, local: int, intra: Link = _FAST, inter: Link = _SLOW) -> AxisLink:
    return AxisLink(
        size=nodes * local, nodes=nodes, local=local, span=local, intra=intra, inter=inter
    )


@pytest.mark.parametrize(
    "kind, p, want",
    [
        ("all_gather", 1, 0), ("all_gather", 2, 500), ("all_gather", 4, 750),
        ("reduce_scatter", 4, 750), ("all_to_all", 4, 750), ("all_reduce", 2, 1000),
        ("all_reduce", 4, 1500), ("all_reduce", 8, 1750), ("send_recv", 4, 1000),
        ("send_recv", 1, 0),
    ],
)  # fmt: skip
def test_wire_bytes_of_1000(kind: str, p: int, want: float) -> None:
    assert wire_bytes(kind, 1000, p) == want


@pytest.mark.parametrize(
    "kind, p, seconds",
    [  # 1e9 bytes at 1e11 bytes/s
        ("all_reduce", 2, 10e-3),
        ("all_reduce", 4, 15e-3),
        ("all_gather", 4, 7.5e-3),
        ("reduce_scatter", 8, 8.75e-3),
        ("all_to_all", 4, 7.5e-3),
        ("send_recv", 8, 10e-3),
        ("all_reduce", 1, 0.0),
    ],
)
def test_inside_a_node_by_hand(kind: str, p: int, seconds: float) -> None:
    assert collective_s(kind, 1e9, _axis(1, p)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "kind, nodes, local, seconds",
    [  # 8e9 bytes; inside 1e11 bytes/s, between nodes 1e10 bytes/s and GPU
        # one rank per node, all over its own card: 8e9 * 3/4 / 1e10
        ("all_gather", 4, 1, 0.6),
        ("all_reduce", 4, 1, 1.2),
        # 2 nodes of 4: half of the tensor over 4 cards: 1e9 each: 0.1 s; inside 8e9*7/8/1e11 = 0.07
        ("all_gather", 2, 4, 0.1),
        ("reduce_scatter", 2, 4, 0.1),
        ("all_reduce", 2, 4, 0.2),
        # 2 nodes of 8: 8e9/2/8 = 0.5e9: 0.05 s; inside 8e9*15/16/1e11 = 0.075 s is the slower
        ("all_gather", 2, 8, 0.075),
        # 4 of 8 peers are elsewhere: half of the buffer over the own card
        ("all_to_all", 2, 4, 0.4),
        ("send_recv", 2, 4, 0.8),
    ],
)
def test_across_nodes_by_hand(kind: str, nodes: int, local: int, seconds: float) -> None:
    assert collective_s(kind, 8e9, _axis(nodes, local)) == pytest.approx(seconds)


@pytest.mark.parametrize(
    "kind, nodes, local, inside_hops, across_hops",
    [
        ("all_gather", 1, 4, 3, 0),
        ("all_reduce", 1, 4, 6, 0),
        ("all_to_all", 1, 4, 1, 0),
        ("send_recv", 1, 4, 1, 0),
        ("all_gather", 4, 2, 4, 3),  # a ring of 8 with 4 crossings; the last hop is not needed
        ("all_reduce", 4, 2, 2, 4),  # chains of 2 inside, a tree of 4 nodes up and down
        ("all_to_all", 4, 2, 1, 2),
        ("send_recv", 4, 2, 0, 1),
    ],
)
def test_latency_by_hand(
    kind: str, nodes: int, local: int, inside_hops: int, across_hops: int
) -> None:
    intra = Link(bytes_per_s=1e30, efficiency=1.0, launch_s=1.0, hop_s=10.0)
    inter = Link(bytes_per_s=1e30, efficiency=1.0, launch_s=2.0, hop_s=1000.0)
    launch = 1.0 if nodes == 1 else 2.0
    want = launch + 10 * inside_hops + 1000 * across_hops
    assert collective_s(kind, 1.0, _axis(nodes, local, intra, inter)) == pytest.approx(want)


def test_ramp_copy_exchange_and_switch_by_hand() -> None:
    ramp = replace(_FAST, ramp_s_per_sqrt_byte=1e-6)
    # wire 1e8: 1 ms and 1e4 * 1 us
    assert collective_s("all_gather", 2e8, _axis(1, 2, ramp)) == pytest.approx(11e-3)
    copy = replace(_FAST, copy_bytes_per_s=1e11)
    # half received, half copied; an all-reduce copies nothing
    assert collective_s("all_gather", 1e9, _axis(1, 2, copy)) == pytest.approx(10e-3)
    assert collective_s("all_reduce", 1e9, _axis(1, 2, copy)) == pytest.approx(10e-3)
    exchange = replace(_FAST, exchange_s=1.0)
    assert collective_s("all_to_all", 64e3, _axis(1, 2, exchange)) == pytest.approx(0.5, rel=1e-5)
    switch = replace(_FAST, switch_reduce_bytes_per_s=1e11)
    # 8 ranks: 1.125 instead of 1.75 tensors; 2 ranks: the ring's 1.0 beats 1.5
    assert collective_s("all_reduce", 1e9, _axis(1, 8, switch)) == pytest.approx(11.25e-3)
    assert collective_s("all_reduce", 1e9, _axis(1, 2, switch)) == pytest.approx(10e-3)


def _machine(per_node: int = 8) -> Cluster:
    return replace(load_cluster("h100"), gpus_per_node=per_node)


@pytest.mark.parametrize(
    "sizes, per_node, want",
    [  # (size, nodes, local) of each axis, outermost first
        ((8,), 8, [(8, 1, 8)]),
        ((2, 4), 8, [(2, 1, 2), (4, 1, 4)]),
        ((4, 8), 8, [(4, 4, 1), (8, 1, 8)]),  # dp between nodes, tp inside
        ((8, 4), 8, [(8, 4, 2), (4, 1, 4)]),  # dp mixed: 2 in a node, 4 nodes
        ((2, 16), 8, [(2, 2, 1), (16, 2, 8)]),  # tp over two nodes
        ((2, 2, 8), 8, [(2, 2, 1), (2, 2, 1), (8, 1, 8)]),
        ((2, 2, 4), 8, [(2, 2, 1), (2, 1, 2), (4, 1, 4)]),
        ((5, 3), 8, [(5, 2, 3), (3, 2, 2)]),  # ranks 6, 7, 8 straddle the first node's edge
        ((1, 8), 8, [(1, 1, 1), (8, 1, 8)]),
        ((16,), 4, [(16, 4, 4)]),
        ((3, 1), 1, [(3, 3, 1), (1, 1, 1)]),
    ],
)
def test_layout(sizes: tuple[int, ...], per_node: int, want: list[tuple[int, int, int]]) -> None:
    mesh = Mesh(tuple((f"a{i}", size) for i, size in enumerate(sizes)))
    links = axis_links(mesh, _machine(per_node))
    assert [(link.size, link.nodes, link.local) for link in links] == want


def test_span_counts_the_gpus_in_between() -> None:
    outer, inner = axis_links(Mesh((("dp", 2), ("tp", 4))), _machine())
    assert (outer.span, inner.span) == (5, 4)  # ranks 0 and 4; ranks 0 to 3


def test_joint_axes() -> None:
    mesh = Mesh((("dp", 2), ("cp", 2), ("tp", 4)))
    both = joint_link(mesh, _machine(), (1, 2))
    assert (both.size, both.nodes, both.local) == (8, 1, 8)
    outer = joint_link(mesh, _machine(), (0, 2))
    assert (outer.size, outer.nodes, outer.local) == (8, 2, 4)
    assert joint_link(mesh, _machine(), (2, 0)) == outer
    assert joint_link(mesh, _machine(), (0,)) == axis_links(mesh, _machine())[0]
    with pytest.raises(ValueError, match=r"axes \(0, 3\) are not distinct axes"):
        joint_link(mesh, _machine(), (0, 3))
    assert str(outer) == "8 ranks over 2 nodes, 4 in each"


def test_pcie_without_peer_to_peer_collapses() -> None:
    l40s = load_cluster("l40s")
    seconds = [
        collective_s("all_gather", 1e8, axis_links(Mesh((("tp", p),)), l40s)[0]) for p in (2, 4, 8)
    ]
    assert seconds[0] < seconds[1] / 4 < seconds[2] / 8
    # pairs at distance 4 share the whole bus with the pairs in between
    far, near = axis_links(Mesh((("dp", 2), ("x", 4))), l40s)
    pair = axis_links(Mesh((("tp", 2),)), l40s)[0]
    assert collective_s("all_gather", 1e8, far) > 3 * collective_s("all_gather", 1e8, pair)
    assert near.span == 4


def test_pairwise_links_grow_with_the_group() -> None:
    mi300x = load_cluster("mi300x")
    far, _ = axis_links(Mesh((("dp", 2), ("x", 4))), mi300x)
    pair = axis_links(Mesh((("tp", 2),)), mi300x)[0]
    assert collective_s("all_gather", 1e9, far) == collective_s("all_gather", 1e9, pair)
    eight = axis_links(Mesh((("tp", 8),)), mi300x)[0]
    assert collective_s("all_gather", 1e9, eight) < collective_s("all_gather", 1e9, pair)


@given(
    st.sampled_from(BUILT_IN),
    st.sampled_from([*COLLECTIVES]),
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.floats(0, 1e11),
    st.floats(1.0, 100.0),
)
def test_properties(name: str, kind: str, sizes: list[int], data: float, more: float) -> None:
    mesh = Mesh(tuple((f"a{i}", size) for i, size in enumerate(sizes)))
    cluster = load_cluster(name)
    for axis in axis_links(mesh, cluster):
        seconds = collective_s(kind, data, axis)
        assert 0 <= seconds < inf
        assert collective_s(kind, data * more, axis) * (1 + 1e-12) >= seconds
        if axis.size == 1 or data == 0:
            assert seconds == 0.0
        links = (axis.intra, axis.inter) if axis.nodes > 1 else (axis.intra,)
        fastest = max(
            max([link.bytes_per_s] + [rate for _, rate in link.group_bytes_per_s]) for link in links
        )
        if kind == "all_reduce" and axis.intra.switch_reduce_bytes_per_s:
            continue  # a switch moves less than the ring
        if kind != "all_to_all":  # which uses both kinds of links at once
            assert seconds >= wire_bytes(kind, data, axis.size) / fastest


def test_ranks_of_a_node_share_its_card() -> None:
    # two nodes of two ranks; a card of 100 bytes/s for each node, none of whose ranks gets more
    h100 = load_cluster("h100")
    inter = replace(
        h100.inter_node, bytes_per_s=100.0, efficiency=1.0, node_bytes_per_s=100.0, launch_s=0.0,
        hop_s=0.0,
    )  # fmt: skip
    cluster = replace(h100, gpus=4, gpus_per_node=2, inter_node=inter)
    (ring,) = axis_links(Mesh((("x", 4),)), cluster)
    across, _ = axis_links(Mesh((("x", 2), ("y", 2))), cluster)
    assert (ring.groups, across.groups) == (1, 2)
    for kind, axis, want in (
        ("send_recv", ring, 10.0),  # of a ring over both nodes one message comes in
        ("send_recv", across, 20.0),  # one for each rank
        ("all_to_all", ring, 10.0),  # half of both buffers
        ("all_reduce", ring, 10.0),  # what the other node adds up, and its half of the result
        ("all_reduce", across, 20.0),
        ("all_gather", ring, 5.0),
    ):
        assert collective_s(kind, 1000.0, axis) == pytest.approx(want, rel=1e-3), kind


def test_arrays() -> None:
    axis = _axis(1, 4)
    data = np.array([0.0, 1e6, 1e9])
    batch = collective_s("all_gather", data, axis)
    assert isinstance(batch, np.ndarray)
    np.testing.assert_allclose(batch, [collective_s("all_gather", float(b), axis) for b in data])
    np.testing.assert_array_equal(collective_s("all_gather", data, _axis(1, 1)), np.zeros(3))


def test_parts_make_the_whole() -> None:
    # reduce-scatter then all-gather moves what an all-reduce does
    parts = sum(collective_s(kind, 1e9, _axis(1, 4)) for kind in ("reduce_scatter", "all_gather"))
    assert parts == pytest.approx(collective_s("all_reduce", 1e9, _axis(1, 4)))


def test_inside_beats_across() -> None:
    h100 = load_cluster("h100")
    dp, tp = axis_links(Mesh((("dp", 8), ("tp", 8))), h100)
    for kind in COLLECTIVES:
        assert collective_s(kind, 1e8, tp) < collective_s(kind, 1e8, dp)


def test_unknown_collective() -> None:
    with pytest.raises(ValueError, match="unknown collective `broadcast`; expected one of all_ga"):
        collective_s("broadcast", 1.0, _axis(1, 2))
    with pytest.raises(ValueError, match="impossible group"):
        AxisLink(size=2, nodes=0, local=2, span=2, intra=_FAST, inter=_SLOW)

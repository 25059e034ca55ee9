"""A cluster file of what one machine, or several, measured of themselves.

What is measured is in `Found`: seconds of operators as a module runs them, and of collectives
between groups of ranks.  Laws of kernels are fitted on the former, the latter are written as they
are.  Every figure has its spread beside it: the distance of the quartiles of its rounds, as a share
of the lower one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np

from ..compute import Kind, attention_s, kernel_s, op_s
from ..machines.cluster import MEASURED, Cluster, Kernel, load_cluster
from .calibrate import fit

_ASSUMED = (
    "bytes_per_s = 125e6  # an assumption: 1 Gb/s Ethernet",
    "efficiency = 0.9  # an assumption: TCP/IP headers and gloo's copies",
    "launch_s = 1e-4  # an assumption",
    "hop_s = 1e-4  # an assumption: a switched local network's round trip",
)  # of links that were not there to be measured
_DROPPED = 0.01  # of a large message's time that is left at least where latency is taken off


class BusyError(ValueError):
    """The machine had too much else to do for its figures to mean anything."""


@dataclass(frozen=True, slots=True)
class Figure:
    """Seconds of one run, and how far the rounds are apart.

    Seconds are the lower quartile of all rounds: what else runs on the machine only ever adds time.
    """

    seconds: float
    spread: float

    @staticmethod
    def of(rounds: Sequence[float]) -> Figure:
        """The lower quartile, and the distance to the upper one as a share of it."""
        low, high = np.quantile(np.asarray(rounds), (0.25, 0.75))
        return Figure(float(low), float((high - low) / low))


@dataclass(frozen=True, slots=True)
class Streamed:
    """An operator that only streams numbers through: what it moves, in how many kernels."""

    bytes: float
    kernels: int


@dataclass(frozen=True, slots=True)
class Attended:
    """Causal attention of `batch` sequences, or of one query each over a cache."""

    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    backward: bool = False


@dataclass(frozen=True, slots=True)
class Found:
    """All that was measured; ranks are `per_node` on each machine.

    `products`: (m, n, k) in float32, each the three of a linear layer forward and backward;
    `rates`: one of matrices (n, n) of each dtype.  `streams`: by the kernel of the cluster file
    that they stand for.  `groups`: by (ranks, nodes) collectives by the bytes that they are called
    with.  `beside`: seconds of computing, of a collective, and of both at once.
    """

    ranks: int
    per_node: int
    memory_bytes: float
    machine: str
    when: str
    products: Mapping[tuple[int, int, int], Figure]
    rates: Mapping[str, tuple[int, Figure]]
    streams: Mapping[Kind, Mapping[Streamed, Figure]]
    attention: Mapping[Attended, Figure]
    groups: Mapping[tuple[int, int], Mapping[str, Mapping[int, Figure]]]
    beside: tuple[Figure, Figure, Figure] | None

    @property
    def spread(self) -> float:
        """That of computing, in the median of all figures: there shows what other work takes."""
        computed = (
            *self.products.values(),
            *(f for of in self.streams.values() for f in of.values()),
        )
        return median(figure.spread for figure in computed)


def check_calm(found: Found, most: float) -> None:
    """Raises BusyError where rounds are farther apart than `most`, as a share."""
    if found.spread > most:
        raise BusyError(
            f"this machine is too busy to be measured: half of the rounds are {found.spread:.0%} "
            f"apart or more, {most:.0%} is allowed; end what else runs here, or allow more with "
            "--spread"
        )


# --- laws ----------------------------------------------------------------------------------------


def fitted(found: Found, name: str) -> Cluster:
    """The cluster that was measured, its laws fitted on all figures."""
    flops = tuple((dtype, 2 * n**3 / f.seconds) for dtype, (n, f) in found.rates.items())
    best = max(3 * 2 * m * n * k / f.seconds for (m, n, k), f in found.products.items())
    flops = tuple((dtype, max(rate, best) if dtype == "fp32" else rate) for dtype, rate in flops)
    light = found.streams["memory"]
    bandwidth = max(each.bytes / f.seconds for each, f in light.items())
    cpu = load_cluster("cpu")
    made = replace(
        cpu, name=name, device=f"CPU rank, one thread, {found.machine}", gpus=found.ranks,
        gpus_per_node=found.per_node, memory_bytes=0.85 * found.memory_bytes / found.per_node,
        bandwidth_bytes_per_s=bandwidth, flops=flops,
    )  # fmt: skip
    made = replace(made, matmul=_products(found, made), **{
        kind: _stream(figures, made) for kind, figures in found.streams.items()
    })  # fmt: skip
    return replace(
        made,
        attention=_attention(found, made, "attention"),
        attention_backward=_attention(found, made, "attention_backward"),
        decode=_attention(found, made, "decode"),
        contention=contention(found),
    )


def contention(found: Found) -> float:
    """How many seconds computing takes longer for each second of a collective beside it."""
    if found.beside is None:
        return 1.0
    computing, moving, both = (figure.seconds for figure in found.beside)
    return min(max((both - computing) / moving, 0.0), 1.0)


def _products(found: Found, machine: Cluster) -> Kernel:
    m, n, k = np.array(list(found.products), dtype=float).T
    flops, moved = 2 * m * n * k, 4 * (m * k + k * n + m * n)
    seconds = np.array([figure.seconds for figure in found.products.values()])
    peak, bandwidth = machine.peak("fp32"), machine.bandwidth_bytes_per_s
    return _law(
        seconds, lambda kernel: 3 * kernel_s(flops, moved, peak, bandwidth, kernel), "efficiency"
    )


def _stream(figures: Mapping[Streamed, Figure], machine: Cluster) -> Kernel:
    moved = np.array([each.bytes for each in figures])
    kernels = np.array([float(each.kernels) for each in figures])
    seconds = np.array([figure.seconds for figure in figures.values()])
    return _law(
        seconds,
        lambda kernel: kernels * np.asarray(
            op_s(0.0, moved / kernels, "fp32", replace(machine, memory=kernel), "memory")
        ),
        "bandwidth_efficiency",
    )  # fmt: skip


def _attention(found: Found, machine: Cluster, name: str) -> Kernel:
    chosen = {each: f for each, f in found.attention.items() if _law_of(each) == name}
    seconds = np.array([figure.seconds for figure in chosen.values()])

    def predicted(kernel: Kernel) -> np.ndarray:
        on = replace(machine, **{name: kernel})
        return np.array([_attended_s(each, on) for each in chosen])

    return _law(seconds, predicted, "bandwidth_efficiency" if name == "decode" else "efficiency")


def _law_of(each: Attended) -> str:
    if each.queries == 1:
        return "decode"
    return "attention_backward" if each.backward else "attention"


def _attended_s(each: Attended, machine: Cluster) -> float:
    one = attention_s(
        each.batch, each.heads, each.heads, each.queries, each.keys, each.dim, "fp32", machine,
        0.5 if each.queries == each.keys else 1.0, backward=each.backward,
    )  # fmt: skip
    return float(one) * (2.5 if each.backward else 1.0)  # five products where forward has two


def _law(seconds: np.ndarray, predicted: Callable[[Kernel], np.ndarray], share: str) -> Kernel:
    """The kernel whose floor and `share` of the datasheet's figure predict best."""
    start = Kernel(
        floor_s=float(seconds.min()) / 4, efficiency=1.0, bandwidth_efficiency=1.0, overlap=1.0
    )
    start = replace(start, **{share: 0.5})
    return fit(
        start, ("floor_s", share),
        lambda kernel: float(np.mean(np.abs(np.log(predicted(kernel) / seconds)))),
    )  # fmt: skip


# --- text ----------------------------------------------------------------------------------------


_KINDS = ("matmul", "attention", "attention_backward", "decode", "memory", "mixed", "optimizer")


def cluster_text(found: Found, name: str = "here") -> str:
    """The cluster file of what was found, every figure with its source and its spread."""
    made, source = fitted(found, name), f"measured {found.when}"
    lines = [*_head(found, made, source), "", "[flops]"]
    spreads = {dtype: figure.spread for dtype, (_, figure) in found.rates.items()}
    lines += [f"{d} = {rate:.3g}  # {source}, spread {spreads[d]:.0%}" for d, rate in made.flops]
    for kind in _KINDS:
        fit_on = f"fitted on {_count(found, kind)} figures, {source}, spread {found.spread:.0%}"
        lines += _kernel_lines(kind, getattr(made, kind), fit_on)
    lines += _link_lines(found, "intra_node", source) + _link_lines(found, "inter_node", source)
    for (ranks, nodes), kinds in found.groups.items():
        lines += _group_lines(ranks, nodes, kinds, source)
    return "\n".join(lines) + "\n"


def _head(found: Found, made: Cluster, source: str) -> list[str]:
    ranks, per_node = found.ranks, found.per_node
    light = f"the most that light operators reach, {source}, spread {found.spread:.0%}"
    return [
        f"{MEASURED}{found.when} by `plan calibrate` on {found.machine}:",
        f"# {ranks} ranks of one thread, {per_node} on each machine, all at work at once.",
        "# Spread: the distance of the quartiles of all rounds, as a share of the lower one.",
        f'device = "{made.device}"',
        f"gpus_per_node = {per_node}  # ranks on each machine",
        f"memory_bytes = {made.memory_bytes:.3g}  # 85 % of RAM, shared by {per_node} ranks",
        f"bandwidth_bytes_per_s = {made.bandwidth_bytes_per_s:.3g}  # {light}",
        "processors = 1  # one thread",
        "small_head_cost = 1.0  # products and exponentials run on the same units",
        "decode_pass_s = 0.0  # one processor: passes do not exist",
        f"contention = {made.contention:.3g}  # products beside an all-gather, {source}",
        "compiled = false  # layers are compiled on CUDA; elsewhere only if asked",
        'steps = "launched"  # there is no capture',
        "host_light_s = 0  # what a kernel takes at least is measured, the host's part in it",
        "host_product_s = 0  # as above",
        "fused_norms = false  # torch 2.13 writes rms_norm out on the CPU",
    ]


def _count(found: Found, kind: str) -> int:
    if kind == "matmul":
        return len(found.products)
    streams: Mapping[str, Mapping[Streamed, Figure]] = dict(found.streams.items())
    if kind in streams:
        return len(streams[kind])
    return sum(_law_of(each) == kind for each in found.attention)


def _kernel_lines(kind: str, kernel: Kernel, source: str) -> list[str]:
    return [
        "",
        f"[kernels.{kind}]  # {source}",
        f"floor_s = {kernel.floor_s:.3g}",
        f"efficiency = {kernel.efficiency:.3g}",
        f"bandwidth_efficiency = {kernel.bandwidth_efficiency:.3g}",
        "overlap = 1.0  # one thread computes and loads in turn",
    ]


def _link_lines(found: Found, section: str, source: str) -> list[str]:
    """A link's own figures, by messages of its smallest groups: for groups that were not measured.

    A message takes launch_s + hop_s, taken as equal parts, and its bytes at the link's rate.
    """
    across = section == "inter_node"
    groups = [(ranks, kinds) for (ranks, n), kinds in found.groups.items() if (n > 1) == across]
    if not groups:
        return ["", f"[{section}]", *_ASSUMED]
    _, kinds = min(groups, key=lambda group: group[0])
    latency, rate, spread = latency_and_rate(kinds["send_recv"])
    said = f"messages between neighbours, {source}, spread {spread:.0%}"
    return [
        "",
        f"[{section}]",
        f"bytes_per_s = {rate:.3g}  # {said}",
        "efficiency = 1.0  # the rate is a measured one",
        f"launch_s = {latency / 2:.3g}  # half of the latency of {said}",
        f"hop_s = {latency / 2:.3g}  # the other half",
    ]


def latency_and_rate(row: Mapping[int, Figure]) -> tuple[float, float, float]:
    """Seconds of the smallest message, bytes/s between the smallest and the largest, the largest
    spread."""
    small, large = min(row), max(row)
    least = row[small].seconds
    more = max(row[large].seconds - least, _DROPPED * row[large].seconds)
    return least, (large - small) / more, max(figure.spread for figure in row.values())


def _group_lines(
    ranks: int, nodes: int, kinds: Mapping[str, Mapping[int, Figure]], source: str
) -> list[str]:
    where = "on one machine" if nodes == 1 else f"on {nodes} machines"
    lines = ["", f"[[measured]]  # {ranks} ranks {where}, bytes = seconds, {source}"]
    lines += [f"ranks = {ranks}", f"nodes = {nodes}"]
    for kind, row in kinds.items():
        latency, rate, spread = latency_and_rate(row)
        largest_first = [row[size].seconds for size in sorted(row, reverse=True)]
        seconds = np.minimum.accumulate(largest_first)[::-1]  # what disturbs takes longer
        pairs = (f"{b} = {s:.3g}" for b, s in zip(sorted(row), seconds, strict=True))
        said = f"{latency * 1e6:.0f} us, {rate / 1e6:.3g} MB/s, spread {spread:.0%}"
        lines.append(f"{kind} = {{ {', '.join(pairs)} }}  # {said}")
    return lines


__all__ = ["Attended", "BusyError", "Figure", "Found", "Streamed", "check_calm", "cluster_text",
           "contention", "fitted", "latency_and_rate"]  # fmt: skip

"""The machine a plan is priced on: what one GPU does, and what connects it to the others.

A cluster is one TOML file, known by its name.  The built-in ones are those in `clusters/`, each
figure with its source in a comment beside it; a user's own file has the same fields.  It may start
from a built-in one with `base` and change only what differs:

    base = "h100"                      # every figure that is not given here
    device = "H100 with 200 Gb/s Ethernet"
    memory_bytes = 70e9                # leave room for another process

    [inter_node]
    bytes_per_s = 25e9                 # 200 Gb/s, one NIC per GPU

Unknown fields are refused, so that a typing error never becomes a silent default.
All units are SI: bytes, seconds, FLOP/s, bytes/s.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from importlib import resources
from math import inf, isfinite
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ...facts.collectives import COLLECTIVES
from ...facts.files import DataError, read_toml

_FOLDER = resources.files(__name__.rpartition(".")[0]) / "clusters"
BUILT_IN = tuple(
    sorted(file.name.removesuffix(".toml") for file in _FOLDER.iterdir() if ".toml" in file.name)
)

MEASURED = "# Measured "
"""How the file of a cluster begins that `plan calibrate` has measured."""

_DTYPES = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "half": "fp16",
    "float32": "fp32",
    "float": "fp32",
    "float64": "fp64",
    "double": "fp64",
    "float8_e4m3fn": "fp8",
    "float8_e5m2": "fp8",
}


class ClusterError(ValueError):
    """A cluster that is unknown, or whose file cannot be used; the message says what would do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """How near one kind of kernel comes to the datasheet.

    seconds = floor_s + (compute ** overlap + traffic ** overlap) ** (1 / overlap) with
    compute = flops / (efficiency * peak), traffic = bytes / (bandwidth_efficiency * bandwidth).
    overlap = 1 adds the two (nothing overlaps); a large one takes the larger (all overlaps).
    """

    floor_s: float
    efficiency: float
    bandwidth_efficiency: float
    overlap: float

    def floored(self, least_s: float) -> Kernel:
        """The same, of so many seconds at least."""
        return replace(self, floor_s=max(self.floor_s, least_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiles:
    """Matrix multiplication as tiles handed to processors in waves (see `compute.matmul_s`)."""

    floor_s: float
    efficiency: float
    bandwidth_efficiency: float
    overlap: float
    wave_s: float
    split_s: float
    throttle: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """What one GPU can receive from its neighbours in one direction (see `collective`).

    `group_bytes_per_s` holds (GPUs taking part, bytes/s) pairs where the rate depends on their
    number: PCIe without peer-to-peer falls with every GPU that joins; with one link for each pair
    of GPUs it grows with the group.  Empty where every GPU reaches the full rate in any group.
    `node_bytes_per_s` is what all GPUs of a node receive from other nodes together, where they
    share network cards; infinite where each has its own.
    """

    bytes_per_s: float
    efficiency: float
    launch_s: float
    hop_s: float
    ramp_s_per_sqrt_byte: float = 0.0
    exchange_s: float = 0.0
    copy_bytes_per_s: float = inf
    switch_reduce_bytes_per_s: float = 0.0
    node_bytes_per_s: float = inf
    group_bytes_per_s: tuple[tuple[int, float], ...] = ()

    def times(self, factor: float) -> Link:
        """The same, all of its rates but that of copies so many times as high."""
        return replace(
            self,
            bytes_per_s=factor * self.bytes_per_s,
            ramp_s_per_sqrt_byte=self.ramp_s_per_sqrt_byte / factor,
            switch_reduce_bytes_per_s=factor * self.switch_reduce_bytes_per_s,
            node_bytes_per_s=factor * self.node_bytes_per_s,
            group_bytes_per_s=tuple((n, factor * rate) for n, rate in self.group_bytes_per_s),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What collectives took between `ranks` ranks on `nodes` nodes, while all others did the same.

    `seconds` has for each collective (bytes of its tensor, seconds) pairs, in the order of bytes.
    """

    ranks: int
    nodes: int
    seconds: tuple[tuple[str, tuple[tuple[float, float], ...]], ...]

    def times(self, factor: float) -> Measured:
        """The same over links so many times as fast; what the smallest message takes stays."""
        return replace(
            self,
            seconds=tuple(
                (kind, tuple((size, row[0][1] + (s - row[0][1]) / factor) for size, s in row))
                for kind, row in self.seconds
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """`gpus` equal devices, `gpus_per_node` in a node; every figure is per GPU.

    `memory_bytes` is what a plan may fill: capacity less what driver, context and communication
    buffers take.  `flops` pairs a dtype (`bf16`, `fp16`, `fp32`, `fp64`, `fp8`) with dense FLOP/s.
    Without `tiles`, `compute.matmul_s` is the plain roofline of the `matmul` kernel.
    `price_per_gpu_hour` is in any currency; 0: not known.  `clock` is the share of that clock at
    which efficiencies were fitted that a lower power limit leaves.  `contention` is how many
    seconds a kernel takes longer for each second of a collective beside it; 1: nothing is won by
    running them side by side.  `compiled`: are layers compiled unless asked otherwise (as on CUDA),
    or does each operator run its own kernels?  `fused_norms`: has torch a kernel for every norm
    there, which keeps nothing but its operand for backward?  `measured`: what collectives took
    between groups of ranks on this very machine, which is their price there.

    `steps` says how a step of one token runs.  `captured`: as a CUDA graph, in which a light kernel
    takes `captured_s` at least.  `compiled`: so, and by a compiler, which writes chains of light
    operators as one kernel and reads a weight for one row as fast as memory gives it.  `launched`:
    the host launches each kernel, a light one in `host_light_s`, a product in `host_product_s`.
    """

    name: str
    device: str
    gpus: int
    gpus_per_node: int
    memory_bytes: float
    bandwidth_bytes_per_s: float
    processors: int
    small_head_cost: float
    decode_pass_s: float
    flops: tuple[tuple[str, float], ...]
    matmul: Kernel
    attention: Kernel
    decode: Kernel
    memory: Kernel
    tiles: Tiles | None
    intra_node: Link
    inter_node: Link
    attention_backward: Kernel
    mixed: Kernel
    optimizer: Kernel
    measured: tuple[Measured, ...] = ()
    price_per_gpu_hour: float = 0.0
    clock: float = 1.0
    contention: float = 1.0
    compiled: bool = True
    fused_norms: bool = True
    steps: str = "captured"
    captured_s: float = 1.0e-6  # measured on an H100, torch 2.11: tiny kernels in a CUDA graph
    host_light_s: float = 10e-6  # as measured there: pointwise operators one after another
    host_product_s: float = 31e-6  # as measured there: linear layers, Python included
    streams_rows: bool = False

    def in_steps(self) -> Cluster:
        """The same as steps of one token find it; see `steps`."""
        if self.steps == "launched":
            light, product = self.host_light_s, self.host_product_s
            tiles = self.tiles
            return replace(
                self,
                compiled=False,
                memory=self.memory.floored(light),
                mixed=self.mixed.floored(light),
                decode=self.decode.floored(light),
                matmul=self.matmul.floored(product),
                tiles=tiles and replace(tiles, floor_s=max(tiles.floor_s, product)),
            )
        compiled = self.steps == "compiled"
        return replace(
            self,
            compiled=compiled,
            streams_rows=compiled,
            memory=replace(self.memory, floor_s=self.captured_s),
            mixed=replace(self.mixed, floor_s=self.captured_s),
        )

    def changed(
        self, *, links: float = 1.0, between_nodes: float = 1.0, gpu: float = 1.0
    ) -> Cluster:
        """The same with all links, those between nodes, and GPUs (FLOP/s and memory bandwidth) so
        many times as fast; what each launch and each hop takes stays."""
        return replace(
            self,
            bandwidth_bytes_per_s=gpu * self.bandwidth_bytes_per_s,
            flops=tuple((name, gpu * rate) for name, rate in self.flops),
            intra_node=self.intra_node.times(links),
            inter_node=self.inter_node.times(links * between_nodes),
            measured=tuple(
                each.times(links * (between_nodes if each.nodes > 1 else 1.0))
                for each in self.measured
            ),
        )

    def between(self, ranks: int, nodes: int) -> Measured | None:
        """What was measured between so many ranks on so many nodes."""
        found = (m for m in self.measured if (m.ranks, m.nodes) == (ranks, nodes))
        return next(found, None)

    def peak(self, dtype: str) -> float:
        """Dense FLOP/s of one GPU for `bf16`, `bfloat16`, `torch.bfloat16`, ...

        Raises `ClusterError` for a dtype this device has no rate for.
        """
        short = short_dtype(dtype)
        for name, rate in self.flops:
            if name == short:
                return rate
        known = ", ".join(name for name, _ in self.flops)
        raise ClusterError(
            f"{self.name} ({self.device}) has no FLOP/s for dtype `{dtype}`; it has {known}. "
            "Choose one of these, or add the rate under [flops] in a cluster file."
        )

    def __str__(self) -> str:
        return f"{self.gpus} x {self.name}"


def short_dtype(dtype: str) -> str:
    """`bf16` for `bf16`, `bfloat16` and `torch.bfloat16`; unknown names come back as they are."""
    name = dtype.removeprefix("torch.")
    return _DTYPES.get(name, name)


class _Rule(NamedTuple):
    meaning: str  # what an error says was expected
    low: float = 0.0
    high: float = inf
    strict: bool = True  # must exceed `low`, not only reach it
    whole: bool = False


_SECONDS = _Rule("seconds, 0 or more", strict=False)
_TIME = _Rule("seconds above 0")
_COUNT = _Rule("a whole number, at least 1", low=1, strict=False, whole=True)
_SHARE = _Rule("a share of the datasheet's figure, above 0 and at most 1", high=1.0)
_RATE = _Rule("bytes/s above 0")
_CONTENTION = _Rule(
    "a share, from 0 (collectives cost nothing beside kernels) to 1", 0.0, 1.0, False
)
_OVERLAP = _Rule("1 (compute and traffic add up) or more", low=1.0, strict=False)

_KERNEL_RULES = {
    "floor_s": _SECONDS,
    "efficiency": _SHARE,
    "bandwidth_efficiency": _SHARE,
    "overlap": _OVERLAP,
}
_TILE_RULES = _KERNEL_RULES | {
    "wave_s": _SECONDS,
    "split_s": _SECONDS,
    "throttle": _Rule("0 or more", strict=False),
}
_LINK_RULES = {
    "bytes_per_s": _Rule("bytes/s per GPU and direction, above 0"),
    "efficiency": _SHARE,
    "launch_s": _SECONDS,
    "hop_s": _SECONDS,
    "ramp_s_per_sqrt_byte": _Rule("seconds per square root of a byte, 0 or more", strict=False),
    "exchange_s": _SECONDS,
    "copy_bytes_per_s": _RATE,
    "switch_reduce_bytes_per_s": _Rule("bytes/s, or 0 for no such switch", strict=False),
    "node_bytes_per_s": _RATE,
}
_TOP_RULES = {
    "gpus_per_node": _COUNT,
    "memory_bytes": _Rule("bytes above 0"),
    "bandwidth_bytes_per_s": _RATE,
    "processors": _COUNT,
    "small_head_cost": _Rule("a factor, at least 1", low=1.0, strict=False),
    "decode_pass_s": _SECONDS,
}
_PRICE = "price_per_gpu_hour"  # which a file may leave out
_OPTIONAL = {
    _PRICE: _Rule("a price above 0"),
    "clock": _SHARE,
    "contention": _CONTENTION,
    "captured_s": _SECONDS,
    "host_light_s": _SECONDS,
    "host_product_s": _SECONDS,
}
_STEPS = ("captured", "compiled", "launched")
_FLAGS = ("compiled", "fused_norms")
_TEXT = ("base", "device")
_TABLES = ("flops", "kernels", "tiles", "intra_node", "inter_node")
_KERNELS = ("matmul", "attention", "decode", "memory")
# which a file may leave out: the kernel of which they are a variant
_VARIANTS = {"attention_backward": "attention", "mixed": "memory", "optimizer": "mixed"}
_FLOPS = ("bf16", "fp16", "fp32", "fp64", "fp8")
_MEASURED = "measured"  # an array of tables, which a file may leave out

_Part = TypeVar("_Part", Kernel, Tiles, Link)


def load_cluster(name_or_path: str | PathLike[str], gpus: int | None = None) -> Cluster:
    """The built-in cluster of that name, or the one a TOML file describes.

    `gpus` is how many GPUs there are in all, one node's by default.  Anything that ends in
    `.toml` or contains a folder separator is taken as a file.  Raises `ClusterError`.

    >>> load_cluster("h100", gpus=64).intra_node.bytes_per_s
    450000000000.0
    """
    text = str(name_or_path)
    is_file = text.endswith(".toml") or "/" in text or "\\" in text
    name = Path(text).stem if is_file else text
    if is_file:
        where, table = text, _read_file(Path(text))
    else:
        where, table = f"{name}.toml", _built_in(name)
    cluster = _build(name, _inherit(table, where), where)
    if gpus is None:
        return cluster
    if gpus < 1:
        raise ClusterError(f"gpus={gpus}: a cluster has at least one GPU")
    return replace(cluster, gpus=gpus)


def shown_name(name_or_path: str) -> str:
    """What reports call a cluster: a built-in one by its name, one of a file by its `device`, and
    by the file's name if the file is not there any more, or no cluster's.

    >>> shown_name("h100"), shown_name("gone/mine.toml")
    ('h100', 'mine')
    """
    if name_or_path in BUILT_IN:
        return name_or_path
    try:
        return load_cluster(name_or_path).device
    except ClusterError:
        return Path(name_or_path).stem


def built_in_text(name: str) -> str:
    """The TOML text, comments with the sources included, of a built-in cluster."""
    if name not in BUILT_IN:
        raise ClusterError(_unknown(name))
    return (_FOLDER / f"{name}.toml").read_text("utf-8")


def _unknown(name: str) -> str:
    near = difflib.get_close_matches(name.lower(), BUILT_IN, n=1, cutoff=0.5)
    hint = f"; did you mean `{near[0]}`?" if near else "."
    return (
        f"unknown cluster `{name}`{hint} Built in: {', '.join(BUILT_IN)}. "
        "Or give a path that ends in .toml."
    )


def _read_file(path: Path) -> dict[str, Any]:
    try:
        table = read_toml(path)
    except DataError as error:
        raise ClusterError(f"cluster file: {error}") from error
    _check_lines(table, str(path))
    return table


def _check_lines(item: object, where: str) -> None:
    """Raises ClusterError for a text or the name of a field that is not one line that prints."""
    if isinstance(item, str) and not item.isprintable():
        raise ClusterError(f"{where}: expected one line of text, got {item[:40]!r}")
    if isinstance(item, dict):
        for key, value in item.items():
            _check_lines(key, where)
            _check_lines(value, where)


def _built_in(name: str) -> dict[str, Any]:
    return tomllib.loads(built_in_text(name))


def _inherit(table: dict[str, Any], where: str) -> dict[str, Any]:
    """`table` over the tables of its `base`, field by field."""
    known = (*_TEXT, *_TOP_RULES, *_OPTIONAL, *_FLAGS, "steps", *_TABLES, _MEASURED)
    _refuse_unknown(table, known, where, "")
    base = table.get("base")
    if base is None:
        return table
    if not isinstance(base, str) or base not in BUILT_IN:
        raise ClusterError(f"{where}: base: {_unknown(str(base))}")
    under = _inherit(_built_in(base), f"{base}.toml")
    merged = _merge(under, table)
    for link in ("intra_node", "inter_node"):
        if isinstance(under.get(link), dict) and isinstance(table.get(link), dict):
            merged[link] |= _following(under[link], table[link])
    return merged


def _following(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """What changes with a link's speed where the file over another says that speed alone."""
    now, before = over.get("bytes_per_s"), under.get("bytes_per_s")
    if not isinstance(now, int | float) or isinstance(now, bool) or not before:
        return {}
    follow: dict[str, Any] = {}
    reduced, groups = under.get("switch_reduce_bytes_per_s"), under.get("group_bytes_per_s")
    if reduced and "switch_reduce_bytes_per_s" not in over:
        follow["switch_reduce_bytes_per_s"] = reduced * now / before
    if groups and "group_bytes_per_s" not in over:
        follow["group_bytes_per_s"] = {k: rate * now / before for k, rate in groups.items()}
    return follow


def _merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(below, dict) and isinstance(value, dict) and key != "group_bytes_per_s":
            merged[key] = _merge(below, value)
        else:
            merged[key] = value
    return merged


def _build(name: str, table: dict[str, Any], where: str) -> Cluster:
    kernels = _table(table, "kernels", where)
    _refuse_unknown(kernels, (*_KERNELS, *_VARIANTS), where, "kernels")
    parts: dict[str, Kernel] = {}
    for kind in (*_KERNELS, *_VARIANTS):
        if kind in _VARIANTS and kind not in kernels:
            parts[kind] = parts[_VARIANTS[kind]]
            continue
        body = _table(kernels, kind, where, "kernels")
        parts[kind] = _part(Kernel, _KERNEL_RULES, body, where, f"kernels.{kind}")
    tiles = None
    if "tiles" in table:
        tiles = _part(Tiles, _TILE_RULES, _table(table, "tiles", where), where, "tiles")
    top = {key: _number(table, key, rule, where, "") for key, rule in _TOP_RULES.items()}
    given = {k: _number(table, k, rule, where, "") for k, rule in _OPTIONAL.items() if k in table}
    flags = {key: table[key] for key in _FLAGS if key in table}
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise ClusterError(f"{where}: {key}: expected true or false, got {value!r}")
    steps = table.get("steps", _STEPS[0])
    if steps not in _STEPS:
        raise ClusterError(f"{where}: steps: expected {', '.join(_STEPS)}, got {steps!r}")
    device = table.get("device")
    if not isinstance(device, str):
        raise ClusterError(f"{where}: device: expected the device's name in quotes, got {device!r}")
    return Cluster(
        name=name,
        device=device,
        gpus=int(top["gpus_per_node"]),
        gpus_per_node=int(top["gpus_per_node"]),
        memory_bytes=top["memory_bytes"],
        bandwidth_bytes_per_s=top["bandwidth_bytes_per_s"],
        processors=int(top["processors"]),
        small_head_cost=top["small_head_cost"],
        decode_pass_s=top["decode_pass_s"],
        flops=_flops(_table(table, "flops", where), where),
        tiles=tiles,
        intra_node=_link(table, "intra_node", where),
        inter_node=_link(table, "inter_node", where),
        matmul=parts["matmul"],
        attention=parts["attention"],
        decode=parts["decode"],
        memory=parts["memory"],
        attention_backward=parts["attention_backward"],
        mixed=parts["mixed"],
        optimizer=parts["optimizer"],
        measured=_measured(table.get(_MEASURED, []), where),
        steps=steps,
        **given,
        **flags,
    )


def _flops(table: dict[str, Any], where: str) -> tuple[tuple[str, float], ...]:
    _refuse_unknown(table, _FLOPS, where, "flops")
    if not table:
        raise ClusterError(f"{where}: [flops]: expected at least one of {', '.join(_FLOPS)}")
    rule = _Rule("dense FLOP/s above 0")
    return tuple((key, _number(table, key, rule, where, "flops")) for key in _FLOPS if key in table)


def _link(table: dict[str, Any], key: str, where: str) -> Link:
    body = dict(_table(table, key, where))
    groups = body.pop("group_bytes_per_s", None)
    link = _part(Link, _LINK_RULES, body, where, key)
    if link.switch_reduce_bytes_per_s > link.bytes_per_s:
        raise ClusterError(
            f"{where}: [{key}] switch_reduce_bytes_per_s: {link.switch_reduce_bytes_per_s:g} is "
            f"more than bytes_per_s, {link.bytes_per_s:g}, over which comes all that a switch adds"
        )
    if groups is None:
        return link
    section = f"{key}.group_bytes_per_s"
    if not isinstance(groups, dict) or not groups or not all(k.isdigit() for k in groups):
        raise ClusterError(
            f"{where}: [{section}]: expected a table of GPUs taking part = bytes/s, "
            f"such as 2 = 20e9, got {groups!r}"
        )
    pairs = sorted((int(k), _number(groups, k, _RATE, where, section)) for k in groups)
    return replace(link, group_bytes_per_s=tuple(pairs))


def _measured(rows: object, where: str) -> tuple[Measured, ...]:
    """The tables `[[measured]]`: numbers of ranks and nodes, and for each collective a table of
    bytes = seconds."""
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise ClusterError(f"{where}: [[{_MEASURED}]]: expected tables, got {rows!r}")
    found: dict[tuple[int, int], Measured] = {}
    for row in rows:
        body: dict[str, Any] = dict(row)
        _refuse_unknown(body, ("ranks", "nodes", *COLLECTIVES), where, _MEASURED)
        ranks, nodes = (
            int(_number(body, key, _COUNT, where, _MEASURED)) for key in ("ranks", "nodes")
        )
        kinds = [kind for kind in COLLECTIVES if kind in body]
        rows_of = ((kind, _seconds_of(body[kind], where, f"{_MEASURED}.{kind}")) for kind in kinds)
        if (ranks, nodes) in found:
            raise ClusterError(
                f"{where}: [[{_MEASURED}]]: {ranks} ranks on {nodes} nodes stand twice"
            )
        found[ranks, nodes] = Measured(ranks=ranks, nodes=nodes, seconds=tuple(rows_of))
    return tuple(found.values())


def _seconds_of(table: object, where: str, section: str) -> tuple[tuple[float, float], ...]:
    if not isinstance(table, dict) or len(table) < 2 or not all(k.isdigit() for k in table):
        raise ClusterError(
            f"{where}: [{section}]: expected two sizes in bytes or more = seconds, such as "
            f"1024 = 1e-4, got {table!r}"
        )
    pairs = sorted((float(size), _number(table, size, _TIME, where, section)) for size in table)
    if any(b < a for (_, a), (_, b) in zip(pairs, pairs[1:], strict=False)):
        raise ClusterError(f"{where}: [{section}]: more bytes take fewer seconds")
    return tuple(pairs)


def _part(
    kind: type[_Part], rules: Mapping[str, _Rule], table: dict[str, Any], where: str, section: str
) -> _Part:
    _refuse_unknown(table, tuple(rules), where, section)
    optional = {field.name for field in fields(kind) if field.default is not MISSING}
    values: dict[str, Any] = {
        key: _number(table, key, rule, where, section)
        for key, rule in rules.items()
        if key in table or key not in optional
    }
    return kind(**values)


def _table(table: dict[str, Any], key: str, where: str, parent: str = "") -> dict[str, Any]:
    section = f"{parent}.{key}" if parent else key
    value = table.get(key)
    if not isinstance(value, dict):
        got = "nothing" if value is None else repr(value)
        raise ClusterError(
            f"{where}: expected a table [{section}], got {got}; "
            'add it, or start from a built-in cluster with base = "h100"'
        )
    return value


def _number(table: dict[str, Any], key: str, rule: _Rule, where: str, section: str) -> float:
    place = f"{where}: {f'[{section}] ' if section else ''}{key}"
    if key not in table:
        raise ClusterError(
            f"{place}: missing; expected {rule.meaning}. Give it, or start from a built-in cluster "
            'with base = "h100".'
        )
    value = table[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ClusterError(f"{place}: expected {rule.meaning}, got {value!r}")
    number = float(value)
    low_ok = number > rule.low if rule.strict else number >= rule.low
    whole = not rule.whole or number.is_integer()
    if not isfinite(number) or not low_ok or number > rule.high or not whole:
        raise ClusterError(f"{place}: expected {rule.meaning}, got {value!r}")
    return number


def _refuse_unknown(
    table: Mapping[str, Any], known: tuple[str, ...], where: str, section: str
) -> None:
    for key in table:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean `{near[0]}`? " if near else ""
            place = f"[{section}] " if section else ""
            raise ClusterError(
                f"{where}: {place}{key}: no such field; {hint}Known here: {', '.join(known)}."
            )

"""Ordinary plans as restrictions: DDP, FSDP, Megatron TP+SP, and what else layouts are made of.

A baseline gives every mesh axis a role and lets the solver find the cheapest plan within it, so
that it is priced by the same model as the winner, and can never beat it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

from ...facts.mesh import Mesh
from ...facts.spec import R, S, Spec, State, is_shard
from ...ir.graph import Graph, Node, Param
from ...ir.ops.labels import factors_of_nodes
from ...ir.ops.registry import operator_of, rule_of, words_of
from ...ir.ops.rule import Choice
from ..errors import LayoutError
from .params import all_params
from .pins import module_of
from .regions import Region, Strategy, scopes
from .setting import Restriction
from .sides import sides_of
from .storage import Storage


@dataclass(frozen=True, slots=True)
class Role:
    """What one mesh axis does.

    `cuts`: the `batch`, the `sequence`, the sequence with attention by `heads` in between
    (Ulysses), or the `weights` (Megatron's tensor parallelism).  `shards`: a data axis over which
    weights are sharded, and gathered for use.  `between`: a tensor axis that cuts the sequence
    between the blocks.  `spread`: its ranks have different experts, and send them their tokens.
    `zero`: sharded weights are gathered once a step, and gradients reduced once a step (1) or in
    each backward (2).
    """

    cuts: str
    shards: bool = False
    between: bool = False
    spread: bool = False
    zero: int = 0

    @staticmethod
    def parse(text: str) -> Role:
        """`ddp`, `fsdp`, `tp`, `tp+sp`, `cp`, `ulysses`; `fsdp+cp`: a sequence axis that shards
        weights, too; `+ep`: with experts spread over the axis; `zero1`, `zero2`."""
        words = text.split("+")
        (cuts,) = {_CUTS[word] for word in words if word in _CUTS} or {"batch"}
        zero = max(_ZERO.get(word, 0) for word in words)
        return Role(cuts, "fsdp" in words or zero > 0, "sp" in words, "ep" in words, zero)

    @property
    def name(self) -> str:
        """What reports call it, but for experts: `TP+SP`."""
        if self.cuts == "weights":
            return "TP+SP" if self.between else "TP"
        plain = {"batch": "", "sequence": "CP", "heads": "Ulysses"}[self.cuts]
        shards = f"ZeRO-{self.zero}" if self.zero else "FSDP"
        words = [shards] if self.shards else [] if plain else ["DDP"]
        return "+".join(filter(None, (*words, plain)))

    @property
    def label(self) -> str:
        """The label of the data's dim that it cuts wherever an op has one; "" if it cuts none."""
        return {"batch": "b", "weights": ""}.get(self.cuts, "s")


_CUTS = {"tp": "weights", "cp": "sequence", "ulysses": "heads"}
_ZERO = {"zero1": 1, "zero2": 2}


class Roles(Restriction):
    """One role per mesh axis, as `Role.parse` reads it.

    A data axis cuts the batch (or the sequence) wherever an op has one.  A tensor axis cuts the
    inner dims of products and attention (`sides.py`): columns of q, k, v, gate and up, rows of
    o and down, the vocabulary; weights lie as they are used and are never gathered; between the
    blocks values are whole, or cut by sequence.  What cannot be so is refused, and says why.
    """

    def __init__(self, roles: Sequence[str], graph: Graph, mesh: Mesh, asked: str = "") -> None:
        """`asked`: what errors begin with."""
        self._asked = asked
        self.roles = tuple(map(Role.parse, roles))
        self._of_experts = {value.name for node in _experts(graph) for value in node.operands}
        self.mesh = mesh
        self.sides = sides_of(graph)
        self._labels = factors_of_nodes(graph)
        self._all_cuts: dict[int, list[list[set[str]]]] = {}
        self._allowed: dict[int, tuple[Strategy, bool]] = {}  # by identity of the strategy
        self._kinds: dict[tuple[str, Choice], str] = {}
        self._stored: dict[str, frozenset[Spec]] = {}
        self._check_data(graph)
        if any(role.spread for role in self.roles) and not self._of_experts:
            raise LayoutError(f"{asked}there are no experts to spread over `ep`")

    def _check_data(self, graph: Graph) -> None:
        """Raises PlanError where axes do not divide the batch or the sequence."""
        for label, words in (("b", "batch"), ("s", "sequence")):
            axes = [i for i, role in enumerate(self.roles) if role.label == label]
            axes += [i for i, role in enumerate(self.roles) if role.between and label == "s"]
            ways = prod(self.mesh.sizes[i] for i in axes)
            sizes = {
                size
                for item in graph.inputs
                for size, name in zip(item.value.type.shape, item.labels, strict=False)
                if name == label
            }
            for size in sizes:
                cached = label == "s" and size == 1 and _has_cache(graph)  # whose tokens are cut
                if size % ways and not cached:
                    raise LayoutError(
                        f"{self._asked}{ways} GPUs do not divide the {words} of {size}"
                    )

    def allows(self, region: Region, strategy: Strategy) -> bool:
        """Does the strategy keep every axis to its role?"""
        known = self._allowed.get(id(strategy))
        if known is None or known[0] is not strategy:
            roles = enumerate(self.roles)
            known = strategy, all(self.keeps(region, strategy, *each) for each in roles)
            self._allowed[id(strategy)] = known
        return known[1]

    def keeps(self, region: Region, strategy: Strategy, axis: int, role: Role) -> bool:
        """Does a strategy keep one axis to a role?"""
        if any(operator_of(node).experts for node in region.nodes):
            if _sends(region, strategy, axis) != role.spread:
                return False
            if role.spread:
                return True
        if role.cuts == "weights":
            return self._cuts_weights(region, strategy, axis, role)
        return self._cuts_data(region, strategy, axis, role)

    def _cuts_data(self, region: Region, strategy: Strategy, axis: int, role: Role) -> bool:
        """Is the batch or the sequence cut, if the region has one, and nothing else?"""
        cuts = self._cuts(region, strategy, axis)
        if role.label == "s" and any(operator_of(node).attends for node in region.nodes):
            by_heads = self._by_heads(region, strategy, axis)
            return by_heads == (role.cuts == "heads") and (by_heads or "s" in cuts)
        if self._offers(region, strategy, axis, role.label):
            return role.label in cuts
        return not cuts

    def _by_heads(self, region: Region, strategy: Strategy, axis: int) -> bool:
        """Does attention run by heads, which tokens are exchanged for?"""
        return any(
            self.sides.cuts_inner(node, choices[axis])
            or (way := rule_of(node).algorithms.get(choices[axis])) is not None
            and way.by_heads
            for node, choices in zip(region.nodes, strategy.choices, strict=True)
            if operator_of(node).attends
        )

    def _cuts_weights(self, region: Region, strategy: Strategy, axis: int, role: Role) -> bool:
        """Is an inner dim cut, if the region has one; else the sequence between the blocks?"""
        cuts = self._cuts(region, strategy, axis)
        if not role.between and "s" in cuts:
            return False
        if cuts - {"inner", "s"}:
            return False
        must = any(operator_of(n).heavy and self.sides.inner_choices(n) for n in region.nodes)
        if must or self._offers(region, strategy, axis, "inner"):
            return cuts == {"inner"}
        if role.between and any(map(self._is_between, region.nodes)):
            return cuts == {"s"} or not self._offers(region, strategy, axis, "s")
        return True

    def _is_between(self, node: Node) -> bool:
        return not operator_of(node).heavy and self.sides.is_between(node)

    def _offers(self, region: Region, strategy: Strategy, axis: int, cut: str) -> bool:
        """Does a strategy that is like this one over the other axes cut that over `axis`?"""
        every, axes = self._all_cuts.get(id(region)), range(len(self.roles))
        if every is None:
            every = [[self._cuts(region, s, i) for i in axes] for s in region.strategies]
            self._all_cuts[id(region)] = every
        mine = [self._cuts(region, strategy, i) for i in axes]
        return any(
            cut in cuts[axis] and all(cuts[i] == mine[i] for i in axes if i != axis)
            for cuts in every
        )

    def _cuts(self, region: Region, strategy: Strategy, axis: int) -> set[str]:
        """What is cut over `axis`: labels of factors, `inner` dims, `?` for all others."""
        pairs = zip(region.nodes, strategy.choices, strict=True)
        return {self._kind(node, choices[axis]) for node, choices in pairs} - {""}

    def _kind(self, node: Node, choice: Choice) -> str:
        key = (node.name, choice)
        if key not in self._kinds:
            whole = choice in ("R", "V") or choice.startswith("P")
            label = "" if whole else self._labels[node.name].get(choice, "?")
            self._kinds[key] = "inner" if self.sides.cuts_inner(node, choice) else label
        return self._kinds[key]

    def allows_storage(self, param: Param, name: str, spec: Spec) -> bool:
        """Weights are whole over DDP's axes, sharded over those of FSDP, as far as these divide
        them; over a tensor axis they lie as they are used, experts over those that spread them."""
        if param.value.name not in self._stored:
            self._stored[param.value.name] = frozenset(self._storages(param))
        return spec in self._stored[param.value.name]

    def allows_home(
        self, param: Param, name: str, storage: Storage, *, several: bool, homeless: Collection[int]
    ) -> bool:
        """FSDP gathers weights for each use, ZeRO-1 and 2 once a step, but for those of which every
        rank makes whole gradients (learned positions, which know no batch)."""
        axes = [axis for axis, state in enumerate(storage.stored) if is_shard(state)]
        axes = [axis for axis in axes if axis not in homeless]
        zero = [axis for axis in axes if self.roles[axis].zero and not self._is_spread(param, axis)]
        if storage.gathered != tuple(zero):
            return False
        late = {self.roles[axis].zero == 1 for axis in zero}
        return not (several and zero) or late == {storage.late}

    def _is_spread(self, param: Param, axis: int) -> bool:
        return self.roles[axis].spread and param.value.name in self._of_experts

    def _storages(self, param: Param) -> list[Spec]:
        """The specs that a parameter may be stored in: of those sharded over most ranks, all."""
        shape, sizes = param.value.type.shape, self.mesh.sizes
        states: list[list[State]] = []
        for role in self.roles:
            inner = self.sides.inner_dim(param.value)
            if role.spread and param.value.name in self._of_experts:
                states.append([S(0)])
            elif role.cuts == "weights":
                states.append([R if inner is None else S(inner)])
            else:
                states.append([R, *map(S, range(len(shape)))] if role.shards else [R])
        sharding = [i for i, role in enumerate(self.roles) if role.shards]

        def ranks(spec: Spec) -> int:
            return prod(sizes[i] for i in sharding if is_shard(spec[i]))

        def divides(spec: Spec) -> bool:
            dims = {spec[i] for i in sharding if is_shard(spec[i])}
            ways = {d: prod(n for n, s in zip(sizes, spec, strict=True) if s == d) for d in dims}
            return all(shape[d] % n == 0 for d, n in ways.items())

        possible = [spec for spec in product(*states) if divides(spec)]
        most = max(map(ranks, possible))
        return [spec for spec in possible if ranks(spec) == most]

    def none_allowed(self, param: Param, name: str, sizes: tuple[int, ...]) -> None:
        """A weight that an axis must cut and does not divide is refused."""
        inner = self.sides.inner_dim(param.value)
        dim = 0 if inner is None else inner
        axes = [i for i, r in enumerate(self.roles) if r.cuts == "weights" or r.spread]
        ranks = prod(sizes[i] for i in axes)
        raise LayoutError(
            f"{self._asked}{ranks} GPUs do not divide dim {dim} of `{name}`, "
            f"{param.value.type.shape[dim]}, which they have to share"
        )

    def no_strategy(self, region: Region, sizes: tuple[int, ...]) -> None:
        """An operator that cannot keep to the roles is refused, with the size in the way."""
        axes = [i for i, role in enumerate(self.roles) if role.cuts in ("weights", "heads")]
        ranks = prod(sizes[i] for i in axes)
        for node in region.nodes:
            choices = self.sides.inner_choices(node)
            if operator_of(node).heavy and choices and axes:
                sizes_of = rule_of(node).sizes
                named = (f"{sizes_of[c]} {words_of(node, c) or c}" for c in choices)
                raise LayoutError(
                    f"{self._asked}{ranks} GPUs do not divide `{module_of(node.loc.module)}` "
                    f"({operator_of(node).title(node).split('.')[-1]}), which is cut by its "
                    f"{' and '.join(named)}"
                )
        roles = " x ".join(role.name for role in self.roles)
        node = region.nodes[0]
        raise LayoutError(
            f"{self._asked}`{region.name}` ({node.loc}) cannot run as {roles} on a mesh of "
            f"{' x '.join(map(str, sizes))}"
        )

    def allows_gather(self, axis: int) -> bool:
        """Tensor parallelism never gathers a parameter."""
        return self.roles[axis].cuts != "weights"

    def left_whole(self, graph: Graph) -> list[str]:
        """Names of the weights that FSDP's axes do not divide, and that are not sharded over all
        of them."""
        axes = [i for i, role in enumerate(self.roles) if role.shards]
        return [
            ref.name
            for ref in all_params(graph)
            if ref.trainable and len(ref.param.value.type.shape) > 0
            for spec in self._storages(ref.param)[:1]
            if any(not is_shard(spec[i]) for i in axes)
        ]


def cuts_weights(roles: Sequence[str]) -> bool:
    """Is there tensor parallelism among them?"""
    return any(Role.parse(role).cuts == "weights" for role in roles)


def name_of(roles: Sequence[str], mesh: Mesh) -> str:
    """`FSDP x TP+SP, EP64`; axes with the same role count as one, DDP x FSDP is HSDP."""
    parsed = [Role.parse(role) for role in roles]
    names = list(dict.fromkeys(role.name for role in parsed))
    if names[:2] == ["DDP", "FSDP"]:
        names[:2] = ["HSDP"]
    name = " x ".join(names)
    ranks = prod(n for n, role in zip(mesh.sizes, parsed, strict=True) if role.spread)
    return f"{name}, EP{ranks}" if any(role.spread for role in parsed) else name


def _has_cache(graph: Graph) -> bool:
    """Does attention look back at cached tokens?"""
    nodes = (node for scope in scopes(graph) for node in scope.nodes)
    return any(operator_of(node).attends and operator_of(node).remembers for node in nodes)


def _experts(graph: Graph) -> list[Node]:
    """The layers of experts."""
    nodes = [node for scope in scopes(graph) for node in scope.nodes]
    return [node for node in nodes if operator_of(node).experts]


def _sends(region: Region, strategy: Strategy, axis: int) -> bool:
    """Do the region's experts get their tokens by exchanges over `axis`?"""
    return all(
        choices[axis] in rule_of(node).algorithms
        for node, choices in zip(region.nodes, strategy.choices, strict=True)
        if operator_of(node).experts
    )


def ordinary_roles(mesh: Mesh, graph: Graph) -> list[tuple[str, ...]]:
    """The ordinary plans on a mesh: one role on all axes, and data outside with others inside.
    Where the outermost axis does not divide the batch, the sequence is cut outside.

    With experts also those that spread them over the innermost axes, as many as divide them.  On
    one GPU there is none.
    """
    if mesh.ranks == 1:
        return []
    n = len(mesh.axes)
    has_sequence = any(
        size > 1
        for item in graph.inputs
        for size, label in zip(item.value.type.shape, item.labels, strict=False)
        if label == "s"
    )
    attends = any(operator_of(node).attends for scope in scopes(graph) for node in scope.nodes)
    tensor = "tp+sp" if has_sequence else "tp"
    shared = attends and (has_sequence or _has_cache(graph))
    roles = [(role,) * n for role in ("ddp", "fsdp", tensor)]
    if n == 1:
        by_heads = ("ulysses", "fsdp+ulysses") if has_sequence else ()
        sequence = ("cp", "fsdp+cp", *by_heads) if shared else ()
        return [*roles, *((role,) for role in sequence), *_with_experts(mesh, graph, tensor)]
    inside = [("ddp", "fsdp"), ("ddp", tensor), ("fsdp", tensor)]
    inside += [("fsdp", "fsdp+cp")] if shared else []
    if shared and has_sequence and not _cuts_batch(graph, mesh):
        roles += [("cp",) * n, ("fsdp+cp",) * n]
        inside += [("cp", tensor), ("fsdp+cp", tensor)]
    roles += [(outer,) * (n - 1) + (inner,) for outer, inner in inside]
    return [*roles, *_with_experts(mesh, graph, tensor)]


def _cuts_batch(graph: Graph, mesh: Mesh) -> bool:
    """Does the outermost axis divide the batch?"""
    return all(
        size % mesh.sizes[0] == 0
        for item in graph.inputs
        for size, label in zip(item.value.type.shape, item.labels, strict=False)
        if label == "b"
    )


def _with_experts(mesh: Mesh, graph: Graph, tensor: str) -> list[tuple[str, ...]]:
    """The ordinary plans that spread experts over inner axes."""
    n, inner = len(mesh.axes), _axes_for_experts(mesh, graph)
    mixed = [(role,) * (n - 1) + (tensor,) for role in ("ddp", "fsdp") if n > 1]
    return [
        tuple(f"{role}+ep" if axis >= n - inner else role for axis, role in enumerate(roles))
        for roles in (("ddp",) * n, ("fsdp",) * n, *mixed)
        if inner
    ]


def _axes_for_experts(mesh: Mesh, graph: Graph) -> int:
    """How many of the innermost axes together divide the experts of all layers."""
    numbers = [rule_of(node).sizes[operator_of(node).experts] for node in _experts(graph)]
    fitting = [
        inner
        for inner in range(1, len(mesh.axes) + 1)
        if all(number % prod(mesh.sizes[-inner:]) == 0 for number in numbers)
    ]
    return max(fitting, default=0) if numbers else 0


__all__ = ["Role", "Roles", "cuts_weights", "name_of", "ordinary_roles"]

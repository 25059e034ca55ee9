"""The ordinary layout that a plan is, or is nearest to: the inverse of `--layout`.

`strategies/layout.py` says what words leave of a graph.  Here the choices of a plan are held
against that: for each axis the role that most of its time keeps to, and by name what does not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ...facts.mesh import Mesh
from ...facts.spec import V, format_spec, is_shard
from ...ir.ops.labels import label_dims
from ...ir.ops.registry import operator_of
from ..errors import LayoutError
from ..strategies.layout import Layout, words_of_roles
from ..strategies.params import ParamRef, all_params
from ..strategies.pins import module_of
from ..strategies.regions import Region, Strategy, make_regions
from ..strategies.roles import Role, Roles
from ..strategies.storage import Storage
from .plan import PlanData
from .words import choices_text

_CUTS = ("ddp", "tp", "tp+sp", "cp", "ulysses", "ddp+ep")  # what an axis may cut, plainest first
_LEAST_S = 1e-9  # what an operator that takes no time counts


@dataclass(frozen=True, slots=True)
class Difference:
    """What of a plan its layout does not have: a module or parameter, and what the plan does."""

    where: str
    plan: str

    def __str__(self) -> str:
        return f"{self.where}: {self.plan}" if self.where else self.plan


@dataclass(frozen=True, slots=True)
class Named:
    """The layout nearest to a plan, and where the two differ; none: the plan is that layout.

    `roles` are those of the axes of the plan's mesh (of a stage's, in a pipeline) that have more
    than one rank, as `Role.parse` reads them.  Where layers are recomputed but for the last
    `kept_layers` of each loop, or some of them in part (`part_layers`) and others not, the layout
    leaves open whether they are.
    """

    layout: Layout
    roles: tuple[str, ...]
    differences: tuple[Difference, ...]
    kept_layers: int = 0
    part_layers: int = 0

    @property
    def words(self) -> str:
        """As `--layout` takes it."""
        return self.layout.text


def name_of_plan(plan: PlanData) -> Named:
    """The layout that a plan is, or is nearest to."""
    if plan.pipeline is not None:
        return _named_pipeline(plan)
    axes = [axis for axis, size in enumerate(plan.mesh.sizes) if size > 1]
    sides = [_Side(phase) for phase in plan.phases]
    roles = ["ddp"] * len(plan.mesh.axes)
    for axis in axes:
        scores = [sum(side.score(axis, role) for side in sides) for role in sides[0].cuts]
        roles[axis] = sides[0].cuts[scores.index(max(scores))]
    roles = _one_kind_of_tp(sides[0].stored(roles))
    words = [(roles[axis], plan.mesh.sizes[axis]) for axis in axes] or [("ddp", 1)]
    text = words_of_roles(words, _recompute(plan))
    found = [difference for side in sides for difference in side.differences(roles)]
    if plan.recached:
        found.append(Difference("", "the KV caches lie otherwise in decode than in prefill"))
    kept = tuple(dict.fromkeys(found))
    used = tuple(roles[axis] for axis in axes)
    if not plan.decisions.recompute or _recompute(plan):
        return Named(Layout.parse(text), used, kept)
    layers = plan.decisions.recomputed
    return Named(Layout.parse(text), used, kept, layers.kept, layers.part)


def _one_kind_of_tp(roles: Sequence[str]) -> list[str]:
    """Words have one kind of tensor parallelism for all of its axes: that of the innermost."""
    kinds = [role for role in roles if role in ("tp", "tp+sp")]
    return [kinds[-1] if role in kinds else role for role in roles]


def _named_pipeline(plan: PlanData) -> Named:
    """That of the kind of stage with most layers, and where other kinds differ from it."""
    pipeline = plan.pipeline
    assert pipeline is not None
    layers = [0] * len(pipeline.kinds)
    for stage in pipeline.stages:
        layers[stage.kind] += stage.layers
    each = [name_of_plan(replace(kind, pipeline=None)) for kind in pipeline.kinds]
    main = each[layers.index(max(layers))]
    found = [difference for named in each for difference in named.differences]
    found += [
        Difference(f"a stage of {kind.graph.name}", f"is nearest to {named.words}")
        for kind, named in zip(pipeline.kinds, each, strict=True)
        if named.words != main.words
    ]
    inner = f"pp={pipeline.ranks},"
    inner += f"vpp={pipeline.per_rank}," if pipeline.per_rank > 1 else ""
    return Named(Layout.parse(inner + main.words), main.roles, tuple(dict.fromkeys(found)))


def _recompute(plan: PlanData) -> str:
    """What `--layout` calls it where the same is done with all layers, but keeping them."""
    if not plan.training or not plan.decisions.recompute:
        return ""
    modes = [plan.decisions.recomputed.of(loop) for loop in plan.graph.loops]
    if any(mode.kept for mode in modes):
        return ""
    full, part = (any(counts) for counts in zip(*(mode[:2] for mode in modes), strict=True))
    return "" if full and part else "selective" if part else "full"


class _Side:
    """A plan of one phase, held against roles."""

    def __init__(self, plan: PlanData) -> None:
        self.plan = plan
        graph, mesh, decided = plan.graph, plan.mesh, plan.decisions
        made = make_regions(graph, mesh.sizes, training=plan.training, order=decided.order)
        self._taken = [(region, _taken(region, decided.choices)) for region in made]
        neutral = Mesh(tuple((f"m{i}", size) for i, size in enumerate(mesh.sizes)))
        self._judge = Roles(("tp",) * len(mesh.axes), graph, neutral)
        self._labels = label_dims(graph)
        routed = any(operator_of(node).experts for node in graph.nodes)
        self.cuts = _CUTS if routed else _CUTS[:-1]

    def score(self, axis: int, role: str) -> float:
        """Seconds of a step in regions that keep an axis to a role."""
        parsed, work = Role.parse(role), self.plan.work
        return sum(
            region.scope.weight * sum(work[n.name].seconds + _LEAST_S for n in region.nodes)
            for region, way in self._taken
            if way is not None and self._judge.keeps(region, way, axis, parsed)
        )

    def stored(self, roles: Sequence[str]) -> list[str]:
        """The same roles, with how data axes store most bytes of weights."""
        found = list(roles)
        for axis, role in enumerate(roles):
            if self.plan.mesh.sizes[axis] > 1 and Role.parse(role).cuts != "weights":
                kind = self._storage(axis, spread=role.endswith("+ep"))
                if role == "ddp":
                    found[axis] = kind
                elif kind == "fsdp":
                    found[axis] = f"fsdp+{role.removeprefix('ddp+')}"
        if any(role.startswith("fsdp") for role in found):  # its group spans all axes of data
            joined = {"cp": "fsdp+cp", "ulysses": "fsdp+ulysses", "ddp+ep": "fsdp+ep"}
            found = [joined.get(role, role) for role in found]
        return found

    def _storage(self, axis: int, *, spread: bool) -> str:
        """How most bytes of weights are kept over an axis.

        With one micro-batch gradients are reduced once in ZeRO-2, too, which is then ZeRO-1.
        """
        once = self.plan.request.micro_batches == 1
        sizes = dict.fromkeys(("ddp", "fsdp", "zero1", "zero2"), 0)
        for ref in self._weights(without_experts=spread):
            storage = self._kept(ref)
            kind = "fsdp" if is_shard(storage.stored[axis]) else "ddp"
            if axis in storage.gathered:
                kind = "zero1" if storage.late or once else "zero2"
            sizes[kind] += ref.weight * ref.param.value.type.numel
        return max(sizes, key=lambda kind: sizes[kind])

    def _weights(self, *, without_experts: bool) -> list[ParamRef]:
        nodes = [node for node in self.plan.graph.nodes if operator_of(node).experts]
        experts = {value.name for node in nodes for value in node.operands}
        return [
            ref
            for ref in all_params(self.plan.graph)
            if ref.param.kind == "parameter"
            and not (without_experts and ref.param.value.name in experts)
        ]

    def _kept(self, ref: ParamRef) -> Storage:
        decided, name = self.plan.decisions, ref.param.value.name
        return Storage(decided.specs[name], decided.homes.get(name))

    def differences(self, roles: Sequence[str]) -> Iterator[Difference]:
        """Where the plan does not keep to the roles."""
        plan = self.plan
        parsed = [Role.parse(role) for role in roles]
        axes = [axis for axis, size in enumerate(plan.mesh.sizes) if size > 1]
        for region, way in self._taken:
            kept = way is not None and all(
                self._judge.keeps(region, way, axis, parsed[axis]) for axis in axes
            )
            if not kept and _is_told(region):
                head = next((n for n in region.nodes if operator_of(n).heavy), region.nodes[0])
                text = choices_text(
                    head, plan.decisions.choices[head.name], plan.mesh, self._labels
                )
                yield Difference(module_of(head.loc.module) or region.name, f"runs {text}")
        try:
            limit = Roles(roles, plan.graph, plan.mesh)
        except LayoutError as error:
            yield Difference("", f"the layout is not possible here: {error}")
            return
        several, homeless = plan.request.micro_batches > 1, self._homeless()
        for ref in self._weights(without_experts=False):
            storage, param = self._kept(ref), ref.param
            fits = limit.allows_storage(param, ref.name, storage.stored)
            if fits and ref.trainable:
                fits = limit.allows_home(
                    param,
                    ref.name,
                    storage,
                    several=several,
                    homeless=homeless.get(param.value.name, ()),
                )
            if not fits:
                home = f", between its uses {storage.home}" if storage.home else ""
                yield Difference(ref.name, f"is stored {format_spec(storage.stored)}{home}")

    def _homeless(self) -> dict[str, set[int]]:
        """By parameter the axes on which some user leaves no summands of its gradient."""
        found: dict[str, set[int]] = {}
        for region, way in self._taken:
            for value, specs in zip(region.operands, way.requires if way else (), strict=False):
                axes = range(len(self.plan.mesh.axes))
                never = {axis for axis in axes if all(spec[axis] != V for spec in specs)}
                found.setdefault(value.name, set()).update(never)
        return found


def _is_told(region: Region) -> bool:
    """Is it more than a shift of labels, or a count of positions?"""
    heavy = any(operator_of(node).heavy for node in region.nodes)
    return heavy or any(value.differentiable for value in region.values)


def _taken(region: Region, choices: Mapping[str, tuple[str, ...]]) -> Strategy | None:
    """How a region is run; None where no strategy of ours says so."""
    taken = tuple(choices[node.name] for node in region.nodes)
    return next((way for way in region.strategies if way.choices == taken), None)


__all__ = ["Difference", "Named", "name_of_plan"]

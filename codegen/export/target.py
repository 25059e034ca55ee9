"""What a target is: which layouts it has words for, and the function that writes a plan in them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from types import MappingProxyType

from ...facts.phases import find_phase
from ...facts.units import format_seconds
from ...ir.ops.registry import operator_of, rule_of
from ...planner.errors import PlanError
from ...planner.plan.named import Named
from ...planner.plan.plan import PlanData
from ...planner.strategies.layout import Layout, words_of_roles
from ...planner.strategies.roles import Role
from .flags import Flags

DATA = ("ddp", "fsdp", "zero1", "zero2", "ddp+ep", "fsdp+ep")  # roles that cut the batch
_SHARDING = ("fsdp", "zero1", "zero2")


@dataclass(frozen=True, slots=True)
class Written:
    """A plan as a target has it, and what of it the target has no words for."""

    text: str
    lost: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Read:
    """What flags of a target say: a layout, further options of `plan` by their names in Python,
    and those flags that change how a model is run and have no such option."""

    layout: str
    options: Mapping[str, object]
    unread: tuple[str, ...] = ()


class Target:
    """Another tool.  `title`: with the version that its words were tried on.

    One that is `exact` takes any plan.  The others have layouts: `roles` says which of our roles
    (`strategies/roles.py`) become which of theirs, `order` how axes lie, outermost first.
    """

    name = ""
    title = ""
    comment = "#"
    exact = False
    trains = False
    serves = False
    pipelines = False
    recompute = False  # of all layers, and
    recompute_some = False  # of the first ones only
    roles: Mapping[str, str] = MappingProxyType({})
    order: tuple[str, ...] = ()

    def check(self, plan: PlanData) -> None:
        """Raises PlanError for a plan of a phase that the tool is not for."""
        phase = find_phase(plan.request.phase)
        if not (self.trains if phase.backward else self.serves):
            fit = "train" if self.trains else "serve"
            raise PlanError(
                f"{self.name} {'trains' if self.trains else 'serves'}, and this plan is for phase "
                f"{phase.name}; plan with --phase {fit}"
            )

    def nearest(self, named: Named) -> tuple[Layout, tuple[str, ...]]:
        """The layout nearest to a plan's that the tool has, and what of the plan's it has not."""
        layout = named.layout
        axes, lost = self._axes(layout)
        if layout.pipeline > 1 and not self.pipelines:
            raise PlanError(f"{self.name} has no pipelines; plan it with a --layout without pp")
        recompute = layout.recompute in ("full", "selective")
        if named.part_layers or layout.recompute == "selective":
            recompute |= not named.kept_layers
            lost.append("layers keep the results of products and attention; here no part of them")
        if named.kept_layers and not self.recompute_some:
            recompute = True
            lost.append(f"layers are recomputed but for the last {named.kept_layers}; here all")
        if recompute and not self.recompute:
            lost.append("layers are recomputed")
        full = "full" if recompute and self.recompute else ""
        words = words_for(axes, (layout.pipeline, layout.per_rank), full)
        return Layout.parse(words), tuple(lost)

    def ordinary(self, gpus: int) -> Iterator[Layout]:
        """Layouts of the tool for so many GPUs: tensor parallelism over 1, 2, 4, ... of them, and
        data parallelism, sharded where it has that, over the rest."""
        data = "fsdp" if "fsdp" in self.roles.values() else "ddp"
        tensor = "tp" if "tp" in self.roles.values() else "tp+sp"
        size = 1
        while gpus % size == 0:
            axes = [(role, n) for role, n in ((data, gpus // size), (tensor, size)) if n > 1]
            yield Layout.parse(words_of_roles(axes or [(data, 1)]))
            size *= 2

    def _axes(self, layout: Layout) -> tuple[list[tuple[str, int]], list[str]]:
        """Roles and sizes as the tool has them, and what that changes."""
        lost: list[str] = []
        axes: list[tuple[str, int]] = []
        pairs = list(zip(layout.roles, layout.mesh.sizes, strict=True))
        sharding = [(size, role) for role, size in pairs if role in _SHARDING and size > 1]
        for role, size in pairs:
            if size == 1:
                continue
            wanted = max(sharding)[1] if role in _SHARDING else role
            theirs = self.roles.get(wanted)
            if theirs is None:
                raise PlanError(
                    f"{self.name} has no {Role.parse(role).name}, which is what this plan does over"
                    f" {size} GPUs; plan with --layout of {', '.join(sorted(self._words()))}"
                )
            if theirs != role:
                lost.append(f"{_name(role)} over {size} GPUs becomes {_name(theirs)}")
            axes.append((theirs, size))
        ordered = sorted(axes, key=lambda axis: self.order.index(axis[0]))
        if ordered != axes:
            lost.append(
                f"axes lie, outermost first, as {words_of_roles(ordered)}, and not as "
                f"{words_of_roles(axes)}"
            )
        return ordered, lost

    def _words(self) -> set[str]:
        return {word for role in self.roles for word in role.split("+")}

    def write(self, plan: PlanData, layout: Layout | None) -> Written:
        """The plan as text; unless the target is exact, it is `layout`, which `nearest` gave."""
        raise NotImplementedError

    knows: tuple[str, ...] = ()  # flags that tell a command line of this tool from others

    def read(self, flags: Flags, gpus: int | None) -> Read:
        """What flags say, for `gpus` in all.  Raises PlanError for what makes no sense."""
        raise PlanError(f"layouts are not read from what {self.name} is given")


def shared_out(gpus: int | None, sizes: Mapping[str, int]) -> int:
    """How many data-parallel ranks are left of `gpus` by axes of these sizes."""
    ways = prod(sizes.values())
    if gpus is None:
        raise PlanError("how many GPUs? The flags do not say; give --gpus N")
    if gpus % ways:
        named = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise PlanError(f"--gpus {gpus} is no multiple of {named}")
    return gpus // ways


def words_for(axes: Sequence[tuple[str, int]], stages: tuple[int, int], recompute: str) -> str:
    """Words of `--layout` for axes, ranks of a pipeline and stages of each; `recompute`: `full`,
    `selective`, `none`, or "" where nothing is said."""
    real = [(role, size) for role, size in axes if size > 1]
    words = words_of_roles(real or [("ddp", 1)])
    words = f"vpp={stages[1]},{words}" if stages[1] > 1 else words
    words = f"pp={stages[0]},{words}" if stages[0] > 1 else words
    return f"{words},recompute={recompute}" if recompute else words


def _name(role: str) -> str:
    spread = ", experts spread" if role.endswith("+ep") else ""
    return Role.parse(role).name + spread


def ranks(layout: Layout, *roles: str) -> int:
    """How many ranks the axes with one of these roles have together."""
    pairs = zip(layout.roles, layout.mesh.sizes, strict=True)
    return prod(size for role, size in pairs if role in roles)


def rows_per_rank(plan: PlanData, layout: Layout) -> int:
    """Sequences of a micro-batch on each data-parallel rank."""
    return max(plan.request.rows // ranks(layout, *DATA), 1)


def attention_algorithms(plan: PlanData) -> set[str]:
    """What a plan, or its stages, run attention by where its tokens are cut."""
    plans = plan.pipeline.kinds if plan.pipeline is not None else plan.phases
    return {
        choice
        for each in plans
        for node in each.graph.nodes
        if operator_of(node).attends
        for choice in each.decisions.choices[node.name]
        if choice in rule_of(node).algorithms
    }


def seconds_text(plan: PlanData) -> str:
    """`811 ms per step`."""
    if plan.decode is not None:
        return f"{format_seconds(plan.answer_s)} per answer"
    return f"{format_seconds(plan.seconds)} per {find_phase(plan.request.phase).run}"


__all__ = [
    "DATA", "Read", "Target", "Written", "attention_algorithms", "ranks", "rows_per_rank",
    "seconds_text", "shared_out", "words_for",
]  # fmt: skip

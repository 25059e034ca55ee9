"""The base class of generated modules that are pipelines."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from math import lcm
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from ...facts.collectives import find_collective
from ...facts.phases import APPEND, DECODE, PREFILL, Phase, find_phase
from ...facts.schedules import PipelineSchedule, refusal, schedule
from ...facts.spec import parse_spec
from ..cache.cache import KVCache
from ..cache.declared import BATCH, caches_in, specs_of
from ..cache.state import StateCache
from ..mesh.batches import Input, tensors_of
from ..mesh.counter import record
from ..mesh.mesh import Mesh, stable_seed
from ..mesh.parts import ways
from ..mesh.rows import DataShard, add_over_shards, data_shard
from ..module.checkpoint import Safetensors, Source, StateDict
from ..module.demo import (
    Clock,
    OptimizerName,
    compiled_unless_asked,
    demonstrate_serving,
    random_rows,
    started_mesh,
)
from ..module.demo import make_optimizer as demo_optimizer
from ..module.module import ShardedModule
from ..serving.conversing import Conversing
from ..serving.program import Program, Served
from ..training.ema import Ema
from ..training.norm import clip_gradients
from ..training.optimizer import Kind as OptimizerKind
from ..training.optimizer import make_optimizer
from ..training.pieces import Piece, Whole, trained
from ..training.shares import share_of_step
from ..training.step import Labels, Trained
from ..training.wholes import Matrices
from .messages import Form, Links, Post, key_of, receiver_of
from .names import OfStage, held, matrices, originals, shared
from .serving import Group, Line, StagedServing, StageProgram, alike
from .stages import RunningStage, Stage

if TYPE_CHECKING:
    from ..training.saving import Checkpoints, Resumed


class PipelinedModule(Conversing, nn.Module):
    """A model in stages, of which this rank holds its parts of some; see `ShardedModule`.

    A subclass states `MESH`, whose outermost axis is that of the pipeline, `STAGES`, in the order
    of the model, `SCHEDULE`, the name of one in `facts/schedules.py`, and as many `MICRO_BATCHES`
    as were planned.  Each stage is a module of its own on the mesh of the other axes; its
    parameters have the names that they have in the whole model.  A step runs all micro-batches.
    """

    MESH: ClassVar[Mapping[str, int]]
    STAGES: ClassVar[Sequence[Stage]]
    SCHEDULE: ClassVar[str]
    MICRO_BATCHES: ClassVar[int] = 1
    OPTIMIZER: ClassVar[OptimizerName] = "none"

    def __init__(
        self,
        mesh: Mesh | None = None,
        device: torch.device | str | None = None,
        *,
        compile: bool | None = None,
    ) -> None:
        """On `mesh` (default: one over all ranks); `compile` as in `ShardedModule`."""
        super().__init__()
        self.mesh = Mesh.create(self.MESH, device) if mesh is None else mesh
        if dict(zip(self.mesh.names, self.mesh.sizes, strict=True)) != dict(self.MESH):
            wanted = " x ".join(f"{name}={size}" for name, size in self.MESH.items())
            raise ValueError(f"this module was planned for mesh {wanted}, got {self.mesh}")
        self._place = self.mesh.coordinates[0]
        self._inner = self.mesh.inner()
        self._links = Links(self.mesh)
        rank_of = self._table(self.MICRO_BATCHES).rank_of
        self._numbers = tuple(n for n, rank in enumerate(rank_of) if rank == self._place)
        self._classes = [row.module_class() for row in self.STAGES]
        self.stages = nn.ModuleList(
            self._classes[number](self._inner, compile=compile) for number in self._numbers
        )
        self._trains = find_phase(self._classes[0].PHASE).backward
        self._shared = shared(self._classes) if self._trains else {}
        self._holders = {  # by original the stages that have it
            name: [n for n, each in enumerate(self._classes) if name in originals([each])]
            for name in originals(self._classes)
        }
        self._tied = [self._tie(name, numbers, rank_of) for name, numbers in self._shared.items()]
        self._check_messages()
        self._run_of: Checkpoints | None = None

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        """A pipeline runs whole steps, `step` or `evaluate`, or serves: `generate`."""
        if not self._trains:
            raise RuntimeError(
                f"{type(self).__name__} is a pipeline of {len(self.STAGES)} stages that serves:"
                " generate, or prefill, decode and append"
            )
        raise RuntimeError(
            f"{type(self).__name__} is a pipeline of {len(self.STAGES)} stages, which runs whole"
            " steps of several micro-batches: loss = model.step(**rows), or without gradients"
            " model.evaluate(**rows)"
        )

    # --- a step ----------------------------------------------------------------------------------

    def step(
        self,
        *,
        micro_batches: int | None = None,
        error_if_nonfinite: bool = False,
        **rows: Any,
    ) -> Tensor:
        """The loss () of a step, whose gradients are then in `.grad`; the same on all ranks.

        As `ShardedModule.step`: takes this rank's rows (see `data_shard`) of all micro-batches
        together, which are all stages' inputs; each rank of the pipeline is given the same.
        Raises ValueError where rows do not divide, or there is no such schedule.
        """
        self._check_trains()
        count = self.MICRO_BATCHES if micro_batches is None else micro_batches
        running = self._running(trains=True)
        loss = self._played(self._table(count), running, rows)
        for stage in running.values():
            stage.end()
        self._add_tied()
        if error_if_nonfinite and not bool(loss.isfinite()):
            raise RuntimeError(
                f"the loss of this step is {loss.item()}; do not use its gradients: skip the step,"
                " or go on from the last checkpoint with a lower learning rate"
            )
        return loss

    @torch.no_grad()
    def evaluate(self, *, micro_batches: int | None = None, **rows: Any) -> Tensor:
        """The loss () that `step` would return of these rows, without gradients: the forward
        passes of its schedule.

        Takes what `step` takes.  Call `eval()` before, where the model has dropout.
        """
        self._check_trains()
        count = self.MICRO_BATCHES if micro_batches is None else micro_batches
        return self._played(self._table(count).forwards, self._running(trains=False), rows)

    def _check_trains(self) -> None:
        """Raises RuntimeError for a pipeline that serves."""
        if not self._trains:
            raise RuntimeError(
                f"this pipeline was planned for {self._classes[0].PHASE}, which has no backward"
                " pass; plan with --phase train to take steps"
            )

    def _running(self, *, trains: bool) -> dict[int, RunningStage]:
        """This rank's stages in a new step."""
        return {
            number: RunningStage(self.STAGES[number], module, self._row(number + 1), trains=trains)
            for number, module in zip(self._numbers, self._modules_here, strict=True)
        }

    def _played(
        self,
        table: PipelineSchedule,
        running: Mapping[int, RunningStage],
        rows: Mapping[str, object],
    ) -> Tensor:
        """The mean loss () of all micro-batches, on all ranks."""
        parts = self._parts(rows, table.micro_batches)
        shares = self._shares(parts)
        post = self._links.open(table, self._forms())
        with ExitStack() as stack:
            for stage in running.values():
                stack.enter_context(stage.module.moved_weights.step())
            self._run(table, running, post, parts, shares)
            post.close()
        dtype = torch.float64 if self._dtype() == torch.float64 else torch.float32
        mean = torch.zeros((), dtype=dtype, device=self.mesh.device)
        for stage in running.values():
            mean += torch.stack(stage.losses).to(dtype).mean() if stage.last else 0
        return self.mesh[self.mesh.names[0]].reduce(mean)  # only the last stage has one

    def _run(
        self,
        table: PipelineSchedule,
        running: Mapping[int, RunningStage],
        post: Post,
        parts: Sequence[Mapping[str, Any]],
        shares: Tensor | None,
    ) -> None:
        """This rank's actions one after another."""
        here: dict[tuple[str, int, int], Sequence[Tensor]] = {}  # what goes from stage to stage
        axes, count = self._rows_over, len(parts)
        for action in table.actions[self._place]:
            stage, batch = running[action.stage], action.batch
            stage.module.moved_weights.micro_batch(first=batch == 0, last=batch == count - 1)
            taken: Sequence[Tensor] = ()
            if action.needed is not None and 0 <= action.needed[1] < table.stages:
                key = (*action.needed, batch)
                peer = table.rank_of[key[1]]
                taken = here.pop(key) if peer == self._place else post.receive(key, peer)
            share = shares[batch] if shares is not None and stage.last else None
            with share_of_step(share):
                if action.kind == "F":
                    made = stage.forward(batch, taken, parts[batch], axes)
                else:
                    made = stage.backward(batch, taken, count)
            receiver = receiver_of(action, table)
            if receiver == self._place:
                here[key_of(action)] = [x.detach() for x in made]
            elif receiver is not None:
                post.send(key_of(action), receiver, made)

    def _table(self, count: int) -> PipelineSchedule:
        """The schedule of so many micro-batches."""
        ranks = next(iter(self.MESH.values()))
        per_rank = len(self.STAGES) // ranks
        if why := refusal(self.SCHEDULE, ranks, per_rank, count):
            raise ValueError(f"micro_batches={count}: {why}")
        made = schedule(self.SCHEDULE, ranks, per_rank, count)
        if made.splits:
            raise ValueError(
                f"schedule {self.SCHEDULE} has backward passes in two parts, which pipelines do not"
                " run yet; gpipe, 1f1b and interleaved do"
            )
        return made

    def _row(self, number: int) -> Stage | None:
        return self.STAGES[number] if number < len(self.STAGES) else None

    def _forms(self) -> dict[tuple[str, int], list[Form]]:
        """What messages are: activations of stage n, and gradients of what stage n took."""
        forms: dict[tuple[str, int], list[Form]] = {}
        for number, row in enumerate(self.STAGES):
            forms["F", number - 1] = row.forms(row.taken)
            forms["B", number] = row.forms(row.with_gradient)
        return forms

    def _check_messages(self) -> None:
        """Raises ValueError where a stage gives what the next one does not take."""
        for number, (row, after) in enumerate(zip(self.STAGES, self.STAGES[1:], strict=False)):
            outputs = {output.path: output.spec for output in row.runs.OUTPUTS}
            for name in row.given:
                spec = after.runs.INPUTS[name].spec
                if outputs[(name,)] != spec:
                    raise ValueError(
                        f"stage {number} gives `{name}` as {outputs[(name,)]}, stage {number + 1}"
                        f" takes it as {spec}"
                    )

    # --- serving ---------------------------------------------------------------------------------

    def _serve(
        self, batch: int, tokens: int, total_tokens: int | None, capture: bool | None
    ) -> StagedServing:
        if self._trains:
            raise RuntimeError(
                "this pipeline was planned for training; to serve, plan with --phase serve, and"
                " load the full_state_dict() of this there"
            )
        (number,), (module,) = self._numbers, self._modules_here
        line = Line(self._links, len(self.STAGES) - 1)
        phases = self._programs(number, module, line)
        parts = lcm(*(self._rows_cut(each) for each in self._classes))
        groups: list[Group] = []
        tokens_of = phases[PREFILL.name].tokens
        rows = tokens_of.shape[0]  # of a group, where they are as they were planned
        count = self.MICRO_BATCHES if 0 in tokens_of.free else -(-batch // rows)
        for _ in range(count):
            caches: dict[str, KVCache | StateCache | None] = {}
            served = Served(
                type(self).__name__, self._inner, phases, caches.__setitem__, (module,), self.mesh,
                parts,
            )  # fmt: skip
            groups.append(Group(served, caches, module.set_cache))
        return StagedServing(groups, line, batch, tokens, total_tokens, capture)

    def _programs(self, number: int, module: ShardedModule, line: Line) -> dict[str, StageProgram]:
        """What runs in each phase on this rank, whose stage is `number`."""
        own = _programs_of(module)
        of_phases = [
            [each, *([] if each.DECODE is None else [each.DECODE])] for each in self._classes
        ]
        made = [
            self._program(number, runs, [each[at] for each in of_phases], line)
            for at, runs in enumerate(own)
        ]
        first, last = made[0], made[-1]
        return {
            module.PHASE: first, PREFILL.name: first, APPEND.name: first, DECODE.name: last,
        }  # fmt: skip

    def _planned(self) -> dict[Phase, Program]:
        """The programs as they were planned, of all groups of sequences together."""
        (number,), (module,) = self._numbers, self._modules_here
        programs = self._programs(number, module, Line(self._links, len(self.STAGES) - 1))
        phases = [find_phase(module.PHASE), *([DECODE] if len(_programs_of(module)) > 1 else [])]
        found: dict[Phase, Program] = {}
        for phase in phases:
            program = programs[phase.name]
            inputs = {
                name: replace(x, shape=(x.shape[0] * self.MICRO_BATCHES, *x.shape[1:]))
                for name, x in program.inputs.items()
            }
            found[phase] = replace(program, inputs=inputs)
        return found

    def _program(
        self,
        number: int,
        module: ShardedModule,
        classes: Sequence[type[ShardedModule]],
        line: Line,
    ) -> StageProgram:
        row, tables = self.STAGES[number], [each.INPUTS for each in classes]
        named = {"input_ids": tables[:1], "position_ids": tables}
        tokens = alike([x[name] for name, some in named.items() for x in some if name in x])
        inputs = {
            name: replace(tokens, high=min((x[name].high for x in some if name in x), default=0))
            for name, some in named.items()
        }
        others = [each.CACHES for n, each in enumerate(classes) if n != number]
        return StageProgram(
            inputs, classes[-1].OUTPUTS, module.CACHES, module, module.CONTEXT,
            elsewhere=[cache for each in others for cache in each.values()],
            row=row,
            taken={name: module.INPUTS[name] for name in row.taken},
            own=[name for name in module.INPUTS if name not in row.taken],
            line=line,
        )  # fmt: skip

    def _rows_cut(self, stage: type[ShardedModule]) -> int:
        """Into how many parts a stage's caches cut a batch, or a multiple."""
        both = [stage, *([] if stage.DECODE is None else [stage.DECODE])]
        specs = [spec for each in both for spec in specs_of(each.CACHES).values()]
        specs += [
            parse_spec(text)
            for each in both
            for cache in caches_in(each.CACHES).values()
            for text in cache.path
        ]
        return lcm(1, *(ways(spec, self._inner, BATCH) for spec in specs))

    # --- rows and labels -------------------------------------------------------------------------

    @property
    def inputs(self) -> dict[str, Input]:
        """The inputs of the model, those of all stages together."""
        found: dict[str, Input] = {}
        for row in self.STAGES:
            for name, x in row.own_inputs.items():
                found.setdefault(name, x)
        return found

    @property
    def _rows_over(self) -> list[int]:
        """Numbers of the inner mesh's axes that cut the rows of every stage's inputs."""
        over = [row.rows_over for row in self.STAGES]
        return list(commonprefix([axes for axes in over if axes is not None]))

    @property
    def data_shard(self) -> DataShard:
        """Which rows of a batch this rank needs; all stages have the same."""
        return data_shard(self.inputs, self._inner, self._rows_over)

    def shard_rows_of(self, **batch: Tensor) -> dict[str, Tensor]:
        """This rank's rows of a whole batch, of all micro-batches together: what `step` takes."""
        shard, inputs = self.data_shard, self.inputs
        return {name: shard.of(x) if 0 in inputs[name].free else x for name, x in batch.items()}

    def _parts(self, rows: Mapping[str, object], count: int) -> list[dict[str, Any]]:
        inputs = self.inputs
        weights = self._modules_here[0].moved_weights  # which cutting does not touch
        cutting = Trained(self._inner, inputs, {}, (), None, self, weights, ())
        return cutting.parts(tensors_of(inputs, rows), count)

    def _shares(self, parts: Sequence[Mapping[str, Any]]) -> Tensor | None:
        """By micro-batch what its mean losses weigh in the step, on ranks of the last stage."""
        labels = self.STAGES[-1].runs.LABELS
        last = len(self.STAGES) - 1
        if labels is None or len(parts) == 1 or last not in self._numbers:
            return None
        if not isinstance(labels, Labels):
            raise ValueError(
                f"this module takes steps of one micro-batch: {labels}; let the model compute its"
                " loss by F.cross_entropy of labels that are an input, ignored ones -100"
            )
        counts = torch.stack([labels.count(part[labels.input]) for part in parts])
        counts = counts.to(self.mesh.device)
        inputs = self.inputs
        if 0 in inputs[labels.input].free:
            counts = add_over_shards(counts, inputs, self._inner, self._rows_over)
        return counts.double() * len(parts) / counts.sum()

    def _dtype(self) -> torch.dtype:
        return next((x.dtype for x in self.parameters() if x.is_floating_point()), torch.float32)

    # --- tensors that several stages have --------------------------------------------------------

    def _tie(
        self, name: str, numbers: Sequence[int], rank_of: Sequence[int]
    ) -> tuple[str, list[int], int, Any]:
        """A parameter of stages `numbers`, those of them that are here, how many ranks have one at
        this rank's place, and their group."""
        ranks = sorted({rank_of[number] for number in numbers})
        inner = self._inner
        mine = None
        for place in range(inner.size):
            group = dist.new_group([place + rank * inner.size for rank in ranks])
            mine = group if place == inner.rank else mine
        return name, [n for n in numbers if n in self._numbers], len(ranks), mine

    @torch.no_grad()
    def _add_tied(self) -> None:
        """A parameter of several stages has in each the sum of their gradients."""
        modules = dict(zip(self._numbers, self._modules_here, strict=True))
        for name, numbers, ranks, group in self._tied:
            own = [modules[number].tensors.local(name) for number in numbers]
            if not own:
                continue
            gradients = [torch.zeros_like(x) if x.grad is None else x.grad for x in own]
            total = sum(gradients[1:], gradients[0])
            if ranks > 1:
                dist.all_reduce(total, group=group)
                size = total.numel() * total.element_size()
                brought = find_collective("all_reduce").received(ranks) * size
                record("all_reduce", self.mesh.names[0], "backward", brought, (ranks,))
            for number, x in enumerate(own):
                x.grad = total.clone() if number else total

    def pieces(self) -> list[Piece]:
        """What this rank holds of the model's tensors; of one that several stages have each holds a
        copy."""
        found: list[Piece] = []
        for number, module in zip(self._numbers, self._modules_here, strict=True):
            for piece in module.tensors.pieces():
                sharing = self._holders[piece.original]
                copies, copy = piece.copies, piece.copy
                found.append(
                    replace(
                        piece,
                        copies=copies * len(sharing),
                        copy=sharing.index(number) * copies + copy,
                    )
                )
        return found

    # --- parameters ------------------------------------------------------------------------------

    @property
    def _modules_here(self) -> list[ShardedModule]:
        return [module for module in self.stages if isinstance(module, ShardedModule)]

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of this rank's stages, by the names that they have in the whole model."""
        for module in self._modules_here:
            yield from module.named_parameters(prefix, recurse, remove_duplicate)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """This rank's slices by the names that they have in the whole model."""
        found: dict[str, Any] = {}
        for module in self._modules_here:
            found |= module.state_dict(*args, **kwargs)
        return found

    def load_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Slices are those of this plan's ranks: full tensors go in by `from_state_dict`."""
        raise RuntimeError("a pipeline takes full tensors: ShardedModel.from_state_dict(tensors)")

    @classmethod
    def from_state_dict(
        cls,
        tensors: Mapping[str, Tensor],
        mesh: Mesh | None = None,
        device: torch.device | str | None = None,
        *,
        compile: bool | None = None,
    ) -> Self:
        """The module with this rank's slices of full `tensors`, as the original's `state_dict()`.

        Raises ValueError as that of `ShardedModule` does.
        """
        model = cls(mesh, device, compile=compile)
        model._load(StateDict(tensors))
        return model

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        mesh: Mesh | None = None,
        device: torch.device | str | None = None,
        *,
        compile: bool | None = None,
    ) -> Self:
        """The module with weights from a safetensors file or a Hugging Face folder of them."""
        with Safetensors(path) as source:
            model = cls(mesh, device, compile=compile)
            model._load(source)
        return model

    def _load(self, source: Source) -> None:
        names = [held(each) for each in self._classes]
        for number, module in zip(self._numbers, self._modules_here, strict=True):
            others = {name for n, each in enumerate(names) if n != number for name in each}
            module.tensors.load(OfStage(source, others - names[number]))

    def reset_parameters(self, seed: int = 0) -> None:
        """Random weights that depend on `seed` and original names alone, as in `ShardedModule`."""
        for module in self._modules_here:
            module.reset_parameters(seed)

    def full_state_dict(self) -> dict[str, Tensor]:
        """Original names (aliases too) -> full tensors, on every rank."""
        found: dict[str, Tensor | None] = {}
        for module in self._modules_here:
            found |= module.full_state_dict()
        return {name: x for name, x in self._everywhere(found).items() if x is not None}

    def full_gradients(self) -> dict[str, Tensor | None]:
        """Original names -> full gradients, on every rank; None for parameters that have none."""
        found: dict[str, Tensor | None] = {}
        for module in self._modules_here:
            found |= module.full_gradients()
        return self._everywhere(found)

    def _everywhere(self, own: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
        """What the ranks of a pipeline have, together; each is whole on the ranks that have it."""
        axis = self.mesh[self.mesh.names[0]]
        if axis.size == 1:
            return dict(own)
        told: list[Any] = [None] * axis.size
        mine = {name: None if x is None else (tuple(x.shape), x.dtype) for name, x in own.items()}
        dist.all_gather_object(told, mine, group=axis.group)
        found: dict[str, Tensor | None] = {}
        for source, names in enumerate(told):
            first = source * self._inner.size + self._inner.rank
            for name, form in names.items():
                if name in found:
                    continue
                if form is None:
                    found[name] = None
                    continue
                shape, dtype = form
                x = own[name] if source == self._place else None
                if x is None:
                    x = torch.empty(shape, dtype=dtype, device=self.mesh.device)
                x = x.detach().contiguous()
                dist.broadcast(x.reshape(-1).view(torch.uint8), first, group=axis.group)
                found[name] = x
        return found

    def optimizer(
        self,
        kind: OptimizerKind = "adamw",
        *,
        lr: float,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> Optimizer:
        """As that of `ShardedModule`, over this rank's parts of its stages."""
        pieces, own = self.pieces(), groups or {}
        names = originals(self._classes, trained=True)
        whole = Matrices(matrices(self._classes), self._wholes, self._inner)
        return make_optimizer(pieces, kind, lr, own, options, whole, names)

    def _wholes(self, names: Collection[str]) -> list[Whole]:
        """Those of this rank's stages, which the ranks of the inner mesh share."""
        return [whole for module in self._modules_here for whole in module.tensors.wholes(names)]

    def ema(self, decay: float) -> Ema:
        """As that of `ShardedModule`, of this rank's parts of its stages."""
        return Ema(self.pieces(), decay)

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """As that of `ShardedModule`: the norm of all stages' gradients together."""
        return clip_gradients(
            trained(self.pieces()), self.mesh, max_norm, norm_type,
            error_if_nonfinite=error_if_nonfinite,
        )  # fmt: skip

    # --- checkpoints of a run --------------------------------------------------------------------

    def save_checkpoint(
        self,
        folder: str | Path,
        optimizer: Optimizer | None = None,
        *,
        step: int,
        ema: Ema | None = None,
        extra: Any = None,
        keep: int = 2,
    ) -> None:
        """As that of `ShardedModule`: it loads into any other plan, with stages and without."""
        self._checkpoints.save(Path(folder), self.pieces(), optimizer, step, ema, extra, keep)

    def wait_for_checkpoint(self) -> None:
        """As that of `ShardedModule`."""
        self._checkpoints.wait()

    def load_checkpoint(
        self,
        folder: str | Path,
        optimizer: Optimizer | None = None,
        *,
        ema: Ema | None = None,
    ) -> Resumed:
        """As that of `ShardedModule`: from any other plan, with stages and without."""
        resumed = self._checkpoints.load(Path(folder), self.pieces(), optimizer, ema)
        name = self.mesh.names[0]
        self._inner.manual_seed(stable_seed(self.mesh.seed, name, self._place))
        return resumed

    @property
    def _checkpoints(self) -> Checkpoints:
        if self._run_of is None:
            from ..training.saving import Checkpoints  # which loads much of torch

            self._run_of = Checkpoints(self.mesh, originals(self._classes))
        return self._run_of

    # --- demonstration ---------------------------------------------------------------------------

    @classmethod
    def demo(cls, steps: int = 3) -> None:
        """Run `steps` steps on random weights and inputs; rank 0 prints time and peak memory."""
        model = cls(started_mesh(cls.MESH), compile=compiled_unless_asked())
        model.reset_parameters()
        clock = Clock(model.mesh, steps)
        if not model._trains:
            demonstrate_serving(model.room, model._planned(), clock)
            return
        rows: dict[str, Any] = dict(random_rows(model.inputs, model.data_shard, cls.MICRO_BATCHES))
        optimizer = demo_optimizer(cls.OPTIMIZER, model)

        def run() -> str:
            loss = model.step(**rows)
            if optimizer is not None:
                optimizer.step()
            model.zero_grad(set_to_none=True)
            return f", loss {loss.item():.4f}"

        best = clock.best("step", run)
        clock.say(f"best {best * 1e3:.1f} ms per step")


def _programs_of(module: ShardedModule) -> list[ShardedModule]:
    """A stage's own program, and that for decoding, if it is another."""
    decode = module.programs()[DECODE.name].run
    return [module, decode] if isinstance(decode, ShardedModule) and decode != module else [module]


__all__ = ["PipelinedModule"]

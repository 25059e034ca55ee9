"""The base class of generated modules: what a user calls; the work is done beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.checkpoint import checkpoint

from ...compat.torch import DDP_ASKS
from ...facts.phases import APPEND, DECODE, PREFILL, TRAIN, find_phase
from ...facts.spec import parse_spec, zigzag_dims
from ...facts.updated import updated_buffer
from ..cache.cache import KVCache
from ..cache.declared import Declared
from ..cache.state import StateCache
from ..gathering.weights import Weight
from ..mesh.batches import (
    Fixed,
    Input,
    Output,
    gather_outputs,
    look_up,
    named_arguments,
    pack,
    refuse_gradients,
    shard_inputs,
    tensors_of,
    wants_gradient,
)
from ..mesh.keeping import Contexts, both, keeping
from ..mesh.mesh import Mesh
from ..mesh.parts import own_part
from ..mesh.rows import DataShard, data_shard, shard_rows
from ..serving.conversing import Conversing
from ..serving.program import Program, Served
from ..serving.serving import Serving
from ..training.ema import Ema
from ..training.norm import clip_gradients
from ..training.optimizer import Kind as OptimizerKind
from ..training.optimizer import make_optimizer
from ..training.pieces import Piece, trained
from ..training.step import Labels, Trained, Weights
from ..training.watch import Watch
from ..training.wholes import Matrices
from .checkpoint import Experts, Safetensors, StateDict
from .compiled import Backend, by_default, compile_layers
from .demo import (
    Clock,
    OptimizerName,
    compiled_unless_asked,
    demonstrate,
    demonstrate_serving,
    started_mesh,
)
from .demo import make_optimizer as make_demo_optimizer
from .layers import Layer, install_layers, per_layer
from .moving import AsPlanned, make_schedule
from .nested import install_modules
from .parameters import Original, Param, matrices, originals, param_of_layer
from .pretrained import Config, config_of, save_pretrained
from .state import Gathered, State
from .tree import owner_of

if TYPE_CHECKING:
    from ..training.saving import Checkpoints, Resumed


class ShardedModule(Conversing, nn.Module):
    """A model of which this rank holds its part; generated modules are subclasses.

    A subclass states `MESH` (axis sizes, outermost first), `PARAMETERS` (by original name, or as
    parts of an original), `INPUTS`, `OUTPUTS`, `LAYERS` (classes of repeated blocks), modules as
    `Sharded` does, and defines `forward`.  A stage of a pipeline has in `FIRST_LAYERS` which of the
    model's layers its own begin with.  Every tensor of `PARAMETERS` is registered under its
    dotted name and holds this rank's slice: zeros until it is loaded or `reset_parameters` is
    called.  `WEIGHTS` has those outside the layers that `forward` uses in another layout or dtype;
    gradients go between ranks in dtype `REDUCE` (None: that in which they come).  Trained
    parameters of two or three dims that are no matrices of hidden layers are in `NOT_MATRICES`.
    `MICRO_BATCHES` and `LABELS` serve `step`; the labels are an input, or None where every row has
    as many, or a sentence that says why it is not known which count.  `FIXED` are inputs that are
    no tensors, by path: they must be as they were planned.  `PHASE` and `OPTIMIZER` serve `demo`.
    """

    MESH: ClassVar[Mapping[str, int]]
    PARAMETERS: ClassVar[Mapping[str, Param]]
    INPUTS: ClassVar[Mapping[str, Input]]
    FIXED: ClassVar[Fixed] = {}
    OUTPUTS: ClassVar[Sequence[Output]]
    CACHES: ClassVar[Mapping[str, Declared]] = {}
    LAYERS: ClassVar[Mapping[str, Sequence[type[Layer]]]] = {}
    FIRST_LAYERS: ClassVar[Mapping[str, int]] = {}
    MODULES: ClassVar[Mapping[str, type[nn.Module]]] = {}
    OPTIONS: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    WEIGHTS: ClassVar[Mapping[str, Weight]] = {}
    REDUCE: ClassVar[torch.dtype | None] = None
    NOT_MATRICES: ClassVar[Sequence[str]] = ()
    MICRO_BATCHES: ClassVar[int] = 1
    LABELS: ClassVar[Labels | str | None] = None
    PHASE: ClassVar[str] = TRAIN.name
    CONTEXT: ClassVar[int] = 0  # tokens of each sequence that are cached before, as planned
    OPTIMIZER: ClassVar[OptimizerName] = "none"
    DECODE: ClassVar[type[ShardedModule] | None] = None
    _originals: ClassVar[Mapping[str, Original]]  # what PARAMETERS make up

    def __init__(
        self,
        mesh: Mesh | None = None,
        device: torch.device | str | None = None,
        *,
        shared: ShardedModule | None = None,
        compile: bool | None = None,
    ) -> None:
        """On `mesh` (default: one over all ranks); with the parameters of `shared` if given.

        `compile` as in `compile_layers`, by inductor.  None: on CUDA, but for the program for
        decoding, whose steps are captured whole.
        """
        super().__init__()
        self.mesh = Mesh.create(self.MESH, device) if mesh is None else mesh
        if dict(zip(self.mesh.names, self.mesh.sizes, strict=True)) != dict(self.MESH):
            wanted = " x ".join(f"{name}={size}" for name, size in self.MESH.items())
            raise ValueError(f"this module was planned for mesh {wanted}, got {self.mesh}")
        install_modules(self, self.mesh)
        install_layers(self, self.mesh, self.LAYERS, self.FIRST_LAYERS)
        self._state.register(None if shared is None else shared._state)
        self._run: Checkpoints | None = None
        self._schedule = make_schedule(
            self, self.mesh, self.PARAMETERS, self.WEIGHTS, tuple(self.LAYERS), self.REDUCE,
            self.FIRST_LAYERS,
        )  # fmt: skip
        self._updated: Mapping[str, Tensor] = {}  # whole new values of buffers, of this forward
        self._planned: AsPlanned | None = AsPlanned(self)  # until the first forward
        watched = find_phase(self.PHASE).backward and self.mesh.size > 1
        self._watch = Watch(self.mesh, self._pieces) if watched else None
        decode = self.DECODE  # in a tuple, because its parameters are this module's
        self._decoding = () if decode is None else (decode(self.mesh, shared=self, compile=False),)
        if compile:
            self.compile_layers()
        elif compile is None and self.LAYERS and by_default(self.device):
            compile_layers(self, "inductor", fullgraph=True)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "PARAMETERS" in cls.__dict__:
            table = per_layer(cls.PARAMETERS, param_of_layer)
            cls.PARAMETERS = table  # pyright: ignore[reportConstantRedefinition]
            cls._originals = originals(table)
        if "NOT_MATRICES" in cls.__dict__:
            others = tuple(per_layer(dict.fromkeys(cls.NOT_MATRICES)))
            cls.NOT_MATRICES = others  # pyright: ignore[reportConstantRedefinition]
        if "CACHES" in cls.__dict__:
            cls.CACHES = per_layer(cls.CACHES)  # pyright: ignore[reportConstantRedefinition]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`, with all weights as it uses them (see `gathering/schedule.py`).

        Raises ValueError at the first call if parameters or modules have come or gone since, for an
        input that wants a gradient which was not planned, and where what failed was given other
        arguments than planned.
        """
        if self._planned is not None:
            self._planned.refuse_changes(self)
            self._planned = None
        if self._watch is not None:
            self._watch.begin_forward()
        if torch.is_grad_enabled() and wants_gradient((args, kwargs)):
            given = named_arguments(self.forward, args, kwargs)
            refuse_gradients(self.INPUTS, tensors_of(self.INPUTS, given, self.FIXED))
        try:
            with self._schedule.model():
                out = super().__call__(*args, **kwargs)
        except (TypeError, AttributeError, RuntimeError) as error:
            self._check_arguments(args, kwargs, error)
            raise
        if self._watch is not None:
            self._watch.end_forward(look_up(out, output.path) for output in self._returned)
        self._state.update(self._updated)  # now that no weight on the move hides a buffer
        self._updated = {}
        return out

    def _check_arguments(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], error: Exception
    ) -> None:
        """Raises ValueError from `error`, naming the input, unless there is a tensor wherever one
        is planned."""
        if self.INPUTS:  # a module written by hand may say nothing of them
            try:
                tensors_of(self.INPUTS, named_arguments(self.forward, args, kwargs), self.FIXED)
            except ValueError as mistake:
                raise mistake from error

    def __getattr__(self, name: str) -> Any:
        """Raises RuntimeError for DistributedDataParallel, which asks for something of its own."""
        if name == DDP_ASKS:
            raise RuntimeError(
                "DistributedDataParallel (or what uses it: accelerate, transformers.Trainer) would"
                " give every rank the parts of parameters that rank 0 has: this module runs on all"
                " ranks and reduces its gradients itself, so train it as it is (examples/train.py)"
            )
        return super().__getattr__(name)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.mesh.device

    def generator(self, *sharded_axes: str) -> torch.Generator:
        """Random numbers that differ along `sharded_axes` and agree along all others."""
        return self.mesh.generator(sharded_axes)

    def recompute(self, layer: Layer, *inputs: Tensor, keep: str = "") -> Any:
        """`layer(*inputs)`, keeping only the inputs: backward runs the layer's forward again.

        With `keep`, such as "products, attention", it keeps the results of these as well, as far as
        backward or the second run takes them, which does not compute them again.
        Dropout draws the same masks the second time.
        """
        if not torch.is_grad_enabled():
            return layer(*inputs)
        if keep and layer.keeps_compiled:
            return layer.keeping(keep, *inputs)
        run = layer.eagerly if keep else layer

        def contexts() -> Contexts:
            replayed = self.mesh.replayed_randomness()
            return both(replayed, keeping(keep)) if keep else replayed

        return checkpoint(
            run, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )

    def compile_layers(self, backend: Backend = "inductor", *, fullgraph: bool = True) -> None:
        """Run layers compiled, by a backend of `torch.compile`: one graph for each class of layers,
        made when the first of them runs; those of the program for decoding, too.

        Layers are cut in several graphs at the routing of experts, at random draws that ranks agree
        on and at states of earlier tokens.  One that can't be compiled so raises RuntimeError,
        which names it; `fullgraph=False` compiles what can be.  Raises ValueError if there are no
        layers.
        """
        for model in (self, *self._decoding):
            compile_layers(model, backend, fullgraph=fullgraph)

    def local_part(self, whole: Tensor, spec: str) -> Tensor:
        """This rank's slice of a whole tensor in `spec`, such as the spec of an output."""
        return own_part(whole, parse_spec(spec), self.mesh, zigzag_dims(spec))

    def pack(self, *tensors: Tensor) -> Any:
        """This rank's outputs in the structure that the original model returns.

        New values of buffers are put back after `forward`.  Raises RuntimeError in eval mode where
        the program is that of training mode, and changes buffers.
        """
        given = {output.path: tensor for output, tensor in zip(self.OUTPUTS, tensors, strict=True)}
        updated = {name: x for path, x in given.items() if (name := updated_buffer(path))}
        if updated and self.PHASE == TRAIN.name and not self.training:
            raise RuntimeError(
                f"this module was planned in training mode, in which it changes {min(updated)}; to "
                "evaluate, plan with --phase prefill, and load the full_state_dict() of this there"
            )
        self._updated = updated
        returned = self._returned
        return pack(returned, [given[output.path] for output in returned])

    # --- parameters in and out -------------------------------------------------------------------

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

        Of tied tensors one name is enough, and experts may be stacked or a tensor each (see
        `checkpoint.py`).  Raises ValueError listing everything that is missing, unexpected, given
        twice or of the wrong shape.
        """
        model = cls(mesh, device, compile=compile)
        model._state.load(StateDict(tensors))
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
        """The module with weights from a safetensors file or a Hugging Face folder of them.

        Each rank reads its own slices only, of its own experts only.  Forms and errors as in
        `from_state_dict`.
        """
        with Safetensors(path) as source:
            model = cls(mesh, device, compile=compile)
            model._state.load(source)
        return model

    def load_from(self, other: ShardedModule) -> None:
        """The weights of `other`, a module of the same model under any other plan: to serve, say,
        what has just been trained.

        It lies on the same ranks, its mesh and layouts are its own; numbers are cast to this
        module's dtypes.  All ranks call it together; one full tensor at a time is in memory.
        Raises ValueError listing names and shapes that do not fit, or for another number of ranks.
        """
        if other.mesh.size != self.mesh.size:
            raise ValueError(
                f"this module is on {self.mesh.size} ranks, the other on {other.mesh.size}: save"
                " it with save_pretrained, and load that with from_checkpoint"
            )
        self._state.load(Gathered(other._state))

    def reset_parameters(self, seed: int = 0) -> None:
        """Random weights that depend on `seed` and original names alone, not on mesh or specs.

        Matrices are normal with variance 1 / (last dim), vectors near 1, biases near 0.  Buffers
        are zero.
        """
        self._state.reset(seed)

    def full_gradients(self) -> dict[str, Tensor | None]:
        """Original names -> full gradients; None for parameters that have none."""
        return self._state.gradients()

    def full_state_dict(self, experts: Experts = "stacked") -> dict[str, Tensor]:
        """Original names (aliases too) -> full tensors, on this rank's device.

        `experts`: `stacked` as the original has them, or a tensor for each expert and matrix:
        `separate` as `experts.3.gate_proj.weight`, `mixtral` as `experts.3.w1.weight` in
        `block_sparse_moe`.  Raises ValueError where names and shapes do not tell how to do that.
        """
        return self._state.full(experts)

    def save_pretrained(
        self,
        folder: str | Path,
        config: Config | None = None,
        *,
        dtype: torch.dtype | None = None,
        experts: Experts = "stacked",
        max_shard_bytes: int = 5 * 10**9,
    ) -> None:
        """Write parameters and buffers as `transformers` loads them, and as `from_checkpoint` does.

        A folder of safetensors files of up to `max_shard_bytes` bytes (or one tensor), with their
        index and `config.json`: `config`, a path, a dict or a transformers config; not given, that
        of the plan beside this module's file, if it was made of one.  Real numbers are cast to
        `dtype`; `experts` as in `full_state_dict`.  Of tied tensors the first name is written.

        All ranks call it together, rank 0 writes.  Raises RuntimeError on all of them where it
        cannot, for want of room on the disk, say, or because the folder is there; nothing is left.
        """
        found = config_of(config, type(self))
        save_pretrained(self._state, Path(folder), found, dtype, experts, max_shard_bytes)

    def local(self, name: str) -> Tensor:
        """This rank's slice of the parameter, buffer or constant of that name in `PARAMETERS`."""
        return self._state.local(name)

    @property
    def tensors(self) -> State:
        """What this rank holds, by the names of the original model."""
        return self._state

    @property
    def moved_weights(self) -> Weights:
        """What brings weights and sends gradients off."""
        return self._schedule

    @property
    def _state(self) -> State:
        return State(self, self.PARAMETERS, self._originals, self.mesh)

    # --- training --------------------------------------------------------------------------------

    def _pieces(self) -> list[Piece]:
        return self._state.pieces()

    def optimizer(
        self,
        kind: OptimizerKind = "adamw",
        *,
        lr: float,
        groups: Mapping[str, Mapping[str, Any]] | None = None,
        **options: Any,
    ) -> Optimizer:
        """`torch.optim`'s AdamW or SGD over this rank's parts, fused on CUDA; or Muon.

        `groups` has options for parameters by pattern of original name, of which the first that
        matches counts: `{"*norm*": {"weight_decay": 0.0}}`; `options` are those of the others.
        Any other optimizer that is elementwise runs over `parameters()` as it is.  Raises
        ValueError for a pattern that matches nothing.

        `muon` is `torch.optim.Muon` of the original's matrices, gathered for it on one rank each;
        what is in `NOT_MATRICES`, and all that has other dims, is stepped by AdamW, of which
        `adamw` has the options.  `{"*router*": {"kind": "adamw"}}` in `groups` moves more there.
        """
        own = Matrices(matrices(self.PARAMETERS, self.NOT_MATRICES), self.tensors.wholes, self.mesh)
        return make_optimizer(self._state.pieces(), kind, lr, groups or {}, options, own)

    def ema(self, decay: float) -> Ema:
        """A moving average of the trained parameters, of this rank's parts, float32 or wider.

        Its `update()` follows each step of the optimizer; `with ema.applied():` the module has the
        averages as its parameters; `save_checkpoint` and `load_checkpoint` take it.
        """
        return Ema(self._state.pieces(), decay)

    def step(
        self,
        /,
        *args: Any,
        micro_batches: int | None = None,
        error_if_nonfinite: bool = False,
        **rows: Any,
    ) -> Tensor:
        """The loss () of a step, whose gradients are then in `.grad`; the same on all ranks.

        Takes this rank's rows, as `shard_rows`, of all `micro_batches` (default: as planned)
        together, the first rows first.  The loss is the first output that is one number: cross
        entropies are means over all labels of the step that count, on all ranks and in all
        micro-batches; its other terms are means over micro-batches.

        Gradients of several micro-batches are summed in float32 or wider, and go between ranks as
        often as planned.  Raises ValueError where rows do not divide or it is not known which
        labels count, RuntimeError with `error_if_nonfinite` on every rank if the loss is NaN or
        infinite.
        """
        if not find_phase(self.PHASE).backward:
            raise RuntimeError(
                f"this module was planned for {self.PHASE}, which has no backward pass; plan with"
                " --phase train to take steps"
            )
        named = named_arguments(self.forward, args, rows)
        count = self.MICRO_BATCHES if micro_batches is None else micro_batches
        loss = self._trained.take_step(named, count)
        if error_if_nonfinite and not bool(loss.isfinite()):
            raise RuntimeError(
                f"the loss of this step is {loss.item()}; do not use its gradients: skip the step,"
                " or go on from the last checkpoint with a lower learning rate"
            )
        return loss

    def evaluate(self, /, *args: Any, micro_batches: int | None = None, **rows: Any) -> Tensor:
        """The loss () that `step` would return of these rows, without gradients.

        Takes what `step` takes.  Call `eval()` before, where the model has dropout.
        """
        named = named_arguments(self.forward, args, rows)
        count = self.MICRO_BATCHES if micro_batches is None else micro_batches
        return self._trained.evaluate(named, count)

    @property
    def _trained(self) -> Trained:
        return Trained(
            self.mesh, self.INPUTS, self.FIXED, self._returned, self.LABELS, self, self._schedule,
            tuple(self.parameters()),
        )  # fmt: skip

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, error_if_nonfinite: bool = False
    ) -> Tensor:
        """Scale all gradients so that their norm together is at most `max_norm`; the norm before.

        As `torch.nn.utils.clip_grad_norm_` of the original model: every number of every gradient
        counts once, whichever ranks hold it, and all ranks get the same.  Raises RuntimeError with
        `error_if_nonfinite` on every rank if the norm is NaN or infinite.
        """
        return clip_gradients(
            trained(self._state.pieces()), self.mesh, max_norm, norm_type,
            error_if_nonfinite=error_if_nonfinite,
        )  # fmt: skip

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
        """Save parameters, buffers, the optimizer's states, `ema`, `step` and `extra` in `folder`.

        All ranks call it together, on a file system that they share.  The tensors are copied to
        the CPU at once and written while training goes on; the next call, or
        `wait_for_checkpoint`, waits for that.  The `keep` last complete checkpoints stay, and a
        process that is killed at any time leaves them as they are.  `extra` is plain data and
        tensors, that of rank 0: where the data stands, a schedule's state.

        Raises ValueError for states of an optimizer that is not elementwise, and where the folder
        has a checkpoint of that step or a later one.
        """
        if self._watch is not None:
            self._watch.at_checkpoint()
        pieces = self._state.pieces()
        self._checkpoints.save(Path(folder), pieces, optimizer, step, ema, extra, keep)

    def wait_for_checkpoint(self) -> None:
        """Until the last checkpoint is complete.

        Raises RuntimeError where it could not be written, for want of room on the disk, say.
        """
        self._checkpoints.wait()

    def load_checkpoint(
        self,
        folder: str | Path,
        optimizer: Optimizer | None = None,
        *,
        ema: Ema | None = None,
    ) -> Resumed:
        """The last complete checkpoint in `folder` into this module, `optimizer` and `ema`.

        It may come from any other plan of the model, on any mesh and number of ranks.  Random
        numbers start anew, from the run's seed and the step.  Raises FileNotFoundError if there is
        none, ValueError listing names and shapes if it is one of another model.
        """
        return self._checkpoints.load(Path(folder), self._state.pieces(), optimizer, ema)

    @property
    def _checkpoints(self) -> Checkpoints:
        if self._run is None:
            from ..training.saving import Checkpoints  # which loads much of torch

            self._run = Checkpoints(self.mesh)
        return self._run

    # --- batches in, results out -----------------------------------------------------------------

    def shard_inputs(self, /, *args: Any, **batch: Any) -> dict[str, Any]:
        """`forward`'s arguments by name for those of the original: this rank's parts of tensors.

        Arguments keep their form: dicts, lists, tuples and dataclasses are copied.  Raises
        ValueError naming the input whose name, value, dtype or shape does not fit the plan.
        """
        given = named_arguments(self.forward, args, batch)
        return shard_inputs(self.INPUTS, given, self.mesh, self.FIXED)

    @property
    def data_shard(self) -> DataShard:
        """Which rows of each batch this rank needs: part `index` of `count` equal ones."""
        return data_shard(self.INPUTS, self.mesh)

    def shard_rows(self, /, *args: Any, **rows: Any) -> dict[str, Any]:
        """As `shard_inputs`, where this rank has loaded the rows of its `data_shard` alone."""
        given = named_arguments(self.forward, args, rows)
        return shard_rows(self.INPUTS, given, self.mesh, self.FIXED)

    def unpack(self, /, **arguments: Any) -> tuple[Tensor, ...]:
        """The tensors of `INPUTS` in arguments of any form.

        Raises ValueError for another form than planned, and other values than `FIXED`.
        """
        return tuple(tensors_of(self.INPUTS, arguments, self.FIXED).values())

    def gather_outputs(self, out: Any) -> Any:
        """What the original model would return: full tensors, the same on all ranks.

        A loss that every rank computes of them, in the same way, gives each its own gradients;
        `torch.no_grad()` around this saves the memory for that.
        """
        return gather_outputs(self._returned, out, self.mesh)

    @property
    def _returned(self) -> list[Output]:
        """What the model returns, without the new values of buffers."""
        return [output for output in self.OUTPUTS if not updated_buffer(output.path)]

    # --- serving ---------------------------------------------------------------------------------
    # All tensors here are full ones, the same on every rank.

    def programs(self) -> dict[str, Program]:
        """What runs in each phase of serving, by its name; all have the same parameters."""
        own = self._program
        decoding = self._decoding[0]._program if self._decoding else own
        return {self.PHASE: own, PREFILL.name: own, APPEND.name: own, DECODE.name: decoding}

    def set_cache(self, name: str, cache: KVCache | StateCache | None) -> None:
        """Put this rank's part of a cache, None for none, where `forward` looks for it."""
        for module in (self, *self._decoding):
            owner, leaf = owner_of(module, name)
            setattr(owner, leaf, cache)

    def _serve(
        self, batch: int, tokens: int, total_tokens: int | None, capture: bool | None
    ) -> Serving:
        served = Served(
            type(self).__name__, self.mesh, self.programs(), self.set_cache,
            (self, *self._decoding),
        )  # fmt: skip
        return Serving(served, batch, tokens, total_tokens, capture)

    @property
    def _program(self) -> Program:
        return Program(self.INPUTS, self._returned, self.CACHES, self, self.CONTEXT, self.FIXED)

    # --- demonstration ---------------------------------------------------------------------------

    @classmethod
    def demo(cls, steps: int = 3) -> None:
        """Run `steps` steps on random weights and inputs; rank 0 prints time and peak memory.

        On CUDA layers are compiled, unless the command line has `--eager`.

        A module with a KV cache runs its phase `steps` times over a cache as full as planned, of
        random keys and values; one with a program for decoding then runs that, too, and converts
        caches where the two lay them out differently.
        """
        model = cls(started_mesh(cls.MESH), compile=compiled_unless_asked())
        model.reset_parameters()
        clock, phase = Clock(model.mesh, steps), find_phase(cls.PHASE)
        if cls.CACHES:
            planned = {phase: model._program}
            for decoding in model._decoding:
                planned[DECODE] = decoding._program
            demonstrate_serving(model.room, planned, clock)
        else:
            optimizer = make_demo_optimizer(cls.OPTIMIZER, model) if phase.backward else None
            demonstrate(
                model, model._program, optimizer, clock, model.step, cls.MICRO_BATCHES,
                trains=phase.backward,
            )  # fmt: skip

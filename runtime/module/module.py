"""The base class of generated modules: shards in, shards out, checkpoints, a demonstration."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...facts.blocks import block, blocks, local_shape
from ...facts.spec import R, Spec, parse_spec, zigzag_dims
from ..cache.cache import KVCache
from ..cache.pools import specs_of
from ..gathering.ahead import Gather, gathering_ahead
from ..gathering.regather import regathering
from ..mesh.collectives import Move
from ..mesh.layout import to_zigzag
from ..mesh.mesh import Mesh, stable_seed
from ..serving.generate import ServePhase, Serving, checked_lengths, generate
from .checkpoint import Experts, OwnNames, Safetensors, Source, StateDict, Writer
from .layers import Layer, install_layers, per_layer
from .nested import Sharded, install_modules
from .parameters import Original, Param, originals, param_of_layer
from .tree import owner_of

Path_: TypeAlias = tuple[str | int, ...]


@dataclass(frozen=True, slots=True)
class Input:
    """A keyword of the original model's forward: planned full shape, and how it is sharded.

    Dims in `free` may have other sizes than planned: multiples of `step`, which has one number per
    dim (default: 1).  Integers are below `high` (the demonstration draws them so).
    """

    spec: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    free: tuple[int, ...] = ()
    high: int = 2
    step: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Cache:
    """The KV cache of one attention: sizes of the original model, and how it is sharded.

    `heads` counts all key heads.  `spec` is over the dims batch 0, heads 1, sequence 2.  With
    `window` > 0 tokens are dropped that no later query attends.  With `values_in_keys` the values
    are the first `value_dim` numbers of the keys, and only keys are stored.

    Where the program for decoding has another spec, `path` are the specs that the cache takes one
    by one from `spec` to that (see `recache.py`).

    Caches of one `table`, window and cut of batch and sequence share a page table, and store the
    same tokens in every step.
    """

    heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype
    spec: str
    window: int = 0
    values_in_keys: bool = False
    path: tuple[str, ...] = ()
    table: int = 0


@dataclass(frozen=True, slots=True)
class Output:
    """One tensor in what the original model returns, by its path of keys, `()` if it is bare."""

    path: tuple[str | int, ...]
    spec: str
    shape: tuple[int, ...]


class Outputs(dict[str, Any]):
    """A dictionary whose entries are attributes, too: `out["loss"]` is `out.loss`."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"no output `{name}`; there are {list(self)}") from None


class ShardedModule(nn.Module):
    """A model of which this rank holds its part; generated modules are subclasses.

    A subclass states `MESH` (axis sizes, outermost first), `PARAMETERS` (by original name, or as
    parts of an original), `INPUTS`, `OUTPUTS`, `LAYERS` (classes of repeated blocks), modules as
    `Sharded` does, and defines
    `forward`.  Every tensor of `PARAMETERS` is registered under its dotted name and holds this
    rank's slice: zeros until it is loaded or `reset_parameters` is called.  `PHASE` and
    `OPTIMIZER` serve `demo`; a module that never calls `gather_parameter` may say
    `REGATHER = False`, which saves the bookkeeping of saved tensors (about 4 microseconds for
    each).
    """

    MESH: ClassVar[Mapping[str, int]]
    PARAMETERS: ClassVar[Mapping[str, Param]]
    INPUTS: ClassVar[Mapping[str, Input]]
    OUTPUTS: ClassVar[Sequence[Output]]
    CACHES: ClassVar[Mapping[str, Cache]] = {}
    LAYERS: ClassVar[Mapping[str, Sequence[type[Layer]]]] = {}
    MODULES: ClassVar[Mapping[str, type[Sharded]]] = {}
    PHASE: ClassVar[Literal["train", "prefill", "decode", "append"]] = "train"
    CONTEXT: ClassVar[int] = 0  # tokens of each sequence that are cached before, as planned
    OPTIMIZER: ClassVar[Literal["adamw", "sgd", "none"]] = "none"
    REGATHER: ClassVar[bool] = True
    DECODE: ClassVar[type[ShardedModule] | None] = None
    _originals: ClassVar[Mapping[str, Original]]  # what PARAMETERS make up

    def __init__(
        self,
        mesh: Mesh | None = None,
        device: torch.device | str | None = None,
        *,
        shared: ShardedModule | None = None,
    ) -> None:
        """On `mesh` (default: one over all ranks); with the parameters of `shared` if given."""
        super().__init__()
        self._serving: Serving | None = None
        self.mesh = Mesh.create(self.MESH, device) if mesh is None else mesh
        if dict(zip(self.mesh.names, self.mesh.sizes, strict=True)) != dict(self.MESH):
            wanted = " x ".join(f"{name}={size}" for name, size in self.MESH.items())
            raise ValueError(f"this module was planned for mesh {wanted}, got {self.mesh}")
        install_modules(self, self.mesh)
        install_layers(self, self.mesh, self.LAYERS)
        for name, param in self.PARAMETERS.items():
            self._register(name, param, shared)
        decode = self.DECODE  # in a tuple, because its parameters are this module's
        self._decoding = () if decode is None else (decode(self.mesh, shared=self),)

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "PARAMETERS" in cls.__dict__:
            table = per_layer(cls.PARAMETERS, param_of_layer)
            cls.PARAMETERS = table  # pyright: ignore[reportConstantRedefinition]
            cls._originals = originals(table)
        if "CACHES" in cls.__dict__:
            cls.CACHES = per_layer(cls.CACHES)  # pyright: ignore[reportConstantRedefinition]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """`forward`; its parameters are gathered ahead, and freed after use (see `regathering`)."""
        if not self.REGATHER:
            return super().__call__(*args, **kwargs)
        with regathering(self.mesh), gathering_ahead(self.mesh, self.gathers()):
            return super().__call__(*args, **kwargs)

    def gathers(self) -> Iterable[Gather]:
        """The parameters that `forward` gathers, in that order; see `ahead.py`."""
        return ()

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.mesh.device

    def generator(self, *sharded_axes: str) -> torch.Generator:
        """Random numbers that differ along `sharded_axes` and agree along all others."""
        return self.mesh.generator(sharded_axes)

    def recompute(self, layer: Layer, *inputs: Tensor) -> Any:
        """`layer(*inputs)`, keeping only the inputs: backward runs the layer's forward again.

        Dropout draws the same masks the second time.
        """
        if not torch.is_grad_enabled():
            return layer(*inputs)

        def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            first, again = self.mesh.replayed_randomness()
            return first, _while_gathering(again, self.mesh, layer)

        return checkpoint(
            layer, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
        )

    def local_part(self, whole: Tensor, spec: str) -> Tensor:
        """This rank's slice of a whole tensor in `spec`, such as the spec of an output."""
        states = parse_spec(spec)
        for dim in zigzag_dims(spec):
            whole = to_zigzag(whole, dim, _ways(states, dim, self.mesh))
        own = blocks(whole.shape, states, self.mesh.sizes, self.mesh.coordinates)
        return whole[tuple(slice(part.start, part.stop) for part in own)]

    def pack(self, *tensors: Tensor) -> Any:
        """This rank's outputs in the structure that the original model returns."""
        paths = [output.path for output in self.OUTPUTS]
        return _rebuild(dict(zip(paths, tensors, strict=True)))

    # --- parameters in ---------------------------------------------------------------------------

    @classmethod
    def from_state_dict(
        cls,
        tensors: Mapping[str, Tensor],
        mesh: Mesh | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """The module with this rank's slices of full `tensors`, as the original's `state_dict()`.

        Of tied tensors one name is enough, and experts may be stacked or a tensor each (see
        `checkpoint.py`).  Raises ValueError listing everything that is missing, unexpected, given
        twice or of the wrong shape.
        """
        model = cls(mesh, device)
        model._load(StateDict(tensors))
        return model

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        mesh: Mesh | None = None,
        device: torch.device | str | None = None,
    ) -> Self:
        """The module with weights from a safetensors file or a Hugging Face folder of them.

        Each rank reads its own slices only, of its own experts only.  Forms and errors as in
        `from_state_dict`.
        """
        with Safetensors(path) as source:
            model = cls(mesh, device)
            model._load(source)
        return model

    @torch.no_grad()
    def reset_parameters(self, seed: int = 0) -> None:
        """Random weights that depend on `seed` and original names alone, not on mesh or specs.

        Matrices are normal with variance 1 / (last dim), vectors near 1, biases near 0.  Buffers
        are zero.
        """
        for name, original in self._originals.items():
            if original.kind == "constant":
                continue
            shape, dtype = original.shape, original.dtype
            whole = torch.zeros(shape, dtype=dtype, device=self.mesh.device)
            if original.kind == "parameter" and dtype.is_floating_point:
                generator = torch.Generator(self.mesh.device)
                generator.manual_seed(stable_seed(seed, name))
                spread = 0.02 if len(shape) < 2 else shape[-1] ** -0.5
                whole.normal_(0.0, spread, generator=generator)
                if len(shape) < 2 and not name.endswith("bias"):
                    whole += 1.0
            self._fill(name, StateDict({name: whole}), name)

    # --- batches in, results out -----------------------------------------------------------------

    def shard_inputs(self, **batch: Tensor) -> dict[str, Tensor]:
        """This rank's part of a full batch, on its device; keywords as the original's forward.

        Raises ValueError naming the input whose name, dtype or shape does not fit the plan.
        """
        return self._shard_inputs(self.INPUTS, batch)

    @torch.no_grad()
    def gather_outputs(self, out: Any) -> Any:
        """What the original model would return: full tensors, without gradients."""
        return _rebuild({output.path: self._gather_output(output, out) for output in self.OUTPUTS})

    @torch.no_grad()
    def full_gradients(self) -> dict[str, Tensor | None]:
        """Original names -> full gradients; None for parameters that have none."""
        gradients: dict[str, Tensor | None] = {}
        for name, original in self._originals.items():
            if original.kind != "parameter":
                continue
            local = [self.local(part) for part in original.params]
            if all(part.grad is None for part in local):
                gradients[name] = None
                continue
            parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in local]
            gradients[name] = self._gather(parts, original)
        return gradients

    @torch.no_grad()
    def full_state_dict(self, experts: Experts = "stacked") -> dict[str, Tensor]:
        """Original names (aliases too) -> full tensors, on this rank's device.

        `experts`: `stacked` as the original has them, or a tensor for each expert and matrix:
        `separate` as `experts.3.gate_proj.weight`, `mixtral` as `experts.3.w1.weight` in
        `block_sparse_moe`.  Raises ValueError where names and shapes do not tell how to do that.
        """
        writer = Writer(self._originals, experts)
        tensors: dict[str, Tensor] = {}
        for name, original in self._originals.items():
            if original.kind == "constant":
                continue
            parts = [self.local(part).detach() for part in original.params]
            whole = self._gather(parts, original)
            for key in (name, *original.aliases):
                tensors.update(writer.tensors(key, whole))
        return tensors

    def local(self, name: str) -> Tensor:
        """This rank's slice of the parameter, buffer or constant of that name in `PARAMETERS`."""
        if name not in self.PARAMETERS and name in self._originals:
            parts = ", ".join(self._originals[name].params)
            raise KeyError(f"this module keeps `{name}` in parts: {parts}")
        found: Any = self
        for part in name.split("."):
            found = getattr(found, part)
        return found

    # --- serving ---------------------------------------------------------------------------------
    # All tensors here are full ones, the same on every rank.

    def new_cache(self, batch: int, tokens: int, *, total_tokens: int | None = None) -> None:
        """Empty KV caches for `batch` sequences of up to `tokens` tokens each.

        `total_tokens` is what all sequences hold together (default: batch * tokens): with fewer,
        long sequences use the memory that short ones leave.  Where the batch is sharded, each rank
        has its share of the total for its own sequences.  Replaces the caches that are there.
        """
        self._serving = Serving(self, batch, tokens, total_tokens)

    @property
    def cached_lengths(self) -> Tensor:
        """Cached tokens of each sequence (b,), int64 on the CPU."""
        return self._served().lengths.clone()

    def prefill(self, input_ids: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """Start new sequences with prompts (b, t); logits (b, v) of the token that follows each.

        Of row i the first `lengths[i]` tokens count (default: all).  Whatever was cached is
        dropped.  Raises CacheFullError if the prompts do not fit.
        """
        serving = self._served()
        self._check_batch(input_ids, 2)
        counts = checked_lengths(lengths, input_ids, least=1)
        serving.clear()
        return serving.step("prefill", input_ids, counts)

    def decode(self, tokens: Tensor) -> Tensor:
        """Continue every sequence with one token (b,); logits (b, v) of the next.

        Raises CacheFullError if a sequence is at its end.
        """
        self._check_batch(tokens, 1)
        ids = tokens[:, None]
        return self._served().step("decode", ids, checked_lengths(None, ids))

    def append(self, input_ids: Tensor, lengths: Tensor | Sequence[int] | None = None) -> Tensor:
        """Continue the sequences with several tokens (b, t); logits (b, v) of what follows.

        Of row i the first `lengths[i]` tokens count (default: all); rows with 0 stay as they are,
        and their logits mean nothing.  Raises CacheFullError if the tokens do not fit.
        """
        self._check_batch(input_ids, 2)
        return self._served().step("append", input_ids, checked_lengths(lengths, input_ids))

    def truncate(self, lengths: Tensor | Sequence[int]) -> None:
        """Go back: keep only the first `lengths[i]` cached tokens of sequence i (b,)."""
        serving = self._served()
        limits = torch.as_tensor(lengths).to("cpu", torch.int64)
        if limits.shape != (serving.batch,) or bool((limits < 0).any()):
            raise ValueError(
                f"truncate takes a length of 0 or more for each of {serving.batch} sequences, got"
                f" {limits.tolist()}"
            )
        serving.truncate(limits)

    def generate(
        self,
        input_ids: Tensor,
        max_new_tokens: int,
        *,
        lengths: Tensor | Sequence[int] | None = None,
        attention_mask: Tensor | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int = 0,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Tensor:
        """Prompts (b, t) with up to `max_new_tokens` tokens behind them, (b, t + new).

        Prompts of different lengths are padded: on the right with `lengths` (b,) given, or
        anywhere with an `attention_mask` (b, t) of ones and zeros.  New tokens stand in columns
        t, t + 1, ... in any case.  A sequence ends with a token of `eos_token_id` and goes on with
        `pad_token_id`; generation stops when all have ended.

        The likeliest token is taken, or, with `do_sample`, one is drawn: logits / temperature, of
        those the `top_k` highest (0: all), of those the fewest with a probability of `top_p` or
        more together.  Draws depend on `seed`, or on the mesh's shared generator, and every
        rank returns the same.

        Uses the cache that is there if it is large enough, else makes a new one.
        """
        return generate(
            self, input_ids, max_new_tokens, lengths=lengths, attention_mask=attention_mask,
            eos_token_id=eos_token_id, pad_token_id=pad_token_id, do_sample=do_sample,
            temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        )  # fmt: skip

    # What a module with several programs overrides: which there are, and what each takes and gives.

    def phases(self) -> Sequence[ServePhase]:
        """The phases that this module has programs for."""
        return ("prefill", "decode", "append")

    def inputs_of(self, phase: ServePhase) -> Mapping[str, Input]:
        """The inputs of the program for `phase`: `input_ids` and `position_ids`."""
        return self._program(phase).INPUTS

    def outputs_of(self, phase: ServePhase) -> Sequence[Output]:
        """The outputs of the program for `phase`; one of them is `logits`, or there is only one."""
        return self._program(phase).OUTPUTS

    def caches_of(self, phase: ServePhase) -> Mapping[str, Cache]:
        """The caches as the program for `phase` lays them out."""
        return self._program(phase).CACHES

    def _run(self, phase: ServePhase, **local: Tensor) -> Any:
        """Run the program for `phase` on this rank's part of its inputs."""
        return self._program(phase)(**local)

    def _program(self, phase: ServePhase) -> ShardedModule:
        return self._decoding[0] if phase == "decode" and self._decoding else self

    # What `Serving` uses.

    def shard_phase(self, phase: ServePhase, **batch: Tensor) -> dict[str, Tensor]:
        """`shard_inputs` for the program of a phase."""
        return self._shard_inputs(self.inputs_of(phase), batch)

    @torch.no_grad()
    def gather_phase(self, phase: ServePhase, out: Any) -> Tensor:
        """The full logits (b, 1, v) from what the program of a phase returned."""
        outputs = self.outputs_of(phase)
        found = [o for o in outputs if o.path and o.path[-1] == "logits"] or list(outputs)
        if len(found) != 1:
            raise ValueError(
                f"the {phase} program returns {[o.path for o in outputs]}; one of them must be"
                " called `logits`"
            )
        return self._gather_output(found[0], out)

    def set_cache(self, name: str, cache: KVCache | None) -> None:
        """Put this rank's part of a cache, None for none, where `forward` looks for it."""
        for module in (self, *self._decoding):
            owner, leaf = owner_of(module, name)
            setattr(owner, leaf, cache)

    def room_for(self, batch: int, tokens: int) -> Serving:
        """The serving state, with new caches unless those that are there are large enough."""
        serving = self._serving
        if serving is None or serving.batch != batch or serving.tokens < tokens:
            self.new_cache(batch, tokens)
        return self._served()

    def _served(self) -> Serving:
        if self._serving is None:
            raise RuntimeError("there is no KV cache yet; call new_cache(batch, tokens) first")
        return self._serving

    def _check_batch(self, ids: Tensor, ndim: int) -> None:
        batch = self._served().batch
        if ids.ndim != ndim or ids.shape[0] != batch or ids.is_floating_point():
            raise ValueError(
                f"expected integer tokens ({batch}{', t' if ndim == 2 else ''}) for the {batch}"
                f" sequences of the cache, got {ids.dtype} {tuple(ids.shape)}"
            )

    # --- demonstration ---------------------------------------------------------------------------

    @classmethod
    def demo(cls, steps: int = 3) -> None:
        """Run `steps` steps on random weights and inputs; rank 0 prints time and peak memory.

        A module with a KV cache runs its phase `steps` times over a cache as full as planned, of
        random keys and values; one with a program for decoding then runs that, too, and converts
        caches where the two lay them out differently.
        """
        model = cls()
        model.reset_parameters()
        if cls.CACHES:
            model._demo_serving(steps)
            return
        batch = model.shard_inputs(**cls._random_batch())
        optimizer = _make_optimizer(cls.OPTIMIZER, model)
        best = model._timed("step", steps, lambda: model._demo_step(batch, optimizer))
        model._say(f"best {best * 1e3:.1f} ms per step")

    def _demo_serving(self, steps: int) -> None:
        """Time each phase that the module was planned for."""
        programs = [(self.PHASE, self), *(("decode", module) for module in self._decoding)]
        sizes = [(module.INPUTS["input_ids"].shape, module.CONTEXT) for _, module in programs]
        self.new_cache(sizes[0][0][0], max(shape[1] + context for shape, context in sizes))
        for (phase, module), ((batch, tokens), context) in zip(programs, sizes, strict=True):
            ids = module._random_batch()["input_ids"]
            if context:
                self._served().fill(context, "decode" if phase == "decode" else "append")
            best = self._timed(phase, steps, partial(self._demo_phase, phase, ids, context))
            cached = f" over {context} cached ones" if context else ""
            self._say(
                f"best {best * 1e3:.1f} ms per {phase} of {batch} x {tokens} tokens{cached}, "
                f"{batch * tokens / best:,.0f} tokens/s"
            )
        if specs_of(self.CACHES) != specs_of(self.caches_of("decode")):
            self._demo_conversion(steps, *sizes[0][0])

    def _demo_conversion(self, steps: int, batch: int, tokens: int) -> None:
        """Time the conversion of `batch` prompts' caches to the layout of decode."""
        serving = self._served()

        def convert() -> str:
            serving.lay_out("decode")
            return ""

        best = self._timed("conversion", steps, convert, before=partial(serving.fill, tokens))
        self._say(f"best {best * 1e3:.1f} ms per conversion of {batch} x {tokens} cached tokens")

    def _demo_phase(self, phase: str, ids: Tensor, context: int) -> str:
        """One step from `context` cached tokens on."""
        if phase == "prefill":
            self.prefill(ids)
        else:
            self.truncate([context] * len(ids))
            self._served().step(
                "decode" if phase == "decode" else "append", ids, checked_lengths(None, ids)
            )
        return ""

    def _timed(
        self,
        what: str,
        steps: int,
        step: Callable[[], str],
        before: Callable[[], None] = lambda: None,
    ) -> float:
        """Seconds of the fastest of `steps` steps after a first; rank 0 prints each, and what
        `step` returns.  `before` each of them, not timed, comes what it needs."""
        seconds: list[float] = []
        for _ in range(steps + 1):
            before()
            _wait_for_all(self.mesh)
            start = time.perf_counter()
            value = step()
            _wait_for_all(self.mesh)
            seconds.append(time.perf_counter() - start)
            if self.mesh.rank == 0:
                label = "warm-up" if len(seconds) == 1 else f"{what} {len(seconds) - 1}"
                print(f"{label}: {seconds[-1] * 1e3:.1f} ms{value}", flush=True)
        return min(seconds[1:])

    def _say(self, text: str) -> None:
        """Rank 0 prints a result and the peak memory so far."""
        if self.mesh.rank == 0:
            peak = _peak_bytes(self.mesh.device) / 1e9
            print(f"{self.mesh}: {text}, peak {peak:.2f} GB on rank 0", flush=True)

    def _demo_step(self, batch: dict[str, Tensor], optimizer: torch.optim.Optimizer | None) -> str:
        if self.PHASE != "train":
            with torch.no_grad():
                self(**batch)
            return ""
        out = self(**batch)
        results = [_look_up(out, output.path) for output in self.OUTPUTS]
        trained = [result for result in results if result.requires_grad]
        scalars = [result for result in trained if result.ndim == 0]
        loss = scalars[0] if scalars else torch.stack([r.float().sum() for r in trained]).sum()
        loss.backward()
        if optimizer is not None:
            optimizer.step()
        self.zero_grad(set_to_none=True)
        return f", loss {loss.item():.4f}" if scalars else ""

    @classmethod
    def _random_batch(cls) -> dict[str, Tensor]:
        """The same full batch on every rank."""
        generator = torch.Generator().manual_seed(0)
        batch: dict[str, Tensor] = {}
        for name, spec in cls.INPUTS.items():
            if spec.dtype.is_floating_point:
                batch[name] = torch.randn(spec.shape, generator=generator).to(spec.dtype)
            elif spec.dtype == torch.bool:
                batch[name] = torch.ones(spec.shape, dtype=torch.bool)
            else:
                numbers = torch.randint(0, spec.high, spec.shape, generator=generator)
                batch[name] = numbers.to(spec.dtype)
        return batch

    # --- details ---------------------------------------------------------------------------------

    def _register(self, name: str, param: Param, shared: ShardedModule | None) -> None:
        spec = parse_spec(param.spec)
        shape = local_shape(param.shape, spec, self.mesh.sizes)
        owner, leaf = owner_of(self, name)
        present = getattr(owner, leaf, None)
        if shared is not None:
            tensor = shared.local(name)
        elif present is not None:
            if tuple(present.shape) != shape:
                raise ValueError(
                    f"`{name}` was built with shape {tuple(present.shape)}, not {shape}"
                )
            tensor = present
        else:
            tensor = torch.zeros(shape, dtype=param.dtype, device=self.mesh.device)
            if param.kind == "parameter":
                trained = param.trainable and param.dtype.is_floating_point
                tensor = nn.Parameter(tensor, requires_grad=trained)
        aliases = param.aliases if param.part is None else ()
        for key in (name, *aliases):
            owner, leaf = owner_of(self, key)
            if isinstance(tensor, nn.Parameter):
                owner.register_parameter(leaf, tensor)
            else:
                owner.register_buffer(leaf, tensor, persistent=param.kind == "buffer")
        if param.kind == "constant" and shared is None:
            data = torch.tensor(param.data, dtype=param.dtype).reshape(param.shape)
            self._fill(name, StateDict({name: data}), name)

    @torch.no_grad()
    def _load(self, source: Source) -> None:
        wanted = {n: o for n, o in self._originals.items() if o.kind != "constant"}
        source = OwnNames(source, wanted)
        given = set(source.names())
        found = {
            name: [key for key in (name, *original.aliases) if key in given]
            for name, original in wanted.items()
        }
        known = {key for name, original in wanted.items() for key in (name, *original.aliases)}
        problems = [f"missing: {name}" for name, keys in found.items() if not keys]
        problems += source.problems
        for key in sorted(given - known):
            constant = key in self._originals
            reason = " (the plan holds its values; leave it out)" if constant else ""
            problems.append(f"unexpected: {key}{reason}")
        for name, keys in found.items():
            shapes = {key: source.shape(key) for key in keys}
            problems += [
                f"wrong shape: {key} is {shape}, the plan has {wanted[name].shape}"
                for key, shape in shapes.items()
                if shape != wanted[name].shape
            ]
        if problems:
            raise ValueError(
                f"{source.title} does not fit this module ({len(problems)} problems):\n  "
                + "\n  ".join(problems)
            )
        for name, keys in found.items():
            self._fill(name, source, keys[0])
            for key in keys[1:]:
                self._check_tied(name, source, key)

    @torch.no_grad()
    def _fill(self, name: str, source: Source, key: str) -> None:
        """Copy this rank's slices of `key` into what holds the original `name`; padding is 0."""
        for part in self._originals[name].params:
            param, local = self.PARAMETERS[part], self.local(part)
            own = source.read(key, self._slices(param))
            if own.is_floating_point() != param.dtype.is_floating_point:
                raise ValueError(
                    f"{source.title}: {key} is {own.dtype}, the plan has {param.dtype}"
                )
            local.zero_()
            local[tuple(slice(0, rows) for rows in own.shape)] = own.to(local.device)

    def _check_tied(self, name: str, source: Source, key: str) -> None:
        for part in self._originals[name].params:
            own = source.read(key, self._slices(self.PARAMETERS[part]))
            local = self.local(part)[tuple(slice(0, rows) for rows in own.shape)]
            if not torch.equal(local, own.to(local)):
                raise ValueError(
                    f"{source.title}: {key} and {name} are one tensor in this module but differ "
                    "there"
                )

    def _slices(self, param: Param) -> tuple[slice, ...]:
        """What this rank holds of the original tensor that `param` is, or is part of."""
        spec = parse_spec(param.spec)
        own = blocks(param.shape, spec, self.mesh.sizes, self.mesh.coordinates)
        first = [0] * len(own)
        if param.part is not None:
            first[param.part.dim] = param.part.start
        return tuple(slice(n + b.start, n + b.stop) for n, b in zip(first, own, strict=True))

    def _gather(self, local: Sequence[Tensor], original: Original) -> Tensor:
        """The whole tensor from this rank's slices of its parts."""
        params = [self.PARAMETERS[name] for name in original.params]
        wholes = [
            gather_whole(x, parse_spec(param.spec), param.shape, self.mesh)
            for x, param in zip(local, params, strict=True)
        ]
        return torch.cat(wholes, original.dim) if len(wholes) > 1 else wholes[0]

    def _gather_output(self, output: Output, out: Any) -> Tensor:
        local, spec = _look_up(out, output.path), parse_spec(output.spec)
        shape = _true_shape(local, spec, self.mesh, output.shape)
        zigzag = zigzag_dims(output.spec)
        return gather_whole(local.detach(), spec, shape, self.mesh, zigzag)

    def _shard_inputs(
        self, inputs: Mapping[str, Input], batch: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        missing = [name for name in inputs if name not in batch]
        unknown = [name for name in batch if name not in inputs]
        if missing or unknown:
            raise ValueError(
                f"the module takes the inputs {', '.join(inputs) or 'none'};"
                + (f" missing: {', '.join(missing)}" if missing else "")
                + (f" unknown: {', '.join(unknown)}" if unknown else "")
            )
        return {name: self._shard_input(name, inputs[name], batch[name]) for name in inputs}

    def _shard_input(self, name: str, wanted: Input, x: Tensor) -> Tensor:
        shape = tuple(x.shape)
        fits = len(shape) == len(wanted.shape) and all(
            dim in wanted.free or size == planned
            for dim, (size, planned) in enumerate(zip(shape, wanted.shape, strict=False))
        )
        if not fits or x.dtype != wanted.dtype:
            free = f" (dims {list(wanted.free)} may differ)" if wanted.free else ""
            raise ValueError(
                f"input `{name}` is {x.dtype} {shape}; the plan has {wanted.dtype}"
                f" {wanted.shape}{free}"
            )
        spec, zigzag = parse_spec(wanted.spec), zigzag_dims(wanted.spec)
        for dim, size in enumerate(shape):
            ways = prod(_ways(spec, dim, self.mesh)) * (2 if dim in zigzag else 1)
            if size % ways:
                axes = zip(self.mesh.axes, spec, strict=True)
                names = " x ".join(f"{a.name}={a.size}" for a, state in axes if state == dim)
                twice = " in zigzag order (two chunks per rank)" if dim in zigzag else ""
                raise ValueError(
                    f"input `{name}` dim {dim} has size {size}, which {names}{twice} does not"
                    " divide"
                )
            if wanted.step and size % wanted.step[dim] and size != wanted.shape[dim]:
                raise ValueError(
                    f"input `{name}` dim {dim} has size {size}; the plan cuts what is computed"
                    f" from it, so it must be a multiple of {wanted.step[dim]}"
                )
        return self.local_part(x, wanted.spec).to(self.mesh.device).contiguous()


def _ways(spec: Spec, dim: int, mesh: Mesh) -> list[int]:
    """Sizes of the axes that cut `dim`, major to minor."""
    return [size for state, size in zip(spec, mesh.sizes, strict=True) if state == dim]


def gather_whole(
    x: Tensor, spec: Spec, shape: Sequence[int], mesh: Mesh, zigzag: tuple[int, ...] = ()
) -> Tensor:
    """The whole tensor of `shape` from this rank's part in `spec` (states R, V and S).

    `zigzag` names the dims that are cut in zigzag order.
    """
    cuts: list[tuple[int, int]] = [
        (state, size) for state, size in zip(spec, mesh.sizes, strict=True)
    ]
    for number in reversed(range(len(cuts))):  # the minor-most axis on a dim goes first
        dim, _ = cuts[number]
        axis = mesh.axes[number]
        if dim < 0 or axis.size == 1:
            continue
        majors = [(ways, 0) for state, ways in cuts[:number] if state == dim]
        size = block(shape[dim], majors).rows
        x = axis.move(x, Move(dim, R, size, zigzag), "forward")
    return x


def _true_shape(local: Tensor, spec: Spec, mesh: Mesh, planned: Sequence[int]) -> tuple[int, ...]:
    """Full shape of an output: as planned where that explains the local size, else its multiple."""
    expected = local_shape(planned, spec, mesh.sizes)
    return tuple(
        planned[dim] if size == expected[dim] else size * prod(_ways(spec, dim, mesh))
        for dim, size in enumerate(local.shape)
    )


@contextmanager
def _while_gathering(
    context: AbstractContextManager[None], mesh: Mesh, layer: Layer
) -> Generator[None]:
    with context, gathering_ahead(mesh, layer.gathers()):
        yield


def _look_up(out: Any, path: Path_) -> Tensor:
    for key in path:
        out = out[key]
    return out


def _rebuild(entries: Mapping[Path_, Tensor]) -> Any:
    """The nested structure that has each tensor at its path: tuples for numbers, else Outputs."""
    if () in entries:
        return entries[()]
    groups: dict[str | int, dict[Path_, Tensor]] = {}
    for path, tensor in entries.items():
        groups.setdefault(path[0], {})[path[1:]] = tensor
    if all(isinstance(key, int) for key in groups):
        return tuple(_rebuild(group) for _, group in sorted(groups.items()))
    return Outputs({str(key): _rebuild(group) for key, group in groups.items()})


def _make_optimizer(kind: str, model: nn.Module) -> torch.optim.Optimizer | None:
    trained = [param for param in model.parameters() if param.requires_grad]
    if kind == "none" or not trained:
        return None
    return torch.optim.AdamW(trained) if kind == "adamw" else torch.optim.SGD(trained)


def _wait_for_all(mesh: Mesh) -> None:
    if mesh.device.type == "cuda":
        torch.cuda.synchronize(mesh.device)
    if mesh.size > 1:
        dist.barrier()


def _peak_bytes(device: torch.device) -> int:
    """Most bytes held so far: of tensors on a GPU, of the whole process on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

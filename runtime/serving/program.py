"""What serving knows of a module: its programs, and where their caches go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import lcm
from typing import Any

import torch
from torch import Tensor, nn

from ...facts.nested import Constant, Path
from ...facts.phases import DECODE, PREFILL
from ...facts.spec import format_spec, parse_spec
from ..cache.cache import KVCache
from ..cache.declared import (
    BATCH,
    TOKENS,
    Cache,
    Declared,
    SequenceState,
    caches_in,
    specs_of,
    states_in,
)
from ..cache.recache import Path as SpecPath
from ..cache.recache import change_between
from ..cache.state import StateCache
from ..mesh.batches import Fixed, Input, Output, gather_output, shard_inputs
from ..mesh.mesh import Mesh
from ..mesh.parts import own_part, ways


@dataclass(frozen=True, slots=True)
class Program:
    """One forward pass of a module: what it takes, returns and caches, and what runs it.

    `run` takes this rank's part of the inputs by name, and returns its part of the outputs.
    `context` are the tokens of each sequence that were planned to be cached before; `fixed` are
    inputs that are no tensors; `elsewhere` what other stages of a pipeline cache.
    """

    inputs: Mapping[str, Input]
    outputs: Sequence[Output]
    caches: Mapping[str, Declared]
    run: Callable[..., Any]
    context: int = 0
    fixed: Fixed = field(default_factory=dict[Path, Constant])
    elsewhere: Sequence[Declared] = ()

    @property
    def tokens(self) -> Input:
        """How `input_ids` and `position_ids` (b, t) are cut."""
        return self.inputs["input_ids"]

    @property
    def logits(self) -> Output:
        """The logits (b, 1, v) among the outputs; ValueError if it is not clear which they are."""
        named = [o for o in self.outputs if o.path and o.path[-1] == "logits"]
        found = named or list(self.outputs)
        if len(found) != 1:
            raise ValueError(
                f"the program returns {[o.path for o in self.outputs]}; one of them must be called"
                " `logits`"
            )
        return found[0]

    def cuts_tokens(self, mesh: Mesh) -> bool:
        """Do ranks get some of the new tokens of a sequence?"""
        return any(ways(parse_spec(each.spec), mesh, 1) > 1 for each in self.inputs.values())

    def led_by_host(self, mesh: Mesh) -> str:
        """Why the host must lead its steps, or nothing."""
        return "its program cuts the new tokens of a sequence" if self.cuts_tokens(mesh) else ""

    @property
    def shares_elsewhere(self) -> bool:
        """Do ranks of other stages share the cached tokens of a sequence?"""
        found = (each for each in self.elsewhere if isinstance(each, Cache))
        return any(TOKENS in parse_spec(cache.spec) for cache in found)

    def wait(self) -> None:
        """Until all logits that `next_logits` gave are there."""

    @torch.no_grad()
    def next_logits(self, mesh: Mesh, ids: Tensor, positions: Tensor) -> Tensor:
        """Full logits (b, v) after full tokens (b, t), -1 where a position is padding."""
        batch = {"input_ids": ids, "position_ids": positions}
        out = self.run(**shard_inputs(self.inputs, batch, mesh))
        return gather_output(self.logits, out, mesh)[:, 0]

    @torch.no_grad()
    def next_logits_on_device(self, mesh: Mesh, ids: Tensor, positions: Tensor) -> Tensor:
        """As `next_logits`, of tensors on the device that are known to fit: it asks no host."""
        batch = {"input_ids": ids, "position_ids": positions}
        own = {name: parse_spec(self.inputs[name].spec) for name in batch}
        out = self.run(**{n: own_part(x, own[n], mesh).contiguous() for n, x in batch.items()})
        return gather_output(self.logits, out, mesh)[:, 0]


@dataclass(frozen=True, slots=True)
class Served:
    """A module as serving sees it.

    `title` is what errors call it; `programs` has one for each phase, by its name.  `put` is told
    of each new cache of this rank by its name, and with None that the cache of that name must go.
    `models` are the modules that run, whose parts errors name.  Of a stage of a pipeline `mesh` is
    its own, `everyone` that of all stages, and `parts` into how many parts others cut a batch.
    """

    title: str
    mesh: Mesh
    programs: Mapping[str, Program]
    put: Callable[[str, KVCache | StateCache | None], None]
    models: Sequence[nn.Module] = ()
    everyone: Mesh | None = None
    parts: int = 1

    @property
    def agreeing(self) -> Mesh:
        """The ranks that must agree on what there is room for."""
        return self.mesh if self.everyone is None else self.everyone

    @property
    def windowed_elsewhere(self) -> bool:
        """Do other stages drop tokens that no query can reach any more?"""
        others = self.programs[PREFILL.name].elsewhere
        return any(isinstance(each, Cache) and each.window > 0 for each in others)

    @property
    def stateful_elsewhere(self) -> bool:
        """Do other stages keep states?"""
        others = self.programs[PREFILL.name].elsewhere
        return any(isinstance(each, SequenceState) for each in others)

    @property
    def caches(self) -> Mapping[str, Declared]:
        """The caches as the program for prompts lays them out."""
        return self.programs[PREFILL.name].caches

    @property
    def longest_run(self) -> int:
        """The most tokens of a sequence that a program was planned for."""
        return max(program.tokens.shape[1] for program in self.programs.values())

    def paths(self) -> dict[str, SpecPath]:
        """The specs that each cache takes from the first program's layout to that for decoding.

        Raises ValueError where there are two layouts of a cache and nothing says how to convert.
        """
        decoding = specs_of(self.programs[DECODE.name].caches)
        paths: dict[str, SpecPath] = {}
        for name, state in states_in(self.caches).items():
            paths[name] = (decoding[name],)
            if parse_spec(state.spec) != decoding[name]:
                raise ValueError(f"state {name} must lie alike in all programs, in {state.spec}")
        for name, cache in caches_in(self.caches).items():
            path = tuple(parse_spec(text) for text in (cache.spec, *cache.path))
            if path[-1] != decoding[name]:
                raise ValueError(
                    f"cache {name} lies in {cache.spec} and for decoding in"
                    f" {format_spec(decoding[name])}, but its `path` is {list(cache.path)}; it must"
                    " end with the spec for decoding"
                )
            for before, after in pairwise(path):
                change_between(before, after)
            paths[name] = path
        return paths

    def row_parts(self) -> int:
        """Into how many parts of equal size all programs and caches cut a batch, or a multiple."""
        specs = [spec for path in self.paths().values() for spec in path]
        specs += [parse_spec(program.tokens.spec) for program in self.programs.values()]
        return lcm(self.parts, *(ways(spec, self.mesh, BATCH) for spec in specs))

    def padded_rows(self, batch: int) -> int:
        """Sequences with padding: a multiple of what all programs and caches cut a batch into."""
        tokens = [program.tokens for program in self.programs.values()]
        planned = {wanted.shape[0] for wanted in tokens if 0 not in wanted.free}
        steps = [wanted.step[0] for wanted in tokens if 0 in wanted.free and wanted.step]
        step = lcm(self.row_parts(), *steps)
        rows = max([-(-batch // step) * step, *planned])
        if planned and planned != {rows}:
            raise ValueError(
                f"the module was planned for a batch of {', '.join(map(str, sorted(planned)))},"
                f" which {batch} sequences ({rows} with padding) do not fit; plan it with"
                f" --batch {batch}"
            )
        return rows

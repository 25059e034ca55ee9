"""What serving knows of a module: its programs, and where their caches go."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from math import lcm
from typing import Any

import torch
from torch import Tensor

from ...facts.nested import Constant, Path
from ...facts.phases import DECODE, PREFILL
from ...facts.spec import format_spec, parse_spec
from ..cache.cache import KVCache
from ..cache.declared import BATCH, Declared, caches_in, specs_of, states_in
from ..cache.recache import Path as SpecPath
from ..cache.recache import change_between
from ..cache.state import StateCache
from ..mesh.batches import Fixed, Input, Output, gather_output, shard_inputs
from ..mesh.mesh import Mesh
from ..mesh.parts import ways


@dataclass(frozen=True, slots=True)
class Program:
    """One forward pass of a module: what it takes, returns and caches, and what runs it.

    `run` takes this rank's part of the inputs by name, and returns its part of the outputs.
    `context` are the tokens of each sequence that were planned to be cached before; `fixed` are
    inputs that are no tensors.
    """

    inputs: Mapping[str, Input]
    outputs: Sequence[Output]
    caches: Mapping[str, Declared]
    run: Callable[..., Any]
    context: int = 0
    fixed: Fixed = field(default_factory=dict[Path, Constant])

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

    @torch.no_grad()
    def next_logits(self, mesh: Mesh, ids: Tensor, positions: Tensor) -> Tensor:
        """Full logits (b, v) after full tokens (b, t), -1 where a position is padding."""
        batch = {"input_ids": ids, "position_ids": positions}
        out = self.run(**shard_inputs(self.inputs, batch, mesh))
        return gather_output(self.logits, out, mesh)[:, 0]


@dataclass(frozen=True, slots=True)
class Served:
    """A module as serving sees it.

    `title` is what errors call it; `programs` has one for each phase, by its name.  `put` is told
    of each new cache of this rank by its name, and with None that the cache of that name must go.
    """

    title: str
    mesh: Mesh
    programs: Mapping[str, Program]
    put: Callable[[str, KVCache | StateCache | None], None]

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

    def padded_rows(self, batch: int) -> int:
        """Sequences with padding: a multiple of what all programs and caches cut a batch into."""
        specs = [spec for path in self.paths().values() for spec in path]
        planned: set[int] = set()
        steps: list[int] = []
        for program in self.programs.values():
            wanted = program.tokens
            specs.append(parse_spec(wanted.spec))
            if 0 not in wanted.free:
                planned.add(wanted.shape[0])
            elif wanted.step:
                steps.append(wanted.step[0])
        step = lcm(*(ways(spec, self.mesh, BATCH) for spec in specs), *steps)
        rows = max([-(-batch // step) * step, *planned])
        if planned and planned != {rows}:
            raise ValueError(
                f"the module was planned for a batch of {', '.join(map(str, sorted(planned)))},"
                f" which {batch} sequences ({rows} with padding) do not fit; plan it with"
                f" --batch {batch}"
            )
        return rows

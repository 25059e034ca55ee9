"""What a program says of its KV caches and states, in the table `CACHES` of a generated module."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import torch

from ...facts.spec import Spec, parse_spec

BATCH, HEADS, TOKENS = 0, 1, 2  # dims of a cache's spec


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
class SequenceState:
    """The state of fixed size that one layer keeps of each sequence, and how it is sharded.

    `shape` is that of one sequence in the original model; `spec` is over the batch 0 and the dims
    of `shape`, 1 and so on.  It is the same in all programs.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    spec: str


Declared: TypeAlias = Cache | SequenceState


def caches_in(declared: Mapping[str, Declared]) -> dict[str, Cache]:
    """Those of keys and values."""
    return {name: item for name, item in declared.items() if isinstance(item, Cache)}


def states_in(declared: Mapping[str, Declared]) -> dict[str, SequenceState]:
    """Those of fixed size."""
    return {name: item for name, item in declared.items() if isinstance(item, SequenceState)}


def specs_of(declared: Mapping[str, Declared]) -> dict[str, Spec]:
    """The layout of each cache and state."""
    return {name: parse_spec(cache.spec) for name, cache in declared.items()}


def without_heads(spec: Spec) -> Spec:
    """The same cuts of batch and tokens."""
    return tuple(state if state in (BATCH, TOKENS) else -1 for state in spec)

"""Checkpoints of a run through torch's DCP: they load into any other plan of the model.

A checkpoint is a folder `step-00000100` in the run's folder.  Tensors have the original's names
(`model.<name>`, `optimizer.<name>.exp_avg`, `ema.<name>`) and are written as the ranks hold them:
one item for each piece, at its place in the original, by one of the ranks that hold it.  DCP writes
its `.metadata` last, when every rank has written: what has one is complete.
"""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadItemType,
    LoadPlan,
    ReadItem,
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.optim import Optimizer

from ..mesh.mesh import Mesh, stable_seed
from .ema import Ema
from .pieces import Piece
from .states import Group, Kept, Numbers, OptimizerStates, merged

_RUN = "run"  # the item of what is no tensor
_FOLDER = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a run goes on: after `step` steps, with what was saved as `extra`."""

    step: int
    extra: Any


@dataclass(frozen=True, slots=True)
class Slot:
    """A tensor of a checkpoint, and this rank's part of it in `tensor`, without padding."""

    name: str
    piece: Piece
    tensor: Tensor

    @property
    def chunk(self) -> ChunkStorageMetadata:
        """Its place in the original."""
        return ChunkStorageMetadata(torch.Size(self.piece.offsets), torch.Size(self.piece.sizes))

    @property
    def index(self) -> MetadataIndex:
        """By which DCP knows it."""
        return MetadataIndex(self.name, torch.Size(self.piece.offsets))

    @property
    def key(self) -> str:
        """The same as text."""
        return f"{self.name} {self.piece.offsets}"

    @property
    def written_here(self) -> bool:
        """Whether this rank writes it: of copies one does, for neighbouring tensors another."""
        nothing = 0 in self.piece.sizes
        return not nothing and sum(self.name.encode()) % self.piece.copies == self.piece.copy


class Checkpoints:
    """The checkpoints of a run on `mesh`; all ranks make every call together.

    `names` are those of all originals where ranks hold parts of different ones, as stages do.
    """

    def __init__(self, mesh: Mesh, names: Collection[str] = ()) -> None:
        self._mesh = mesh
        self._names = frozenset(names)
        self._group: dist.ProcessGroup | None = None  # of its own: saving goes on beside training
        self._running: tuple[Future[Any], Path, int] | None = None

    def save(
        self,
        folder: Path,
        pieces: Sequence[Piece],
        optimizer: Optimizer | None,
        step: int,
        ema: Ema | None,
        extra: Any,
        keep: int,
    ) -> None:
        """See `ShardedModule.save_checkpoint`."""
        if step < 0 or keep < 1:
            raise ValueError(f"step is 0 or more and keep 1 or more, got {step} and {keep}")
        self.wait()
        if later := [path for path in complete(folder) if _step(path) >= step]:
            raise ValueError(
                f"{folder} has a checkpoint of step {_step(later[-1])}, and this is step {step}:"
                " go on from that one with load_checkpoint, or save in another folder"
            )
        states = OptimizerStates.of(optimizer, pieces)
        slots = _slots(pieces, states.tensors, ema)
        run = {"step": step, "extra": extra, "seed": self._mesh.seed}
        numbers, groups = self._everywhere(states)
        run |= {"numbers": numbers, "groups": groups}
        path = folder / f"step-{step:08d}"
        if self._mesh.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(folder)
        future: Any = dcp.async_save(
            {slot.key: slot.tensor for slot in slots if slot.written_here},
            storage_writer=dcp.FileSystemWriter(path),
            planner=_Saving(slots, run),
            process_group=self._gloo(),
            no_dist=self._mesh.size == 1,
        )
        self._running = (future, folder, keep)

    def wait(self) -> None:
        """See `ShardedModule.wait_for_checkpoint`."""
        if self._running is None:
            return
        (future, folder, keep), self._running = self._running, None
        try:
            future.result()
        except Exception as error:
            raise RuntimeError(
                f"the checkpoint in {folder} could not be written; the last complete one is"
                f" {_named(complete(folder)[-1:])}: {error}"
            ) from error
        if self._mesh.rank == 0:
            for old in complete(folder)[:-keep]:
                shutil.rmtree(old)

    def load(
        self, folder: Path, pieces: Sequence[Piece], optimizer: Optimizer | None, ema: Ema | None
    ) -> Resumed:
        """See `ShardedModule.load_checkpoint`."""
        self.wait()
        found = complete(folder)
        if not found:
            raise FileNotFoundError(f"{folder} has no complete checkpoint of a run")
        reader = dcp.FileSystemReader(found[-1])
        metadata = reader.read_metadata()
        states = OptimizerStates.planned(optimizer, pieces, _tensors(metadata))
        slots = _slots(pieces, states.tensors, ema)
        saved = {name: x for name, x in _tensors(metadata).items() if self._is_here(name, pieces)}
        asked = [*(["optimizer."] if optimizer else []), *(["ema."] if ema else [])]
        _check(found[-1], slots, saved, ("model.", *asked))
        first: dict[str, Slot] = {}
        for slot in slots:
            first.setdefault(slot.key, slot)
        loading = _Loading(list(first.values()))
        dcp.load(
            {key: slot.tensor for key, slot in first.items()}, storage_reader=reader,
            planner=loading, process_group=self._gloo(), no_dist=self._mesh.size == 1,
        )  # fmt: skip
        for slot in slots:  # of what several stages of a rank have each has a copy
            if slot is not first[slot.key]:
                slot.tensor.copy_(first[slot.key].tensor)
        run = loading.run
        if optimizer is not None:
            states.load_into(optimizer, run["numbers"], run["groups"])
        self._mesh.manual_seed(stable_seed(run["seed"], run["step"]))
        return Resumed(run["step"], run["extra"])

    def _everywhere(self, states: OptimizerStates) -> tuple[Numbers, list[Group]]:
        """The numbers and groups of an optimizer, those of all ranks' tensors together."""
        own = states.numbers, states.groups
        if not self._names or self._mesh.size == 1:
            return own
        told: list[Any] = [None] * self._mesh.size
        dist.all_gather_object(told, own, group=self._gloo())
        return merged(told)

    def _is_here(self, name: str, pieces: Sequence[Piece]) -> bool:
        """Is a tensor of a checkpoint for this rank?  No rank has those that the model has not."""
        own = {piece.original for piece in pieces}
        kind, _, rest = name.partition(".")
        of = rest.rpartition(".")[0] if kind == "optimizer" else rest
        return of in own or of not in self._names

    def _gloo(self) -> dist.ProcessGroup | None:
        if self._group is None and self._mesh.size > 1:
            group = dist.new_group(backend="gloo")
            assert isinstance(group, dist.ProcessGroup)
            self._group = group
        return self._group


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints of a run, the oldest first."""
    return [path for path in _checkpoints(folder) if (path / ".metadata").is_file()]


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("step-*") if _FOLDER.fullmatch(path.name)]
    return sorted(found, key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _remove_unfinished(folder: Path) -> None:
    """Remove what a run left that was killed while it saved."""
    for path in set(_checkpoints(folder)) - set(complete(folder)):
        shutil.rmtree(path)


def _named(paths: Sequence[Path]) -> str:
    return ", ".join(path.name for path in paths) or "none"


def _slots(pieces: Sequence[Piece], states: Sequence[Kept], ema: Ema | None) -> list[Slot]:
    """Every tensor of a checkpoint that this rank holds some of."""
    own = [(f"model.{piece.original}", piece, piece.tensor) for piece in pieces]
    every = (*own, *states, *(ema.kept if ema else ()))
    return [Slot(name, piece, piece.rows(x.detach())) for name, piece, x in every]


def _tensors(metadata: Metadata) -> dict[str, TensorStorageMetadata]:
    """The tensors of a checkpoint by name."""
    return {
        name: item
        for name, item in metadata.state_dict_metadata.items()
        if isinstance(item, TensorStorageMetadata)
    }


def _check(
    path: Path,
    slots: Sequence[Slot],
    saved: Mapping[str, TensorStorageMetadata],
    asked: tuple[str, ...],
) -> None:
    """Refuse a checkpoint of another model, naming what differs.  `asked`: beginnings of the names
    of what is loaded."""
    wanted = {slot.name: slot.piece.shape for slot in slots}
    problems = [f"missing: {name}" for name in sorted(set(wanted) - set(saved))]
    problems += [
        f"unexpected: {name}" for name in sorted(set(saved) - set(wanted)) if name.startswith(asked)
    ]
    problems += [
        f"wrong shape: {name} is {tuple(saved[name].size)}, the plan has {shape}"
        for name, shape in wanted.items()
        if name in saved and tuple(saved[name].size) != shape
    ]
    if problems:
        raise ValueError(
            f"{path} does not fit this module ({len(problems)} problems):\n  "
            + "\n  ".join(problems[:20])
        )


# --- what DCP asks -------------------------------------------------------------------------------


class _Saving(dcp.DefaultSavePlanner):
    """Says what this rank writes: its slots, and on rank 0 what is no tensor."""

    def __init__(self, slots: Sequence[Slot], run: Mapping[str, Any]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._slots = [slot for slot in slots if slot.written_here]
        self._run = run

    def create_local_plan(self) -> SavePlan:
        items = [_written(slot) for slot in self._slots]
        if self.is_coordinator:
            items.append(WriteItem(MetadataIndex(_RUN), WriteItemType.BYTE_IO))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type == WriteItemType.BYTE_IO:
            written = io.BytesIO()
            torch.save(dict(self._run), written)
            return written
        offsets = tuple(write_item.index.offset or ())
        return self.state_dict[f"{write_item.index.fqn} {offsets}"]


def _written(slot: Slot) -> WriteItem:
    properties = TensorProperties(dtype=slot.tensor.dtype)
    data = TensorWriteData(slot.chunk, properties, torch.Size(slot.piece.shape))
    return WriteItem(slot.index, WriteItemType.SHARD, tensor_data=data)


class _Loading(dcp.DefaultLoadPlanner):
    """Says what this rank reads: of each slot what the saved pieces have of it."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._slots = [slot for slot in slots if 0 not in slot.piece.sizes]
        self.run: dict[str, Any] = {}

    def create_local_plan(self) -> LoadPlan:
        assert self.metadata is not None
        saved = _tensors(self.metadata)
        items = [
            item
            for slot in self._slots
            for item in create_read_items_for_chunk_list(slot.name, saved[slot.name], [slot.chunk])
        ]
        none = torch.Size((0,))
        index = MetadataIndex(_RUN)
        items.append(ReadItem(LoadItemType.BYTE_IO, index, none, index, none, none))
        return LoadPlan(items)

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.run = torch.load(value, weights_only=True)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[f"{index.fqn} {tuple(index.offset or ())}"]


__all__ = ["Checkpoints", "Resumed"]

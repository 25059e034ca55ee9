"""A step of training: its micro-batches one by one, with the gradients of all of them together.

The reference is one process with the same micro-batches: cross entropies are means over all labels
of the step that count, however they fall on ranks and micro-batches; every other term of the loss,
a sum too, is the mean of what it is in each micro-batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...facts.nested import with_leaves
from ..mesh.batches import Fixed, Input, Output, look_up, path_of, tensors_of
from ..mesh.mesh import Mesh
from ..mesh.rows import add_over_shards, shard_rows
from .shares import share_of_step


@dataclass(frozen=True, slots=True)
class Labels:
    """The input whose values are the labels of a model's cross entropy.

    Columns of the last dim count from `first` on, there what is not `ignore`.
    """

    input: str
    first: int = 0
    ignore: int = -100

    def count(self, labels: Tensor) -> Tensor:
        """How many count (), int64."""
        return (labels[..., self.first :] != self.ignore).sum()


class Weights(Protocol):
    """What brings weights and sends gradients off, told of the micro-batches of a step."""

    def step(self) -> AbstractContextManager[None]:
        """Around a step."""
        ...

    def micro_batch(self, *, first: bool, last: bool) -> None:
        """The next one of a step begins."""
        ...


@dataclass(frozen=True, slots=True)
class Trained:
    """What a step knows of a module: its tables, what runs it, and its parameters.

    `labels` is None where every row has as many, a sentence where it is not known how many count.
    """

    mesh: Mesh
    inputs: Mapping[str, Input]
    fixed: Fixed
    outputs: Sequence[Output]
    labels: Labels | str | None
    run: Callable[..., Any]
    weights: Weights
    parameters: Sequence[Tensor]

    def take_step(self, rows: Mapping[str, object], count: int) -> Tensor:
        """See `ShardedModule.step`; `rows` are the arguments, of `count` micro-batches together."""
        wide = WideGradients(self.parameters if count > 1 else ())

        def backward(loss: Tensor) -> Tensor:
            (loss if count == 1 else loss / count).backward()
            wide.take()
            return loss.detach()

        loss = self._mean(rows, count, then=backward)
        wide.put_back()
        return loss

    @torch.no_grad()
    def evaluate(self, rows: Mapping[str, object], count: int) -> Tensor:
        """See `ShardedModule.evaluate`; `rows` as in `take_step`."""
        return self._mean(rows, count)

    def _mean(
        self,
        rows: Mapping[str, object],
        count: int,
        then: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The loss of all micro-batches, of which `then` gets that of each after its forward."""
        parts = self.parts(rows, count)
        shares = self._shares(parts)
        losses: list[Tensor] = []
        with self.weights.step():
            for number, part in enumerate(parts):
                self.weights.micro_batch(first=number == 0, last=number == count - 1)
                with share_of_step(None if shares is None else shares[number]):
                    if then is None:
                        losses.append(self._loss(part, trains=False))
                    else:
                        losses.append(then(self._loss(part, trains=True)))
        dtype = torch.promote_types(losses[0].dtype, torch.float32)
        return torch.stack(losses).to(dtype).mean()

    def _loss(self, part: Mapping[str, object], *, trains: bool) -> Tensor:
        """Of a micro-batch, with these rows of this rank."""
        out = self.run(**shard_rows(self.inputs, part, self.mesh, self.fixed))
        return loss_of(self.outputs, out, trains=trains)

    def parts(self, rows: Mapping[str, object], count: int) -> list[dict[str, Any]]:
        """The arguments of each micro-batch; ValueError naming an input that does not divide."""
        if count < 1:
            raise ValueError(f"a step has 1 micro-batch or more, got micro_batches={count}")
        if count == 1:
            return [dict(rows)]
        tensors = tensors_of(self.inputs, rows, self.fixed)
        cut: dict[str, Sequence[Tensor]] = {}
        for name, wanted in self.inputs.items():
            x = tensors[name]
            if 0 in wanted.free or (x.ndim and x.shape[0] == count * wanted.shape[0]):
                if x.shape[0] % count:
                    raise ValueError(
                        f"input `{name}` has {x.shape[0]} rows here, which are not {count} equal"
                        " micro-batches"
                    )
                cut[name] = x.chunk(count)
        if not cut:
            raise ValueError(
                f"no input has rows for {count} micro-batches; the comment at INPUTS says why the"
                " batch is as it was planned"
            )
        paths = {name: path_of(name, self.inputs[name]) for name in cut}
        return [
            with_leaves(dict(rows), {paths[name]: own[k] for name, own in cut.items()})
            for k in range(count)
        ]

    def _shares(self, parts: Sequence[Mapping[str, object]]) -> Tensor | None:
        """By micro-batch what its mean losses weigh; None: all the same.

        An all-reduce of one number for each.
        """
        if self.labels is None or len(parts) == 1:
            return None
        if isinstance(self.labels, str):
            raise ValueError(
                f"this module takes steps of one micro-batch: {self.labels}, so that it is not"
                " known what each micro-batch weighs in the mean of a step; let the model compute"
                " its loss by F.cross_entropy of labels that are an input, ignored ones -100"
            )
        name = self.labels.input
        given = [tensors_of(self.inputs, part, self.fixed)[name] for part in parts]
        counts = torch.stack([self.labels.count(x) for x in given]).to(self.mesh.device)
        if 0 in self.inputs[name].free:
            counts = add_over_shards(counts, self.inputs, self.mesh)
        counts = counts.double()
        return counts * len(parts) / counts.sum()


def scalar_loss(outputs: Sequence[Output], out: Any, *, trains: bool = True) -> Tensor | None:
    """The first output of a program that is one number with a gradient.

    Without gradients, the only output that is one number; ValueError if there are several.
    """
    results = (look_up(out, output.path) for output in outputs)
    numbers = [x for x in results if x.ndim == 0 and x.is_floating_point()]
    if trains:
        return next((x for x in numbers if x.requires_grad), None)
    if len(numbers) > 1:
        raise ValueError(
            f"several outputs are single numbers (of {[output.path for output in outputs]}), and"
            " without gradients nothing tells which is the loss: let the model return one"
        )
    return numbers[0] if numbers else None


def loss_of(outputs: Sequence[Output], out: Any, *, trains: bool = True) -> Tensor:
    """As `scalar_loss`; ValueError if there is none."""
    loss = scalar_loss(outputs, out, trains=trains)
    if loss is None:
        raise ValueError(
            "a step needs a loss: no output is a single number with a gradient (outputs:"
            f" {[output.path for output in outputs]}); let the model return its loss, and call step"
            " with gradients enabled"
        )
    return loss


class WideGradients:
    """Sums of the gradients of parameters that are narrower than float32."""

    def __init__(self, parameters: Sequence[Tensor]) -> None:
        self._sums: dict[Tensor, Tensor | None] = {
            x: None for x in parameters if x.requires_grad and _wide(x.dtype) != x.dtype
        }

    def take(self) -> None:
        """Take what is in `.grad`."""
        for x, total in self._sums.items():
            if x.grad is not None:
                wide = x.grad.to(_wide(x.dtype))
                self._sums[x] = wide if total is None else total.add_(wide)
                x.grad = None

    def put_back(self) -> None:
        """All of them in `.grad`, in the parameters' own dtype."""
        self.take()  # of what came when the step ended
        for x, total in self._sums.items():
            x.grad = None if total is None else total.to(x.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


__all__ = ["Labels", "Trained", "WideGradients", "loss_of", "scalar_loss"]

"""Which labels count in a loss: found where an input has them, refused where it is not known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwright.ir.capture.capture import capture_folded
from shardwright.ir.ops.counted import Counted, counted_labels

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # of logits (b, s, v), labels, mask (b, s)


class Tokens(nn.Module):
    def __init__(self, loss: Loss) -> None:
        super().__init__()
        self.embed, self.loss = nn.Embedding(11, 8), loss

    def forward(self, ids: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        logits = self.embed(ids) @ self.embed.weight.t()
        return self.loss(logits, labels, mask)


def mean(logits: Tensor, labels: Tensor, ignore: int = -100) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=ignore)


def padded(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """As transformers do it: the last column's label is one that is ignored."""
    return mean(logits.float(), F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous())


def masked_mean(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    each = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    return (each * mask.flatten()).sum() / mask.sum()


def by_count(logits: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    total = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")
    return total / (labels != -100).sum()


COUNTED: dict[str, tuple[Loss, Counted | None]] = {
    "all": (lambda z, y, m: mean(z, y), Counted("labels", 0, -100)),
    "shifted": (lambda z, y, m: mean(z[:, :-1], y[:, 1:]), Counted("labels", 1, -100)),
    "padded": (padded, Counted("labels", 1, -100)),
    "other number": (lambda z, y, m: mean(z[:, :-2], y[:, 2:], -1), Counted("labels", 2, -1)),
    "turned": (lambda z, y, m: mean(z.transpose(0, 1), y.t()), Counted("labels", 0, -100)),
    "a sum": (lambda z, y, m: F.cross_entropy(z[:, 0], y[:, 0], reduction="sum"), None),
    "no labels": (lambda z, y, m: z.square().mean(), None),
}
UNKNOWN: dict[str, tuple[Loss, str]] = {
    "mask": (lambda z, y, m: mean(z, y.masked_fill(m == 0, -100)), "`labels` and `mask`"),
    "a value": (lambda z, y, m: mean(z, y.masked_fill(y == 0, -100)), "from `labels`"),
    "clamped": (lambda z, y, m: mean(z, y.clamp(min=0)), "from some column on"),
    "wide first column": (lambda z, y, m: mean(z[:, :-1], y[:, :-1]), "from some column on"),
    "twice": (lambda z, y, m: mean(z, y[:, :1].expand(-1, 6)), "from some column on"),
    "two": (lambda z, y, m: mean(z, y) + mean(z[:, :-1], y[:, 1:]), "losses have different labels"),
    "masked mean": (masked_mean, "with a number that depends on the batch"),
    "by count": (by_count, "with a number that depends on the batch"),
}


def found(loss: Loss) -> Counted | str | None:
    ids = torch.randint(11, (3, 6))
    batch = {"ids": ids, "labels": ids.clone(), "mask": torch.ones_like(ids)}
    return counted_labels(capture_folded(Tokens(loss), batch, training=True))


@pytest.mark.parametrize("name", COUNTED)
def test_labels_that_count_are_found(name: str) -> None:
    loss, want = COUNTED[name]
    assert found(loss) == want


@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_not_known_is_said(name: str) -> None:
    loss, want = UNKNOWN[name]
    said = found(loss)
    assert isinstance(said, str) and want in said, said


def test_tokens_that_are_labels_all_count() -> None:
    class Shifted(nn.Module):
        def __init__(self, ignore: int) -> None:
            super().__init__()
            self.embed, self.ignore = nn.Embedding(11, 8), ignore

        def forward(self, ids: Tensor) -> Tensor:
            logits = self.embed(ids) @ self.embed.weight.t()
            return mean(logits[:, :-1], ids[:, 1:], self.ignore)

    batch = {"ids": torch.randint(11, (3, 6))}
    assert counted_labels(capture_folded(Shifted(-100), batch, training=True)) is None
    padding = counted_labels(capture_folded(Shifted(0), batch, training=True))
    assert padding == Counted("ids", 1, 0)

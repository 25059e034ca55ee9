"""Example inputs of a Hugging Face model, of every modality, from its configuration.

What a model takes is read off its forward's parameters and its config's numbers: sizes of images,
bands and lengths of sound.  Images that stand for tokens of the text are left out, since their
places in it are values; a model file gives those.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

_BY_FILE = (
    "write a Python file with `build_model()` and `example_inputs(batch, seq)`, which returns "
    "forward's arguments by name"
)


def example_inputs(model: nn.Module, batch: int, seq: int, labels: bool) -> dict[str, object]:
    """What `model` takes for a batch, on the meta device; with `labels`, for a loss too.

    Raises ValueError, with what to do, where the config does not say how large an input is.
    """
    asked = _Asked(model, batch, seq)
    found: dict[str, object] = {}
    for name, make in _MAKERS.items():
        if name not in asked.accepted:
            continue
        made = make(asked)
        if made is not None and (name == asked.main or not asked.stands_in_text(name)):
            found[name] = made
        elif name == asked.main:
            raise ValueError(
                f"the config of {type(model).__name__} does not say how large its `{name}` is: "
                f"{_BY_FILE}"
            )
    decodes = bool(asked.config.is_encoder_decoder)
    if decodes and not labels:
        found["decoder_input_ids"] = asked.tokens()
    if labels:
        found |= _labels(asked, decodes or "input_ids" in found)
    return found


def _labels(asked: _Asked, tokens: bool) -> dict[str, object]:
    """Labels of tokens, or a class for each sample; or the flag that asks for a loss."""
    if "labels" in asked.accepted:
        return {"labels": asked.tokens() if tokens else asked.integers(asked.batch)}
    return {"return_loss": True} if "return_loss" in asked.accepted else {}


@dataclass(frozen=True, slots=True)
class _Asked:
    """A model, and how many samples of how many tokens its inputs are to have."""

    model: Any
    batch: int
    seq: int

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def main(self) -> str:
        """The input without which the model does nothing."""
        return self.model.main_input_name

    @property
    def accepted(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.model.forward).parameters

    def stands_in_text(self, name: str) -> bool:
        """Has the text tokens in whose place the input comes?"""
        kind = "image" if name == "pixel_values" else "audio"
        marks = (f"{kind}_token_id", f"{kind}_token_index")
        return any(isinstance(getattr(self.config, mark, None), int) for mark in marks)

    def number(self, *names: str) -> Any:
        """The first of these attributes of the config, or of one of its parts; None without any."""
        for config in _configs(self.config):
            for name in names:
                if (found := getattr(config, name, None)) is not None:
                    return found
        return None

    def integers(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.long, device="meta")

    def reals(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=self.model.dtype, device="meta")

    def tokens(self) -> Tensor:
        return self.integers(self.batch, self.seq)


def _configs(config: Any) -> Iterator[Any]:
    """A config and its parts."""
    yield config
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            yield from _configs(part)


def _images(asked: _Asked) -> Tensor | None:
    """(b, channels, height, width), with a dim of frames before the channels for videos."""
    size = asked.number("image_size")
    channels = asked.number("num_channels", "in_channels")
    sides = (size, size) if isinstance(size, int) else size
    if not isinstance(channels, int) or not isinstance(sides, (tuple, list)):
        return None
    frames = asked.number("num_frames")
    times = (frames,) if isinstance(frames, int) else ()
    return asked.reals(asked.batch, *times, channels, *sides)


def _spectra(asked: _Asked) -> Tensor | None:
    """(b, bands, frames): as many frames as give an encoder all of its positions."""
    bands, positions = asked.number("num_mel_bins"), asked.number("max_source_positions")
    if not isinstance(bands, int) or not isinstance(positions, int):
        return None
    steps = [m.stride[0] for m in asked.model.modules() if isinstance(m, nn.Conv1d)]
    return asked.reals(asked.batch, bands, positions * prod(steps))


_MAKERS: Mapping[str, Callable[[_Asked], Tensor | None]] = {
    "input_ids": _Asked.tokens,
    "pixel_values": _images,
    "input_features": _spectra,
    "input_values": lambda asked: None,
}
"""Inputs that hold data, by their names in transformers."""


__all__ = ["example_inputs"]

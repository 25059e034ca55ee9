"""What is used of transformers, each thing once; loaded by `ir.capture` alone.

transformers is imported where a function needs it: plans of other models do without.
"""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import FunctionType
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

WRAPPERS = "transformers.integrations"
"""Functions between a model's line and torch's; their backward is that of what they compute."""

MASK_FUNCTIONS: Mapping[str, tuple[str, ...]] = {
    "and_masks": ("mask_functions",),
    "bidirectional_mask_function": (),
    "causal_mask_function": (),
    "chunked_overlay": ("chunk_size",),
    "packed_sequence_mask_function": (),
    "remap_positions_for_packed_sequence": ("mask_function",),
    "sliding_window_overlay": ("sliding_window",),
}
"""Functions of `transformers.masking_utils` that are understood; what their closures tell."""

_EXPERTS_MARKS = ("config", "has_gate", "has_bias", "is_transposed", "is_concatenated")
"""What `use_experts_implementation` notes in the modules whose class it decorates."""


# -- models


def is_pretrained(model: nn.Module) -> bool:
    """Is `model` a model of transformers?  Does not import transformers."""
    package = sys.modules.get("transformers")
    return package is not None and isinstance(model, package.PreTrainedModel)


def version() -> str:
    """The version that is installed.  Raises ImportError without one."""
    import transformers

    return transformers.__version__


def model_class(name: str) -> type[nn.Module] | None:
    """The class of that name (`LlamaForCausalLM`); None if there is none."""
    import transformers

    found = getattr(transformers, name, None)
    is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
    return found if is_model else None


def load_config(path: Path) -> Any:
    """The config in a `config.json`, whose code is not run; raises anything for what is none."""
    import transformers

    return transformers.AutoConfig.from_pretrained(
        str(path), trust_remote_code=False, local_files_only=True
    )


@functools.cache
def usual(name: str) -> frozenset[int | float]:
    """The numbers that this field has in configs of transformers where nothing else is said."""
    from transformers import CONFIG_MAPPING

    found: set[int | float] = set()
    for kind in CONFIG_MAPPING:
        try:
            parameter = inspect.signature(CONFIG_MAPPING[kind]).parameters.get(name)
        except Exception:  # what needs a package that is not installed
            continue
        if parameter is not None and isinstance(parameter.default, (int, float)):
            found.add(parameter.default)
    return frozenset(found)


def build(cls: Any, config: Any, dtype: torch.dtype) -> nn.Module:
    """A new model; the default device decides where it lies."""
    return cls._from_config(config, dtype=dtype)


def no_weights_drawn() -> AbstractContextManager[object]:
    """Inside, new models leave their parameters as memory happens to be."""
    from transformers.initialization import no_init_weights

    return no_init_weights()


# -- attention


def register_attention(
    name: str, attention: Callable[..., Any], mask: Callable[..., Tensor]
) -> None:
    """`attention` and `mask` are what models call whose config has `name` as its implementation."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, mask)


def can_switch_attention(model: Any) -> bool:
    """Does the model look its attention up by name, as `register_attention` has it?"""
    return model._can_set_attn_implementation()


@contextmanager
def attention_by(name: str, configs: Iterable[Any]) -> Generator[None]:
    """Inside, models with these configs call the attention `name`."""
    with _set_in(configs, "_attn_implementation_internal", name):
        yield


@contextmanager
def _set_in(configs: Iterable[Any], attribute: str, value: object) -> Generator[None]:
    """Inside, `attribute` of all configs is `value`."""
    before = [(config, getattr(config, attribute)) for config in configs]
    try:
        for config, _ in before:
            setattr(config, attribute, value)
        yield
    finally:
        for config, was in before:
            setattr(config, attribute, was)


@contextmanager
def without_value_checks() -> Generator[None]:
    """Inside, models do not compare numbers that they read out of tensors, such as how many tokens
    stand for images, and how many images there are."""
    name = "TRANSFORMERS_DISABLE_TORCH_CHECK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


# -- states of layers, which models keep in a cache that is given to them


_CACHE_NAMES = ("cache", "past_key_values", "cache_params")
"""What models call the argument of `forward` that is their cache, the newest name first."""

State: TypeAlias = tuple[int, int]
"""A state by its layer, and its number in that layer."""


def cache_argument(model: nn.Module) -> str:
    """The name of the cache among the arguments of `forward`; empty if it takes none."""
    accepted = inspect.signature(model.forward).parameters
    return next((name for name in _CACHE_NAMES if name in accepted), "")


def has_states(model: Any) -> bool:
    """Does the model's own cache hold something besides keys and values?"""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=model.config)
    kept = (hasattr(layer, "update_recurrent_state") for layer in getattr(cache, "layers", ()))
    return any(kept) or any(getattr(cache, "is_linear", ()))


def cache_of(given: Mapping[State, Tensor]) -> Any:
    """A cache of states alone: `held` has those after a forward pass, `read` those it began from.

    Keys, values and the inputs of convolutions are given back as they come: of these the
    operators of ours take care.
    """
    from transformers import Cache

    class States(Cache):
        def __init__(self) -> None:
            super().__init__(layers=[])
            self.held: dict[State, Tensor] = {}
            self.read: set[State] = set()

        def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
            return key_states, value_states

        def get_conv_state(self, *_: Any, **__: Any) -> None:
            return None

        def update_conv_state(self, conv_states: Tensor, *_: Any, **__: Any) -> Tensor:
            return conv_states

        def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
            state = (layer_idx, state_idx)
            if state in given and state not in self.held:
                self.held[state] = given[state].clone()  # which a model may change in place
                self.read.add(state)
            return self.held.get(state)

        def update_recurrent_state(
            self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0, **_: Any
        ) -> Tensor:
            self.held[layer_idx, state_idx] = recurrent_states
            return recurrent_states

        def has_previous_state(self, *_: Any, **__: Any) -> bool:
            return False

        def is_recording_past(self, layer_idx: int) -> bool:
            return False

    return States()


# -- experts


def register_experts(name: str, experts: Callable[..., Tensor]) -> None:
    """`experts` is what modules of experts call whose config has `name` as its implementation."""
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(name, experts)


def is_experts(module: nn.Module) -> bool:
    """Does the module look its experts up by name, as `register_experts` has it?"""
    return all(mark in vars(module) for mark in _EXPERTS_MARKS)


@contextmanager
def experts_by(name: str, configs: Iterable[Any]) -> Generator[None]:
    """Inside, modules of experts with these configs call the experts `name`."""
    with _set_in(configs, "_experts_implementation_internal", name):
        yield


def use_own_loops(module: Any) -> None:
    """From now on a module of experts loops over its experts, in plain torch.

    By default they run in torch's grouped product, which knows no float64.
    """
    module.config._experts_implementation_internal = "eager"


def gated(module: Any, first: Tensor) -> Tensor:
    """What a module of experts makes of its first product, for its second."""
    return module._apply_gate(first) if module.has_gate else module.act_fn(first)


# -- what a mask function means: transformers builds them as closures


def mask_name(function: Callable[..., Any]) -> str:
    """`sliding_window_overlay` for the closure that `sliding_window_overlay(4)` returns."""
    return getattr(function, "__qualname__", repr(function)).split(".")[0]


def _variable(function: Callable[..., Any]) -> Any:
    """The variable of the closure `function` that `MASK_FUNCTIONS` names."""
    assert isinstance(function, FunctionType)
    (name,) = MASK_FUNCTIONS[mask_name(function)]
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return cells[name].cell_contents


def overlays(function: Any, *, positions_given: bool) -> tuple[Callable[..., Any], ...]:
    """The mask functions whose intersection `function` is.

    Without `position_ids` from the caller a row is one sequence: the model counts positions from
    0 itself.  The masks that transformers adds for packed rows while tracing are then left out.
    """
    name = mask_name(function)
    if name == "and_masks":
        parts = [overlays(part, positions_given=positions_given) for part in _variable(function)]
        return tuple(part for group in parts for part in group)
    if not positions_given:
        if name == "packed_sequence_mask_function":
            return ()
        if name == "remap_positions_for_packed_sequence":
            return overlays(_variable(function), positions_given=positions_given)
    return (function,)


def chunk(parts: tuple[Callable[..., Any], ...]) -> tuple[int, tuple[Callable[..., Any], ...]]:
    """Length of the chunks that attention does not leave, 0 for none, and the other overlays."""
    chunks = [part for part in parts if mask_name(part) == "chunked_overlay"]
    sizes = [int(_variable(part)) for part in chunks]
    if len(set(sizes)) > 1:
        raise ValueError(f"the model attends in chunks of {sizes} tokens at once")
    return (sizes[0] if sizes else 0), tuple(part for part in parts if part not in chunks)


def band(parts: tuple[Callable[..., Any], ...]) -> tuple[bool, int] | None:
    """(causal, window) if the overlays mean just that, else None.  Window 0 is none."""
    causal, window = False, 0
    for part in parts:
        name = mask_name(part)
        if name == "causal_mask_function":
            causal = True
        elif name == "sliding_window_overlay":
            width = int(_variable(part))
            window = min(window, width) if window else width
        elif name != "bidirectional_mask_function":
            return None
    return causal, window


def whole_mask(
    parts: tuple[Callable[..., Any], ...],
    batch: int,
    queries: int,
    keys: int,
    attention_mask: Tensor | None,
    device: Any,
) -> Tensor | None:
    """The overlays as one tensor (batch, 1, queries, keys), True where a query attends a key."""
    from transformers.masking_utils import and_masks, sdpa_mask

    return sdpa_mask(
        batch,
        queries,
        keys,
        mask_function=and_masks(*parts),
        attention_mask=attention_mask,
        allow_is_causal_skip=False,
        allow_is_bidirectional_skip=False,
        device=device,
    )


__all__ = [
    "MASK_FUNCTIONS",
    "State",
    "WRAPPERS",
    "attention_by",
    "band",
    "build",
    "cache_argument",
    "cache_of",
    "can_switch_attention",
    "chunk",
    "experts_by",
    "gated",
    "has_states",
    "is_experts",
    "is_pretrained",
    "load_config",
    "mask_name",
    "model_class",
    "no_weights_drawn",
    "overlays",
    "register_attention",
    "register_experts",
    "use_own_loops",
    "version",
    "whole_mask",
    "without_value_checks",
]

"""Models of Hugging Face `transformers`, which is imported only when it is used.

Capture wants attention as one operator, and it wants causal and windowed masks as two numbers
instead of a q x k tensor.  `shardwright_attention` switches a model over for that: transformers'
own registries then call the two functions at the bottom of this file, and, for experts, the one in
`ir/capture/huggingface_experts.py`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...compat import transformers as hf
from ...compat.transformers import is_pretrained
from ...facts.given import shown
from ..ops.attention import attention, mask_stand_in
from .arguments import called_by_name
from .huggingface_config import load_config, refusals
from .huggingface_experts import shardwright_experts
from .states import StartsAnew

NAME = "shardwright"

_MISSING = "this needs the package `transformers`: pip install 'shardwright[hf]'"

# what an attention layer may pass along that changes nothing in what it computes
_HARMLESS = frozenset(
    {
        "position_ids",  # rotary layers have used them already
        "cache_position",
        "cache_params",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
        "num_items_in_batch",
        "seq_idx",
        "use_cache",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "layer_idx",
        "deterministic",
        "training",
    }
)


@dataclass(frozen=True, slots=True)
class MaskInfo:
    """What a mask made by transformers means: `band` in numbers, the rest as a tensor."""

    causal: bool
    window: int
    mask: Tensor | None
    chunk: int = 0  # only while a model is captured to be served; else chunks are in `mask`


@dataclass(slots=True)
class _Trace:
    """Masks handed out while one model is traced: (stand-in tensor, its meaning)."""

    positions_given: bool
    serving: bool
    masks: list[tuple[Tensor, MaskInfo]] = field(default_factory=list)

    def lookup(self, mask: Tensor) -> MaskInfo | None:
        return next((info for stand_in, info in self.masks if stand_in is mask), None)


_trace: ContextVar[_Trace | None] = ContextVar("_trace", default=None)


@contextmanager
def shardwright_attention(
    model: nn.Module, *, positions_given: bool = False, serving: bool = False
) -> Generator[None]:
    """Inside, `model` and its submodels call our operators and keep no KV cache.

    The operators are `shardwright::attention` and, for experts, `shardwright::moe`.

    `positions_given`: the caller passes `position_ids`, which may pack several sequences into one
    row; a mask that separates them is then built as a tensor.  `serving`: what is captured will
    attend over a cache, where attention in chunks must not pass for causal while it is short.
    """
    hf.register_attention(NAME, _attention_forward, _mask)
    models: list[Any] = [module for module in model.modules() if is_pretrained(module)]
    configs: dict[int, Any] = {id(module.config): module.config for module in models}
    # submodels that write attention out themselves keep doing so
    switched: dict[int, Any] = {
        id(m.config): m.config for m in models if hf.can_switch_attention(m)
    }
    caching = [(config, config.use_cache) for config in configs.values() if _caches(config)]
    token = _trace.set(_Trace(positions_given, serving))
    try:
        for config, _ in caching:
            config.use_cache = False
        with (
            hf.attention_by(NAME, switched.values()),
            shardwright_experts(model),
            hf.without_value_checks(),
        ):
            yield
    finally:
        _trace.reset(token)
        for config, use_cache in caching:
            config.use_cache = use_cache


def state_shapes(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[hf.State, Tensor]:
    """What the layers of a model that is called with `inputs` (b, t) leave of two tokens.

    Run where tensors are fake: only shapes and dtypes mean anything.
    """
    name = hf.cache_argument(model)
    if not name or not hf.has_states(model):
        return {}
    few = {key: x[:, :2] if x.ndim == 2 else x for key, x in inputs.items()}
    cache = hf.cache_of({})
    with torch.no_grad():
        model(**few, **{name: cache})
    return cache.held


@contextmanager
def states_given(
    model: nn.Module, inputs: Sequence[str], states: Sequence[hf.State]
) -> Generator[None]:
    """Inside, `forward` takes a tensor for each state besides, by `state_name`.

    It then gives (what it gives, the new states by those names).  Raises StartsAnew for a state
    that it makes of the tokens alone, and not of the one before.
    """
    if not states:
        yield
        return
    own, name = model.forward, hf.cache_argument(model)

    def forward(**given: Tensor) -> Any:
        before = {state: given.pop(state_name(state)) for state in states}
        cache = hf.cache_of(before)
        out = own(**given, **{name: cache})
        if forgotten := [state for state in states if state not in cache.read]:
            raise StartsAnew(state_name(forgotten[0]))
        items = out.items() if isinstance(out, Mapping) else enumerate(out)
        results = {key: item for key, item in items if item is not cache}
        return results, {state_name(state): cache.held[state] for state in states}

    with called_by_name(model, forward, [*inputs, *map(state_name, states)]):
        yield


def state_name(state: hf.State) -> str:
    """`state_3_0` for the first state of layer 3."""
    return f"state_{state[0]}_{state[1]}"


def _caches(config: Any) -> bool:
    """Would the model return a KV cache?"""
    return bool(getattr(config, "use_cache", False))


def rebuild(model: nn.Module) -> nn.Module:
    """A new model of the same class and config; the caller's factory modes decide where it lies."""
    dtype: Any = model.dtype
    with hf.no_weights_drawn():
        return hf.build(type(model), copy.deepcopy(model.config), dtype)


def with_weights(path: Path, dtype: torch.dtype | None) -> nn.Module:
    """The model of the config at `path` on the CPU, with the weights that its class draws.

    Errors and `dtype` as in `from_config`.
    """
    config = load_config(path)
    with torch.device("cpu"):
        return hf.build(_class_of(config), config, dtype or _own_dtype(config))


def from_config(config: Any, *, dtype: torch.dtype | None) -> nn.Module:
    """A model on the meta device, from a `config.json`, its folder, or a config.

    The class is the one named in the config's `architectures`, the dtype that of the config where
    none is given.  Raises ValueError for a file that is no config, a class that is not in
    transformers, and weights that are quantised.
    """
    try:
        hf.version()
    except ImportError as error:
        raise ValueError(f"to plan a Hugging Face model, {_MISSING}") from error
    if isinstance(config, (str, Path)):
        config = load_config(Path(config))
    cls = _class_of(config)
    _check_plain(config)
    with torch.device("meta"), refusals(f"transformers cannot build {cls.__name__} so"):
        return hf.build(cls, config, dtype or _own_dtype(config))


def _class_of(config: Any) -> Any:
    """The class in transformers that the config names."""
    names: list[str] = list(getattr(config, "architectures", None) or [])
    if not names:
        raise ValueError(
            f"the config of `{config.model_type}` has no `architectures`: name the class to build "
            'there, for example `"architectures": ["LlamaForCausalLM"]`'
        )
    cls = hf.model_class(names[0])
    if cls is None:
        raise ValueError(
            f"`architectures` names {shown(names[0])}, which is not in transformers "
            f"{hf.version()}; models with their own code need a Python file with "
            "`build_model`"
        )
    return cls


def _own_dtype(config: Any) -> torch.dtype:
    """The dtype that the config gives its weights, or that of its text model; else float32."""
    given = config.dtype or config.get_text_config().dtype or torch.float32
    if not isinstance(given, torch.dtype) or not given.is_floating_point or given.itemsize < 2:
        raise ValueError(
            f"the config of `{config.model_type}` has the dtype {given}, in which no model is "
            "computed here; give one, e.g. --dtype bfloat16"
        )
    return given


def _check_plain(config: Any) -> None:
    """Raises ValueError where the config says that its weights are quantised."""
    quantised = getattr(config, "quantization_config", None)
    if quantised is None:
        return
    method = quantised.get("quant_method", "") if isinstance(quantised, dict) else ""
    named = shown(method or quantised)
    raise ValueError(
        f"the config of `{config.model_type}` has a `quantization_config` ({named}): "
        "quantised weights cannot be planned. Plan a copy of the config without it, and load "
        "weights that were converted to bfloat16"
    )


# ---- what transformers calls -------------------------------------------------------------------


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    use_vmap: bool = False,
    device: Any = "cpu",
    **kwargs: Any,
) -> Tensor:
    """A stand-in for the mask that transformers describes by `mask_function`.

    The stand-in has the shape of the whole mask and must never be read: `_attention_forward`
    knows it by identity and takes its meaning from the trace.  Capture refuses a graph that does.
    """
    trace = _trace.get()
    if trace is None:
        raise ValueError(
            f"attention implementation `{NAME}` works only while a model is captured; "
            'set `attn_implementation="sdpa"` to run it'
        )
    if q_offset != 0 or kv_offset != 0:
        raise ValueError("capture runs without a KV cache, but the model passed cached positions")
    overlays = hf.overlays(mask_function, positions_given=trace.positions_given)
    chunk, rest = hf.chunk(overlays) if trace.serving else (0, overlays)
    band = hf.band(rest)
    if band is not None:
        padding = None if attention_mask is None else attention_mask.to(torch.bool)
        info = MaskInfo(*band, None if padding is None else padding[:, None, None, :], chunk)
    elif use_vmap:
        raise ValueError(
            "the model adds a mask function of its own to the attention mask "
            f"({', '.join(map(hf.mask_name, overlays))}); pass the whole mask as a 4-D "
            "`attention_mask` instead"
        )
    else:  # any other index-based mask: as a tensor, exactly
        whole = hf.whole_mask(overlays, batch_size, q_length, kv_length, attention_mask, device)
        info = MaskInfo(False, 0, whole)
    stand_in = mask_stand_in(torch.empty(0, device=device), batch_size, q_length, kv_length)
    trace.masks.append((stand_in, info))
    return stand_in


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`attention` as transformers' layers call it; (b, s, h, d) out.

    `s_aux` are its sinks; `position_bias` (b or 1, h, q, k) is added to the scores.
    """
    for name, argument in kwargs.items():
        if argument is not None and argument is not False and name not in _HARMLESS:
            raise ValueError(
                f"{type(module).__name__} passes `{name}` to its attention, which "
                "`shardwright::attention` does not know"
            )
    trace = _trace.get()
    info = None
    if attention_mask is not None and trace is not None:
        info = trace.lookup(attention_mask)
        if info is None and trace.masks:
            raise ValueError(
                f"{type(module).__name__} changes the attention mask between making it and using "
                "it; its meaning is lost. Pass the whole mask as a 4-D `attention_mask`"
            )
    if info is None:  # the model makes no mask itself, or the user gave a whole one
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        if sliding_window is not None and attention_mask is None:
            raise ValueError(
                f"{type(module).__name__} passes sliding_window={sliding_window} but no mask; "
                "transformers' own implementations disagree on what that means"
            )
        info = MaskInfo(
            bool(causal) and attention_mask is None and query.shape[2] > 1, 0, attention_mask
        )
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    output = attention(
        query,
        key,
        value,
        _biased(position_bias, info.mask),
        float(scale),
        info.causal,
        info.window,
        float(softcap or 0.0),
        float(dropout),
        s_aux,
        info.chunk,
    )
    return output.transpose(1, 2), None


def _biased(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """What a bias of the scores and a mask are together, as one mask.

    Keys that the mask hides get the lowest number and not -inf, as transformers has it: a query
    that sees none of them attends all alike.
    """
    if bias is None or mask is None:
        return bias if mask is None else mask
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask


__all__ = [
    "MaskInfo", "from_config", "is_pretrained", "rebuild", "shardwright_attention", "state_name",
    "state_shapes", "states_given", "with_weights",
]  # fmt: skip

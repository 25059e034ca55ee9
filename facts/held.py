"""Names that a generated module has for itself, so that no part of the user's may be called so."""

from __future__ import annotations

# by every class in it, and by the model alone; `tests/runtime/test_module.py` compares
BY_ALL = frozenset({
    "MODULES", "OPTIONS", "WEIGHTS", "bring_weights", "compile_forward", "device", "eagerly",
    "explain_failures", "generator", "keeping", "mesh",
})  # fmt: skip
BY_MODEL = frozenset({
    "CACHES", "CONTEXT", "DECODE", "FIRST_LAYERS", "FIXED", "INPUTS", "LABELS", "LAYERS", "MESH",
    "MICRO_BATCHES", "NOT_MATRICES",
    "OPTIMIZER", "OUTPUTS", "PARAMETERS", "PHASE", "REDUCE", "admit", "append",
    "cached_lengths",
    "clip_grad_norm_", "compile_layers", "data_shard", "decode", "demo", "ema", "evaluate", "free",
    "from_checkpoint",
    "from_state_dict", "full_gradients", "full_state_dict", "gather_outputs", "generate",
    "load_checkpoint", "load_from", "local", "local_part", "moved_weights", "new_cache",
    "optimizer", "pack", "prefill",
    "programs", "recompute", "reset_parameters", "room", "save_checkpoint",
    "save_pretrained", "serving", "set_cache",
    "shard_inputs", "shard_rows", "step", "tensors", "truncate", "unpack", "wait_for_checkpoint",
})  # fmt: skip


def taken(path: str) -> str:
    """The part of a path that a generated module needs for itself; "" where there is none.

    >>> taken("blocks.0.mesh.weight"), taken("generate.weight"), taken("blocks.generate.weight")
    ('mesh', 'generate', '')
    """
    first, *rest = path.split(".")
    own = [first] if first in BY_MODEL else []
    return next(iter([*own, *(part for part in (first, *rest) if part in BY_ALL)]), "")


__all__ = ["BY_ALL", "BY_MODEL", "taken"]

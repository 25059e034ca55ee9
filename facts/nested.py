"""Nested data, as models take it: dicts, lists, tuples, dataclasses, and what is in them.

PyTorch's own pytrees know neither dataclasses that nobody registered nor mappings other than dicts,
such as the batches of transformers' tokenizers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeAlias, cast

Path: TypeAlias = tuple[str | int, ...]  # of keys, indices and names of fields
# What a plan has beside tensors: `()` is an empty container, of any kind.
Constant: TypeAlias = bool | int | float | str | tuple[()] | None


def leaves(item: object, path: Path = ()) -> Iterator[tuple[Path, object]]:
    """(path, leaf) of all that is no container; an empty container is a leaf, `()`.

    >>> list(leaves({"batch": {"ids": 1, "masks": [None]}, "more": []}))
    [(('batch', 'ids'), 1), (('batch', 'masks', 0), None), (('more',), ())]
    """
    children = _children(item)
    if children is None:
        yield path, item
    elif not children:
        yield path, ()
    else:
        for key, child in children:
            yield from leaves(child, (*path, key))


def with_leaves(item: Any, new: Mapping[Path, object], path: Path = ()) -> Any:
    """Containers like those of `item`, with the leaves of `new`; `item` stays as it is.

    >>> with_leaves({"ids": [1, 2], "flag": True}, {("ids", 1): 5})
    {'ids': [1, 5], 'flag': True}
    """
    if path in new:
        return new[path]
    children = _children(item)
    if not children:
        return item
    made = {key: with_leaves(child, new, (*path, key)) for key, child in children}
    if isinstance(item, tuple):
        kind: Any = type(cast("tuple[object, ...]", item))
        return kind(*made.values()) if hasattr(kind, "_fields") else kind(list(made.values()))
    if isinstance(item, Mapping) and not isinstance(item, MutableMapping):
        return made
    like = copy.copy(item)
    for key, child in made.items():
        if isinstance(item, (MutableMapping, list)):
            like[key] = child
        else:
            object.__setattr__(like, str(key), child)  # of a dataclass, which may be frozen
    return like


def nested(entries: Mapping[Path, object]) -> Any:
    """Dicts that have each entry at its path.

    >>> nested({("batch", "ids"): 1, ("batch", "masks", 0): 2, ("scale",): 3})
    {'batch': {'ids': 1, 'masks': {0: 2}}, 'scale': 3}
    """
    if () in entries:
        return entries[()]
    groups: dict[str | int, dict[Path, object]] = {}
    for path, entry in entries.items():
        groups.setdefault(path[0], {})[path[1:]] = entry
    return {key: nested(group) for key, group in groups.items()}


def is_same(a: object, b: object) -> bool:
    """Are two constants of one type and value?  NaN is, and 1 is not 1.0."""
    return type(a) is type(b) and repr(a) == repr(b)


def spelled(path: Path) -> str:
    """A path from an argument on, as Python has it.

    >>> spelled(("batch", "masks", 0))
    "batch['masks'][0]"
    """
    return str(path[0]) + "".join(f"[{key!r}]" for key in path[1:])


def dotted(path: Path) -> str:
    """A path as a name.

    >>> dotted(("hidden_states", 3))
    'hidden_states.3'
    """
    return ".".join(map(str, path))


def spelled_all(paths: Iterable[Path], most: int = 5) -> str:
    """Several of them, the first `most` by name."""
    names = [spelled(path) for path in paths]
    more = [f"and {len(names) - most} more"] if len(names) > most else []
    return ", ".join([*names[:most], *more])


def _children(item: object) -> list[tuple[Any, object]] | None:
    """(key, child) pairs of a container; None of anything else."""
    if isinstance(item, Mapping):
        return list(cast("Mapping[object, object]", item).items())
    if isinstance(item, (tuple, list)):
        return list(enumerate(cast("list[object]", item)))
    if is_dataclass(item) and not isinstance(item, type):
        known = [field.name for field in fields(item) if hasattr(item, field.name)]
        return [(name, getattr(item, name)) for name in known]
    return None


__all__ = [
    "Constant", "Path", "dotted", "is_same", "leaves", "nested", "spelled", "spelled_all",
    "with_leaves",
]  # fmt: skip

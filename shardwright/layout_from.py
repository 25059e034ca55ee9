"""What people run now, as `plan` takes it: layouts read from other tools' flags and files."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .codegen.export.flags import Flags
from .codegen.export.registry import TARGETS
from .codegen.export.target import Read, Target
from .facts.files import read_text
from .facts.phases import SERVE, TRAIN
from .planner.errors import PlanError

_READERS = ("megatron", "vllm", "sglang", "torchtitan")


@dataclass(frozen=True, slots=True)
class LayoutFrom:
    """A layout in words, further options of `plan` by name, and what of the flags is in neither."""

    tool: str
    layout: str
    options: Mapping[str, Any]
    unread: tuple[str, ...]

    def joined(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """What it adds to options of `plan` that a user gave; raises PlanError where they differ.

        For a server the default of a phase, `train`, is `serve`.
        """
        found, phase = dict(self.options), options.get("phase") or TRAIN.name
        if "phase" not in found and phase == TRAIN.name:
            return {**found, "phase": SERVE.name, "optimizer": SERVE.optimizer}
        for name, value in found.items():
            given = options.get(name)
            if given is not None and given != value:
                raise PlanError(
                    f"--{name.replace('_', '-')} {given}, and what --layout-from says is {value}; "
                    "they must agree"
                )
        return found

    def __str__(self) -> str:
        names = {"micro_batches": "micro-batches", "reduce_dtype": "reduce-dtype"}
        more = [f"--{names.get(name, name)} {value}" for name, value in self.options.items()]
        return f"{TARGETS[self.tool].title}: {' '.join([f'--layout {self.layout}', *more])}"


def layout_from(given: str, gpus: int | None = None) -> LayoutFrom:
    """The layout that flags say, or a file with them: Megatron's, vLLM's, SGLang's, or torchtitan's
    TOML or flags.

    `gpus` is needed where they leave the number of replicas open.  Raises PlanError for what is no
    such thing, and makes no sense.
    """
    flags = _flags(given)
    target = _tool(flags)
    read: Read = target.read(flags, gpus)
    return LayoutFrom(target.name, read.layout, read.options, read.unread)


def _flags(given: str) -> Flags:
    """Those in a text that has some, else those in the file of that name."""
    if any(word.startswith("-") for word in given.split()):
        return Flags.of(given)
    path = Path(given)
    if not path.is_file():
        raise PlanError(f"--layout-from {given}: there is no such file, and these are no flags")
    text = read_text(path)
    if path.suffix != ".toml":
        return Flags.of(text)
    try:
        return Flags(dict(_keys(tomllib.loads(text), "")))
    except tomllib.TOMLDecodeError as error:
        raise PlanError(f"--layout-from {given}: {error}") from error


def _keys(table: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """`section.key`, as flags of the same tool have it."""
    for key, value in table.items():
        name = prefix + key.replace("_", "-")
        if isinstance(value, dict):
            yield from _keys(value, f"{name}.")
        elif value is not False:
            yield name, () if value is True else (str(value),)


def _tool(flags: Flags) -> Target:
    """Whose flags they are: of the tool that the words name, else that knows most of them."""
    said = (*flags.before, *flags.given.get("m", ()))  # `vllm serve`, `python -m sglang...`
    named = [t for t in _READERS if any(t in word for word in said)]
    scores = {name: len(flags.given.keys() & set(TARGETS[name].knows)) for name in _READERS}
    best = named[0] if named else max(_READERS, key=lambda name: scores[name])
    if not named and not scores[best]:
        known = "; ".join(f"{TARGETS[n].title}: --{TARGETS[n].knows[0]}" for n in _READERS)
        raise PlanError(f"--layout-from: no flag is one of a tool that is known here ({known})")
    return TARGETS[best]


__all__ = ["LayoutFrom", "layout_from"]

"""What the stages of a model have of its tensors, by the names of the original."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..module.checkpoint import Source
from ..module.module import ShardedModule
from ..module.parameters import matrices as matrices_of


class OfStage:
    """Of a checkpoint of the whole model what one stage takes, and what no stage knows."""

    def __init__(self, source: Source, others: set[str]) -> None:
        """`others` are names of tensors and layers (`layers.3.`) that the stage has not."""
        self.title = source.title
        self._source = source
        self._others = others
        self._layers = tuple(name for name in others if name.endswith("."))

    def names(self) -> list[str]:
        """All names but those of other stages."""
        given = self._source.names()
        return [n for n in given if n not in self._others and not n.startswith(self._layers)]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one full tensor."""
        return self._source.shape(name)

    def read(self, name: str, slices: tuple[slice, ...]) -> Tensor:
        """One slice, one `slice` per dim."""
        return self._source.read(name, slices)


def held(stage: type[ShardedModule]) -> set[str]:
    """Original names of what a stage has, aliases too, and of its layers, with a dot behind."""
    found: set[str] = set()
    for name, param in stage.PARAMETERS.items():
        found |= {param.part.name if param.part else name, *param.aliases}
    for path, classes in stage.LAYERS.items():
        first = stage.FIRST_LAYERS.get(path, 0)
        found |= {f"{path}.{number}." for number in range(first, first + len(classes))}
    return found


def originals(classes: Sequence[type[ShardedModule]], *, trained: bool = False) -> set[str]:
    """Names of the originals of all stages, or of those that are trained."""
    return {
        param.part.name if param.part else name
        for each in classes
        for name, param in each.PARAMETERS.items()
        if not trained or (param.kind == "parameter" and param.trainable)
    }


def matrices(classes: Sequence[type[ShardedModule]]) -> set[str]:
    """Names of the trained originals of all stages that are matrices of hidden layers."""
    tables = [matrices_of(each.PARAMETERS, each.NOT_MATRICES) for each in classes]
    return {name for table in tables for name in table}


def shared(classes: Sequence[type[ShardedModule]]) -> dict[str, tuple[int, ...]]:
    """The trained parameters that several stages have, with the stages' numbers.

    Raises ValueError where they store one differently.
    """
    found: dict[str, list[int]] = {}
    for number, each in enumerate(classes):
        for name, param in each.PARAMETERS.items():
            if param.kind == "parameter" and param.trainable:
                found.setdefault(name, []).append(number)
    for name, numbers in found.items():
        specs = {classes[number].PARAMETERS[name].spec for number in numbers}
        if len(specs) > 1:
            raise ValueError(f"stages {numbers} store `{name}` as {' and '.join(sorted(specs))}")
    return {name: tuple(numbers) for name, numbers in found.items() if len(numbers) > 1}


__all__ = ["OfStage", "held", "matrices", "originals", "shared"]

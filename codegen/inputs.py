"""How a generated `forward` takes its arguments, in whatever form the original has them."""

from __future__ import annotations

from collections.abc import Sequence

from ..facts.nested import Constant, Path
from ..ir.graph import Graph
from .names import hides
from .source import WIDTH, number_text, statement


def taken_in(graph: Graph, names: Sequence[str]) -> tuple[list[str], list[str]]:
    """`def forward(...)`, and the statements that give its tensors these names."""
    sources = [source.name for source in graph.inputs]
    if graph.signature is None:
        renamed = [
            f"        {name} = " + (f'others["{source}"]' if hides(source) else source)
            for name, source in zip(names, sources, strict=True)
            if name != source  # also where a mesh axis or a built-in has the name
        ]
        return _head(sources, len(sources), "Tensor"), renamed
    given = graph.signature.names
    passed = [f"{name}={name}" for name in given if not hides(name)]
    passed += ["**others"] * any(map(hides, given))
    targets = ", ".join(names) if len(names) > 1 else f"({names[0]},)" if names else "_"
    unpack = statement(f"{targets} = self.unpack({', '.join(passed)})", 2)
    return _head(given, graph.signature.by_position, "object"), unpack


def _head(names: Sequence[str], by_position: int, kind: str) -> list[str]:
    """The first arguments by position or name, others by name alone.

    One called `torch` would hide what the body calls by that name, so it is no variable; behind it
    none has its original's position.
    """
    hiding = [number for number, name in enumerate(names) if hides(name)]
    by_position = min([by_position, *hiding])
    arguments = ["self", *(f"{name}: {kind}" for name in names[:by_position])]
    named = [f"{name}: {kind}" for name in names[by_position:] if not hides(name)]
    arguments += ["*", *named] if named else []
    arguments += [f"**others: {kind}"] if hiding else []
    line = f"    def forward({', '.join(arguments)}) -> object:"
    if len(line) <= WIDTH:
        return [line]
    return ["    def forward(", *(f"        {each}," for each in arguments), "    ) -> object:"]


def fixed_table(graph: Graph) -> list[str]:
    """`FIXED = {("scale",): 2.0}`, of a graph that holds for some values alone."""
    if graph.signature is None or not graph.signature.fixed:
        return []
    rows = [f"{path_text(path)}: {_constant(value)}" for path, value in graph.signature.fixed]
    single = f"    FIXED = {{{', '.join(rows)}}}"
    if len(single) <= WIDTH:
        return [single]
    return ["    FIXED = {", *(f"        {row}," for row in rows), "    }"]


def path_text(path: Path) -> str:
    """A path as Python has it: `("batch", 0)`."""
    keys = [f'"{key}"' if isinstance(key, str) else str(key) for key in path]
    return f"({', '.join(keys)}{',' if len(keys) == 1 else ''})"


def _constant(value: Constant) -> str:
    return f'"{value}"' if isinstance(value, str) else number_text(value)


__all__ = ["fixed_table", "path_text", "taken_in"]

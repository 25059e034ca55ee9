"""The user's functions in a generated module: each once, under its own name, before the classes."""

from __future__ import annotations

import builtins
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from ..ir.graph import FunctionCall, Graph
from .classes import RESERVED
from .names import hides
from .source import signature


@dataclass(slots=True)
class _Written:
    head: tuple[str, ...]
    body: tuple[str, ...]
    origins: dict[str, None] = field(default_factory=dict[str, None])

    def lines(self) -> list[str]:
        """The whole function."""
        return [*self.head, f'    """{"; ".join(self.origins)}."""', *self.body]


class Functions:
    """The functions written so far.

    `names` are those that they may have: of functions that the graphs call, as far as nothing else
    in the module is called so.  No variable may hide one.
    """

    def __init__(self, graphs: Iterable[Graph], taken: Iterable[str]) -> None:
        graphs = list(graphs)
        used = {*taken, *RESERVED, *dir(builtins), "nn", "self", "layer", "device"}
        used |= {each.name for graph in graphs for each in graph.inputs}
        calls = {call.name for g in graphs for node in g.nodes for call in node.loc.functions}
        self.names = frozenset(name for name in calls - used if not hides(name))
        self.baked: set[str] = set()  # labels of dims whose planned size the text holds
        self._made: dict[str, _Written] = {}

    def add(
        self,
        call: FunctionCall,
        arguments: Sequence[str],
        results: int,
        body: Sequence[str],
        baked: Collection[str],
    ) -> bool:
        """Write a function; not where it needs more than tensors, or another has its name."""
        if call.name not in self.names or re.search(r"\bself\b", "\n".join(body)):
            return False
        returned = "Tensor" if results == 1 else f"tuple[{', '.join(['Tensor'] * results)}]"
        typed = [f"{name}: Tensor" for name in arguments]
        head = tuple(signature(call.name, typed, returned, 0))
        made = self._made.setdefault(call.name, _Written(head, tuple(body)))
        if (made.head, made.body) != (head, tuple(body)):
            return False
        made.origins[str(call)] = None
        self.baked |= set(baked)
        return True

    def parts(self, lines: Iterable[str]) -> list[list[str]]:
        """The lines of each function that these lines call, or that one of those calls: in the
        order in which they were written, inner ones first."""
        wanted, left = dict[str, None](), ["\n".join(lines)]
        while left:
            text = left.pop()
            for name, made in self._made.items():
                if name not in wanted and re.search(rf"\b{name}\(", text):
                    wanted[name] = None
                    left.append("\n".join(made.body))
        return [made.lines() for name, made in self._made.items() if name in wanted]


__all__ = ["Functions"]

"""The classes of a generated module: each text once, under the name of the user's class."""

from __future__ import annotations

import builtins
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ..facts.users import Import
from ..ir.graph import FunctionCall
from ..ir.graph.names import is_identifier
from .source import WIDTH, statement

# What a generated module imports or defines besides; a class of the user's may be called so, too
RUNTIME = (
    "Cache", "Home", "Input", "Labels", "Layer", "Output", "Param", "Part", "PipelinedModule",
    "SequenceState", "Sharded", "ShardedModule", "Stage", "Weight",
    "ops",
)  # fmt: skip
RESERVED = frozenset({*RUNTIME, "ShardedModel", "Decoding", "Tensor", "F", "torch"})


@dataclass(slots=True)
class _Class:
    name: str
    base: str
    body: tuple[str, ...]
    origins: list[str]

    def lines(self) -> list[str]:
        """The whole class."""
        doc = "; ".join(dict.fromkeys(self.origins))
        return [f"class {self.name}({self.base}):", f'    """{doc}."""', "", *self.body]


class Classes:
    """The classes written so far, in an order in which each stands before those that name it.

    None is called as one of `taken`, what the module imports of the user's.
    """

    def __init__(self, taken: Iterable[str] = ()) -> None:
        self._taken = RESERVED | set(taken)
        self._made: dict[tuple[str, str, tuple[str, ...]], _Class] = {}

    def add(self, wanted: str, base: str, body: Sequence[str], origin: str) -> str:
        """The name of the class that `body` makes: `wanted`, with a number where that is taken.

        One that is there already is used again.
        """
        key = (wanted, base, tuple(body))
        if key not in self._made:
            taken = {known.name for known in self._made.values()} | self._taken
            name, count = wanted, 1
            while name in taken:
                count += 1
                name = f"{wanted}{count}"
            self._made[key] = _Class(name, base, tuple(body), [])
        self._made[key].origins.append(origin)
        return self._made[key].name

    def parts(self) -> list[list[str]]:
        """The lines of each class."""
        return [made.lines() for made in self._made.values()]


def names_of(imports: Iterable[Import], taken: Iterable[str]) -> dict[Import, str]:
    """What a module calls the user's functions: as their classes, with a number where `taken`.

    >>> names_of([Import("a.py", "Round"), Import("b.py", "Up.Round")], ["dp"]).values()
    dict_values(['Round', 'Round2'])
    """
    found: dict[Import, str] = {}
    for item in imports:
        if not item.function:
            continue
        wanted = item.function.rpartition(".")[2]
        used = {*found.values(), *taken, *RESERVED, *dir(builtins), "nn", "self"}
        numbered = (f"{wanted}{count}" for count in itertools.count(2))
        found[item] = next(n for n in itertools.chain([wanted], numbered) if n not in used)
    return found


@dataclass(frozen=True, slots=True)
class TorchModule:
    """A module of torch's own, as a class declares it; `options` are names and source texts."""

    name: str  # `nn.RMSNorm`
    options: tuple[tuple[str, str], ...] = ()


@dataclass(slots=True)
class Modules:
    """The modules that a function calls: their classes."""

    classes: dict[str, str]  # by path
    options: dict[str, tuple[tuple[str, str], ...]]  # of torch's own, where they have any

    @staticmethod
    def of(leaves: Mapping[str, TorchModule]) -> Modules:
        """Those of torch's own."""
        classes = {path: leaf.name for path, leaf in leaves.items()}
        return Modules(classes, {p: leaf.options for p, leaf in leaves.items() if leaf.options})

    @property
    def lines(self) -> list[str]:
        """The declarations in the class that holds them; see `runtime.Sharded`."""
        direct = {path: name for path, name in self.classes.items() if is_identifier(path)}
        plain = [f"    {path}: {name}" for path, name in direct.items()]
        rows = [
            row
            for path, name in self.classes.items()
            if path not in direct
            for row in statement(f'"{path}": {name},', 2)
        ]
        tables = ["    MODULES = {", *rows, "    }"] if rows else []
        tables += self._options()
        return [*plain, *tables, ""] if plain or tables else []

    def _options(self) -> list[str]:
        """`OPTIONS = {"norm": {"eps": 1e-05}}`."""
        if not self.options:
            return []
        rows: list[str] = []
        for path, options in self.options.items():
            told = ", ".join(f'"{name}": {text}' for name, text in options)
            rows.append(f'"{path}": {{{told}}}')
        line = f"    OPTIONS = {{{', '.join(rows)}}}"
        if len(line) <= WIDTH:
            return [line]
        inner = [line for row in rows for line in statement(f"{row},", 2)]
        return ["    OPTIONS = {", *inner, "    }"]


def argument_names(known: Sequence[str], wanted: Iterable[str]) -> list[str]:
    """Names of a function's arguments: as its own source has them, else what the caller has.

    An argument that the caller calls as the source calls one is that; the first of the others is
    the first that is left, which in most modules is the one that flows through.

    >>> argument_names(("hidden_states", "angles", "mask"), ["normed", "angles", "cos"])
    ['hidden_states', 'angles', 'cos']
    """
    names = list(wanted)
    matched = [name in known for name in names]
    left = [name for name in known if name not in names]
    if left and left[0] == known[0] and False in matched:
        names[matched.index(False)] = left[0]
    return names


def parameter_names(call: FunctionCall, words: Sequence[str], *, raised: bool) -> list[str]:
    """What a function of the user's calls what it is given, which the caller calls so, in the order
    in which its statements take it.

    An argument that the caller calls as the function does is that.  The others are in the order in
    which the function's own operators take them, unless some of these are `raised` to one, or that
    does not fit to what is known; then in the order of its arguments.
    """
    taken, known = call.taken, set(call.arguments)
    if len(set(taken)) != len(words) or not known.issuperset(taken):
        return argument_names(call.arguments, words)
    in_order = not raised and all(
        word == name or word not in known for word, name in zip(words, taken, strict=True)
    )
    if in_order:
        return list(taken)
    left = iter(name for name in call.arguments if name in taken and name not in words)
    return [word if word in taken else next(left, word) for word in words]


__all__ = [
    "RESERVED", "RUNTIME", "Classes", "Modules", "TorchModule", "argument_names", "names_of",
    "parameter_names",
]  # fmt: skip

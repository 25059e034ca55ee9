"""What may stand in a generated module: no text of a plan can become other code.

A plan is a file that others may have written, and its names stand in the module.  So the finished
module is parsed: every statement and expression must be of a kind that is written here, every name
one that the module imports, defines or binds before, and every call that of a class or function of
the module, of a module that it holds, or of torch's operators and the runtime's functions.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterable, Iterator
from typing import Literal, TypeAlias

import torch
from torch import nn
from torch.nn import functional

from ..facts.users import Import
from ..ir.graph.names import BEYOND_TENSORS, is_dotted, is_place

# What an expression stands for: data; what may be called; the modules that a file imports; `self`
# and what lies below it, which may be data or a module; an operator's name in the making; a class
# of the user's own functions.
_Kind: TypeAlias = Literal[
    "value",
    "class",
    "function",
    "torch",
    "linalg",
    "functional",
    "nn",
    "runtime",
    "self",
    "held",
    "operator",
    "users",
]

_TORCH: dict[str, _Kind] = {"ops": "operator", "linalg": "linalg"}  # what `torch` holds

_IMPORTS = frozenset({
    "from __future__ import annotations",
    "import torch",
    "import torch.nn.functional as F",
    "from torch import Tensor",
    "from torch import Tensor, nn",
})  # fmt: skip
_RUN = "if __name__ == '__main__':\n    ShardedModel.demo()"
_KNOWN: dict[str, _Kind] = {
    **dict.fromkeys(
        ("bool", "complex", "float", "int", "len", "max", "min", "range", "tuple"), "function"
    ),
    "torch": "torch", "F": "functional", "nn": "nn", "ops": "runtime",
    "Tensor": "class", "object": "class", "self": "self",
}  # fmt: skip
# Methods of the runtime's modules, of axes, and of tensors where torch has no operator so called
_OF_SELF = frozenset({"generator", "pack", "recompute", "unpack"})
_OF_VALUES = frozenset({
    "all_gather", "all_reduce", "all_to_all", "by", "copy", "own_gradient", "pad",
    "partial", "reduce_scatter", "shard",
    "bfloat16", "bool", "double", "float", "half", "int", "long", "type",
})  # fmt: skip
_COMPOUND = (
    ast.BinOp, ast.BoolOp, ast.Compare, ast.Dict, ast.IfExp, ast.List, ast.Slice, ast.Starred,
    ast.Tuple, ast.UnaryOp,
)  # fmt: skip
_ANNOTATION = (
    ast.Attribute, ast.BinOp, ast.BitOr, ast.Constant, ast.Load, ast.Name, ast.Subscript, ast.Tuple,
)  # fmt: skip


def _asks_for_a_module(node: ast.Call) -> bool:
    """`self.get_submodule("heads.a-b")`."""
    match node:
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="self"), attr="get_submodule"),
            args=[ast.Constant(value=str(path))],
            keywords=[],
        ):
            return not any(part.startswith("__") for part in path.split("."))
        case _:
            return False


def _imported(item: ast.Call) -> Import | None:
    """Of `ops.import_user("place")` and `ops.import_user("place", "Rounding")`."""
    match item:
        case ast.Call(
            func=ast.Attribute(value=ast.Name(id="ops"), attr="import_user"),
            args=[ast.Constant(value=str(place)), *rest],
            keywords=[],
        ):
            pass
        case _:
            return None
    match rest:
        case []:
            return Import(place)
        case [ast.Constant(value=str(function))] if function:
            return Import(place, function)
        case _:
            return None


def check_module(source: str, imports: Collection[Import] = ()) -> None:
    """Raises ValueError, with the line, for what no generated module holds.

    `imports` are what the graph says is the user's.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise _foreign(f"{(error.text or '').strip()!r} ({error.msg})", error.lineno) from error
    _Checker(tree, imports).module(tree)


def _foreign(what: str, line: int | None) -> ValueError:
    return ValueError(
        f"line {line} of the generated module would hold {what}, which no plan writes: its file was"
        " changed, or the model has a name that cannot stand in Python; rename that, or plan again"
    )


def _refused(node: ast.stmt | ast.expr) -> ValueError:
    text = ast.unparse(node).splitlines()[0]
    return _foreign(f"`{text if len(text) <= 60 else text[:57] + '...'}`", node.lineno)


class _Checker:
    """Walks a module in the order in which it runs; `names` says what each name stands for."""

    def __init__(self, tree: ast.Module, imports: Collection[Import]) -> None:
        self.imports = imports
        self.names: dict[str, _Kind] = dict(_KNOWN)
        # What paths of its tables and declarations are made of.  The runtime refuses to hold a
        # parameter or module under the name of a method.
        self.held = {part for path in _paths(tree) for part in path.split(".")}

    def module(self, tree: ast.Module) -> None:
        """Docstring, imports, classes and functions, and what runs the demonstration."""
        body = _after_docstring(tree.body)
        if not body or ast.unparse(body[-1]) != _RUN:
            raise _foreign("another end than its demonstration", None)
        for item in body[:-1]:
            match item:
                case ast.ClassDef():
                    self.definition(item)
                case ast.FunctionDef():
                    self.function(item)
                case ast.ImportFrom(module="shardwright.runtime", level=0):
                    self.imported(item)
                case ast.Expr(value=ast.Call() as call) if self.may_import(call, named=False):
                    pass
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call() as call) if (
                    name not in self.names and self.may_import(call, named=True)
                ):
                    self.names[name] = "users"
                case _ if ast.unparse(item) not in _IMPORTS:
                    raise _refused(item)
                case _:
                    pass

    def may_import(self, call: ast.Call, *, named: bool) -> bool:
        """Does it import what the graph names: a function, if the module gives it a name?

        Neither place nor name can be read as other code.
        """
        found = _imported(call)
        if found is None or found not in self.imports or bool(found.function) != named:
            return False
        return is_place(found.place) and (not named or is_dotted(found.function))

    def imported(self, item: ast.ImportFrom) -> None:
        """Classes of the runtime, and its functions as `ops`."""
        for each in item.names:
            if each.asname is not None or not (each.name == "ops" or each.name[0].isupper()):
                raise _refused(item)
            self.names.setdefault(each.name, "class")

    def definition(self, item: ast.ClassDef) -> None:
        """A class: its base, declarations, tables and functions."""
        if item.decorator_list or item.keywords or item.name in self.names:
            raise _refused(item)
        for base in item.bases:
            if self.expression(base) != "class":
                raise _refused(base)
        outside = dict(self.names)
        for inner in _after_docstring(item.body):
            match inner:
                case ast.FunctionDef():
                    self.function(inner)
                case ast.AnnAssign(value=None):
                    self.annotation(inner.annotation)
                case ast.Assign() | ast.AnnAssign():
                    self.assignment(inner)
                case ast.Pass():
                    pass
                case _:
                    raise _refused(inner)
        self.names = {**outside, item.name: "class"}

    def function(self, item: ast.FunctionDef) -> None:
        """A function; what it binds ends with it."""
        given = item.args
        if item.decorator_list or item.name.startswith("__") or item.name in _KNOWN:
            raise _refused(item)
        outside = dict(self.names)
        arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs]
        arguments += [each for each in (given.vararg, given.kwarg) if each is not None]
        for default in (*given.defaults, *given.kw_defaults):
            if default is not None:
                self.value(default)
        for annotation in (item.returns, *(each.annotation for each in arguments)):
            if annotation is not None:
                self.annotation(annotation)
        for each in arguments:
            if each.arg != "self":
                self.bind(each, each.arg, "value")
        self.block(_after_docstring(item.body))
        self.names = {**outside, item.name: outside.get(item.name, "function")}

    def annotation(self, node: ast.expr) -> None:
        """`Tensor`, `tuple[Tensor, Tensor]`, `nn.Linear`: what stands for types alone."""
        for inner in ast.walk(node):
            if not isinstance(inner, _ANNOTATION):
                raise _refused(node)
            named = isinstance(inner, ast.Name) and inner.id != "tuple"
            if named or isinstance(inner, ast.Attribute):
                assert isinstance(inner, ast.expr)
                if self.expression(inner) not in ("class", "nn"):
                    raise _refused(node)

    def block(self, statements: Iterable[ast.stmt]) -> None:
        """Statements of a function."""
        for item in statements:
            match item:
                case ast.Assign() | ast.AnnAssign():
                    self.assignment(item)
                case ast.For(orelse=[]):
                    kind = self.value(item.iter)
                    self.bind_target(item.target, kind)
                    self.block(item.body)
                case ast.Return(value=None):
                    pass
                case ast.Return(value=ast.expr() as value):
                    self.value(value)
                case _:
                    raise _refused(item)

    def assignment(self, item: ast.Assign | ast.AnnAssign) -> None:
        """`x = ...`, `x, y = ...`, `x: T`, `x: T = ...`."""
        if item.value is not None:
            self.value(item.value)
        if isinstance(item, ast.AnnAssign):
            self.annotation(item.annotation)
        for target in item.targets if isinstance(item, ast.Assign) else [item.target]:
            self.bind_target(target, "value")

    def bind_target(self, target: ast.expr, kind: _Kind) -> None:
        """`x`, or `x, y`."""
        for each in target.elts if isinstance(target, (ast.Tuple, ast.List)) else [target]:
            if not isinstance(each, ast.Name):
                raise _refused(target)
            self.bind(each, each.id, kind)

    def bind(self, node: ast.expr | ast.arg, name: str, kind: _Kind) -> None:
        """A variable, which hides nothing that the module uses by its name."""
        if name in _KNOWN or self.names.get(name) == "users":
            raise _foreign(f"a variable `{name}`", node.lineno)
        self.names[name] = kind

    # -- expressions: each returns what its result stands for -------------------------------------

    def value(self, node: ast.expr) -> _Kind:
        """An expression whose result is data, a class, or a module that the model holds."""
        kind = self.expression(node)
        if kind not in ("value", "class", "held"):
            raise _refused(node)
        return kind

    def expression(self, node: ast.expr) -> _Kind:
        """Any expression."""
        match node:
            case ast.Constant(value=bytes()):
                raise _refused(node)
            case ast.Constant():
                return "value"
            case ast.Name(id=name) if name in self.names:
                return self.names[name]
            case ast.Attribute():
                return self.attribute(node)
            case ast.Call():
                return self.call(node)
            case ast.Subscript():
                kind = self.value(node.value)
                self.value(node.slice)
                return "held" if kind == "held" else "value"
            case _ if isinstance(node, _COMPOUND):
                for inner in ast.iter_child_nodes(node):
                    if isinstance(inner, ast.expr):
                        self.value(inner)
                return "value"
            case _:
                raise _refused(node)

    def call(self, node: ast.Call) -> _Kind:
        """`f(x, name=y, **{"from": z})`, where `f` is known to be a function."""
        if _asks_for_a_module(node):
            return "held"
        if not self.may_call(node.func):
            raise _refused(node)
        for each in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.value(each)
        return "value"

    def may_call(self, function: ast.expr) -> bool:
        """Is it a class, a function, a module that the model holds, or a method?"""
        if not isinstance(function, ast.Attribute):
            return self.expression(function) in ("class", "function", "held")
        owner, name = self.expression(function.value), function.attr
        match owner:
            case "torch":
                return _is_operator(name)
            case "operator":
                return not BEYOND_TENSORS & set(ast.unparse(function).split("."))
            case "linalg":
                return _is_public(name) and callable(getattr(torch.linalg, name, None))
            case "functional":
                return _is_public(name) and callable(getattr(functional, name, None))
            case "nn":
                return _is_public(name) and isinstance(getattr(nn, name, None), type)
            case "runtime":
                return _is_public(name) and name != "import_user"
            case "self":
                return name in _OF_SELF or name in self.held
            case "held":
                return name in _OF_SELF or name in self.held or _is_method(name)
            case "value":
                return _is_method(name)
            case "users":
                return name == "apply"
            case "class" | "function":
                return False

    def attribute(self, node: ast.Attribute) -> _Kind:
        """`x.name`: what it is depends on what `x` is."""
        owner, name = self.expression(node.value), node.attr
        found: _Kind | None = None
        match owner:
            case "torch":
                found = _TORCH.get(name)
                found = "value" if isinstance(getattr(torch, name, None), torch.dtype) else found
            case "operator":
                return "operator"  # also `aten.__and__.Tensor`
            case "nn":
                found = "class" if isinstance(getattr(nn, name, None), type) else None
            case "runtime":
                found = "runtime"
            case "self" | "held":
                found = "held"
            case "value" | "class":
                found = "value"
            case "linalg" | "functional" | "function" | "users":
                pass
        if found is None or not (_is_public(name) or (found == "held" and name in self.held)):
            raise _refused(node)
        return found


def _paths(tree: ast.Module) -> Iterator[str]:
    """What classes declare: annotated names, and the keys of their tables."""
    for item in tree.body:
        for inner in item.body if isinstance(item, ast.ClassDef) else []:
            match inner:
                case ast.AnnAssign(target=ast.Name(id=name)):
                    yield name
                case ast.Assign(targets=[ast.Name(id=table)], value=ast.Dict(keys=keys)):
                    for key in keys if table not in ("FIXED", "INPUTS", "MESH") else []:
                        if isinstance(key, ast.Constant) and isinstance(key.value, str):
                            yield key.value
                case _:
                    pass


def _is_public(name: str) -> bool:
    return not name.startswith("_")


def _is_operator(name: str) -> bool:
    """Is it a function of tensors?  What torch offers besides loads files, runs code, compiles."""
    public = _is_public(name) and not name.endswith("_") and name not in BEYOND_TENSORS
    return public and hasattr(torch.ops.aten, name)


def _is_method(name: str) -> bool:
    return name in _OF_VALUES or _is_operator(name)


def _after_docstring(body: list[ast.stmt]) -> list[ast.stmt]:
    match body:
        case [ast.Expr(value=ast.Constant(value=str())), *rest]:
            return rest
        case _:
            return body

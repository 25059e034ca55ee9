"""Which texts of a graph may stand as code in a generated module.

A plan is a file that others may have written.  What `serialize` reads as text is checked here
against patterns of what a capture writes, before anything is made of it.
"""

from __future__ import annotations

import keyword
import re
import unicodedata
from collections.abc import Iterable
from itertools import pairwise

from ...facts.nested import Constant, Path, spelled
from .nodes import Arg, Block, Graph, Node, Param

_OP = re.compile(r"(?!__)\w+\.((?!__)\w+|__i?(and|or|xor|[lr]shift)__)(\.(?!__)\w+)?", re.ASCII)

_PYTHON_FILE = re.compile(r"([\w .,+@~=-]*/)*[\w .,+@~=-]*\w\.py")
_MARKS = frozenset("()[]{}<>;:,=@#'\"\\")  # that code is made with


def is_identifier(name: str) -> bool:
    """Can `name` be a variable as it stands?  Python reads other forms of a letter as that letter.

    >>> [is_identifier(name) for name in ("kv_0", "from", "a-b", "__class__")]
    [True, False, False, False]
    """
    return _is_word(name) and not keyword.iskeyword(name)


def is_path(path: str) -> bool:
    """Can `self.` and `path` be an attribute, numbers being indices?

    >>> [is_path(path) for path in ("layers.0.weight", "layers.__class__", "")]
    [True, False, False]
    """
    return all(is_identifier(part) or re.fullmatch("[0-9]+", part) for part in path.split("."))


def is_python_file(path: str) -> bool:
    """Is it a path, absolute or relative, of words, spaces and few marks, that ends in `.py`?

    >>> [is_python_file(path) for path in ("/my models/a-1.py", "../a.py", "a.txt", "os", "a'.py")]
    [True, True, False, False, False]
    """
    return _PYTHON_FILE.fullmatch(path) is not None


def is_place(place: str) -> bool:
    """Can a generated module import it: the name of a module, or the path of its file?

    >>> [is_place(place) for place in ("mypackage.ops", "/my models/a.py", "os;", "a.class", "")]
    [True, True, False, False, False]
    """
    return is_python_file(place) or is_dotted(place)


def is_dotted(name: str) -> bool:
    """Is it one identifier, or several with dots between?"""
    return all(map(is_identifier, name.split(".")))


def check_names(graph: Graph) -> None:
    """Raises ValueError for a name that no capture gives."""
    for item in graph.inputs:
        _check(_is_word(item.name), f"input `{item.name}`", "an identifier")
        _check_texts(f"labels of input `{item.name}`", item.labels)
    _check_signature(graph)
    _check_params(graph.params)
    for item in graph.body:
        if isinstance(item, Node):
            _check_node(item)
        else:
            _check(is_path(item.path), f"path `{item.path}` of a loop", "identifiers with dots")
            for block in item.blocks:
                _check_block(block)


def _check_signature(graph: Graph) -> None:
    """Raises ValueError where arguments, and the paths in them, don't fit together."""
    own = tuple(item.name for item in graph.inputs)
    names = own if graph.signature is None else graph.signature.names
    fixed: tuple[tuple[Path, Constant], ...] = ()
    if graph.signature is not None:
        fixed = graph.signature.fixed
        _check(0 <= graph.signature.by_position <= len(names), "`by_position`", "that many names")
    _check(len(set(names)) == len(names) and all(map(_is_word, names)), "arguments", "identifiers")
    paths = [*(item.path or (item.name,) for item in graph.inputs), *(path for path, _ in fixed)]
    _check(all(paths) and {path[0] for path in paths} == set(names), "paths", "of the arguments")
    for path in paths:
        _check_texts("a path", [str(key) for key in path])
    ordered = sorted(paths, key=lambda path: [(type(key).__name__, key) for key in path])
    for path, after in pairwise(ordered):  # where one begins others, it stands right before them
        _check(after[: len(path)] != path, f"input `{spelled(path)}`", "one tensor or value")
    _check_texts("a fixed input", [value for _, value in fixed if isinstance(value, str)])


def _check_block(block: Block) -> None:
    known = not block.class_name or is_identifier(block.class_name)
    _check(known, f"class `{block.class_name}` of a block", "an identifier")
    _check_params(block.params)
    for node in block.nodes:
        _check_node(node)


def _check_params(params: Iterable[Param]) -> None:
    for param in params:
        _check(_is_held(param.name), f"parameter `{param.name}`", "names with dots between")


def _check_node(node: Node) -> None:
    for call in node.loc.calls:
        plain = not set(call.path) & _MARKS and ".__" not in f".{call.path}"
        _check(plain, f"path `{call.path}` of a call", "names with dots between")
        known = not call.class_name or is_identifier(call.class_name)
        _check(known, f"class `{call.class_name}` of a call", "an identifier")
        _check(all(map(_is_word, call.arguments)), f"arguments of `{call.path}`", "identifiers")
    _check_texts("the name of a node", [node.name])
    _check(bool(_OP.fullmatch(node.op)), f"op `{node.op}`", "a full name, as `aten.add.Tensor`")
    for name, arg in node.args:
        _check(_is_word(name), f"argument `{name}` of `{node.op}`", "an identifier")
        _check_texts(f"argument `{name}` of `{node.op}`", _texts(arg))
        if name == "defined_in":
            good = isinstance(arg, str) and is_place(arg)
            _check(good, f"`{arg}` of `{node.op}`", "a module, or the path of a file ending in .py")
        if name == "function":
            good = isinstance(arg, str) and is_dotted(arg)
            _check(good, f"`{arg}` of `{node.op}`", "the name of a class")
        if name == "cache" and isinstance(arg, str):  # held by the module under this path
            _check(is_path(arg), f"cache `{arg}`", "identifiers and numbers with dots between")


def _is_held(path: str) -> bool:
    """Can a module hold something under `path`?  Python words, numbers, and names as `a-b`."""
    return all(
        part.isprintable() and not set(part) & _MARKS and not part.startswith("__") and part
        for part in path.split(".")
    )


def _texts(arg: Arg) -> list[str]:
    if isinstance(arg, tuple):
        return [text for item in arg for text in _texts(item)]
    return [arg] if isinstance(arg, str) else []


def _check_texts(what: str, texts: Iterable[str]) -> None:
    good = all(text.isprintable() and not set(text) & {'"', "\\"} for text in texts)
    _check(good, what, "one line of text without quotes and backslashes")


def _check(good: bool, what: str, wanted: str) -> None:
    if not good:
        raise ValueError(f"{what} must be {wanted}")


def _is_word(name: str) -> bool:
    """An identifier, or a keyword: `from` is an argument of some ops."""
    plain = unicodedata.normalize("NFKC", name) == name and name.isidentifier()
    return plain and not name.startswith("__")


__all__ = ["check_names", "is_dotted", "is_identifier", "is_path", "is_place", "is_python_file"]

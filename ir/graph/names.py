"""Which texts of a graph may stand as code in a generated module: what a capture writes.

A plan is a file that others may have written; `schema` holds every text of it to one of these.
"""

from __future__ import annotations

import keyword
import re
import unicodedata

_OP = re.compile(r"(?!__)\w+\.((?!__)\w+|__i?(and|or|xor|[lr]shift)__)(\.(?!__)\w+)?", re.ASCII)

# Operators of torch that touch more than tensors
BEYOND_TENSORS = frozenset({
    "backward", "from_file", "manual_seed", "save", "seed", "set_grad_enabled", "load_library",
    "import_module",
})  # fmt: skip
_PYTHON_FILE = re.compile(r"([\w .,+@~=-]*/)*[\w .,+@~=-]*\w\.py")
_MARKS = frozenset("()[]{}<>;:,=@#'\"\\")  # that code is made with


def is_identifier(name: str) -> bool:
    """Can `name` be a variable as it stands?  Python reads other forms of a letter as that letter.

    >>> [is_identifier(name) for name in ("kv_0", "from", "a-b", "__class__")]
    [True, False, False, False]
    """
    return is_word(name) and not keyword.iskeyword(name)


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


def is_word(name: str) -> bool:
    """An identifier, or a keyword: `from` is an argument of some ops."""
    plain = unicodedata.normalize("NFKC", name) == name and name.isidentifier()
    return plain and not name.startswith("__")


def is_class_name(name: str) -> bool:
    """An identifier, or nothing: a class that is not known."""
    return not name or is_identifier(name)


def is_op(name: str) -> bool:
    """Is it the full name of an operator that touches nothing but tensors?

    >>> [is_op(name) for name in ("aten.add.Tensor", "aten.__and__.Tensor", "a.__class__", "os")]
    [True, True, False, False]
    """
    return _OP.fullmatch(name) is not None and not BEYOND_TENSORS & set(name.split("."))


def is_call_path(path: str) -> bool:
    """Can it be the path of a module that is called?  Empty for the model itself."""
    return not set(path) & _MARKS and ".__" not in f".{path}"


def is_held(path: str) -> bool:
    """Can a module hold something under `path`?  Python words, numbers, and names as `a-b`."""
    return all(
        part.isprintable() and not set(part) & _MARKS and not part.startswith("__") and part
        for part in path.split(".")
    )


__all__ = [
    "BEYOND_TENSORS", "is_call_path", "is_class_name", "is_dotted", "is_held", "is_identifier",
    "is_op", "is_path", "is_place", "is_python_file", "is_word",
]  # fmt: skip

"""A `config.json` of Hugging Face `transformers`, which may come from anyone.

What transformers would answer by running code, by a download, or by minutes of work is refused
before it sees the file; all that it refuses itself is one sentence.
"""

from __future__ import annotations

import re
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from ...compat import transformers as hf
from ...facts.files import MB, read_json
from ...facts.given import shown

_MOST_LAYERS = 2**12
_MOST = 2**28  # of any other size; larger ones are refused by no model, and never end
_LAYERS = re.compile(r"(num_|n_)?(\w+_)?layers?|n_layer|num_(labels|nextn_predict_layers)")
_SIZES = re.compile(r"\w+_(size|dim|experts|heads|positions|embeddings)|n_(embd|head|inner|ctx)")
_ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")


def load_config(path: Path) -> Any:
    """The transformers config at `path`, a file or a folder with a `config.json`.

    Raises ValueError where it is none, or asks for what is not done.
    """
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path}: no `config.json` there")
    _check(file, read_json(file, limit=16 * MB))
    with refusals(f"{file}: transformers cannot read this config"):
        return hf.load_config(file.resolve())


@contextmanager
def refusals(what: str) -> Generator[None]:
    """What transformers raises inside is a ValueError of one line, which begins with `what`."""
    try:
        yield
    except Exception as error:  # its models and configs raise anything
        lines = [line.strip() for line in str(error).splitlines()]
        reason = next((line for line in lines if line), "")  # what follows is about installing
        kind = "" if isinstance(error, (ValueError, OSError)) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{reason[:400]}") from error


def _check(file: Path, data: object) -> None:
    if not isinstance(data, dict):
        raise ValueError(f"{file}: a config is an object, got {shown(data)}")
    config = cast("dict[str, Any]", data)
    names = config.get("architectures")
    if names is not None and not _are_texts(names):
        raise ValueError(f"{file}: `architectures` must be a list of names, got {shown(names)}")
    for place, value in _fields(config):
        name = place.rpartition(".")[2]
        if "attn_implementation" in name and value not in (None, *_ATTENTION):
            known = ", ".join(_ATTENTION)
            raise ValueError(f"{file}: `{place}` is {shown(value)}; expected one of {known}")
        most = _MOST_LAYERS if _LAYERS.fullmatch(name) else _MOST
        sizes = _LAYERS.fullmatch(name) or _SIZES.fullmatch(name)
        least = int(name == "vocab_size")
        if sizes and isinstance(value, (int, float)) and not least <= value <= most:
            if value in hf.usual(name):  # -1 for none, or counted from the last layer
                continue
            raise ValueError(f"{file}: `{place}` is {value}; expected {least} to {most}")


def _are_texts(names: object) -> bool:
    return isinstance(names, list) and all(
        isinstance(name, str) for name in cast("list[object]", names)
    )


def _fields(config: dict[str, Any], place: str = "") -> Iterator[tuple[str, Any]]:
    """(place, value) of all fields, those of configs inside too."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from _fields(cast("dict[str, Any]", value), f"{place}{name}.")
        else:
            yield f"{place}{name}", value


__all__ = ["load_config", "refusals"]

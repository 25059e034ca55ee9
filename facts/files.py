"""Files that may come from anyone: reading them ends soon, in plain data or in one sentence.

A regular file of bounded size, also after decompression; text in UTF-8; whole numbers of 64 bits,
the others finite where the format is JSON.  Everything else is a `DataError` that names the path.
"""

from __future__ import annotations

import json
import math
import os
import stat
import tomllib
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

MB = 10**6
_GZIP = 31  # zlib: a gzip header, the largest window


class DataError(ValueError):
    """A file that is not what it should be; the message names it and says why."""


def read_bytes(path: str | Path, limit: int = 256 * MB) -> bytes:
    """The bytes of a regular file, decompressed where its name ends in `.gz`.

    Raises DataError for what is no regular file, cannot be read, or holds more than `limit` bytes.
    """
    path = Path(path)
    try:
        # without waiting for a pipe's other end
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        with os.fdopen(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise DataError(f"`{path}` is not a file with data in it; give a regular file")
            data = file.read(limit + 1)
    except OSError as error:
        raise DataError(f"cannot read `{path}`: {error.strerror or error}") from error
    except ValueError as error:  # a path with a zero character
        raise DataError(f"cannot read {str(path)!r}: {error}") from error
    if path.suffix == ".gz":
        data = _decompressed(path, data, limit)
    if len(data) > limit:
        raise DataError(f"`{path}` holds more than {limit // MB} MB, more than such files may")
    return data


def _decompressed(path: Path, data: bytes, limit: int) -> bytes:
    """At most `limit` + 1 bytes."""
    unzip = zlib.decompressobj(wbits=_GZIP)
    try:
        out = unzip.decompress(data, limit + 1)
    except zlib.error as error:
        raise DataError(f"`{path}` is not in the gzip format: {error}") from error
    if len(out) <= limit and not unzip.eof:
        raise DataError(f"`{path}` ends in the middle of its gzip data")
    return out


def read_text(path: str | Path, limit: int = 256 * MB) -> str:
    """The text of a file in UTF-8.  Raises DataError."""
    try:
        return read_bytes(path, limit).decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"`{path}` is not text in UTF-8: {error.reason}") from error


def read_json(path: str | Path, limit: int = 256 * MB) -> Any:
    """The data of a JSON file: finite numbers, whole ones of 64 bits.  Raises DataError."""
    text = read_text(path, limit)

    def parse() -> Any:
        return json.loads(text, parse_float=_finite, parse_int=_whole, parse_constant=_no_constant)

    return _parsed(path, "JSON", parse)


def read_toml(path: str | Path, limit: int = MB) -> dict[str, Any]:
    """The tables of a TOML file, whole numbers of 64 bits.  Raises DataError."""
    text = read_text(path, limit)

    def parse() -> dict[str, Any]:
        tables = tomllib.loads(text)
        _check_whole(tables)
        return tables

    return _parsed(path, "TOML", parse)


def _parsed(path: str | Path, name: str, parse: Callable[[], Any]) -> Any:
    try:
        return parse()
    except json.JSONDecodeError as error:
        raise DataError(f"`{path}` is not {name}: line {error.lineno}: {error.msg}") from error
    except RecursionError as error:
        raise DataError(f"`{path}` is not {name} that can be read: nested too deeply") from error
    except ValueError as error:
        raise DataError(f"`{path}` is not valid {name}: {error}") from error


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:40]} is not finite")
    return number


def _whole(text: str) -> int:
    if len(text) > 20 or not -(2**63) <= int(text) < 2**64:
        raise ValueError(f"the number {text[:40]} has more than 64 bits")
    return int(text)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a finite number")


def _check_whole(item: Any) -> None:
    """Raises ValueError for a whole number of more than 64 bits anywhere in `item`."""
    if isinstance(item, dict):
        for value in item.values():
            _check_whole(value)
    elif isinstance(item, list):
        for value in item:
            _check_whole(value)
    elif isinstance(item, int) and item.bit_length() > 64:
        raise ValueError("a number has more than 64 bits")


__all__ = ["MB", "DataError", "read_bytes", "read_json", "read_text", "read_toml"]

"""What earlier runs captured, in the user's cache folder.

A configuration of transformers and the versions in use decide what the model is, so that what was
captured of it holds as long as they do.  A Python file may build another model each time that it
runs, and is captured each time.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from .facts.files import MB, DataError, read_bytes, read_json
from .ir.graph import Graph
from .ir.graph.serialize import graph_from_json, graph_to_json
from .written import digest

_MOST_FILES = 200  # the oldest go
_MOST_BYTES = 64 * MB  # of one, decompressed


@dataclass(frozen=True)
class Captured:
    """The graphs of a request; `narrow`: the model has parameters in fewer bits than float32."""

    graphs: tuple[Graph, ...]
    narrow: bool


@dataclass(frozen=True)
class Kept:
    """What was captured of one model, `model` being a digest of all that decides what it is."""

    model: str

    @staticmethod
    def of(target: str) -> Kept | None:
        """That of a configuration; None for a model that may come out otherwise another time."""
        path = Path(target)
        file = path / "config.json" if path.is_dir() else path
        if file.suffix != ".json":
            return None
        try:
            config = read_bytes(file, limit=16 * MB)
            libraries = [_version(name) for name in ("torch", "transformers")]
            own = list(_own_files())
        except (DataError, OSError, PackageNotFoundError):  # loading the model says what is wrong
            return None
        if None in libraries:
            return None
        return Kept(digest(digest(config) + repr((sys.version, libraries, own))))

    def read(self, key: tuple[object, ...]) -> Captured | None:
        """What was kept under `key`; None where there is nothing that can be read."""
        with suppress(DataError, OSError, RuntimeError, LookupError, TypeError, ValueError):
            data: Any = read_json(self._file(key), limit=_MOST_BYTES)
            graphs = tuple(graph_from_json(graph) for graph in data["graphs"])
            return Captured(graphs, bool(data["narrow"])) if graphs else None
        return None

    def write(self, key: tuple[object, ...], found: Captured) -> None:
        """Keep it under `key`, if the cache folder can be written to."""
        with suppress(OSError, RuntimeError, TypeError, ValueError):
            graphs = [graph_to_json(graph) for graph in found.graphs]
            text = json.dumps({"graphs": graphs, "narrow": found.narrow}).encode()
            if len(text) > _MOST_BYTES:
                return
            file = self._file(key)
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with NamedTemporaryFile(dir=file.parent, suffix=".tmp", delete=False) as draft:
                draft.write(gzip.compress(text, compresslevel=1))
            os.replace(draft.name, file)  # whole, or not there
            _drop_oldest(file.parent)

    def _file(self, key: tuple[object, ...]) -> Path:
        return _folder() / f"{digest(self.model + repr(key))}.json.gz"


def _version(package: str) -> str | None:
    """That of an installed package; None for one that is worked on where it lies."""
    found, spec = distribution(package), find_spec(package)
    with suppress(ValueError, AttributeError, LookupError):
        if json.loads(found.read_text("direct_url.json") or "{}")["dir_info"].get("editable"):
            return None
    place = Path(str(found.locate_file(package))).resolve()
    loaded = spec is not None and spec.origin and Path(spec.origin).resolve()
    return found.version if loaded and loaded.is_relative_to(place) else None


def _folder() -> Path:
    """Where desktop systems keep what can be made again; RuntimeError where there is no home."""
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "shardwright" / "captures"


def _drop_oldest(folder: Path) -> None:
    files = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime)
    for file in files[:-_MOST_FILES]:
        file.unlink(missing_ok=True)


def _own_files() -> Iterator[tuple[str, int, int]]:
    """(path, size, time of change) of the files that have a part in capturing."""
    rooms = [find_spec(f"{__package__}.{room}") for room in ("compat", "facts", "ir")]
    places = [place for room in rooms if room for place in room.submodule_search_locations or ()]
    for folder in map(Path, (Path(__file__).parent, *places)):
        for file in sorted(folder.rglob("*.py")):
            found = file.stat()
            yield str(file), found.st_size, found.st_mtime_ns


__all__ = ["Captured", "Kept"]

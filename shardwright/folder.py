"""The folder of a plan: what `plan --out DIR` writes, whole or not at all, and what is found there.

Files are drafted beside their place, so on the same file system, and moved there when all are
complete.  One writer at a time; drafts that a killed one left are cleared away by the next.
Nothing here imports torch.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, nullcontext
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Protocol

from .costmodel.machines.cluster import MEASURED
from .facts.files import DataError, read_json, read_text
from .written import digest, remember, wrote

PLAN_FILE = "plan.json"
MODULE_FILE = "sharded_model.py"
SWEEP_FILES = ("sweep.csv", "sweep.json", "sweep.html")
_DRAFT = ".plan-draft-"
_GENERATOR = b"shardwright"  # which pages and traces name near their begin
_PATIENCE_S = 30.0  # for another writer, who needs milliseconds
_MODULE = re.compile(r"^class ShardedModel\((Sharded|Pipelined)Module\):", re.MULTILINE)


class Planned(Protocol):
    """What can be written: a plan."""

    def to_json(self) -> dict[str, Any]:
        """The plan as plain JSON data."""
        ...

    def module_source(self) -> str:
        """The generated module as text."""
        ...

    def dump_problem(self, path: Path) -> None:
        """Write the sharding problem to `path`."""
        ...


class Swept(Protocol):
    """What a sweep found."""

    def to_csv(self) -> str:
        """A table with a head."""
        ...

    def to_json(self) -> dict[str, Any]:
        """Plain JSON data."""
        ...


# ---- what may be written -----------------------------------------------------------------------


def check_output(out: Path) -> None:
    """Refuse, before any work, a folder that holds anything but an earlier plan as it was written.

    Raises ValueError.
    """
    if not out.exists():
        _check_parents(out)
        return
    if not out.is_dir():
        raise ValueError(f"--out `{out}` is a file; name a folder, as in `--out {out}_plan`")
    found = {path.name for path in out.iterdir() if not path.name.startswith(_DRAFT)}
    foreign = sorted(found - {PLAN_FILE, MODULE_FILE, "__pycache__"})
    if foreign or (found and not _is_plan(out / PLAN_FILE)):
        named = foreign or sorted(found)
        shown = ", ".join(f"`{name}`" for name in named[:3]) + (" ..." if named[3:] else "")
        raise ValueError(
            f"--out `{out}` holds {shown}, which is not a plan; nothing there is overwritten: "
            f"name a new folder, as in `--out {out / 'plan_out'}`"
        )
    module = out / MODULE_FILE
    if module.exists() and not (module_is_the_plans(out) or wrote(module)):
        raise ValueError(
            f"`{module}` was changed since it was written; it is not overwritten: move it away, or "
            f"name a new folder, as in `--out {out}_new`"
        )


def check_problem_file(path: Path) -> None:
    """Refuse, before any work, a place that the sharding problem may not be written to.

    Raises ValueError.
    """
    if path.is_dir():
        raise ValueError(f"--dump-problem `{path}` is a folder; name a file, as in `problem.json`")
    if not path.name.endswith((".json", ".json.gz")):
        raise ValueError(
            f"--dump-problem `{path}` is not named as a problem is: problem.json or problem.json.gz"
        )
    if path.exists() and not _is_problem(path):
        raise ValueError(f"--dump-problem `{path}` exists and is no problem; name a new file")
    _check_parents(path)


def check_cluster_file(path: Path) -> None:
    """Refuse, before any work, a place that a measured cluster may not be written to.

    Raises ValueError.
    """
    if path.is_dir() or path.suffix != ".toml":
        raise ValueError(f"--out `{path}` is not named as a cluster's file is: here.toml")
    if path.exists() and not read_text(path).startswith(MEASURED):
        raise ValueError(
            f"--out `{path}` exists, and `plan calibrate` has not written it; name a new file"
        )
    _check_parents(path)


def check_sweep_output(out: Path) -> None:
    """Refuse, before any work, a folder that holds anything but an earlier sweep.

    Raises ValueError.
    """
    if not out.exists():
        _check_parents(out)
        return
    if not out.is_dir():
        raise ValueError(f"--out `{out}` is a file; name a folder, as in `--out {out}_sweep`")
    found = {path.name for path in out.iterdir() if not path.name.startswith(_DRAFT)}
    ours = str(_content(out / SWEEP_FILES[1]).get("schema", "")).startswith("shardwright.sweep/")
    foreign = sorted(found if not ours else found - set(SWEEP_FILES))
    if foreign:
        shown = ", ".join(f"`{name}`" for name in foreign[:3]) + (" ..." if foreign[3:] else "")
        raise ValueError(
            f"--out `{out}` holds {shown}, which is not a sweep; nothing there is overwritten: "
            f"name a new folder, as in `--out {out / 'sweep_out'}`"
        )


def check_pages(html: Path | None, trace: Path | None) -> None:
    """Refuse, before any work, places of a page and a trace that hold anything but earlier ones, or
    that may not be written.

    Raises ValueError.
    """
    given = {"--html": html, "--trace": trace}
    for option, path in given.items():
        if path is not None:
            _check_page_file(option, path)
    if html is not None and trace is not None and html.resolve() == trace.resolve():
        raise ValueError(f"--html and --trace both name `{html}`; give them a file each")


def _check_page_file(option: str, path: Path) -> None:
    if path.is_dir():
        raise ValueError(f"{option} `{path}` is a folder; name a file")
    if path.exists() and not _is_page(path):
        raise ValueError(f"{option} `{path}` exists and was not written here; name a new file")
    _check_parents(path)


def _is_page(path: Path) -> bool:
    """Is this a page of ours, or a trace?"""
    try:
        with path.open("rb") as file:
            return _GENERATOR in file.read(1000)
    except OSError:
        return False


def write_page(path: Path, text: str) -> None:
    """Write a page or a trace, whole or not at all, over what `check_pages` allows.

    Raises OSError, in a sentence, where it cannot be written.
    """
    try:
        _replace(path, lambda draft: _write_text(draft, text))
    except OSError as error:
        raise OSError(f"cannot write `{path}`: {error.strerror or error}") from error


def _check_parents(path: Path) -> None:
    """The nearest ancestor of `path` that exists must be a folder; the others will be made."""
    ancestor = next(parent for parent in path.absolute().parents if parent.exists())
    if not ancestor.is_dir():
        raise ValueError(f"cannot write `{path}`: `{ancestor}` is a file, not a folder")
    if not os.access(ancestor, os.W_OK | os.X_OK):
        raise ValueError(f"cannot write `{path}`: you may not write to the folder `{ancestor}`")


def _content(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none."""
    try:
        content = read_json(path)
    except DataError:
        return {}
    return content if isinstance(content, dict) else {}


def _is_plan(path: Path) -> bool:
    """Is this a plan.json of ours, of whatever version?"""
    return str(_content(path).get("schema", "")).startswith("shardwright.plan/")


def _is_problem(path: Path) -> bool:
    return "problem" in _content(path)


def _is_module(path: Path) -> bool:
    try:
        return _MODULE.search(read_text(path)) is not None
    except DataError:
        return False


# ---- what is found -----------------------------------------------------------------------------


def existing_plan(folder: Path) -> Path:
    """The plan.json in `folder`.  Raises ValueError where there is none."""
    path = folder / PLAN_FILE
    if not path.exists():
        raise ValueError(
            f"there is no plan in `{folder}`: no file `{path}`; "
            f"`plan MODEL --gpus N --out {folder}` makes one"
        )
    return path


def module_is_the_plans(folder: Path) -> bool:
    """Is the module beside plan.json the one that was written with it?"""
    try:
        text = (folder / MODULE_FILE).read_bytes()
    except OSError:
        return False
    return _content(folder / PLAN_FILE).get("module_sha256") == digest(text)


# ---- writing -----------------------------------------------------------------------------------


def write_folder(made: Planned, out: Path, problem: Path | None) -> tuple[Path, ...]:
    """Write the plan's files, each whole or not at all; their paths in the order to list them.

    Raises ValueError for a place that holds anything else, OSError where it cannot be written.
    """
    check_output(out)
    module = made.module_source()
    texts = {PLAN_FILE: _plan_text(made, module), MODULE_FILE: module}
    with _draft(out) as draft:
        for name, text in texts.items():
            _write_text(draft / name, text)
        remember(*texts.values())
        if problem is None:
            _move(draft, out, texts)
            return out / PLAN_FILE, out / MODULE_FILE
        same = problem.parent.resolve() == out.resolve()
        with nullcontext(draft) if same else _draft(problem.parent) as beside:
            made.dump_problem(beside / problem.name)
            _move(draft, out, texts)
            _move(beside, problem.parent, [problem.name])
        return out / PLAN_FILE, out / MODULE_FILE, problem


def write_sweep(found: Swept, page: str, out: Path) -> tuple[Path, ...]:
    """Write a sweep's files and its page, each whole or not at all; their paths, the page's last.

    Raises ValueError for a place that holds anything else, OSError where it cannot be written.
    """
    check_sweep_output(out)
    data = json.dumps(found.to_json(), indent=1, allow_nan=False) + "\n"
    texts = dict(zip(SWEEP_FILES, (found.to_csv(), data, page), strict=True))
    with _draft(out) as draft:
        for name, text in texts.items():
            _write_text(draft / name, text)
        _move(draft, out, texts)
    return tuple(out / name for name in SWEEP_FILES)


def write_plan(made: Planned, path: Path) -> None:
    """Write one plan.json.  Raises FileExistsError over what is none."""
    _refuse_over(path, "plan", _is_plan)
    text = _plan_text(made, made.module_source())
    remember(text)
    _replace(path, lambda draft: _write_text(draft, text))


def write_module(made: Planned, path: Path) -> None:
    """Write one generated module.  Raises FileExistsError over what is none."""
    _refuse_over(path, "generated module", _is_module)
    text = made.module_source()
    remember(text)
    _replace(path, lambda draft: _write_text(draft, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _plan_text(made: Planned, module: str) -> str:
    """The plan, and the hash of the module that is written with it."""
    data = {**made.to_json(), "module_sha256": digest(module)}
    return json.dumps(data, indent=1, allow_nan=False) + "\n"


def _refuse_over(path: Path, kind: str, is_one: Callable[[Path], bool]) -> None:
    if path.exists() and not is_one(path):
        raise FileExistsError(f"`{path}` is no {kind} and is not overwritten; name another file")


def _replace(path: Path, write: Callable[[Path], None]) -> None:
    """What `write` puts into a draft takes the place of `path`."""
    with _draft(path.parent) as draft:
        write(draft / path.name)
        _move(draft, path.parent, [path.name])


def _move(draft: Path, folder: Path, names: Iterable[str]) -> None:
    """Files of these names from `draft` to `folder`, on the disk before they have their names."""
    for name in names:
        _sync(draft / name)
    for name in names:
        (draft / name).replace(folder / name)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def _draft(folder: Path) -> Generator[Path]:
    """A new empty folder in `folder`, gone at the end; and `folder`, too, if made in vain."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        for stale in folder.glob(f"{_DRAFT}*"):
            shutil.rmtree(stale, ignore_errors=True)
        draft = Path(tempfile.mkdtemp(prefix=_DRAFT, dir=folder))
        try:
            yield draft
        finally:
            shutil.rmtree(draft)
            for ancestor in made:
                if any(ancestor.iterdir()):
                    break
                ancestor.rmdir()


@contextmanager
def _locked(folder: Path) -> Generator[None]:
    """One writer in `folder` at a time; a killed one's lock is gone with it.

    Raises TimeoutError where another does not end.
    """
    try:
        from fcntl import LOCK_EX, LOCK_NB, flock
    except ImportError:  # no such locks on this system: then writers are not kept apart
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    end = monotonic() + _PATIENCE_S
    try:
        while True:
            try:
                flock(handle, LOCK_EX | LOCK_NB)
                break
            except BlockingIOError:
                if monotonic() > end:
                    raise TimeoutError(f"another process keeps writing to `{folder}`") from None
                sleep(0.05)
        yield
    finally:
        os.close(handle)


__all__ = [
    "MODULE_FILE", "PLAN_FILE", "SWEEP_FILES", "check_cluster_file", "check_output", "check_pages",
    "check_problem_file", "check_sweep_output", "existing_plan", "module_is_the_plans",
    "write_folder", "write_module", "write_page", "write_plan", "write_sweep",
]  # fmt: skip

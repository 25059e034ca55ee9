"""What this user's plans wrote on this machine, remembered by hash, as git keeps its safe folders.

A plan folder may come from anyone, and `plan verify` runs files: the module in the folder and the
model that the plan names.  It runs what is remembered here, or what the user names.
"""

from __future__ import annotations

import os
from contextlib import suppress
from hashlib import sha256
from pathlib import Path


def digest(data: str | bytes) -> str:
    """The SHA-256 of bytes, or of a text in UTF-8, as 64 hexadecimal digits."""
    return sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def remember(*data: str | bytes) -> None:
    """This user has written these.  Nothing is kept where the home is read-only."""
    with suppress(OSError, RuntimeError):
        folder = _folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        for each in data:
            (folder / digest(each)).touch()


def wrote(path: Path) -> bool:
    """Has this user written what the file at `path` holds now?"""
    try:
        return (_folder() / digest(path.read_bytes())).is_file()
    except (OSError, RuntimeError):
        return False


def _folder() -> Path:
    """Where desktop systems keep what a program remembers; RuntimeError where there is no home."""
    state = os.environ.get("XDG_STATE_HOME")
    return (Path(state) if state else Path.home() / ".local" / "state") / "shardwright" / "written"


__all__ = ["digest", "remember", "wrote"]

"""Pages that are made of the program: what its commands print of themselves."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
MARK = "<!-- commands -->"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The help of each command, in the place of `MARK`."""
    if MARK not in markdown:
        return markdown
    # one place says what commands there are
    listed = "from shardwright.cli import app, tools; import typer.main as t; " + (
        "print(*[n for a in (app, tools) for n in getattr(t.get_command(a), 'commands', {})])"
    )
    names = _run("-c", listed).split()
    texts = [f"## plan\n\n```text\n{_help()}\n```"]
    texts += [f"## plan {name}\n\n```text\n{_help(name)}\n```" for name in sorted({*names})]
    return markdown.replace(MARK, "\n\n".join(texts))


def _help(*command: str) -> str:
    return _run("-m", "shardwright.cli", *command, "--help").strip()


def _run(*arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "80", "NO_COLOR": "1"}
    ran = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return ran.stdout

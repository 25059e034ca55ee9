"""What pages of plans draw with: pictures as SVG, and tables."""

from __future__ import annotations

from collections.abc import Sequence

from .markup import safe

WIDTH = 720
MOST_RANKS = 16  # that a picture has on one axis


def table(head: Sequence[str], rows: Sequence[Sequence[str]], *, raw: int = -1) -> str:
    """A table that scrolls by itself; column `raw` is HTML."""
    top = "".join(f"<th>{safe(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>"
        + "".join(f"<td>{c if i == raw else safe(c)}</td>" for i, c in enumerate(cells))
        + "</tr>"
        for cells in rows
    )
    return (
        f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{body}</tbody>'
        "</table></div>"
    )


def svg(height: float, inside: str, label: str, width: float = WIDTH, kind: str = "") -> str:
    named = f' class="{kind}"' if kind else ""
    picture = (
        f'<svg{named} viewBox="0 0 {width:.0f} {height:.0f}" role="img"'
        f' aria-label="{safe(label)}">{inside}</svg>'
    )
    return picture if kind else f'<div class="scroll picture">{picture}</div>'


def box(x: float, y: float, w: float, h: float, colour: str, told: str) -> str:
    return (
        f'<rect class="on" x="{x:.2f}" y="{y:.1f}" width="{max(w, 0.3):.2f}" height="{h:.1f}"'
        f' fill="{colour}" data-text="{safe(told)}"/>'
    )


def caption(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{safe(text)}</text>'


__all__ = ["MOST_RANKS", "WIDTH", "box", "svg", "table", "caption"]

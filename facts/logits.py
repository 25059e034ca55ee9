"""How many logits a loss looks at together: what runs and what a plan counts agree on it.

Two sizes, since a product is fast only where it is large, and wide numbers that are read again at
once are best found in a cache: a *chunk* of columns is what a product makes, for all tokens; a
*block* of its rows is what is computed with in a wide format.
"""

from __future__ import annotations

CHUNK_BYTES = 2**29
BLOCK_NUMBERS = 2**23
_ALIGNED = 128  # columns: what tiles of matrix products are multiples of


def chunk_columns(tokens: int, columns: int, itemsize: int) -> int:
    """Columns that are made together, of `columns` in all, for so many tokens."""
    fitting = max(CHUNK_BYTES // max(tokens * itemsize, 1), 1)
    chunks = -(-columns // fitting)
    even = -(-columns // max(chunks, 1))
    return max(min(-(-even // _ALIGNED) * _ALIGNED, columns), 1)


def block_rows(columns: int) -> int:
    """Tokens whose logits, so many each, are computed with together."""
    return max(BLOCK_NUMBERS // max(columns, 1), 1)


__all__ = ["BLOCK_NUMBERS", "CHUNK_BYTES", "block_rows", "chunk_columns"]

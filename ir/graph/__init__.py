"""The graph that everything else reads, its text and JSON forms, and rewriting."""

from .nodes import (
    Arg,
    Block,
    Call,
    Extent,
    FunctionCall,
    Graph,
    Input,
    Loc,
    Loop,
    Node,
    Output,
    Param,
    Part,
    Signature,
    TensorType,
    Value,
    originals,
    reads,
    values_in,
)

__all__ = [
    "Arg", "Block", "Call", "Extent", "FunctionCall", "Graph", "Input", "Loc", "Loop", "Node",
    "Output", "Param", "Part", "Signature", "TensorType", "Value", "originals", "reads",
    "values_in",
]  # fmt: skip

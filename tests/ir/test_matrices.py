"""Which parameters are matrices of hidden layers, as optimizers of whole matrices take them."""

from __future__ import annotations

import pytest

from shardwright.ir.capture.capture import capture
from shardwright.ir.passes.matrices import with_matrices
from tests.endtoend.families import build, inputs_of
from tests.ir.models import batch
from tests.ir.test_moe import model_of

_EXPERTS = "model.layers.0.mlp.experts"


@pytest.mark.parametrize(("family", "others", "some"), [
    ("gpt2", {"transformer.wte.weight", "transformer.wpe.weight"},
     {"transformer.h.0.attn.c_attn.weight", "transformer.h.1.mlp.c_proj.weight"}),
    pytest.param("bert", {
        f"bert.embeddings.{name}_embeddings.weight" for name in ("word", "position", "token_type")
    }, {"cls.predictions.transform.dense.weight"}, marks=pytest.mark.slow),
    pytest.param("gpt_oss", {"model.embed_tokens.weight", "lm_head.weight", *(
        f"model.layers.{n}.mlp.experts.{name}_proj_bias"
        for n in range(4) for name in ("gate_up", "down")
    )}, {f"{_EXPERTS}.down_proj", f"{_EXPERTS}.gate_up_proj"}, marks=pytest.mark.slow),
])  # fmt: skip
def test_all_but_tables_heads_and_biases(family: str, others: set[str], some: set[str]) -> None:
    if family == "gpt_oss":
        graph = capture(model_of(family), batch(8, 8, "input_ids", "labels"), training=True)
    else:
        graph = capture(build(family), inputs_of(family), training=True)
    marked = {param.name: param.matrix for param in with_matrices(graph).params}
    trained = [p for p in graph.params if p.kind == "parameter" and len(p.value.type.shape) > 1]
    assert {p.name for p in trained if not marked[p.name]} == others
    assert all(marked[name] for name in some)

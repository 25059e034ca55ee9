"""Llama over 4 x h100: tp=4.

   tp=0  tp=1  tp=2  tp=3
      0     1     2     3

tp cuts attention by heads, matrix products by columns (q_proj, k_proj, v_proj, gate_proj,
up_proj) and rows (o_proj, down_proj) and the sequence between them. Around the layers it cuts
embedding and loss by vocabulary and head by columns.
Each rank returns all of loss, and its part of logits (S2); `model.gather_outputs(out)` makes
all of it, with gradients, for a loss outside of the module.

Made from a model given to shardwright.plan, batch 2 x 4096 tokens, bfloat16.
Predicted: 7.07 ms per step, 1.08 GB per GPU.

    torchrun --nproc-per-node 4 sharded_model.py    a demonstration
    model = ShardedModel.from_checkpoint("folder with .safetensors")
    model(**model.shard_inputs(**batch)).loss.backward()

Comments and tables:
    [b, 64/tp]             shape that a statement makes, where it changes; 64 is cut over tp
    + tp                   each rank of tp holds a summand of it
    all-gather 8 MB, 9 us  what is sent in the statement, and for how long
    inside                 sent by the operator itself, in all its steps
    R, S0                  in tables, for each mesh axis: whole on each rank, cut along dim 0
    V                      whole, while each rank has a summand of its gradient
    Weight(stored, used)   weights of a layer go there together before it
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.runtime import (
    Input,
    Labels,
    Layer,
    Output,
    Param,
    Sharded,
    ShardedModule,
    Weight,
    ops,
)


class Attention(Sharded):
    """Attention of llama.py:61."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # x [b, s, 2048]; cos [s, 1, 64]; sin [s, 1, 64]
        q = self.q_proj(x).unflatten(-1, (-1, 128))  # [b, s, 16/tp, 128]
        k = self.k_proj(x).unflatten(-1, (-1, 128))  # [b, s, 8/tp, 128]
        v = self.v_proj(x).unflatten(-1, (-1, 128))  # [b, s, 8/tp, 128]
        q = ops.rotary(q, cos, sin).transpose(1, 2)  # [b, 16/tp, s, 128]
        k = ops.rotary(k, cos, sin).transpose(1, 2)  # [b, 8/tp, s, 128]
        v = v.transpose(1, 2)  # [b, 8/tp, s, 128]
        mixed = ops.attention(q, k, v, causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # [b, s, 2048] + tp


class MLP(Sharded):
    """MLP of llama.py:82."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:  # x [b, s, 2048]
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # [b, s, 2048] + tp


class DecoderLayer(Layer):
    """`layers`, 2 times: layers 0 to 1; llama.py:96."""

    attention_norm: nn.RMSNorm
    attention: Attention
    mlp_norm: nn.RMSNorm
    mlp: MLP
    OPTIONS = {"attention_norm": {"eps": 1e-05}, "mlp_norm": {"eps": 1e-05}}

    WEIGHTS = {
        "attention_norm.weight": Weight("R", "V"),  # backward all-reduce 4.1 kB; 4.94 us
        "mlp_norm.weight": Weight("R", "V"),  # backward all-reduce 4.1 kB; 4.94 us
    }

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # x [b, s/tp, 2048]; cos [s, 1, 64]; sin [s, 1, 64]
        tp = self.mesh["tp"]
        # [b, s, 2048] + tp; all-gather 33.6 MB, backward reduce-scatter, 214 us
        attention = self.attention(tp.all_gather(self.attention_norm(x), 1), cos, sin)
        # reduce-scatter 33.6 MB, backward all-gather, 214 us
        x = x + tp.reduce_scatter(attention, 1)
        # [b, s, 2048] + tp; all-gather 33.6 MB, backward reduce-scatter, 214 us
        mlp = self.mlp(tp.all_gather(self.mlp_norm(x), 1))
        return x + tp.reduce_scatter(mlp, 1)  # reduce-scatter 33.6 MB, backward all-gather, 214 us


class ShardedModel(ShardedModule):
    """Llama as one rank of tp=4 runs it."""

    norm: nn.RMSNorm
    head: nn.Linear
    OPTIONS = {"norm": {"eps": 1e-05}}

    MESH = {"tp": 4}
    PHASE = "train"
    OPTIMIZER = "adamw"
    LAYERS = {
        "layers": [DecoderLayer] * 2,
    }
    PARAMETERS = {
        "embedding.weight": Param((32000, 2048), torch.bfloat16, "S0"),  # [8000, 2048] per rank
        "norm.weight": Param((2048,), torch.bfloat16, "R"),
        "head.weight": Param((32000, 2048), torch.bfloat16, "S0"),  # [8000, 2048] per rank
        "layers.{0..1}.attention_norm.weight": Param((2048,), torch.bfloat16, "R"),
        # [512, 2048] per rank
        "layers.{0..1}.attention.q_proj.weight": Param((2048, 2048), torch.bfloat16, "S0"),
        # [256, 2048] per rank
        "layers.{0..1}.attention.k_proj.weight": Param((1024, 2048), torch.bfloat16, "S0"),
        # [256, 2048] per rank
        "layers.{0..1}.attention.v_proj.weight": Param((1024, 2048), torch.bfloat16, "S0"),
        # [2048, 512] per rank
        "layers.{0..1}.attention.o_proj.weight": Param((2048, 2048), torch.bfloat16, "S1"),
        "layers.{0..1}.mlp_norm.weight": Param((2048,), torch.bfloat16, "R"),
        # [1408, 2048] per rank
        "layers.{0..1}.mlp.gate_proj.weight": Param((5632, 2048), torch.bfloat16, "S0"),
        # [1408, 2048] per rank
        "layers.{0..1}.mlp.up_proj.weight": Param((5632, 2048), torch.bfloat16, "S0"),
        # [2048, 1408] per rank
        "layers.{0..1}.mlp.down_proj.weight": Param((2048, 5632), torch.bfloat16, "S1"),
    }
    NOT_MATRICES = ("embedding.weight", "head.weight")  # Muon leaves them to AdamW
    WEIGHTS = {
        # `stages`: loops over layers that run before its first use and its last
        "norm.weight": Weight("R", "V", stages=(1, 1)),  # backward all-reduce 4.1 kB; 9.71 us
    }
    INPUTS = {
        # `free`: dims that may have other sizes; `step`: what those are multiples of;
        # `high`: numbers are below it
        "tokens": Input("R", (2, 4096), torch.int64, free=(0, 1), step=(1, 4), high=32000),
        "labels": Input("R", (2, 4096), torch.int64, free=(0, 1), step=(1, 4), high=32000),
    }
    LABELS = Labels("labels")  # those that count in a mean
    OUTPUTS = (
        Output(("loss",), "R", ()),
        Output(("logits",), "S2", (2, 4096, 32000)),
    )

    def forward(self, tokens: Tensor, labels: Tensor) -> object:
        tp = self.mesh["tp"]
        position_ids = torch.arange(tokens.size(1), dtype=torch.int64, device=self.device)  # [s]
        exponents = torch.arange(0, 128, 2, dtype=torch.float32, device=self.device) / 128  # [64]
        angles = position_ids.to(torch.float32).unsqueeze(-1) * 10000.0**-exponents  # [s, 64]
        cos = torch.cos(angles).unsqueeze(1).to(torch.bfloat16)  # [s, 1, 64]
        sin = torch.sin(angles).unsqueeze(1).to(torch.bfloat16)  # [s, 1, 64]
        # [b, s/tp, 2048]; reduce-scatter 33.6 MB, backward all-gather, 214 us
        x = tp.reduce_scatter(ops.vocab_embedding(tokens, self.embedding.weight, tp, size=32000), 1)
        for layer in self.layers:
            x = layer(x, cos, sin)  # [b, s/tp, 2048]
        # [b, s, 32000/tp]; all-gather 33.6 MB, backward reduce-scatter, 214 us
        logits = self.head(tp.all_gather(self.norm(x), 1))
        # []; inside all-reduce 98.3 kB
        loss = ops.cross_entropy(logits, labels, dtype=torch.float32, vocab_axis=tp)
        return self.pack(loss, logits)


if __name__ == "__main__":
    ShardedModel.demo()

"""Llama over 4 x h100: dp=4.

   dp=0  dp=1  dp=2  dp=3
      0     1     2     3

dp cuts the batch and all matrices (FSDP: gathered for use). Around the layers it cuts embedding
by hidden.
Each rank returns all of loss, and its part of logits (S0); `model.gather_outputs(out)` makes
all of it, with gradients, for a loss outside of the module.

Made from a model given to shardwright.plan, batch 16 x 2048 tokens, bfloat16.
Predicted: 17.4 ms per step, 2.83 GB per GPU.

    torchrun --nproc-per-node 4 sharded_model.py    a demonstration
    model = ShardedModel.from_checkpoint("folder with .safetensors")
    model(**model.shard_inputs(**batch)).loss.backward()

Comments and tables:
    [b, 64/dp]             shape that a statement makes, where it changes; 64 is cut over dp
    + dp                   each rank of dp holds a summand of it
    all-gather 8 MB, 9 us  what is sent in the statement, and for how long
    inside                 sent by the operator itself, in all its steps
    R, S0                  in tables, for each mesh axis: whole on each rank, cut along dim 0
    V                      whole, while each rank has a summand of its gradient
    Weight(stored, used)   weights of a layer go there together before it
    Home(spec)             a copy is there for all uses, made once a step
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.runtime import (
    Home,
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
        # x [b/dp, s, 2048]; cos [s, 1, 64]; sin [s, 1, 64]
        q = self.q_proj(x).unflatten(-1, (-1, 128))  # [b/dp, s, 16, 128]
        k = self.k_proj(x).unflatten(-1, (-1, 128))  # [b/dp, s, 8, 128]
        v = self.v_proj(x).unflatten(-1, (-1, 128))  # [b/dp, s, 8, 128]
        q = ops.rotary(q, cos, sin).transpose(1, 2)  # [b/dp, 16, s, 128]
        k = ops.rotary(k, cos, sin).transpose(1, 2)  # [b/dp, 8, s, 128]
        v = v.transpose(1, 2)  # [b/dp, 8, s, 128]
        mixed = ops.attention(q, k, v, causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # [b/dp, s, 2048]


class MLP(Sharded):
    """MLP of llama.py:82."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:  # x [b/dp, s, 2048]
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(Layer):
    """`layers`, 2 times: layers 0 to 1; llama.py:96."""

    attention_norm: nn.RMSNorm
    attention: Attention
    mlp_norm: nn.RMSNorm
    mlp: MLP
    OPTIONS = {"attention_norm": {"eps": 1e-05}, "mlp_norm": {"eps": 1e-05}}

    WEIGHTS = {
        # all-gather 4.1 kB; backward all-gather, reduce-scatter; <0.1 us
        "attention_norm.weight": Weight("S0", "V"),
        # all-gather 8.39 MB; backward all-gather, reduce-scatter; 69.2 us
        "attention.q_proj.weight": Weight("S0", "V"),
        # all-gather 4.19 MB; backward all-gather, reduce-scatter; 34.6 us
        "attention.k_proj.weight": Weight("S0", "V"),
        # all-gather 4.19 MB; backward all-gather, reduce-scatter; 34.6 us
        "attention.v_proj.weight": Weight("S0", "V"),
        # all-gather 8.39 MB; backward all-gather, reduce-scatter; 69.2 us
        "attention.o_proj.weight": Weight("S0", "V"),
        # all-gather 4.1 kB; backward all-gather, reduce-scatter; <0.1 us
        "mlp_norm.weight": Weight("S0", "V"),
        # all-gather 23.1 MB; backward all-gather, reduce-scatter; 190 us
        "mlp.gate_proj.weight": Weight("S0", "V"),
        # all-gather 23.1 MB; backward all-gather, reduce-scatter; 190 us
        "mlp.up_proj.weight": Weight("S0", "V"),
        # all-gather 23.1 MB; backward all-gather, reduce-scatter; 190 us
        "mlp.down_proj.weight": Weight("S0", "V"),
    }

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # x [b/dp, s, 2048]; cos [s, 1, 64]; sin [s, 1, 64]
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class ShardedModel(ShardedModule):
    """Llama as one rank of dp=4 runs it."""

    embedding: nn.Embedding
    norm: nn.RMSNorm
    head: nn.Linear
    OPTIONS = {"norm": {"eps": 1e-05}}

    MESH = {"dp": 4}
    PHASE = "train"
    OPTIMIZER = "adamw"
    LAYERS = {
        "layers": [DecoderLayer] * 2,
    }
    PARAMETERS = {
        "embedding.weight": Param((32000, 2048), torch.bfloat16, "S1"),  # [32000, 512] per rank
        "norm.weight": Param((2048,), torch.bfloat16, "S0"),  # [512] per rank
        "head.weight": Param((32000, 2048), torch.bfloat16, "S0"),  # [8000, 2048] per rank
        # [512] per rank
        "layers.{0..1}.attention_norm.weight": Param((2048,), torch.bfloat16, "S0"),
        # [512, 2048] per rank
        "layers.{0..1}.attention.q_proj.weight": Param((2048, 2048), torch.bfloat16, "S0"),
        # [256, 2048] per rank
        "layers.{0..1}.attention.k_proj.weight": Param((1024, 2048), torch.bfloat16, "S0"),
        # [256, 2048] per rank
        "layers.{0..1}.attention.v_proj.weight": Param((1024, 2048), torch.bfloat16, "S0"),
        # [512, 2048] per rank
        "layers.{0..1}.attention.o_proj.weight": Param((2048, 2048), torch.bfloat16, "S0"),
        "layers.{0..1}.mlp_norm.weight": Param((2048,), torch.bfloat16, "S0"),  # [512] per rank
        # [1408, 2048] per rank
        "layers.{0..1}.mlp.gate_proj.weight": Param((5632, 2048), torch.bfloat16, "S0"),
        # [1408, 2048] per rank
        "layers.{0..1}.mlp.up_proj.weight": Param((5632, 2048), torch.bfloat16, "S0"),
        # [512, 5632] per rank
        "layers.{0..1}.mlp.down_proj.weight": Param((2048, 5632), torch.bfloat16, "S0"),
    }
    NOT_MATRICES = ("embedding.weight", "head.weight")  # Muon leaves them to AdamW
    WEIGHTS = {
        # `stages`: loops over layers that run before its first use and its last
        # all-gather 4.1 kB; backward reduce-scatter; <0.1 us
        "norm.weight": Weight("S0", "V", stages=(1, 1), home=Home("V")),
        # all-gather 131 MB; backward reduce-scatter; 697 us
        "head.weight": Weight("S0", "V", stages=(1, 1), home=Home("V")),
    }
    INPUTS = {
        # `free`: dims that may have other sizes; `step`: what those are multiples of;
        # `high`: numbers are below it
        "tokens": Input("R", (16, 2048), torch.int64, free=(0, 1), step=(4, 1), high=32000),
        "labels": Input("S0", (16, 2048), torch.int64, free=(0, 1), step=(4, 1), high=32000),
    }
    LABELS = Labels("labels")  # those that count in a mean
    OUTPUTS = (
        Output(("loss",), "R", ()),
        Output(("logits",), "S0", (16, 2048, 32000)),
    )

    def forward(self, tokens: Tensor, labels: Tensor) -> object:
        dp = self.mesh["dp"]
        position_ids = torch.arange(tokens.size(1), dtype=torch.int64, device=self.device)  # [s]
        exponents = torch.arange(0, 128, 2, dtype=torch.float32, device=self.device) / 128  # [64]
        angles = position_ids.to(torch.float32).unsqueeze(-1) * 10000.0**-exponents  # [s, 64]
        cos = torch.cos(angles).unsqueeze(1).to(torch.bfloat16)  # [s, 1, 64]
        sin = torch.sin(angles).unsqueeze(1).to(torch.bfloat16)  # [s, 1, 64]
        # [b/dp, s, 2048]; all-to-all 33.6 MB, backward all-to-all, 219 us
        x = dp.all_to_all(self.embedding(tokens), gather_dim=2, shard_dim=0)
        for layer in self.layers:
            x = layer(x, cos, sin)  # [b/dp, s, 2048]
        logits = self.head(self.norm(x))  # [b/dp, s, 32000]
        # [] + dp; inside all-reduce 8 B
        loss = ops.cross_entropy(logits, labels, dtype=torch.float32, token_axes=(dp,))
        return self.pack(dp.all_reduce(loss), logits)  # all-reduce 4 B, 9.34 us


if __name__ == "__main__":
    ShardedModel.demo()

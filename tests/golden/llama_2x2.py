"""Llama over 4 x h100: dp1=2 x dp2=2.

        dp2=0  dp2=1
dp1=0       0      1
dp1=1       2      3

dp1 cuts the batch and all matrices (ZeRO-2: gathered once a step, gradients reduced in each
backward). Around the layers it cuts embedding and loss by vocabulary and head by columns.
dp2 cuts the batch and all matrices (ZeRO-2: gathered once a step, gradients reduced in each
backward). Around the layers it cuts embedding by hidden, head by columns and loss by
vocabulary.
Each rank returns all of loss, and its part of logits (S2,S2); `model.gather_outputs(out)` makes
all of it, with gradients, for a loss outside of the module.

Made from a model given to shardwright.plan, batch 8 x 2048 tokens, parameters in float32, used
in bfloat16.
Predicted: 17.4 ms per step, 3.11 GB per GPU.

    torchrun --nproc-per-node 4 sharded_model.py    a demonstration
    model = ShardedModel.from_checkpoint("folder with .safetensors")
    model(**model.shard_inputs(**batch)).loss.backward()

Comments and tables:
    [b, 64/dp2]            shape that a statement makes, where it changes; 64 is cut over dp2
    + dp1                  each rank of dp1 holds a summand of it
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
        # x [b/dp1/dp2, s, 2048]; cos [s, 1, 32]; sin [s, 1, 32]
        q = self.q_proj(x).unflatten(-1, (-1, 64))  # [b/dp1/dp2, s, 32, 64]
        k = self.k_proj(x).unflatten(-1, (-1, 64))  # [b/dp1/dp2, s, 8, 64]
        v = self.v_proj(x).unflatten(-1, (-1, 64))  # [b/dp1/dp2, s, 8, 64]
        q = ops.rotary(q, cos, sin).transpose(1, 2)  # [b/dp1/dp2, 32, s, 64]
        k = ops.rotary(k, cos, sin).transpose(1, 2)  # [b/dp1/dp2, 8, s, 64]
        v = v.transpose(1, 2)  # [b/dp1/dp2, 8, s, 64]
        mixed = ops.attention(q, k, v, causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # [b/dp1/dp2, s, 2048]


class MLP(Sharded):
    """MLP of llama.py:82."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:  # x [b/dp1/dp2, s, 2048]
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(Layer):
    """`layers`, 4 times: layers 0 to 3; llama.py:96."""

    attention_norm: nn.RMSNorm
    attention: Attention
    mlp_norm: nn.RMSNorm
    mlp: MLP
    OPTIONS = {"attention_norm": {"eps": 1e-05}, "mlp_norm": {"eps": 1e-05}}

    WEIGHTS = {
        # all-gather 8.19 kB; backward reduce-scatter; <0.1 us
        "attention_norm.weight": Weight("S0,S0", "V,V", dtype=torch.bfloat16, home=Home("V,V")),
        # all-gather 16.8 MB; backward reduce-scatter; 66.6 us
        "attention.q_proj.weight": Weight("S0,S0", "V,V", dtype=torch.bfloat16, home=Home("V,V")),
        # all-gather 4.19 MB; backward reduce-scatter; 16.6 us
        "attention.k_proj.weight": Weight("S0,S0", "V,V", dtype=torch.bfloat16, home=Home("V,V")),
        # all-gather 4.19 MB; backward reduce-scatter; 16.6 us
        "attention.v_proj.weight": Weight("S0,S0", "V,V", dtype=torch.bfloat16, home=Home("V,V")),
        # all-gather 16.8 MB; backward reduce-scatter; 66.6 us
        "attention.o_proj.weight": Weight("S0,S0", "V,V", dtype=torch.bfloat16, home=Home("V,V")),
        # all-gather 8.19 kB; backward reduce-scatter; <0.1 us
        "mlp_norm.weight": Weight("S0,S0", "V,V", dtype=torch.bfloat16, home=Home("V,V")),
        # all-gather 46.1 MB; backward reduce-scatter; 183 us
        "mlp.gate_proj.weight": Weight("S0,S0", "V,V", dtype=torch.bfloat16, home=Home("V,V")),
        # all-gather 46.1 MB; backward reduce-scatter; 183 us
        "mlp.up_proj.weight": Weight("S0,S0", "V,V", dtype=torch.bfloat16, home=Home("V,V")),
        # all-gather 46.1 MB; backward reduce-scatter; 183 us
        "mlp.down_proj.weight": Weight("S0,S0", "V,V", dtype=torch.bfloat16, home=Home("V,V")),
    }

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # x [b/dp1/dp2, s, 2048]; cos [s, 1, 32]; sin [s, 1, 32]
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class ShardedModel(ShardedModule):
    """Llama as one rank of dp1=2 x dp2=2 runs it."""

    norm: nn.RMSNorm
    head: nn.Linear
    OPTIONS = {"norm": {"eps": 1e-05}}

    MESH = {"dp1": 2, "dp2": 2}
    PHASE = "train"
    OPTIMIZER = "adamw"
    REDUCE = torch.float32  # of gradients on their way between ranks
    LAYERS = {
        "layers": [DecoderLayer] * 4,
    }
    PARAMETERS = {
        "embedding.weight": Param((32000, 2048), torch.float32, "S0,S1"),  # [16000, 1024] per rank
        "norm.weight": Param((2048,), torch.float32, "R,R"),
        "head.weight": Param((32000, 2048), torch.float32, "S0,S0"),  # [8000, 2048] per rank
        # [512] per rank
        "layers.{0..3}.attention_norm.weight": Param((2048,), torch.float32, "S0,S0"),
        # [512, 2048] per rank
        "layers.{0..3}.attention.q_proj.weight": Param((2048, 2048), torch.float32, "S0,S0"),
        # [128, 2048] per rank
        "layers.{0..3}.attention.k_proj.weight": Param((512, 2048), torch.float32, "S0,S0"),
        # [128, 2048] per rank
        "layers.{0..3}.attention.v_proj.weight": Param((512, 2048), torch.float32, "S0,S0"),
        # [512, 2048] per rank
        "layers.{0..3}.attention.o_proj.weight": Param((2048, 2048), torch.float32, "S0,S0"),
        "layers.{0..3}.mlp_norm.weight": Param((2048,), torch.float32, "S0,S0"),  # [512] per rank
        # [1408, 2048] per rank
        "layers.{0..3}.mlp.gate_proj.weight": Param((5632, 2048), torch.float32, "S0,S0"),
        # [1408, 2048] per rank
        "layers.{0..3}.mlp.up_proj.weight": Param((5632, 2048), torch.float32, "S0,S0"),
        # [512, 5632] per rank
        "layers.{0..3}.mlp.down_proj.weight": Param((2048, 5632), torch.float32, "S0,S0"),
    }
    NOT_MATRICES = ("embedding.weight", "head.weight")  # Muon leaves them to AdamW
    WEIGHTS = {
        # `stages`: loops over layers that run before its first use and its last
        "embedding.weight": Weight("S0,S1", "S0,S1", dtype=torch.bfloat16),
        # backward all-reduce 8.19 kB; 9.88 us
        "norm.weight": Weight("R,R", "V,V", stages=(1, 1), dtype=torch.bfloat16),
        "head.weight": Weight("S0,S0", "S0,S0", stages=(1, 1), dtype=torch.bfloat16),
    }
    INPUTS = {
        # `free`: dims that may have other sizes; `step`: what those are multiples of;
        # `high`: numbers are below it
        "tokens": Input("R,R", (8, 2048), torch.int64, free=(0, 1), step=(4, 1), high=32000),
        "labels": Input("R,R", (8, 2048), torch.int64, free=(0, 1), step=(4, 1), high=32000),
    }
    LABELS = Labels("labels")  # those that count in a mean
    OUTPUTS = (
        Output(("loss",), "R,R", ()),
        Output(("logits",), "S2,S2", (8, 2048, 32000)),
    )

    def forward(self, tokens: Tensor, labels: Tensor) -> object:
        dp1 = self.mesh["dp1"]
        dp2 = self.mesh["dp2"]
        dp1_dp2 = self.mesh["dp1", "dp2"]
        position_ids = torch.arange(tokens.size(1), dtype=torch.int64, device=self.device)  # [s]
        exponents = torch.arange(0, 64, 2, dtype=torch.float32, device=self.device) / 64  # [32]
        angles = position_ids.to(torch.float32).unsqueeze(-1) * 10000.0**-exponents  # [s, 32]
        cos = torch.cos(angles).unsqueeze(1).to(torch.bfloat16)  # [s, 1, 32]
        sin = torch.sin(angles).unsqueeze(1).to(torch.bfloat16)  # [s, 1, 32]
        # [b, s, 2048/dp2] + dp1
        x = ops.vocab_embedding(tokens, self.embedding.weight, dp1, size=32000)
        # [b/dp1, s, 2048/dp2]; reduce-scatter 33.6 MB, backward all-gather, 172 us
        x = dp1.reduce_scatter(x, 0)
        # [b/dp1/dp2, s, 2048]; all-to-all 16.8 MB, backward all-to-all, 108 us
        x = dp2.all_to_all(x, gather_dim=2, shard_dim=0)
        for layer in self.layers:
            x = layer(x, cos, sin)  # [b/dp1/dp2, s, 2048]
        # [b, s, 32000/dp1/dp2]; all-gather 67.1 MB, backward reduce-scatter, 384 us
        logits = self.head(dp1_dp2.all_gather(self.norm(x), 0))
        # []; inside all-reduce 197 kB
        loss = ops.cross_entropy(logits, labels, dtype=torch.float32, vocab_axis=dp1_dp2)
        return self.pack(loss, logits)


if __name__ == "__main__":
    ShardedModel.demo()

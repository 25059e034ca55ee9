"""Llama over 4 x h100: cp=4.

   cp=0  cp=1  cp=2  cp=3
      0     1     2     3

cp cuts attention by sequence (exchanged for heads) and the sequence between them. Around the
layers it cuts embedding by hidden, head by columns and loss by vocabulary.
Each rank returns all of loss, and its part of logits (S2); `model.gather_outputs(out)` makes
all of it, with gradients, for a loss outside of the module.

Made from a model given to shardwright.plan, batch 1 x 16384 tokens, bfloat16.
Predicted: 14.1 ms per step, 2.09 GB per GPU.

    torchrun --nproc-per-node 4 sharded_model.py    a demonstration
    model = ShardedModel.from_checkpoint("folder with .safetensors")
    model(**model.shard_inputs(**batch)).loss.backward()

Comments and tables:
    [b, 64/cp]             shape that a statement makes, where it changes; 64 is cut over cp
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
        # x [1, s/cp, 2048]; cos [s/cp, 1, 64]; sin [s/cp, 1, 64]
        cp = self.mesh["cp"]
        q = self.q_proj(x).unflatten(-1, (-1, 128))  # [1, s/cp, 16, 128]
        k = self.k_proj(x).unflatten(-1, (-1, 128))  # [1, s/cp, 16, 128]
        v = self.v_proj(x).unflatten(-1, (-1, 128))  # [1, s/cp, 16, 128]
        q = ops.rotary(q, cos, sin).transpose(1, 2)  # [1, 16, s/cp, 128]
        k = ops.rotary(k, cos, sin).transpose(1, 2)  # [1, 16, s/cp, 128]
        v = v.transpose(1, 2)  # [1, 16, s/cp, 128]
        # inside all-to-all 67.1 MB, backward all-to-all 67.1 MB
        mixed = ops.attention(q, k, v, algorithm="ulysses", axis=cp, causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # [1, s/cp, 2048]


class MLP(Sharded):
    """MLP of llama.py:82."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:  # x [1, s/cp, 2048]
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(Layer):
    """`layers`, 2 times: layers 0 to 1; llama.py:96."""

    attention_norm: nn.RMSNorm
    attention: Attention
    mlp_norm: nn.RMSNorm
    mlp: MLP
    OPTIONS = {"attention_norm": {"eps": 1e-05}, "mlp_norm": {"eps": 1e-05}}

    WEIGHTS = {
        "attention_norm.weight": Weight("R", "V"),  # backward all-reduce 4.1 kB; <0.1 us
        "attention.q_proj.weight": Weight("R", "V"),  # backward all-reduce 8.39 MB; 39.5 us
        "attention.k_proj.weight": Weight("R", "V"),  # backward all-reduce 8.39 MB; 39.5 us
        "attention.v_proj.weight": Weight("R", "V"),  # backward all-reduce 8.39 MB; 39.5 us
        "attention.o_proj.weight": Weight("R", "V"),  # backward all-reduce 8.39 MB; 39.5 us
        "mlp_norm.weight": Weight("R", "V"),  # backward all-reduce 4.1 kB; <0.1 us
        "mlp.gate_proj.weight": Weight("R", "V"),  # backward all-reduce 23.1 MB; 109 us
        "mlp.up_proj.weight": Weight("R", "V"),  # backward all-reduce 23.1 MB; 109 us
        "mlp.down_proj.weight": Weight("R", "V"),  # backward all-reduce 23.1 MB; 109 us
    }

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # x [1, s/cp, 2048]; cos [s/cp, 1, 64]; sin [s/cp, 1, 64]
        x = x + self.attention(self.attention_norm(x), cos, sin)
        return x + self.mlp(self.mlp_norm(x))


class ShardedModel(ShardedModule):
    """Llama as one rank of cp=4 runs it."""

    embedding: nn.Embedding
    norm: nn.RMSNorm
    head: nn.Linear
    OPTIONS = {"norm": {"eps": 1e-05}}

    MESH = {"cp": 4}
    PHASE = "train"
    OPTIMIZER = "adamw"
    LAYERS = {
        "layers": [DecoderLayer] * 2,
    }
    PARAMETERS = {
        "embedding.weight": Param((32000, 2048), torch.bfloat16, "S1"),  # [32000, 512] per rank
        "norm.weight": Param((2048,), torch.bfloat16, "R"),
        "head.weight": Param((32000, 2048), torch.bfloat16, "S0"),  # [8000, 2048] per rank
        "layers.{0..1}.attention_norm.weight": Param((2048,), torch.bfloat16, "R"),
        "layers.{0..1}.attention.q_proj.weight": Param((2048, 2048), torch.bfloat16, "R"),
        "layers.{0..1}.attention.k_proj.weight": Param((2048, 2048), torch.bfloat16, "R"),
        "layers.{0..1}.attention.v_proj.weight": Param((2048, 2048), torch.bfloat16, "R"),
        "layers.{0..1}.attention.o_proj.weight": Param((2048, 2048), torch.bfloat16, "R"),
        "layers.{0..1}.mlp_norm.weight": Param((2048,), torch.bfloat16, "R"),
        "layers.{0..1}.mlp.gate_proj.weight": Param((5632, 2048), torch.bfloat16, "R"),
        "layers.{0..1}.mlp.up_proj.weight": Param((5632, 2048), torch.bfloat16, "R"),
        "layers.{0..1}.mlp.down_proj.weight": Param((2048, 5632), torch.bfloat16, "R"),
    }
    NOT_MATRICES = ("embedding.weight", "head.weight")  # Muon leaves them to AdamW
    WEIGHTS = {
        # `stages`: loops over layers that run before its first use and its last
        "norm.weight": Weight("R", "V", stages=(1, 1)),  # backward all-reduce 4.1 kB; 9.71 us
    }
    INPUTS = {
        # `free`: dims that may have other sizes; `step`: what those are multiples of;
        # `high`: numbers are below it
        "tokens": Input("R", (1, 16384), torch.int64, free=(1,), step=(1, 4), high=32000),
        "labels": Input("R", (1, 16384), torch.int64, free=(1,), step=(1, 4), high=32000),
    }
    LABELS = Labels("labels")  # those that count in a mean
    OUTPUTS = (
        Output(("loss",), "R", ()),
        Output(("logits",), "S2", (1, 16384, 32000)),
    )

    def forward(self, tokens: Tensor, labels: Tensor) -> object:
        cp = self.mesh["cp"]
        position_ids = torch.arange(tokens.size(1), dtype=torch.int64, device=self.device)  # [s]
        exponents = torch.arange(0, 128, 2, dtype=torch.float32, device=self.device) / 128  # [64]
        # [s/cp, 64]
        angles = cp.shard(position_ids, 0).to(torch.float32).unsqueeze(-1) * 10000.0**-exponents
        cos = torch.cos(angles).unsqueeze(1).to(torch.bfloat16)  # [s/cp, 1, 64]
        sin = torch.sin(angles).unsqueeze(1).to(torch.bfloat16)  # [s/cp, 1, 64]
        # [1, s/cp, 2048]; all-to-all 16.8 MB, backward all-to-all, 130 us
        x = cp.all_to_all(self.embedding(tokens), gather_dim=2, shard_dim=1)
        for layer in self.layers:
            x = layer(x, cos, sin)  # [1, s/cp, 2048]
        # [1, s, 32000/cp]; all-gather 67.1 MB, backward reduce-scatter, 384 us
        logits = self.head(cp.all_gather(self.norm(x), 1))
        # []; inside all-reduce 197 kB
        loss = ops.cross_entropy(logits, labels, dtype=torch.float32, vocab_axis=cp)
        return self.pack(loss, logits)


if __name__ == "__main__":
    ShardedModel.demo()

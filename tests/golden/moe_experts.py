"""MoETransformer over 4 x h100: ep=4.

   ep=0  ep=1  ep=2  ep=3
      0     1     2     3

ep cuts the batch (DDP: gradients are summed) and experts by expert (EP with all-to-all).
Each rank returns all of loss, and its part of logits (S0); `model.gather_outputs(out)` makes
all of it, with gradients, for a loss outside of the module.

Made from a model given to shardwright.plan, batch 16 x 2048 tokens, bfloat16.
Predicted: 9.51 ms per step, 2.69 GB per GPU.

    torchrun --nproc-per-node 4 sharded_model.py    a demonstration
    model = ShardedModel.from_checkpoint("folder with .safetensors")
    model(**model.shard_inputs(**batch)).loss.backward()

Comments and tables:
    [b, 64/ep]             shape that a statement makes, where it changes; 64 is cut over ep
    + ep                   each rank of ep holds a summand of it
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
    """Attention of moe.py:51."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:  # x [b/ep, s, 1024]
        q = self.q_proj(x).unflatten(-1, (-1, 64)).transpose(1, 2)  # [b/ep, 16, s, 64]
        k = self.k_proj(x).unflatten(-1, (-1, 64)).transpose(1, 2)  # [b/ep, 16, s, 64]
        v = self.v_proj(x).unflatten(-1, (-1, 64)).transpose(1, 2)  # [b/ep, 16, s, 64]
        mixed = ops.attention(q, k, v, causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # [b/ep, s, 1024]


class MoE(Sharded):
    """MoE of moe.py:91."""

    router: nn.Linear

    def forward(self, x: Tensor) -> Tensor:  # x [b/ep, s, 1024]
        ep = self.mesh["ep"]
        scores = F.softmax(self.router(x), dim=-1)  # [b/ep, s, 16]
        weights, indices = scores.topk(2, dim=-1)  # [b/ep, s, 2]
        quotient = weights / weights.sum(-1, keepdim=True)
        # inside all-to-all 84.1 MB, backward all-to-all 84 MB
        return ops.moe(
            x, indices, quotient, self.experts.gate_up, self.experts.down, expert_axis=ep
        )


class DecoderLayer(Layer):
    """`layers`, 2 times: layers 0 to 1; moe.py:107."""

    attention_norm: nn.RMSNorm
    attention: Attention
    moe_norm: nn.RMSNorm
    moe: MoE
    OPTIONS = {"attention_norm": {"eps": 1e-05}, "moe_norm": {"eps": 1e-05}}

    WEIGHTS = {
        "attention_norm.weight": Weight("R", "V"),  # backward all-reduce 2.05 kB; <0.1 us
        "attention.q_proj.weight": Weight("R", "V"),  # backward all-reduce 2.1 MB; 15.2 us
        "attention.k_proj.weight": Weight("R", "V"),  # backward all-reduce 2.1 MB; 15.2 us
        "attention.v_proj.weight": Weight("R", "V"),  # backward all-reduce 2.1 MB; 15.2 us
        "attention.o_proj.weight": Weight("R", "V"),  # backward all-reduce 2.1 MB; 15.2 us
        "moe_norm.weight": Weight("R", "V"),  # backward all-reduce 2.05 kB; <0.1 us
        "moe.router.weight": Weight("R", "V"),  # backward all-reduce 32.8 kB; 0.238 us
    }

    def forward(self, x: Tensor) -> Tensor:  # x [b/ep, s, 1024]
        x = x + self.attention(self.attention_norm(x))
        return x + self.moe(self.moe_norm(x))


class ShardedModel(ShardedModule):
    """MoETransformer as one rank of ep=4 runs it."""

    embedding: nn.Embedding
    norm: nn.RMSNorm
    head: nn.Linear
    OPTIONS = {"norm": {"eps": 1e-05}}

    MESH = {"ep": 4}
    PHASE = "train"
    OPTIMIZER = "adamw"
    LAYERS = {
        "layers": [DecoderLayer] * 2,
    }
    PARAMETERS = {
        "embedding.weight": Param((4096, 1024), torch.bfloat16, "S0"),  # [1024, 1024] per rank
        "norm.weight": Param((1024,), torch.bfloat16, "S0"),  # [256] per rank
        "head.weight": Param((4096, 1024), torch.bfloat16, "S0"),  # [1024, 1024] per rank
        "layers.{0..1}.attention_norm.weight": Param((1024,), torch.bfloat16, "R"),
        "layers.{0..1}.attention.q_proj.weight": Param((1024, 1024), torch.bfloat16, "R"),
        "layers.{0..1}.attention.k_proj.weight": Param((1024, 1024), torch.bfloat16, "R"),
        "layers.{0..1}.attention.v_proj.weight": Param((1024, 1024), torch.bfloat16, "R"),
        "layers.{0..1}.attention.o_proj.weight": Param((1024, 1024), torch.bfloat16, "R"),
        "layers.{0..1}.moe_norm.weight": Param((1024,), torch.bfloat16, "R"),
        "layers.{0..1}.moe.router.weight": Param((16, 1024), torch.bfloat16, "R"),
        # [4, 5632, 1024] per rank
        "layers.{0..1}.moe.experts.gate_up": Param((16, 5632, 1024), torch.bfloat16, "S0"),
        # [4, 1024, 2816] per rank
        "layers.{0..1}.moe.experts.down": Param((16, 1024, 2816), torch.bfloat16, "S0"),
    }
    NOT_MATRICES = ("embedding.weight", "head.weight")  # Muon leaves them to AdamW
    WEIGHTS = {
        # `stages`: loops over layers that run before its first use and its last
        "embedding.weight": Weight("S0", "V"),  # all-gather 8.39 MB; backward reduce-scatter; 77 us
        # all-gather 2.05 kB; backward reduce-scatter; <0.1 us
        "norm.weight": Weight("S0", "V", stages=(1, 1), home=Home("V")),
        # all-gather 8.39 MB; backward reduce-scatter; 77 us
        "head.weight": Weight("S0", "V", stages=(1, 1), home=Home("V")),
    }
    INPUTS = {
        # `free`: dims that may have other sizes; `step`: what those are multiples of;
        # `high`: numbers are below it
        "tokens": Input("S0", (16, 2048), torch.int64, free=(0, 1), step=(4, 1), high=4096),
        "labels": Input("S0", (16, 2048), torch.int64, free=(0, 1), step=(4, 1), high=4096),
    }
    LABELS = Labels("labels")  # those that count in a mean
    OUTPUTS = (
        Output(("loss",), "R", ()),
        Output(("logits",), "S0", (16, 2048, 4096)),
    )

    def forward(self, tokens: Tensor, labels: Tensor) -> object:
        ep = self.mesh["ep"]
        x = self.embedding(tokens)  # [b/ep, s, 1024]
        for layer in self.layers:
            x = layer(x)  # [b/ep, s, 1024]
        logits = self.head(self.norm(x))  # [b/ep, s, 4096]
        # [] + ep; inside all-reduce 8 B
        loss = ops.cross_entropy(logits, labels, dtype=torch.float32, token_axes=(ep,))
        return self.pack(ep.all_reduce(loss), logits)  # all-reduce 4 B, 9.34 us


if __name__ == "__main__":
    ShardedModel.demo()

"""Llama over 4 x h100: dp=4.

   dp=0  dp=1  dp=2  dp=3
      0     1     2     3

Prefill: dp cuts the batch and all matrices (FSDP: gathered for use). Around the layers it cuts
head by columns. Decoding: dp cuts attention by heads and matrix products by columns (q_proj,
k_proj, v_proj, gate_proj, up_proj) and rows (o_proj, down_proj). Around the layers it cuts head
by columns.

Made from a model given to shardwright.plan, batch 4 x 4096 tokens, bfloat16.
Predicted: 2.27 ms per prefill, 201 us per output token, 668 MB per GPU.
KV caches are converted between the two in 186 us.

    torchrun --nproc-per-node 4 sharded_model.py    a demonstration
    model = ShardedModel.from_checkpoint("folder with .safetensors")
    model.generate(input_ids, max_new_tokens=256)

Comments and tables:
    [b, 64/dp]             shape that a statement makes, where it changes; 64 is cut over dp
    + dp                   each rank of dp holds a summand of it
    all-gather 8 MB, 9 us  what is sent in the statement, and for how long
    R, S0                  in tables, for each mesh axis: whole on each rank, cut along dim 0
    Weight(stored, used)   weights of a layer go there together before it
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.runtime import (
    Cache,
    Input,
    Layer,
    Output,
    Param,
    Sharded,
    ShardedModule,
    Weight,
    ops,
)


class DecodingAttention(Sharded):
    """Attention of llama.py:61."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
        # x [b, 1, 2048]; cos [b, 1, 1, 64]; sin [b, 1, 1, 64]; position_ids [b, 1]
        q = self.q_proj(x).unflatten(-1, (-1, 128))  # [b, 1, 16/dp, 128]
        k = self.k_proj(x).unflatten(-1, (-1, 128))  # [b, 1, 8/dp, 128]
        v = self.v_proj(x).unflatten(-1, (-1, 128))  # [b, 1, 8/dp, 128]
        q = ops.rotary(q, cos, sin).transpose(1, 2)  # [b, 16/dp, 1, 128]
        k = ops.rotary(k, cos, sin).transpose(1, 2)  # [b, 8/dp, 1, 128]
        v = v.transpose(1, 2)  # [b, 8/dp, 1, 128]
        mixed = ops.cached_attention(q, k, v, self.kv, position_ids)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))  # [b, 1, 2048] + dp


class DecodingMLP(Sharded):
    """MLP of llama.py:82."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:  # x [b, 1, 2048]
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # [b, 1, 2048] + dp


class DecodingDecoderLayer(Layer):
    """`layers`, 2 times: layers 0 to 1; llama.py:96."""

    attention_norm: nn.RMSNorm
    attention: DecodingAttention
    mlp_norm: nn.RMSNorm
    mlp: DecodingMLP
    OPTIONS = {"attention_norm": {"eps": 1e-05}, "mlp_norm": {"eps": 1e-05}}

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
        # x [b, 1, 2048]; cos [b, 1, 1, 64]; sin [b, 1, 1, 64]; position_ids [b, 1]
        dp = self.mesh["dp"]
        # all-reduce 16.4 kB, 10.1 us
        x = x + dp.all_reduce(self.attention(self.attention_norm(x), cos, sin, position_ids))
        return x + dp.all_reduce(self.mlp(self.mlp_norm(x)))  # all-reduce 16.4 kB, 10.1 us


class Attention(Sharded):
    """Attention of llama.py:61."""

    q_proj: nn.Linear
    k_proj: nn.Linear
    v_proj: nn.Linear
    o_proj: nn.Linear

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
        # x [b/dp, s, 2048]; cos [b/dp, s, 1, 64]; sin [b/dp, s, 1, 64]; position_ids [b/dp, s]
        q = self.q_proj(x).unflatten(-1, (-1, 128))  # [b/dp, s, 16, 128]
        k = self.k_proj(x).unflatten(-1, (-1, 128))  # [b/dp, s, 8, 128]
        v = self.v_proj(x).unflatten(-1, (-1, 128))  # [b/dp, s, 8, 128]
        q = ops.rotary(q, cos, sin).transpose(1, 2)  # [b/dp, 16, s, 128]
        k = ops.rotary(k, cos, sin).transpose(1, 2)  # [b/dp, 8, s, 128]
        v = v.transpose(1, 2)  # [b/dp, 8, s, 128]
        mixed = ops.cached_attention(q, k, v, self.kv, position_ids)
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
        "attention.q_proj.weight": Weight("S0", "R"),  # all-gather 8.39 MB; 23.1 us
        "attention.k_proj.weight": Weight("S0", "R"),  # all-gather 4.19 MB; 11.5 us
        "attention.v_proj.weight": Weight("S0", "R"),  # all-gather 4.19 MB; 11.5 us
        "attention.o_proj.weight": Weight("S1", "R"),  # all-gather 8.39 MB; 23.1 us
        "mlp.gate_proj.weight": Weight("S0", "R"),  # all-gather 23.1 MB; 63.4 us
        "mlp.up_proj.weight": Weight("S0", "R"),  # all-gather 23.1 MB; 63.4 us
        "mlp.down_proj.weight": Weight("S1", "R"),  # all-gather 23.1 MB; 63.4 us
    }

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor) -> Tensor:
        # x [b/dp, s, 2048]; cos [b/dp, s, 1, 64]; sin [b/dp, s, 1, 64]; position_ids [b/dp, s]
        x = x + self.attention(self.attention_norm(x), cos, sin, position_ids)
        return x + self.mlp(self.mlp_norm(x))


class Decoding(ShardedModule):
    """Llama as one rank of dp=4 runs it for one token of each sequence."""

    embedding: nn.Embedding
    norm: nn.RMSNorm
    head: nn.Linear
    OPTIONS = {"norm": {"eps": 1e-05}}

    MESH = {"dp": 4}
    PHASE = "decode"
    OPTIMIZER = "none"
    CONTEXT = 4606  # tokens of a sequence that are cached before, as planned
    LAYERS = {
        "layers": [DecodingDecoderLayer] * 2,
    }
    PARAMETERS = {
        "embedding.weight": Param((32000, 2048), torch.bfloat16, "R"),
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
    INPUTS = {
        # `free`: dims that may have other sizes; `high`: numbers are below it
        "input_ids": Input("R", (4, 1), torch.int64, free=(0,), high=32000),
        "position_ids": Input("R", (4, 1), torch.int64, free=(0,)),
    }
    OUTPUTS = (Output(("logits",), "S2", (4, 1, 32000)),)
    CACHES = {
        "layers.{0..1}.attention.kv": Cache(
            heads=8, key_dim=128, value_dim=128, dtype=torch.bfloat16, spec="S1"
        ),
    }

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> object:
        exponents = torch.arange(0, 128, 2, dtype=torch.float32, device=self.device) / 128  # [64]
        position_ids_float32 = torch.clamp(position_ids, min=0).to(torch.float32)
        angles = position_ids_float32.unsqueeze(-1) * 10000.0**-exponents  # [b, 1, 64]
        x = self.embedding(input_ids)  # [b, 1, 2048]
        cos = torch.cos(angles).unsqueeze(1).to(torch.bfloat16)  # [b, 1, 1, 64]
        sin = torch.sin(angles).unsqueeze(1).to(torch.bfloat16)  # [b, 1, 1, 64]
        for layer in self.layers:
            x = layer(x, cos, sin, position_ids)  # [b, 1, 2048]
        last_token = ops.last_token(self.norm(x), position_ids)
        return self.pack(self.head(last_token))  # [b, 1, 32000/dp]


class ShardedModel(ShardedModule):
    """Llama as one rank of dp=4 runs it."""

    embedding: nn.Embedding
    norm: nn.RMSNorm
    head: nn.Linear
    OPTIONS = {"norm": {"eps": 1e-05}}

    MESH = {"dp": 4}
    PHASE = "prefill"
    OPTIMIZER = "none"
    LAYERS = {
        "layers": [DecoderLayer] * 2,
    }
    PARAMETERS = Decoding.PARAMETERS
    INPUTS = {
        # `free`: dims that may have other sizes; `step`: what those are multiples of;
        # `high`: numbers are below it
        "input_ids": Input("S0", (4, 4096), torch.int64, free=(0, 1), step=(4, 1), high=32000),
        "position_ids": Input("S0", (4, 4096), torch.int64, free=(0, 1), step=(4, 1)),
    }
    OUTPUTS = (Output(("logits",), "S2", (4, 1, 32000)),)
    CACHES = {
        # After prefill a cache is converted from `spec` along `path` to the layout of `Decoding`.
        "layers.{0..1}.attention.kv": Cache(
            heads=8, key_dim=128, value_dim=128, dtype=torch.bfloat16, spec="S0", path=("S1",)
        ),
    }
    DECODE = Decoding

    def forward(self, input_ids: Tensor, position_ids: Tensor) -> object:
        dp = self.mesh["dp"]
        exponents = torch.arange(0, 128, 2, dtype=torch.float32, device=self.device) / 128  # [64]
        position_ids_float32 = torch.clamp(position_ids, min=0).to(torch.float32)
        angles = position_ids_float32.unsqueeze(-1) * 10000.0**-exponents  # [b/dp, s, 64]
        x = self.embedding(input_ids)  # [b/dp, s, 2048]
        cos = torch.cos(angles).unsqueeze(2).to(torch.bfloat16)  # [b/dp, s, 1, 64]
        sin = torch.sin(angles).unsqueeze(2).to(torch.bfloat16)  # [b/dp, s, 1, 64]
        for layer in self.layers:
            x = layer(x, cos, sin, position_ids)  # [b/dp, s, 2048]
        # [b, 1, 32000/dp]; all-gather 16.4 kB, 7.64 us
        return self.pack(self.head(dp.all_gather(ops.last_token(self.norm(x), position_ids), 0)))


if __name__ == "__main__":
    ShardedModel.demo()

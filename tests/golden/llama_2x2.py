"""Llama over 4 x h100: dp1=2 x dp2=2.

Made from a model given to shardwright.plan, batch 8 x 2048 tokens, bfloat16.
Predicted: 17.8 ms per training step, 4.74 GB per GPU.

Run a demonstration step:
    torchrun --nproc-per-node 4 sharded_model.py

Comments show each result's shape, with the mesh axes that cut a dim (`4096/tp`) and
those whose ranks hold summands (`+ tp`), and the line it comes from.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwright.runtime import Input, Layer, Output, Param, ShardedModule, ops


class DecoderLayer(Layer):
    """`layers`, 4 times: layers 0 to 3."""

    def forward(self, hidden_states: Tensor, angles: Tensor) -> Tensor:
        dp1_dp2 = self.mesh["dp1", "dp2"]
        # [b/dp1/dp2, s, 2048]; backward all-reduce 4.1 kB, 9.71 us  llama.py:97
        attention_norm = F.rms_norm(
            hidden_states, (2048,), dp1_dp2.copy(self.attention_norm.weight), eps=1e-05
        )
        # [b/dp1/dp2, s, 2048]; backward all-reduce 8.39 MB, 61.1 us  llama.py:63
        q_proj = F.linear(attention_norm, dp1_dp2.copy(self.attention.q_proj.weight))
        # [b/dp1/dp2, s, 32, 64]  llama.py:63
        q = q_proj.reshape(q_proj.size(0), q_proj.size(1), 32, 64)
        # [b/dp1/dp2, s, 512]; backward all-reduce 2.1 MB, 26.6 us  llama.py:64
        k_proj = F.linear(attention_norm, dp1_dp2.copy(self.attention.k_proj.weight))
        # [b/dp1/dp2, s, 8, 64]  llama.py:64
        k = k_proj.reshape(k_proj.size(0), k_proj.size(1), 8, 64)
        # [b/dp1/dp2, s, 512]; backward all-reduce 2.1 MB, 26.6 us  llama.py:65
        v_proj = F.linear(attention_norm, dp1_dp2.copy(self.attention.v_proj.weight))
        # [b/dp1/dp2, s, 8, 64]  llama.py:65
        v = v_proj.reshape(v_proj.size(0), v_proj.size(1), 8, 64)
        cos = torch.cos(angles)  # [s, 32]  llama.py:66
        cos = cos.reshape(cos.size(0), 1, 32)  # [s, 1, 32]  llama.py:66
        cos = cos.to(torch.bfloat16)  # [s, 1, 32]  llama.py:66
        sin = torch.sin(angles)  # [s, 32]  llama.py:66
        sin = sin.reshape(sin.size(0), 1, 32)  # [s, 1, 32]  llama.py:66
        sin = sin.to(torch.bfloat16)  # [s, 1, 32]  llama.py:66
        chunk_0, chunk_1 = q.chunk(2, dim=-1)  # [b/dp1/dp2, s, 32, 32]  llama.py:66
        mul = chunk_0 * cos  # [b/dp1/dp2, s, 32, 32]  llama.py:66
        mul_2 = chunk_1 * sin  # [b/dp1/dp2, s, 32, 32]  llama.py:66
        mul = mul - mul_2  # [b/dp1/dp2, s, 32, 32]  llama.py:66
        chunk_1 = chunk_1 * cos  # [b/dp1/dp2, s, 32, 32]  llama.py:66
        chunk_0 = chunk_0 * sin  # [b/dp1/dp2, s, 32, 32]  llama.py:66
        chunk_1 = chunk_1 + chunk_0  # [b/dp1/dp2, s, 32, 32]  llama.py:66
        mul = torch.cat((mul, chunk_1), dim=-1)  # [b/dp1/dp2, s, 32, 64]  llama.py:66
        q = mul.transpose(1, 2)  # [b/dp1/dp2, 32, s, 64]  llama.py:66
        cos = torch.cos(angles)  # [s, 32]  llama.py:67
        cos = cos.reshape(cos.size(0), 1, 32)  # [s, 1, 32]  llama.py:67
        cos = cos.to(torch.bfloat16)  # [s, 1, 32]  llama.py:67
        angles = torch.sin(angles)  # [s, 32]  llama.py:67
        angles = angles.reshape(angles.size(0), 1, 32)  # [s, 1, 32]  llama.py:67
        angles = angles.to(torch.bfloat16)  # [s, 1, 32]  llama.py:67
        chunk_0, chunk_1 = k.chunk(2, dim=-1)  # [b/dp1/dp2, s, 8, 32]  llama.py:67
        mul = chunk_0 * cos  # [b/dp1/dp2, s, 8, 32]  llama.py:67
        mul_2 = chunk_1 * angles  # [b/dp1/dp2, s, 8, 32]  llama.py:67
        mul = mul - mul_2  # [b/dp1/dp2, s, 8, 32]  llama.py:67
        chunk_1 = chunk_1 * cos  # [b/dp1/dp2, s, 8, 32]  llama.py:67
        chunk_0 = chunk_0 * angles  # [b/dp1/dp2, s, 8, 32]  llama.py:67
        chunk_1 = chunk_1 + chunk_0  # [b/dp1/dp2, s, 8, 32]  llama.py:67
        mul = torch.cat((mul, chunk_1), dim=-1)  # [b/dp1/dp2, s, 8, 64]  llama.py:67
        k = mul.transpose(1, 2)  # [b/dp1/dp2, 8, s, 64]  llama.py:67
        v = v.transpose(1, 2)  # [b/dp1/dp2, 8, s, 64]  llama.py:68
        # [b/dp1/dp2, 32, s, 64]  llama.py:69
        mixed = ops.attention(q, k, v, scale=0.125, causal=True)
        mixed = mixed.transpose(1, 2)  # [b/dp1/dp2, s, 32, 64]  llama.py:70
        # [b/dp1/dp2, s, 2048]  llama.py:70
        mixed = mixed.reshape(mixed.size(0), mixed.size(1), 2048)
        # [b/dp1/dp2, s, 2048]; backward all-reduce 8.39 MB, 61.1 us  llama.py:70
        o_proj = F.linear(mixed, dp1_dp2.copy(self.attention.o_proj.weight))
        x = hidden_states + o_proj  # [b/dp1/dp2, s, 2048]  llama.py:97
        # [b/dp1/dp2, s, 2048]; backward all-reduce 4.1 kB, 9.71 us  llama.py:98
        mlp_norm = F.rms_norm(x, (2048,), dp1_dp2.copy(self.mlp_norm.weight), eps=1e-05)
        # [b/dp1/dp2, s, 5632]; backward all-reduce 23.1 MB, 132 us  llama.py:83
        gate_proj = F.linear(mlp_norm, dp1_dp2.copy(self.mlp.gate_proj.weight))
        gate_proj = F.silu(gate_proj)  # [b/dp1/dp2, s, 5632]  llama.py:83
        # [b/dp1/dp2, s, 5632]; backward all-reduce 23.1 MB, 132 us  llama.py:83
        up_proj = F.linear(mlp_norm, dp1_dp2.copy(self.mlp.up_proj.weight))
        gate_proj = gate_proj * up_proj  # [b/dp1/dp2, s, 5632]  llama.py:83
        # [b/dp1/dp2, s, 2048]; backward all-reduce 23.1 MB, 132 us  llama.py:83
        down_proj = F.linear(gate_proj, dp1_dp2.copy(self.mlp.down_proj.weight))
        x = x + down_proj  # [b/dp1/dp2, s, 2048]  llama.py:98
        return x


class ShardedModel(ShardedModule):
    """Llama as one rank of dp1=2 x dp2=2 runs it."""

    MESH = {"dp1": 2, "dp2": 2}
    PHASE = "train"
    OPTIMIZER = "adamw"
    REGATHER = False
    LAYERS = {
        "layers": [DecoderLayer] * 4,
    }
    PARAMETERS = {
        "embedding.weight": Param((32000, 2048), torch.bfloat16, "S0,S1"),  # [16000, 1024] here
        "norm.weight": Param((2048,), torch.bfloat16, "R,R"),
        "head.weight": Param((32000, 2048), torch.bfloat16, "S0,S0"),  # [8000, 2048] here
        "layers.{0..3}.attention_norm.weight": Param((2048,), torch.bfloat16, "R,R"),
        "layers.{0..3}.attention.q_proj.weight": Param((2048, 2048), torch.bfloat16, "R,R"),
        "layers.{0..3}.attention.k_proj.weight": Param((512, 2048), torch.bfloat16, "R,R"),
        "layers.{0..3}.attention.v_proj.weight": Param((512, 2048), torch.bfloat16, "R,R"),
        "layers.{0..3}.attention.o_proj.weight": Param((2048, 2048), torch.bfloat16, "R,R"),
        "layers.{0..3}.mlp_norm.weight": Param((2048,), torch.bfloat16, "R,R"),
        "layers.{0..3}.mlp.gate_proj.weight": Param((5632, 2048), torch.bfloat16, "R,R"),
        "layers.{0..3}.mlp.up_proj.weight": Param((5632, 2048), torch.bfloat16, "R,R"),
        "layers.{0..3}.mlp.down_proj.weight": Param((2048, 5632), torch.bfloat16, "R,R"),
    }
    INPUTS = {
        "tokens": Input("R,R", (8, 2048), torch.int64, free=(0, 1), step=(4, 1), high=32000),
        "labels": Input("R,R", (8, 2048), torch.int64, free=(0, 1), step=(4, 1), high=32000),
    }
    OUTPUTS = (
        Output(("loss",), "R,R", ()),
        Output(("logits",), "S2,S2", (8, 2048, 32000)),
    )

    def forward(self, tokens: Tensor, labels: Tensor) -> object:
        dp1 = self.mesh["dp1"]
        dp2 = self.mesh["dp2"]
        dp1_dp2 = self.mesh["dp1", "dp2"]
        # [s]  llama.py:127
        position_ids = torch.arange(tokens.size(1), dtype=torch.int64, device=self.device)
        # [32]  llama.py:128
        arange = torch.arange(0, 64, 2, dtype=torch.float32, device=self.device)
        arange = arange / 64  # [32]  llama.py:128
        position_ids = position_ids.to(torch.float32)  # [s]  llama.py:128
        position_ids = position_ids.reshape(position_ids.size(0), 1)  # [s, 1]  llama.py:128
        arange = -arange  # [32]  llama.py:128
        arange = 10000.0**arange  # [32]  llama.py:128
        angles = position_ids * arange  # [s, 32]  llama.py:128
        # [b, s, 2048/dp2] + dp1  llama.py:129
        x = ops.vocab_embedding(tokens, self.embedding.weight, dp1, size=32000)
        x = dp1.reduce_scatter(x, 0)  # [b/dp1, s, 2048/dp2]; 33.6 MB; backward all-gather; 172 us
        # [b/dp1/dp2, s, 2048]; 16.8 MB; backward all-to-all; 108 us
        x = dp2.all_to_all(x, gather_dim=2, shard_dim=0)
        for layer in self.layers:
            x = layer(x, angles)  # [b/dp1/dp2, s, 2048]
        # [b/dp1/dp2, s, 2048]; backward all-reduce 4.1 kB, 9.71 us  llama.py:126
        norm = F.rms_norm(x, (2048,), dp1_dp2.copy(self.norm.weight), eps=1e-05)
        norm = dp1_dp2.all_gather(norm, 0)  # [b, s, 2048]; 67.1 MB; backward reduce-scatter; 384 us
        logits = F.linear(norm, self.head.weight)  # [b, s, 32000/dp1/dp2]  llama.py:132
        to = logits.to(torch.float32)  # [b, s, 32000/dp1/dp2]  llama.py:135
        # []  llama.py:135
        loss = ops.cross_entropy(to, labels, vocab_axis=dp1_dp2, vocab_size=32000)
        return self.pack(loss, logits)


if __name__ == "__main__":
    ShardedModel.demo()

"""A mixture of experts in plain PyTorch: a causal transformer whose MLPs are 8 experts each.

    plan examples/moe.py --gpus 2 --cluster cpu

A router picks 2 of the 8 experts for each token; the layer is the sum of what they give, weighed by
the router's probabilities.  Which tokens an expert gets depends on their values, so that the
loop over experts cannot be traced; the line above `Experts` says what the loop computes.
Positions are left out: the causal mask alone tells tokens apart.

Shapes in comments: B batch, S sequence, D model width, E experts, K experts of a token, F hidden
units of an expert, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

import shardwright


@dataclass(frozen=True)
class MoEConfig:
    """Sizes of the model; the defaults make one that trains on a laptop."""

    vocab_size: int = 4096
    layers: int = 4
    width: int = 256
    heads: int = 8
    experts: int = 8
    choices: int = 2  # experts of a token
    expert_width: int = 352  # hidden units of an expert
    norm_eps: float = 1e-5


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(config.width, config.width, bias=False)
        self.v_proj = nn.Linear(config.width, config.width, bias=False)
        self.o_proj = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, width = x.shape
        q = self.q_proj(x).view(batch, seq, self.heads, -1).transpose(1, 2)  # [B, heads, S, .]
        k = self.k_proj(x).view(batch, seq, self.heads, -1).transpose(1, 2)
        v = self.v_proj(x).view(batch, seq, self.heads, -1).transpose(1, 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, seq, width))  # [B, S, D]


@shardwright.experts(up="gate_up", down="down")
class Experts(nn.Module):
    """SwiGLU experts, their weights stacked."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        e, f, d = config.experts, config.expert_width, config.width
        self.gate_up = nn.Parameter(torch.empty(e, 2 * f, d))
        self.down = nn.Parameter(torch.empty(e, d, f))

    def forward(self, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """x [B, S, D]; indices and weights [B, S, K]."""
        out = torch.zeros_like(x)
        for expert in range(len(self.gate_up)):
            batch, seq, choice = torch.where(indices == expert)
            gate, up = F.linear(x[batch, seq], self.gate_up[expert]).chunk(2, dim=-1)
            own = F.linear(F.silu(gate) * up, self.down[expert])  # [tokens of this expert, D]
            own = own * weights[batch, seq, choice, None]
            out = out.index_put((batch, seq), own, accumulate=True)
        return out


class MoE(nn.Module):
    """A router and its experts."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.choices = config.choices
        self.router = nn.Linear(config.width, config.experts, bias=False)
        self.experts = Experts(config)

    def forward(self, x: Tensor) -> Tensor:
        scores = F.softmax(self.router(x), dim=-1)  # [B, S, E]
        weights, indices = torch.topk(scores, self.choices, dim=-1)  # [B, S, K]
        return self.experts(x, indices, weights / weights.sum(dim=-1, keepdim=True))


class DecoderLayer(nn.Module):
    """Attention, then experts, each behind an RMSNorm and added to the residual stream."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.moe_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.moe = MoE(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.moe(self.moe_norm(x))


class MoETransformer(nn.Module):
    """Tokens to next-token logits, and to the loss where labels are given."""

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.apply(_init_weights)

    def forward(self, tokens: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """`tokens` and `labels` are [B, S]; label -100 marks a position that has no target."""
        x = self.embedding(tokens)  # [B, S, D]
        for layer in self.layers:
            x = layer(x)
        logits = self.head(self.norm(x))  # [B, S, V]
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        return {"loss": loss, "logits": logits}


def _init_weights(module: nn.Module) -> None:
    """N(0, 0.02) weights, so that a new model's loss is about ln(vocab_size)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    elif isinstance(module, Experts):
        nn.init.normal_(module.gate_up, std=0.02)
        nn.init.normal_(module.down, std=0.02)


def build_model() -> nn.Module:
    """The default small mixture."""
    return MoETransformer(MoEConfig())


def example_inputs(batch: int, seq: int) -> dict[str, Tensor]:
    """Random tokens; the label of a position is the token after it."""
    tokens = torch.randint(0, MoEConfig().vocab_size, (batch, seq))
    labels = torch.roll(tokens, -1, dims=1)
    labels[:, -1] = -100  # nothing comes after the last token
    return {"tokens": tokens, "labels": labels}

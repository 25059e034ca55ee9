"""A Llama in plain PyTorch: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

    plan examples/llama.py --gpus 2 --cluster cpu                    the small default below
    plan examples/llama.py:build_llama3_8b --gpus 64 --seq 8192      Llama 3 8B
    plan examples/llama.py:build_llama3_70b --gpus 256 --seq 8192    Llama 3 70B

Shapes in comments: B batch, S sequence, D model width, H query heads, G key/value heads, K head
width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama; the defaults make a model that trains on a laptop."""

    vocab_size: int = 4096
    layers: int = 4
    width: int = 256
    heads: int = 8
    kv_heads: int = 4  # each serves heads / kv_heads query heads
    mlp_width: int = 704
    rope_theta: float = 10_000.0  # the slowest rotary wavelength is about 2 pi times this
    norm_eps: float = 1e-5


def rotary_angles(positions: Tensor, head_width: int, theta: float) -> Tensor:
    """The angle of each of `positions` [..., S] and frequency, [..., S, K / 2]."""
    device = positions.device
    exponents = torch.arange(0, head_width, 2, device=device, dtype=torch.float32) / head_width
    return positions.float()[..., None] * theta**-exponents


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turn each pair (x[i], x[i + K / 2]) of `x` [B, S, heads, K] by its position's angle."""
    cos = angles.cos()[..., None, :].to(x.dtype)  # [..., S, 1, K / 2]
    sin = angles.sin()[..., None, :].to(x.dtype)
    first, second = x.chunk(2, dim=-1)  # 2 x [B, S, heads, K / 2]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class Attention(nn.Module):
    """Causal self-attention where a group of query heads shares one key/value head."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.head_width = config.width // config.heads
        self.q_proj = nn.Linear(config.width, config.heads * self.head_width, bias=False)
        self.k_proj = nn.Linear(config.width, config.kv_heads * self.head_width, bias=False)
        self.v_proj = nn.Linear(config.width, config.kv_heads * self.head_width, bias=False)
        self.o_proj = nn.Linear(config.heads * self.head_width, config.width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        batch, seq, _ = x.shape
        q = self.q_proj(x).view(batch, seq, -1, self.head_width)  # [B, S, H, K]
        k = self.k_proj(x).view(batch, seq, -1, self.head_width)  # [B, S, G, K]
        v = self.v_proj(x).view(batch, seq, -1, self.head_width)  # [B, S, G, K]
        q = rotate(q, angles).transpose(1, 2)  # [B, H, S, K]
        k = rotate(k, angles).transpose(1, 2)  # [B, G, S, K]
        v = v.transpose(1, 2)  # [B, G, S, K]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(mixed.transpose(1, 2).reshape(batch, seq, -1))  # [B, S, D]


class MLP(nn.Module):
    """SwiGLU: a gate decides how much of each hidden unit passes."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.up_proj = nn.Linear(config.width, config.mlp_width, bias=False)
        self.down_proj = nn.Linear(config.mlp_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nn.Module):
    """Attention, then MLP, each behind an RMSNorm and added to the residual stream."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.attention = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles)
        return x + self.mlp(self.mlp_norm(x))


class Llama(nn.Module):
    """Tokens to next-token logits, and to the loss where labels are given."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        if config.width % config.heads or config.heads % config.kv_heads:
            raise ValueError(
                f"width {config.width} must be a multiple of heads {config.heads}, "
                f"and heads a multiple of kv_heads {config.kv_heads}"
            )
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.width)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, eps=config.norm_eps)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.apply(_init_weights)

    def forward(
        self, tokens: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """All are [B, S]; label -100 marks a position that has no target.

        Without `position_ids` sequences begin at 0; serving tells where new tokens stand.
        """
        config = self.config
        if position_ids is None:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device)  # [S]
        angles = rotary_angles(position_ids, config.width // config.heads, config.rope_theta)
        x = self.embedding(tokens)  # [B, S, D]
        for layer in self.layers:
            x = layer(x, angles)
        logits = self.head(self.norm(x))  # [B, S, V]
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        return {"loss": loss, "logits": logits}


def _init_weights(module: nn.Module) -> None:
    """N(0, 0.02) weights, so that a new model's loss is about ln(vocab_size)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)


def build_model() -> nn.Module:
    """The default small Llama."""
    return Llama(LlamaConfig())


def build_llama3_8b() -> nn.Module:
    """Llama 3 8B."""
    return Llama(_llama3(layers=32, width=4096, heads=32, mlp_width=14336))


def build_llama3_70b() -> nn.Module:
    """Llama 3 70B."""
    return Llama(_llama3(layers=80, width=8192, heads=64, mlp_width=28672))


def build_llama3_405b() -> nn.Module:
    """Llama 3.1 405B."""
    return Llama(_llama3(layers=126, width=16384, heads=128, mlp_width=53248))


def _llama3(*, layers: int, width: int, heads: int, mlp_width: int) -> LlamaConfig:
    """What all Llama 3 models share (arXiv:2407.21783, table 3)."""
    return LlamaConfig(
        vocab_size=128_256,
        layers=layers,
        width=width,
        heads=heads,
        kv_heads=8,
        mlp_width=mlp_width,
        rope_theta=500_000.0,
    )


def example_inputs(batch: int, seq: int) -> dict[str, Tensor]:
    """Random tokens, valid for every model above; the label of a position is the token after it."""
    tokens = torch.randint(0, LlamaConfig().vocab_size, (batch, seq))
    labels = torch.roll(tokens, -1, dims=1)
    labels[:, -1] = -100  # nothing comes after the last token
    return {"tokens": tokens, "labels": labels}

"""A GPT in plain PyTorch: learned positions, LayerNorm, fused q/k/v, GELU, tied embeddings.

    plan examples/gpt.py --gpus 8                      the small default below
    plan examples/gpt.py:build_gpt2_xl --gpus 8        GPT-2 XL, 1.5B parameters

Shapes in comments: B batch, S sequence, D model width, H heads, K head width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

VOCAB_SIZE = 50257  # the GPT-2 tokenizer; 50257 = 29 * 1733, so no usual mesh divides it


@dataclass(frozen=True)
class GPTConfig:
    """Sizes of a GPT; the defaults make a model that trains on a laptop."""

    vocab_size: int = VOCAB_SIZE
    max_seq: int = 1024  # learned positions, so this is the longest sequence
    layers: int = 4
    heads: int = 4
    width: int = 256
    dropout: float = 0.0  # of embeddings, attention weights and both branches of a block


class SelfAttention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, seq, width = x.shape
        q, k, v = self.qkv(x).split(width, dim=2)  # 3 x [B, S, D]
        q = q.view(batch, seq, self.heads, -1).transpose(1, 2)  # [B, H, S, K]
        k = k.view(batch, seq, self.heads, -1).transpose(1, 2)  # [B, H, S, K]
        v = v.view(batch, seq, self.heads, -1).transpose(1, 2)  # [B, H, S, K]
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
        mixed = mixed.transpose(1, 2).reshape(batch, seq, width)  # [B, S, D]
        return self.out(mixed)


class MLP(nn.Module):
    """Two linear layers around a GELU, four times as wide inside."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Block(nn.Module):
    """Attention, then MLP, each behind a LayerNorm and added to the residual stream."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = SelfAttention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x)))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class GPT(nn.Module):
    """Tokens to next-token logits, and to the loss where labels are given."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.max_seq, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.apply(_init_weights)
        self.head.weight = self.token_embedding.weight  # tied: one matrix reads and writes tokens

    def forward(
        self, tokens: Tensor, labels: Tensor | None = None, position_ids: Tensor | None = None
    ) -> dict[str, Tensor]:
        """All are [B, S]; label -100 marks a position that has no target.

        Without `position_ids` sequences begin at 0; serving tells where new tokens stand.
        """
        if position_ids is None:
            position_ids = torch.arange(tokens.shape[1], device=tokens.device)  # [S]
        x = self.token_embedding(tokens) + self.position_embedding(position_ids)  # [B, S, D]
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))  # [B, S, V]
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        return {"loss": loss, "logits": logits}


def _init_weights(module: nn.Module) -> None:
    """N(0, 0.02) weights and zero biases, so that a new model's loss is about ln(vocab_size)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def build_model() -> nn.Module:
    """The default small GPT."""
    return GPT(GPTConfig())


def build_gpt2() -> nn.Module:
    """GPT-2, 124M parameters, with its dropout."""
    return GPT(GPTConfig(layers=12, heads=12, width=768, dropout=0.1))


def build_gpt2_xl() -> nn.Module:
    """GPT-2 XL, 1.5B parameters, with its dropout."""
    return GPT(GPTConfig(layers=48, heads=25, width=1600, dropout=0.1))


def example_inputs(batch: int, seq: int) -> dict[str, Tensor]:
    """Random tokens; the label of a position is the token after it."""
    tokens = torch.randint(0, VOCAB_SIZE, (batch, seq))
    labels = torch.roll(tokens, -1, dims=1)
    labels[:, -1] = -100  # nothing comes after the last token
    return {"tokens": tokens, "labels": labels}

"""An encoder-decoder in plain PyTorch, in the manner of BART and T5.

    plan examples/encoder_decoder.py --gpus 4
    plan examples/encoder_decoder.py:build_large --gpus 8

Shapes in comments: B batch, S source length, T target length, D model width, H heads, K head width,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Seq2SeqConfig:
    """Sizes of an encoder-decoder; the defaults make a model that trains on a laptop."""

    vocab_size: int = 8192
    max_seq: int = 1024  # longest source and longest target
    encoder_layers: int = 3
    decoder_layers: int = 3
    width: int = 256
    heads: int = 8
    mlp_width: int = 1024
    dropout: float = 0.0


class Attention(nn.Module):
    """Multi-head attention of `x` over `context`; with `context = x` it is self-attention."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.q_proj = nn.Linear(config.width, config.width)
        self.k_proj = nn.Linear(config.width, config.width)
        self.v_proj = nn.Linear(config.width, config.width)
        self.out_proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, context: Tensor, *, causal: bool = False) -> Tensor:
        q = self._split_heads(self.q_proj(x))  # [B, H, T, K]
        k = self._split_heads(self.k_proj(context))  # [B, H, S, K]
        v = self._split_heads(self.v_proj(context))  # [B, H, S, K]
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal)  # [B, H, T, K]
        return self.out_proj(mixed.transpose(1, 2).flatten(2))  # [B, T, D]

    def _split_heads(self, x: Tensor) -> Tensor:
        batch, seq, width = x.shape
        return x.view(batch, seq, self.heads, width // self.heads).transpose(1, 2)


class MLP(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.width, config.mlp_width)
        self.down = nn.Linear(config.mlp_width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x)))


class EncoderLayer(nn.Module):
    """Attention over the whole source, then MLP."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(config.width)
        self.attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        h = self.attention_norm(x)
        x = x + self.dropout(self.attention(h, h))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class DecoderLayer(nn.Module):
    """Causal attention over the target so far, attention over the source, then MLP."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(config.width)
        self.self_attention = Attention(config)
        self.cross_norm = nn.LayerNorm(config.width)
        self.cross_attention = Attention(config)
        self.mlp_norm = nn.LayerNorm(config.width)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        h = self.self_norm(x)
        x = x + self.dropout(self.self_attention(h, h, causal=True))
        x = x + self.dropout(self.cross_attention(self.cross_norm(x), memory))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


class EncoderDecoder(nn.Module):
    """Source and target tokens to logits of the next target token, and to the loss with labels."""

    def __init__(self, config: Seq2SeqConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, config.width)  # of source and target
        self.source_positions = nn.Embedding(config.max_seq, config.width)
        self.target_positions = nn.Embedding(config.max_seq, config.width)
        self.dropout = nn.Dropout(config.dropout)
        self.encoder = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.encoder_norm = nn.LayerNorm(config.width)
        self.decoder = nn.ModuleList(DecoderLayer(config) for _ in range(config.decoder_layers))
        self.decoder_norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocab_size, bias=False)
        self.apply(_init_weights)
        self.head.weight = self.embedding.weight  # tied

    def forward(
        self, source: Tensor, target: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """`source` is [B, S], `target` and `labels` are [B, T]; label -100 marks no target."""
        memory = self._embed(source, self.source_positions)  # [B, S, D]
        for layer in self.encoder:
            memory = layer(memory)
        memory = self.encoder_norm(memory)

        x = self._embed(target, self.target_positions)  # [B, T, D]
        for layer in self.decoder:
            x = layer(x, memory)
        logits = self.head(self.decoder_norm(x))  # [B, T, V]
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        return {"loss": loss, "logits": logits}

    def _embed(self, tokens: Tensor, positions: nn.Embedding) -> Tensor:
        index = torch.arange(tokens.shape[1], device=tokens.device)
        return self.dropout(self.embedding(tokens) + positions(index))


def _init_weights(module: nn.Module) -> None:
    """N(0, 0.02) weights and zero biases, so that a new model's loss is about ln(vocab_size)."""
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def build_model() -> nn.Module:
    """The default small encoder-decoder."""
    return EncoderDecoder(Seq2SeqConfig())


def build_large() -> nn.Module:
    """The sizes of BART large (arXiv:1910.13461): 0.4B parameters."""
    return EncoderDecoder(
        Seq2SeqConfig(
            vocab_size=50265,
            encoder_layers=12,
            decoder_layers=12,
            width=1024,
            heads=16,
            mlp_width=4096,
            dropout=0.1,
        )
    )


def example_inputs(batch: int, seq: int) -> dict[str, Tensor]:
    """Random source and target, `seq` tokens each; a label is the target token that follows."""
    vocab_size = Seq2SeqConfig().vocab_size
    source = torch.randint(0, vocab_size, (batch, seq))
    target = torch.randint(0, vocab_size, (batch, seq))
    labels = torch.roll(target, -1, dims=1)
    labels[:, -1] = -100  # nothing comes after the last token
    return {"source": source, "target": target, "labels": labels}

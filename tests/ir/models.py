"""Small models that the capture tests share: plain PyTorch, and Hugging Face configs."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

VOCABULARY = 64


class Attention(nn.Module):
    """Causal self-attention with `kv_heads` key and value heads, in one of several spellings."""

    def __init__(self, width: int, heads: int, kv_heads: int, spelling: str) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.spelling = heads, kv_heads, spelling
        self.size = width // heads
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * kv_heads * self.size, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        k, v = self.kv(x).chunk(2, dim=-1)
        q = self.q(x).view(b, s, self.heads, self.size).transpose(1, 2)
        k = k.view(b, s, self.kv_heads, self.size)
        v = v.view(b, s, self.kv_heads, self.size)
        groups = self.heads // self.kv_heads
        if self.spelling == "interleave":
            k = k.repeat_interleave(groups, dim=2).transpose(1, 2)
            v = v.repeat_interleave(groups, dim=2).transpose(1, 2)
        else:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
        if self.spelling == "expand":
            k = k[:, :, None].expand(b, self.kv_heads, groups, s, self.size)
            v = v[:, :, None].expand(b, self.kv_heads, groups, s, self.size)
            k = k.reshape(b, self.heads, s, self.size)
            v = v.reshape(b, self.heads, s, self.size)
        if self.spelling == "mask":
            mask = torch.ones(s, s, dtype=torch.bool, device=x.device).tril()
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        else:
            gqa = self.spelling == "gqa"
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=gqa)
        return self.out(y.transpose(1, 2).contiguous().view(b, s, -1))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, width: int, spelling: str) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, 4, 2, spelling)
        self.norm2 = nn.RMSNorm(width)
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        hidden = F.gelu(self.up(self.norm2(x)))
        return x + self.dropout(self.down(hidden))


class TinyGPT(nn.Module):
    """Tied embeddings, learned positions, `layers` equal blocks."""

    def __init__(self, layers: int = 3, width: int = 32, spelling: str = "gqa") -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(32, width)
        self.blocks = nn.ModuleList(Block(width, spelling) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor, labels: Tensor | None = None) -> dict[str, Tensor | None]:
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), labels.view(-1))
        return {"loss": loss, "logits": logits}


class FlatTokens(nn.Module):
    """Works on (b * s, h) between embedding and result."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 16)
        self.weight = nn.Parameter(torch.randn(16, 24) / 4)
        self.bias = nn.Parameter(torch.zeros(24))
        self.norm = nn.LayerNorm(24)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        flat = x.view(-1, 16)
        hidden = torch.addmm(self.bias, flat, self.weight)
        hidden = self.norm(F.gelu(hidden)) * math.sqrt(2)
        left, right = hidden.chunk(2, dim=1)
        mixed = torch.softmax(left, dim=-1) * right
        return mixed.view(*ids.shape, 12)


def batch(b: int = 2, s: int = 12, *names: str) -> dict[str, Tensor]:
    """Random token ids under each name."""
    generator = torch.Generator().manual_seed(0)
    return {n: torch.randint(3, VOCABULARY, (b, s), generator=generator) for n in names}


def huggingface_configs() -> dict[str, Any]:
    """Tiny configs of many families, without dropout; sequence windows are 5."""
    import transformers as t

    special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    gpt = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64}
    base = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        **special,
    }
    grouped = base | {"num_key_value_heads": 2}
    gemma = grouped | {"head_dim": 8, "sliding_window": 5, "query_pre_attn_scalar": 8}
    layers = ["sliding_attention", "sliding_attention", "full_attention"] * 2
    qwen = {"head_dim": 8, "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}
    no_dropout = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    bert = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    t5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 3, "num_heads": 4}
    opt = {"ffn_dim": 64, "dropout": 0.0, "word_embed_proj_dim": 32}
    return {
        "gpt2": t.GPT2Config(**gpt, **special, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
        "llama": t.LlamaConfig(**grouped),
        "qwen3": t.Qwen3Config(**grouped, **qwen),
        "mistral": t.MistralConfig(**grouped, sliding_window=5),
        "phi3": t.Phi3Config(**grouped, resid_pdrop=0.0, embd_pdrop=0.0),
        "gemma2": t.Gemma2Config(**gemma),
        "gemma3": t.Gemma3TextConfig(**gemma | {"num_hidden_layers": 6}, layer_types=layers),
        "olmo2": t.Olmo2Config(**grouped),
        "gpt_neox": t.GPTNeoXConfig(**base, **no_dropout),
        "opt": t.OPTConfig(**base, **opt),
        "bert": t.BertConfig(**base, **bert),
        "t5": t.T5Config(**t5, vocab_size=VOCABULARY, dropout_rate=0.0, decoder_start_token_id=0),
    }


def huggingface_model(name: str, config: Any, device: str = "cpu") -> nn.Module:
    """The model of a config in float64, with eager attention: the reference."""
    import transformers as t

    special = {"bert": t.AutoModelForMaskedLM, "t5": t.AutoModelForSeq2SeqLM}
    cls = special.get(name, t.AutoModelForCausalLM)
    torch.manual_seed(0)
    with torch.device(device):
        model = cls.from_config(config, dtype=torch.float64, attn_implementation="eager")
    model.config.use_cache = False
    return model

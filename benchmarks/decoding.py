"""Host time of a decode step beside that of transformers' `generate`, on one core.

    python -m benchmarks.decoding [--layers 8] [--tokens 64] [--rounds 5]

The model is so small that a step is nearly all Python and launches.  Both sides have the same
weights and prompts and choose the likeliest token; they take turns, and each row compares their
fastest rounds: (seconds of many tokens - seconds of 8) / (tokens - 8) / layers.  Prompts of
different lengths are padded on the left for transformers.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import shardwright

_FEW = 8  # tokens whose time, with that of the prompt, is taken off
_PROMPT = 32
_LENGTHS = {  # of the prompts of a batch
    "1 sequence": [32],
    "4 of one length": [32] * 4,
    "4 of different lengths": [32, 20, 9, 14],
}


def main() -> None:
    """Print one row per batch."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(1)
    original = tiny_llama(args.layers)
    model = served(original)
    print(f"{'ms a layer and step':24} {'ours':>8} {'theirs':>8} {'ratio':>6}  tokens")
    for name, lengths in _LENGTHS.items():
        ours, theirs, same = compare(model, original, lengths, args.tokens, args.rounds)
        each = 1e3 / (args.tokens - _FEW) / args.layers
        row = f"{name:24} {ours * each:8.3f} {theirs * each:8.3f} {ours / theirs:6.2f}"
        print(f"{row}  {'the same' if same else 'DIFFERENT'}")


def tiny_llama(layers: int) -> Any:
    """A Llama 64 wide."""
    config = transformers.LlamaConfig(
        vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def served(original: Any) -> Any:
    """The generated module for one rank, with the same weights."""
    ids = torch.zeros(4, _PROMPT, dtype=torch.int64)
    inputs = {"input_ids": ids, "position_ids": ids}
    plan = shardwright.plan(
        original, inputs, gpus=1, cluster="cpu", phase="serve", output_tokens=64
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "served_llama.py"
        plan.write_module(str(path))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = module
        spec.loader.exec_module(module)
    return module.ShardedModel.from_state_dict(original.state_dict()).eval()


def compare(
    model: Any, original: Any, lengths: list[int], tokens: int, rounds: int
) -> tuple[float, float, bool]:
    """(our seconds, theirs, whether both say the same) for all steps after the first few."""
    ids = torch.randint(3, 512, (len(lengths), _PROMPT))
    mask = (torch.arange(_PROMPT) < torch.tensor(lengths)[:, None]).long()
    left = ids.clone()
    for row, length in enumerate(lengths):
        left[row, _PROMPT - length :] = ids[row, :length]

    def ours(count: int) -> Tensor:
        return model.generate(ids, count, lengths=lengths)

    def theirs(count: int) -> Tensor:
        return original.generate(
            left, attention_mask=mask.flip(1), max_new_tokens=count, min_new_tokens=count,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip

    best = [float("inf")] * 2
    for _ in range(rounds):
        for side, generate in enumerate((ours, theirs)):
            seconds = timed(generate, tokens) - timed(generate, _FEW)
            best[side] = min(best[side], seconds)
    same = torch.equal(ours(tokens)[:, _PROMPT:], theirs(tokens)[:, _PROMPT:])
    return best[0], best[1], same


def timed(generate: Callable[[int], Tensor], count: int) -> float:
    """Seconds for so many tokens."""
    begin = time.process_time()
    with torch.no_grad():
        generate(count)
    return time.process_time() - begin


if __name__ == "__main__":
    main()

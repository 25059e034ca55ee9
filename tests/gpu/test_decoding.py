"""Decode steps captured as CUDA graphs.  Without a GPU all of this is skipped."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.runtime.test_decoding import padded
from tests.runtime.test_generate import PROMPTS, plain_generate, toy, weights

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

SAMPLED = {"do_sample": True, "seed": 5, "temperature": 1.5, "top_k": 9, "top_p": 0.9}


def model_on_cuda(window: int = 0) -> Any:
    made: Any = toy({}, "local", window)
    return made.from_state_dict(weights(), device="cuda")


def graphs(model: Any) -> int:
    """How many steps were captured."""
    return len(model.serving._graphs._graphs)


@pytest.mark.parametrize("window", [0, 5])
def test_captured_steps_choose_as_the_definition_says(window: int) -> None:
    model, (ids, lengths) = model_on_cuda(window), padded()
    want = plain_generate(PROMPTS, 40, window=window)
    for stops in ((), (want[0][30], want[1][25])):
        for capture in (True, False):
            out = model.generate(ids, 40, lengths=lengths, capture=capture, eos_token_id=stops)
            ended = plain_generate(PROMPTS, 40, stops, window=window)
            assert out[:, ids.shape[1] :].tolist() == ended
            assert bool(graphs(model)) == capture


def test_captured_steps_draw_as_others_do() -> None:
    model, (ids, lengths) = model_on_cuda(), padded()
    out: list[Tensor] = []
    for capture in (False, True, True):
        out.append(model.generate(ids, 40, lengths=lengths, capture=capture, **SAMPLED))
    assert torch.equal(out[0], out[1]) and torch.equal(out[1], out[2])
    assert not torch.equal(out[0], model.generate(ids, 40, lengths=lengths))


def test_sequences_join_and_leave_captured_steps() -> None:
    model = model_on_cuda()
    model.new_cache(4, 60, capture=True)
    rows, logits = model.admit(torch.tensor([PROMPTS[0], PROMPTS[0]]))
    tokens = torch.zeros(4, dtype=torch.int64, device="cuda")
    tokens[rows] = logits.argmax(1)
    out = {row: [int(tokens[row])] for row in rows}
    for number in range(24):
        if number == 9:
            model.free(1)
        if number in (5, 12):
            (row,), logits = model.admit(torch.tensor([PROMPTS[1]]))
            tokens[row] = logits.argmax()
            out[row] = [int(tokens[row])]
        tokens = model.decode(tokens).argmax(1)
        for row, found in out.items():
            found.append(int(tokens[row]))
    want = plain_generate(PROMPTS[:2], 30)
    assert out == {0: want[0][:25], 1: want[1][:13], 2: want[1][:20]}
    assert graphs(model) >= 2


def test_a_part_that_asks_the_host_is_named() -> None:
    model = model_on_cuda()
    ids, plain = torch.tensor([PROMPTS[0]]), model.logits
    want = model.generate(ids, 20, capture=False)
    model.asking = torch.nn.Identity()

    def asks(*given: Any) -> Tensor:
        return plain(*given) + 0 * float(model.asking(torch.ones(1, device="cuda")))

    model.logits = asks
    said = r"`asking` \(Identity\) does what a graph can't hold"
    with pytest.warns(UserWarning, match=said):
        out = model.generate(ids, 20)
    assert torch.equal(out, want)
    with pytest.raises(RuntimeError, match=said):
        model.generate(ids, 20, capture=True)
    model.logits = plain
    assert torch.equal(model.generate(ids, 20, capture=True), want) and graphs(model)

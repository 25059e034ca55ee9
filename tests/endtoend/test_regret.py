"""The benchmark of choices: what it computes by hand, and on a slow cable between two hosts."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import regret
from benchmarks.hosts import NoHostsError, two_hosts
from benchmarks.regret import Candidate, Found, spearman


def candidates(*predicted: float) -> list[Candidate]:
    return [Candidate(f"layout {n}", "", seconds) for n, seconds in enumerate(predicted)]


@pytest.mark.parametrize(
    "a, b, want",
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3], [10, 30, 20], 0.5),  # 1 - 6 (0 + 1 + 1) / (3 (9 - 1))
        ([1, 1, 2, 2], [1, 2, 3, 4], 0.894427191),  # ranks 1.5, 1.5, 3.5, 3.5
    ],
)
def test_spearman(a: list[float], b: list[float], want: float) -> None:
    assert spearman(a, b) == pytest.approx(want)


def test_regret_is_of_the_first_against_the_best() -> None:
    rounds = [[0.12, 0.2, 0.12, 0.2], [0.1, 0.3, 0.1, 0.3], [0.5, 0.1, 0.5, 0.1]]
    found = Found(candidates(0.1, 0.2, 0.3), rounds)
    # the quartile of four lies between the second and the first, three quarters of the way
    assert found.measured == pytest.approx([0.12, 0.1, 0.1])
    assert found.medians == pytest.approx([0.16, 0.2, 0.3])
    assert found.regret == pytest.approx(0.2)
    # of even rounds 1 is best, and takes 0.3 in odd ones; of those 2 is, and takes 0.5 in even ones
    assert found.fair_regret == pytest.approx((0.2 / 0.3 + 0.12 / 0.5) / 2 - 1)
    assert found.repeated == pytest.approx(spearman([0.12, 0.1, 0.5], [0.2, 0.3, 0.1]))
    assert "regret of the chosen plan 20.0% (" in str(found)
    assert [line.split()[1] for line in str(found).splitlines()[1:4]] == ["1", "2", "0"]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_slow_cable_is_priced_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What takes twice as long as another is not predicted to take less."""
    layouts = ("ddp=4", "fsdp=4", "tp=4", "ddp=2,tp=2", "tp=2,ddp=2", "ddp=2,cp=2")
    monkeypatch.setattr(regret, "LAYOUTS", layouts)
    try:
        with two_hosts(50) as hosts:
            found, _ = regret.regret(tmp_path, hosts, rounds=3, mixtures=2)
    except NoHostsError as error:
        pytest.skip(str(error))
    print(found)
    pairs = list(zip(found.candidates, found.measured, strict=True))
    apart = [(a, b) for a, x in pairs for b, y in pairs if y > 2 * x]
    assert apart, f"all tie:\n{found}"
    for a, b in apart:
        assert a.predicted < b.predicted, f"{a.name} is faster than {b.name}:\n{found}"

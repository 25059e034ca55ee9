"""Memory at the peak of one rank of eight, in all layouts and phases, within 5 % of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.rehearsals import CASES, Case, rehearsed


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_peak_memory_is_as_predicted(case: Case, tmp_path: Path) -> None:
    for phase in rehearsed(case, tmp_path).phases:
        assert phase.finite
        assert phase.predicted_bytes == pytest.approx(phase.measured_bytes, rel=0.05)

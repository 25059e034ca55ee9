"""Pipelines played through: bubbles by formulas, memory in flight, messages."""

import pytest

from shardwright.costmodel.timeline import (
    StageTimes,
    drawn,
    in_flight,
    peak_in_flight,
    played,
)
from shardwright.facts.schedules import schedule

# Seconds of a rank's forward, backward and its weight part; exact in binary
F, B, W = 1.0, 2.5, 0.75


def _bubble(name: str, ranks: int, count: int, per_rank: int = 1) -> list[float]:
    stage = StageTimes(F / per_rank, B / per_rank, W / per_rank)
    timeline = played(schedule(name, ranks, per_rank, count), [stage] * (ranks * per_rank))
    assert timeline.seconds == max(map(timeline.ends, range(ranks)))
    return [timeline.bubble(rank) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_one_stage_a_rank_waits_for_all_others_once(name: str, ranks: int) -> None:
    """(P - 1) (F + B), 2006.09503; also with fewer micro-batches than stages."""
    for count in (1, ranks, 3 * ranks):
        assert _bubble(name, ranks, count) == [(ranks - 1) * (F + B)] * ranks


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("per_rank", [2, 4])
def test_interleaved_stages_wait_for_a_share(ranks: int, per_rank: int) -> None:
    """(P - 1) (F + B) / v, 2104.04473."""
    found = _bubble("interleaved", ranks, 2 * ranks, per_rank)
    assert found == [(ranks - 1) * (F + B) / per_rank] * ranks


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_weight_parts_fill_the_end(ranks: int) -> None:
    """(P - 1) (F + B - 2 W), 2401.10241; B the whole backward."""
    assert max(_bubble("zb-h1", ranks, 3 * ranks)) == (ranks - 1) * (F + B - 2 * W)


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_v_of_equal_parts_has_no_bubble_but_its_ends(ranks: int) -> None:
    """Where F = I = W a rank of ZBV waits for the first forward to come, and no more."""
    stage = StageTimes(1.0, 2.0, 1.0)
    timeline = played(schedule("zbv", ranks, 2, 2 * ranks), [stage] * (2 * ranks))
    assert max(map(timeline.bubble, range(ranks))) == ranks - 1


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_dualpipev_waits_no_longer_than_its_formula(ranks: int) -> None:
    """(P - 1) (F&B + B - 3 W) of GPU.md's source, the repository, with F&B = F + B here: of what a
    rank runs of one micro-batch in one stage."""
    stage = StageTimes(F, B, W)
    timeline = played(schedule("dualpipev", ranks, 2, 4 * ranks), [stage] * (2 * ranks))
    assert max(map(timeline.bubble, range(ranks))) <= (ranks - 1) * (F + B + B - 3 * W)


def test_messages_come_later_and_queue_behind_one_another() -> None:
    """Two stages, two micro-batches: the second forward is made at 2 and its message comes at 11,
    behind the first, which came at 6."""
    made = schedule("gpipe", 2, 1, 2)
    timeline = played(made, [StageTimes(1.0, 1.0, send_s=5.0), StageTimes(1.0, 1.0)])
    assert [(str(s.action), s.start) for s in timeline.spans[1]][:2] == [
        ("1F0", 6.0),
        ("1F1", 11.0),
    ]
    assert timeline.seconds == 15.0  # 1F1 to 12, 1B0 to 13, 1B1 to 14, 0B1 to 15


def test_early_ranks_of_1f1b_hold_more_in_flight() -> None:
    assert in_flight(schedule("1f1b", 4, 1, 8)) == (4, 3, 2, 1)
    assert in_flight(schedule("1f1b", 4, 1, 2)) == (2, 2, 2, 1)
    assert in_flight(schedule("gpipe", 4, 1, 8)) == (8, 8, 8, 8)
    assert in_flight(schedule("zb-h1", 4, 1, 8)) == (4, 4, 4, 4)  # until weight parts have run


def test_a_rank_holds_what_its_stages_hold_together() -> None:
    made = schedule("interleaved", 2, 2, 4)
    # rank 0: 0F0 0F1 2F0 2F1 0F2 | 2B0 ...: three of stage 0 and two of stage 2
    assert [str(a) for a in made.actions[0]][:6] == ["0F0", "0F1", "2F0", "2F1", "0F2", "2B0"]
    assert peak_in_flight(made, 0, [1.0, 0.0, 10.0, 0.0]) == 23.0


def test_a_picture_has_a_line_for_each_rank() -> None:
    timeline = played(schedule("1f1b", 2, 1, 2), [StageTimes(1.0, 1.0)] * 2)
    assert drawn(timeline, 18) == ("F0-F1-...B0=...B1=", "...F0-B0=F1-B1=...")

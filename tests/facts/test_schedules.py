"""Schedules of pipelines: by hand, by their rules, and beside those of torch."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed.pipelining.schedules as theirs

from shardwright.facts.schedules import (
    SCHEDULES,
    Action,
    PipelineSchedule,
    default_stages,
    refusal,
    schedule,
)

_SIZES = [(ranks, count) for ranks in (1, 2, 3, 4, 6) for count in (1, 2, 3, 4, 5, 8, 12, 13)]


def _lists(made: PipelineSchedule) -> list[str]:
    return [" ".join(f"{a.kind}{a.batch}" for a in each) for each in made.actions]


def test_one_forward_one_backward_is_that_of_its_picture() -> None:
    assert _lists(schedule("1f1b", 3, 1, 4)) == [
        "F0 F1 F2 B0 F3 B1 B2 B3",
        "F0 F1 B0 F2 B1 F3 B2 B3",
        "F0 B0 F1 B1 F2 B2 F3 B3",
    ]


def test_gpipe_runs_all_forwards_first() -> None:
    assert _lists(schedule("gpipe", 2, 1, 3)) == ["F0 F1 F2 B0 B1 B2"] * 2


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_action_is_there_once_and_no_rank_waits_for_ever(name: str) -> None:
    made = 0
    for ranks, count in _SIZES:
        for per_rank in (1, 2, 3):
            if not refusal(name, ranks, per_rank, count):
                schedule(name, ranks, per_rank, count).check()  # `schedule` has done so
                made += 1
    assert made > 10


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("interleaved", theirs.ScheduleInterleaved1F1B),
        ("zb-h1", theirs.ScheduleInterleavedZeroBubble),
        ("zbv", theirs.ScheduleZBVZeroBubble),
        ("dualpipev", theirs.ScheduleDualPipeV),
    ],
)
def test_tables_are_those_of_torch(name: str, kind: Any) -> None:
    per_rank = default_stages(name)
    for ranks, count in _SIZES:
        if refusal(name, ranks, per_rank, count):
            continue
        made = schedule(name, ranks, per_rank, count)
        ours = [list(map(str, each)) for each in made.actions]
        assert ours == _table_of_torch(kind, ranks, per_rank, count), (ranks, count)


def _table_of_torch(kind: Any, ranks: int, per_rank: int, count: int) -> list[list[str]]:
    """What torch's schedule says, without the waits that it writes down."""
    logging.getLogger("torch.distributed.pipelining").setLevel(logging.ERROR)
    rounds = max(1, count // ranks)
    bare: Any = SimpleNamespace(
        pp_group_size=ranks, _n_microbatches=count, n_local_stages=per_rank,
        num_stages=ranks * per_rank, _num_stages=ranks * per_rank, number_of_rounds=rounds,
        microbatches_per_round=count // rounds,
    )  # fmt: skip
    table: list[list[str]] = []
    for rank in range(ranks):
        bare.rank = rank
        found = kind._calculate_single_rank_operations(bare, rank)
        single = [one for each in found if each for one in each.sub_actions or (each,)]
        names = {
            "FORWARD": "F",
            "FULL_BACKWARD": "B",
            "BACKWARD_INPUT": "I",
            "BACKWARD_WEIGHT": "W",
        }
        table.append(
            [f"{a.stage_index}{names[a.computation_type.name]}{a.microbatch_index}" for a in single]
        )
    return table


def test_a_table_in_which_ranks_wait_for_one_another_says_who_waits_for_what() -> None:
    first = (Action("F", 0, 0), Action("B", 0, 0))
    second = (Action("B", 1, 0), Action("F", 1, 0))
    made = PipelineSchedule("mine", 1, (0, 1), (first, second))
    with pytest.raises(ValueError, match="stands still: rank 0 at 0B0, rank 1 at 1B0"):
        made.check()


def test_a_table_without_a_backward_is_none() -> None:
    with pytest.raises(ValueError, match="stage 0 of micro-batch 0"):
        PipelineSchedule("mine", 1, (0,), ((Action("F", 0, 0),),)).check()


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (("1f2b", 2, 1, 4), "there is no schedule `1f2b`; there are gpipe, 1f1b"),
        (("1f1b", 2, 2, 4), "1f1b has one stage on each rank, not 2; interleaved has several"),
        (("interleaved", 2, 1, 4), "two stages or more"),
        (("interleaved", 4, 2, 9), "equal rounds of 4 or more, and 9 are not; take 8"),
        (("zbv", 4, 3, 8), "zbv has two stages on each rank, not 3"),
        (("dualpipev", 4, 2, 7), "8 micro-batches or more"),
    ],
)
def test_what_is_no_schedule_is_refused(asked: tuple[str, int, int, int], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        schedule(*asked)

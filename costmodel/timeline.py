"""When a pipeline runs what: a schedule with the seconds of its stages, played through.

A rank runs its actions one after another, each as soon as what it needs is there.  What another
rank needs is sent when it is made, behind earlier messages between the two in that direction, and
takes no time of the ranks.  Bubbles, the length of a step and how many micro-batches are in flight
follow.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..facts.schedules import Action, PipelineSchedule


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one micro-batch in a stage: forward, the whole backward, and the part of it that
    gives gradients of weights alone; to send what it makes to the next stage, and a gradient to the
    one before."""

    forward_s: float
    backward_s: float
    weights_s: float = 0.0
    send_s: float = 0.0
    send_back_s: float = 0.0

    def seconds(self, kind: str) -> float:
        """Of an action."""
        inputs = self.backward_s - self.weights_s
        return {"F": self.forward_s, "B": self.backward_s, "I": inputs, "W": self.weights_s}[kind]


@dataclass(frozen=True, slots=True)
class Span:
    """An action of a rank, from `start` to `end` in seconds from the step's begin."""

    action: Action
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What each rank of a pipeline runs when."""

    schedule: PipelineSchedule
    spans: tuple[tuple[Span, ...], ...]

    @cached_property
    def seconds(self) -> float:
        """From the first action to the end of the last."""
        return max(each[-1].end for each in self.spans)

    def busy(self, rank: int) -> float:
        """Seconds in which `rank` runs anything."""
        return sum(span.end - span.start for span in self.spans[rank])

    def bubble(self, rank: int) -> float:
        """Seconds in which `rank` has nothing to run."""
        return self.seconds - self.busy(rank)

    @property
    def bubble_share(self) -> float:
        """The part of all ranks' time in which they have nothing to run."""
        idle = sum(map(self.bubble, range(self.schedule.ranks)))
        return idle / (self.seconds * self.schedule.ranks) if self.seconds else 0.0

    def ends(self, rank: int) -> float:
        """When `rank` has run its last action."""
        return self.spans[rank][-1].end


def played(schedule: PipelineSchedule, stages: Sequence[StageTimes]) -> Timeline:
    """The timeline of a schedule whose stages take these times.

    Raises ValueError for a schedule in which ranks wait for one another.
    """
    free = [0.0] * schedule.ranks
    links: dict[tuple[int, int, str], float] = {}  # until when one is busy
    there: dict[tuple[str, int, int], float] = {}  # when what an action takes has come
    spans: list[list[Span]] = [[] for _ in range(schedule.ranks)]
    for rank, action in schedule.order:
        times = stages[action.stage]
        needed = action.needed
        came = 0.0 if needed is None else there.get((*needed, action.batch), 0.0)
        start = max(free[rank], came)
        end = free[rank] = start + times.seconds(action.kind)
        spans[rank].append(Span(action, start, end))
        if action.kind == "W":
            continue
        forward = action.kind == "F"
        following = action.stage + (1 if forward else -1)
        made = ("F" if forward else "B", action.stage, action.batch)
        if not 0 <= following < schedule.stages or schedule.rank_of[following] == rank:
            there[made] = end
            continue
        link = (rank, schedule.rank_of[following], made[0])
        seconds = times.send_s if forward else times.send_back_s
        links[link] = there[made] = max(end, links.get(link, 0.0)) + seconds
    return Timeline(schedule, tuple(map(tuple, spans)))


def in_flight(schedule: PipelineSchedule) -> tuple[int, ...]:
    """By stage the most micro-batches whose forward has begun and whose backward has not ended.

    What a stage keeps of each waits so long; in a backward of two parts, for the second.
    """
    most, now = [0] * schedule.stages, [0] * schedule.stages
    for each in schedule.actions:
        for action in each:
            if action.kind == "F":
                now[action.stage] += 1
                most[action.stage] = max(most[action.stage], now[action.stage])
            elif action.kind in "BW":
                now[action.stage] -= 1
    return tuple(most)


def peak_in_flight(schedule: PipelineSchedule, rank: int, sizes: Sequence[float]) -> float:
    """The most that `rank` keeps at once, where stage n keeps `sizes[n]` of a micro-batch."""
    most = now = 0.0
    for action in schedule.actions[rank]:
        if action.kind == "F":
            now += sizes[action.stage]
            most = max(most, now)
        elif action.kind in "BW":
            now -= sizes[action.stage]
    return most


def drawn(timeline: Timeline, width: int = 72) -> tuple[str, ...]:
    """A line for each rank: its actions over time with their micro-batches, `.` where it waits.

    `F3--` is a forward, `B3==` a backward, as long as they take.
    """
    scale = width / timeline.seconds if timeline.seconds else 0.0
    lines: list[str] = []
    for each in timeline.spans:
        cells = ["."] * width
        for span in each:
            first, last = round(span.start * scale), round(span.end * scale)
            sign, room = span.action.kind, max(last - first, 0)
            text = f"{sign}{span.action.batch}"
            shown = (text if len(text) <= room else sign)[:room]
            cells[first:last] = list(shown.ljust(room, "-" if span.action.kind == "F" else "="))
        lines.append("".join(cells[:width]))
    return tuple(lines)


__all__ = [
    "Span", "StageTimes", "Timeline", "drawn", "in_flight", "peak_in_flight", "played",
]  # fmt: skip

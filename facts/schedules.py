"""Schedules of pipelines: which rank runs which part of a step, in which order.

A model is cut into stages, a batch into micro-batches.  A rank of a pipeline (all ranks that share
its stages, in a mesh of their own) has one stage or several, and runs a list of actions:

    F  forward of a stage on a micro-batch, after that of the stage before
    B  its backward, after that of the stage behind
    I  the part of the backward that gives gradients of inputs, which the stage before waits for
    W  the other part, gradients of weights, for which no one waits

    1f1b, 3 stages, 4 micro-batches:    rank 0   F0 F1 F2    B0 F3 B1    B2    B3
                                        rank 1      F0 F1 B0 F2 B1 F3 B2    B3
                                        rank 2         F0 B0 F1 B1 F2 B2 F3 B3

Sources: GPipe (1811.06965); 1F1B (PipeDream-Flush, 2006.09503); interleaved (2104.04473); ZB-H1 and
ZBV (2401.10241, 2405.15362); DualPipeV (github.com/deepseek-ai/DualPipe).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["F", "B", "I", "W"]


@dataclass(frozen=True, slots=True)
class Action:
    """What a rank does at a time: `kind` for `stage` on micro-batch `batch`, all from 0."""

    kind: Kind
    stage: int
    batch: int

    def __str__(self) -> str:
        """As torch writes it: `2F0` is stage 2's forward of micro-batch 0."""
        return f"{self.stage}{self.kind}{self.batch}"

    @property
    def needed(self) -> tuple[Kind, int] | None:
        """Kind and stage of the result from another stage that it takes, where there is that stage:
        an activation, or a gradient, which `I` and `B` both give."""
        if self.kind == "F":
            return ("F", self.stage - 1)
        return None if self.kind == "W" else ("B", self.stage + 1)


@dataclass(frozen=True)
class PipelineSchedule:
    """The actions of each rank of a pipeline; `rank_of` has by stage the rank that runs it.

    Invariants, which `schedule` keeps: every stage has F and either B or I and W of every
    micro-batch, once, in an order in which no rank waits for ever.
    """

    name: str
    micro_batches: int
    rank_of: tuple[int, ...]
    actions: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        """Ranks of the pipeline."""
        return len(self.actions)

    @property
    def stages(self) -> int:
        """Stages of the model, all ranks together."""
        return len(self.rank_of)

    @property
    def splits(self) -> bool:
        """Are there backward passes in two parts?"""
        return any(action.kind == "I" for each in self.actions for action in each)

    @property
    def forwards(self) -> PipelineSchedule:
        """Its forwards alone, in their order: what evaluates a batch."""
        ahead = tuple(tuple(a for a in each if a.kind == "F") for each in self.actions)
        return replace(self, actions=ahead)

    def stages_of(self, rank: int) -> tuple[int, ...]:
        """The stages that `rank` runs."""
        return tuple(stage for stage, own in enumerate(self.rank_of) if own == rank)

    @cached_property
    def order(self) -> tuple[tuple[int, Action], ...]:
        """All actions with their ranks, each behind those that it needs.

        Raises ValueError, naming what each rank waits for, where there is no such order.
        """
        done: set[tuple[Kind, int, int]] = set()
        left = [deque(each) for each in self.actions]
        found: list[tuple[int, Action]] = []
        while any(left):
            before = len(found)
            for rank, queue in enumerate(left):
                while queue and self._is_ready(queue[0], done):
                    action = queue.popleft()
                    done.add((_result(action.kind), action.stage, action.batch))
                    found.append((rank, action))
            if len(found) == before:
                waiting = ", ".join(f"rank {r} at {q[0]}" for r, q in enumerate(left) if q)
                raise ValueError(f"schedule {self.name} stands still: {waiting}")
        return tuple(found)

    def _is_ready(self, action: Action, done: set[tuple[Kind, int, int]]) -> bool:
        needed = action.needed
        first: Kind = "F" if action.kind in "BI" else "B"
        own = action.kind == "F" or (first, action.stage, action.batch) in done
        if needed is None or not 0 <= needed[1] < self.stages:
            return own
        return own and (*needed, action.batch) in done

    def check(self) -> None:
        """Raises ValueError where an action is missing, twice, on another rank, or waits for
        ever."""
        wrong = [
            f"{action} on rank {rank}"
            for rank, each in enumerate(self.actions)
            for action in each
            if not 0 <= action.stage < self.stages or self.rank_of[action.stage] != rank
        ]
        count = Counter(action for each in self.actions for action in each)
        for stage in range(self.stages):
            for batch in range(self.micro_batches):
                times = [count.pop(Action(kind, stage, batch), 0) for kind in ("F", "B", "I", "W")]
                if times not in ([[1, 0, 0, 0]] if self.name == FORWARD else _WHOLE):
                    wrong.append(f"stage {stage} of micro-batch {batch}")
        wrong += [f"{action}" for action in count]
        if wrong:
            raise ValueError(f"schedule {self.name} is not one: {', '.join(wrong[:5])}")
        _ = self.order


_WHOLE = ([1, 1, 0, 0], [1, 0, 1, 1])  # how often F, B, I and W


def _result(kind: Kind) -> Kind:
    """What an action gives others: an activation or a gradient."""
    return "B" if kind == "I" else kind


# --- the schedules -------------------------------------------------------------------------------

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb-h1", "zbv", "dualpipev")
FORWARD = "forward"  # of inference: forwards alone
_SEVERAL = ("interleaved", "zbv", "dualpipev")  # with several stages a rank
_IN_A_V = ("zbv", "dualpipev")  # rank 0 has the first stage and the last


def default_stages(name: str) -> int:
    """Stages of a rank where their number is not given."""
    return 2 if name in _SEVERAL else 1


def refusal(name: str, ranks: int, per_rank: int, micro_batches: int) -> str:
    """Why there is no such schedule, in words that end a sentence; "" where there is one."""
    if name == FORWARD:
        return f"{name} has one stage on each rank, not {per_rank}" if per_rank != 1 else ""
    if name not in SCHEDULES:
        return f"there is no schedule `{name}`; there are {', '.join(SCHEDULES)}"
    if name not in _SEVERAL and per_rank != 1:
        return f"{name} has one stage on each rank, not {per_rank}; interleaved has several"
    if name == "interleaved" and per_rank < 2:
        return "interleaved has two stages or more on each rank; 1f1b has one"
    if name in _IN_A_V and per_rank != 2:
        return f"{name} has two stages on each rank, not {per_rank}"
    if name == "interleaved" and micro_batches % max(1, micro_batches // ranks):
        near = max(1, micro_batches // ranks) * ranks
        return (
            f"interleaved runs micro-batches in equal rounds of {ranks} or more, and"
            f" {micro_batches} are not; take {near}"
        )
    if name == "dualpipev" and micro_batches < 2 * ranks:
        return f"dualpipev over {ranks} ranks has {2 * ranks} micro-batches or more"
    return ""


def schedule(name: str, ranks: int, per_rank: int, micro_batches: int) -> PipelineSchedule:
    """The schedule of that name.  Raises ValueError where there is none, as `refusal` says."""
    if why := refusal(name, ranks, per_rank, micro_batches):
        raise ValueError(why)
    lists = _LISTS[name]
    actions = tuple(tuple(lists(ranks, rank, per_rank, micro_batches)) for rank in range(ranks))
    made = PipelineSchedule(name, micro_batches, _placed(name, ranks, per_rank), actions)
    made.check()
    return made


def _placed(name: str, ranks: int, per_rank: int) -> tuple[int, ...]:
    """By stage its rank: round and round, or there and back."""
    there = tuple(range(ranks))
    return there + there[::-1] if name in _IN_A_V else there * per_rank


class _Counting:
    """A list of actions that grows by patterns such as `F0 I1`: kinds with numbers of the rank's
    own stages, each of the micro-batch that is next."""

    def __init__(self, stages: Sequence[int]) -> None:
        self.stages = stages
        self.found: list[Action] = []
        self._next: Counter[str] = Counter()
        self._weights: deque[Action] = deque()

    def run(self, pattern: str, times: int = 1) -> _Counting:
        """Add the pattern, so often; `W` is the oldest weight part that has not run, if any."""
        for _ in range(times):
            for word in pattern.split():
                if word == "W":
                    self.found += [self._weights.popleft()] if self._weights else []
                else:
                    self._add("F" if word[0] == "F" else "I" if word[0] == "I" else "B", word[1:])
        return self

    def _add(self, kind: Kind, place: str) -> None:
        key = ("F" if kind == "F" else "B") + place
        batch, stage = self._next[key], self.stages[int(place)]
        self._next[key] += 1
        self.found.append(Action(kind, stage, batch))
        if kind == "I":
            self._weights.append(Action("W", stage, batch))

    def weights(self, place: int | None = None) -> _Counting:
        """Add all weight parts that have not run, or those of one of the rank's stages."""
        of = None if place is None else self.stages[place]
        own = [each for each in self._weights if of in (None, each.stage)]
        self.found += own
        self._weights = deque(each for each in self._weights if each not in own)
        return self

    def weight(self, place: int) -> _Counting:
        """Add the oldest weight part of one of the rank's stages."""
        first = next(each for each in self._weights if each.stage == self.stages[place])
        self._weights.remove(first)
        self.found.append(first)
        return self

    def below(self, micro_batches: int) -> Iterator[Action]:
        """The list without further micro-batches."""
        return (action for action in self.found if action.batch < micro_batches)


def _forward(ranks: int, rank: int, per_rank: int, micro_batches: int) -> list[Action]:
    return _Counting([rank]).run("F0", micro_batches).found


def _gpipe(ranks: int, rank: int, per_rank: int, micro_batches: int) -> list[Action]:
    return _Counting([rank]).run("F0", micro_batches).run("B0", micro_batches).found


def _one_f_one_b(ranks: int, rank: int, per_rank: int, micro_batches: int) -> list[Action]:
    ahead = min(ranks - rank, micro_batches)
    acts = _Counting([rank]).run("F0", ahead).run("B0 F0", micro_batches - ahead)
    return acts.run("B0", ahead).found


def _interleaved(ranks: int, rank: int, per_rank: int, micro_batches: int) -> list[Action]:
    """Rounds of micro-batches go through a rank's stages one after another."""
    of_round = micro_batches // max(1, micro_batches // ranks)
    turns = [
        place
        for _ in range(micro_batches // of_round)
        for place in range(per_rank)
        for _ in range(of_round)
    ]
    ahead = min((per_rank - 1) * of_round + 2 * (ranks - 1 - rank), len(turns))
    back = [per_rank - 1 - place for place in turns]
    acts = _Counting(range(rank, ranks * per_rank, ranks))
    for turn in range(len(turns) + ahead):
        if turn < len(turns):
            acts.run(f"F{turns[turn]}")
        if turn >= ahead:
            acts.run(f"B{back[turn - ahead]}")
    return acts.found


def _zb_h1(ranks: int, rank: int, per_rank: int, micro_batches: int) -> list[Action]:
    """As 1F1B, with as much in flight; weight parts run late, so that they fill the end."""
    ahead = min(ranks - 1 - rank, micro_batches)
    late = min(rank, micro_batches)
    acts = _Counting([rank]).run("F0", ahead)
    for turn in range(micro_batches):
        acts.run("F0 I0" if turn + ahead < micro_batches else "I0")
        acts.run("W" if turn >= late else "")
    return acts.weights().found


def _zbv(ranks: int, rank: int, per_rank: int, micro_batches: int) -> Iterator[Action]:
    """Table 6 of 2405.15362 has the numbers; fewer than 2 ranks - 1 micro-batches: what is left of
    so many."""
    many, far = max(2 * ranks - 1, micro_batches), ranks - rank
    acts = _Counting([rank, 2 * ranks - 1 - rank]).run("F0", 2 * far - 1).run("F1 F0", rank)
    for _ in range(far):
        acts.run("F1 I1").weight(1)
    for turn in range(many - ranks):
        acts.run("F0" if turn + 2 * far - 1 + rank < many else "")
        acts.run("I0").weight(0).run("F1 I1").weight(1)
    acts.run("I0 I1", rank)
    for _ in range(far):
        acts.run("I0").weight(0)
    return acts.weights(1).weights(0).below(micro_batches)


def _dualpipev(ranks: int, rank: int, per_rank: int, micro_batches: int) -> list[Action]:
    """Forwards of one of a rank's stages stand beside backwards of the other, `F0 B1`: what of such
    a pair can overlap does so by the work of the device, here they are one after another."""
    far = ranks - 1 - rank
    acts = _Counting([rank, 2 * ranks - 1 - rank])
    acts.run("F0", 2 * far).run("F0 F1", rank + 1).run("I1 W F1", far)
    acts.run("F0 B1 F1 B0", micro_batches - 2 * ranks + rank + 1).run("B1 F1 B0", far)
    whole = (
        rank + 1
    )  # of the last backwards, 2 * (rank + 1) and `far`: the others leave W for later
    for turn in range(rank + 1):
        acts.run("B1" if 2 * turn < whole else "I1").run("B0" if 2 * turn + 1 < whole else "I0")
    return acts.run("W I0", far).weights().found


_LISTS: dict[str, Callable[[int, int, int, int], Sequence[Action] | Iterator[Action]]] = {
    FORWARD: _forward,
    "gpipe": _gpipe,
    "1f1b": _one_f_one_b,
    "interleaved": _interleaved,
    "zb-h1": _zb_h1,
    "zbv": _zbv,
    "dualpipev": _dualpipev,
}


__all__ = [
    "FORWARD", "SCHEDULES", "Action", "Kind", "PipelineSchedule", "default_stages", "refusal",
    "schedule",
]  # fmt: skip

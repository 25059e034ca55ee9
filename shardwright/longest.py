"""The longest sequences of which a plan fits the memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from .api import micro_batch_counts
from .capturing import Captures
from .ir.capture.errors import CaptureError
from .planner.errors import InfeasibleError, PlanError
from .planner.search.fitting import any_fits
from .planner.search.search import Builders, Job

_PARTS = 16  # of a power of two, to which the longest is found
_MOST = 2**27  # tokens: longer ones are not tried

Fits = Callable[[int], bool]


@dataclass(frozen=True, slots=True)
class Longest:
    """The longest sequences that fit, None where not even the shortest do; `why` longer ones are
    not planned, "" where memory is what lacks."""

    seq: int | None
    why: str = ""


def longest(fits: Fits, least: int) -> Longest:
    """The longest from `least` tokens on, doubled as often as it goes, and to a sixteenth of that.

    `fits` may raise PlanError or CaptureError for sequences that the model does not take.
    """
    why = ""

    def ask(seq: int) -> bool:
        nonlocal why
        try:
            fit, reason = fits(seq), ""
        except (PlanError, CaptureError) as error:
            if seq == least:
                raise
            fit, reason = False, str(error).splitlines()[0]
        why = why if fit else reason
        return fit

    if not ask(least):
        return Longest(None)
    fit = least
    while fit < _MOST and ask(2 * fit):
        fit *= 2
    step = max(1, fit // _PARTS)
    few, many = 0, -(-fit // step)  # so many steps more fit, and so many do not
    while many - few > 1 and fit < _MOST:
        middle = (few + many) // 2
        few, many = (middle, many) if ask(fit + middle * step) else (few, middle)
    return Longest(fit + few * step, why)


def fits_memory(captures: Captures, job: Job, *, several: bool) -> bool:
    """Is there a plan of the job's request, without stages, in as many micro-batches as it takes,
    if there may be `several`?

    Raises PlanError and CaptureError as planning does, but for what does not fit.
    """
    job = captures.in_own_formats(job)
    request = job.request
    counts = micro_batch_counts(request) if several else [request.micro_batches]
    for count in reversed(counts):  # the more, the less is kept at once
        tried = replace(job, request=replace(request, micro_batches=count), builders=Builders())
        try:
            if any_fits(captures.graphs(tried), tried):
                return True
        except InfeasibleError:
            continue
    return False


__all__ = ["Longest", "fits_memory", "longest"]

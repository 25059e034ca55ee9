"""Errors of the planner that a user can act on."""

from __future__ import annotations


class PlanError(ValueError):
    """The request cannot be planned as it stands; the message says what to change."""


class LayoutError(PlanError):
    """A layout that a model's sizes do not allow; the message says which."""


class InfeasibleError(PlanError):
    """No plan fits the memory; the message names what fills it and what would fit."""

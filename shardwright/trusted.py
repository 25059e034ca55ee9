"""Modules and users' code that a plan brings: what may be run, and what is refused."""

from __future__ import annotations

import importlib.util
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from .codegen.write import module_source
from .facts.files import read_text
from .facts.users import import_user, is_file
from .folder import MODULE_FILE, PLAN_FILE
from .ir.ops.users import imports_in
from .planner.errors import PlanError
from .planner.plan.plan import PlanData
from .written import wrote


def module_in(folder: Path, plan: PlanData) -> tuple[str, bool]:
    """The module's text, and whether it is another than the plan generates.

    Raises PlanError where it is missing, or neither the plan's nor this user's.
    """
    path = folder / MODULE_FILE
    if not path.is_file():
        raise PlanError(
            f"there is no module `{path}`; write it again: "
            f"load_plan({str(folder)!r}).write_module({str(path)!r})"
        )
    text = read_text(path)
    edited = text != module_source(plan)
    if edited and not wrote(folder / PLAN_FILE):
        raise PlanError(
            f"`{path}` is not what its plan generates, and this plan was not written here by you: "
            f"it is not run. Read it, or write the plan's own: load_plan({str(folder)!r})"
            f".write_module({str(path)!r})"
        )
    return text, edited


def import_users(plan: PlanData, model: str | None, own: bool) -> None:
    """Import what defines operators and functions that the plan calls; `model` is a file to be run.

    Raises PlanError where a plan from elsewhere names something else.
    """
    named = Path(model.partition(":")[0]).resolve() if model else None
    for item in dict.fromkeys(item for each in plan.phases for item in imports_in(each.graph)):
        place = item.place
        if not own and not (is_file(place) and Path(place).resolve() == named):
            may = f"give `--model {place}` if it may run; else " if is_file(place) else ""
            raise PlanError(
                f"the module would import {place}, which defines what it calls, and this plan was "
                f"not written here by you: nothing is run. Read that code; {may}plan the model "
                "again"
            )
        try:
            with redirect_stdout(sys.stderr):
                import_user(place, item.function)
        except (Exception, SystemExit) as error:  # the user's code may raise anything
            raise PlanError(f"importing {place} failed: {error}") from error


def import_source(path: Path) -> Any:
    """The generated module in the file `path`."""
    spec = importlib.util.spec_from_file_location("_shardwright_generated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


__all__ = ["import_source", "import_users", "module_in"]

"""`plan show --html` and `--trace`: one page that needs nothing else, and a trace."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from shardwright.api import Plan
from shardwright.folder import write_folder
from shardwright.plan_page import fragment_of, page_of_plan
from shardwright.plan_time import trace_of
from tests.codegen.export.test_targets import planned
from tests.targets.tools import beyond

from .conftest import Run


class Elements(HTMLParser):
    """How often each element is there; all are closed, and nothing is loaded."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        assert not {"src", "href"} & {name for name, _ in attrs}
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def free() -> Plan:
    return planned(gpus=4, batch=8)


@pytest.mark.long
def test_a_page_has_what_the_plan_has() -> None:
    plan = free()
    page = page_of_plan(plan)
    found = Elements(page)
    assert "url(" not in page and "@import" not in page
    assert str(plan).splitlines()[0] in page.replace("&gt;", ">")
    titles = re.findall("<h2>(.*?)</h2>", page)
    assert titles == [
        "Mesh", "Ordinary plans", "Memory", "Time", "Memory over a step",
        "layers: 4 x DecoderLayer", "Parameters", "How it was found",
    ]  # fmt: skip
    parameters = sum(page.count(f"<td>{name}</td>") for name in _names(plan))
    assert parameters == len(_names(plan))
    fitting = [b for b in plan.baselines if b.seconds is not None]
    assert page.count(", 4</text>") + page.count(", 2x2</text>") == len(fitting)
    assert found.count["svg"] == 8 + len(_names(plan))
    for rank in range(4):
        assert f"GPU {rank}, node 0" in page


def _names(plan: Plan) -> list[str]:
    from shardwright.planner.strategies.params import all_params

    return [ref.name for ref in all_params(plan.graph) if ref.param.kind == "parameter"]


@pytest.mark.parametrize(("layout", "phase"), [("pp=2,ddp=2", "train"), ("ddp=2,tp=2", "serve")])
@pytest.mark.some(1)
def test_pages_of_pipelines_and_servers(layout: str, phase: str) -> None:
    page = page_of_plan(planned(layout=layout, phase=phase))
    Elements(page)
    says = "Stage 1" if phase == "train" else "Decode of one token"
    assert f"<h2>{says}</h2>" in page
    assert page.count("<h2>Memory over a step</h2>") == 2
    assert page.count("<h2>Time</h2>") == (1 if phase == "train" else 2)
    assert ("micro-batches in flight" in page) == (phase == "train")


def test_a_page_escapes_what_it_is_told() -> None:
    from dataclasses import replace

    plan = replace(free(), notes=("<script>x</script>",))
    assert "<script>x" not in page_of_plan(plan)


@pytest.mark.parametrize(("width", "dark"), [(400, False), (1280, True)])
def test_the_page_fits_the_window(width: int, dark: bool, tmp_path: Path) -> None:
    """Tables and pictures that are wider scroll by themselves."""
    assert beyond(page_of_plan(free()), width, tmp_path, dark=dark) == 0


def test_a_trace_is_the_step() -> None:
    plan = free()
    events = json.loads(json.dumps(trace_of(plan), allow_nan=False))["traceEvents"]
    names = [e["args"]["name"] for e in events if e["name"] == "thread_name"]
    assert names == ["compute", "communication", "weights"]
    spans = [e for e in events if e["ph"] == "X"]
    assert all(e["ts"] >= 0 and e["dur"] > 0 for e in spans)
    end = max(e["ts"] + e["dur"] for e in spans)
    assert end == pytest.approx(plan.seconds * 1e6, rel=0.01)
    assert {e["cat"] for e in spans} == {"forward", "backward", "optimizer"}


def test_notebooks() -> None:
    plan = free()
    fragment = plan._repr_html_()  # pyright: ignore[reportPrivateUsage]
    assert fragment == fragment_of(plan)
    assert Elements(fragment).count["svg"] == 2
    assert plan.graph.name in fragment


def test_the_command(run: Run, tmp_path: Path) -> None:
    plan, out = free(), tmp_path / "plan"
    write_folder(plan, out, None)
    page, trace = tmp_path / "plan.html", tmp_path / "step.json"
    for _ in range(2):  # an earlier page is replaced
        ran = run("show", str(out), "--html", str(page), "--trace", str(trace))
        assert (ran.code, ran.out) == (0, f"written {page}\nwritten {trace}\n")
    assert page.read_text() == page_of_plan(plan) == plan.to_html()
    assert json.loads(trace.read_text()) == plan.trace()
    other = tmp_path / "mine.html"
    other.write_text("mine")
    for path, says in ((other, "was not written here"), (tmp_path, "is a folder")):
        ran = run("show", str(out), "--html", str(path))
        assert ran.code == 2
        assert says in ran.err
    assert other.read_text() == "mine"

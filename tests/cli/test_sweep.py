"""`plan sweep`: lists and targets, which points are best, what is written, and a real sweep."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import shardwright
from shardwright.figures import Figures, Point, figures_of
from shardwright.longest import Longest, longest
from shardwright.page import page_of
from shardwright.planner.errors import PlanError
from shardwright.ranges import parse_count, parse_counts, parse_names, parse_price
from shardwright.sweeping import Asking, Row, Sweep, sweep
from shardwright.targets import parse_target
from tests.targets.tools import beyond

from .conftest import Run

EXAMPLES = Path(__file__).parents[2] / "examples"


# -- lists ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("8", (8,)),
        ("8,16, 8", (8, 16)),
        ("8..64", (8, 16, 32, 64)),
        ("3..20,7", (3, 6, 12, 7)),
        ("1k..4k", (1000, 2000, 4000)),
    ],
)
def test_numbers_and_ranges(text: str, want: tuple[int, ...]) -> None:
    assert parse_counts("--gpus", text) == want


@pytest.mark.parametrize("text", ["", "0", "-8", "8,,16", "64..8", "8..", "eight", "8.5", "9" * 30])
def test_what_is_no_list_of_numbers(text: str) -> None:
    with pytest.raises(ValueError, match="--gpus"):
        parse_counts("--gpus", text)


def test_words_between_commas() -> None:
    assert parse_count("--tokens-per-step", "4M") == 4_000_000
    assert parse_names("--cluster", "h100, h200,h100") == ("h100", "h200")
    assert parse_price("h100=2.5") == ("h100", 2.5)
    for text in ("h100", "h100=", "=2", "h100=-1", "h100=nan", "h100=0"):
        with pytest.raises(ValueError, match="--price"):
            parse_price(text)


@pytest.mark.parametrize(
    ("tokens", "want"), [(4_194_304, (512, 512)), (4_000_000, (488, 512)), (8192, (1, 1))]
)
def test_tokens_of_a_step_in_sequences(tokens: int, want: tuple[int, ...]) -> None:
    """All of them where they are a whole number, else as near as so many for each GPU come."""
    asking = Asking("m.py", (8, 64), ("h100",), (8192,), "auto", tokens, {}, {"phase": "train"})
    tasks = [(gpus, task.batch) for task in asking.tasks() for gpus in task.gpus]
    assert sorted(tasks) == list(zip((8, 64), want, strict=True))


# -- which is best --------------------------------------------------------------------------------


def figures(gpus: int, rate: float, **others: Any) -> Figures:
    """A training point of that many tokens a second."""
    point = Point(gpus, others.pop("cluster", "h100"), others.pop("seq", 1024), 8)
    base = Figures(
        point=point, layout="dp=2", micro_batches=1, recompute=False, memory_bytes=1e9,
        tokens_per_s=rate, mfu=0.4, exposed=0.1, step_s=8192 / rate, ttft_s=None, tpot_s=None,
        cost_per_hour=None,
    )  # fmt: skip
    return replace(base, **others)


def swept(*found: Figures, target: str | None = None) -> Sweep:
    seqs = tuple(dict.fromkeys(one.point.seq for one in found))
    clusters = tuple(dict.fromkeys(one.point.cluster for one in found))
    options: dict[str, Any] = {"phase": "train", "outputs": (), "memory_bytes": None}
    for name in ("context", "output_tokens", "expert_imbalance", "dtype", "precision"):
        options[name] = None
    options |= {"reduce_dtype": None, "micro_batches": None, "optimizer": None}
    options |= {"solver": "highs", "time_limit_s": 60.0}
    asking = Asking("model.py", (8,), clusters, seqs, (8,), None, {}, options)
    goal = None if target is None else parse_target(target)
    return Sweep(asking, tuple(Row(one.point, one) for one in found), goal)


@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.integers(1, 6), st.sampled_from([512, 1024])), min_size=1
    )
)
def test_the_front_is_what_nothing_beats(points: list[tuple[int, int, int]]) -> None:
    found = [figures(gpus, float(rate), seq=seq) for gpus, rate, seq in points]
    sweep = swept(*found)
    want = [
        one
        for one in found
        if not any(
            other.point.seq == one.point.seq
            and other.point.gpus <= one.point.gpus
            and other.tokens_per_s >= one.tokens_per_s
            and (other.point.gpus, other.tokens_per_s) != (one.point.gpus, one.tokens_per_s)
            for other in found
        )
    ]
    assert sweep.front() == want
    for seq in sweep.asking.seqs:
        assert sweep.best(seq) in sweep.front()


def test_the_best_gives_most_per_gpu_and_with_prices_most_per_money() -> None:
    small, large = figures(8, 800.0), figures(16, 1590.0)
    assert swept(small, large).best(1024) == small
    assert swept(small, figures(16, 1700.0)).best(1024) == figures(16, 1700.0)
    dear = figures(8, 900.0, cluster="h200", cost_per_hour=32.0)
    cheap = replace(small, cost_per_hour=16.0)
    assert swept(dear, cheap).best(1024) == cheap
    assert "most tokens per money" in swept(dear, cheap).answer()


def test_with_a_target_the_fewest_gpus_that_meet_it() -> None:
    found = [figures(8, 800.0), figures(16, 1400.0), figures(32, 2000.0)]
    assert swept(*found, target="tokens/s >= 1k").best(1024) == found[1]
    assert swept(*found, target="step <= 5 s, MFU >= 30%").best(1024) == found[2]
    missed = swept(*found, target="tokens/s >= 1M")
    assert missed.best(1024) is None
    assert "tokens/s binds: the nearest, 32 x h100, 8 x 1024 tokens, has 2,000" in missed.answer()


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("speed >= 3", "expected one of step, TTFT"),
        ("tokens/s", "expected one of"),
        ("tokens/s <= 5", "bounded by >="),
        ("step <= 5 GB", "given in s or ms"),
        ("step <= 0 s", "above 0"),
        ("", "expected one of"),
    ],
)
def test_targets_that_make_no_sense(text: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_target(text)


# -- the longest sequences -------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 10**6))
@example(3, 42)
def test_the_longest_fits_and_a_sixteenth_more_does_not(least: int, limit: int) -> None:
    found = longest(lambda seq: seq <= limit, least)
    if found.seq is None:
        assert limit < least
        return
    assert least <= found.seq <= limit < found.seq + max(1, found.seq // 16) + 1
    assert found.why == ""


def test_the_longest_that_a_model_takes_says_why() -> None:
    def fits(seq: int) -> bool:
        if seq > 100:
            raise PlanError("it has 100 positions\nand no more")
        return True

    assert longest(fits, 64) == Longest(100, "it has 100 positions")
    with pytest.raises(PlanError):
        longest(fits, 128)  # not even the shortest is taken


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["train", "serve"])
def test_the_longest_sequences_are_the_last_that_have_a_plan(phase: str) -> None:
    options: dict[str, Any] = {"memory_bytes": 60 * 10**6, "output_tokens": None}
    if phase == "serve":
        options = {"memory_bytes": 26 * 10**6, "output_tokens": 8}
    words = {"gpus": (2,), "cluster": ("cpu",), "seq": (32,), "batch": (2,)}
    model = str(EXAMPLES / "llama.py")
    found = sweep(model, **words, phase=phase, max_seq=True, **options)
    (row,) = found.rows
    assert row.figures is not None and not row.why
    seq = row.point.seq
    assert seq > 32 and f"The longest sequences, {seq} tokens: 2 x cpu" in found.answer()
    for other, fits in ((seq, True), (seq + max(1, seq // 16), False)):
        planned = sweep(model, **{**words, "seq": (other, 1)}, phase=phase, **options).rows[0]
        assert (planned.figures is not None) == fits


# -- the command ----------------------------------------------------------------------------------


class Elements(HTMLParser):
    """The elements of a page, and what is left open."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.rows: list[str] = []
        self.points: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = dict(attrs)
        if tag == "circle":
            self.points.append(names["data-row"] or "")
        if tag == "tr" and "id" in names:
            self.rows.append(names["id"] or "")
        if tag not in ("meta", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """`<line/>`"""


@pytest.mark.long
def test_a_sweep_has_the_figures_of_the_plans(run: Run, tmp_path: Path) -> None:
    out, model = tmp_path / "swept", str(EXAMPLES / "gpt.py")
    words = ["--cluster", "cpu,h100", "--batch", "4", "--price", "cpu=0.1", "--price", "h100=2"]
    ran = run("sweep", model, "--gpus", "1,2", "--seq", "32", *words, "--out", str(out))
    assert ran.code == 0
    assert ran.out.startswith("Sequences of 32 tokens: ")
    with (out / "sweep.csv").open() as file:
        records = list(csv.DictReader(file))
    data = json.loads((out / "sweep.json").read_text())
    assert [(r["gpus"], r["cluster"]) for r in records] == [
        ("1", "cpu"), ("1", "h100"), ("2", "cpu"), ("2", "h100"),
    ]  # fmt: skip
    (command,) = [line.strip() for line in ran.out.splitlines() if line.startswith("  plan ")]
    planned = run(*command.split()[1:], "--json", "--out", str(tmp_path / "planned"))
    (best,) = [point for point in data["points"] if point["best"]]
    plan = shardwright.load_plan(tmp_path / "planned" / "plan.json")
    assert planned.code == 0
    assert (plan.request.gpus, plan.request.cluster) == (best["gpus"], best["cluster"])
    assert plan.seconds == pytest.approx(best["step_s"])
    assert plan.memory.total == pytest.approx(best["memory_bytes"])
    price = {"cpu": 0.1, "h100": 2.0}[best["cluster"]] * best["gpus"]
    assert best["cost_per_million"] == pytest.approx(price / 3600 * plan.seconds / 128 * 1e6)
    page = Elements((out / "sweep.html").read_text())
    assert not page.open
    assert page.rows == page.points == [f"row{n}" for n in range(4)]


def test_a_pipeline_has_figures(run: Run, tmp_path: Path) -> None:
    words = ("--layout", "pp=2", "--cluster", "cpu", "--batch", "4", "--seq", "32")
    assert run(str(EXAMPLES / "gpt.py"), *words, "--out", str(tmp_path / "piped")).code == 0
    plan = shardwright.load_plan(tmp_path / "piped" / "plan.json")
    found = figures_of(Point(2, "cpu", 32, 4), plan, lambda _: 1e12, 0.0)
    assert found.exposed is None and found.step_s == plan.seconds and "pp=2" in found.layout
    assert "pp=2" in str(swept(found))


@pytest.mark.slow
def test_processes_find_the_same(run: Run, tmp_path: Path) -> None:
    """Of more points than a few; written over an earlier sweep."""
    out, found = tmp_path / "swept", dict[str, float]()
    words = ["--gpus", "1,2", "--cluster", "cpu,h100", "--batch", "4", "--out", str(out)]
    for seqs in ("32", "32,64"):
        ran = run(
            "sweep", str(EXAMPLES / "gpt.py"), *words, "--seq", seqs, "--target", "MFU >= 99%"
        )
        assert ran.code == 1
        assert "MFU binds" in ran.out
        for point in json.loads((out / "sweep.json").read_text())["points"]:
            if point["seq"] == 32:
                key = f"{point['gpus']} {point['cluster']}"
                assert point["step_s"] == pytest.approx(found.setdefault(key, point["step_s"]))
    assert len(found) == 4


def test_a_page_escapes_what_it_is_told() -> None:
    sweep = swept(figures(8, 800.0, cluster="<b>&\x1b"))
    text = page_of(replace(sweep, asking=replace(sweep.asking, model="<script>x</script>")))
    assert "<script>x" not in text
    assert "<b>" not in text
    assert "\x1b" not in text


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("--gpus 64..8", "ends before it begins"),
        ("--gpus 2 --cluster h1000", "h100"),
        ("--gpus 2 --cluster h100,", "a name is empty"),
        ("--gpus 2 --batch 2 --tokens-per-step 4k", "leave out --batch"),
        ("--gpus 2 --tokens-per-step 1500 --seq 512", "nor near to one for each of 2 GPUs"),
        ("--gpus 2 --max-seq --batch auto", "give --batch N"),
        ("--gpus 2 --max-seq --seq 32,64", "give the shortest alone"),
        ("--gpus 2 --max-seq --phase decode", "--phase serve has both"),
        ("--gpus 2 --max-seq --target MFU>=1%", "give one"),
        ("--gpus 2 --price h200=3", "no such cluster is asked for"),
        ("--gpus 2 --target TTFT<=1ms", "phase train has none"),
        ("--gpus 2 --target cost<=1", "give --price"),
        ("--gpus 2 --batch all", "is no whole number"),
        ("--gpus 3 --batch 2 --micro-batches 4 --cluster cpu", "does not divide"),
    ],
)
def test_mistakes_are_one_sentence(words: str, says: str, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "swept"
    ran = run("sweep", str(EXAMPLES / "gpt.py"), *words.split(), "--out", str(out))
    assert ran.code == 2
    (line,) = [line for line in ran.err.splitlines() if line.startswith("plan: error: ")]
    assert says in line
    assert not out.exists()


def test_a_folder_that_is_no_sweep_is_left_alone(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    ran = run("sweep", str(EXAMPLES / "gpt.py"), "--gpus", "2", "--out", str(tmp_path))
    assert ran.code == 2
    assert "`mine.txt`, which is not a sweep" in ran.err


@pytest.mark.parametrize("width", [400, 1280])
def test_the_page_fits_the_window(width: int, tmp_path: Path) -> None:
    """Nothing but the table, which scrolls by itself, is wider than the window."""
    found = [figures(gpus, 100.0 * gpus) for gpus in (8, 16, 32)]
    page = page_of(swept(*found))
    assert beyond(page, width, tmp_path) == 0
    wide = page.replace("<h1>", '<h1 style="width:1500px">')
    assert beyond(wide, width, tmp_path) > 0

"""The command line: what reaches the planner, what is printed and written, exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import typer

import shardwright
from shardwright import cli, options

if TYPE_CHECKING:
    from .conftest import FakeApi, Run

ROOT = Path(__file__).resolve().parents[2]


def python(code: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter at the root of the checkout."""
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )


# --- help ---------------------------------------------------------------------------------------


def laid_out_by() -> str:
    """The version of typer that the golden help texts are from: the one pinned for development."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    return next(r.removeprefix("typer==") for r in extras["dev"] if r.startswith("typer=="))


_COMMANDS = (
    "show", "verify", "solve", "sweep", "explain", "what-if", "compare", "launch", "rehearse",
    "export", "calibrate",
)  # fmt: skip
same_layout = pytest.mark.skipif(
    version("typer") != laid_out_by(), reason=f"typer {laid_out_by()} lays help out otherwise"
)


@same_layout
def test_help(golden: Callable[[str, str], None], run: Run) -> None:
    ran = run("--help")
    assert ran.code == 0
    golden("help.txt", ran.out)


@same_layout
@pytest.mark.parametrize("command", _COMMANDS)
def test_help_of_further_commands(
    command: str, golden: Callable[[str, str], None], run: Run
) -> None:
    ran = run(f"{command} --help")
    assert ran.code == 0
    golden(f"help_{command}.txt", ran.out)


def test_every_option_is_shown_by_an_example(run: Run) -> None:
    words = run("--help").out.replace("`", " ").split()
    options = {word for word in words if word.startswith("--")} - {"--help", "--version", "--json"}
    assert len(options) == 31  # a new option is a decision: few options, the rest in files
    for option in options:
        assert words.count(option) >= 2, f"{option} has no example"


def test_help_imports_no_torch_and_no_solver() -> None:
    done = python(
        "import sys\n"
        "from shardwright import cli\n"
        "try:\n    cli.main(['--help'])\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'numpy', 'ortools', 'transformers', 'pyomo'} & set(sys.modules)\n"
        "print('heavy:', sorted(heavy))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "heavy: []"


def test_help_does_not_depend_on_the_terminal(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    wide = run("--help").out
    monkeypatch.setenv("COLUMNS", "40")
    assert run("--help").out == wide
    assert max(len(line) for line in wide.splitlines()) <= 100
    assert "\x1b" not in wide


# --- the package --------------------------------------------------------------------------------


def test_runtime_brings_in_neither_planner_nor_solver() -> None:
    done = python(
        "import sys, shardwright.runtime\n"
        "roots = {name.split('.')[0] for name in sys.modules}\n"
        "print(sorted(roots & {'ortools', 'transformers', 'pyomo', 'highspy', 'typer'}))\n"
        "print(sorted(name for name in sys.modules if name.startswith('shardwright.')\n"
        "             and name.split('.')[1] not in ('runtime', 'facts', 'compat')))"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["[]", "[]"]


def test_the_package_itself_is_light() -> None:
    done = python("import sys, shardwright\nprint('torch' in sys.modules)")
    assert done.stdout == "False\n", done.stderr


def test_lazy_names_come_from_the_api(api: FakeApi) -> None:
    assert shardwright.load_plan == api.load_plan
    assert {"Plan", "load_plan", "plan"} <= set(dir(shardwright))
    with pytest.raises(AttributeError, match="`shardwright` has no attribute `plam`"):
        shardwright.plam  # type: ignore[attr-defined]  # noqa: B018


def test_version_is_the_one_that_is_packaged(run: Run) -> None:
    packaged = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run("--version").out == f"shardwright {packaged}\n"


# --- what reaches the planner -------------------------------------------------------------------


def test_defaults(api: FakeApi, run: Run) -> None:
    assert run("model.py --gpus 8").code == 0
    defaults = {
        "gpus": 8,
        "cluster": "h100",
        "phase": "train",
        "batch": None,
        "seq": 1024,
        "context": None,
        "output_tokens": None,
        "expert_imbalance": None,
        "dtype": None,
        "precision": None,
        "reduce_dtype": None,
        "micro_batches": None,
        "cache": True,
        "memory_bytes": None,
        "mesh": None,
        "pins": (),
        "optimizer": "adamw",
        "solver": "highs",
        "time_limit_s": 60.0,
        "outputs": (),
        "output_layout": "sharded",
        "layout": None,
        "schedule": None,
    }
    assert api.calls == [("model.py", defaults)]


@pytest.mark.parametrize(
    "words, changed",
    [
        ("--batch 64", {"batch": 64}),
        ("--seq 8192", {"seq": 8192}),
        ("--cluster mine.toml", {"cluster": "mine.toml"}),
        ("--dtype float32", {"dtype": "float32"}),
        ("--precision own", {"precision": "own"}),
        ("--reduce-dtype bfloat16", {"reduce_dtype": "bfloat16"}),
        ("--micro-batches 4", {"micro_batches": 4}),
        ("--memory 80GB", {"memory_bytes": 80_000_000_000}),
        ("--mesh dp=2,tp=4", {"mesh": "dp=2,tp=4"}),
        ("--pin a=R --pin *.b=S0,R", {"pins": ("a=R", "*.b=S0,R")}),
        ("--optimizer sgd", {"optimizer": "sgd"}),
        ("--output-layout replicated", {"output_layout": "replicated"}),
        ("--solver cp-sat", {"solver": "cp-sat"}),
        ("--time-limit 10", {"time_limit_s": 10.0}),
        ("--phase prefill", {"phase": "prefill", "optimizer": "none"}),
        ("--phase prefill --optimizer sgd", {"phase": "prefill", "optimizer": "sgd"}),
        (
            "--phase decode --context 4096 --batch 32",
            {"phase": "decode", "optimizer": "none", "context": 4096, "batch": 32, "seq": 1},
        ),
        (
            "--phase append --seq 64 --context 0",
            {"phase": "append", "optimizer": "none", "context": 0, "seq": 64},
        ),
        (
            "--phase serve --output-tokens 99",
            {"phase": "serve", "optimizer": "none", "output_tokens": 99},
        ),
    ],
)
def test_each_option_reaches_the_planner(
    words: str, changed: dict[str, object], api: FakeApi, run: Run
) -> None:
    run("model.py --gpus 8")
    run(f"model.py --gpus 8 {words}")
    (_, plain), (_, given) = api.calls
    assert {key: value for key, value in given.items() if value != plain[key]} == changed


def test_options_may_stand_before_the_model(api: FakeApi, run: Run) -> None:
    assert run("--gpus 8 model.py:build_large").code == 0
    assert api.calls[0][0] == "model.py:build_large"


@pytest.mark.parametrize("model", ["./show", "shown.py", "solve.py:build"])
def test_a_model_may_be_called_like_a_command(model: str, api: FakeApi, run: Run) -> None:
    assert run(f"{model} --gpus 8").code == 0
    assert api.calls[0][0] == model


@pytest.mark.parametrize(
    "text, want",
    [
        ("80GB", 80 * 10**9),
        ("80gb", 80 * 10**9),
        ("80GiB", 80 * 2**30),
        ("64e9", 64 * 10**9),
        ("1.5 TB", 1_500_000_000_000),
        ("512MiB", 512 * 2**20),
        ("24576KB", 24_576_000),
        ("123B", 123),
    ],
)
def test_sizes(text: str, want: int) -> None:
    assert options.parse_bytes(text) == want


@pytest.mark.parametrize("text", ["", "GB", "80G", "80 apples", "-3GB", "1,5GB", "0", "1e300GB"])
def test_sizes_refused(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="expected one like 80GB"):
        options.parse_bytes(text)


# --- what is printed and written ----------------------------------------------------------------


def test_versions_that_were_never_tried_are_named(
    api: FakeApi, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "versions_in_use", lambda: {"torch": "2.99.0", "transformers": "5.24"})
    ran = run("model.py --gpus 8")
    assert ran.code == 0 and "2.99" not in ran.out
    (line,) = [line for line in ran.err.splitlines() if "never tried" in line]
    assert line.startswith("plan: never tried on torch 2.99.0 (but on ")
    assert run("show plan_out").err == ""


def test_report_files_and_next_commands(api: FakeApi, run: Run) -> None:
    ran = run("model.py --gpus 8 --out new/folder")
    assert ran.code == 0
    assert ran.out == (
        "8.1 ms per step, 1.4x faster than FSDP\n"
        "\n"
        "Written\n"
        "  new/folder/plan.json\n"
        "  new/folder/sharded_model.py\n"
        "Next\n"
        "  torchrun --nproc-per-node 8 new/folder/sharded_model.py\n"
        "  plan verify new/folder\n"
    )
    assert ran.err == "plan: load PyTorch\nplan: solve\nplan: write the module\n"
    assert sorted(path.name for path in Path("new/folder").iterdir()) == [
        "plan.json",
        "sharded_model.py",
    ]
    assert [path.name for path in Path().iterdir()] == ["new"]


def test_json_is_all_that_stdout_holds(api: FakeApi, run: Run) -> None:
    ran = run("model.py --gpus 8 --json")
    assert json.loads(ran.out) == api.answer.to_json()  # type: ignore[union-attr]
    assert "plan_out/sharded_model.py" in ran.err


@pytest.mark.parametrize("stage", ["strategies", "problem", "plan"])
def test_a_dump_is_all_that_stdout_holds(stage: str, api: FakeApi, run: Run) -> None:
    ran = run(f"model.py --gpus 8 --dump {stage}")
    assert ran.out == f"the {stage} of {api.answer.text}\n"  # type: ignore[union-attr]
    assert "plan_out/sharded_model.py" in ran.err


def test_a_dump_and_json_exclude_each_other(api: FakeApi, run: Run) -> None:
    ran = run("model.py --gpus 8 --dump plan --json")
    assert ran.code == 2 and "--dump and --json both print to stdout" in ran.err
    assert api.calls == []


def test_dumped_problem(api: FakeApi, run: Run) -> None:
    ran = run("model.py --gpus 8 --dump-problem problems/p.json.gz")
    assert ran.code == 0
    assert "  problems/p.json.gz\n" in ran.out
    assert [path.name for path in Path("problems").iterdir()] == ["p.json.gz"]


def test_an_earlier_plan_is_replaced(api: FakeApi, run: Run) -> None:
    run("model.py --gpus 8")
    api.answer.text = "better"  # type: ignore[union-attr]
    assert run("model.py --gpus 8").code == 0
    assert Path("plan_out/sharded_model.py").read_text() == "# better\n"
    assert json.loads(Path("plan_out/plan.json").read_text())["text"] == "better"
    assert len(list(Path("plan_out").iterdir())) == 2


def test_an_empty_folder_is_used(api: FakeApi, run: Run) -> None:
    Path("plan_out").mkdir()
    assert run("model.py --gpus 8").code == 0


# --- refusals: exit code 2, before any work, nothing written ------------------------------------


@pytest.mark.parametrize(
    "existing, content, message",
    [
        ("plan_out/thesis.tex", "", "`plan_out` holds `thesis.tex`, which is not a plan"),
        ("plan_out/plan.json", "{}", "`plan_out` holds `plan.json`, which is not a plan"),
        ("plan_out/plan.json", "not json", "`plan_out` holds `plan.json`, which is not a plan"),
        ("plan_out/sharded_model.py", "", "holds `sharded_model.py`, which is not a plan"),
        ("plan_out", "", "--out `plan_out` is a file; name a folder"),
    ],
)
def test_an_output_folder_that_holds_something_else(
    existing: str, content: str, message: str, api: FakeApi, run: Run
) -> None:
    Path(existing).parent.mkdir(exist_ok=True)
    Path(existing).write_text(content)
    ran = run("model.py --gpus 8")
    assert ran.code == 2
    assert ran.err.startswith("plan: error: ") and message in ran.err
    assert ran.out == "" and api.calls == []
    assert Path(existing).read_text() == content
    assert len([path for path in Path().rglob("*") if path.is_file()]) == 1


def test_a_file_where_a_folder_should_be_made(api: FakeApi, run: Run) -> None:
    Path("notes").write_text("")
    for words in ("--out notes/plan", "--dump-problem notes/p.json"):
        ran = run(f"model.py --gpus 8 {words}")
        assert ran.code == 2 and "is a file, not a folder" in ran.err
    assert api.calls == []


@pytest.mark.parametrize("fails_at", ["module_source", "dump_problem"])
@pytest.mark.parametrize("earlier", [True, False])
def test_nothing_is_half_written(fails_at: str, earlier: bool, api: FakeApi, run: Run) -> None:
    if earlier:
        run("model.py --gpus 8 --out a/plan")
    before = {path: path.read_text() for path in Path().rglob("*") if path.is_file()}
    api.answer.text, api.answer.fails_at = "new", fails_at  # type: ignore[union-attr]

    ran = run("model.py --gpus 8 --out a/plan --dump-problem b/p.json")

    assert ran.code == 2 and "No space left on device" in ran.err and ran.out == ""
    assert {path: path.read_text() for path in Path().rglob("*") if path.is_file()} == before
    assert Path("a").exists() == earlier and not Path("b").exists()


def test_what_the_planner_refuses(api: FakeApi, run: Run) -> None:
    api.answer = ValueError("model.py defines no `build_model`")
    ran = run("model.py --gpus 8")
    assert ran.code == 2 and ran.out == ""
    assert ran.err.splitlines()[-1] == "plan: error: model.py defines no `build_model`"
    assert list(Path().iterdir()) == []


def test_no_plan_fits(api: FakeApi, run: Run) -> None:
    errors = sys.modules["shardwright.planner.errors"]
    api.answer = errors.InfeasibleError("no plan fits: 83.1 GB of 80.0 GB")
    ran = run("model.py --gpus 8")
    assert ran.code == 1 and ran.out == ""
    assert ran.err.splitlines()[-1] == "plan: no plan fits: 83.1 GB of 80.0 GB"
    assert list(Path().iterdir()) == []


def test_a_mistake_of_ours_is_not_dressed_up_as_the_users(api: FakeApi) -> None:
    api.answer = KeyError("wte")
    with pytest.raises(KeyError, match="wte"):
        cli.main(["model.py", "--gpus", "8"])


@pytest.mark.parametrize(
    "words, message",
    [
        ("", "Missing argument 'MODEL'"),
        ("model.py", "how many GPUs? Give --gpus N, e.g. --gpus 8, or a --layout"),
        ("model.py --gpus 8 --layout fsdp=8 --write 1", "--write chooses among several --layout"),
        ("model.py --gpu 8", "--gpus"),
        ("model.py --gpus 8 --optimiser sgd", "--optimizer"),
        ("model.py --gpus 8 --memroy 3GB", "--memory"),
        ("model.py --gpus 0", "Invalid value for '--gpus'"),
        ("model.py --gpus eight", "Invalid value for '--gpus'"),
        ("model.py --gpus 8 --memory 80X", "`80X` is not a size"),
        ("model.py --gpus 8 --phase trian", "'train', 'prefill', 'decode', 'append', 'serve'"),
        ("model.py --gpus 8 --phase decode --context -1", "Invalid value for '--context'"),
        ("model.py --gpus 8 --output-tokens 0", "Invalid value for '--output-tokens'"),
        ("model.py other.py --gpus 8", "unexpected extra argument"),
        ("show", "Missing argument 'DIR'"),
        ("verify plan_out --rank 2", "--ranks"),
    ],
)
def test_usage_errors(words: str, message: str, api: FakeApi, run: Run) -> None:
    ran = run(words)
    assert ran.code == 2
    assert message in ran.err
    assert ran.out == "" and api.calls == []


# --- further commands ---------------------------------------------------------------------------


def test_show(api: FakeApi, run: Run) -> None:
    run("model.py --gpus 8")
    assert run("show plan_out").out == "8.1 ms per step, 1.4x faster than FSDP\n"
    assert json.loads(run("show plan_out --json").out) == api.answer.to_json()  # type: ignore[union-attr]


@pytest.mark.parametrize("command", ["show", "verify"])
def test_no_plan_there(command: str, api: FakeApi, run: Run) -> None:
    ran = run(f"{command} nowhere")
    assert ran.code == 2
    assert "there is no plan in `nowhere`" in ran.err and "--out nowhere" in ran.err


@pytest.mark.parametrize("verified, code", [(True, 0), (False, 1)])
def test_verify(verified: bool, code: int, api: FakeApi, run: Run) -> None:
    run("model.py --gpus 8")
    api.verified = verified
    ran = run("verify plan_out --ranks 4")
    assert ran.code == code
    assert ran.out == f"largest error: {'1e-12' if verified else '0.3'}\n"
    assert api.calls[-1] == ("verify", {"folder": Path("plan_out"), "ranks": 4, "model": None})


def test_verify_chooses_the_ranks_by_itself(api: FakeApi, run: Run) -> None:
    run("model.py --gpus 8")
    run("verify plan_out")
    assert api.calls[-1] == ("verify", {"folder": Path("plan_out"), "ranks": None, "model": None})


def test_solve(api: FakeApi, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[object, ...]] = []

    def solve_file(*arguments: object) -> str:
        calls.append(arguments)
        return "cost 445, bound 445, optimal"

    monkeypatch.setattr("shardwright.planner.iopddl.solve_file", solve_file)
    Path("p.json").write_text("{}")
    ran = run("solve p.json --time-limit 30 --solver pyomo")
    assert (ran.code, ran.out) == (0, "cost 445, bound 445, optimal\n")
    assert calls == [(Path("p.json"), 30.0, "pyomo")]


def test_solve_without_a_file(api: FakeApi, run: Run) -> None:
    ran = run("solve p.json")
    assert ran.code == 2
    assert ran.err == "plan: error: there is no file `p.json`\n"

"""What plans promise of one GPU, and what their modules do there.

    python -m benchmarks.gpu --prepare      # anywhere with the solver: writes gpu_plans/
    python -m benchmarks.gpu [CASE ...]     # on a machine with a GPU

The second command needs torch, transformers and this project's source on PYTHONPATH, and no
network.  It runs rank 0 of each plan; its peers are torch's fake process group, so communication
costs nothing, and is left out of what is predicted, too.  Each case runs in a process of its own:
time per step (median of several, all work on the device done), the time in which the GPU computes
(the sum of its kernels in one step, by torch's profiler), and peak memory.  Weights are random.

Where the plan is for one GPU, transformers' model runs in the same process, with the same weights,
and the last logits are compared.  `--tiny` prepares models of two narrow layers for the CPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist

_CONFIGS = Path(__file__).parents[1] / "examples" / "configs"
_FOLDER = Path("gpu_plans")
_SECONDS = 120  # that a case may take, compilation included
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "vocab_size": 256,
}
_LLAMA_1B = {
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_hidden_layers": 16,
    "tie_word_embeddings": True,
}


@dataclass(frozen=True, slots=True)
class Case:
    """A plan: a configuration with some sizes changed, and the options of `plan`."""

    config: str
    options: str
    sizes: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def phase(self) -> str:
        """The phase that is planned."""
        words = self.options.split()
        return words[words.index("--phase") + 1] if "--phase" in words else "train"

    @property
    def alone(self) -> bool:
        """Is the plan for one GPU?"""
        return "--gpus 1 " in f"{self.options} "


CASES = {
    "8b train, DDP on 8": Case(
        "llama3-8b", "--gpus 8 --batch 8 --seq 8192 --mesh 8 --pin *.weight=R --memory 76GB"
    ),
    "8b train in 40 GB": Case("llama3-8b", "--gpus 8 --batch 8 --seq 8192 --mesh 8 --memory 40GB"),
    "1b train": Case(
        "llama3-8b", "--gpus 1 --batch 4 --seq 2048 --optimizer none --memory 76GB", _LLAMA_1B
    ),
    "8b prefill": Case("llama3-8b", "--gpus 1 --batch 16 --seq 2048 --phase prefill"),
    "8b decode": Case("llama3-8b", "--gpus 1 --batch 16 --context 2174 --phase decode"),
    "70b decode on 8": Case("llama3-70b", "--gpus 8 --batch 16 --context 4606 --phase decode"),
    "Gemma 2 9b prefill on 8": Case("gemma2-9b", "--gpus 8 --batch 1 --seq 4096 --phase prefill"),
}


# --- plans, made beforehand ----------------------------------------------------------------------


def prepare(folder: Path, cases: Sequence[str], cluster: str, *, tiny: bool) -> None:
    """Write each case's plan, and beside it what it predicts without communication."""
    for name in cases:
        case, own = CASES[name], folder / _slug(name)
        own.mkdir(parents=True, exist_ok=True)
        sizes = dict(case.sizes) | (_TINY if tiny else {})
        config = json.loads((_CONFIGS / case.config / "config.json").read_text()) | sizes
        (own / "config.json").write_text(json.dumps(config))
        options = _tiny_options(case.options) if tiny else case.options.split()
        words = [str(own), *options, "--cluster", cluster, "--out", str(own / "plan")]
        _run([sys.executable, "-m", "shardwright.cli", *words], 300)
        _write_prediction(own)
        print(f"{name}: {own}", flush=True)


def _tiny_options(options: str) -> list[str]:
    """The same with few tokens, and in whatever memory there is."""
    words = options.split()
    short = {"--seq": "32", "--context": "40", "--memory": "4GB"}
    return [short.get(before, word) for before, word in zip(["", *words], words, strict=False)]


def _write_prediction(own: Path) -> None:
    from shardwright.api import load_plan
    from shardwright.planner.report.report import split_seconds

    plan = load_plan(own / "plan" / "plan.json")
    moved = sum(split_seconds(plan)[1].values())
    predicted = {"seconds": plan.seconds - moved, "bytes": plan.memory.total}
    (own / "predicted.json").write_text(json.dumps(predicted))


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name.lower())


def _run(command: list[str], seconds: float) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


# --- one case, in a process of its own -----------------------------------------------------------


@dataclass(slots=True)
class Measured:
    """Seconds of a step and bytes; None where that was not measured."""

    eager: float | None = None
    compiled: float | None = None
    captured: float | None = None
    busy: float | None = None
    peak: int | None = None
    theirs: float | None = None
    difference: float | None = None
    compiling: float | None = None
    failed: dict[str, str] = field(default_factory=dict[str, str])  # column -> why


def measure(name: str, folder: Path) -> Measured:
    """One case on the device of this process."""
    own, case = folder / _slug(name), CASES[name]
    module = _load(own / "plan" / "sharded_model.py")
    mesh = module.ShardedModel.MESH
    _start(torch.Size(mesh.values()).numel())
    model = module.ShardedModel(device=_device(), compile=False)
    _random_weights(model)
    if case.phase == "train":
        return _training(model, own, case)
    return _decoding(model, own, case) if case.phase == "decode" else _prefill(model, own, case)


def _training(model: Any, own: Path, case: Case) -> Measured:
    whole = {
        name: torch.randint(0, each.high, each.shape, device=_device())
        for name, each in model.INPUTS.items()
    }
    batch = model.shard_inputs(**whole)
    trained = list(model.parameters())
    fused = _device().type == "cuda"
    optimizer = None if model.OPTIMIZER == "none" else torch.optim.AdamW(trained, fused=fused)
    found = Measured()
    if case.alone:
        found.theirs, found.difference = _theirs_training(model, own, whole)

    def step() -> None:
        _loss(model(**batch)).backward()
        if optimizer is not None:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    found.eager, found.peak = _seconds(step), _peak()
    _compile(model, step, found)
    found.busy = _busy(step)
    return found


def _prefill(model: Any, own: Path, case: Case) -> Measured:
    ids = _ids(model)
    model.new_cache(*ids.shape)

    def step() -> None:
        model.prefill(ids)

    found = Measured()
    if case.alone:
        found.theirs, found.difference = _theirs_prefill(model, own, ids)
    found.eager, found.peak = _seconds(step), _peak()
    _compile(model, step, found)
    found.busy = _busy(step)
    return found


def _decoding(model: Any, own: Path, case: Case) -> Measured:
    ids = _ids(model)[:, 0]
    found = Measured()
    step = partial(model.decode, ids)
    _fill(model, len(ids), capture=False)
    found.eager, found.peak = _seconds(step), _peak()
    if _device().type == "cuda":
        found.busy = _busy(step)
        _fill(model, len(ids), capture=True)
        found.captured, found.busy = _seconds(step), _busy(step)
    if case.alone:
        found.theirs = _theirs_decoding(model, own, ids)
    return found


def _fill(model: Any, batch: int, *, capture: bool) -> None:
    """As many cached tokens as planned, and room for those that are measured."""
    model.new_cache(batch, model.CONTEXT + 64, capture=capture)
    model.serving.fill(model.CONTEXT)


def _ids(model: Any) -> torch.Tensor:
    tokens = model.INPUTS["input_ids"]
    return torch.randint(0, tokens.high, tokens.shape)


def _loss(out: Any) -> torch.Tensor:
    return out["loss"] if isinstance(out, Mapping) else out.loss


def _compile(model: Any, step: Callable[[], None], found: Measured) -> None:
    """Seconds of a step with compiled layers, and of the first one; or why there are none."""
    try:
        model.compile_layers()
        start = time.perf_counter()
        step()
        _wait()
        found.compiling = time.perf_counter() - start
        found.compiled = _seconds(step)
    except RuntimeError as error:
        found.failed["compiled"] = str(error)


# --- transformers beside -------------------------------------------------------------------------


def _original(model: Any, own: Path) -> Any:
    """transformers' model with the weights of ours, which is on one GPU."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(own)
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    theirs.to_empty(device=_device())
    for module in theirs.modules():
        if hasattr(module, "inv_freq"):
            with _device():
                fresh = type(module)(config=config)
            module.inv_freq = fresh.inv_freq
            module.original_inv_freq = fresh.original_inv_freq
    theirs.load_state_dict(model.full_state_dict(), strict=False, assign=True)
    return theirs


def _theirs_training(
    model: Any, own: Path, whole: Mapping[str, torch.Tensor]
) -> tuple[float, float]:
    """(seconds of forward and backward under `torch.compile`, difference of the losses)."""
    theirs = _original(model, own)
    with torch.no_grad():
        difference = _loss(theirs(**whole)) - _loss(model(**model.shard_inputs(**whole)))
    compiled = torch.compile(theirs)

    def step() -> None:
        _loss(compiled(**whole)).backward()
        theirs.zero_grad(set_to_none=True)

    return _seconds(step), abs(difference.item())


def _theirs_prefill(model: Any, own: Path, ids: torch.Tensor) -> tuple[float, float]:
    """(seconds of their forward, relative difference of the last logits)."""
    theirs, ids = _original(model, own), ids.to(_device())
    with torch.no_grad():
        wanted = theirs(ids, logits_to_keep=1).logits[:, -1].float()
        difference = (model.prefill(ids.cpu()).float() - wanted).norm() / wanted.norm()
        seconds = _seconds(lambda: theirs(ids, logits_to_keep=1, use_cache=True))
    return seconds, difference.item()


def _theirs_decoding(model: Any, own: Path, ids: torch.Tensor) -> float:
    """Seconds of a token of their `generate` with a static cache, which compiles the step."""
    theirs = _original(model, own)
    prompt = torch.randint(0, 100, (len(ids), model.CONTEXT), device=_device())
    options: dict[str, Any] = dict(
        do_sample=False, cache_implementation="static", eos_token_id=None
    )
    few, many = (
        _seconds(lambda n=n: theirs.generate(prompt, max_new_tokens=n, **options), 1)
        for n in (4, 36)
    )
    return (many - few) / 32


# --- clocks --------------------------------------------------------------------------------------


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _wait() -> None:
    if _device().type == "cuda":
        torch.cuda.synchronize()


def _seconds(step: Callable[[], object], rounds: int = 5) -> float:
    """Median of some rounds after two."""
    for _ in range(2):
        step()
    took: list[float] = []
    for _ in range(rounds):
        _wait()
        start = time.perf_counter()
        step()
        _wait()
        took.append(time.perf_counter() - start)
    return median(took)


def _busy(step: Callable[[], None]) -> float | None:
    """Seconds in which the device computes in one step."""
    if _device().type != "cuda":
        return None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
        _wait()
    return sum(event.self_device_time_total for event in profile.key_averages()) / 1e6


def _peak() -> int | None:
    if _device().type != "cuda":
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return peak


def _start(ranks: int) -> None:
    """Rank 0 of `ranks`, the others pretended."""
    if ranks == 1:
        return
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())


def _random_weights(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 0.02).add_(float(weight.ndim == 1 and name.endswith("weight")))


def _load(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location("sharded_model", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# --- all of them ---------------------------------------------------------------------------------

_COLUMNS = ("predicted", "eager", "compiled", "captured", "busy", "theirs")


def main() -> None:
    """See the file's own words."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("cases", nargs="*", default=list(CASES), help="default: all")
    parser.add_argument("--folder", type=Path, default=_FOLDER)
    parser.add_argument("--prepare", action="store_true", help="write the plans")
    parser.add_argument("--cluster", default="h200", help="of which GPUs, for --prepare")
    parser.add_argument("--tiny", action="store_true", help="prepare narrow models, for the CPU")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if unknown := [name for name in asked.cases if name not in CASES]:
        parser.error(f"no case {', '.join(unknown)}; there are: {', '.join(CASES)}")
    if asked.prepare:
        prepare(asked.folder, asked.cases, asked.cluster, tiny=asked.tiny)
    elif asked.one:
        print(json.dumps(asdict(measure(asked.cases[0], asked.folder))))
    else:
        _print_all(asked.cases, asked.folder)


def _print_all(cases: Sequence[str], folder: Path) -> None:
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "the CPU"
    print(f"{where}, torch {torch.__version__}; ms per step, GB\n")
    print(f"{'':26}" + "".join(f"{column:>11}" for column in _COLUMNS), end="")
    print(f"{'GB':>8}{'peak':>8}{'diff':>10}{'first':>9}")
    for name in cases:
        predicted = json.loads((folder / _slug(name) / "predicted.json").read_text())
        command = [sys.executable, "-m", "benchmarks.gpu", "--one", "--folder", str(folder), name]
        found = json.loads(_run(command, _SECONDS).splitlines()[-1])
        found |= {"predicted": predicted["seconds"]}
        times = "".join(_number(found[column], 1e3, 11) for column in _COLUMNS)
        memory = _number(predicted["bytes"], 1e-9, 8) + _number(found["peak"], 1e-9, 8)
        rest = f"{found['difference']:>10.1e}" if found["difference"] is not None else " " * 10
        first = f"{found['compiling']:>7.1f} s" if found["compiling"] is not None else ""
        print(f"{name:26}{times}{memory}{rest}{first}", flush=True)
        for column, why in found["failed"].items():
            print(f"    {column}: {why[:400]}", flush=True)


def _number(x: float | None, scale: float, width: int) -> str:
    return f"{'':>{width}}" if x is None else f"{x * scale:>{width}.1f}"


if __name__ == "__main__":
    main()

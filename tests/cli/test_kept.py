"""What earlier runs captured serves again, and only where nothing has changed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from shardwright import capturing, kept
from shardwright.api import Plan, plan_file
from shardwright.kept import Captured, Kept
from shardwright.loading import load_target

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32,
    "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_hidden_layers": 2, "vocab_size": 64, "max_position_embeddings": 64,
}  # fmt: skip
OPTIONS: dict[str, Any] = {
    "gpus": 2, "cluster": "cpu", "phase": "train", "batch": 4, "seq": 16, "dtype": None,
    "memory_bytes": None, "mesh": None, "pins": (), "optimizer": "adamw", "solver": "highs",
    "time_limit_s": 60.0,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model's folder, and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path / "model"


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The targets that were loaded since."""
    seen: list[str] = []

    def watched(target: str, **options: Any) -> Any:
        seen.append(target)
        return load_target(target, **options)

    monkeypatch.setattr(capturing, "load_target", watched)
    return seen


def planned(folder: Path, **options: Any) -> Plan:
    return plan_file(str(folder), **{**OPTIONS, **options})


def told(plan: Plan) -> dict[str, Any]:
    """A plan's data without how long the search took."""
    data = plan.to_json()
    for each in (data, data["decode"] or {}):
        each.pop("search", None)
    return data


@pytest.mark.parametrize(
    "options", [{}, {"precision": "mixed"}, {"phase": "serve", "output_tokens": 4}], ids=str
)
def test_a_second_run_gives_the_same_plan(
    folder: Path, loads: list[str], options: dict[str, Any]
) -> None:
    first = planned(folder, **options)
    assert len(loads) == 1
    again = planned(folder, **options)
    assert len(loads) == 1 and told(again) == told(first)
    planned(folder, **options, cache=False)
    assert len(loads) == 2


@pytest.mark.long
def test_what_a_capture_depends_on_is_captured_again(folder: Path, loads: list[str]) -> None:
    changes = [
        {}, {"batch": 8}, {"seq": 8}, {"phase": "prefill", "optimizer": "none"},
        {"dtype": "float64"}, {"outputs": ("loss",)}, {"micro_batches": 2},
    ]  # fmt: skip
    for count, change in enumerate(changes, start=1):
        planned(folder, **change)
        assert len(loads) == count, change
    for change in ({"gpus": 4}, {"mesh": "2"}, {"cluster": "h100"}, {"memory_bytes": 10**9}):
        planned(folder, **{"precision": "own", **change})
    assert len(loads) == len(changes)


def test_another_configuration_or_version_is_another_model(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = Kept.of(str(folder))
    assert one is not None and one == Kept.of(str(folder / "config.json"))
    (folder / "config.json").write_text(json.dumps(CONFIG | {"rope_theta": 5000.0}))
    assert Kept.of(str(folder)) not in (one, None)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    assert Kept.of(str(folder)) == one
    monkeypatch.setattr(kept, "_version", lambda name: "99.0")
    assert Kept.of(str(folder)) not in (one, None)


def test_what_may_change_unseen_is_not_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "model.py").write_text("")
    assert Kept.of(str(folder / "model.py")) is None
    assert Kept.of(str(folder / "nothing.json")) is None

    class Edited:
        version = "1.0"

        def read_text(self, name: str) -> str:
            return '{"dir_info":{"editable":true},"url":"file:///home"}'

    monkeypatch.setattr(kept, "distribution", lambda name: Edited())
    assert Kept.of(str(folder)) is None


@pytest.mark.parametrize("graphs", ["", "{}", '{"graphs": [{}]', '{"graphs": []', "[1]"])
@pytest.mark.some(1)
def test_a_damaged_file_is_captured_again(folder: Path, loads: list[str], graphs: str) -> None:
    first = planned(folder)
    (file,) = (folder.parent / "cache" / "shardwright" / "captures").iterdir()
    text = f'{graphs}, "narrow": false}}' if "graphs" in graphs else graphs
    file.write_bytes(gzip.compress(text.encode()) if text else b"")
    assert told(planned(folder)) == told(first) and len(loads) == 2
    assert told(planned(folder)) == told(first) and len(loads) == 2


def test_old_ones_go(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "_MOST_FILES", 3)
    found = Kept.of(str(folder))
    assert found is not None
    for number in range(5):
        found.write((number,), Captured((), False))
    assert len(list((folder.parent / "cache" / "shardwright" / "captures").iterdir())) == 3


def test_a_file_that_changes_meanwhile_is_not_kept(
    folder: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def edited(target: str, **options: Any) -> Any:
        (folder / "config.json").write_text(json.dumps(CONFIG | {"vocab_size": 128}))
        return load_target(target, **options)

    with monkeypatch.context() as patch:
        patch.setattr(capturing, "load_target", edited)
        planned(folder)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    planned(folder)
    assert len(loads) == 1  # what was captured of the other file is not taken


def test_a_cache_that_cannot_be_written_is_none(
    folder: Path, loads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "file"))
    assert told(planned(folder)) == told(planned(folder)) and len(loads) == 2

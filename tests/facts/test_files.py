"""Files from anyone: what is read, and that everything else ends soon, in one sentence."""

from __future__ import annotations

import gzip
import os
from pathlib import Path

import pytest

from shardwright.facts.files import DataError, read_json, read_text, read_toml

READERS = {".json": read_json, ".toml": read_toml, ".txt": read_text, ".gz": read_json}


def test_what_is_read(tmp_path: Path) -> None:
    text = '{"a": [1, 2.5, -9223372036854775808, 1e3, "ü", null, true]}'
    for name, data in (("x.json", text.encode()), ("x.json.gz", gzip.compress(text.encode()))):
        (tmp_path / name).write_bytes(data)
        want = {"a": [1, 2.5, -(2**63), 1000.0, "ü", None, True]}
        assert read_json(tmp_path / name) == want
    (tmp_path / "x.toml").write_text('a = 0x10\n[b]\nc = 1e9 # "\n')
    assert read_toml(tmp_path / "x.toml") == {"a": 16, "b": {"c": 1e9}}


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("x.json", b"{", "is not JSON: line 1: "),
        ("x.json", b'{"a": NaN}', "NaN is not a finite number"),
        ("x.json", b'{"a": -Infinity}', "-Infinity is not a finite number"),
        ("x.json", b'{"a": 1e400}', "the number 1e400 is not finite"),
        ("x.json", b'{"a": 1' + b"0" * 5000 + b"}", "has more than 64 bits"),
        ("x.json", b'{"a": 18446744073709551616}', "has more than 64 bits"),
        ("x.json", b"[" * 100_000, "nested too deeply"),
        ("x.json", b'{"a": "\xff"}', "is not text in UTF-8"),
        ("x.json.gz", b"{}", "is not in the gzip format"),
        ("x.json.gz", gzip.compress(b"{}", mtime=0)[:-3], "ends in the middle"),
        ("x.toml", b"a = ", "is not valid TOML: "),
        ("x.toml", b"a = [{b = 99999999999999999999}]", "has more than 64 bits"),
        ("x.toml", b"a = 0x" + b"f" * 9000, "has more than 64 bits"),
        ("x.toml", b"a = " + b"[" * 50_000, "nested too deeply"),
        ("x.toml", b"#" * 2_000_000, "holds more than 1 MB"),
    ],
)
def test_refused(tmp_path: Path, name: str, data: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError) as caught:
        READERS[path.suffix](path)
    message = str(caught.value)
    assert says in message and str(path) in message and "\n" not in message


def test_a_small_file_of_many_bytes(tmp_path: Path) -> None:
    path = tmp_path / "bomb.json.gz"
    path.write_bytes(gzip.compress(b" " * 50_000_000, mtime=0))
    with pytest.raises(DataError, match="more than 10 MB"):
        read_json(path, limit=10_000_000)


def test_what_is_no_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.json")  # opening it would wait for a writer
    for path in (tmp_path / "pipe.json", Path("/dev/zero"), tmp_path, tmp_path / "none.json"):
        with pytest.raises(DataError, match="give a regular file|cannot read"):
            read_json(path)
    with pytest.raises(DataError, match="null"):
        read_text("a\0b")

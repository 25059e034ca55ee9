"""What a target's own parser makes of a text: `python parse.py PARSERS TARGET FILE` prints JSON.

Run in a process of its own: it imports large parts of other tools, with stand-ins for what they
import and their parsers do not use.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.abc
import importlib.machinery
import json
import shlex
import sys
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# By target, modules that are not there, or would bring in more that is not
ABSENT = {
    "megatron": ("megatron.core.transformer.moe.ops.paged_stash",),
    "vllm": (
        "vllm.reasoning", "vllm.parser", "vllm.v1.structured_output", "cbor2", "urllib3",
        "aiohttp", "requests", "cloudpickle", "cachetools", "uvloop", "cpuinfo",
        "prometheus_client", "fastapi",
    ),
    "sglang": ("aiohttp", "starlette", "requests", "triton", "torchcodec"),
    "torchtitan": ("torchtitan.components.quantization",),
}  # fmt: skip


class _Kind(type):
    """The class of stand-ins for classes: they have any attribute and may be written in types."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(name)

    def __or__(cls, other: object) -> Any:
        return cls

    __ror__ = __or__

    def __getitem__(cls, other: object) -> Any:
        return cls

    def __iter__(cls) -> Any:
        return iter(())

    def __new__(cls, name: str, bases: Any, space: Any, **options: Any) -> Any:
        return type.__new__(cls, name, bases, space)

    def __init__(cls, name: str, bases: Any, space: Any, **options: Any) -> None:
        super().__init__(name, bases, space)


def _stand_in(name: str) -> Any:
    def made(self: object, *args: Any, **options: Any) -> None:
        return None

    def called(self: object, *args: Any, **options: Any) -> Any:
        return args[0] if args else self

    def attribute(self: object, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _stand_in(name)

    body = {"__init__": made, "__call__": called, "__getattr__": attribute}
    return _Kind(name, (Exception,), body)


class _Module(types.ModuleType):
    __path__: list[str] = []
    __version__ = "0.0.0"

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, _stand_in(name))
        return getattr(self, name)


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def __init__(self, names: Sequence[str]) -> None:
        self._names = names

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if any(fullname == name or fullname.startswith(name + ".") for name in self._names):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        return None


def flags_of(text: str) -> list[str]:
    """The words of a file of flags."""
    return shlex.split(text, comments=True)


def megatron(path: Path) -> dict[str, Any]:
    from megatron.training.arguments import add_megatron_arguments  # type: ignore

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    return vars(parser.parse_args(flags_of(path.read_text())))


def vllm(path: Path) -> dict[str, Any]:
    from vllm.engine.arg_utils import EngineArgs  # type: ignore
    from vllm.utils.argparse_utils import FlexibleArgumentParser  # type: ignore

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    return vars(parser.parse_args(flags_of(path.read_text())))


def sglang(path: Path) -> dict[str, Any]:
    from sglang.srt.server_args import ServerArgs  # type: ignore

    parser = argparse.ArgumentParser(allow_abbrev=False)
    ServerArgs.add_cli_args(parser)
    return vars(parser.parse_args(["--model-path", "model", *flags_of(path.read_text())]))


def torchtitan(path: Path) -> dict[str, Any]:
    from torchtitan.config.manager import ConfigManager  # type: ignore

    config = ConfigManager().parse_args(["--job.config_file", str(path)])
    return dataclasses.asdict(config)


def sdy(path: Path) -> dict[str, Any]:
    from jaxlib.mlir import ir  # type: ignore
    from jaxlib.mlir._mlir_libs import _jax_mlir_ext  # type: ignore
    from jaxlib.mlir.dialects import sdy as dialect  # type: ignore

    with ir.Context() as context:
        dialect.register_dialect(context)
        registry = ir.DialectRegistry()
        _jax_mlir_ext.register_dialects(registry)
        context.append_dialect_registry(registry)
        context.load_all_available_dialects()
        context.allow_unregistered_dialects = True
        module = ir.Module.parse(path.read_text())
        return {"verified": module.operation.verify(), "text": str(module)}


if __name__ == "__main__":
    folder, target, file = sys.argv[1:]
    sys.path.append(folder)
    if target != "sdy":
        import torch  # noqa: F401  # before stand-ins are there for what it looks for
        import torch.distributed  # noqa: F401
        import typing_extensions

        if target in ("vllm", "sglang"):
            import transformers  # noqa: F401

        if not hasattr(typing, "override"):  # megatron-core asks for Python 3.12
            typing.override = typing_extensions.override  # type: ignore
        sys.meta_path.insert(0, _StandIns(ABSENT[target]))
    found = globals()[target](Path(file))
    print(json.dumps(found, default=str))

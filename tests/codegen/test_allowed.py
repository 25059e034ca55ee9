"""What may stand in a generated module, and what is refused with its line."""

from __future__ import annotations

import pytest

from shardwright.codegen.allowed import check_module
from shardwright.facts.users import Import

MODULE = """\"\"\"Honest.\"\"\"

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwright.runtime import Layer, Param, ShardedModule, ops


def rotate_half(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


class Attention(Layer):
    q_proj: nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        dp = self.mesh["dp"]
        y = rotate_half(dp.all_reduce(self.q_proj(x), backward="all_reduce"))
        z = torch.ops.aten.roll.default(self=y, **{"from": 1})
        LINE
        return z * x.size(0)


class ShardedModel(ShardedModule):
    MESH = {"dp": 2}
    LAYERS = {"layers": [Attention] * 2}
    PARAMETERS = {"layers.{0,1}.q_proj.weight": Param((8, 8), torch.float32, "R")}

    def forward(self, x: Tensor) -> object:
        for layer in self.layers:
            x = self.recompute(layer, layer(x))
        return self.pack(x)


if __name__ == "__main__":
    ShardedModel.demo()
"""


@pytest.mark.parametrize(
    "line",
    [
        "y = torch.cat((z.to(torch.float32), y[0], y[..., 1:]), dim=-1)",
        "y = F.dropout(x, 0.1 if self.training else 0.0)",
        "y = ops.attention(x, layout=ops.Layout.zigzag(x.size(1) * dp.size, dp.size))",
        "y = self.mesh['dp'].all_gather(self.q_proj.weight, 0)",
        'y = x.masked_fill(y, float("-inf"))',
        "y = torch.ops.aten.__and__.Tensor(x, y)",
        "y = self.layers[0].q_proj(x)",
    ],
)
def test_what_an_honest_module_holds(line: str) -> None:
    check_module(MODULE.replace("LINE", line))


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "y = open",
        "y = eval('1')",
        "y = getattr(x, 'a')",
        "y = lambda: 1",
        "y = [i for i in x]",
        "y = f'{x}'",
        "y = x.__class__",
        "y = self.q_proj.__init__",
        "y = self.mesh._group",
        "y = self.save_checkpoint('x')",
        "y = self.q_proj.register_forward_hook(x)",
        "y = self.dp(x)",
        "y = torch.load('x')",
        "y = torch.save(x, 'x')",
        "y = torch.from_file('x')",
        "y = torch.hub",
        "y = torch.ops.load_library('x')",
        "y = torch.ops.import_module('x')",
        "y = ops.import_user('a.py')",
        "y = ops.import_user('a.py').f(x)",
        "ops.import_user('a.py')",
        "y = torch.ops.aten.roll.default.__globals__",
        "y = ops._secret(x)",
        "y = ops.attention",
        "y = nn.Module.__subclasses__()",
        "y = x.apply_(torch.cat)",
        "y = x.numpy()",
        "torch = x",
        "self.q_proj = x",
        "x.reshape(1)",
        "del x",
        "y = unknown",
        "y = x(1)",
        "y = ShardedModel.demo()",
        "while True: y = x",
        "raise x",
        "def inner(): pass",
        "y = 1 +",
    ],
)
def test_what_no_module_holds_is_refused_with_its_line(line: str) -> None:
    with pytest.raises(ValueError, match=r"^line 24 of the generated module would hold .* again$"):
        check_module(MODULE.replace("LINE", line))


@pytest.mark.parametrize(
    "old, new",
    [
        ("import torch\n", "import torch, os\n"),
        ("import Layer, Param", "import Layer as Param"),
        ("import Layer, Param", "import run_ranks, Param"),
        ("(Layer):", "(Layer, metaclass=Param):"),
        ("    q_proj: nn.Linear", "    q_proj: print('x')"),
        ("    def forward(self, x: Tensor) -> object", "    @print\n    def forward(self, x)"),
        ('{"dp": 2}', '{"dp": __import__("os")}'),
        ("ShardedModel.demo()", "ShardedModel.demo('x')"),
    ],
)
def test_other_parts_are_refused(old: str, new: str) -> None:
    honest = MODULE.replace("LINE", "y = x")
    assert old in honest
    with pytest.raises(ValueError, match="of the generated module would hold"):
        check_module(honest.replace(old, new))


OPS = "import Layer, Param, ShardedModule, ops\n"


@pytest.mark.parametrize("place", ["/my models/a.py", "mypackage.ops"])
def test_what_defines_the_users_operators_may_be_imported(place: str) -> None:
    line = f'ops.import_user("{place}")\n'
    module = MODULE.replace("LINE", "y = x").replace(OPS, OPS + line)
    check_module(module, [Import(place)])
    for other in (Import("/my models/b.py"), Import(place, "Round")):
        with pytest.raises(ValueError, match="^line 10 of the generated module would hold"):
            check_module(module, [other])


def with_function(line: str, call: str) -> str:
    return MODULE.replace("LINE", call).replace(OPS, OPS + line + "\n")


ROUND = 'Round = ops.import_user("a.py", "Up.Round")'


def test_the_users_functions_may_be_called() -> None:
    module = with_function(ROUND, "y = Round.apply(x, 1)[0]")
    check_module(module, [Import("a.py", "Up.Round")])
    with pytest.raises(ValueError, match="^line 10 of the generated module would hold"):
        check_module(module, [Import("a.py", "Round")])


@pytest.mark.parametrize(
    "line, call",
    [
        (ROUND, "y = Round(x)"),
        (ROUND, "y = Round.backward(x)"),
        (ROUND, "y = Round.apply.f(x)"),
        (ROUND, "y = Round"),
        (ROUND, "Round = x"),
        (f"{ROUND}\n{ROUND}", "y = x"),
        (ROUND.replace("Round =", "torch ="), "y = x"),
        (ROUND.replace("Round =", "Layer ="), "y = x"),
        (ROUND.replace("Round =", "Round = y ="), "y = x"),
        (ROUND.replace('.py", ', '.py", "b", '), "y = x"),
        (ROUND + ".apply", "y = x"),
        ('ops.import_user("a.py", "Up.Round")', "y = x"),
    ],
)
def test_nothing_else_is_done_with_them(line: str, call: str) -> None:
    with pytest.raises(ValueError, match="of the generated module would hold"):
        check_module(with_function(line, call), [Import("a.py", "Up.Round")])


@pytest.mark.parametrize(
    "place", ["os.__x", "a'.py", "/a.so", "http:a.py", "a;.py", "a\u202e.py", ""]
)
def test_no_place_but_a_module_or_the_plain_path_of_a_file_is_imported(place: str) -> None:
    line = f'ops.import_user("{place}")\n'
    module = MODULE.replace("LINE", "y = x").replace(OPS, OPS + line)
    with pytest.raises(ValueError, match="^line 10 of the generated module would hold"):
        check_module(module, [Import(place)])


@pytest.mark.parametrize("call", ['import_user("a.py", 1)', "import_user(a)", 'moe("a.py")'])
def test_the_line_has_one_form(call: str) -> None:
    module = MODULE.replace("LINE", "y = x").replace(OPS, OPS + f"ops.{call}\n")
    with pytest.raises(ValueError, match="^line 10 of the generated module would hold"):
        check_module(module, [Import("a.py")])

"""Bytes that training state takes, and that an optimizer step moves.

All sizes are those of one rank's part (`numel_local`), in bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

# Tensors of the parameter's size and dtype that the optimizer keeps between steps.
OPTIMIZERS = {
    "adamw": 2,  # torch.optim.AdamW: exp_avg and exp_avg_sq, made with zeros_like(parameter)
    "muon": 1,  # torch.optim.Muon: momentum_buffer
    "sgd": 0,  # torch.optim.SGD with its default momentum=0 keeps none; momentum would be 1
    "none": 0,  # gradients are computed but no step is taken
}
# Passes over tensors of the parameter's size that one step makes: the gradient is read, the
# parameter and each state are read and written.
_PASSES = {
    "adamw": 7,  # one fused kernel
    "muon": 10,  # runtime/training/muon.py: 3 momentum, 2.5 what is sent, 4.5 parameter, each apart
    "sgd": 3,
    "none": 0,
}


def stepped_by(optimizer: str, *, matrix: bool) -> str:
    """The optimizer that steps a parameter: Muon leaves what is no matrix to AdamW."""
    return "adamw" if optimizer == "muon" and not matrix else optimizer


@dataclass(frozen=True, slots=True)
class StateBytes:
    """Bytes one parameter takes on one rank."""

    parameter: int
    gradient: int
    optimizer: int

    @property
    def total(self) -> int:
        """All three together."""
        return self.parameter + self.gradient + self.optimizer


def parameter_state_bytes(
    numel_local: int,
    dtype_bytes: int,
    optimizer: str = "adamw",
    trainable: bool = True,
) -> StateBytes:
    """Bytes of a parameter, its gradient and its optimizer state on one rank.

    Gradient and states have the parameter's dtype, as in torch.  A parameter that is not trained,
    frozen or in a phase without a backward pass, has neither.

    >>> parameter_state_bytes(1000, 4, "adamw")
    StateBytes(parameter=4000, gradient=4000, optimizer=8000)
    """
    states = _checked(OPTIMIZERS, optimizer, "optimizer")
    if numel_local < 0 or dtype_bytes < 1:
        raise ValueError(f"{numel_local} elements of {dtype_bytes} bytes: impossible size")
    own = numel_local * dtype_bytes
    return StateBytes(own, own if trainable else 0, own * states if trainable else 0)


def optimizer_step_bytes(numel_local: int, dtype_bytes: int, optimizer: str) -> int:
    """Bytes that one optimizer step reads and writes for one parameter.

    >>> optimizer_step_bytes(1000, 4, "adamw")  # 1 + 2 + 2 * 2 passes over 4000 bytes
    28000
    """
    return numel_local * dtype_bytes * _checked(_PASSES, optimizer, "optimizer")


def _checked(table: dict[str, int], key: str, what: str) -> int:
    if key not in table:
        raise ValueError(f"unknown {what} `{key}`; expected one of {', '.join(table)}")
    return table[key]

"""The gate functions F of learned connections, each from a weight array to one value per connection."""
import math

import torch
import torch.nn as nn


class SigmoidGate(nn.Module):
    """F(w) = 1 / (1 + exp(-w))."""

    def __init__(self, size: int, init: float, **dd) -> None:
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.empty(size, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, math.log(self.init / (1. - self.init)))

    def forward(self) -> torch.Tensor:
        return torch.special.expit(self.weight)  # as quantization by torch.fx would round the result of a sigmoid


class GaussGate(nn.Module):
    """F(w) = exp(-k w^2), with one trained k > 0 for the whole weight array, kept positive by its logarithm."""

    def __init__(self, size: int, init: float, **dd) -> None:
        super().__init__()
        self.init = init
        self.weight = nn.Parameter(torch.empty(size, **dd))
        self.log_sharpness = nn.Parameter(torch.empty(1, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        sharpness = 10.  # k, as its author drew it
        nn.init.constant_(self.weight, math.sqrt(-math.log(self.init) / sharpness))
        nn.init.constant_(self.log_sharpness, math.log(sharpness))

    def forward(self) -> torch.Tensor:
        return torch.exp(-self.log_sharpness.exp() * self.weight.square())


class LinearGate(nn.Module):
    """F(w) = w, unbounded. Its author advises against it; it is here to compare with."""

    def __init__(self, size: int, init: float, **dd) -> None:
        super().__init__()
        self.init = init
        # another name than that of weights which mean something else, so that those do not load here
        self.linear_weight = nn.Parameter(torch.empty(size, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.linear_weight, self.init)

    @property
    def weight(self) -> torch.Tensor:
        return self.linear_weight

    def forward(self) -> torch.Tensor:
        return self.linear_weight


GATES = {'sigmoid': SigmoidGate, 'gauss': GaussGate, 'linear': LinearGate}
_LIMITED = dict(sigmoid='it has no other values', gauss='at 1 its slope is 0 and it would never train')


def create_gate(gate: str, size: int, init: float, **dd) -> nn.Module:
    """Create a gate function, a key of `GATES`, for one block's weight array.

    It returns gate values, `[size]`, one for each connection, and starts from the value ``init``.

    Raises:
        ValueError: If ``gate`` is not one of the choices, or ``init`` not a value that it can start from.
    """
    if gate not in GATES:
        raise ValueError(f"gate must be one of {', '.join(map(repr, GATES))}, got {gate!r}.")
    if not isinstance(init, (int, float)) or gate in _LIMITED and not 0. < init < 1.:
        limits = f' between 0 and 1, both excluded, for gate={gate!r} ({_LIMITED[gate]})' if gate in _LIMITED else ''
        raise ValueError(f'gate_init must be a number{limits}, got {init!r}.')
    return GATES[gate](size, init, **dd)

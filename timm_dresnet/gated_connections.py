"""Learned connections: what each block of a DResNet takes from all earlier blocks.

With the blocks numbered 1..n, `x_i` the input of block i and `y_i` its output, the connections into block i add

    sum_{k=1}^{i-2} F(w_{i,k}) * C_{i,k}(y_k)        C_{i,k} = norm(conv1x1(pool(y_k)))

to `y_{i-1}`. The gate multiplies after the norm, which would divide it away if it came before.

Two things make this cheap without changing the function. Pooling commutes with a 1x1 convolution, so every source is
pooled first, and once for all its targets. And all targets of one source at one resolution share one convolution and
one norm, their channels side by side; the gates fold into the weight and bias of that norm.
"""
from typing import List, Optional, Sequence

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerType
from timm.models import checkpoint

from .gates import create_gate

__all__ = ['Connections', 'Flow']


class SplitNorm(nn.ModuleList):
    """A norm for each target, side by side, for norms that mix the channels they are given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chunks = x.chunk(len(self), dim=1)
        return torch.cat([norm(chunks[i]) for i, norm in enumerate(self)], dim=1)


class Projection(nn.Module):
    """One source, brought to the shape of all its targets at one resolution and gated: `F(w) * norm(conv(y))`."""

    def __init__(self, in_chs: int, out_chs: int, num_targets: int, norm_layer: LayerType, device=None, dtype=None):
        """
        Args:
            in_chs: Channels of the source.
            out_chs: Channels for one target.
            num_targets: Number of targets.
            norm_layer: Norm layer.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.out_chs = out_chs
        self.conv = nn.Conv2d(in_chs, num_targets * out_chs, 1, bias=False, **dd)
        nn.init.normal_(self.conv.weight, std=(2. / out_chs) ** 0.5)  # timm's init of one convolution for each target
        self.norm = norm_layer(num_targets * out_chs, **dd)
        if not isinstance(self.norm, (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d)):
            self.norm = SplitNorm(norm_layer(out_chs, **dd) for _ in range(num_targets))

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: Pooled source, `[B, in_chs, H, W]`.
            gate: Gate values, `[num_targets]`.

        Returns:
            `[B, num_targets * out_chs, H, W]`
        """
        x = self.conv(x)
        norm = self.norm
        gate = gate.repeat_interleave(self.out_chs)
        if type(norm) is not nn.BatchNorm2d or not norm.affine or norm.momentum is None:
            return norm(x) * gate[:, None, None].to(x.dtype)
        # the steps of BatchNorm2d.forward, with the gate folded into the affine
        use_batch_stats = norm.training or norm.running_mean is None
        if norm.training and norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        return F.batch_norm(
            x,
            norm.running_mean,
            norm.running_var,
            norm.weight * gate,
            norm.bias * gate,
            use_batch_stats,
            norm.momentum,
            norm.eps,
        )

    def drop_last_target(self) -> None:
        """Remove the channels of the last target."""
        chs = self.conv.out_channels - self.out_chs
        self.conv.out_channels = chs
        self.conv.weight = nn.Parameter(self.conv.weight[:chs].detach().clone())
        if isinstance(self.norm, SplitNorm):
            del self.norm[-1]
            return
        self.norm.num_features = chs
        for name, tensor in [*self.norm.named_parameters(), *self.norm.named_buffers()]:
            if tensor.ndim == 1:
                kept = tensor[:chs].detach().clone()
                setattr(self.norm, name, nn.Parameter(kept) if isinstance(tensor, nn.Parameter) else kept)


class Flow:
    """One forward pass: called with the output of each block in turn, it returns the input of the next.

    Attributes:
        block: Number of the block whose input is asked for, i.
        sources: Outputs of the blocks 1..i-2, pooled to the resolution at hand, `[B, C_k, H, W]` each.
        gates: For each source, its gate values for all targets at this resolution.
        arriving: Gated sums so far for the targets still to come at this resolution, `[B, T * C, H, W]`.
    """

    def __init__(self, connections: Sequence[Optional['Connections']], grad_checkpointing: bool = False) -> None:
        """
        Args:
            connections: For each block, the connections whose targets take the shape of its output, or None.
            grad_checkpointing: Compute projections again in the backward pass instead of storing their activations.
        """
        self.connections = connections
        self.grad_checkpointing = grad_checkpointing
        self.block = 0
        self.stage: Optional[Connections] = None
        self.sources: List[torch.Tensor] = []
        self.gates: List[torch.Tensor] = []
        self.arriving: Optional[torch.Tensor] = None

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        """`x_i` from `y_{i-1}`, both `[B, C, H, W]`. `y_0` is the stem's output."""
        self.block += 1
        if self.block == 1:
            return y
        connections = self.connections[self.block - 2]
        x = y if connections is None else connections(y, self)
        self.sources.append(y)
        return x

    def send(self, projection: Projection, source: torch.Tensor, gate: torch.Tensor) -> None:
        """Add one source to what arrives at its targets, which are the last ones at this resolution."""
        x = checkpoint(projection, source, gate) if self.grad_checkpointing else projection(source, gate)
        if self.arriving is not None:
            x += self.arriving
        self.arriving = x


class Connections(nn.Module):
    """All connections whose targets take the output shape of one stage."""

    def __init__(
            self,
            source_chs: Sequence[int],
            targets: range,
            out_chs: int,
            downsample: bool,
            gate: str = 'sigmoid',
            gate_init: float = 0.5,
            rank: Optional[int] = None,
            norm_layer: LayerType = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            source_chs: Output channels of the blocks 1, 2, ...
            targets: Numbers of the blocks that the connections lead to.
            out_chs: Channels of the stage's output.
            downsample: Whether the stage halves the resolution, so that sources of earlier stages must be pooled.
            gate: Gate function, a key of `GATES`.
            gate_init: Gate value to start from.
            rank: Number of channels in which the connections into a block are summed, before a 1x1 convolution
                expands the sum to ``out_chs``. None sums them in ``out_chs`` channels.
            norm_layer: Norm layer.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.targets = targets
        self.sum_chs = rank or out_chs
        # matches a stride-2 convolution at every size, odd ones too
        self.pool = nn.AvgPool2d(2, ceil_mode=True, count_include_pad=False) if downsample else nn.Identity()
        self.gates = nn.ModuleDict({str(i): create_gate(gate, i - 2, gate_init, **dd) for i in targets})
        self.projections = nn.ModuleDict({
            str(k): Projection(source_chs[k - 1], self.sum_chs, self.num_targets(k), norm_layer, **dd)
            for k in range(1, targets[-1] - 1)
        })
        self.expansions = nn.ModuleDict()
        if rank:
            for i in targets:
                self.expansions[str(i)] = conv = nn.Conv2d(rank, out_chs, 1, bias=False, **dd)
                nn.init.normal_(conv.weight, std=rank ** -0.5)  # keeps the variance that the norms give the sum

    def num_targets(self, source: int) -> int:
        """How many blocks here take from a source block: the last ones."""
        return self.targets[-1] + 1 - max(self.targets[0], source + 2)

    def gate_values(self) -> List[torch.Tensor]:
        """For each source, the gate values of its targets here."""
        last = self.targets[-1]
        # one column for each target, padded to the length of the last weight array
        rows = torch.stack([F.pad(self.gates[str(i)](), (0, last - i)) for i in self.targets], dim=1).unbind()
        return [rows[k - 1][-self.num_targets(k):] for k in range(1, last - 1)]

    def forward(self, y: torch.Tensor, flow: Flow) -> torch.Tensor:
        """
        Args:
            y: Output of block i-1, `[B, C, H, W]`.
            flow: The pass so far.

        Returns:
            Input of block i, `[B, C, H, W]`.
        """
        i = flow.block
        if flow.stage is not self:  # first block of the stage: all sources so far lead to all targets here
            flow.stage = self
            flow.gates = self.gate_values()
            flow.sources = [self.pool(source) for source in flow.sources]
            flow.arriving = None
            for k, source in enumerate(flow.sources, start=1):
                flow.send(self.projections[str(k)], source, flow.gates[k - 1])

        x = y
        if i in self.targets:
            arriving = flow.arriving[:, :self.sum_chs]
            flow.arriving = flow.arriving[:, self.sum_chs:]
            x = y + (self.expansions[str(i)](arriving) if self.expansions else arriving)
        if i < self.targets[-1]:  # the newest source, y_{i-1}, leads to the targets from i + 1 on
            flow.send(self.projections[str(i - 1)], y, flow.gates[i - 2])
        return x

    def drop_last_target(self) -> None:
        """Remove the connections into the last target, for a network cut off after this stage."""
        last = self.targets[-1]
        del self.gates[str(last)], self.projections[str(last - 2)]
        if self.expansions:
            del self.expansions[str(last)]
        self.targets = self.targets[:-1]
        for projection in self.projections.values():
            projection.drop_last_target()

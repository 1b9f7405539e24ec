"""Learned connections: what each block of a DResNet takes from all earlier blocks.

With the blocks numbered 1..n, `x_i` the input of block i and `y_i` its output, the connections into block i add

    sum_{k=1}^{i-2} F(w_{i,k}) * C_{i,k}(y_k)        C_{i,k} = norm(conv1x1(pool(y_k)))

to `y_{i-1}`. The gate multiplies after the norm, which would divide it away if it came before.

Three things make this cheap without changing the function:

* Pooling commutes with a 1x1 convolution, so every source is pooled first, and once for all its targets.
* All targets of one source at one resolution share one convolution and one norm, their channels side by side.
* Norms and gates fold into kernels, in training too, and the sources at hand share one convolution.
"""
from typing import Dict, Iterable, Iterator, List, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerType
from timm.models import checkpoint

from .folding import can_bypass, can_fold, concat, fold_gated_norms, gated_norm
from .gates import create_gate

__all__ = ['Connections', 'Flow']


class SplitNorm(nn.ModuleList):
    """A norm for each target, side by side, for norms that mix the channels they are given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chunks = x.chunk(len(self), dim=1)
        return torch.cat([norm(chunks[i]) for i, norm in enumerate(self)], dim=1)


class Projection(nn.Module):
    """One source, brought to the shape of all its targets at one resolution and gated: `F(w) * norm(conv(y))`."""

    def __init__(
            self,
            source: int,
            targets: Sequence[int],
            in_chs: int,
            out_chs: int,
            norm_layer: LayerType,
            device=None,
            dtype=None,
    ) -> None:
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.sources: Tuple[int, ...] = (source,)  # more when fused
        self.targets = tuple(targets)
        self.out_chs = out_chs
        self.conv = nn.Conv2d(in_chs, len(targets) * out_chs, 1, bias=False, **dd)
        nn.init.normal_(self.conv.weight, std=(2. / out_chs) ** 0.5)  # timm's init of one convolution for each target
        self.norm = norm_layer(len(targets) * out_chs, **dd)
        if not isinstance(self.norm, (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d)):
            self.norm = SplitNorm(norm_layer(out_chs, **dd) for _ in targets)

    def can_fold(self, y: Optional[torch.Tensor] = None) -> bool:
        """Whether norm and gate can fold into the convolution of y."""
        return can_bypass(self, Projection, y) and can_bypass(self.conv, nn.Conv2d, y) and can_fold(self.norm, y)

    def forward(self, y: torch.Tensor, gate: Optional[torch.Tensor] = None) -> torch.Tensor:
        """
        Args:
            y: Pooled source, `[B, in_chs, H, W]`. When fused, all sources, their channels side by side.
            gate: Value of the gate of each channel, `[num_targets * out_chs]`. None when fused.

        Returns:
            `[B, num_targets * out_chs, H, W]`
        """
        x = self.conv(y)
        return x if gate is None else gated_norm(self.norm, x, gate)

    def become(self, sources: Sequence[int], kernel: torch.Tensor, bias: torch.Tensor) -> None:
        """Be a plain convolution of several sources from now on."""
        self.sources, self.norm = tuple(sources), nn.Identity()
        self.conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], 1, device='meta')
        self.conv.weight, self.conv.bias = nn.Parameter(kernel), nn.Parameter(bias)

    def keep(self, targets: Sequence[int]) -> None:
        """Remove the channels of all other targets."""
        kept = [self.targets.index(i) for i in targets]
        self.targets = tuple(targets)
        self.conv.out_channels = self.norm.num_features = len(targets) * self.out_chs
        modules = [self.conv, self.norm]
        if isinstance(self.norm, SplitNorm):
            self.norm = SplitNorm(self.norm[j] for j in kept)
            del modules[1]
        for module in modules:
            for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
                if tensor.ndim:
                    rows = tensor.detach().unflatten(0, (-1, self.out_chs))[kept].flatten(0, 1)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    setattr(module, name, nn.Parameter(rows, tensor.requires_grad) if is_parameter else rows)


class Flow:
    """What one forward pass of a network carries from block to block.

    Attributes:
        block: Number of the block at hand, i.
        sources: By number, outputs of the blocks so far, at the resolution at hand.
        sent: Those of them that the connections at hand have not seen yet.
        gates: By target and source, gate values of the connections at hand.
        sums: By target, what connections add to its input, so far.
    """

    def __init__(self, stages: Sequence[Tuple[Optional[nn.Module], bool]], grad_checkpointing: bool = False) -> None:
        """
        Args:
            stages: For each stage, the connections to its shape, if there are any, and whether it halves the resolution.
            grad_checkpointing: Compute activations again in the backward pass instead of storing them.
        """
        self.stages = list(stages)
        self.grad_checkpointing = grad_checkpointing
        self.connections: Optional[nn.Module] = None
        self.block = 0
        self.sources: Dict[int, torch.Tensor] = {}
        self.sent: Dict[int, torch.Tensor] = {}
        self.gates: Dict[Tuple[int, int], torch.Tensor] = {}
        self.sums: Dict[int, torch.Tensor] = {}

    def receive(self, y: torch.Tensor) -> torch.Tensor:
        """The input of the next block, from the output of the block before, both `[B, C, H, W]`."""
        self.block += 1
        return y if self.connections is None else self.connections(y, self)

    def enter(self) -> None:
        """Go on to the resolution of the next stage."""
        needed = {k for connections, _ in self.stages if connections is not None for k in connections.targets}
        self.connections, halved = self.stages.pop(0)
        self.sources = {
            # as a convolution of stride 2 does at every size, odd ones too
            k: F.avg_pool2d(y, 2, ceil_mode=True, count_include_pad=False) if halved else y
            for k, y in self.sources.items() if k in needed
        }
        self.sent, self.gates = dict(self.sources), {}

    def send(self, y: torch.Tensor) -> None:
        """Note the output of the block at hand, `[B, C, H, W]`."""
        self.sources[self.block] = self.sent[self.block] = y


class Connections(nn.Module):
    """All connections whose targets take the output shape of one stage: a gate, a convolution and a norm for each.

    Attributes:
        sources: For each target, the numbers of the blocks that it takes from.
        targets: For each source, the numbers of the blocks that take from it.
    """
    fused = False

    def __init__(
            self,
            source_chs: Sequence[int],
            sources: Dict[int, Sequence[int]],
            out_chs: int,
            gate: str = 'sigmoid',
            gate_init: Optional[float] = None,
            rank: Optional[int] = None,
            norm_layer: LayerType = nn.BatchNorm2d,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            source_chs: Output channels of the blocks 1, 2, ...
            sources: For each target, the numbers of the blocks that it takes from.
            out_chs: Channels of the stage's output.
            gate: Gate function, a key of `GATES`.
            gate_init: Gate value to start from. None is 0.5 / n for the n gates of a target.
            rank: Number of channels in which the connections into a block are summed, before a 1x1 convolution
                expands the sum to ``out_chs``. None or 0 sums them in ``out_chs`` channels.
            norm_layer: Norm layer.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self._connect(sources)
        self.gates = nn.ModuleDict({
            str(i): create_gate(gate, len(numbers), 0.5 / len(numbers) if gate_init is None else gate_init, **dd)
            for i, numbers in sources.items()
        })
        self.projections = nn.ModuleDict({
            str(k): Projection(k, targets, source_chs[k - 1], rank or out_chs, norm_layer, **dd)
            for k, targets in self.targets.items()
        })
        self.expansions = nn.ModuleDict()
        for i in sources if rank else ():
            self.expansions[str(i)] = conv = nn.Conv2d(rank, out_chs, 1, bias=False, **dd)
            nn.init.normal_(conv.weight, std=rank ** -0.5)  # keeps the variance that the norms give the sum

    def _connect(self, sources: Dict[int, Sequence[int]]) -> None:
        self.sources = {i: tuple(numbers) for i, numbers in sources.items() if numbers}
        numbers = sorted({k for numbers in self.sources.values() for k in numbers})
        self.targets = {k: tuple(i for i in self.sources if k in self.sources[i]) for k in numbers}

    def gate_values(self) -> Dict[Tuple[int, int], torch.Tensor]:
        """F(w) of each connection, by target and source."""
        values = {i: self.gates[str(i)]().unbind() for i in self.sources}
        return {(i, k): values[i][j] for i, numbers in self.sources.items() for j, k in enumerate(numbers)}

    def groups(self, ys: Dict[int, Optional[torch.Tensor]]) -> List[Tuple[bool, List[Projection]]]:
        """Whether they fold into one convolution, and projections of the sources in `ys` to the same targets."""
        groups: Dict[Tuple[bool, Tuple[int, ...], bool], List[Projection]] = {}
        for k in ys:
            if k in self.targets:
                projection = self.projections[str(k)]
                # where the covariance of the input costs less than the norm of the output, or next to nothing
                cheap = projection.conv.in_channels <= max(64, projection.conv.out_channels)
                key = cheap and projection.can_fold(ys[k]), projection.targets, projection.norm.training
                groups.setdefault(key, []).append(projection)
        return [(key[0], group) for key, group in groups.items()]

    def project(self, flow: Flow) -> Iterator[Tuple[Tuple[int, ...], torch.Tensor]]:
        """Numbers of targets and what is to be added to the sums for them, `[B, num_targets * C, H, W]`."""
        ys, flow.sent = flow.sent, {}
        if self.fused:
            for projection in self.projections.values():
                if projection.sources[0] in ys:
                    yield projection.targets, projection(concat([ys[k] for k in projection.sources]))
            return
        flow.gates = flow.gates or self.gate_values()
        for folds, projections in self.groups(ys):
            gates = _expand_gates(projections, flow.gates)
            sources = [ys[projection.sources[0]] for projection in projections]
            if folds:
                x = concat(sources)
                yield projections[0].targets, F.conv2d(x, *_fold(projections, gates, x))
                continue
            gates = gates.unbind()
            for j, projection in enumerate(projections):
                args = sources[j], gates[j]
                yield projection.targets, checkpoint(projection, *args) if flow.grad_checkpointing else projection(*args)

    def forward(self, y: torch.Tensor, flow: Flow) -> torch.Tensor:
        """
        Args:
            y: Output of block i-1, `[B, C, H, W]`.
            flow: The pass so far.

        Returns:
            Input of block i, `[B, C, H, W]`.
        """
        if flow.block not in self.sources:
            return y
        for targets, x in self.project(flow):
            parts = x.chunk(len(targets), dim=1)
            for j, i in enumerate(targets):
                flow.sums[i] = flow.sums[i] + parts[j] if i in flow.sums else parts[j]
        x = flow.sums.pop(flow.block)
        if self.expansions:  # of a copy, as a view would keep the sums for all targets for the backward pass
            x = self.expansions[str(flow.block)](x.clone())
        return y + x

    def remove(self, connections: Iterable[Tuple[int, int]]) -> None:
        """Remove connections, given as (target, source). When fused, all those of a target or none."""
        before, removed = self.sources, set(connections)
        self._connect({i: [k for k in numbers if (i, k) not in removed] for i, numbers in before.items()})
        for modules in (self.gates, self.expansions):
            for i in [i for i in modules if int(i) not in self.sources]:
                del modules[i]
        for i, gate in self.gates.items():
            kept = [before[int(i)].index(k) for k in self.sources[int(i)]]
            for name, weight in list(gate.named_parameters()):
                if name.endswith('weight'):
                    setattr(gate, name, nn.Parameter(weight.detach()[kept], weight.requires_grad))
        for name, projection in list(self.projections.items()):
            targets = self.targets.get(projection.sources[0], ())
            if not targets:
                del self.projections[name]
            elif targets != projection.targets:
                projection.keep(targets)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold norms and gates into convolutions for inference, if all allow it: one for all sources at hand."""
        if self.fused or not all(projection.eval().can_fold() for projection in self.projections.values()):
            return
        values, seen = self.gate_values(), set()
        for i in sorted(self.sources):
            ys = {k: None for k in self.targets if k < i and k not in seen}
            seen.update(ys)
            for folds, projections in self.groups(ys):
                for group in [projections] if folds else [[projection] for projection in projections]:
                    sources = [projection.sources[0] for projection in group]
                    group[0].become(sources, *_fold(group, _expand_gates(group, values)))
                    for k in sources[1:]:
                        del self.projections[str(k)]
        self.gates, self.fused = nn.ModuleDict(), True


def _expand_gates(projections: Sequence[Projection], values: Dict[Tuple[int, int], torch.Tensor]) -> torch.Tensor:
    """Gate value of each channel of projections to the same targets, `[n, num_targets * out_chs]`."""
    gates = torch.stack([values[i, projection.sources[0]] for projection in projections for i in projection.targets])
    return gates.view(len(projections), -1).repeat_interleave(projections[0].out_chs, dim=1)


def _fold(
        projections: Sequence[Projection],
        gates: torch.Tensor,
        x: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    convs, norms = ([getattr(projection, name) for projection in projections] for name in ('conv', 'norm'))
    return fold_gated_norms(convs, norms, gates, x)

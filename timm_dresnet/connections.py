"""Learned connections: what each block of a DResNet takes from all earlier blocks, by the equation in `DResNet`.

Three things make this cheap without changing the function:

* Pooling commutes with a 1x1 convolution, so every source is pooled first, and once for all its targets.
* All targets of one source at one resolution share one convolution and one norm, their channels side by side.
* When fused, and in training where that takes no longer, norms and gates fold into kernels, and the sources at hand
  share one convolution.
"""
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Sequence, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import checkpoint

from .folding import can_bypass, can_fold, concat, fold_gated_norms, gated_norm
from .gates import create_gate

NormLayer = Callable[..., nn.Module]


def _keep_rows(module: nn.Module, kept: Sequence[int], size: int = 1) -> None:
    """Keep some of the parts of `size` entries that parameters and statistics of a module have side by side."""
    for part in module.modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if tensor.numel() > 1:  # neither a count of batches nor what all parts share
                rows = tensor.detach().unflatten(0, (-1, size))[kept].flatten(0, 1)
                is_parameter = isinstance(tensor, nn.Parameter)
                setattr(part, name, nn.Parameter(rows, tensor.requires_grad) if is_parameter else rows)


class SplitNorm(nn.ModuleList):
    """A norm for each target, side by side, for norms that mix the channels they are given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chunks = x.chunk(len(self), dim=1)
        return torch.cat([norm(chunks[i]) for i, norm in enumerate(self)], dim=1)


class Projection(nn.Module):
    """One source, brought to the shape of all its targets at one resolution and gated: `F(w) * norm(conv(y))`.

    Fused, it is the convolution of several sources, whose channels come side by side.
    """

    def __init__(self, source: int, targets: Tuple[int, ...], in_chs: int, out_chs: int, norm_layer: NormLayer, **dd):
        super().__init__()
        self.sources: Tuple[int, ...] = (source,)
        self.targets, self.out_chs = targets, out_chs
        self.conv = nn.Conv2d(in_chs, len(targets) * out_chs, 1, bias=False, **dd)
        nn.init.normal_(self.conv.weight, std=(2. / out_chs) ** 0.5)  # timm's init of one convolution for each target
        self.norm = norm_layer(len(targets) * out_chs, **dd)
        if not isinstance(self.norm, (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d)):
            self.norm = SplitNorm(norm_layer(out_chs, **dd) for _ in targets)

    def can_fold(self, y: Optional[torch.Tensor] = None) -> bool:
        """Whether norm and gate can fold into the convolution of y."""
        plain = can_bypass(self, Projection, y) and can_bypass(self.conv, nn.Conv2d, y) and self.conv.bias is None
        return plain and can_fold(self.norm, y)

    def forward(self, y: torch.Tensor, gate: Optional[torch.Tensor] = None) -> torch.Tensor:
        """`[B, C, H, W]` to `[B, num_targets * out_chs, H, W]`, with a gate value for each channel unless fused."""
        x = self.conv(y)
        return x if gate is None else gated_norm(self.norm, x, gate)

    def keep(self, targets: Tuple[int, ...]) -> None:
        """Keep some of the targets."""
        kept, self.targets = [self.targets.index(i) for i in targets], targets
        _keep_rows(self.conv, kept, self.out_chs)
        self.conv.out_channels = len(targets) * self.out_chs
        if isinstance(self.norm, SplitNorm):
            self.norm = SplitNorm(self.norm[j] for j in kept)
        else:
            _keep_rows(self.norm, kept, self.out_chs)
            self.norm.num_features = len(targets) * self.out_chs

    def become(self, sources: Sequence[int], kernel: torch.Tensor, bias: torch.Tensor) -> None:
        """Be a plain convolution of several sources from now on."""
        self.sources, self.norm = tuple(sources), nn.Identity()
        trained = self.conv.weight.requires_grad
        self.conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], 1, device='meta')
        self.conv.weight, self.conv.bias = nn.Parameter(kernel, trained), nn.Parameter(bias, trained)


class Flow:
    """What one forward pass of a network carries from block to block.

    It is no dataclass: FSDP hands copies of those on, and what a stage notes there would be lost.

    Attributes:
        stages: For each to come, the connections to its shape, if there are any, and whether it halves the resolution.
        grad_checkpointing: Compute activations again in the backward pass instead of storing them.
        block: Number of the block at hand, i.
        connections: The connections at hand, those to the shape of its stage.
        sent: By number, outputs of blocks that the connections at hand have not seen yet, at their resolution.
        later: By number, outputs of blocks that are needed in later stages, at the resolution of the next.
        gates: By source, gate values of the connections at hand.
        sums: By targets, whose channels lie side by side, what connections add to their inputs, so far.
    """

    def __init__(self, stages: List[Tuple[Any, bool]], grad_checkpointing: bool) -> None:
        self.stages, self.grad_checkpointing = stages, grad_checkpointing
        self.block = 0
        self.connections: Any = None
        self.sent: Dict[int, torch.Tensor] = {}
        self.later: Dict[int, torch.Tensor] = {}
        self.gates: Dict[int, torch.Tensor] = {}
        self.sums: Dict[Tuple[int, ...], torch.Tensor] = {}

    def receive(self, y: torch.Tensor) -> torch.Tensor:
        """The input of the next block, from the output of the block before, both `[B, C, H, W]`."""
        self.block += 1
        connected = self.connections is not None and self.block in self.connections.sources
        return self.connections(y, self) if connected else y

    def enter(self) -> None:
        """Go on to the resolution of the next stage."""
        self.connections, _ = self.stages.pop(0)
        sources, self.sent, self.later, self.gates = self.later, {}, {}, {}
        for k, y in sources.items():
            self.send(k, y)

    def send(self, k: int, y: torch.Tensor) -> None:
        """Send the output of block k on, `[B, C, H, W]`."""
        self.sent[k] = y
        if any(k in connections.targets for connections, _ in self.stages if connections is not None):
            halved = self.stages[0][1]  # as a convolution of stride 2 does at every size, odd ones too
            self.later[k] = F.avg_pool2d(y, 2, ceil_mode=True, count_include_pad=False) if halved else y

    def add(self, targets: Tuple[int, ...], x: torch.Tensor) -> None:
        """Add `[B, num_targets * C, H, W]` to the sums for these targets."""
        self.sums[targets] = self.sums[targets] + x if targets in self.sums else x

    def take(self, chs: int) -> List[torch.Tensor]:
        """What makes up the sum for the block at hand, the first of the targets to come, `[B, chs, H, W]` each."""
        parts = []
        for targets in [targets for targets in self.sums if targets[0] == self.block]:
            x = self.sums.pop(targets)
            if len(targets) > 1:
                x, rest = x.split([chs, x.shape[1] - chs], dim=1)
                self.add(targets[1:], rest)
            parts.append(x)
        return parts


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
            gate: str,
            gate_init: Optional[float],
            rank: Optional[int],
            norm_layer: NormLayer,
            **dd,
    ) -> None:
        """
        Args:
            source_chs: Output channels of the blocks 1, 2, ...
            sources: For each target, the numbers of the blocks that it takes from.
            out_chs: Channels of the stage's output.
            gate, gate_init, rank, norm_layer: As for `DResNet`, where the rank is ``connection_rank``.
        """
        super().__init__()
        self.sum_chs = rank or out_chs
        self.connect(sources)
        self.gates = nn.ModuleDict({
            str(i): create_gate(gate, len(numbers), 0.5 / len(numbers) if gate_init is None else gate_init, **dd)
            for i, numbers in self.sources.items()
        })
        self.projections = nn.ModuleDict({
            str(k): Projection(k, targets, source_chs[k - 1], self.sum_chs, norm_layer, **dd)
            for k, targets in self.targets.items()
        })
        self.expansions = nn.ModuleDict()
        for i in self.sources if rank else ():
            self.expansions[str(i)] = conv = nn.Conv2d(self.sum_chs, out_chs, 1, bias=False, **dd)
            nn.init.normal_(conv.weight, std=self.sum_chs ** -0.5)  # keeps the variance that the norms give the sum

    def connect(self, sources: Dict[int, Sequence[int]]) -> None:
        """Set which target takes from which sources, without any change of modules."""
        self.sources = {i: tuple(numbers) for i, numbers in sources.items() if numbers}
        numbers = sorted({k for numbers in self.sources.values() for k in numbers})
        self.targets = {k: tuple(i for i in self.sources if k in self.sources[i]) for k in numbers}

    @torch.inference_mode(False)  # or what is left could not be trained
    def remove(self, pairs: Iterable[Tuple[int, int]]) -> None:
        """Remove connections, given as (target, source) block numbers, with all that only they use."""
        before, removed = self.sources, set(pairs)
        self.connect({i: [k for k in numbers if (i, k) not in removed] for i, numbers in before.items()})
        for modules, numbers in (
                (self.gates, self.sources), (self.expansions, self.sources), (self.projections, self.targets)):
            for key in [key for key in modules if int(key) not in numbers]:
                del modules[key]
        for i, left in self.sources.items():
            if left != before[i]:
                _keep_rows(self.gates[str(i)], [before[i].index(k) for k in left])
        for k, projection in self.projections.items():
            if self.targets[int(k)] != projection.targets:
                projection.keep(self.targets[int(k)])

    def gate_values(self) -> Dict[int, torch.Tensor]:
        """By source, the gate value of each channel that its projection puts out, `[num_targets * C]`."""
        values = {i: self.gates[str(i)]().unbind() for i in self.sources}
        pairs = [(i, k) for k, targets in self.targets.items() for i in targets]
        gates = torch.stack([values[i][self.sources[i].index(k)] for i, k in pairs]).repeat_interleave(self.sum_chs)
        gates = gates.split([len(targets) * self.sum_chs for targets in self.targets.values()])
        return {k: gates[j] for j, k in enumerate(self.targets)}

    def groups(self, ys: Mapping[int, Optional[torch.Tensor]]) -> List[Tuple[bool, List[Projection]]]:
        """Projections of sources, where they are None to be fused, that fold into one convolution, or else one each."""
        groups: Dict[Tuple[Any, ...], List[Projection]] = {}
        for k, projection in ((k, self.projections[str(k)]) for k in ys if k in self.targets):
            conv, norm, y = projection.conv, projection.norm, ys[k]
            # Inputs are put side by side where that costs less than sums of outputs; in training, where their
            # covariance takes no longer than norms of the outputs, which would be kept for the backward pass, and comes
            # from positions enough to be exact. Not in eval mode, whose outputs equal those of a graph of torch.fx to
            # the last bit (there one can fuse).
            folds = (y is None or norm.training) and projection.can_fold(y) and (
                conv.in_channels <= max(64, conv.out_channels) if y is None
                else conv.in_channels ** 2 <= 16 * conv.out_channels and y.numel() >= 8 * conv.in_channels)
            key = (True, projection.targets, norm.eps) if folds else (False, k)  # folds may be symbolic
            groups.setdefault(key, []).append(projection)
        return [(folds, group) for (folds, *_), group in groups.items()]

    def project(self, flow: Flow) -> None:
        """Add what sources that these connections have not seen yet bring to all their targets."""
        ys, flow.sent = flow.sent, {}
        if self.fused:
            for projection in self.projections.values():
                if projection.sources[0] in ys:
                    flow.add(projection.targets, projection(concat([ys[k] for k in projection.sources])))
            return
        flow.gates = flow.gates or self.gate_values()
        for folds, group in self.groups(ys):
            sources = [ys[projection.sources[0]] for projection in group]
            gates = [flow.gates[projection.sources[0]] for projection in group]
            if folds:
                y = concat(sources)
                x = F.conv2d(y, *fold_gated_norms(group, gates, y))
            else:
                projection, y, gate = group[0], sources[0], gates[0]
                x = checkpoint(projection, y, gate) if flow.grad_checkpointing else projection(y, gate)
            flow.add(group[0].targets, x)

    def forward(self, y: torch.Tensor, flow: Flow) -> torch.Tensor:
        """Input of block i, from the output of block i-1, both `[B, C, H, W]`."""
        self.project(flow)
        first, *others = flow.take(self.sum_chs)
        # a copy, as a view would keep the sums for all targets for the backward pass of the expansion
        x = first.clone() if self.expansions else y + first
        for part in others:
            x += part
        return y + self.expansions[str(flow.block)](x) if self.expansions else x

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold norms and gates into convolutions for inference, if all allow it: one for all sources at hand."""
        self.eval()
        if self.fused or not all(projection.can_fold() for projection in self.projections.values()):
            return
        gates, seen = self.gate_values(), 0
        for i in sorted(self.sources):
            for _, group in self.groups({k: None for k in self.targets if seen < k < i}):
                sources = [projection.sources[0] for projection in group]
                group[0].become(sources, *fold_gated_norms(group, [gates[k] for k in sources]))
                for k in sources[1:]:
                    del self.projections[str(k)]
            seen = i - 1
        self.gates, self.fused = nn.ModuleDict(), True

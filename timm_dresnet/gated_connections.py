"""Learned connections: what each block of a DResNet takes from all earlier blocks.

With the blocks numbered 1..n, `x_i` the input of block i and `y_i` its output, the connections into block i add

    sum_{k=1}^{i-2} F(w_{i,k}) * C_{i,k}(y_k)        C_{i,k} = norm(conv1x1(pool(y_k)))

to `y_{i-1}`. The gate multiplies after the norm, which would divide it away if it came before.

Three things make this cheap without changing the function:

* Pooling commutes with a 1x1 convolution, so every source is pooled first, and once for all its targets.
* All targets of one source at one resolution share one convolution and one norm, their channels side by side.
* Mean and variance of what a 1x1 convolution puts out follow from mean and covariance of what it takes in. So batch
  norm and gate fold into its kernel in training too: what the norm would see is never made, let alone kept for the
  backward pass.
"""
from contextlib import nullcontext
from typing import ContextManager, Dict, List, NamedTuple, Optional, Sequence, Set, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers import LayerType
from timm.models import checkpoint

from .gates import create_gate
from .resnet import is_batch_norm, scaled_batch_norm

__all__ = ['Connections', 'Flow', 'FusedConnections', 'StageFlow']


def _rows(x: torch.Tensor) -> torch.Tensor:
    """`[B, C, H, W]` as `[B * H * W, C]`, a view in channels-last."""
    return x.permute(0, 2, 3, 1).flatten(0, 2)


def _without_autocast(x: torch.Tensor) -> ContextManager:
    """Where matrix products are not taken in low precision. The meta device has no autocast."""
    return nullcontext() if x.device.type == 'meta' else torch.autocast(x.device.type, enabled=False)


class _Gram(torch.autograd.Function):
    """`rows.t() @ rows` in `dtype`, with one product for its gradient instead of two; rows are kept as they come."""
    generate_vmap_rule = True

    @staticmethod
    def forward(rows, dtype):
        rows = rows.to(dtype)
        return rows.t() @ rows

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx, grad):
        rows, = ctx.saved_tensors
        with _without_autocast(rows):
            return (rows.to(grad.dtype) @ (grad + grad.t())).to(rows.dtype), None


@torch.fx.wrap
def _moments(x: torch.Tensor, kernel: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance, `[C]`, of what a 1x1 convolution puts out.

    Args:
        x: What it takes in, `[B, C_in, H, W]`.
        kernel: `[C, C_in, 1, 1]`
    """
    with _without_autocast(x):
        dtype = torch.promote_types(x.dtype, torch.float32)
        rows, kernel = _rows(x), kernel.flatten(1).to(dtype)
        mean = rows.mean(0, dtype=dtype)
        cov = _Gram.apply(rows, dtype) / len(rows) - mean[:, None] * mean
        return kernel @ mean, ((kernel @ cov) * kernel).sum(1).clamp(min=0)


def _has_rows(x: torch.Tensor) -> bool:
    """Whether `_rows` is a view, of rows that may lie apart."""
    batch, _, height, width = x.stride()
    return x.stride(1) == 1 and height == width * x.shape[3] and (batch == height * x.shape[2] or x.shape[0] == 1)


def _tf32() -> bool:
    """Whether matrix products in float32 take TF32 on a GPU, as convolutions do by default."""
    matmul = torch.backends.cuda.matmul
    if hasattr(matmul, 'fp32_precision'):  # where it was set by this, the older getter raises
        return matmul.fp32_precision == 'tf32'
    return torch.get_float32_matmul_precision() != 'highest'


def _in_place(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether sums are best taken where tensors lie: not for compilers, which see to that, nor in torch.func."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return False
    x = tensors[0]
    fast = x.dtype != torch.float32 or x.device.type == 'cpu' or _tf32()
    return fast and all(tensor.dtype == x.dtype and _has_rows(tensor) for tensor in tensors)


@torch.fx.wrap
def _add_convs(
        y: torch.Tensor,
        sources: List[torch.Tensor],
        kernels: List[torch.Tensor],
        bias: Optional[torch.Tensor],
) -> torch.Tensor:
    """Add 1x1 convolutions of several sources to y.

    Args:
        y: `[B, C, H, W]`
        sources: `[B, C_k, H, W]` each.
        kernels: Theirs, `[C, C_k, 1, 1]` each.
        bias: Of all together.
    """
    if not torch.jit.is_scripting():  # as it is where torch.fx has traced a network
        if _in_place([y, *sources]):
            return _add_convs_in_place(y, sources, kernels, bias)
    source = sources[0] if len(sources) == 1 else torch.cat(sources, dim=1)
    kernel = kernels[0] if len(kernels) == 1 else torch.cat(kernels, dim=1)
    return y + F.conv2d(source, kernel, bias)


def _add_convs_in_place(
        y: torch.Tensor,
        sources: List[torch.Tensor],
        kernels: List[torch.Tensor],
        bias: Optional[torch.Tensor],
) -> torch.Tensor:
    # one large tensor is made, to which all products are added where it lies
    rows = _rows(y).clone() if bias is None else _rows(y) + bias.to(y.dtype)
    for source, kernel in zip(sources, kernels):
        rows = rows.addmm_(_rows(source), kernel.flatten(1).t().to(y.dtype))
    return rows.unflatten(0, (y.shape[0], *y.shape[2:])).permute(0, 3, 1, 2)


@torch.fx.wrap
def _accumulate(total: torch.Tensor, source: torch.Tensor, kernel: torch.Tensor) -> torch.Tensor:
    """Add a 1x1 convolution to `total`, which may be overwritten."""
    if not torch.jit.is_scripting():
        if not torch.is_grad_enabled() and _in_place([source, total]):
            _rows(total).addmm_(_rows(source), kernel.flatten(1).t().to(total.dtype))
            return total
    return F.conv2d(source, kernel).add_(total)


class SplitNorm(nn.ModuleList):
    """A norm for each target, side by side, for norms that mix the channels they are given."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        chunks = x.chunk(len(self), dim=1)
        return torch.cat([norm(chunks[i]) for i, norm in enumerate(self)], dim=1)


class Projection(nn.Module):
    """One source, brought to the shape of all its targets at one resolution and gated: `F(w) * norm(conv(y))`."""

    def __init__(
            self,
            in_chs: int,
            out_chs: int,
            targets: Sequence[int],
            norm_layer: LayerType,
            device=None,
            dtype=None,
    ) -> None:
        """
        Args:
            in_chs: Channels of the source.
            out_chs: Channels for one target.
            targets: Numbers of the targets.
            norm_layer: Norm layer.
        """
        super().__init__()
        dd = {'device': device, 'dtype': dtype}
        self.targets = tuple(targets)
        self.out_chs = out_chs
        self.conv = nn.Conv2d(in_chs, len(targets) * out_chs, 1, bias=False, **dd)
        nn.init.normal_(self.conv.weight, std=(2. / out_chs) ** 0.5)  # timm's init of one convolution for each target
        self.norm = norm_layer(len(targets) * out_chs, **dd)
        if not isinstance(self.norm, (nn.BatchNorm2d, nn.SyncBatchNorm, nn.InstanceNorm2d)):
            self.norm = SplitNorm(norm_layer(out_chs, **dd) for _ in targets)

    @property
    def folds(self) -> bool:
        """Whether norm and gate fold into the convolution now."""
        if not self.norm.training:  # which may have been put into eval mode by itself
            return is_batch_norm(self.norm)
        # in training, where the covariance of the input costs less than the norm of the output, or next to nothing
        return is_batch_norm(self.norm) and self.conv.in_channels <= max(64, self.conv.out_channels)

    def folded(self, x: Optional[torch.Tensor], gate: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
        """The convolution that does all of this.

        Args:
            x: Pooled source, whose statistics count in training.
            gate: Gate values, `[num_targets]`.

        Returns:
            Its kernel, `[num_targets * out_chs, in_chs, 1, 1]`, and its bias.
        """
        conv, norm = self.conv, self.norm
        if norm.training:
            moments = _moments(x, conv.weight)
            mean, var = moments[0], moments[1]  # fx cannot unpack
            with torch.no_grad():
                count = x.numel() / x.shape[1]
                norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
                norm.running_var.lerp_((var * (count / (count - 1))).to(norm.running_var.dtype), norm.momentum)
                norm.num_batches_tracked.add_(1)
        else:
            mean, var = norm.running_mean, norm.running_var
        gate = gate.repeat_interleave(self.out_chs)
        scale = gate * norm.weight * torch.rsqrt(var + norm.eps)
        bias = gate * norm.bias - mean * scale
        return conv.weight * scale[:, None, None, None].to(conv.weight.dtype), bias.to(conv.weight.dtype)

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: Pooled source, `[B, in_chs, H, W]`.
            gate: Gate values, `[num_targets]`.

        Returns:
            `[B, num_targets * out_chs, H, W]`
        """
        if self.folds:
            return F.conv2d(x, *self.folded(x, gate))
        x = self.conv(x)
        gate = gate.repeat_interleave(self.out_chs)
        if is_batch_norm(self.norm):
            return scaled_batch_norm(self.norm, x, gate)
        return self.norm(x) * gate[:, None, None].to(x.dtype)

    def keep(self, targets: Sequence[int]) -> None:
        """Remove the channels of all other targets."""
        kept = [self.targets.index(i) for i in targets]

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            rows = tensor.detach().unflatten(0, (-1, self.out_chs))[kept].flatten(0, 1)
            return nn.Parameter(rows, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else rows

        self.conv.out_channels = len(targets) * self.out_chs
        self.conv.weight = keep(self.conv.weight)
        if isinstance(self.norm, SplitNorm):
            self.norm = SplitNorm(self.norm[j] for j in kept)
        else:
            self.norm.num_features = self.conv.out_channels
            for name, tensor in [*self.norm.named_parameters(), *self.norm.named_buffers()]:
                if tensor.ndim == 1:
                    setattr(self.norm, name, keep(tensor))
        self.targets = tuple(targets)


class _Pool(torch.autograd.Function):
    """`_pool` for even sizes, the gradients of both outputs summed in one pass."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x), F.avg_pool2d(x, 2)

    @staticmethod
    def backward(ctx, grad, pooled_grad):
        batch, chs, height, width = pooled_grad.shape
        rows = grad.permute(0, 2, 3, 1).contiguous().view(batch, height, 2, width, 2, chs)
        squares = (pooled_grad / 4).permute(0, 2, 3, 1)[:, :, None, :, None]
        return (rows + squares.to(grad.dtype)).view(batch, 2 * height, 2 * width, chs).permute(0, 3, 1, 2)


@torch.fx.wrap
def _pool(x: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """A source, to go on with, and the same at half its resolution."""
    if not torch.jit.is_scripting():
        if torch.is_grad_enabled() and _in_place([x]) and x.shape[2] % 2 == x.shape[3] % 2 == 0:
            return _Pool.apply(x)
    # matches a stride-2 convolution at every size, odd ones too
    return x, F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)


class StageFlow(NamedTuple):
    """What a `Flow` knows of a stage: number of blocks, whether it halves the resolution, connections to its shape."""
    depth: int
    downsample: bool
    connections: Optional[nn.Module]


class Flow:
    """One forward pass: called with the output of each block in turn, it returns the input of the next.

    Attributes:
        block: Number of the block whose input is asked for, i.
        gates: Of the connections at this resolution, gate values for each source.
        folds: Whether all that is left of the connections at this resolution are kernels.
        kernels: Of the connections at this resolution, (target, source), kernel and bias of what is still to be done.
        pending: Targets still to come at this resolution, and the sums so far for them, `[B, T * C, H, W]`.
    """

    def __init__(self, stages: Sequence[StageFlow], grad_checkpointing: bool = False) -> None:
        """
        Args:
            stages: The network's stages.
            grad_checkpointing: Compute projections again in the backward pass instead of storing their activations.
        """
        self.stages = stages
        self.grad_checkpointing = grad_checkpointing
        self.block = 0
        self.gates: Dict[int, torch.Tensor] = {}
        self.folds = False
        self.kernels: Dict[Tuple[int, int], Tuple[torch.Tensor, torch.Tensor]] = {}
        self.pending: Tuple[Tuple[int, ...], Optional[torch.Tensor]] = (), None
        self._ends = [sum(stage.depth for stage in stages[:s + 1]) for s in range(len(stages))]
        self._stage = -1
        self._last = {
            k: s for s, stage in enumerate(stages) if stage.connections is not None for k in stage.connections.targets}
        self._sources: Dict[Tuple[int, int], torch.Tensor] = {}  # by number and stage

    def __call__(self, y: torch.Tensor) -> torch.Tensor:
        """`x_i` from `y_{i-1}`, both `[B, C, H, W]`. `y_0` is the stem's output."""
        self.block += 1
        k = self.block - 1
        if k == 0:
            return y
        entered = self._stage < 0 or k > self._ends[self._stage]
        self._stage += entered
        connections = self.stages[self._stage].connections
        if entered:  # what is not pooled to this resolution is not needed any more
            self._sources = {key: source for key, source in self._sources.items() if key[1] >= self._stage}
        if k in self._last:
            y = self._keep(k, y, self._stage)
        if connections is None:
            return y
        if entered:
            connections.enter(self)
        return connections(y, self)

    def _keep(self, k: int, y: torch.Tensor, stage: int) -> torch.Tensor:
        """Note a source at the resolution of `stage` and, pooled, of those after it that want it."""
        lower = [s for s in range(stage + 1, self._last[k] + 1) if self.stages[s].downsample]
        if lower:
            y, pooled = _pool(y)
            self._keep(k, pooled, lower[0])
        for s in range(stage, lower[0] if lower else len(self.stages)):
            self._sources[k, s] = y
        return y

    def source(self, k: int) -> torch.Tensor:
        """Output of block k, pooled to the resolution at hand."""
        return self._sources[k, self._stage]

    def receive(self, targets: Tuple[int, ...], x: torch.Tensor) -> None:
        """Add to the sums for targets, whose channels lie side by side in `x`, which may be overwritten."""
        known, total = self.pending
        if total is None:
            self.pending = targets, x
        elif targets == known:
            self.pending = targets, x.add_(total)
        else:  # in a pruned network
            sums = {known[j]: part for j, part in enumerate(total.chunk(len(known), dim=1))}
            for j, part in enumerate(x.chunk(len(targets), dim=1)):
                sums[targets[j]] = sums[targets[j]] + part if targets[j] in sums else part
            self.pending = tuple(sorted(sums)), torch.cat([sums[i] for i in sorted(sums)], dim=1)

    def take(self) -> torch.Tensor:
        """The sum for the first of the targets to come."""
        targets, total = self.pending
        chs = total.shape[1] // len(targets)
        parts = total.split([chs, total.shape[1] - chs], dim=1)
        self.pending = targets[1:], parts[1] if len(targets) > 1 else None
        # a copy, or what is kept for the backward pass of its expansion would hold the sums for all; the tracer checks
        # without gradients what it has traced with them
        return parts[0].clone() if torch.is_grad_enabled() or torch.jit.is_tracing() else parts[0]


class StageConnections(nn.Module):
    """All connections whose targets take the output shape of one stage.

    Attributes:
        sources: For each target, the numbers of the blocks that it takes from.
        targets: For each source, the numbers of the blocks that take from it.
        expansions: For each target, what brings the sum to the channels of the stage, if it is summed in fewer.
    """

    def __init__(self, sources: Dict[int, Sequence[int]], first_block: int) -> None:
        """
        Args:
            sources: See above.
            first_block: Number of the stage's first block.
        """
        super().__init__()
        self.first_block = first_block
        self.connect(sources)
        self.expansions = nn.ModuleDict()

    def connect(self, sources: Dict[int, Sequence[int]]) -> None:
        """Set `sources`, and `targets` to go with them."""
        self.sources = {i: tuple(numbers) for i, numbers in sources.items()}
        numbers = sorted({k for numbers in sources.values() for k in numbers})
        self.targets = {k: tuple(i for i in sources if k in sources[i]) for k in numbers}

    def enter(self, flow: Flow) -> None:
        """Begin this resolution: send what the blocks of earlier stages have put out."""
        for k in self.targets:
            if k < self.first_block:
                self.send(k, flow)

    def truncate(self, last: int) -> None:
        """Remove the connections into blocks after block `last`."""
        raise NotImplementedError

    def send(self, k: int, flow: Flow) -> None:
        """Do what is done once for all targets of source k."""
        raise NotImplementedError

    def kernels(self, i: int, flow: Flow) -> Tuple[List[torch.Tensor], torch.Tensor]:
        """Kernels for the sources of target i and the bias of their sum, if nothing has been summed for it yet."""
        raise NotImplementedError

    def forward(self, y: torch.Tensor, flow: Flow) -> torch.Tensor:
        """
        Args:
            y: Output of block i-1, `[B, C, H, W]`.
            flow: The pass so far.

        Returns:
            Input of block i, `[B, C, H, W]`.
        """
        i = flow.block
        x = y
        if i in self.sources:
            if i not in flow.pending[0]:
                x = _add_convs(y, [flow.source(k) for k in self.sources[i]], *self.kernels(i, flow))
            elif self.expansions:
                expansion = self.expansions[str(i)]
                x = _add_convs(y, [flow.take()], [expansion.weight], expansion.bias)
            else:
                x = y + flow.take()
        if i - 1 in self.targets:
            self.send(i - 1, flow)
        return x


class Connections(StageConnections):
    """Connections that are learned: a gate, a convolution and a norm for each."""

    def __init__(
            self,
            source_chs: Sequence[int],
            sources: Dict[int, Sequence[int]],
            first_block: int,
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
            first_block: Number of the stage's first block.
            out_chs: Channels of the stage's output.
            gate: Gate function, a key of `GATES`.
            gate_init: Gate value to start from. None is 0.5 / n for the n gates of a target.
            rank: Number of channels in which the connections into a block are summed, before a 1x1 convolution
                expands the sum to ``out_chs``. None or 0 sums them in ``out_chs`` channels.
            norm_layer: Norm layer.
        """
        super().__init__(sources, first_block)
        dd = {'device': device, 'dtype': dtype}
        self.gates = nn.ModuleDict({
            str(i): create_gate(gate, len(numbers), 0.5 / len(numbers) if gate_init is None else gate_init, **dd)
            for i, numbers in sources.items()
        })
        self.projections = nn.ModuleDict({
            str(k): Projection(source_chs[k - 1], rank or out_chs, targets, norm_layer, **dd)
            for k, targets in self.targets.items()
        })
        if rank:
            for i in sources:
                self.expansions[str(i)] = conv = nn.Conv2d(rank, out_chs, 1, bias=False, **dd)
                nn.init.normal_(conv.weight, std=rank ** -0.5)  # keeps the variance that the norms give the sum

    def gate_values(self) -> Dict[int, torch.Tensor]:
        """For each source, the gate values of its targets here."""
        values = {i: self.gates[str(i)]().unbind() for i in self.sources}
        return {
            k: torch.stack([values[i][self.sources[i].index(k)] for i in targets]) for k, targets in self.targets.items()
        }

    @property
    def folds(self) -> bool:
        """Whether norms and gates of all fold into kernels now, for sums of the stage's channels."""
        return len(self.expansions) == 0 and all(projection.folds for projection in self.projections.values())

    def enter(self, flow: Flow) -> None:
        flow.gates, flow.folds = self.gate_values(), self.folds
        super().enter(flow)

    def send(self, k: int, flow: Flow) -> None:
        projection = self.projections[str(k)]
        targets, args = projection.targets, (flow.source(k), flow.gates[k])
        if flow.folds:
            kernels, biases = (tensor.chunk(len(targets)) for tensor in projection.folded(*args))
            for j, i in enumerate(targets):
                flow.kernels[i, k] = kernels[j], biases[j]
            return
        x = checkpoint(projection, *args) if flow.grad_checkpointing else projection(*args)
        flow.receive(targets, x)

    def kernels(self, i: int, flow: Flow) -> Tuple[List[torch.Tensor], torch.Tensor]:
        kernels, biases = zip(*(flow.kernels.pop((i, k)) for k in self.sources[i]))
        return list(kernels), sum(biases)

    def remove(self, connections: Set[Tuple[int, int]]) -> None:
        """Remove connections, given as (target, source)."""
        before = self.sources
        sources = {i: tuple(k for k in numbers if (i, k) not in connections) for i, numbers in before.items()}
        self.connect({i: numbers for i, numbers in sources.items() if numbers})
        for i, numbers in sources.items():
            if not numbers:
                del self.gates[str(i)]
                if self.expansions:
                    del self.expansions[str(i)]
            elif numbers != before[i]:
                kept = [before[i].index(k) for k in numbers]
                for name, weight in list(self.gates[str(i)].named_parameters()):
                    if weight.ndim == 1:
                        setattr(self.gates[str(i)], name, nn.Parameter(weight.detach()[kept], weight.requires_grad))
        for k, projection in list(self.projections.items()):
            if int(k) not in self.targets:
                del self.projections[k]
            elif projection.targets != self.targets[int(k)]:
                projection.keep(self.targets[int(k)])

    def truncate(self, last: int) -> None:
        self.remove({(i, k) for i, numbers in self.sources.items() for k in numbers if i > last})

    def fuse(self) -> StageConnections:
        """The same as plain convolutions, for inference; itself if it has norms that do not fold."""
        if not all(is_batch_norm(projection.norm.eval()) for projection in self.projections.values()):
            return self
        return FusedConnections(self)


def _conv1x1(kernel: torch.Tensor, bias: Optional[torch.Tensor]) -> nn.Conv2d:
    conv = nn.Conv2d(kernel.shape[1], kernel.shape[0], 1, bias=bias is not None, device='meta')
    conv.weight = nn.Parameter(kernel)
    if bias is not None:
        conv.bias = nn.Parameter(bias)
    return conv


class FusedConnections(StageConnections):
    """Connections for inference, norms and gates in the kernels: one convolution for each target over its sources.

    Where sums are of fewer channels than the stage has, one for each source, and one for each target.
    """
    fused = True

    @torch.no_grad()
    def __init__(self, connections: Connections) -> None:
        """
        Args:
            connections: What to fuse.
        """
        super().__init__(connections.sources, connections.first_block)
        connections.eval()
        gates = connections.gate_values()
        folded = {k: connections.projections[str(k)].folded(None, gates[k]) for k in self.targets}
        parts = {
            (i, k): part for k, (kernel, bias) in folded.items() for targets in [self.targets[k]]
            for i, *part in zip(targets, kernel.chunk(len(targets)), bias.chunk(len(targets)))
        }
        self.convs = nn.ModuleDict()
        for i, numbers in self.sources.items():
            kernels, biases = zip(*(parts[i, k] for k in numbers))
            if connections.expansions:
                weight = connections.expansions[str(i)].weight
                self.expansions[str(i)] = _conv1x1(weight.detach(), weight.flatten(1) @ sum(biases))
            else:
                self.convs[str(i)] = _conv1x1(torch.cat(kernels, dim=1), sum(biases))
        if connections.expansions:
            for k, (kernel, _) in folded.items():
                self.convs[str(k)] = _conv1x1(kernel, None)
        self.source_chs = {k: kernel.shape[1] for k, (kernel, _) in folded.items()}

    def truncate(self, last: int) -> None:
        before = self.targets
        for i in [i for i in self.sources if i > last]:
            del (self.expansions or self.convs)[str(i)]
        self.connect({i: numbers for i, numbers in self.sources.items() if i <= last})
        if self.expansions:
            for k, targets in before.items():
                weight = self.convs.pop(str(k)).weight.detach().unflatten(0, (len(targets), -1))
                if k in self.targets:
                    kept = [targets.index(i) for i in self.targets[k]]
                    self.convs[str(k)] = _conv1x1(weight[kept].flatten(0, 1), None)

    def send(self, k: int, flow: Flow) -> None:
        if self.expansions:
            source, conv = flow.source(k), self.convs[str(k)]
            known, total = flow.pending
            if known == self.targets[k]:
                flow.pending = known, _accumulate(total, source, conv.weight)
            else:
                flow.receive(self.targets[k], conv(source))

    def kernels(self, i: int, flow: Flow) -> Tuple[List[torch.Tensor], torch.Tensor]:
        conv = self.convs[str(i)]
        return list(conv.weight.split([self.source_chs[k] for k in self.sources[i]], dim=1)), conv.bias

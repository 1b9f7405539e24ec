"""Batch norm over the batches of all processes, on devices that PyTorch's SyncBatchNorm leaves out, the CPU first."""
from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.layers import BatchNormAct2d


class AllReduce(torch.autograd.Function):
    """The sum of a tensor over all processes; its gradient is the sum of theirs.

    PyTorch's own, `torch.distributed.nn.functional.all_reduce`, is deprecated in favour of a private module.
    """

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return AllReduce.apply(grad)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """`BatchNorm2d` whose batch is that of all processes together, which may differ in size."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """
        Args:
            x: `[B, C, H, W]`
        """
        if not self.training:
            return super().forward(x)
        self.num_batches_tracked.add_(1)
        dtype = x.dtype
        x = x.to(self.weight.dtype)  # sums of half precision lose too much
        count = torch.full((1,), x.numel() / x.shape[1], dtype=x.dtype, device=x.device)
        total, count = AllReduce.apply(torch.cat([x.sum((0, 2, 3)), count])).split([x.shape[1], 1])
        mean = total / count
        centered = x - mean[:, None, None]
        var = AllReduce.apply(centered.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var * count / (count - 1), self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        return (centered * scale[:, None, None] + self.bias[:, None, None]).to(dtype)


def convert(module: nn.Module) -> nn.Module:
    """Make every `BatchNorm2d` of a model one over all processes.

    Raises:
        ValueError: If a norm has no such counterpart.
    """
    for name, child in module.named_modules():
        if isinstance(child, BatchNormAct2d) or type(child) is nn.BatchNorm2d and not (
                child.affine and child.track_running_stats and child.momentum is not None):
            raise ValueError(f'--sync-bn on this device cannot convert {name} ({type(child).__name__}).')
        if type(child) is nn.BatchNorm2d:
            child.__class__ = SyncBatchNorm2d  # the state is the same
    return module

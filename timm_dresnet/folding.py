"""Batch norms folded into the convolutions before them: for inference, and in training where that is cheaper."""
from contextlib import nullcontext
from typing import Optional, Sequence, Tuple, Type

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.fusion import fuse_conv_bn_weights

__all__ = ['can_bypass', 'can_fold', 'concat', 'fold_gated_norms', 'fold_norms', 'gated_norm']


def can_bypass(module: nn.Module, module_cls: Type[nn.Module], x: Optional[torch.Tensor] = None) -> bool:
    """Whether nobody could tell if the parameters of a module were used in place of a call with x.

    So it is of exactly the class that was made, without hooks and without a ``forward`` of its own, and torch.fx does
    not trace it. Adapters, pruning, parametrizations, offloading and sharding all change one of these.
    """
    plain = type(module) is module_cls and 'forward' not in module.__dict__ and not isinstance(x, torch.fx.Proxy)
    return plain and not (
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
        or _has_any_global_hook())


def can_fold(norm: nn.Module, x: Optional[torch.Tensor] = None) -> bool:
    """Whether a norm is a plain batch norm that can be bypassed, so that a gate or a convolution can take it in."""
    plain = can_bypass(norm, nn.BatchNorm2d, x) or can_bypass(norm, nn.SyncBatchNorm, x) and not norm.training
    return plain and norm.affine and norm.track_running_stats and not (norm.training and norm.momentum is None)


def fold_norms(block: nn.Module) -> bool:
    """Fold each batch norm of a residual block into the convolution before it, for inference.

    Args:
        block: A block of timm's ResNet, changed in place. Other norms stay as they are.

    Returns:
        Whether there was one.
    """
    folded = False
    pairs = [(block, f'conv{i}', f'bn{i}') for i in (1, 2, 3)]
    if block.downsample is not None:
        last = len(block.downsample) - 1
        pairs.append((block.downsample, str(last - 1), str(last)))
    for module, conv_name, norm_name in pairs:
        conv, norm = getattr(module, conv_name, None), getattr(module, norm_name, None)
        if conv is not None and can_bypass(conv, nn.Conv2d) and can_fold(norm.eval()):
            conv.weight, conv.bias = fuse_conv_bn_weights(
                conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias)
            setattr(module, norm_name, nn.Identity())
            folded = True
    return folded


def gated_norm(norm: nn.Module, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`gate * norm(x)`, of `[B, C, H, W]` and `[C]`: by the weight and bias of a plain batch norm."""
    if not can_fold(norm, x):
        return norm(x) * gate[:, None, None].to(x.dtype)
    if norm.training:
        norm.num_batches_tracked.add_(1)
    weight, bias = norm.weight * gate, norm.bias * gate
    return F.batch_norm(
        x, norm.running_mean, norm.running_var, weight, bias, norm.training, norm.momentum or 0., norm.eps)


def concat(tensors: Sequence[torch.Tensor], dim: int = 1) -> torch.Tensor:
    """`torch.cat`, but without a copy of a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


class _Moments(torch.autograd.Function):
    """Mean and covariance of rows, `[N, C]`, in `dtype`. Only the rows are kept, and one product gives their gradient."""
    generate_vmap_rule = True

    @staticmethod
    def forward(rows, dtype):
        mean = rows.mean(0, dtype=dtype)
        centred = rows - mean  # or large means would leave nothing of small variances
        return mean, torch.addmm(mean, centred.t(), centred, beta=0, alpha=1 / len(rows))

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[0], output[0])
        ctx.save_for_forward(inputs[0], output[0])

    @staticmethod
    def backward(ctx, mean_grad, cov_grad):
        rows, mean = ctx.saved_tensors
        cov_grad = cov_grad + cov_grad.t()
        row = torch.addmv(mean_grad, cov_grad, mean, alpha=-1).to(rows.dtype)
        return torch.addmm(row, rows, cov_grad.to(rows.dtype), beta=1 / len(rows), alpha=1 / len(rows)), None

    @staticmethod
    def jvp(ctx, tangent, _):
        rows, mean = ctx.saved_tensors
        product = (rows - mean).t() @ tangent.to(mean.dtype) / len(rows)
        return tangent.mean(0, dtype=mean.dtype), product + product.t()


def _moments(x: torch.Tensor, dtype: torch.dtype) -> Tuple[torch.Tensor, torch.Tensor]:
    """Mean, `[C]`, and covariance, `[C, C]`, of `[B, C, H, W]` over images and positions."""
    rows = x.permute(0, 2, 3, 1).flatten(0, 2)
    if torch.compiler.is_compiling():  # torch.compile takes no function with a jvp, and finds a backward pass by itself
        return _Moments.forward(rows, dtype)
    return _Moments.apply(rows, dtype)


def fold_gated_norms(
        convs: Sequence[nn.Conv2d],
        norms: Sequence[nn.BatchNorm2d],
        gates: torch.Tensor,
        x: Optional[torch.Tensor] = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Fold `sum_k gate_k * norm_k(conv_k(y_k))` into one convolution of all y_k, their channels side by side.

    Mean and variance of what a 1x1 convolution puts out follow from mean and covariance of what it takes in. So this
    goes in training too, and what the norms would see is never made.

    Args:
        convs: 1x1 convolutions without bias, from `C_k` channels to `C`.
        norms: Their norms, for which `can_fold` holds, all in the same mode.
        gates: `[n, C]`
        x: In training, the y_k, `[B, sum(C_k), H, W]`.

    Returns:
        Its kernel, `[C, sum(C_k), 1, 1]`, and its bias, `[C]`.
    """
    def of_norms(name: str) -> torch.Tensor:
        return concat([getattr(norm, name)[None] for norm in norms], dim=0)

    device = gates.device.type  # 'meta' has no autocast
    with nullcontext() if device == 'meta' else torch.autocast(device, enabled=False):
        dtype, training = torch.promote_types(gates.dtype, torch.float32), norms[0].training
        chs = [conv.in_channels for conv in convs]
        kernels = [conv.weight.flatten(1).to(dtype) for conv in convs]
        kernel, gates = concat(kernels), gates.to(dtype)
        if training:
            means, covs = zip(*(_moments(y, dtype) for y in x.split(chs, dim=1)))
            products = kernel * concat([k @ cov for k, cov in zip(kernels, covs)])
            var = concat([part.sum(1)[None] for part in products.split(chs, dim=1)], dim=0)
            with torch.no_grad():
                count = x.numel() / x.shape[1]
                for norm, k, mean, v in zip(norms, kernels, means, (var * (count / (count - 1))).unbind()):
                    norm.running_mean.lerp_((k @ mean).to(norm.running_mean.dtype), norm.momentum)
                    norm.running_var.lerp_(v.to(norm.running_var.dtype), norm.momentum)
                    norm.num_batches_tracked.add_(1)
        else:
            var = of_norms('running_var')
        scale = gates * of_norms('weight') * torch.rsqrt(var + norms[0].eps)
        kernel = kernel * concat([s[:, None].expand(-1, c) for s, c in zip(scale.unbind(), chs)])
        bias = gates * of_norms('bias')
        if training:
            bias = torch.addmv(bias.sum(0), kernel, concat(means, dim=0), alpha=-1)
        else:
            bias = (bias - of_norms('running_mean') * scale).sum(0)
        dtype = convs[0].weight.dtype
        return kernel[:, :, None, None].to(dtype), bias.to(dtype)

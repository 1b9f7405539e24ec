"""Batch norms folded into the convolutions before them: for inference, and in training where that is cheaper."""
from contextlib import nullcontext
from typing import Any, Iterable, List, Optional, Sequence, Tuple, Type

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.layers.norm_act import FrozenBatchNorm2d
from torch.nn.modules.module import _has_any_global_hook
from torch.nn.utils.fusion import fuse_conv_bn_eval


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
    if can_bypass(norm, FrozenBatchNorm2d, x):  # as timm.utils.freeze leaves it
        return not norm.training
    plain = can_bypass(norm, nn.BatchNorm2d, x) or can_bypass(norm, nn.SyncBatchNorm, x) and not norm.training
    return plain and norm.affine and norm.bias is not None and norm.track_running_stats and not (
        norm.training and (norm.momentum is None or x is not None and x.numel() <= x.shape[1]))  # which it refuses


def fold_norms(block: nn.Module) -> bool:
    """Fold batch norms of one of timm's residual blocks into convolutions, for inference, and say whether any did."""
    folded = False
    pairs = [(block, f'conv{i}', f'bn{i}') for i in (1, 2, 3)]
    if block.downsample is not None:
        last = len(block.downsample) - 1
        pairs.append((block.downsample, str(last - 1), str(last)))
    for module, conv_name, norm_name in pairs:
        conv: Any = getattr(module, conv_name, None)
        norm: Any = getattr(module, norm_name, None)
        if conv is not None and can_bypass(conv, nn.Conv2d) and can_fold(norm.eval()):
            setattr(module, conv_name, fuse_conv_bn_eval(conv.eval(), norm))
            setattr(module, norm_name, nn.Identity())
            folded = True
    return folded


def gated_norm(norm: nn.Module, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """`gate * norm(x)`, of `[B, C, H, W]` and `[C]`: in training by the weight and bias of a plain batch norm."""
    if not norm.training or not can_fold(norm, x):
        return norm(x) * gate[:, None, None].to(x.dtype)
    norm.num_batches_tracked.add_(1)
    weight, bias = norm.weight * gate, norm.bias * gate
    return F.batch_norm(x, norm.running_mean, norm.running_var, weight, bias, True, norm.momentum, norm.eps)


def concat(tensors: List[torch.Tensor], dim: int = 1) -> torch.Tensor:
    """`torch.cat`, but without a copy of a single tensor."""
    return tensors[0] if len(tensors) == 1 else torch.cat(tensors, dim)


class _Moments(torch.autograd.Function):
    """Mean of rows, `[N, C]`, and covariance of each `chs` columns. Only the rows are kept for the gradient."""
    generate_vmap_rule = True

    @staticmethod
    def forward(rows, chs, dtype):
        mean = rows.mean(0, dtype=dtype)
        centred = rows - mean  # or large means would leave nothing of small variances
        parts = zip(mean.split(chs), centred.split(chs, dim=1))
        return mean, *(torch.addmm(m, part.t(), part, beta=0, alpha=1 / rows.shape[0]) for m, part in parts)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.chs = inputs[1]
        ctx.save_for_backward(inputs[0], output[0])
        ctx.save_for_forward(inputs[0], output[0])

    @staticmethod
    def backward(ctx, mean_grad, *cov_grads):
        rows, mean = ctx.saved_tensors
        parts, grads, n = (tensor.split(ctx.chs, dim=-1) for tensor in (rows, mean, mean_grad)), [], rows.shape[0]
        for part, m, grad, cov_grad in zip(*parts, cov_grads):
            cov_grad = cov_grad + cov_grad.t()
            row = torch.addmv(grad, cov_grad, m, alpha=-1).to(rows.dtype)
            grads.append(torch.addmm(row, part, cov_grad.to(rows.dtype), beta=1 / n, alpha=1 / n))
        return concat(grads), None, None

    @staticmethod
    def jvp(ctx, tangent, *_):
        rows, mean = ctx.saved_tensors
        parts = zip((rows - mean).split(ctx.chs, dim=1), tangent.to(mean.dtype).split(ctx.chs, dim=1))
        products = [part.t() @ t / rows.shape[0] for part, t in parts]
        return tangent.mean(0, dtype=mean.dtype), *(product + product.t() for product in products)


def fold_gated_norms(
        modules: Sequence[nn.Module],
        gates: Sequence[torch.Tensor],
        x: Any = None,
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Fold `sum_k gate_k * norm_k(conv_k(y_k))` into one convolution of all y_k, their channels side by side.

    Mean and variance of what a 1x1 convolution puts out follow from mean and covariance of what it takes in. So this
    goes in training too, and what the norms would see is never made.

    Args:
        modules: Each with a 1x1 convolution ``conv`` without bias, from `C_k` channels to `C`, and its ``norm``, for
            which `can_fold` holds, all in the same mode.
        gates: `[C]` each.
        x: In training, the y_k, `[B, sum(C_k), H, W]`.

    Returns:
        Its kernel, `[C, sum(C_k), 1, 1]`, and its bias, `[C]`.
    """
    def rows(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
        return concat([tensor[None] for tensor in tensors], dim=0).to(dtype)

    norms, chs = [module.norm for module in modules], [module.conv.in_channels for module in modules]
    training, device = norms[0].training, gates[0].device.type
    with nullcontext() if device == 'meta' else torch.autocast(device, enabled=False):  # 'meta' has none
        dtype = torch.promote_types(gates[0].dtype, torch.float32)
        kernels = [module.conv.weight.flatten(1).to(dtype) for module in modules]
        kernel, gate = concat(kernels), rows(gates)
        if training:
            # torch.compile takes no function with a jvp, and finds a backward pass by itself
            moments = _Moments.forward if torch.compiler.is_compiling() else _Moments.apply
            mean, *covs = moments(x.permute(0, 2, 3, 1).flatten(0, 2), chs, dtype)
            products = kernel * concat([k @ cov for k, cov in zip(kernels, covs)])
            var = rows(part.sum(1) for part in products.split(chs, dim=1))
            mean = rows(k @ m for k, m in zip(kernels, mean.split(chs)))
            with torch.no_grad():
                count = x.numel() / x.shape[1]
                for norm, m, v in zip(norms, mean.unbind(), (var * (count / (count - 1))).unbind()):
                    norm.running_mean.lerp_(m.to(norm.running_mean.dtype), norm.momentum)
                    norm.running_var.lerp_(v.to(norm.running_var.dtype), norm.momentum)
                    norm.num_batches_tracked.add_(1)
        else:
            mean, var = rows(norm.running_mean for norm in norms), rows(norm.running_var for norm in norms)
        scale = gate * rows(norm.weight for norm in norms) * torch.rsqrt(var + norms[0].eps)
        bias = (gate * rows(norm.bias for norm in norms) - mean * scale).sum(0)
        kernel = kernel * concat([s[:, None].expand(-1, c) for s, c in zip(scale.unbind(), chs)])
        dtype = modules[0].conv.weight.dtype
        return kernel[:, :, None, None].to(dtype), bias.to(dtype)

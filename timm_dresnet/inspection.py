"""Records of a network's learned connections, and of how activations and gradients propagate through it.

Papers:
* `The Shattered Gradients Problem: If resnets are the answer, then what is the question?` -
  https://arxiv.org/abs/1702.08591
* `Characterizing signal propagation to close the performance gap in unnormalized ResNets` -
  https://arxiv.org/abs/2101.08692
"""
from contextlib import ExitStack
from itertools import count
from typing import Any, Dict, List, Optional, Tuple, Type

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models import resnet
from timm.utils import unwrap_model
from timm.utils.model import avg_ch_var
from torch.func import functional_call

from .adaresnet import AdaResNet, SkipWeight
from .connections import Connections, Flow, Projection
from .dresnet import DResNet

__all__ = ['connections', 'signal_propagation']

_Measures = Dict[Tuple[int, Optional[int]], Dict[str, float]]


def blocks(model: nn.Module) -> List[Tuple[str, nn.Module]]:
    """Names and modules of a ResNet's blocks, in order."""
    stages = [info['module'].split('.')[0] for info in model.feature_info if info['module'].startswith('layer')]
    whole = [name for name in stages if isinstance(model.get_submodule(name), nn.Sequential)]  # others are taken out
    return [(f'{name}.{j}', block) for name in whole for j, block in enumerate(model.get_submodule(name))]


def _compare(part: torch.Tensor, whole: torch.Tensor) -> Dict[str, float]:
    dtype = torch.float32 if whole.device.type == 'mps' else torch.float64  # which a Mac's GPU has not
    part, whole = part.to(dtype), whole.to(dtype)
    square = whole.square().sum().clamp_min(torch.finfo(whole.dtype).tiny)
    return dict(effect=(part.square().sum() / square).sqrt().item(), share=((part * whole).sum() / square).item())


def _measure(model: nn.Module, images: torch.Tensor) -> _Measures:
    """Effect and share of each connection, by (target, source), or of each shortcut, by (target, None)."""
    parts: Dict[Tuple[int, int], torch.Tensor] = {}
    measures: _Measures = {}
    numbers = count(1)

    def keep(projection: Projection, args: Tuple[torch.Tensor, ...], x: torch.Tensor) -> None:
        chunks = x.clone().chunk(len(projection.targets), dim=1)
        parts.update(((i, projection.sources[0]), chunk) for i, chunk in zip(projection.targets, chunks))

    def compare_parts(stage: Connections, args: Tuple[torch.Tensor, Flow], x: torch.Tensor) -> None:
        i = args[1].block
        for k in stage.sources[i]:
            part = parts.pop((i, k))
            measures[i, k] = _compare(stage.expansions[str(i)](part) if stage.expansions else part, x)

    def compare_shortcut(skip_weight: SkipWeight, args: Tuple[torch.Tensor, torch.Tensor], x: torch.Tensor) -> None:
        measures[next(numbers), None] = _compare(skip_weight.alpha * args[1], x)

    hooks: Dict[Type[nn.Module], Any] = {Projection: keep, Connections: compare_parts, SkipWeight: compare_shortcut}
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance('force_eager'))  # what is compiled already would not call hooks
        for module in model.modules():  # which lists a skip weight that blocks share once
            stack.callback(setattr, module, 'training', module.training)
            for kind, hook in hooks.items():
                if isinstance(module, kind):
                    stack.enter_context(module.register_forward_hook(hook))
        model.eval()(images)
    return measures


@torch.no_grad()
def connections(model: nn.Module, images: Optional[torch.Tensor] = None) -> List[Dict[str, Any]]:
    """List the learned connections of a network.

    Args:
        model: A DResNet or an AdaResNet, also inside `torch.compile`, `DataParallel` or an EMA.
        images: Images to measure on, preprocessed, `[B, C, H, W]`.

    Returns:
        One record for each connection, in the order of targets, then sources. Blocks are numbered from 1.

        * DResNet: ``target``, ``source``, ``target_name``, ``source_name``, ``gate`` (value F(w)), ``weight`` (w) and,
          for Gauss gates, ``sharpness`` (k).
        * AdaResNet: ``target``, ``target_name``, ``kind`` ('identity' or 'projection') and ``alpha``.

        With ``images``, each record also compares what the connection adds with the whole sum, which is the input of
        its target block (for a shortcut: the sum before the block's last activation): ``effect`` is the ratio of their
        norms, ``share`` their inner product over the squared norm of the sum. A share may be negative. The shares of
        all summands, the output of the block before (or the residual branch) included, add up to 1.

    Raises:
        ValueError: If the model has no learned connections or is fused for inference, or if ``images`` is empty.
    """
    if images is not None and not len(images):
        raise ValueError('images is empty: connections are measured on at least one image.')
    model = unwrap_model(model)
    if not isinstance(model, (AdaResNet, DResNet)):
        raise ValueError(f'connections are learned in a DResNet or an AdaResNet, got a {type(model).__name__}.')
    if model.fused:
        raise ValueError('a fused model has no gates or skip weights left: use the model from before fusing.')
    measures = {} if images is None else _measure(model, images)
    if isinstance(model, AdaResNet):
        return [
            dict(
                target=i,
                target_name=name,
                kind='identity' if block.downsample is None else 'projection',
                alpha=block.skip_weight.alpha.item(),
                **measures.get((i, None), {}),
            )
            for i, (name, block) in enumerate(blocks(model), start=1)
        ]
    names = [name for name, _ in blocks(model)]
    records = []
    for stage in model.connections.values():
        for i, sources in stage.sources.items():
            if i > len(names):  # the first block of a stage that is taken out
                continue
            gate = stage.gates[str(i)]
            for k, weight, value in zip(sources, gate.weight.tolist(), gate().tolist()):
                record = dict(
                    target=i, source=k, target_name=names[i - 1], source_name=names[k - 1], gate=value, weight=weight)
                if hasattr(gate, 'log_sharpness'):
                    record['sharpness'] = gate.log_sharpness.exp().item()
                records.append({**record, **measures.get((i, k), {})})
    return records


@torch.enable_grad()
def signal_propagation(
        model: nn.Module,
        images: torch.Tensor,
        targets: Optional[torch.Tensor] = None,
        num_points: int = 32,
) -> Dict[str, List[Dict[str, Any]]]:
    """Measure how activations and gradients propagate through a network, at initialization or after training.

    In training mode, norms take their statistics from the images; in evaluation mode, they use their running
    statistics. The model is left unchanged, running statistics and gradients included.

    Args:
        model: A ResNet of timm, or any network of this package.
        images: At least two images, preprocessed, `[B, C, H, W]`.
        targets: Their classes, `[B]`, for the cross-entropy whose gradient is taken. Random if not given.
        num_points: Number of points, evenly spaced on the line from the first image to the second, at which gradients
            with respect to the input are compared.

    Returns:
        Three lists of records:

        * ``blocks``, for the output of each block: ``block`` (its number), ``name``, ``mean``, ``variance`` (over
          images and positions, averaged over channels; Brock et al., 2021) and ``gradient_norm`` (of the cross-entropy
          with respect to this output).
        * ``layers``, for each convolution and linear layer whose weight is a parameter: ``name``, ``gradient_norm`` (of
          the cross-entropy with respect to its weight) and ``weight_norm``.
        * ``input_gradients``: ``distance`` of two points as a fraction of the line, and ``correlation``, the cosine of
          the gradients at these points, averaged over all pairs at this distance. The function differentiated is a
          fixed random combination of the outputs. Where gradients are shattered (Balduzzi et al., 2017), the
          correlation is near 0 at any distance but 0.

    Raises:
        ValueError: If the model is not a ResNet, or there are fewer than two images or two points.
    """
    if not isinstance(model, resnet.ResNet):
        raise ValueError(f'signal_propagation takes ResNets of timm or this package, got a {type(model).__name__}.')
    if len(images) < 2 or num_points < 2:
        raise ValueError(
            f'signal_propagation needs at least two images and two points, got {len(images)} and {num_points}.')
    generator = torch.Generator().manual_seed(0)
    weights = {name: p.detach().requires_grad_() for name, p in model.named_parameters() if p.is_floating_point()}

    def forward(x: torch.Tensor) -> torch.Tensor:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        with torch.compiler.set_stance('force_eager'), ExitStack() as stack:
            stack.callback(setattr, model, 'grad_checkpointing', model.grad_checkpointing)
            model.grad_checkpointing = False  # blocks that run again would change the model's buffers
            for module in model.modules():  # functional_call loses parameters that several modules share
                stack.callback(module._parameters.update, dict(module._parameters))
            return functional_call(model, {**weights, **buffers}, x).flatten(1)

    outputs = {}
    with ExitStack() as stack:
        for name, block in blocks(model):
            stack.enter_context(block.register_forward_hook(
                lambda block, args, output, name=name: outputs.update({name: output})))
        output = forward(images)
    if targets is None:
        targets = torch.randint(output.shape[1], (len(images),), generator=generator).to(images.device)
    layers = {
        name: weights[f'{name}.weight'] for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear)) and f'{name}.weight' in weights}
    loss = F.cross_entropy(output.float(), targets)
    gradients = torch.autograd.grad(loss, [*outputs.values(), *layers.values()], materialize_grads=True)
    gradient_norms = {name: g.norm().item() for name, g in zip([*outputs, *layers], gradients)}

    steps = torch.linspace(0, 1, num_points, device=images.device).view(-1, 1, 1, 1)
    line = torch.lerp(images[:1], images[1:2], steps.to(images.dtype)).requires_grad_()
    direction = torch.randn(output.shape[1], generator=generator).to(output)
    gradient, = torch.autograd.grad((forward(line) @ direction).sum(), line)
    gradient = F.normalize(gradient.flatten(1).float(), dim=1)
    cosines = gradient @ gradient.T
    return dict(
        blocks=[
            dict(block=i, name=name, mean=y.mean().item(), variance=avg_ch_var(None, None, y.detach().float()),
                 gradient_norm=gradient_norms[name])
            for i, (name, y) in enumerate(outputs.items(), start=1)],
        layers=[
            dict(name=name, gradient_norm=gradient_norms[name], weight_norm=weight.norm().item())
            for name, weight in layers.items()],
        input_gradients=[
            dict(distance=lag / (num_points - 1), correlation=cosines.diagonal(lag).mean().item())
            for lag in range(num_points)],
    )

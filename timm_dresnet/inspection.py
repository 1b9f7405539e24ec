"""What a network's learned connections have become: as records and as a picture."""
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple, Union

import torch
import torch.nn as nn

from .adaresnet import AdaResNet
from .dresnet import DResNet
from .gated_connections import Connections, Flow

__all__ = ['connections', 'plot_connections']


def _block_names(model: nn.Module) -> List[str]:
    return [f'{stage}.{i}' for stage in model.stage_names for i in range(len(getattr(model, stage)))]


@torch.no_grad()
def _effects(model: DResNet, images: torch.Tensor) -> Dict[Tuple[int, int], float]:
    """Norm of what each connection, (target, source), adds to its target's input, over the norm of that input."""
    effects = {}

    def measure(module: Connections, args: Tuple[torch.Tensor, Flow], x: torch.Tensor) -> None:
        flow = args[1]
        i = flow.block
        for k in module.sources.get(i, ()):
            projection = module.projections[str(k)]
            part = projection(flow.source(k), flow.gates[k]).chunk(len(projection.targets), dim=1)
            part = part[projection.targets.index(i)]
            if module.expansions:
                part = module.expansions[str(i)](part)
            effects[i, k] = (part.double().norm() / x.double().norm()).item()

    training = {module: module.training for module in model.modules()}
    hooks = [stage.register_forward_hook(measure) for stage in model.connections.values()]
    try:
        model.eval()(images)
    finally:
        for module, mode in training.items():
            module.training = mode
        for hook in hooks:
            hook.remove()
    return effects


@torch.no_grad()
def connections(model: nn.Module, images: Optional[torch.Tensor] = None) -> List[Dict[str, Any]]:
    """List the learned connections of a network.

    Args:
        model: A DResNet or an AdaResNet.
        images: Images to measure the effects of a DResNet's connections on, preprocessed, `[B, C, H, W]`.

    Returns:
        One record for each connection, in the order of targets, then sources. Blocks are numbered from 1.

        * DResNet: ``target``, ``source``, ``target_name``, ``source_name``, ``gate`` (value F(w)), ``weight`` (w),
          ``sharpness`` (k, for Gauss gates) and, on ``images``, ``effect``: the norm of what the connection adds to
          its target's input, over the norm of that input.
        * AdaResNet: ``target``, ``target_name``, ``kind`` ('identity' or 'projection') and ``alpha``.

    Raises:
        ValueError: If the model has no learned connections, or is fused for inference.
    """
    if not isinstance(model, (AdaResNet, DResNet)):
        raise ValueError(f'connections are learned in a DResNet or an AdaResNet, got a {type(model).__name__}.')
    if model.fused:
        raise ValueError('a fused model has no gates or skip weights any more: look at the one that it was made from.')
    if isinstance(model, AdaResNet):
        return [
            dict(
                target=i,
                target_name=name,
                kind='identity' if block.downsample is None else 'projection',
                alpha=block.skip_weight.alpha.item(),
            )
            for i, name in enumerate(_block_names(model), start=1)
            for block in [model.get_submodule(name)]
        ]
    names, effects = _block_names(model), {} if images is None else _effects(model, images)
    records = []
    for stage in model.connections.values():
        for i, sources in stage.sources.items():
            gate = stage.gates[str(i)]
            for k, weight, value in zip(sources, gate.weight.tolist(), gate().tolist()):
                record = dict(
                    target=i, source=k, target_name=names[i - 1], source_name=names[k - 1], gate=value, weight=weight)
                if hasattr(gate, 'log_sharpness'):
                    record['sharpness'] = gate.log_sharpness.exp().item()
                if images is not None:
                    record['effect'] = effects[i, k]
                records.append(record)
    return records


def plot_connections(model: nn.Module, path: Union[str, Path]) -> None:
    """Draw a network's learned connections: gates of targets against sources, or the skip weight of each block.

    Args:
        model: A DResNet or an AdaResNet.
        path: Where to write the picture; the ending tells the format.

    Raises:
        ValueError: If the model has no learned connections, or is fused for inference.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # not pyplot: no global state, no display
    from matplotlib.colors import CenteredNorm

    records = connections(model)
    names = _block_names(model)
    architecture = getattr(model, 'pretrained_cfg', {}).get('architecture', type(model).__name__)
    size = 2.2 + 0.3 * len(names)
    if isinstance(model, AdaResNet):
        figure = Figure(figsize=(size, 3.6), layout='constrained')
        axes = figure.subplots()
        kinds = {'identity': 'tab:blue', 'projection': 'tab:orange'}
        for kind, color in kinds.items():
            chosen = [record for record in records if record['kind'] == kind]
            axes.bar(
                [record['target'] for record in chosen],
                [record['alpha'] for record in chosen],
                color=color,
                label=kind,
            )
        axes.axhline(0, color='black', linewidth=0.8)
        axes.axhline(1, color='grey', linewidth=0.8, linestyle='--')
        axes.set_xticks(range(1, len(names) + 1), names, rotation=90)
        for record in records if len(names) <= 16 else ():  # room for numbers
            axes.annotate(
                f'{record["alpha"]:.2f}', (record['target'], max(record['alpha'], 0)), xytext=(0, 2),
                textcoords='offset points', ha='center', fontsize=7)
        axes.set(title=f'{architecture}: skip weights', xlabel='block', ylabel='alpha (1: a ResNet)')
        axes.legend()
    else:
        gates = torch.full((len(names), len(names)), float('nan'))
        for record in records:
            gates[record['target'] - 1, record['source'] - 1] = record['gate']
        gates = gates[2:, :-2].numpy()
        figure = Figure(figsize=(size, size - 0.6), layout='constrained')
        axes = figure.subplots()
        bounded = all(0 <= record['gate'] <= 1 for record in records)
        scale = dict(cmap='viridis', vmin=0, vmax=1) if bounded else dict(cmap='RdBu_r', norm=CenteredNorm())
        image = axes.imshow(gates, **scale)
        figure.colorbar(image, label='gate F(w)', shrink=0.8)
        if len(names) <= 16:  # room for numbers
            for record in records:
                red, green, blue, _ = image.to_rgba(record['gate'])
                axes.text(
                    record['source'] - 1, record['target'] - 3, f'{record["gate"]:.2f}', ha='center', va='center',
                    fontsize=7, color='black' if 0.3 * red + 0.59 * green + 0.11 * blue > 0.45 else 'white')
        axes.set_xticks(range(len(names) - 2), names[:-2], rotation=90)
        axes.set_yticks(range(len(names) - 2), names[2:])
        starts = [i for i, name in enumerate(names) if name.endswith('.0')][1:]
        for start in starts:  # where a new stage begins, among sources and among targets
            if start < len(names) - 2:
                axes.axvline(start - 0.5, color='grey', linewidth=0.8)
            if start > 2:
                axes.axhline(start - 2.5, color='grey', linewidth=0.8)
        axes.set(title=f'{architecture}: learned connections', xlabel='from block', ylabel='into block')
    figure.savefig(path, dpi=150)

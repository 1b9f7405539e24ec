"""Pictures of learned connections, and of how the signal gets through networks.

Each function returns a figure and, given a path, writes it there; the ending tells the format.
"""
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Union

import numpy as np
import torch
import torch.nn as nn

from .adaresnet import AdaResNet
from .gates import create_gate
from .inspection import blocks, connections

__all__ = ['plot_arcs', 'plot_connections', 'plot_gates', 'plot_history', 'plot_signal_propagation']

_POSITIVE, _NEGATIVE = '#0072B2', '#D55E00'  # of Okabe and Ito's colours, which the colour-blind tell apart
_COLORS = (_POSITIVE, _NEGATIVE, '#009E73', '#CC79A7', '#E69F00', '#56B4E9', 'black')
_MARKERS = 'os^Dv<>'


def _figure(width: float, height: float):
    from matplotlib.figure import Figure  # not pyplot: no global state, no display
    return Figure(figsize=(width, height), layout='constrained', facecolor='white')


def _save(figure, path: Optional[Union[str, Path]]):
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _architecture(model: nn.Module) -> str:
    return getattr(model, 'pretrained_cfg', {}).get('architecture', type(model).__name__)


def _draw_alphas(axes, records: List[Dict[str, Any]], key: str) -> None:
    for kind, color in (('identity', _COLORS[0]), ('projection', _COLORS[2])):
        chosen = [record for record in records if record['kind'] == kind]
        axes.bar([record['target'] for record in chosen], [record[key] for record in chosen], color=color, label=kind)
    axes.axhline(0, color='black', linewidth=0.8)
    axes.set_xticks(range(1, len(records) + 1), [record['target_name'] for record in records], rotation=90)
    for record in records if len(records) <= 16 else ():  # room for numbers
        axes.annotate(
            f'{record[key]:.2f}', (record['target'], max(record[key], 0)), xytext=(0, 2),
            textcoords='offset points', ha='center', fontsize=7)
    axes.margins(y=0.1)
    axes.set(xlabel='block')


def _draw_map(axes, records: List[Dict[str, Any]], names: Sequence[str], key: str) -> None:
    """Targets against sources. The first two blocks take from none, the last two give to none."""
    from matplotlib.colors import CenteredNorm

    values = np.full((len(names), len(names)), np.nan)
    for record in records:
        values[record['target'] - 1, record['source'] - 1] = record[key]
    bounded = key == 'gate' and all(0 <= record[key] <= 1 for record in records)
    largest = max((record[key] for record in records), default=1)
    scale = dict(cmap='viridis', vmin=0, vmax=largest) if bounded else dict(cmap='RdBu_r', norm=CenteredNorm())
    image = axes.imshow(values[2:, :-2], **scale)
    label = {'gate': 'gate F(w)', 'share': "share of the target's input"}[key]
    axes.figure.colorbar(image, ax=axes, label=label, shrink=0.8)
    if len(names) <= 16:  # room for numbers
        for record in records:
            red, green, blue, _ = image.to_rgba(record[key])
            axes.text(
                record['source'] - 1, record['target'] - 3, f'{record[key]:.2f}', ha='center', va='center',
                fontsize=7, color='black' if 0.3 * red + 0.59 * green + 0.11 * blue > 0.45 else 'white')
    axes.set_xticks(range(len(names) - 2), names[:-2], rotation=90)
    axes.set_yticks(range(len(names) - 2), names[2:])
    for start in [i for i, name in enumerate(names) if name.endswith('.0')][1:]:  # a new stage
        if start < len(names) - 2:
            axes.axvline(start - 0.5, color='grey', linewidth=0.8)
        if start > 2:
            axes.axhline(start - 2.5, color='grey', linewidth=0.8)
    axes.set(xlabel='from block', ylabel='into block')


def plot_connections(
        model: nn.Module,
        path: Optional[Union[str, Path]] = None,
        images: Optional[torch.Tensor] = None,
):
    """Draw a network's learned connections: gates of targets against sources, or the skip weight of each block.

    Args:
        model: A DResNet or an AdaResNet.
        path: Where to write the picture.
        images: Images on which to measure the share that comes through each connection, for a second panel,
            preprocessed, `[B, C, H, W]`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If the model has no learned connections, or is fused for inference.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    records, names = connections(model, images), [name for name, _ in blocks(model)]
    size = 2.2 + 0.3 * len(names)
    panels = 1 if images is None else 2
    if isinstance(model, AdaResNet):
        figure = _figure(size, 0.6 + 3 * panels)
        axes = figure.subplots(panels, squeeze=False)[:, 0]
        for ax, key, label in zip(axes, ('alpha', 'share'), ('alpha (1: a ResNet)', "share of the block's sum")):
            _draw_alphas(ax, records, key)
            ax.set(ylabel=label)
        axes[0].axhline(1, color='grey', linewidth=0.8, linestyle='--')
        figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=2, title='shortcut')
        figure.suptitle(f'{_architecture(model)}: skip weights')
    else:
        figure = _figure(panels * size, size - 0.6)
        for ax, key in zip(figure.subplots(1, panels, squeeze=False)[0], ('gate', 'share')):
            _draw_map(ax, records, names, key)
        figure.suptitle(f'{_architecture(model)}: learned connections')
    return _save(figure, path)


def plot_arcs(
        model: nn.Module,
        path: Optional[Union[str, Path]] = None,
        images: Optional[torch.Tensor] = None,
):
    """Draw a network as a row of blocks, and what is learned as arcs over them, the wider the more comes through.

    Args:
        model: A DResNet or an AdaResNet.
        path: Where to write the picture.
        images: Images on which to measure the share of each connection, which is then the width of its arc,
            preprocessed, `[B, C, H, W]`. Without them it is the gate or the skip weight.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If the model has no learned connections, or is fused for inference.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Arc

    records, names = connections(model, images), [name for name, _ in blocks(model)]
    key = 'share' if images is not None else 'alpha' if isinstance(model, AdaResNet) else 'gate'
    figure = _figure(max(5., 1.5 + 0.34 * len(names)), 4.2)
    axes = figure.subplots()
    axes.plot(range(len(names) + 1), [0] * (len(names) + 1), color='grey', linewidth=1, zorder=1)
    axes.scatter(range(len(names) + 1), [0] * (len(names) + 1), color='black', s=18, zorder=3)
    widest = max([abs(record[key]) for record in records], default=1) or 1
    longest = 1
    for record in sorted(records, key=lambda record: -abs(record[key])):
        if record[key] == 0:
            continue
        target = record['target']
        source = record.get('source', target - 1)  # the shortcut of a block goes past it
        strength = abs(record[key]) / widest
        longest = max(longest, target - source)
        axes.add_patch(Arc(
            ((source + target) / 2, 0), target - source, 2 * (target - source) ** 0.7, theta1=0, theta2=180,
            linewidth=0.2 + 5 * strength, alpha=0.15 + 0.7 * strength, zorder=2,
            color=_POSITIVE if record[key] >= 0 else _NEGATIVE))
    axes.set_xticks(range(len(names) + 1), ['stem', *names], rotation=90)
    axes.set(xlim=(-0.7, len(names) + 0.7), ylim=(-0.06 * longest ** 0.7, 1.06 * longest ** 0.7))
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    what = {'share': 'share of what it leads to', 'gate': 'gate', 'alpha': 'skip weight'}[key]
    samples = {limit(r[key] for r in records) for limit in (min, max)} if records else set()
    samples = [value for value in samples if abs(value) >= 0.1 * widest]
    if samples:
        figure.legend(
            handles=[
                Line2D([], [], color=_POSITIVE if value > 0 else _NEGATIVE, linewidth=0.2 + 5 * abs(value) / widest,
                       label=f'{value:.2g}')
                for value in sorted([*samples, *([samples[0] / 4] if len(samples) == 1 else [])])],
            title=what, loc='outside lower center', ncols=2)
    axes.set(title=f'{_architecture(model)}: learned connections')
    return _save(figure, path)


def plot_gates(path: Optional[Union[str, Path]] = None, sharpness: Sequence[float] = (1, 3, 10, 30)):
    """Draw the gate functions, from a weight to a gate value.

    Args:
        path: Where to write the picture.
        sharpness: Values of k to draw the Gauss gate with.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    weights = torch.linspace(-4, 4, 401)
    figure = _figure(6.5, 4)
    axes = figure.subplots()

    def draw(gate: str, label: str, **style: Any) -> None:
        module = create_gate(gate, len(weights))
        module.weight.data.copy_(weights)
        if 'k' in style:
            module.log_sharpness.data.fill_(float(np.log(style.pop('k'))))
        axes.plot(weights, module().detach(), label=label, **style)

    draw('sigmoid', 'sigmoid: $1 / (1 + e^{-w})$', color='black', linewidth=2)
    styles = ('-', '--', '-.', ':')
    for j, k in enumerate(sharpness):
        draw('gauss', f'gauss: $e^{{-{k:g} w^2}}$', k=k, color=_COLORS[j % 6], linestyle=styles[j % 4])
    draw('linear', 'linear: $w$', color='grey', linewidth=1)
    axes.set(title='Gate functions', xlabel='weight w', ylabel='gate F(w)', xlim=(-4, 4), ylim=(-0.25, 1.25))
    axes.grid(alpha=0.3)
    axes.legend(loc='upper left', fontsize=8)
    return _save(figure, path)


def plot_history(rows: Sequence[Dict[str, Any]], path: Optional[Union[str, Path]] = None):
    """Draw every gate, or skip weight, over the epochs of a training.

    Args:
        rows: Records as `connections` lists them, each with its ``epoch`` from 0: the rows of a `connections.csv`.
        path: Where to write the picture.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: If there are no rows.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap, Normalize
    from matplotlib.ticker import MaxNLocator

    if not rows:
        raise ValueError('there is no history to draw: rows is empty.')
    lines: Dict[Any, List[Any]] = {}
    for row in rows:
        value = float(row['gate'] if 'gate' in row else row['alpha'])
        lines.setdefault((int(row['target']), row.get('source')), []).append((int(row['epoch']) + 1, value))
    figure = _figure(6, 4)
    axes = figure.subplots()
    targets = Normalize(min(target for target, _ in lines), max(target for target, _ in lines))
    colors = ListedColormap(colormaps['viridis'](np.linspace(0, 0.9, 256)))  # yellow is hard to see on white
    for (target, _), points in lines.items():
        axes.plot(*zip(*points), '.-', color=colors(targets(target)), linewidth=0.8, markersize=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    has_gates = next(iter(lines))[1] is not None
    axes.set(xlabel='epoch', ylabel='gate' if has_gates else 'skip weight', title='Learned connections')
    axes.grid(alpha=0.3)
    figure.colorbar(
        ScalarMappable(targets, colors), ax=axes, label='block that takes', ticks=MaxNLocator(integer=True, nbins=8))
    return _save(figure, path)


def plot_signal_propagation(
        signals: Dict[str, Dict[str, List[Dict[str, Any]]]],
        path: Optional[Union[str, Path]] = None,
):
    """Draw how the signal gets through several networks, side by side.

    Args:
        signals: What `signal_propagation` has measured, by the name of the network.
        path: Where to write the picture.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    figure = _figure(13, 4.2)
    variances, gradients, correlations = figure.subplots(1, 3)
    for j, (name, signal) in enumerate(signals.items()):
        style = dict(label=name, color=_COLORS[j % len(_COLORS)], marker=_MARKERS[j % len(_MARKERS)], markersize=3,
                     linewidth=1)
        for axes, key in ((variances, 'variance'), (gradients, 'gradient_norm')):
            axes.plot(
                [record['block'] for record in signal['blocks']], [record[key] for record in signal['blocks']], **style)
        correlations.plot(
            [record['distance'] for record in signal['input_gradients']],
            [record['correlation'] for record in signal['input_gradients']], **style)
    variances.set(title='Activations', xlabel='block', ylabel='variance of its output', yscale='log')
    gradients.set(title='Gradients', xlabel='block', ylabel='norm of the gradient at its output', yscale='log')
    correlations.set(
        title='Shattering', xlabel='distance of two inputs', ylabel='correlation of the gradients there',
        ylim=(min(-0.1, correlations.get_ylim()[0]), 1.05))
    for axes in (variances, gradients):  # at least two decades: what hardly changes looks like it
        low, high = axes.get_ylim()
        middle = (low * high) ** 0.5
        axes.set(ylim=(min(low, middle / 10), max(high, middle * 10)))
    for axes in (variances, gradients, correlations):
        axes.grid(alpha=0.3)
    figure.legend(*variances.get_legend_handles_labels(), loc='outside lower center', ncols=min(5, len(signals)))
    return _save(figure, path)

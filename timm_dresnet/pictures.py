"""Pictures of learned connections and of signal propagation, as matplotlib figures.

Each function needs matplotlib, returns a figure, and writes it if given a path, whose suffix says in which format.
"""
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
from timm.utils import unwrap_model

from .adaresnet import AdaResNet
from .inspection import blocks, connections

if TYPE_CHECKING:  # matplotlib is optional
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ['plot_arcs', 'plot_connections', 'plot_gates', 'plot_history', 'plot_signal_propagation']

_POSITIVE, _NEGATIVE = '#0072B2', '#D55E00'  # of Okabe and Ito's colors, which color-blind readers can tell apart
_COLORS = (_POSITIVE, _NEGATIVE, '#009E73', '#CC79A7', '#E69F00', '#56B4E9', 'black')
_MAX_ARCS = 30


def _figure(width: float, height: float, title: str) -> 'Figure':
    from matplotlib.figure import Figure  # not pyplot: no global state, no display
    figure = Figure(figsize=(width, height), layout='constrained', facecolor='white')
    figure.suptitle(title)
    return figure


def _save(figure: 'Figure', path: Optional[Union[str, Path]]) -> 'Figure':
    if path is not None:
        figure.savefig(path, dpi=150)
    return figure


def _title(model: nn.Module, name: Optional[str]) -> str:
    cfg = getattr(model, 'pretrained_cfg', {})
    if name is None:
        name = cfg.get('architecture', type(model).__name__)
        if cfg.get('source') == 'local-dir':
            name = f'{Path(cfg["file"]).resolve().name} ({name})'
        elif cfg.get('tag') and model.num_classes == cfg.get('num_classes'):
            name = f'{name}.{cfg["tag"]}'
    return f'{name}: learned ' + ('skip weights' if isinstance(model, AdaResNet) else 'connections')


def _width(names: Sequence[str], minimum: float = 0.) -> float:
    return max(minimum, 2.2 + (0.3 if len(names) <= 20 else 0.2) * len(names))


def _draw_bars(axes: 'Axes', records: List[Dict[str, Any]], key: str) -> None:
    for kind, color in (('identity', _POSITIVE), ('projection', _COLORS[2])):
        chosen = [record for record in records if record['kind'] == kind]
        bars = axes.bar([r['target'] for r in chosen], [r[key] for r in chosen], color=color, label=f'{kind} shortcut')
        axes.bar_label(
            bars, fmt='{:.2f}', padding=2, fontsize=8, rotation=90 if len(records) > 12 else 0,
            bbox=dict(facecolor='white', edgecolor='none', pad=0.5))
    axes.axhline(0, color='black', linewidth=0.8)
    axes.set_xticks(range(1, len(records) + 1), [record['target_name'] for record in records], rotation=90)
    axes.margins(x=0.01, y=0.2)


def _draw_map(axes: 'Axes', records: List[Dict[str, Any]], names: Sequence[str], key: str) -> None:
    from matplotlib.colors import CenteredNorm, Normalize

    values = np.full((len(names), len(names)), np.nan)
    for record in records:
        values[record['target'] - 1, record['source'] - 1] = record[key]
    signed = any(record[key] < 0 for record in records)
    # the first two blocks are no targets, the last two no sources
    image = axes.imshow(
        values[2:, :-2], 'RdBu_r' if signed else 'viridis', norm=CenteredNorm() if signed else Normalize(vmin=0))
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    for record in records if len(names) <= 20 else ():  # room for numbers
        brightness = np.dot(image.to_rgba(record[key])[:3], (0.3, 0.59, 0.11))
        axes.text(
            record['source'] - 1, record['target'] - 3, f'{record[key]:.2f}', ha='center', va='center', fontsize=8,
            color='black' if brightness > 0.45 else 'white')
    axes.set_xticks(range(len(names) - 2), names[:-2], rotation=90)
    axes.set_yticks(range(len(names) - 2), names[2:])
    axes.autoscale(False)
    for start in (i for i, name in enumerate(names) if name.endswith('.0')):  # a new stage
        axes.axvline(start - 0.5, color='grey', linewidth=0.8)
        axes.axhline(start - 2.5, color='grey', linewidth=0.8)
    axes.set(xlabel='source: output of block', ylabel='target: input of block')


def plot_connections(
        model: nn.Module,
        path: Optional[Union[str, Path]] = None,
        images: Optional[torch.Tensor] = None,
        name: Optional[str] = None,
) -> 'Figure':
    """Draw learned connections: the gates as a map of targets against sources, or the skip weight of each block.

    Args:
        model: A DResNet or an AdaResNet.
        path: Where to write the picture.
        images: Preprocessed images, `[B, C, H, W]`, on which a second panel measures the share of each connection.
        name: Name of the model, for the title. Default: its folder, or the architecture and tag of its config.

    Raises:
        ValueError: If the model has no learned connections, or is fused for inference.
    """
    records, model = connections(model, images), unwrap_model(model)
    names = [block for block, _ in blocks(model)]
    keys = ['alpha' if isinstance(model, AdaResNet) else 'gate'] + ['share'] * (images is not None)
    if isinstance(model, AdaResNet):
        figure = _figure(_width(names, 6), 1.6 + 2.2 * len(keys), _title(model, name))
        axes = figure.subplots(len(keys), sharex=True, squeeze=False).flat
        for ax, key in zip(axes, keys):
            _draw_bars(ax, records, key)
            ax.set(ylabel=dict(alpha='skip weight alpha', share="shortcut's share of\nthe block's sum")[key])
        axes[0].axhline(1, color='grey', linewidth=0.8, linestyle='--', zorder=0, label='alpha of a ResNet')
        figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=3)
    else:
        figure = _figure(len(keys) * _width(names), _width(names), _title(model, name))
        for ax, key in zip(figure.subplots(1, len(keys), squeeze=False).flat, keys):
            _draw_map(ax, records, names, key)
            ax.set(title='gate F(w)' if key == 'gate' else "share of the target's input, on images")
    return _save(figure, path)


def plot_arcs(
        model: nn.Module,
        path: Optional[Union[str, Path]] = None,
        images: Optional[torch.Tensor] = None,
        name: Optional[str] = None,
) -> 'Figure':
    """Draw the blocks in a row, and the strongest learned connections as arcs over them, wider where they are stronger.

    Args:
        model, path, name: As for `plot_connections`.
        images: Preprocessed images, `[B, C, H, W]`, on which the share of each connection is measured, the width of its
            arc. Default: the width is the gate or the skip weight.

    Raises:
        ValueError: If the model has no learned connections, or is fused for inference.
    """
    from matplotlib.patches import Arc

    records, model = connections(model, images), unwrap_model(model)
    names = ['stem', *(block for block, _ in blocks(model))]
    key = 'share' if images is not None else 'alpha' if isinstance(model, AdaResNet) else 'gate'
    label = dict(share='share of the sum it is added to', gate='gate F(w)', alpha='skip weight alpha')[key]
    records.sort(key=lambda record: -abs(record[key]))
    most = len(records) if isinstance(model, AdaResNet) else _MAX_ARCS
    shown, rest = [record for record in records[:most] if record[key]], records[most:]
    strongest = abs(records[0][key]) if shown else 1
    figure = _figure(_width(names, 6), 4.4, _title(model, name))
    axes = figure.subplots()
    axes.plot(range(len(names)), [0] * len(names), 'o-', color='black', linewidth=0.8, markersize=4, zorder=3)
    highest = 1.
    for record in shown:
        strength = abs(record[key]) / strongest
        target = record['target']
        source = record.get('source', target - 1)  # a shortcut skips its own block
        height = (target - source) ** 0.7
        highest = max(highest, height)
        axes.add_patch(Arc(
            ((source + target) / 2, 0), target - source, 2 * height, theta1=0, theta2=180,
            linewidth=0.3 + 4 * strength, alpha=0.25 + 0.6 * strength, zorder=2,
            color=_POSITIVE if record[key] > 0 else _NEGATIVE))
    if rest:
        text = f'the {most} strongest of {len(records)}; {len(rest)} of {abs(rest[0][key]):.3g} or less are left out'
        axes.set_title(text, fontsize='medium')
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.tick_params(length=0)
    axes.set(xlim=(-0.7, len(names) - 0.3), ylim=(-0.06 * highest, 1.06 * highest), yticks=[], frame_on=False)
    for part in (0.1, 0.5, 1):
        axes.plot([], [], color=_POSITIVE, linewidth=0.3 + 4 * part, label=f'{part * strongest:.2g}')
    if any(record[key] < 0 for record in shown):
        axes.plot([], [], color=_NEGATIVE, linewidth=2, label='negative')
    figure.legend(title=f'width: {label}', loc='outside lower center', ncols=4)
    return _save(figure, path)


def plot_gates(path: Optional[Union[str, Path]] = None) -> 'Figure':
    """Draw the gate functions, from a weight to a gate value: the Gauss gate for several k."""
    weights = np.linspace(-4, 4, 401)
    figure = _figure(6.5, 4, 'Gate functions')
    axes = figure.subplots()
    axes.plot(weights, 1 / (1 + np.exp(-weights)), color='black', linewidth=2, label='sigmoid: $1 / (1 + e^{-w})$')
    for k, color, style in zip((1, 3, 10, 30), _COLORS, ('-', '--', '-.', ':')):
        label = f'gauss: $e^{{-{k} w^2}}$'
        axes.plot(weights, np.exp(-k * weights ** 2), color=color, linestyle=style, label=label)
    axes.plot(weights, weights, color='grey', linewidth=1, label='linear: $w$')
    axes.set(xlabel='weight w', ylabel='gate F(w)', xlim=(-4, 4), ylim=(-0.25, 1.25))
    axes.grid(alpha=0.3)
    axes.legend(loc='upper left', fontsize='small')
    return _save(figure, path)


def plot_history(
        rows: Sequence[Dict[str, Any]],
        path: Optional[Union[str, Path]] = None,
        name: Optional[str] = None,
) -> 'Figure':
    """Draw every gate over the epochs, a panel for each target, or every skip weight, a panel for each stage.

    Args:
        rows: Records of `connections`, each with its ``epoch``, the number of the epoch after which it was taken, from
            0; -1 is before training. So are the rows of a `connections.csv`.
        path: Where to write the picture.
        name: Name of the model, for the title.

    Raises:
        ValueError: If there are no rows.
    """
    from matplotlib import colormaps
    from matplotlib.ticker import MaxNLocator

    if not rows:
        raise ValueError('there is no history to draw: rows is empty.')
    gates = 'gate' in rows[0]
    panels: Dict[str, Dict[str, List[Tuple[int, float]]]] = {}
    for row in rows:
        panel, line = (row['target_name'], row['source_name']) if gates else row['target_name'].split('.')
        point = int(row['epoch']) + 1, float(row['gate' if gates else 'alpha'])
        panels.setdefault(panel, {}).setdefault(line, []).append(point)
    lines = list(dict.fromkeys(line for panel in panels.values() for line in panel))
    colors = dict(zip(lines, colormaps['viridis'](np.linspace(0, 0.92, len(lines)))))  # yellow is hard to see on white
    columns = min(len(panels), max(3, math.ceil(len(panels) ** 0.5)))
    count = math.ceil(len(panels) / columns)
    title = 'learned gates in training' if gates else 'learned skip weights in training'
    title = f'{name}: {title}' if name else title.capitalize()
    figure = _figure(2 + 2 * columns, max(1.1 + 1.8 * count, 1 + 0.2 * len(lines)), title)
    handles = {}
    for i, (panel, histories) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(count, columns, i)
        for line, points in histories.items():
            handles[line], = axes.plot(*zip(*points), color=colors[line])
        low, high = axes.get_ylim()
        spare = max(0, 0.05 - (high - low)) / 2  # so that small changes look small
        axes.set(ylim=(low - spare, high + spare))
        axes.set_title(f'into {panel}' if gates else panel, fontsize='medium')
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(alpha=0.3)
    figure.supxlabel('epochs trained', fontsize='medium')
    figure.supylabel('gate F(w)' if gates else 'skip weight alpha', fontsize='medium')
    figure.legend(
        [handles[line] for line in lines], lines, title='from block' if gates else 'block of\nthe stage',
        loc='outside right upper', fontsize='small')
    return _save(figure, path)


def plot_signal_propagation(
        signals: Dict[str, Dict[str, List[Dict[str, Any]]]],
        path: Optional[Union[str, Path]] = None,
) -> 'Figure':
    """Draw how activations and gradients propagate through several networks.

    Args:
        signals: Results of `signal_propagation`, by the name of the network.
        path: Where to write the picture.
    """
    figure = _figure(9.5, 4, 'Signal propagation')
    axes = figure.subplots(1, 3)
    for j, (name, signal) in enumerate(signals.items()):
        for ax, records, x, y in (
                (axes[0], 'blocks', 'block', 'variance'),
                (axes[1], 'blocks', 'block', 'gradient_norm'),
                (axes[2], 'input_gradients', 'distance', 'correlation'),
        ):
            ax.plot(
                [record[x] for record in signal[records]], [record[y] for record in signal[records]], label=name,
                color=_COLORS[j % len(_COLORS)], marker='os^Dv<>'[j % 7], markersize=3,
                linewidth=max(1, 3 - j))  # lines that coincide can all be seen
    axes[0].set(title='Activations', xlabel='block number', ylabel='variance of block output')
    axes[1].set(title='Gradients', xlabel='block number', ylabel='norm of gradient at block output')
    axes[2].set(
        title='Shattering of gradients', xlabel='input distance (fraction of the line)',
        ylabel='correlation of input gradients', ylim=(min(-0.1, axes[2].get_ylim()[0]), 1.05))
    for ax in axes:
        ax.grid(alpha=0.3)
    for ax in axes[:2]:
        ax.set(yscale='log')
        low, high = ax.get_ylim()
        ax.set(ylim=(min(low, high / 50), 2 * high))  # two decades, so that small changes look small
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=min(5, len(signals)))
    return _save(figure, path)

"""Pictures of learned connections and of signal propagation, as matplotlib figures.

Each function returns a figure and, given a path, writes it there; the suffix of the path says in which format.
"""
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional, Sequence, Tuple, Union

import numpy as np
import torch
import torch.nn as nn
from timm.utils import unwrap_model

from .adaresnet import AdaResNet
from .gates import create_gate
from .inspection import blocks, connections

if TYPE_CHECKING:  # matplotlib is optional
    from matplotlib.figure import Figure

__all__ = ['plot_arcs', 'plot_connections', 'plot_gates', 'plot_history', 'plot_signal_propagation']

_POSITIVE, _NEGATIVE = '#0072B2', '#D55E00'  # of Okabe and Ito's colors, which color-blind readers can tell apart
_COLORS = (_POSITIVE, _NEGATIVE, '#009E73', '#CC79A7', '#E69F00', '#56B4E9', 'black')
_MOST_ARCS = 40


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
    """Title with the model's name: by default its folder, or its architecture and the tag of its weights."""
    cfg = getattr(model, 'pretrained_cfg', {})
    if name is None:
        name = cfg.get('architecture', type(model).__name__)
        if cfg.get('source') == 'local-dir':
            name = f'{Path(cfg["file"]).resolve().name} ({name})'
        elif cfg.get('tag') and model.num_classes == cfg.get('num_classes'):
            name = f'{name}.{cfg["tag"]}'
    return f'{name}: ' + ('skip weights' if isinstance(model, AdaResNet) else 'learned connections')


def _draw_bars(axes, records: List[Dict[str, Any]], key: str) -> None:
    for kind, color in (('identity', _POSITIVE), ('projection', _COLORS[2])):
        chosen = [record for record in records if record['kind'] == kind]
        bars = axes.bar([r['target'] for r in chosen], [r[key] for r in chosen], color=color, label=f'{kind} shortcut')
        axes.bar_label(bars, fmt='{:.2f}', padding=2, fontsize=8, rotation=90 if len(records) > 12 else 0)
    axes.axhline(0, color='black', linewidth=0.8)
    axes.set_xticks(range(1, len(records) + 1), [record['target_name'] for record in records], rotation=90)
    axes.margins(x=0.01, y=0.18)


def _draw_map(axes, records: List[Dict[str, Any]], names: Sequence[str], key: str) -> None:
    """Targets against sources. The first two blocks are no targets, the last two no sources."""
    from matplotlib.colors import CenteredNorm

    values = np.full((len(names), len(names)), np.nan)
    for record in records:
        values[record['target'] - 1, record['source'] - 1] = record[key]
    largest = max((record[key] for record in records), default=1)
    positive = all(record[key] >= 0 for record in records)
    scale = dict(cmap='viridis', vmin=0, vmax=largest) if positive else dict(cmap='RdBu_r', norm=CenteredNorm())
    image = axes.imshow(values[2:, :-2], **scale)
    axes.figure.colorbar(image, ax=axes, shrink=0.8)
    if len(names) <= 16:  # room for numbers
        for record in records:
            red, green, blue, _ = image.to_rgba(record[key])
            axes.text(
                record['source'] - 1, record['target'] - 3, f'{record[key]:.2f}', ha='center', va='center',
                fontsize=8, color='black' if 0.3 * red + 0.59 * green + 0.11 * blue > 0.45 else 'white')
    axes.set_xticks(range(len(names) - 2), names[:-2], rotation=90)
    axes.set_yticks(range(len(names) - 2), names[2:])
    for start in [i for i, name in enumerate(names) if name.endswith('.0')][1:]:  # a new stage
        if start < len(names) - 2:
            axes.axvline(start - 0.5, color='grey', linewidth=0.8)
        if start > 2:
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
        name: The model's name for the title. Default: its folder, or its architecture and the tag in its config.

    Raises:
        ValueError: If the model has no learned connections, or is fused for inference.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    records, model = connections(model, images), unwrap_model(model)
    names = [block for block, _ in blocks(model)]
    size = 2.2 + 0.3 * len(names)
    panels = 1 if images is None else 2
    title = _title(model, name)
    if isinstance(model, AdaResNet):
        figure = _figure(max(6, size), 1 + 2.8 * panels, title)
        axes = figure.subplots(panels, squeeze=False)[:, 0]
        for ax, key, label in zip(axes, ('alpha', 'share'), ('skip weight alpha', "shortcut's share of\nthe block's sum")):
            _draw_bars(ax, records, key)
            ax.set(xlabel='block', ylabel=label)
        axes[0].axhline(1, color='grey', linewidth=0.8, linestyle='--', label='ResNet: alpha = 1')
        figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=3)
    else:
        figure = _figure(panels * size, size - 0.4, title)
        labels = ('gate F(w)', f"share of the target's input\n(mean over {panels - 1 and len(images)} images)")
        for ax, key, label in zip(figure.subplots(1, panels, squeeze=False)[0], ('gate', 'share'), labels):
            _draw_map(ax, records, names, key)
            ax.set_title(label, fontsize='medium')
    return _save(figure, path)


def plot_arcs(
        model: nn.Module,
        path: Optional[Union[str, Path]] = None,
        images: Optional[torch.Tensor] = None,
        name: Optional[str] = None,
) -> 'Figure':
    """Draw the blocks in a row, and the strongest learned connections as arcs over them, wider where they are stronger.

    Args:
        model: A DResNet or an AdaResNet.
        path: Where to write the picture.
        images: Preprocessed images, `[B, C, H, W]`, on which the share of each connection is measured: the width of its
            arc. Without them it is the gate, or the skip weight.
        name: The model's name for the title. Default: its folder, or its architecture and the tag in its config.

    Raises:
        ValueError: If the model has no learned connections, or is fused for inference.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    from matplotlib.lines import Line2D
    from matplotlib.patches import Arc

    records, model = connections(model, images), unwrap_model(model)
    names = ['stem', *(block for block, _ in blocks(model))]
    key = 'share' if images is not None else 'alpha' if isinstance(model, AdaResNet) else 'gate'
    label = dict(share="share of the target's input", gate='gate F(w)', alpha='skip weight alpha')[key]
    records.sort(key=lambda record: -abs(record[key]))
    shown = [record for record in records[:_MOST_ARCS] if record[key]]
    strongest = abs(records[0][key]) if shown else 1
    figure = _figure(max(6., 1.5 + 0.34 * len(names)), 4.4, _title(model, name))
    axes = figure.subplots()
    axes.plot(range(len(names)), [0] * len(names), color='grey', linewidth=1, zorder=1)
    axes.scatter(range(len(names)), [0] * len(names), color='black', s=18, zorder=3)
    longest = 1
    for record in shown:
        target = record['target']
        source = record.get('source', target - 1)  # a shortcut skips its own block
        strength = abs(record[key]) / strongest
        longest = max(longest, target - source)
        axes.add_patch(Arc(
            ((source + target) / 2, 0), target - source, 2 * (target - source) ** 0.7, theta1=0, theta2=180,
            linewidth=0.3 + 5 * strength, alpha=0.25 + 0.6 * strength, zorder=2,
            color=_POSITIVE if record[key] > 0 else _NEGATIVE))
    if len(shown) < len(records):
        limit = abs(records[len(shown)][key])
        axes.set_title(
            f'The {len(shown)} strongest of {len(records)}; {len(records) - len(shown)} are left out, '
            f'which are {limit:.2g} or less', fontsize='small')
    axes.set_xticks(range(len(names)), names, rotation=90)
    axes.set(xlim=(-0.7, len(names) - 0.3), ylim=(-0.06 * longest ** 0.7, 1.06 * longest ** 0.7))
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    handles = [
        Line2D([], [], color=_POSITIVE, linewidth=0.3 + 5 * part, label=f'{part * strongest:.2g}')
        for part in (0.1, 0.5, 1)]
    if any(record[key] < 0 for record in shown):
        handles.append(Line2D([], [], color=_NEGATIVE, linewidth=2, label='negative'))
    figure.legend(handles=handles, title=f'width: {label}', loc='outside lower center', ncols=4)
    return _save(figure, path)


def plot_gates(path: Optional[Union[str, Path]] = None, sharpness: Sequence[float] = (1, 3, 10, 30)) -> 'Figure':
    """Draw the gate functions, from a weight to a gate value.

    Args:
        path: Where to write the picture.
        sharpness: Values of k for which the Gauss gate is drawn.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    weights = torch.linspace(-4, 4, 401)
    figure = _figure(6.5, 4, 'Gate functions')
    axes = figure.subplots()

    def draw(gate: str, label: str, k: float = 1, **style: Any) -> None:
        module = create_gate(gate, len(weights))
        module.weight.data.copy_(weights)
        if gate == 'gauss':
            module.log_sharpness.data.fill_(math.log(k))
        axes.plot(weights, module().detach(), label=label, **style)

    draw('sigmoid', 'sigmoid: $1 / (1 + e^{-w})$', color='black', linewidth=2)
    for k, color, style in zip(sharpness, _COLORS * len(sharpness), ('-', '--', '-.', ':') * len(sharpness)):
        draw('gauss', f'gauss: $e^{{-{k:g} w^2}}$', k, color=color, linestyle=style)
    draw('linear', 'linear: $w$', color='grey', linewidth=1)
    axes.set(xlabel='weight w', ylabel='gate F(w)', xlim=(-4, 4), ylim=(-0.25, 1.25))
    axes.grid(alpha=0.3)
    axes.legend(loc='upper left', fontsize=8)
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
        name: The model's name for the title.

    Raises:
        ValueError: If there are no rows.
        ModuleNotFoundError: If matplotlib is not installed.
    """
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.ticker import MaxNLocator

    if not rows:
        raise ValueError('there is no history to draw: rows is empty.')
    gates = 'gate' in rows[0]
    panels: Dict[str, Dict[str, List[Tuple[int, float]]]] = {}
    for row in rows:
        stage, index = row['target_name'].split('.')
        panel, line = (row['target_name'], row['source_name']) if gates else (stage, index)
        point = int(row['epoch']) + 1, float(row['gate' if gates else 'alpha'])
        panels.setdefault(panel, {}).setdefault(line, []).append(point)
    lines = list(dict.fromkeys(line for panel in panels.values() for line in panel))
    colors = ListedColormap(colormaps['viridis'](np.linspace(0, 0.92, len(lines))))  # yellow is hard to see on white
    columns = min(len(panels), max(4, math.ceil(len(panels) ** 0.5)))
    count = math.ceil(len(panels) / columns)
    title = f'{name}: ' if name else ''
    figure = _figure(2 + 1.7 * columns, 1.1 + 1.8 * count, title + ('gates' if gates else 'skip weights') + ' in training')
    axes = figure.subplots(count, columns, sharex=True, sharey=True, squeeze=False).flat
    for ax, (panel, histories) in zip(axes, panels.items()):
        for line, points in histories.items():
            ax.plot(*zip(*points), color=colors(lines.index(line)), linewidth=1.3)
        ax.set_title(f'into {panel}' if gates else panel, fontsize='medium')
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.3)
    for ax in axes[len(panels):]:
        ax.set_axis_off()
    figure.supxlabel('epochs trained', fontsize='medium')
    figure.supylabel('gate F(w)' if gates else 'skip weight alpha', fontsize='medium')
    norm = BoundaryNorm(np.arange(len(lines) + 1) - 0.5, len(lines))
    bar = figure.colorbar(ScalarMappable(norm, colors), ax=list(axes), label='from block' if gates else 'block of the stage')
    ticks = range(0, len(lines), math.ceil(len(lines) / 16))
    bar.set_ticks(ticks, labels=[lines[i] for i in ticks])
    bar.minorticks_off()
    return _save(figure, path)


def plot_signal_propagation(
        signals: Dict[str, Dict[str, List[Dict[str, Any]]]],
        path: Optional[Union[str, Path]] = None,
) -> 'Figure':
    """Draw how activations and gradients propagate through several networks.

    Args:
        signals: Results of `signal_propagation`, by the name of the network.
        path: Where to write the picture.

    Raises:
        ModuleNotFoundError: If matplotlib is not installed.
    """
    figure = _figure(10, 4, 'Signal propagation')
    axes = figure.subplots(1, 3)
    panels = (
        ('Activations', 'blocks', 'block', 'variance'),
        ('Gradients', 'blocks', 'block', 'gradient_norm'),
        ('Shattering of gradients', 'input_gradients', 'distance', 'correlation'),
    )
    for ax, (title, records, x, y) in zip(axes, panels):
        for j, (name, signal) in enumerate(signals.items()):
            ax.plot(
                [record[x] for record in signal[records]], [record[y] for record in signal[records]], label=name,
                color=_COLORS[j % len(_COLORS)], marker='os^Dv<>'[j % 7], markersize=3, linewidth=1)
        ax.set_title(title, fontsize='medium')
        ax.grid(alpha=0.3)
    for ax, label in zip(axes, ('variance of the output', "norm of the loss's gradient at the output")):
        ax.set(xlabel='block number', ylabel=f'{label} (log scale)', yscale='log')
        low, high = ax.get_ylim()
        middle = (low * high) ** 0.5
        ax.set(ylim=(min(low, middle / 10), max(high, middle * 10)))  # two decades, so that small changes look small
    axes[2].set(
        xlabel='distance of two inputs (fraction of the line)', ylabel='correlation of their gradients (cosine)',
        ylim=(min(-0.1, axes[2].get_ylim()[0]), 1.05))
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=min(5, len(signals)))
    return _save(figure, path)

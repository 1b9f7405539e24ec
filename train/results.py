"""What a run leaves in its folder beside the checkpoints: a model that timm loads, and what it has become."""
import copy
import csv
import os
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Optional

import timm_dresnet
import torch
import torch.nn as nn
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from timm.models import save_for_hf


def _plot_curves(summary: Path, path: Path) -> None:
    with summary.open(newline='') as f:
        rows = list(csv.DictReader(f))
    epochs = [int(row['epoch']) + 1 for row in rows]
    figure = Figure(figsize=(9, 3.6), layout='constrained')
    losses, accuracies = figure.subplots(1, 2)
    for axes, columns in (
            (losses, {'train_loss': 'training (as augmented and smoothed)', 'eval_loss': 'validation'}),
            (accuracies, {'eval_top1': 'top-1', 'eval_top5': 'top-5'}),
    ):
        for (column, label), style in zip(columns.items(), ('.-', '.--')):
            axes.plot(epochs, [float(row[column]) for row in rows], style, label=label)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel='epoch')
        axes.grid(alpha=0.3)
        axes.legend()
    losses.set(title='Loss', ylabel='cross-entropy')
    accuracies.set(title='Validation accuracy', ylabel='accuracy, %')
    figure.savefig(path, dpi=150)


def _write_csv(records: List[Dict[str, Any]], path: Path) -> None:
    with path.open('w', newline='') as f:
        writer = csv.DictWriter(f, records[0])
        writer.writeheader()
        writer.writerows(records)


def save_results(
        model: nn.Module,
        folder: Path,
        data_config: Dict[str, Any],
        label_names: Optional[List[str]] = None,
) -> None:
    """Write `model.safetensors`, `config.json`, `curves.png`, and `connections.csv` and `.png` if any are learned.

    All files are written beside their places and then moved there, so that a folder never holds half of one.

    Args:
        model: The trained model.
        folder: Where to write; holds the run's `summary.csv`.
        data_config: Input size and preprocessing that the model was trained with.
        label_names: Names of the classes.
    """
    model = copy.deepcopy(model).to('cpu', memory_format=torch.contiguous_format)  # as safetensors wants it
    with tempfile.TemporaryDirectory(dir=folder, prefix='.results-') as name:
        new = Path(name)
        config = dict(label_names=label_names) if label_names else {}
        save_for_hf(model, new, model_config=config, data_config=data_config, safe_serialization=True)
        _plot_curves(folder / 'summary.csv', new / 'curves.png')
        if isinstance(model, (timm_dresnet.DResNet, timm_dresnet.AdaResNet)):
            _write_csv(timm_dresnet.connections(model), new / 'connections.csv')
            timm_dresnet.plot_connections(model, new / 'connections.png')
        for file in new.iterdir():
            os.replace(file, folder / file.name)

"""What a run leaves in its folder beside the checkpoints: tables, curves, and a model that timm loads."""
import argparse
import copy
import csv
import logging
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import torch
import torch.nn as nn
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from timm.models import save_for_hf

import timm_dresnet
from timm_dresnet.folders import atomic_folder

_logger = logging.getLogger('train')
_LEARNED = timm_dresnet.AdaResNet, timm_dresnet.DResNet


def write_epoch(path: Path, epoch: int, rows: List[Dict[str, Any]]) -> None:
    """Append the rows of an epoch to a CSV table, in place of those of this epoch and later ones."""
    kept = [row for row in read_csv(path) if int(row['epoch']) < epoch] if path.exists() else []
    write_csv(path, [*kept, *(dict(epoch=epoch, **row) for row in rows)])


def read_csv(path: Path) -> List[Dict[str, str]]:
    """Rows of a CSV table with a header."""
    with path.open(newline='') as f:
        return list(csv.DictReader(f))


def write_csv(path: Path, rows: List[Dict[str, Any]]) -> None:
    """Write a CSV table whose columns are those of all its rows."""
    columns = dict.fromkeys(column for row in rows for column in row)
    with atomic_folder(path.parent) as new, (new / path.name).open('w', newline='') as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows)


def format_row(cells: Sequence[str]) -> str:
    """A row of a Markdown table."""
    return f'| {" | ".join(cells)} |'


def format_head(cells: Sequence[str]) -> str:
    """Its first two rows."""
    return f'{format_row(cells)}\n{format_row(["---"] * len(cells))}'


def plot_curves(summary: Path, path: Path) -> None:
    """Draw loss and accuracy, in training and validation, over the epochs of a `summary.csv`."""
    rows = read_csv(summary)
    figure = Figure(figsize=(9, 4.8), layout='constrained')
    figure.suptitle(f'{summary.resolve().parent.name}: loss and accuracy')
    losses, accuracies = figure.subplots(1, 2)
    for axes, columns in (
            (losses, {'train_loss': 'training (as augmented and smoothed)', 'eval_loss': 'validation'}),
            (accuracies, {
                'train_top1': 'training top-1 (as augmented)',
                'eval_top1': 'validation top-1',
                'eval_top5': 'validation top-5',
            }),
    ):
        for (column, label), style in zip(columns.items(), ('.-', '.--', '.:')):
            points = [(int(row['epoch']) + 1, float(row[column])) for row in rows if row.get(column)]
            if points:
                axes.plot(*zip(*points), style, label=f'{label}: {points[-1][1]:.4g}')
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set(xlabel='epoch')
        axes.grid(alpha=0.3)
        axes.legend(title='after the last epoch', fontsize='small', loc='upper center', bbox_to_anchor=(0.5, -0.13))
    losses.set(ylabel='loss')
    accuracies.set(ylabel='accuracy, %')
    figure.savefig(path, dpi=150)


class Log:
    """Records each epoch: `summary.csv`, `connections.csv`, `curves.png`, and TensorBoard or W&B if asked for."""

    def __init__(self, args: argparse.Namespace, folder: Path, first_epoch: int, num_epochs: int) -> None:
        self.first_epoch = first_epoch
        self.num_epochs = num_epochs
        self.begin = time.time()
        self.folder = folder
        self.tensorboard = self.wandb = None
        self.drawn = 0.
        try:
            if args.log_tensorboard:
                from torch.utils.tensorboard import SummaryWriter
                self.tensorboard = SummaryWriter(folder, purge_step=first_epoch)
            if args.log_wandb:
                import wandb
                self.wandb = wandb.init(
                    project=args.wandb_project,
                    name=folder.name,
                    id=f'{folder.name}-{(folder / "args.yaml").stat().st_mtime_ns}',  # the same when the run resumes
                    config=vars(args),
                    dir=folder,
                    resume='allow',
                )
        except ModuleNotFoundError as e:
            raise ValueError(f'{e.name} is not installed, try: pip install {e.name}') from e

    def connections(self, epoch: int, model: nn.Module) -> None:
        """Record the connections after an epoch; those before the first one are of epoch -1."""
        if isinstance(model, _LEARNED) and (records := timm_dresnet.connections(model)):
            write_epoch(self.folder / 'connections.csv', epoch, records)

    def epoch(
            self,
            epoch: int,
            train_metrics: Dict[str, Optional[float]],
            eval_metrics: Dict[str, float],
            lr: float,
            model: nn.Module,
            bad: int,
    ) -> None:
        """Record an epoch, by its number from 0, and how many images could not be read so far.

        `eval_metrics` is empty if the model was not validated.
        """
        left = (time.time() - self.begin) / (epoch + 1 - self.first_epoch) * (self.num_epochs - epoch - 1)
        words = [f'epoch {epoch + 1:>3}/{self.num_epochs}', f'loss {train_metrics["loss"]:.4f}']
        if eval_metrics:
            words += [f'validation loss {eval_metrics["loss"]:.4f}', f'top-1 {eval_metrics["top1"]:.2f} %']
        if train_metrics['images_per_second']:
            words.append(f'{train_metrics["images_per_second"]:.0f} images/s')
        if bad:
            words.append(f'{bad} bad images skipped')
        _logger.info('  '.join([*words, f'{timedelta(seconds=round(left))} left']))
        row = {
            **{f'train_{key}': value for key, value in train_metrics.items()},
            **{f'eval_{key}': value for key, value in eval_metrics.items()},
            'lr': lr,
        }
        write_epoch(self.folder / 'summary.csv', epoch, [row])
        self.connections(epoch, model)
        if self.tensorboard is not None:
            for key, value in row.items():
                if value is not None:
                    self.tensorboard.add_scalar(key.replace('_', '/', 1), value, epoch)
            self.tensorboard.flush()
        if self.wandb is not None:
            self.wandb.log(row, step=epoch)
        if time.time() - self.drawn > 60:
            self.drawn = time.time()
            _draw(self.folder)


def _draw(folder: Path) -> None:
    with atomic_folder(folder) as new:
        plot_curves(folder / 'summary.csv', new / 'curves.png')
        if (folder / 'connections.csv').exists():
            timm_dresnet.plot_history(
                read_csv(folder / 'connections.csv'), new / 'connections_history.png', name=folder.name)


def save_results(
        model: nn.Module,
        folder: Path,
        data_config: Dict[str, Any],
        label_names: Optional[List[str]] = None,
) -> None:
    """Write pictures of the tables in a folder, `config.json`, and last `model.safetensors`: the run is finished."""
    for left_over in folder.glob('.new-*'):  # of a run that was killed
        shutil.rmtree(left_over)
    _draw(folder)
    model = copy.deepcopy(model).to('cpu', memory_format=torch.contiguous_format)  # as safetensors wants it
    for key in ('tag', 'label_names', 'label_descriptions'):  # of other weights
        model.pretrained_cfg.pop(key, None)
    with atomic_folder(folder) as new:
        named = label_names and len(label_names) == model.num_classes
        config = dict(label_names=label_names) if named else {}
        save_for_hf(model, new, model_config=config, data_config=data_config, safe_serialization=True)
        if isinstance(model, _LEARNED):
            timm_dresnet.plot_connections(model, new / 'connections.png', name=folder.name)

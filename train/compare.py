"""`python -m train.compare`: several models with one recipe and several seeds, as a table and pictures.

Every run is one of `python -m train`, in a folder of its own. A comparison that was stopped resumes by the same
command.
"""
import argparse
import logging
import math
import re
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import timm
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from timm.utils import setup_default_logging

from timm_dresnet.folders import atomic_folder

from .arguments import create_parser
from .benchmark import count_multiply_adds
from .checkpoints import is_finished, open_folder
from .engine import handle_signals
from .results import format_head, format_row, read_csv, write_csv

_logger = logging.getLogger('train')
_HERE = Path(__file__).parent


def load_config(name: str, smoke: bool = False) -> Dict[str, Any]:
    """Read a comparison, and for each of its models the whole recipe.

    Args:
        name: Name of one in `train/comparisons/`, or path of a YAML file: ``recipe`` (likewise), ``seeds``,
            ``arguments`` over the recipe, ``models`` (name: arguments over those), and ``smoke`` (likewise).
        smoke: With the arguments that make it small, one seed only.
    """
    try:
        config = _read(name, 'comparisons')
        if unknown := config.keys() - {'recipe', 'seeds', 'arguments', 'models', 'smoke'}:
            raise ValueError(f'{name}: unknown key {min(unknown)!r}.')
        seeds, models = config['seeds'], config['models']
        if not seeds or not models or not all(isinstance(seed, int) for seed in seeds):
            raise ValueError(f'{name}: it needs models, and seeds that are whole numbers.')
        if smoke and not config.get('smoke'):
            raise ValueError(f'{name}: it has no smoke, arguments that make it small.')
        common = {**_read(config['recipe'], 'recipes'), **(config.get('arguments') or {})}
        small = config['smoke'] if smoke else {}
        models = {str(model): {**common, **(arguments or {}), **small} for model, arguments in models.items()}
        if len({_slug(model) for model in models} - {''}) < len(models):
            raise ValueError(f'{name}: models need names that differ in letters or digits, not {", ".join(models)}.')
        return dict(seeds=list(seeds)[:1 if smoke else None], models=models)
    except (AttributeError, KeyError, TypeError, yaml.YAMLError) as e:
        raise ValueError(f'{name} is not a comparison: {type(e).__name__} {" ".join(str(e).split())}') from e


def _read(name: str, folder: str) -> Any:
    path = Path(name) if name.endswith('.yaml') else _HERE / folder / f'{name}.yaml'
    try:
        return yaml.safe_load(path.read_text())
    except OSError as e:
        known = ', '.join(sorted(file.stem for file in (_HERE / folder).iterdir()))
        raise ValueError(f'{path} cannot be read ({e.strerror}); there are: {known}.') from e


def _slug(model: str) -> str:
    return re.sub(r'\W+', '-', model.lower()).strip('-')


def summarize(name: str, folders: List[Path]) -> Dict[str, Any]:
    """A model's line of the table, over the seeds whose runs are finished."""
    histories = [read_csv(folder / 'summary.csv') for folder in folders]
    accuracies = [[float(row['eval_top1']) for row in rows if row['eval_top1']] for rows in histories]
    column = 'train_images_per_second'
    speeds: Dict[str, List[float]] = {}
    for row in (row for rows in histories for row in rows if row[column]):
        speeds.setdefault(row['epoch'], []).append(float(row[column]))
    model = timm.create_model(f'local-dir:{folders[0]}')
    best, last = [max(values) for values in accuracies], [values[-1] for values in accuracies]
    return {
        'model': name,
        'parameters': sum(p.numel() for p in model.parameters()),
        'multiply_adds': count_multiply_adds(model, model.pretrained_cfg['input_size']),
        'best_top1': statistics.mean(best),
        'best_top1_std': statistics.stdev(best) if len(best) > 1 else None,
        'last_top1': statistics.mean(last),
        'last_top1_std': statistics.stdev(last) if len(last) > 1 else None,
        'images_per_second': statistics.harmonic_mean([statistics.median(v) for v in speeds.values()] or [math.nan]),
        'epochs': len(histories[0]),
        'seeds': len(folders),
    }


def break_even(points: List[Tuple[int, float]], epochs: int, accuracy: float) -> str:
    """Factor by which a training of so many epochs has to be lengthened until it reaches an accuracy.

    `points` are numbers of epochs that were tried, and the accuracies after them. Between two of them, accuracy is
    interpolated linearly over the logarithm of epochs.
    """
    points = sorted(points)
    if accuracy <= points[0][1]:
        return f'<= {points[0][0] / epochs:.2f}'
    for (fewer, low), (more, high) in zip(points, points[1:]):
        if accuracy <= high:
            return f'{fewer / epochs * (more / fewer) ** ((accuracy - low) / (high - low)):.2f}'
    return f'> {points[-1][0] / epochs:.2f}'


def compare_cost(lines: List[Dict[str, Any]], baseline: List[str]) -> None:
    """Add to the lines of the table what an image takes in training, ``time``, and what it is worth, ``break_even``.

    Both are relative to `baseline`: the first model, and those that differ from it in their number of epochs alone.
    """
    points = [(line['epochs'], line['last_top1']) for line in lines if line['model'] in baseline]
    for line in lines:
        line['time'] = lines[0]['images_per_second'] / line['images_per_second']
        if line['model'] in baseline or len(dict(points)) < 2:
            line['break_even'] = None
        else:
            line['break_even'] = break_even(points, line['epochs'], line['last_top1'])


def write_table(lines: List[Dict[str, Any]], folder: Path) -> None:
    """Write `comparison.csv` and `comparison.md`."""
    def accuracy(line: Dict[str, Any], key: str) -> str:
        std = line[f'{key}_std']
        return f'{line[key]:.2f}' + (f' ± {std:.2f}' if std is not None else '')

    write_csv(folder / 'comparison.csv', lines)
    table = [format_head(['model', 'parameters', 'multiply-adds', 'best top-1, %', 'last top-1, %', 'epochs', 'seeds',
                          'time', 'break-even'])]
    for line in lines:
        table.append(format_row([
            line['model'],
            f'{line["parameters"]:,}',
            f'{line["multiply_adds"] / 1e6:,.1f} M',
            accuracy(line, 'best_top1'),
            accuracy(line, 'last_top1'),
            str(line['epochs']),
            str(line['seeds']),
            f'{line["time"]:.2f}',
            line['break_even'] or '',
        ]))
    with atomic_folder(folder) as new:
        (new / 'comparison.md').write_text('\n'.join([*table, '']), encoding='utf-8')


def draw(runs: Dict[str, List[Path]], folder: Path) -> None:
    """Draw `acc.png`: top-1 accuracy in validation over the epochs, and of each seed after the last epoch.

    Lines are means over the seeds.
    """
    curves: Dict[str, Dict[int, List[float]]] = {}
    for model, folders in runs.items():
        curves[model] = {}
        for row in (row for run_folder in folders for row in read_csv(run_folder / 'summary.csv')):
            if row['eval_top1']:
                curves[model].setdefault(int(row['epoch']) + 1, []).append(float(row['eval_top1']))
    ends = {model: [*curve.values()][-1] for model, curve in curves.items()}
    figure = Figure(figsize=(10, max(3.5, 1.5 + 0.3 * len(ends))), layout='constrained')
    figure.suptitle(f'{folder.name}: accuracy in validation')
    left, right = figure.subplots(1, 2, width_ratios=(4, 3))
    order = sorted(ends, key=lambda model: statistics.mean(ends[model]))
    for i, model in enumerate(order):
        color, end = f'C{[*ends].index(model)}', ends[model]
        left.plot([*curves[model]], [*map(statistics.mean, curves[model].values())], '.-', color=color)
        right.plot(end, len(end) * [i], 'o', color=color, alpha=0.4)
        right.plot(statistics.mean(end), i, '|', color=color, markersize=14, markeredgewidth=2)
    left.set(xlabel='epoch', ylabel='top-1, %')
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    count = max(map(len, ends.values()))
    right.set(xlabel='top-1, %: ' + ('1 seed' if count == 1 else f'{count} seeds and their mean'),
              title='after the last epoch')
    right.set_yticks(range(len(order)), [f'{model}: {statistics.mean(ends[model]):.2f}' for model in order])
    for axes in (left, right):
        axes.grid(alpha=0.3)
    with atomic_folder(folder) as new:
        figure.savefig(new / 'acc.png', dpi=150)


def draw_cost(lines: List[Dict[str, Any]], families: List[List[str]], folder: Path) -> None:
    """Draw `cost.png`, accuracy over the time of training, if a family was trained for several numbers of epochs.

    A family is the names of models that differ in their number of epochs alone, some of which may not be trained.
    """
    if all(len({line['epochs'] for line in lines if line['model'] in family}) < 2 for family in families):
        return
    figure = Figure(figsize=(6, 4.5), layout='constrained')
    axes = figure.subplots()
    for family in families:
        points = sorted((line for line in lines if line['model'] in family), key=lambda line: line['epochs'])
        if points:
            times, accuracies = zip(*((line['epochs'] * line['time'], line['last_top1']) for line in points))
            curve, = axes.plot(times, accuracies, label=family[0])
            for time, accuracy, line in zip(times, accuracies, points):
                several = line['last_top1_std'] is not None
                axes.errorbar(
                    time, accuracy, line['last_top1_std'], fmt='o', capsize=4, color=curve.get_color(),
                    markerfacecolor=None if several else 'white')
    axes.set(xscale='log', xlabel=f'time of training, in epochs of {lines[0]["model"]} (log scale)',
             ylabel='top-1 in validation, %', title=f'{folder.name}: mean ± standard deviation (hollow: 1 seed)')
    axes.minorticks_off()
    ticks = sorted({line['epochs'] for line in lines})
    axes.set_xticks(ticks, ticks)
    axes.grid(alpha=0.3)
    axes.legend()
    with atomic_folder(folder) as new:
        figure.savefig(new / 'cost.png', dpi=150)


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m train.compare',
        description='Train several models with one recipe and several seeds, and compare them.',
        epilog='All other arguments go to every python -m train: --data-dir DIR, --epochs 10, ...',
        allow_abbrev=False)  # --seed is an argument of python -m train
    parser.add_argument('-c', '--config', required=True, metavar='NAME',
                        help='a comparison in train/comparisons, or a YAML file like those')
    parser.add_argument('--smoke', action='store_true', help='the size that ends in minutes on two cores, on digits')
    parser.add_argument('--models', nargs='+', metavar='NAME', help='some of its models (all if not set)')
    parser.add_argument('--seeds', nargs='+', type=int, metavar='N', help='other seeds')
    parser.add_argument('--output', default='output', metavar='DIR', help='folder for its folder')
    args, others = parser.parse_known_args(argv)
    try:
        compare(args, others)
    except (OSError, ValueError) as e:
        sys.exit(f'python -m train.compare: error: {e}')


def compare(args: argparse.Namespace, others: List[str]) -> None:
    """Run what is missing of a comparison, and write its table and pictures after each run.

    Args:
        others: Arguments for every `python -m train`.
    """
    trainings = create_parser()
    given = vars(trainings.parse_args(others, argparse.Namespace(**dict.fromkeys(vars(trainings.parse_args([]))))))
    given = {key: value for key, value in given.items() if value is not None}
    if 'seed' in given:
        raise ValueError(f'--seed {given["seed"]} is for one training: name the seeds of all by --seeds.')
    config = load_config(args.config, args.smoke)
    for model in args.models or []:
        if model not in config['models']:
            raise ValueError(f'--models: there is no {model!r}, only {", ".join(config["models"])}.')
    models = {model: config['models'][model] for model in args.models or config['models']}
    for key in given:
        if len({str(recipe.get(key)) for recipe in models.values()}) > 1:
            raise ValueError(f'--{key.replace("_", "-")} would make equal what these models differ in.')
    seeds = [*dict.fromkeys(args.seeds or config['seeds'])]

    name = Path(args.config).stem + ('-smoke' if args.smoke else '')
    folder = open_folder(Path(args.output), name, dict(models=models, seeds=seeds, **given))
    families = [
        [name for name, other in config['models'].items() if {**other, 'epochs': 0} == {**recipe, 'epochs': 0}]
        for recipe in models.values()]
    families = [family for i, family in enumerate(families) if family not in families[:i]]
    runs: Dict[str, List[Path]] = {}
    for seed in seeds:  # all models of one seed first: a comparison that is stopped has something to compare
        for model, recipe in models.items():
            experiment = f'{_slug(model)}-seed{seed}'
            if not is_finished(folder / experiment):
                _logger.info(f'{model}, seed {seed}')
                path = folder / f'{experiment}.yaml'
                path.write_text(yaml.safe_dump({**recipe, 'seed': seed}))
                command = [sys.executable, '-m', 'train', *others, '--config', str(path)]
                process = subprocess.Popen([*command, '--output', str(folder), '--experiment', experiment])
                with handle_signals(process.send_signal):  # those that ask this process to end are handed on
                    status = process.wait()
                if status < 0:  # it could say nothing itself
                    raise ValueError(f'{model}, seed {seed}, was killed by signal {-status}: the same command resumes.')
                if status:
                    sys.exit(status)
                if not is_finished(folder / experiment):
                    raise ValueError(f'{folder / experiment} is of another version of this program: remove it, or name '
                                     'another --output.')
            runs.setdefault(model, []).append(folder / experiment)
            lines = [summarize(model, folders) for model, folders in runs.items()]
            compare_cost(lines, families[0])
            write_table(lines, folder)
            draw(runs, folder)
            draw_cost(lines, families, folder)
    print((folder / 'comparison.md').read_text() + f'It lies in {folder.resolve()}')


if __name__ == '__main__':
    setup_default_logging()
    main()

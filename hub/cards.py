"""Model cards: all that they say is read from what a run has left in its folder.

`python -m hub.cards` writes MODEL_CARD.md, the card of all models in the package, with the results that README.md gives,
and their accuracies into the package.
"""
import argparse
import csv
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence

import timm
import timm_dresnet
import torch.nn as nn
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

ZOO = Path(__file__).parent / 'zoo'  # records of the runs whose weights are in the package
_ROOT = Path(__file__).parents[1]

# what a run leaves for its readers
PICTURES = {
    'curves.png': 'Loss and accuracy over the epochs',
    'connections.png': 'The learned connections: rows take from columns',
    'connections_history.png': 'The learned connections over the epochs',
}
TABLES = ('args.yaml', 'summary.csv', 'connections.csv', 'validation.csv')

# those arguments of a run that say where its images for validation are
_DATA_ARGUMENTS = (
    'dataset', 'data_dir', 'val_split', 'val_num_samples', 'class_map', 'input_img_mode', 'input_key', 'target_key')

_DATASETS = {
    'cifar10': 'CIFAR-10',
    'cifar100': 'CIFAR-100',
    'digits': "scikit-learn's digits",
    'tiny-imagenet-200': 'Tiny-ImageNet-200',
}
_ABOUT = {
    'DResNet': 'A residual network in which every block may draw on all earlier blocks, through gated connections that '
               'are learned.',
    'AdaResNet': 'A residual network in which the weight of every shortcut is learned.',
    'PlainNet': 'A residual network without its shortcuts, to compare others with.',
}
_SOURCES = {
    'DResNet': [
        '[Dynamic connections](https://github.com/Mao-chuan/An_improve_on_ResNet--Introduces_dynamic_connections), the '
        'proposal that DResNet follows',
    ],
    'AdaResNet': ['AdaResNet: [arXiv:2408.09958](https://arxiv.org/abs/2408.09958)'],
}
_EVERY_SOURCE = [
    'Deep Residual Learning for Image Recognition: [arXiv:1512.03385](https://arxiv.org/abs/1512.03385)',
    '[timm](https://github.com/huggingface/pytorch-image-models), of which this is a model, through timm-dresnet',
]


@dataclass
class Run:
    """What is known of how a model was made.

    Attributes:
        args: Arguments of the training, empty if not recorded.
        epochs: Rows of `summary.csv`.
        validation: Rows of `validation.csv`: what `python -m train.validate` has measured of the folder.
        dataset_id: Of the data set on the Hub.
        note: What else a reader should know of the data.
    """
    args: Dict[str, Any] = field(default_factory=dict)
    epochs: List[Dict[str, str]] = field(default_factory=list)
    validation: List[Dict[str, str]] = field(default_factory=list)
    dataset_id: Optional[str] = None
    note: str = ''

    @classmethod
    def read(cls, folder: Path, dataset_id: Optional[str] = None, note: str = '') -> 'Run':
        """Read it from a folder.

        Raises:
            ValueError: If a file there is damaged.
        """
        run = cls(dataset_id=dataset_id, note=note)
        try:
            if (folder / 'args.yaml').exists():
                run.args = without_paths(yaml.safe_load((folder / 'args.yaml').read_text()))
            for name, rows in (('summary.csv', run.epochs), ('validation.csv', run.validation)):
                if (folder / name).exists():
                    with (folder / name).open(newline='') as f:
                        rows += csv.DictReader(f)
        except (yaml.YAMLError, AttributeError, UnicodeDecodeError, csv.Error) as e:
            raise ValueError(f'{folder} holds a damaged file of its run: {" ".join(str(e).split())}') from e
        names = {row.get('model') or 'nothing' for row in run.validation}
        run.validation = [row for row in run.validation if Path(row.get('model') or '').name == folder.resolve().name]
        if names and not run.validation:
            raise ValueError(
                f'{folder}/validation.csv is not of {folder}, but of {", ".join(sorted(names))}: measure {folder} with '
                'python -m train.validate and the same --csv, or remove it.')
        if missing := run.args and {'model', 'epochs', 'seed', 'opt', 'batch_size'} - set(run.args):
            raise ValueError(f'{folder}/args.yaml does not say {", ".join(sorted(missing))}: it is not that of a run.')
        source, _, name = str(run.args.get('dataset') or '').partition('/')
        if source in ('hfds', 'hfids'):
            run.dataset_id = run.dataset_id or name
        return run

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        return _DATASETS.get(self.dataset_key) or self.dataset_id or self.dataset_key

    @property
    def dataset_key(self) -> str:
        """What timm calls it, or its folder."""
        if name := self.args.get('dataset'):
            return name.split('/', 1)[-1]
        return Path(self.args.get('data_dir') or 'unknown').name

    @property
    def data_arguments(self) -> str:
        """The part of a command that says where the images are."""
        given = {key: self.args[key] for key in _DATA_ARGUMENTS if self.args.get(key)}
        if 'dataset' not in given or 'data_dir' in given:
            given['data_dir'] = 'PATH'
        if given.get('val_split') == 'validation':  # the default
            del given['val_split']
        return ' '.join(f'--{key.replace("_", "-")} {shlex.quote(str(value))}' for key, value in given.items())

    def metrics(self, size: str) -> Optional[Dict[str, float]]:
        """Accuracy and loss of the model as published: as measured since, or else after the last epoch.

        Args:
            size: Height and width of the images, which may have been measured at several, as in 32x32.
        """
        if rows := [row for row in self.validation if row['size'] == size]:
            return {key: float(rows[-1][key]) for key in ('top1', 'top5', 'loss', 'images')}
        if self.epochs and self.epochs[-1].get('eval_top1'):
            return {key: float(self.epochs[-1][f'eval_{key}']) for key in ('top1', 'top5', 'loss')}
        return None

    @property
    def base_model(self) -> Optional[str]:
        """The repository on the Hub whose weights the training began with."""
        if not self.args.get('pretrained') or self.args.get('pretrained_path') or self.args.get('initial_checkpoint'):
            return None
        name = self.args['model']
        if name.startswith('hf-hub:'):
            return name[len('hf-hub:'):].split('@')[0]
        return timm.get_pretrained_cfg(name).hf_hub_id if timm.is_model(name) else None

    @property
    def start(self) -> Optional[str]:
        """The weights that the training began with: a repository on the Hub, a file, or a model of the package."""
        file = self.args.get('initial_checkpoint') or self.args.get('pretrained_path')
        if file or not self.args.get('pretrained'):
            return file or None
        name = self.args['model']
        cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
        return self.base_model or (f'{cfg.architecture}.{cfg.tag}' if cfg else name)


def without_paths(args: Dict[str, Any]) -> Dict[str, Any]:
    """Arguments of a run, without the names of its machine's folders."""
    def shorten(value: Any) -> Any:
        if not isinstance(value, str):
            return value
        source, colon, path = value.rpartition('local-dir:')
        return f'{source}{colon}{Path(path).name}' if Path(path).is_absolute() else value

    return {key: shorten(value) for key, value in args.items()}


def _family(model: nn.Module) -> str:
    return next((name for name in _ABOUT if isinstance(model, getattr(timm_dresnet, name))), 'ResNet')


def _size(input_size: Sequence[int]) -> str:
    return 'x'.join(map(str, input_size[1:]))


def _describe_connections(model: nn.Module) -> str:
    if getattr(model, 'fused', False):
        return ''
    if isinstance(model, timm_dresnet.DResNet):
        gates = [record['gate'] for record in timm_dresnet.connections(model)]
        pruned = f', {len(model.pruned_connections)} more are pruned' if model.pruned_connections else ''
        return f'{len(gates)}{f", gates from {min(gates):.2f} to {max(gates):.2f}" if gates else ""}{pruned}'
    if isinstance(model, timm_dresnet.AdaResNet):
        weights = [record['alpha'] for record in timm_dresnet.connections(model)]
        return f'{len(weights)} shortcuts, weights from {min(weights):.2f} to {max(weights):.2f}'
    return ''


def _describe_training(run: Run, size: str) -> str:
    args = run.args
    what = [f'{args["epochs"]} epochs on {run.dataset} at {size}']
    if sizes := args.get('train_img_sizes'):
        what.append(f'on images that grow from {min(sizes)}x{min(sizes)}' if args['train_size_schedule'] == 'progressive'
                    else f'on images of {min(sizes)} to {max(sizes)} pixels')
    what += [f'seed {args["seed"]}', args['opt']]
    if args.get('lr'):
        what.append(f'learning rate {args["lr"]:g}')
    what.append(f'batches of {args["batch_size"]}')
    if run.start:
        what.append(f'starting from {run.start}')
    return f'{", ".join(what)}.'


def _limits(run: Run, num_classes: int, size: str) -> str:
    data = f'those of {run.dataset}' if run.args else 'those that it was trained on'
    return (
        f'For classifying images like {data}, and as a start for fine-tuning. Every image is given one of the '
        f'{num_classes} classes, whatever it shows. Nothing has been measured on other images, on photographs of '
        f'people, or far from {size}, and what is wrong or one-sided in the training images is so in the model.')


def model_card(model: nn.Module, run: Run, name: str, files: List[str], license: str) -> ModelCard:
    """Write the card of a model.

    Args:
        model: The model.
        run: What is known of how it was made.
        name: What `timm.create_model` is to be called with to load it.
        files: Names of the files that are published with the card.
        license: License of the weights.
    """
    cfg = model.pretrained_cfg
    input_size = timm.data.resolve_model_data_config(model)['input_size']
    size = _size(input_size)
    title = name.split('/')[-1]
    family = _family(model)
    metrics = run.metrics(size)
    eval_results = None
    if metrics:
        common = dict(
            task_type='image-classification',
            task_name='Image Classification',
            dataset_type=run.dataset_id or run.dataset_key,
            dataset_name=run.dataset,
            dataset_split=run.args.get('val_split', 'validation'),
        )
        eval_results = [
            EvalResult(metric_type='accuracy', metric_name=label, metric_value=round(metrics[key], 2), **common)
            for key, label in (('top1', 'Top-1 accuracy, %'), ('top5', 'Top-5 accuracy, %'))
        ]
    labels = cfg.get('label_names') or ()
    classes = f'{model.num_classes}' + (f': {", ".join(labels)}' if 0 < len(labels) <= 20 else '')
    args = {k: v for k, v in model.pretrained_model_args.items() if k not in ('num_classes', 'pruned_connections')}
    card_data = ModelCardData(
        library_name='timm',
        license=license,
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm-dresnet', family.lower()],
        datasets=[run.dataset_id] if run.dataset_id else None,
        base_model=run.base_model,
        metrics=['accuracy'] if metrics else None,
        model_name=title if metrics else None,
        eval_results=eval_results,
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(Path(__file__).parent / 'model_card.md.j2'),
        title=title,
        name=name,
        about=_ABOUT.get(family, 'An image classifier.'),
        architecture=cfg['architecture'],
        arguments=''.join(f', `{key}={value!r}`' for key, value in args.items()),
        parameters=f'{sum(parameter.numel() for parameter in model.parameters()):,}',
        input_size='x'.join(map(str, input_size)),
        shape=', '.join(map(str, input_size)),
        image_mode={1: 'L', 3: 'RGB'}.get(input_size[0], 'RGB'),
        classes=classes,
        top=min(5, model.num_classes),
        connections=_describe_connections(model),
        fused=getattr(model, 'fused', False),
        grown_from=run.base_model if '.init_' in run.args.get('model', '') else None,
        dataset=run.dataset,
        note=run.note,
        data_arguments=run.data_arguments,
        results=metrics and dict(
            split=run.args.get('val_split', 'validation'),
            size=size,
            top1=f'{metrics["top1"]:.2f}', top5=f'{metrics["top5"]:.2f}', loss=f'{metrics["loss"]:.4f}',
        ),
        training=_describe_training(run, size) if run.args else '',
        summary='summary.csv' in files,
        pictures=[(file, text) for file, text in PICTURES.items() if file in files],
        limits=_limits(run, model.num_classes, size),
        sources=_SOURCES.get(family, []) + _EVERY_SOURCE,
    )


def family_card() -> ModelCard:
    """Write the card of all models whose weights are in the package."""
    zoo = yaml.safe_load(ZOO.with_suffix('.yaml').read_text())
    rows, notes = [], {}
    for tag, facts in zoo.items():
        if 'note' in facts:
            notes.setdefault(facts['note'], []).append(f'`{tag}`')
        run, model = Run.read(ZOO / tag, **facts), timm.create_model(tag)
        size = _size(model.pretrained_cfg['input_size'])
        metrics = run.metrics(size)
        rows.append(dict(
            tag=tag,
            training=_describe_training(run, size),
            parameters=f'{sum(parameter.numel() for parameter in model.parameters()) / 1e6:.2f} M',
            top1=f'{metrics["top1"]:.2f}',
            top5=f'{metrics["top5"]:.2f}',
            command=f'python -m train.validate {tag} {run.data_arguments}',
        ))
    card_data = ModelCardData(
        library_name='timm',
        license='apache-2.0',
        pipeline_tag='image-classification',
        tags=['image-classification', 'timm', 'timm-dresnet', *(family.lower() for family in _ABOUT)],
        datasets=sorted({facts['dataset_id'] for facts in zoo.values()}),
    )
    return ModelCard.from_template(
        card_data,
        template_path=str(Path(__file__).parent / 'family_card.md.j2'),
        about=_ABOUT,
        rows=rows,
        notes=notes,
        results=(_ROOT / 'README.md').read_text().split('\n## Results\n')[1].split('\n## ')[0].strip(),
        sources=[source for sources in _SOURCES.values() for source in sources] + _EVERY_SOURCE,
    )


def results_table() -> str:
    """What `timm-dresnet list` shows of the models in the package, as CSV."""
    lines = ['model,top1,top5,size,images,dataset']
    for tag in yaml.safe_load(ZOO.with_suffix('.yaml').read_text()):
        run = Run.read(ZOO / tag)
        size = _size(timm.get_pretrained_cfg(tag).input_size)
        metrics = run.metrics(size)
        lines.append(f'{tag},{metrics["top1"]},{metrics["top5"]},{size},{metrics["images"]:.0f},{run.dataset}')
    return '\n'.join(lines) + '\n'


if __name__ == '__main__':
    argparse.ArgumentParser(
        prog='python -m hub.cards', description='Write MODEL_CARD.md and timm_dresnet/weights/results.csv.').parse_args()
    family_card().save(_ROOT / 'MODEL_CARD.md')
    (_ROOT / 'timm_dresnet/weights/results.csv').write_text(results_table())
    print('Wrote MODEL_CARD.md and timm_dresnet/weights/results.csv')

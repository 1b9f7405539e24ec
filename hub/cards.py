"""Model cards, written from the files that a run leaves in its folder."""
import csv
import shlex
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional

import timm
import torch.nn as nn
import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from timm.models import parse_model_name

import timm_dresnet
from timm_dresnet.images import label_names

ZOO = Path(__file__).parent / 'zoo'  # files of the runs whose weights are in the package

# files of a run that are published with its weights
TABLES = ('args.yaml', 'summary.csv', 'connections.csv', 'validation.csv')
PICTURES = {
    'curves.png': 'Loss and accuracy over the epochs',
    'connections.png': 'The learned connections: rows take from columns',
    'connections_history.png': 'The learned connections over the epochs',
}

# arguments of a run that say where the validation images are
_DATA_ARGUMENTS = (
    'dataset', 'data_dir', 'val_split', 'val_num_samples', 'class_map', 'input_img_mode', 'input_key', 'target_key')
_DATASETS = {
    'cifar10': 'CIFAR-10',
    'cifar100': 'CIFAR-100',
    'tiny-imagenet-200': 'Tiny-ImageNet-200',
}


@dataclass
class Run:
    """What is known about the training of a model.

    Attributes:
        args: Arguments of the training, without absolute paths. Empty if they were not recorded.
        epochs: Rows of `summary.csv`.
        validation: Rows of `validation.csv`, which `python -m train.validate --csv` writes.
        dataset_id: Name of the data set on the Hub.
        note: What else to say about the data.
    """
    args: Dict[str, Any] = field(default_factory=dict)
    epochs: List[Dict[str, str]] = field(default_factory=list)
    validation: List[Dict[str, str]] = field(default_factory=list)
    dataset_id: Optional[str] = None
    note: str = ''

    @classmethod
    def read(cls, folder: Path, dataset_id: Optional[str] = None, note: str = '') -> 'Run':
        """Read the files of a run.

        Raises:
            ValueError: If a table has not the columns that it should have, or accuracy was measured under another name
                or on other images than those that the run was validated on.
        """
        run = cls(dataset_id=dataset_id, note=note)
        if (folder / 'args.yaml').exists():
            args = yaml.safe_load((folder / 'args.yaml').read_text())
            if not isinstance(args, dict):
                raise ValueError(f'{folder}/args.yaml holds no arguments: repair or remove the file.')
            run.args = _without_paths(args)
        for name, rows, columns in (
                ('summary.csv', run.epochs, {'eval_loss', 'eval_top1', 'eval_top5'}),
                ('validation.csv', run.validation, {'model', 'size', 'dataset', 'split', 'loss', 'top1', 'top5'}),
        ):
            if (folder / name).exists():
                with (folder / name).open(newline='') as f:
                    rows += csv.DictReader(f)
                if rows and (missing := columns - rows[0].keys()):
                    raise ValueError(f'{folder / name} has no column {min(missing)}: repair or remove the file.')
        measured = run.validation
        expected = folder.resolve().name, run.dataset_key, run.split
        run.validation = [
            _without_paths(row) for row in measured
            if (Path(row['model'] or '').name, _dataset_key(row['dataset'] or ''), row['split']) == expected]
        if measured and not run.validation:
            raise ValueError(
                f'{folder}/validation.csv has no row for {folder.name} on {run.dataset_key} ({run.split}): measure '
                f'{folder} again with python -m train.validate --csv, or remove the file.')
        source, _, name = str(run.args.get('dataset') or '').partition('/')
        if source.lower() in ('hfds', 'hfids'):
            run.dataset_id = run.dataset_id or name
        return run

    @property
    def dataset_key(self) -> str:
        """Name of the data set in timm, or the name of its folder."""
        return _dataset_key(self.args.get('dataset') or Path(self.args.get('data_dir') or '').name)

    @property
    def split(self) -> str:
        """The split that the run was validated on."""
        return self.args.get('val_split', 'validation')

    @property
    def dataset(self) -> str:
        """Name of the data set."""
        if self.args.get('dataset') == 'digits':
            return "scikit-learn's digits"
        return _DATASETS.get(self.dataset_key) or self.dataset_id or self.dataset_key

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
        """Accuracy and loss on images of this size ('32x32'), from `train.validate` or else after the last epoch."""
        if rows := [row for row in self.validation if row['size'] == size]:
            return {key: float(rows[-1][key]) for key in ('top1', 'top5', 'loss')}
        if self.epochs and self.epochs[-1].get('eval_top1'):
            return {key: float(self.epochs[-1][f'eval_{key}']) for key in ('top1', 'top5', 'loss')}
        return None

    @property
    def _start(self) -> str:
        """Name of the model whose weights the training started from, of a grown one that of its ResNet."""
        return (self.args.get('model_kwargs') or {}).get('grown_from') or self.args.get('model', '')

    @property
    def _start_cfg(self) -> Any:
        return timm.get_pretrained_cfg(self._start) if timm.is_model(self._start) else None

    @property
    def base_model(self) -> Optional[str]:
        """The repository on the Hub with the weights that the training started from."""
        if not self.args.get('pretrained') or self.args.get('initial_checkpoint') or self.args.get('pretrained_path'):
            return None
        source, name = parse_model_name(self._start)
        if source == 'hf-hub':
            return name.split('@')[0]
        return self._start_cfg and self._start_cfg.hf_hub_id

    @property
    def grown(self) -> bool:
        """Whether the weights that the training started from are those of a ResNet."""
        return self._start != self.args.get('model') or (getattr(self._start_cfg, 'tag', '') or '').startswith('init_')

    @property
    def initial_weights(self) -> Optional[str]:
        """What the training started from: a file, a repository on the Hub, or a model of the package."""
        file = self.args.get('initial_checkpoint') or self.args.get('pretrained_path')
        if file or not self.args.get('pretrained'):
            return file or None
        cfg = self._start_cfg
        return self.base_model or (f'{cfg.architecture}.{cfg.tag}' if cfg else self._start)


def copy_record(run: Run, source: Path, folder: Path, names: Iterable[str]) -> None:
    """Copy files of a run, its arguments and what was measured of it without absolute paths."""
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    if run.validation and 'validation.csv' in names:
        with (folder / 'validation.csv').open('w', newline='') as f:
            writer = csv.DictWriter(f, run.validation[0])
            writer.writeheader()
            writer.writerows(run.validation)
    if run.args:
        (folder / 'args.yaml').write_text(yaml.safe_dump(run.args))


def _dataset_key(name: str) -> str:
    return name.split('/', 1)[-1] or 'unknown'


def _without_paths(value: Any) -> Any:
    """Shorten absolute paths to their last part: the folders of a machine are nobody else's business."""
    if isinstance(value, dict):
        return {key: _without_paths(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_paths(item) for item in value]
    source, colon, path = str(value).rpartition('local-dir:')
    return f'{source}{colon}{Path(path).name}' if Path(path).is_absolute() else value


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


def model_card(model: nn.Module, run: Run, name: str, files: List[str], license: str) -> ModelCard:
    """Write the card of a model from `model_card.md.j2`.

    Args:
        name: The name with which `timm.create_model` loads it.
        files: Names of the files that are published with the card.
    """
    described = ('num_classes', 'pruned_connections')  # elsewhere in the card
    model_args = {key: value for key, value in model.pretrained_model_args.items() if key not in described}
    input_size = timm.data.resolve_model_data_config(model)['input_size']
    size = 'x'.join(map(str, input_size[1:]))
    title = name.split('/')[-1]
    family = type(model).__name__
    metrics = run.metrics(size)
    eval_results = metrics and [
        EvalResult(
            task_type='image-classification',
            task_name='Image Classification',
            dataset_type=run.dataset_id or run.dataset_key,
            dataset_name=run.dataset,
            dataset_split=run.split,
            metric_type='accuracy',
            metric_name=label,
            metric_value=round(metrics[key], 2),
        )
        for key, label in (('top1', 'Top-1 accuracy, %'), ('top5', 'Top-5 accuracy, %'))
    ]
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
        family=family,
        model=model,
        model_args=model_args,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        input_size=input_size,
        size=size,
        labels=[
            ' '.join(label.split()).replace('|', '\\|')
            for label in label_names(model.pretrained_cfg, model.num_classes)],
        connections=_describe_connections(model),
        run=run,
        args=run.args,
        metrics=metrics,
        files=files,
        pictures=[(file, text) for file, text in PICTURES.items() if file in files],
    )

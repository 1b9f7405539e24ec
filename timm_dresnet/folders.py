"""The folder of a model: checked before it is loaded, and written whole or not at all. And checkpoints of training."""
import math
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from timm.data import resolve_input_data_config
from timm.models import get_pretrained_cfg
from timm.utils.checkpoint_saver import load_checkpoint_metadata


def load_folder(path: Path) -> nn.Module:
    """Load a model as `timm.create_model('local-dir:...', pretrained=True)` does, in eval mode.

    Only `config.json` and `model.safetensors` are read. The shapes that the header of the weights lists must fit the
    model that `config.json` describes before any memory is taken.

    Raises:
        ValueError: If it does not hold a model, or one of its files is damaged.
    """
    config, weights = path / 'config.json', path / 'model.safetensors'
    for file in (config, weights):
        if not file.is_file():
            raise ValueError(
                f'{path} holds no {file.name}: give the folder of a finished run, or what timm.models.save_for_hf '
                'writes with safe_serialization=True.')
    try:
        with torch.device('meta'):
            described = timm.create_model(f'local-dir:{path}')
        shapes = {key: list(tensor.shape) for key, tensor in described.state_dict().items()}
    except Exception as e:  # whatever a wrong config makes timm and the model raise
        raise ValueError(f'{config} does not describe a model: {first_line(e)}') from e
    if described.num_classes != described.pretrained_cfg['num_classes']:  # timm would replace the classifier
        raise ValueError(f'{config} is damaged: its num_classes and that of its model_args differ.')
    try:
        with safe_open(weights, 'pt') as tensors:
            held = {key: tensors.get_slice(key).get_shape() for key in tensors.keys()}
    except SafetensorError as e:
        raise ValueError(f'{weights} is damaged ({e}).') from e
    for key, shape in held.items():
        if shape != shapes.get(key, shape):
            raise ValueError(f'{weights} does not fit config.json: {key} has the shape {shape} and not {shapes[key]}.')
    count, needed = (sum(map(math.prod, each.values())) for each in (held, shapes))
    if 2 * count < needed:  # some may be missing that timm makes from others
        raise ValueError(f'{weights} does not fit config.json: it holds {count:,} numbers, the model {needed:,}.')
    try:
        model = timm.create_model(f'local-dir:{path}', pretrained=True).eval()
    except Exception as e:  # whatever weights that do not fit make timm raise
        raise ValueError(f'{path} holds no model that timm can load: {first_line(e)}') from e
    for key, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f'{key} in {weights} is not finite: the weights are damaged, or the training diverged.')
    return model


def load_checkpoint(path: Path) -> nn.Module:
    """Load a model from a checkpoint of `python -m train` or timm's train.py, in eval mode.

    Its weights are the moving average, if there is one. From the arguments of the run, which the file holds too, its
    `pretrained_cfg` has the preprocessing and, if they are known, the class names.

    Raises:
        ValueError: If it is not such a file, or does not fit its model.
    """
    try:
        checkpoint = load_checkpoint_metadata(path)
        if 'args' not in checkpoint:
            raise ValueError('it does not say of which model it is; weights alone load in Python, by '
                             'timm.create_model(NAME, checkpoint_path=FILE).')
        args, state = vars(checkpoint['args']), checkpoint.get('task_state', {})
        name = args['model']
        registered = args.get('pretrained') and not args.get('pretrained_path')
        if registered and (cfg := get_pretrained_cfg(name)):  # whose classes the model may have
            name = f'{cfg.architecture}.{cfg.tag}' if cfg.tag else name
        model = timm.create_model(
            name,
            num_classes=args['num_classes'],
            in_chans=args.get('in_chans') or (args.get('input_size') or [3])[0],
            global_pool=args.get('gp'),
            **args.get('model_kwargs') or {},
        )
        if state.get('pruned'):
            model.prune_connections(state['pruned'])
        timm.models.load_checkpoint(model, str(path))
    except Exception as e:  # whatever other files, and weights that do not fit, make torch and timm raise
        raise ValueError(
            f"{path} cannot be loaded as a checkpoint of python -m train or timm's train.py: {first_line(e)}") from e
    config = model.pretrained_cfg
    for key in ('tag', 'label_descriptions', 'test_input_size', 'test_crop_pct', 'test_pool_size'):  # of other weights
        config.pop(key, None)
    data_config = resolve_input_data_config(model, args)
    config.update(data_config, num_classes=model.num_classes, label_names=state.get('classes'))
    resnet = (args.get('model_kwargs') or {}).get('grown_from')
    if not registered:
        config.pop('license', None)
    elif resnet and (cfg := get_pretrained_cfg(resnet)):
        config['license'] = cfg.license
    return model.eval()


def first_line(error: Exception) -> str:
    """What an exception says in its first line, or else its name."""
    return (str(error).splitlines() or [type(error).__name__])[0][:500]


def replace(new: Path, path: Path) -> None:
    """Move a finished file, or a folder, to its place, so that a loss of power leaves the new one or the old one."""
    if new.is_file():
        with new.open('rb') as f:
            os.fsync(f.fileno())
    os.replace(new, path)
    if os.name == 'posix':
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A temporary folder to write files into. If no exception is raised, they are moved to `folder`, weights last.

    A folder that does not exist yet appears with all its files at once.
    """
    exists = folder.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder if exists else folder.parent, prefix='.new-') as name:
        new = Path(name, 'new')  # with the usual permissions, which a temporary folder does not have
        new.mkdir()
        yield new
        for file in new.iterdir():
            file.chmod(new.stat().st_mode & 0o666)  # safetensors lets only its owner read
        if not exists:
            replace(new, folder)
            return
        for file in sorted(new.iterdir(), key=lambda file: file.suffix == '.safetensors'):
            replace(file, folder / file.name)

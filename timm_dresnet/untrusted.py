"""The folder of a model from elsewhere: what its files say is checked before anything is built of it."""
import json
import math
from pathlib import Path
from typing import Any, Dict, Iterator, List, Tuple

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open

__all__ = ['load_folder']

_MAX_CONFIG = 16 * 2 ** 20  # bytes; the names and descriptions of 21,841 classes are 2.7 million
_MAX_SIDE = 4096  # of an image
_MAX_LAYERS = 1000
_MAX_DEPTH = 16  # of lists in lists
# arguments of timm.create_model that are not the model's
_NOT_OF_MODEL = {'pretrained', 'pretrained_cfg', 'pretrained_cfg_overlay', 'checkpoint_path', 'cache_dir', 'scriptable',
                 'exportable', 'no_jit', 'device', 'dtype'}


def load_folder(path: Path) -> nn.Module:
    """Load a model as `timm.create_model('local-dir:...', pretrained=True)` does, from `config.json` and safetensors.

    Neither a damaged folder nor a malicious one makes it unpickle anything, read files beside these two, or take memory
    and time out of proportion to the size of the weights.

    Args:
        path: The folder.

    Returns:
        The model, in evaluation mode.

    Raises:
        ValueError: If it does not hold a model, or one of its files is damaged.
        OSError: If a file cannot be read.
    """
    weights = path / 'model.safetensors'
    for file in (path / 'config.json', weights):
        if not file.is_file():
            raise ValueError(
                f'{path} holds no {file.name}: give the folder of a finished run, or what timm.models.save_for_hf '
                'writes with safe_serialization=True.')
    name, model_args = _check_config(path / 'config.json')
    try:
        with safe_open(weights, 'pt') as file:
            count = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())
    except SafetensorError as e:
        raise ValueError(f'{weights} is damaged ({e}).') from e
    try:
        with torch.device('meta'):
            needed = timm.create_model(name, **model_args).state_dict()
    except Exception as e:  # whatever wrong arguments make a model raise
        raise ValueError(f'{path / "config.json"} does not describe a {name}: {_first_line(e)}') from e
    if count < 0.5 * sum(tensor.numel() for tensor in needed.values()) - 1e4:
        raise ValueError(f'{weights} holds too few numbers for the {name} that config.json describes.')
    try:
        model = timm.create_model(f'local-dir:{path}', pretrained=True).eval()
    except Exception as e:  # whatever weights that do not fit make timm raise
        raise ValueError(f'{path} holds no model that timm can load: {_first_line(e)}') from e
    for key, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise ValueError(f'{key} in {weights} is not finite: the weights are damaged, or the training diverged.')
    return model


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _numbers(value: Any, depth: int = 0) -> Iterator[float]:
    if depth > _MAX_DEPTH:
        raise ValueError('lists in lists without end')
    if isinstance(value, (int, float)):
        yield value
    elif isinstance(value, (list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item, depth + 1)


def _check_config(path: Path) -> Tuple[str, Dict[str, Any]]:
    """Name of the model and what it is created with."""
    def check(good: bool, what: str) -> None:
        if not good:
            raise ValueError(f'{path} is damaged: {what}.')

    check(path.stat().st_size <= _MAX_CONFIG, f'it has more than {_MAX_CONFIG:,} bytes')
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as e:
        raise ValueError(f'{path} is damaged: it is not JSON ({_first_line(e)}).') from e
    check(isinstance(config, dict), 'it is not an object')
    cfg = config.get('pretrained_cfg', config)
    check(isinstance(cfg, dict), 'pretrained_cfg is not an object')
    name, model_args = config.get('architecture'), config.get('model_args', {})
    check(isinstance(name, str) and timm.is_model(name), f'timm has no architecture {str(name)[:80]!r}')
    check(isinstance(model_args, dict), 'model_args is not an object')
    check(not _NOT_OF_MODEL & set(model_args), f'model_args has {", ".join(sorted(_NOT_OF_MODEL & set(model_args)))}')
    check(not cfg.get('custom_load'), 'custom_load is set')
    try:
        numbers = list(_numbers(model_args))
        layers = sum(abs(n) for key, value in model_args.items() if 'layers' in key or 'depth' in key
                     for n in _numbers(value))
    except ValueError as e:
        raise ValueError(f'{path} is damaged: model_args has {e}.') from e
    check(all(math.isfinite(n) and abs(n) < 2 ** 31 for n in numbers), 'model_args has numbers beyond any use')
    check(layers <= _MAX_LAYERS, f'model_args asks for more than {_MAX_LAYERS} layers')

    classes = config.get('num_classes', cfg.get('num_classes', timm.get_pretrained_cfg(name).num_classes))
    check(type(classes) is int and 0 <= classes < 2 ** 31, 'num_classes is not a number of classes')
    own_classes = model_args.get('num_classes', classes)  # timm would start another classifier from random numbers
    check(type(own_classes) is int and own_classes == classes, 'num_classes and that of model_args differ')
    for key in ('input_size', 'test_input_size', 'min_input_size'):
        size = cfg.get(key)
        good = isinstance(size, list) and len(size) == 3 and all(type(n) is int and 0 < n <= _MAX_SIDE for n in size)
        check(size is None or good, f'{key} is not channels, height and width of up to {_MAX_SIDE}')
    for key in ('crop_pct', 'test_crop_pct'):
        crop = cfg.get(key)
        check(crop is None or type(crop) in (int, float) and 0.1 <= crop <= 2, f'{key} is not from 0.1 to 2')
    for key in ('mean', 'std'):
        values: List[Any] = cfg.get(key)
        good = isinstance(values, list) and len(values) < 100 and all(type(v) in (int, float) for v in values) and all(
            math.isfinite(v) and (v > 0 or key == 'mean') for v in values)
        check(values is None or good, f'{key} is not a list of numbers')
    labels = config.get('label_names', cfg.get('label_names'))
    if isinstance(labels, dict):  # as timm has it where indices are left out
        good = all(key.isdecimal() and isinstance(label, str) for key, label in labels.items())
    else:
        good = isinstance(labels, list) and all(isinstance(label, str) for label in labels) and len(labels) == classes
    check(labels is None or good, 'label_names is not one name for each class')
    return name, {'num_classes': classes, **model_args}

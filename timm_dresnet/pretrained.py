"""Pretrained weights: files in this package, and the ResNets of timm, from which networks are grown."""
import hashlib
import json
import re
from importlib.resources import files
from typing import Any, Callable, Dict, Optional

import torch
import torch.nn as nn
from safetensors.torch import load
from timm.models import PretrainedCfg, get_arch_pretrained_cfgs, resolve_pretrained_cfg
from timm.models import build_model_with_cfg as timm_build_model_with_cfg

# parameters that show the arguments of a network
_TELLING = r'\.connections\.|\.skip_weight\.|^layer1\.0\.conv1\.bias$|^layer\d\.\d+\.conv1\.weight$'
_ARGUMENTS = (
    (r'^layer\d\.\d+\.conv1\.weight$', 'layers or block'),
    (r'\.conv1?\.bias$', 'inference_mode'),
    (r'\.skip_weight\.', 'skip_weight'),
    (r'\.log_sharpness$|\.linear_weight$', 'gate'),
    (r'\.expansions\.', 'connection_rank'),
    (r'\.gates\.', 'pruned_connections or connected_stages'),
    (r'', 'connection_rank or norm_layer'),
)

# what a config says of weights, for a network that is made without them
WITHOUT_WEIGHTS = dict.fromkeys(('url', 'file', 'hf_hub_id', 'license', 'origin_url', 'tag'))

# not a Path: the package may be in a zip archive
_FOLDER = files('timm_dresnet') / 'weights'


def packaged_file(tag: str) -> str:
    """Path of weights in this package, such as 'test_dresnet.c10', for the `file` of a pretrained config."""
    return str(_FOLDER / f'{tag}.safetensors')


def packaged_classes(data_set: str) -> Dict[str, Any]:
    """Names and descriptions of a data set's classes, such as those of 'tiny_imagenet', for a pretrained config."""
    lines = (_FOLDER / f'{data_set}_classes.txt').read_text().splitlines()
    descriptions = dict(line.split('\t') for line in lines)
    return dict(label_names=tuple(descriptions), label_descriptions=descriptions)


def _load_packaged(name: str) -> Dict[str, torch.Tensor]:
    """Load a file of this package, and check its SHA-256."""
    remedy = 'Install timm-dresnet again: pip install --force-reinstall --no-deps timm-dresnet'
    path = _FOLDER / name
    try:
        digest = json.loads((_FOLDER / 'manifest.json').read_bytes())[name]['sha256']
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise RuntimeError(f'{_FOLDER / "manifest.json"} is missing or damaged ({type(e).__name__}). {remedy}') from e
    try:
        data = path.read_bytes()
    except OSError as e:
        raise RuntimeError(f'{path} cannot be read ({e.strerror or type(e).__name__}). {remedy}') from e
    if hashlib.sha256(data).hexdigest() != digest:
        raise RuntimeError(f'{path} is damaged: its SHA-256 is not the one in the manifest. {remedy}')
    # in full precision, in which timm adapts weights to other numbers of channels
    return {key: w.float() if w.is_floating_point() else w for key, w in load(data).items()}


def build_model_with_cfg(
        model_cls: Callable[..., nn.Module],
        variant: str,
        pretrained: bool,
        pretrained_filter_fn: Callable[..., Any],
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        **kwargs,
) -> nn.Module:
    """timm's `build_model_with_cfg`, which checks weights of this package before it loads them.

    A network that is named without a tag and made without the weights of its default tag is configured as the ResNet of
    its name, without the license and the origin of weights. Names of classes go with the weights and their classifier.

    Raises:
        RuntimeError: If weights of this package are missing or damaged.
    """
    overlay = dict(pretrained_cfg_overlay or {})
    registered = pretrained and not any(overlay.get(key) for key in ('url', 'file', 'state_dict', 'hf_hub_id'))
    if not registered and not pretrained_cfg:
        pretrained_cfg = next((c for c in get_arch_pretrained_cfgs(variant).values() if not c.file), None)
        overlay = {**WITHOUT_WEIGHTS, **overlay}
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, overlay)
    if not registered or kwargs.get('num_classes', cfg.num_classes) != cfg.num_classes:
        overlay = dict(dict(label_names=None, label_descriptions=None), **overlay)
    if registered and not cfg.source and cfg.file == packaged_file(f'{variant}.{cfg.tag}'):
        overlay['state_dict'] = _load_packaged(f'{variant}.{cfg.tag}.safetensors')

    def filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
        model.pretrained_cfg.pop('state_dict', None)  # or the model would keep its weights twice
        return pretrained_filter_fn(state_dict, model)

    return timm_build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=overlay,
        **kwargs,
    )


def refuse_other_weights(model: nn.Module, state_dict: Dict[str, torch.Tensor]) -> None:
    """Raise a RuntimeError for weights of a whole network that mean something else in this one, although they may load.

    They are those of a network without its learned connections or skip weights, or with others.
    """
    def find(tensors: Dict[str, Any]) -> Dict[str, Any]:
        return {
            name: tensor.shape for name, tensor in tensors.items() if isinstance(tensor, torch.Tensor)
            and re.search(_TELLING, name) and not re.search(r'\.running_|\.num_batches_', name)}

    there = find(model.state_dict(keep_vars=True))  # under the names that are saved, also where blocks are wrapped
    given = find(state_dict)
    parts = {name.split('.')[0] for name in there} & {name.split('.')[0] for name in given}  # of a network cut short
    different = [
        name for name in sorted({*there, *given}) if name.split('.')[0] in parts and there.get(name) != given.get(name)]
    if not different:
        return
    if all('conv1.weight' in name for name in given) and all('conv1' not in name for name in different):
        raise RuntimeError(
            'These weights are those of a ResNet, without learned connections or skip weights: load them into the '
            'ResNet, and let that grow some by timm_dresnet.grow(resnet).')
    if all('conv1.weight' in name for name in there) and all('conv1' not in name for name in different):
        raise RuntimeError(
            'These weights are those of a network with learned connections or skip weights, and this one is a ResNet: '
            'load them into a DResNet or AdaResNet.')
    argument, name = next(
        (argument, name) for pattern, argument in _ARGUMENTS for name in different if re.search(pattern, name))
    how = 'is missing' if name not in given else 'is not expected' if name not in there else (
        f'has the shape {list(given[name])} and not {list(there[name])}')
    raise RuntimeError(
        f'These weights are those of a network made with another {argument}: {name} {how}. Make this one with the '
        'arguments that the other was made with.')


def grown_cfgs(variant: str, resnet: str) -> Dict[str, PretrainedCfg]:
    """Pretrained configs of a network grown from each checkpoint that timm has of a ResNet on the Hub.

    They are timm's, its default first, by name and tag: 'dresnet18.init_a1_in1k' for 'resnet18.a1_in1k'.
    """
    return {f'{variant}.init_{cfg.tag}': cfg for cfg in get_arch_pretrained_cfgs(resnet).values() if cfg.hf_hub_id}

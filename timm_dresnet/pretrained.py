"""Pretrained weights: files in this package, and the ResNets of timm, from which networks are grown."""
import hashlib
import json
from importlib.resources import files
from typing import Any, Callable, Dict, Optional, Tuple, Type

import torch
import torch.nn as nn
from safetensors.torch import load
from timm.models import build_model_with_cfg as timm_build_model_with_cfg
from timm.models import get_arch_pretrained_cfgs, resolve_pretrained_cfg
from timm.models._pretrained import PretrainedCfg

__all__ = ['build_model_with_cfg', 'grown_cfgs', 'packaged_classes', 'packaged_file']

# not a Path: the package may be in a zip archive
_FOLDER = files('timm_dresnet') / 'weights'


def packaged_file(tag: str) -> str:
    """Path of weights in this package, for the `file` of a pretrained config.

    Args:
        tag: Model name and tag, such as 'test_dresnet.c10'.
    """
    return str(_FOLDER / f'{tag}.safetensors')


def packaged_classes(data_set: str) -> Tuple[str, ...]:
    """Names of a data set's classes, in their order.

    Args:
        data_set: 'tiny_imagenet', whose 200 classes are named by their WordNet ids.
    """
    return tuple((_FOLDER / f'{data_set}_classes.txt').read_text().split())


def _load_packaged(name: str) -> Dict[str, torch.Tensor]:
    """Load a file of this package, and check its size and SHA-256."""
    remedy = 'Install timm-dresnet again: pip install --force-reinstall --no-deps timm-dresnet'
    path = _FOLDER / name
    try:
        entry = json.loads((_FOLDER / 'manifest.json').read_bytes())[name]
        size, digest = entry['size'], entry['sha256']
    except (OSError, ValueError, TypeError, KeyError) as e:
        raise RuntimeError(f'{_FOLDER / "manifest.json"} is missing or damaged ({type(e).__name__}). {remedy}') from e
    try:
        data = path.read_bytes()
    except OSError as e:
        raise RuntimeError(f'{path} cannot be read ({e.strerror or type(e).__name__}). {remedy}') from e
    if len(data) != size:
        raise RuntimeError(f'{path} is damaged: it has {len(data):,} bytes and not {size:,}. {remedy}')
    if hashlib.sha256(data).hexdigest() != digest:
        raise RuntimeError(f'{path} is damaged: its SHA-256 is not the one in the manifest. {remedy}')
    # in full precision, in which timm adapts weights to other numbers of channels
    return {key: w.float() if w.is_floating_point() else w for key, w in load(data).items()}


def build_model_with_cfg(
        model_cls: Type[nn.Module],
        variant: str,
        pretrained: bool,
        pretrained_filter_fn: Callable[..., Any],
        pretrained_cfg: Any = None,
        pretrained_cfg_overlay: Optional[Dict[str, Any]] = None,
        **kwargs,
) -> nn.Module:
    """timm's `build_model_with_cfg`, which checks weights of this package before it loads them.

    Raises:
        RuntimeError: If they are missing or damaged.
    """
    cfg = resolve_pretrained_cfg(variant, pretrained_cfg, pretrained_cfg_overlay)
    if pretrained and not cfg.source and not cfg.state_dict and cfg.file == packaged_file(f'{variant}.{cfg.tag}'):
        weights = _load_packaged(f'{variant}.{cfg.tag}.safetensors')
        pretrained_cfg_overlay = dict(pretrained_cfg_overlay or {}, state_dict=weights)

    def filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
        model.pretrained_cfg.pop('state_dict', None)  # or the model would keep its weights twice
        return pretrained_filter_fn(state_dict, model)

    return timm_build_model_with_cfg(
        model_cls,
        variant,
        pretrained,
        pretrained_filter_fn=filter_fn,
        pretrained_cfg=pretrained_cfg,
        pretrained_cfg_overlay=pretrained_cfg_overlay,
        **kwargs,
    )


def grown_cfgs(variant: str, resnet: str) -> Dict[str, PretrainedCfg]:
    """Pretrained configs of a network grown from each checkpoint that timm has of a ResNet on the Hub.

    Args:
        variant: Name of the network.
        resnet: Name of timm's ResNet.

    Returns:
        timm's configs, its default first, by name and tag: 'dresnet18.init_a1_in1k' for 'resnet18.a1_in1k'.
    """
    return {f'{variant}.init_{cfg.tag}': cfg for cfg in get_arch_pretrained_cfgs(resnet).values() if cfg.hf_hub_id}

"""Any ResNet of timm into one with learned connections or skip weights, which computes the same until it is trained."""
import copy
import dataclasses
from functools import partial
from typing import Any

import torch
import torch.nn as nn
from timm.layers import GroupNorm1, get_device_dtype
from timm.layers.norm_act import FrozenBatchNorm2d
from timm.models import create_model, generate_default_cfgs, get_pretrained_cfg, is_model, register_model, resnet
from timm.models._input import update_model_args
from torch.nn.modules.batchnorm import _BatchNorm

from .adaresnet import AdaBasicBlock, AdaBottleneck, AdaResNet, choose_zero_init_last
from .adaresnet import checkpoint_filter_fn as _adaresnet_filter_fn
from .dresnet import DResNet, Features, refuse_feature_cls, start_from_resnet
from .dresnet import checkpoint_filter_fn as _dresnet_filter_fn
from .plainnet import PlainNet
from .pretrained import WITHOUT_WEIGHTS, build_model_with_cfg, grown_cfgs
from .resnet import ResNet, _cfg

__all__ = ['grow']  # the model registry adds each entry point to this

_MAX_COST = 0.13  # what connections of the rank chosen here may add to parameters and to multiply-adds


@torch.inference_mode(False)  # or what is returned could not be trained
def grow(model: nn.Module, kind: str = 'dresnet', **kwargs: Any) -> ResNet:
    """Let connections or skip weights grow into an existing ResNet, with its weights.

    The network that is returned computes the same and learns from there. Preprocessing and names of classes come along.
    It is saved and loaded as any model of timm is: its architecture is 'dresnet' or 'adaresnet', with the ResNet's name
    for ``grown_from``. The model that is given is left as it is.

    Args:
        model: Any ResNet of `timm.models.resnet` (ResNeXt, wide, with attention, ...) or of this package, such as
            ``timm.create_model('resnet50d', pretrained=True)``.
        kind: 'dresnet' or 'adaresnet'.
        **kwargs: Arguments of `DResNet` (``gate``, ``gate_init``, ``connection_rank``, ``connected_stages``) or of
            `AdaResNet` (``skip_weight``). If not given, gates are linear and start at 0, connections lead into the
            blocks of the last stage after its first, where they cost least, and are summed at full width where that
            adds at most 13 % to parameters and multiply-adds, else with the largest rank up to 64 that does, or 4.
            Behind gates that start elsewhere, expansions start at 0, or at full width the connections' norm weights,
            which have to be trained then: where batch norms are frozen, take linear gates.

    Raises:
        ValueError: If the model is no ResNet that can grow, or an argument is not one of the choices.
    """
    if kind not in _GROW:
        raise ValueError(f"kind must be one of {', '.join(map(repr, _GROW))}, got {kind!r}.")
    if unknown := sorted(kwargs.keys() - set(_ARGUMENTS[kind])):
        raise ValueError(f"a {kind} grows with the arguments {', '.join(_ARGUMENTS[kind])}, not {unknown[0]!r}.")
    kwargs = {name: value for name, value in kwargs.items() if value is not None}  # as timm.create_model has it
    grown = _GROW[kind](copy.deepcopy(model), **kwargs)
    start_from_resnet(grown.state_dict())
    if cfg := getattr(model, 'pretrained_cfg', None):  # else timm did not create it, and cannot create it again
        grown.pretrained_cfg = grown.default_cfg = dict(cfg, architecture=kind, tag=None)
        update_model_args(grown, grown_from=cfg['architecture'], **kwargs)
    return grown


def _adopt(model: nn.Module, family: Any) -> Any:
    """Make a ResNet one of a family, in place."""
    if type(model) not in (resnet.ResNet, ResNet, PlainNet):  # methods of other classes would be lost
        raise ValueError(
            f'a ResNet of timm without learned connections is needed, got a {type(model).__name__}: give the network '
            'itself, not one made with features_only=True, compiled or wrapped.')
    names = getattr(model, 'stage_names', ('layer1', 'layer2', 'layer3', 'layer4'))
    stages = {name: getattr(model, name) for name in names}
    if missing := [name for name, stage in stages.items() if not isinstance(stage, nn.Sequential) or not len(stage)]:
        raise ValueError(f'a whole ResNet is needed, from this one {missing[0]} was taken out.')
    args = getattr(model, '_model_args', {})  # which timm.create_model has noted, and which a property of family hides
    model.__dict__.pop('_model_args', None)
    model.__class__ = family
    model.stage_names, model._model_args = names, args
    return model


def _grow_dresnet(
        model: nn.Module,
        gate: str = 'linear',
        gate_init: Any = None,
        connection_rank: Any = None,
        connected_stages: int = 1,
        **kwargs: Any,
) -> DResNet:
    if gate == 'linear' and gate_init is None:
        gate_init = 0.
    grown = _adopt(model, DResNet)
    if connection_rank is None:
        connection_rank = _choose_rank(grown, connected_stages)
    norm_layer = nn.BatchNorm2d if isinstance(grown.bn1, (_BatchNorm, FrozenBatchNorm2d)) else GroupNorm1
    grown.add_connections(
        gate, gate_init, connection_rank, connected_stages, norm_layer, **kwargs, **get_device_dtype(grown))
    # what is saved loads with these, whatever the defaults are then
    update_model_args(grown, gate=gate, connection_rank=connection_rank, connected_stages=connected_stages)
    return grown


def _grow_adaresnet(model: nn.Module, **kwargs: Any) -> AdaResNet:
    grown = _adopt(model, AdaResNet)
    grown._zero_init_last = grown._model_args.get('zero_init_last', True)  # timm's default
    families = {resnet.BasicBlock: AdaBasicBlock, resnet.Bottleneck: AdaBottleneck}
    for name in grown.stage_names:
        for block in getattr(grown, name):
            block.__class__ = families.get(type(block), type(block))
    grown.add_skip_weights(**kwargs, **get_device_dtype(grown))
    return grown


_GROW = dict(dresnet=_grow_dresnet, adaresnet=_grow_adaresnet)
_ARGUMENTS = dict(dresnet=('gate', 'gate_init', 'connection_rank', 'connected_stages'), adaresnet=('skip_weight',))
_FILTERS = dict(dresnet=_dresnet_filter_fn, adaresnet=_adaresnet_filter_fn)


def _choose_rank(model: DResNet, connected_stages: int) -> int:
    """Rank of the connections: 0 for full width where that is cheap, or else the largest up to 64 that is, or 4."""
    feature_info: Any = model.feature_info[1:]
    stages = {name: getattr(model, name) for name in model.stage_names}
    chs = {name: info['num_chs'] for name, info in zip(stages, feature_info)}
    areas = {name: (feature_info[0]['reduction'] / info['reduction']) ** 2 for name, info in zip(stages, feature_info)}
    parameters = sum(p.numel() for p in model.parameters())
    multiply_adds = float(sum(p.numel() for p in model.conv1.parameters()))
    multiply_adds += sum(areas[name] * sum(p.numel() for p in stage.parameters()) for name, stage in stages.items())
    source_chs = [chs[name] for name, stage in stages.items() for _ in stage]
    targets = model.connection_targets(connected_stages)

    def cost(rank: int) -> float:
        added = {
            name: sum((rank or chs[name]) * sum(source_chs[:i - 2]) + rank * chs[name] for i in numbers)
            for name, numbers in targets.items()}
        return max(sum(added.values()) / parameters, sum(areas[name] * added[name] for name in added) / multiply_adds)

    return next((rank for rank in (0, 64, 56, 48, 40, 32, 24, 16, 8) if cost(rank) <= _MAX_COST), 4)


def _build(kind: str, grown_from: str, **kwargs: Any) -> ResNet:
    names = (*_ARGUMENTS[kind], 'pruned_connections', 'skip_init', 'inference_mode')
    own = {name: kwargs.pop(name) for name in names if name in kwargs}
    if 'skip_init' in own:
        kwargs['zero_init_last'] = choose_zero_init_last(own['skip_init'], kwargs.get('zero_init_last'))
    model = create_model(grown_from, **kwargs)
    if kwargs.get('stem_type') == 'cifar' and not isinstance(model, ResNet):  # timm takes it for its usual stem
        raise ValueError(f"stem_type='cifar' is one of this package's own networks, {grown_from} has none of it.")
    return _GROW[kind](model, **own)


def _create_grown(kind: str, variant: str, grown_from: str, pretrained: bool, pretrained_cfg: Any, **kwargs) -> ResNet:
    if not is_model(grown_from):
        raise ValueError(f'grown_from must be the name of a ResNet of timm, got {grown_from!r}: from a model that you '
                         'have, connections grow by timm_dresnet.grow(model).')
    if variant == kind and not pretrained_cfg:  # which has no weights of its own in the registry
        pretrained_cfg = get_pretrained_cfg(grown_from)
        if pretrained_cfg:
            changes = dict(tag=None) if pretrained else WITHOUT_WEIGHTS
            pretrained_cfg = dataclasses.replace(pretrained_cfg, architecture=variant, **changes)
    if kind == 'dresnet':
        refuse_feature_cls(kwargs.get('feature_cls'))
    # the other ways to make a feature extractor do not take None for the features of all stages
    out_indices = {} if 'feature_cls' in kwargs else dict(out_indices=None)
    return build_model_with_cfg(
        partial(_build, kind, grown_from),
        variant,
        pretrained,
        pretrained_filter_fn=_FILTERS[kind],
        pretrained_cfg=pretrained_cfg,
        feature_cfg=dict(out_indices, feature_cls=Features),
        **kwargs,
    )


# the depths of ResNet-D up to 152, and one or two of each other kind for which timm has weights of its own
_RESNETS = (
    'resnet18d', 'resnet34d', 'resnet50d', 'resnet101d', 'resnet152d', 'resnetaa50', 'resnetrs50', 'resnext50_32x4d',
    'resnext101_32x8d', 'wide_resnet50_2', 'seresnet50', 'ecaresnet50t',
)
_NAMES = {
    resnet_name.replace('res', prefix, 1): (kind, resnet_name)
    for kind, prefix in (('dresnet', 'dres'), ('adaresnet', 'adares')) for resnet_name in _RESNETS}

default_cfgs = generate_default_cfgs({
    'dresnet': _cfg(),
    'adaresnet': _cfg(),
    **{tag: cfg for name, (_, resnet_name) in _NAMES.items() for tag, cfg in grown_cfgs(name, resnet_name).items()},
})


@register_model
def dresnet(pretrained: bool = False, grown_from: str = 'resnet50', pretrained_cfg: Any = None, **kwargs) -> ResNet:
    """DResNet, grown from any ResNet that timm can create."""
    return _create_grown('dresnet', 'dresnet', grown_from, pretrained, pretrained_cfg, **kwargs)


@register_model
def adaresnet(pretrained: bool = False, grown_from: str = 'resnet50', pretrained_cfg: Any = None, **kwargs) -> ResNet:
    """AdaResNet, grown from any ResNet that timm can create."""
    return _create_grown('adaresnet', 'adaresnet', grown_from, pretrained, pretrained_cfg, **kwargs)


def _register(name: str, kind: str, resnet_name: str) -> None:
    def create(pretrained: bool = False, pretrained_cfg: Any = None, **kwargs) -> ResNet:
        return _create_grown(kind, name, resnet_name, pretrained, pretrained_cfg, **kwargs)

    create.__name__, create.__doc__ = name, f"{kind}, grown from timm's {resnet_name}."
    register_model(create)


for _name, (_kind, _resnet_name) in _NAMES.items():
    _register(_name, _kind, _resnet_name)

"""PlainNet: a ResNet without shortcuts, the baseline that residual networks are compared with.

Papers:
* `Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385
"""
from typing import Any, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .resnet import BasicBlock, ResNet, _cfg, _cifar_cfg

__all__ = ['PlainNet']  # the model registry adds each entry point to this


class PlainBlock(BasicBlock):
    """Basic block without its shortcut: `y = act(branch(x))`."""

    def __init__(self, inplanes: int, planes: int, stride: int = 1, downsample: Any = None, **kwargs) -> None:
        super().__init__(inplanes, planes, stride, downsample=None, **kwargs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act2(self.branch(x))


class PlainNet(ResNet):
    """PlainNet."""

    def __init__(
            self,
            block: Union[Type[nn.Module], Tuple[Type[nn.Module], ...]],
            layers: Tuple[int, ...],
            drop_path_rate: float = 0.,
            zero_init_last: bool = False,
            **kwargs,
    ) -> None:
        """
        Args:
            block, layers, **kwargs: As for `ResNet`.
            drop_path_rate: Must be 0.
            zero_init_last: Must be False.

        Raises:
            ValueError: If an argument is not one of the choices, or asks for a shortcut.
        """
        for kind in block if isinstance(block, tuple) else (block,):
            if not issubclass(kind, PlainBlock):
                raise ValueError(f'block must be a PlainBlock, got {kind.__name__}, which has a shortcut.')
        if drop_path_rate:
            raise ValueError(
                f'drop_path_rate must be 0, got {drop_path_rate}: without a shortcut, nothing passes a dropped block.')
        if zero_init_last:
            raise ValueError('zero_init_last must be False: without a shortcut, every block would put out 0 forever.')
        super().__init__(block, layers, zero_init_last=False, **kwargs)


def _create_plainnet(variant: str, pretrained: bool = False, **kwargs) -> PlainNet:
    return build_model_with_cfg(
        PlainNet, variant, pretrained, feature_cfg=dict(out_indices=tuple(range(len(kwargs['layers']) + 1))), **kwargs)


default_cfgs = generate_default_cfgs({
    'plainnet18': _cfg(),
    'plainnet34': _cfg(),
    'plainnet18_cifar': _cifar_cfg(pool_size=(4, 4)),
    'plainnet20_cifar': _cifar_cfg(),
    'plainnet56_cifar': _cifar_cfg(),
})


@register_model
def plainnet18(pretrained: bool = False, **kwargs) -> PlainNet:
    """PlainNet-18."""
    model_args = dict(block=PlainBlock, layers=(2, 2, 2, 2))
    return _create_plainnet('plainnet18', pretrained, **dict(model_args, **kwargs))


@register_model
def plainnet34(pretrained: bool = False, **kwargs) -> PlainNet:
    """PlainNet-34."""
    model_args = dict(block=PlainBlock, layers=(3, 4, 6, 3))
    return _create_plainnet('plainnet34', pretrained, **dict(model_args, **kwargs))


@register_model
def plainnet18_cifar(pretrained: bool = False, **kwargs) -> PlainNet:
    """PlainNet-18 with a stem for small images."""
    model_args = dict(block=PlainBlock, layers=(2, 2, 2, 2), stem_type='cifar')
    return _create_plainnet('plainnet18_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def plainnet20_cifar(pretrained: bool = False, **kwargs) -> PlainNet:
    """PlainNet-20 for CIFAR, three stages of 16, 32 and 64 channels."""
    model_args = dict(block=PlainBlock, layers=(3, 3, 3), channels=(16, 32, 64), stem_type='cifar')
    return _create_plainnet('plainnet20_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def plainnet56_cifar(pretrained: bool = False, **kwargs) -> PlainNet:
    """PlainNet-56 for CIFAR, three stages of 16, 32 and 64 channels."""
    model_args = dict(block=PlainBlock, layers=(9, 9, 9), channels=(16, 32, 64), stem_type='cifar')
    return _create_plainnet('plainnet56_cifar', pretrained, **dict(model_args, **kwargs))

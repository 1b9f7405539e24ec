"""timm's ResNet for small images: the base class of the networks with learned connections, and their baseline.

Papers:
* `Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385
"""
import inspect
from typing import Any, Dict, List, Optional, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model, resnet
from timm.models._features import feature_take_indices

from .pretrained import packaged_file, refuse_other_weights

__all__ = ['ResNet']  # the model registry adds each entry point to this

CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CIFAR10_CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer', 'dog', 'frog', 'horse', 'ship', 'truck')


def require_eval(stage: nn.Module) -> None:
    """Raise a RuntimeError if a fused stage or block is in training mode: norms that are left would use the batch."""
    if stage.fused and stage.training:
        raise RuntimeError('A fused model is for inference: call eval() on it, and that before it is fused.')


class BasicBlock(resnet.BasicBlock):
    """timm's basic block, with its residual branch as a method of its own."""

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """The residual branch, which is added to the shortcut."""
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.drop_block(x)
        x = self.act1(x)
        x = self.aa(x)  # type: ignore[misc]

        x = self.conv2(x)
        x = self.bn2(x)

        if self.se is not None:
            x = self.se(x)

        if self.drop_path is not None:
            x = self.drop_path(x)
        return x


class ResNet(resnet.ResNet):
    """timm's ResNet with a stem for small images, and three or four stages."""
    __jit_unused_properties__ = ['fused', '_model_args']

    def __init__(
            self,
            block: Union[Type[nn.Module], Tuple[Type[nn.Module], ...]],
            layers: Tuple[int, ...],
            in_chans: int = 3,
            output_stride: int = 32,
            stem_type: str = '',
            channels: Tuple[int, ...] = (64, 128, 256, 512),
            device=None,
            dtype=None,
            **kwargs,
    ) -> None:
        """
        Args:
            block: Block class of all stages, or one for each.
            layers: Number of blocks in each stage.
            in_chans: Number of input channels.
            output_stride: Stride of the last feature map. Less than the network's own stride is reached by dilation.
                32, the default, changes nothing.
            stem_type: One of timm's stems, or 'cifar': one 3x3 convolution of stride 1 and no max-pooling.
            channels: Number of channels in each stage, before the block's expansion.
            **kwargs: All other arguments of timm's ResNet.

        Raises:
            TypeError: If there is no such argument.
            ValueError: If an argument is not one of the choices.
        """
        makers = [cls.__init__ for cls in type(self).__mro__ if issubclass(cls, resnet.ResNet)]
        known = {name for maker in makers for name in inspect.signature(maker).parameters} - {'self', 'kwargs'}
        if unknown := sorted(kwargs.keys() - known):
            raise TypeError(f"{type(self).__name__} has no argument {unknown[0]!r}, only {', '.join(sorted(known))}.")
        stems = ('', 'deep', 'deep_tiered', 'cifar')
        if stem_type not in stems:
            raise ValueError(f"stem_type must be one of {', '.join(map(repr, stems))}, got {stem_type!r}.")
        if len(layers) != len(channels) or len(layers) not in (3, 4):
            raise ValueError(f'layers and channels must be 3 or 4 numbers each, got {layers} and {channels}.')
        small = stem_type == 'cifar'
        stem_stride = 1 if small else 4
        stride = stem_stride * 2 ** (len(layers) - 1)
        # timm counts from a stem stride of 4 and can dilate its third and fourth stage
        timm_strides = {stem_stride * s // 4: s for s in (8, 16, 32) if stem_stride * s // 4 < stride}
        timm_strides.update({stride: 32, 32: 32})
        if output_stride not in timm_strides:
            raise ValueError(
                f"output_stride must be one of {', '.join(map(str, sorted(timm_strides)))} for a network of "
                f'{len(layers)} stages with stem_type={stem_type!r}, got {output_stride}.')

        stem_width = channels[0] // 2  # half of the stem's channels
        stem_args = dict(stem_type='deep', stem_width=stem_width) if small else dict(stem_type=stem_type)
        super().__init__(
            block,  # type: ignore[arg-type]  # timm means classes of blocks, and says blocks
            layers,
            in_chans=in_chans,
            output_stride=timm_strides[output_stride],
            channels=channels,
            device=device,
            dtype=dtype,
            **dict(kwargs, **stem_args),
        )
        if small:
            self.conv1 = nn.Conv2d(in_chans, 2 * stem_width, 3, padding=1, bias=False, device=device, dtype=dtype)
            nn.init.kaiming_normal_(self.conv1.weight, mode='fan_out', nonlinearity='relu')
            self.maxpool = nn.Identity()
            self.feature_info[0]['reduction'] = 1
            feature_info: Any = self.feature_info[1:]
            for info in feature_info:
                info['reduction'] //= 4
        if len(layers) == 3:
            self.layer4 = nn.Sequential()  # for timm's forward_features
        self.stage_names = tuple(f'layer{i + 1}' for i in range(len(layers)))

    @property
    def fused(self) -> bool:
        """Whether the model is fused for inference."""
        return any(getattr(module, 'fused', False) for module in self.modules() if module is not self)

    @property
    def _model_args(self) -> Dict[str, Any]:
        # timm writes these into config.json, and builds the network from them as it is now
        args = dict(self.__dict__.get('_created_with', {}))
        if self.fused:
            args['inference_mode'] = True
        return args

    @_model_args.setter
    def _model_args(self, args: Dict[str, Any]) -> None:
        self._created_with = args

    def _load_from_state_dict(self, state_dict, prefix, *args):
        # not in load_state_dict, which DDP and others that hold this network do not call
        weights = {name[len(prefix):]: tensor for name, tensor in state_dict.items() if name.startswith(prefix)}
        if 'conv1.weight' in weights or 'conv1.0.weight' in weights:  # else part of a network, as adapters are saved
            refuse_other_weights(self, weights)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def train(self, mode: bool = True) -> 'ResNet':
        """Set training or eval mode. A fused model that is frozen stays in eval mode.

        Raises:
            RuntimeError: If the model has been fused and is to be trained.
        """
        if mode and self.fused:
            if any(parameter.requires_grad for parameter in self.parameters()):
                raise RuntimeError(
                    'This model is fused for inference and cannot be trained: train the model that it was made from, '
                    'and fuse that again, or freeze this one by requires_grad_(False).')
            mode = False
        return super().train(mode)

    def forward_context(self) -> Any:
        """Make what one forward pass hands from stage to stage beside the features, for subclasses."""
        return None

    def forward_stage(self, stage: nn.Module, x: torch.Tensor, context: Any) -> torch.Tensor:
        """Run one stage. Returns its output, `[B, C, H, W]`."""
        if self.grad_checkpointing:
            return checkpoint_seq(stage, x)
        return stage(x)

    def forward_intermediates(
            self,
            x: torch.Tensor,
            indices: Optional[Union[int, List[int]]] = None,
            norm: bool = False,
            stop_early: bool = False,
            output_fmt: str = 'NCHW',
            intermediates_only: bool = False,
    ) -> Union[List[torch.Tensor], Tuple[torch.Tensor, List[torch.Tensor]]]:
        """As timm's, for three or four stages, with what `forward_context` makes for them.

        Raises:
            ValueError: If ``output_fmt`` is not NCHW.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}.")
        take_indices, max_index = feature_take_indices(len(self.stage_names) + 1, indices)
        intermediates = []

        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)
        if 0 in take_indices:
            intermediates.append(x)
        x = self.maxpool(x)

        context = self.forward_context()
        stage_names = self.stage_names[:max_index] if stop_early else self.stage_names
        for i, name in enumerate(stage_names, start=1):
            x = self.forward_stage(getattr(self, name), x, context)
            if i in take_indices:
                intermediates.append(x)

        if intermediates_only:
            return intermediates
        return x, intermediates

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """As timm's, for three or four stages."""
        take_indices, max_index = feature_take_indices(len(self.stage_names) + 1, indices)
        pruned, self.stage_names = self.stage_names[max_index:], self.stage_names[:max_index]
        for name in pruned:
            setattr(self, name, nn.Sequential())
        if max_index == 0:
            self.maxpool = nn.Identity()
        if pruned:
            self.num_features = self.head_hidden_size = self.feature_info[max_index]['num_chs']
        if prune_head or pruned:
            self.reset_classifier(0, '')
        return take_indices


def _create_resnet(variant: str, pretrained: bool = False, **kwargs) -> ResNet:
    return build_model_with_cfg(
        ResNet, variant, pretrained, feature_cfg=dict(out_indices=tuple(range(len(kwargs['layers']) + 1))), **kwargs)


def _cfg(url: str = '', **kwargs) -> Dict[str, Any]:
    return {
        'url': url,
        'num_classes': 1000, 'input_size': (3, 224, 224), 'pool_size': (7, 7),
        'crop_pct': 0.875, 'interpolation': 'bilinear',
        'mean': IMAGENET_DEFAULT_MEAN, 'std': IMAGENET_DEFAULT_STD,
        'first_conv': 'conv1', 'classifier': 'fc',
        'license': 'apache-2.0', 'paper_ids': 'arXiv:1512.03385',
        **kwargs
    }


def _cifar_cfg(url: str = '', **kwargs) -> Dict[str, Any]:
    return _cfg(url=url, **dict({
        'num_classes': 10, 'input_size': (3, 32, 32), 'pool_size': (8, 8), 'crop_pct': 1.0,
        'mean': CIFAR10_MEAN, 'std': CIFAR10_STD,
    }, **kwargs))


def _c10_cfg(tag: str, **kwargs) -> Dict[str, Any]:
    return _cifar_cfg(file=packaged_file(tag), label_names=CIFAR10_CLASSES, **kwargs)


default_cfgs = generate_default_cfgs({
    'resnet18_cifar': _cifar_cfg(pool_size=(4, 4)),
    'resnet20_cifar': _cifar_cfg(),
    'resnet56_cifar': _cifar_cfg(),
})


@register_model
def resnet18_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-18 with a stem for small images."""
    model_args = dict(block=resnet.BasicBlock, layers=(2, 2, 2, 2), stem_type='cifar')
    return _create_resnet('resnet18_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet20_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-20 for CIFAR, three stages of 16, 32 and 64 channels."""
    model_args = dict(block=resnet.BasicBlock, layers=(3, 3, 3), channels=(16, 32, 64), stem_type='cifar')
    return _create_resnet('resnet20_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def resnet56_cifar(pretrained: bool = False, **kwargs) -> ResNet:
    """ResNet-56 for CIFAR, three stages of 16, 32 and 64 channels."""
    model_args = dict(block=resnet.BasicBlock, layers=(9, 9, 9), channels=(16, 32, 64), stem_type='cifar')
    return _create_resnet('resnet56_cifar', pretrained, **dict(model_args, **kwargs))

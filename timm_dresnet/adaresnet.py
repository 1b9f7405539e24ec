"""AdaResNet: a ResNet in which the weight of each shortcut is learned.

Papers:
* `AdaResNet: Enhancing Residual Networks with Dynamic Weight Adjustment for Improved Feature Integration` -
  https://arxiv.org/abs/2408.09958
* `Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385
"""
from typing import Any, Callable, Dict, List, Optional, Set, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.models import generate_default_cfgs, register_model
from timm.models.resnet import Bottleneck
from timm.utils import reparameterize_model

from .folding import can_bypass, fold_norms
from .pretrained import build_model_with_cfg, grown_cfgs
from .resnet import BasicBlock, ResNet, _c10_cfg, _cifar_cfg, require_eval

__all__ = ['AdaResNet']  # the model registry adds each entry point to this


class SkipWeight(nn.Module):
    """The trained scalar alpha that scales a shortcut. Several blocks may hold the same one."""

    def __init__(self, init: float, **dd) -> None:
        super().__init__()
        self.init = init
        self.alpha = nn.Parameter(torch.empty(1, **dd))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.alpha, self.init)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not keep_vars:
            # the first entry of a shared one is the parameter, so that changes in place reach it once; the others have
            # storage of their own, as safetensors asks for
            alpha = destination[prefix + 'alpha']
            others = (value for key, value in destination.items() if key.endswith('.skip_weight.alpha'))
            if any(other is not alpha and other.data_ptr() == alpha.data_ptr() != 0 for other in others):
                destination[prefix + 'alpha'] = alpha.clone()

    def forward(self, branch: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        """`branch + alpha * shortcut`, all `[B, C, H, W]`."""
        return torch.addcmul(branch, shortcut, self.alpha.to(shortcut.dtype))


class AdaBlock(nn.Module):
    """What the blocks have in common: the network gives each its `skip_weight`."""
    fused = False

    @torch.no_grad()
    def reparameterize(self) -> None:
        """Fold norms into convolutions, and with them the weight of a projection shortcut, for inference."""
        self.fused = fold_norms(self) or self.fused
        if self.downsample is None or not isinstance(self.downsample[-1], nn.Identity):
            return
        conv = self.downsample[-2]
        if can_bypass(conv, nn.Conv2d) and can_bypass(self.skip_weight, SkipWeight):
            for parameter in conv.parameters():
                parameter.mul_(self.skip_weight.alpha)
            self.skip_weight: Any = None
            self.fused = True

    def add_shortcut(self, x: torch.Tensor) -> torch.Tensor:
        """`branch(x) + alpha * shortcut(x)`, `[B, C, H, W]`."""
        if not torch.jit.is_scripting():
            require_eval(self)
        shortcut = x if self.downsample is None else self.downsample(x)
        if self.skip_weight is None:  # folded into the shortcut
            return self.branch(x) + shortcut
        return self.skip_weight(self.branch(x), shortcut)


class AdaBasicBlock(AdaBlock, BasicBlock):
    """Basic block with a learned weight on its shortcut: `y = act(branch(x) + alpha * shortcut(x))`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act2(self.add_shortcut(x))


class AdaBottleneck(AdaBlock, Bottleneck):
    """Bottleneck block with a learned weight on its shortcut: `y = act(branch(x) + alpha * shortcut(x))`."""

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        """The residual branch, which is added to the shortcut."""
        x = self.conv1(x)
        x = self.bn1(x)
        x = self.act1(x)

        x = self.conv2(x)
        x = self.bn2(x)
        x = self.drop_block(x)
        x = self.act2(x)
        x = self.aa(x)  # type: ignore[misc]

        x = self.conv3(x)
        x = self.bn3(x)

        if self.se is not None:
            x = self.se(x)

        if self.drop_path is not None:
            x = self.drop_path(x)
        return x

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.act3(self.add_shortcut(x))


def choose_zero_init_last(skip_init: float, zero_init_last: Optional[bool] = None) -> bool:
    """Whether the last norm weights of branches start at 0, by default unless the skip weights do.

    Raises:
        ValueError: If both would.
    """
    if zero_init_last and skip_init == 0:
        raise ValueError('zero_init_last must be False or None with skip_init=0: branch and shortcut would both '
                         'start at 0, and no gradient would ever reach the network.')
    return skip_init != 0 if zero_init_last is None else zero_init_last


class AdaResNet(ResNet):
    """ResNet with a learned weight on the shortcut of every block: `y = act(branch(x) + alpha * shortcut(x))`."""
    _zero_init_last = True

    def __init__(
            self,
            block: Union[Type[nn.Module], Tuple[Type[nn.Module], ...]],
            layers: Tuple[int, ...],
            skip_init: float = 1.,
            skip_weight: str = 'per_block',
            zero_init_last: Optional[bool] = None,
            inference_mode: bool = False,
            device=None,
            dtype=None,
            **kwargs,
    ) -> None:
        """
        Args:
            block, layers, **kwargs: As for `ResNet`.
            skip_init: Value that the skip weights start from: 1 is a ResNet. 0, the paper's, is a network without
                shortcuts, from which deep ones train badly.
            skip_weight: How many there are: 'per_block', 'per_kind' (one for all identity shortcuts and one for all
                projections) or 'shared' (one for the network).
            zero_init_last: Start the last norm weight of every branch at 0. None does so unless skip_init is 0, when
                it would leave every block with an output of 0.
            inference_mode: Build the network as `timm.utils.reparameterize_model` leaves it, for weights saved then.

        Raises:
            ValueError: If an argument is not one of the choices.
        """
        if not isinstance(skip_init, (int, float)):
            raise ValueError(f'skip_init must be a number, got {skip_init!r}.')
        super().__init__(
            block, layers, zero_init_last=choose_zero_init_last(skip_init, zero_init_last), device=device, dtype=dtype,
            **kwargs)
        self.add_skip_weights(skip_init, skip_weight, inference_mode, device=device, dtype=dtype)

    def add_skip_weights(
            self,
            skip_init: float = 1.,
            skip_weight: str = 'per_block',
            inference_mode: bool = False,
            **dd,
    ) -> None:
        """Add the skip weights to a ResNet whose class is AdaResNet already; see `__init__` for the arguments."""
        groups: Dict[str, Callable[[nn.Module], Any]] = {
            'per_block': lambda block: block,
            'per_kind': lambda block: block.downsample is None,
            'shared': lambda block: None,
        }
        if skip_weight not in groups:
            raise ValueError(f"skip_weight must be one of {', '.join(map(repr, groups))}, got {skip_weight!r}.")
        skip_weights: Dict[Any, SkipWeight] = {}
        for stage in self.stage_names:
            for block in getattr(self, stage):
                if not isinstance(block, AdaBlock):
                    raise ValueError(
                        'skip weights belong to AdaBasicBlock and AdaBottleneck, and grow into BasicBlock and '
                        f'Bottleneck of timm, not into a {type(block).__name__}.')
                group = groups[skip_weight](block)
                if group not in skip_weights:
                    skip_weights[group] = SkipWeight(skip_init, **dd).train(block.training)
                block.skip_weight = skip_weights[group]
        if inference_mode:
            reparameterize_model(self, inplace=True)
            self.eval()

    @torch.jit.ignore
    def init_weights(self, zero_init_last: Optional[bool] = None) -> None:
        """Initialize the weights of convolutions, and of the last norms.

        Args:
            zero_init_last: Start the last norm weight of every branch at 0. None does as the network was created.
        """
        if zero_init_last is not None:
            self._zero_init_last = zero_init_last
        super().init_weights(self._zero_init_last)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        alphas: Dict[nn.Module, List[torch.Tensor]] = {}
        for name, module in self.named_modules(remove_duplicate=False):
            if isinstance(module, SkipWeight) and f'{prefix}{name}.alpha' in state_dict:
                alphas.setdefault(module, []).append(state_dict[f'{prefix}{name}.alpha'])
        if any((alpha != values[0]).any() for values in alphas.values() for alpha in values[1:] if not alpha.is_meta):
            raise RuntimeError(
                'These weights are those of a network made with another skip_weight: blocks that share one here have '
                'different ones there.')
        super()._load_from_state_dict(state_dict, prefix, *args)

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """The skip weights, which weight decay would pull towards a network without shortcuts."""
        return {name for name, _ in self.named_parameters() if name.endswith('.alpha')}


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Let the weights of a ResNet learn their skip weights from 1 on, where an AdaResNet is that ResNet."""
    if any(name.endswith('.skip_weight.alpha') for name in state_dict):
        return state_dict
    alphas = {k: v for k, v in model.state_dict().items() if k.endswith('.skip_weight.alpha')}
    if any(not alpha.is_meta and alpha != 1 for alpha in alphas.values()):
        raise ValueError('With the weights of a ResNet, skip weights start from 1: leave skip_init out.')
    return dict(state_dict, **{k: torch.ones_like(v) for k, v in alphas.items()})


def _create_adaresnet(variant: str, pretrained: bool = False, **kwargs) -> AdaResNet:
    return build_model_with_cfg(
        AdaResNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(len(kwargs['layers']) + 1))),
        **kwargs,
    )


_PAPERS = ('arXiv:2408.09958', 'arXiv:1512.03385')

default_cfgs = generate_default_cfgs({
    **grown_cfgs('adaresnet18', 'resnet18'),
    **grown_cfgs('adaresnet34', 'resnet34'),
    **grown_cfgs('adaresnet50', 'resnet50'),
    **grown_cfgs('adaresnet101', 'resnet101'),
    **grown_cfgs('adaresnet152', 'resnet152'),
    'adaresnet18_cifar': _cifar_cfg(pool_size=(4, 4), paper_ids=_PAPERS),
    'adaresnet20_cifar.c10': _c10_cfg('adaresnet20_cifar.c10', paper_ids=_PAPERS),
    'adaresnet56_cifar': _cifar_cfg(paper_ids=_PAPERS),
    'adaresnet110_cifar': _cifar_cfg(paper_ids=_PAPERS),
    'test_adaresnet.c10': _c10_cfg('test_adaresnet.c10', pool_size=(4, 4), paper_ids=_PAPERS),
})


@register_model
def adaresnet18(pretrained: bool = False, **kwargs) -> AdaResNet:
    """AdaResNet-18."""
    model_args = dict(block=AdaBasicBlock, layers=(2, 2, 2, 2))
    return _create_adaresnet('adaresnet18', pretrained, **dict(model_args, **kwargs))


@register_model
def adaresnet34(pretrained: bool = False, **kwargs) -> AdaResNet:
    """AdaResNet-34."""
    model_args = dict(block=AdaBasicBlock, layers=(3, 4, 6, 3))
    return _create_adaresnet('adaresnet34', pretrained, **dict(model_args, **kwargs))


@register_model
def adaresnet50(pretrained: bool = False, **kwargs) -> AdaResNet:
    """AdaResNet-50."""
    model_args = dict(block=AdaBottleneck, layers=(3, 4, 6, 3))
    return _create_adaresnet('adaresnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def adaresnet101(pretrained: bool = False, **kwargs) -> AdaResNet:
    """AdaResNet-101."""
    model_args = dict(block=AdaBottleneck, layers=(3, 4, 23, 3))
    return _create_adaresnet('adaresnet101', pretrained, **dict(model_args, **kwargs))


@register_model
def adaresnet152(pretrained: bool = False, **kwargs) -> AdaResNet:
    """AdaResNet-152."""
    model_args = dict(block=AdaBottleneck, layers=(3, 8, 36, 3))
    return _create_adaresnet('adaresnet152', pretrained, **dict(model_args, **kwargs))


@register_model
def adaresnet18_cifar(pretrained: bool = False, **kwargs) -> AdaResNet:
    """AdaResNet-18 with a stem for small images."""
    model_args = dict(block=AdaBasicBlock, layers=(2, 2, 2, 2), stem_type='cifar')
    return _create_adaresnet('adaresnet18_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def adaresnet20_cifar(pretrained: bool = False, **kwargs) -> AdaResNet:
    """AdaResNet-20 for CIFAR, three stages of 16, 32 and 64 channels."""
    model_args = dict(block=AdaBasicBlock, layers=(3, 3, 3), channels=(16, 32, 64), stem_type='cifar')
    return _create_adaresnet('adaresnet20_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def adaresnet56_cifar(pretrained: bool = False, **kwargs) -> AdaResNet:
    """AdaResNet-56 for CIFAR, three stages of 16, 32 and 64 channels."""
    model_args = dict(block=AdaBasicBlock, layers=(9, 9, 9), channels=(16, 32, 64), stem_type='cifar')
    return _create_adaresnet('adaresnet56_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def adaresnet110_cifar(pretrained: bool = False, **kwargs) -> AdaResNet:
    """AdaResNet-110 for CIFAR, three stages of 16, 32 and 64 channels."""
    model_args = dict(block=AdaBasicBlock, layers=(18, 18, 18), channels=(16, 32, 64), stem_type='cifar')
    return _create_adaresnet('adaresnet110_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def test_adaresnet(pretrained: bool = False, **kwargs) -> AdaResNet:
    """A tiny AdaResNet for tests."""
    model_args = dict(block=AdaBasicBlock, layers=(1, 2, 2, 1), channels=(16, 24, 32, 48), stem_type='cifar')
    return _create_adaresnet('test_adaresnet', pretrained, **dict(model_args, **kwargs))

"""DResNet: a ResNet in which every block may draw on all earlier ones, through gated connections that are learned.

Papers:
* `An improve on ResNet: Introduces dynamic connections` -
  https://github.com/Mao-chuan/An_improve_on_ResNet--Introduces_dynamic_connections
* `Deep Residual Learning for Image Recognition` - https://arxiv.org/abs/1512.03385
"""
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence, Set, Tuple, Type, Union

import torch
import torch.nn as nn
from timm.layers import GroupNorm1, LayerType, get_norm_layer
from timm.models import checkpoint, generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet
from timm.models._input import update_model_args
from timm.models.resnet import BasicBlock, Bottleneck
from timm.utils import reparameterize_model

from .connections import Connections, Flow
from .folding import fold_norms
from .pretrained import build_model_with_cfg, grown_cfgs, packaged_classes, packaged_file
from .resnet import ResNet, _c10_cfg, _cfg, _cifar_cfg, require_eval

__all__ = ['DResNet']  # the model registry adds each entry point to this


_WHOLE = (
    'The connections of a DResNet need all blocks before them: a stage cannot be run by itself, and no block can be '
    'taken out but the last stages, whole (model.layer4 = nn.Identity()). For features, use features_only=True, '
    'forward_features or forward_intermediates.')


def require_whole_number(name: str, value: Any, least: int) -> None:
    """Raise a ValueError if an argument is neither None nor a whole number, such as a number of channels."""
    if value is not None and (type(value) is not int or value < least):
        raise ValueError(f'{name} must be None or a whole number from {least} on, got {value!r}.')


class DResNetStage(nn.Sequential):
    """The blocks of one resolution, and the connections to its shape, which indexing and iteration pass over."""
    fused = False

    def __init__(self, blocks: nn.Sequential, first: int, connections: Optional[Connections]) -> None:
        super().__init__(*blocks)
        self.first, self.depth = first, len(blocks)
        self.register_module('connections', connections and connections.train(blocks.training))
        self.training = blocks.training

    def __iter__(self) -> Iterator[nn.Module]:
        return (module for name, module in self._modules.items() if name != 'connections')

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, idx: Any) -> Any:
        return nn.Sequential(*self)[idx]

    def __delitem__(self, idx: Any) -> None:
        raise RuntimeError(_WHOLE)

    def halves(self) -> bool:
        """Whether the first block halves the resolution, by the strides that its convolutions and pooling have now."""
        block = next(iter(self))
        return any(getattr(module, 'stride', 1) in (2, (2, 2)) for module in block.modules() if module is not block)

    def reparameterize(self) -> None:
        """Fold norms into convolutions, for inference."""
        self.fused = any([fold_norms(block) for block in self]) or self.fused

    def forward(self, x: torch.Tensor, flow: Optional[Flow] = None) -> torch.Tensor:
        """`[B, C, H, W]` to `[B, C', H', W']`, if the blocks before it and its own are those that it was made with."""
        require_eval(self)
        if flow is None or len(self) != self.depth or flow.block != self.first - 1:
            raise RuntimeError(_WHOLE)
        for j, block in enumerate(self):
            x = flow.receive(x)  # x_i = y_{i-1} + what connections bring
            x = checkpoint(block, x) if flow.grad_checkpointing else block(x)
            if j == 0:
                flow.enter()
            flow.send(flow.block, x)
        return x


class DResNet(ResNet):
    """DResNet.

    With the blocks numbered 1..n across stages, `x_i` the input of block i, `y_i` its output, F the gate function and
    `w_i` the weight array of block i,

        x_i = y_{i-1} + sum_{k=1}^{i-2} F(w_{i,k}) * C_{i,k}(y_k)        for i >= 3

    where `C_{i,k}` pools `y_k` to the resolution of `x_i`, and brings it to the channels of `x_i` by a 1x1
    convolution and a norm.
    """

    def __init__(
            self,
            block: Union[Type[nn.Module], Tuple[Type[nn.Module], ...]],
            layers: Tuple[int, ...],
            gate: str = 'sigmoid',
            gate_init: Optional[float] = None,
            connection_rank: Optional[int] = None,
            connected_stages: Optional[int] = None,
            pruned_connections: Sequence[Tuple[int, int]] = (),
            norm_layer: LayerType = nn.BatchNorm2d,
            inference_mode: bool = False,
            device=None,
            dtype=None,
            **kwargs,
    ) -> None:
        """
        Args:
            block, layers, norm_layer, **kwargs: As for `ResNet`.
            gate: Gate function F, 'sigmoid', 'gauss' or 'linear'.
            gate_init: Gate value F(w) to start from. None starts the n gates of a block at 0.5 / n, so that
                they add up to 0.5; n counts ``pruned_connections`` too.
            connection_rank: Number of channels in which the connections into a block are summed, before one 1x1
                convolution expands the sum to the block's input. None sums them at full width, and so does 0, for
                models whose default is a number: ``timm.create_model`` drops arguments that are None.
            connected_stages: Number of stages, counted from the last, whose output shape connections lead to: 1 is into
                the blocks of the last stage after its first (if it has only one, into that, at the shape of the stage
                before). None for all.
            pruned_connections: Connections that are left out, as (target, source) block numbers: the attribute of this
                name of a network that has been pruned.
            inference_mode: Build the network as `timm.utils.reparameterize_model` leaves it, for weights saved then.

        Raises:
            ValueError: If an argument is not one of the choices.
        """
        super().__init__(block, layers, norm_layer=norm_layer, device=device, dtype=dtype, **kwargs)
        self.add_connections(
            gate, gate_init, connection_rank, connected_stages, get_norm_layer(norm_layer), pruned_connections,
            inference_mode, device=device, dtype=dtype)

    def add_connections(
            self,
            gate: str,
            gate_init: Optional[float],
            connection_rank: Optional[int],
            connected_stages: Optional[int],
            norm_layer: Callable[..., nn.Module],
            pruned_connections: Sequence[Tuple[int, int]] = (),
            inference_mode: bool = False,
            **dd,
    ) -> None:
        """Add the connections to a ResNet whose class is DResNet already; see `__init__` for the arguments."""
        require_whole_number('connection_rank', connection_rank, 0)
        targets = self.connection_targets(connected_stages)
        if isinstance(self.bn1, nn.GroupNorm):
            norm_layer = GroupNorm1  # any number of channels
        feature_info: Any = self.feature_info[1:]
        source_chs: List[int] = []
        self.pruned_connections: List[Tuple[int, int]] = []
        for name, info in zip(self.stage_names, feature_info):
            stage, first = getattr(self, name), len(source_chs) + 1
            source_chs += len(stage) * [info['num_chs']]
            connections = Connections(
                source_chs,
                {i: range(1, i - 1) for i in targets[name]},
                info['num_chs'],
                gate=gate,
                gate_init=gate_init,
                rank=connection_rank,
                norm_layer=norm_layer,
                **dd,
            ) if name in targets else None
            setattr(self, name, DResNetStage(stage, first, connections))
            info['module'] = f'{name}.{len(stage) - 1}'  # to torch.fx, what runs last in a stage is a connection
        self.prune_connections(pruned_connections)
        if inference_mode:
            reparameterize_model(self, inplace=True)
            self.eval()

    def connection_targets(self, connected_stages: Optional[int]) -> Dict[str, range]:
        """By the name of its stage, the numbers of the blocks that connections to its shape lead to."""
        require_whole_number('connected_stages', connected_stages, 1)
        depths = {name: len(getattr(self, name)) for name in self.stage_names}
        targets, last = {}, 0
        for name, depth in depths.items():
            first, last = last + 1, last + depth
            # the first block of a stage takes the shape of the stage before
            targets[name] = range(max(first + 1, 3), min(last + 1, sum(depths.values())) + 1)
        connected = [name for name in targets if targets[name]][-(connected_stages or len(targets)):]
        return {name: targets[name] for name in connected}

    def stages(self) -> Dict[str, DResNetStage]:
        """The stages by name, without those that were replaced."""
        stages = {name: getattr(self, name) for name in self.stage_names}
        return {name: stage for name, stage in stages.items() if isinstance(stage, DResNetStage)}

    @property
    def connections(self) -> Dict[str, Connections]:
        """By the name of its stage, the connections to the shape of each."""
        return {name: stage.connections for name, stage in self.stages().items() if stage.connections is not None}

    def connection_pairs(self) -> List[Tuple[int, int]]:
        """Block numbers of all connections, (target, source)."""
        return [
            (i, k) for stage in self.connections.values() for i, numbers in stage.sources.items() for k in numbers]

    def prune_connections(self, pairs: Sequence[Tuple[int, int]]) -> None:
        """Remove connections, given as (target, source) block numbers, with their parameters.

        Raises:
            ValueError: If there is no such connection, or the network is fused.
        """
        pairs = [(i, k) for i, k in pairs]  # JSON has lists
        if not pairs:
            return
        missing = set(pairs) - set(self.connection_pairs())
        if missing:
            raise ValueError(f'there is no connection into block {min(missing)[0]} from block {min(missing)[1]}.')
        if self.fused:
            raise ValueError('connections cannot be removed from a fused network: prune it before it is fused.')
        self._remove_connections(pairs)
        self.pruned_connections = sorted({*self.pruned_connections, *pairs})
        update_model_args(self, pruned_connections=self.pruned_connections)

    def _remove_connections(self, pairs: Sequence[Tuple[int, int]]) -> None:
        for name, connections in self.connections.items():
            connections.remove(pairs)
            if not connections.sources:
                getattr(self, name).connections = None

    @torch.jit.ignore
    def no_weight_decay(self) -> Set[str]:
        """Parameters that weight decay would pull towards a gate value of its own."""
        return {name for name, _ in self.named_parameters() if '.gates.' in name}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> Dict[str, Any]:
        """Create regex patterns for parameter grouping: connections, which match none, learn as the classifier does."""
        return dict(stem=r'^conv1|bn1|maxpool', blocks=r'^layer(\d+)\.\d' if coarse else r'^layer(\d+)\.(\d+)')

    def prune_intermediate_layers(
            self,
            indices: Union[int, List[int]] = 1,
            prune_norm: bool = False,
            prune_head: bool = True,
    ) -> List[int]:
        """Prune layers not required for specified intermediates, and the connections that lead to them."""
        take_indices = super().prune_intermediate_layers(indices, prune_norm, prune_head)
        blocks = sum(len(stage) for stage in self.stages().values())
        self._remove_connections([(i, k) for i, k in self.connection_pairs() if i > blocks])
        return take_indices

    def __prepare_scriptable__(self):
        raise NotImplementedError(
            'A DResNet cannot be scripted: what flows between its blocks has no TorchScript type. torch.jit.trace, '
            'torch.export and torch.compile work.')

    def forward_context(self) -> Flow:
        stages = [(stage.connections, stage.halves()) for stage in self.stages().values()]
        return Flow(stages, self.grad_checkpointing)

    def forward_stage(self, stage: nn.Module, x: torch.Tensor, context: Flow) -> torch.Tensor:
        return stage(x, context) if isinstance(stage, DResNetStage) else stage(x)

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Forward pass through feature extraction layers."""
        x, _ = self.forward_intermediates(x, indices=1)
        return x


def start_from_resnet(state_dict: Dict[str, torch.Tensor]) -> None:
    """Let connections add nothing, and train from there: expansions, or else norm weights, are set to 0, in place.

    Where linear gates start at 0 they stay, since behind these nothing would ever train.
    """
    gates = [value for name, value in state_dict.items() if name.endswith('.linear_weight')]
    if gates and not any(gate.is_meta or gate.any() for gate in gates):
        return
    part = '.expansions.' if any('.connections.expansions.' in name for name in state_dict) else '.norm.'
    for name, value in state_dict.items():
        if '.connections.' in name and part in name and name.endswith('.weight'):
            nn.init.zeros_(value)


def checkpoint_filter_fn(state_dict: Dict[str, torch.Tensor], model: nn.Module) -> Dict[str, torch.Tensor]:
    """Let the weights of a ResNet grow connections."""
    if any('.connections.' in name for name in state_dict):
        return state_dict
    connections = {k: v.clone() for k, v in model.state_dict().items() if '.connections.' in k}
    start_from_resnet(connections)
    return dict(state_dict, **connections)


class Features(FeatureGetterNet):
    """timm's extractor of features by `forward_intermediates`, with gradient checkpointing."""

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)


def refuse_feature_cls(feature_cls: Any) -> None:
    """Raise a RuntimeError for features by timm's 'list' or 'dict', which run one stage after another."""
    if feature_cls in ('list', 'dict'):
        raise RuntimeError(_WHOLE)


def _create_dresnet(variant: str, pretrained: bool = False, **kwargs) -> DResNet:
    refuse_feature_cls(kwargs.get('feature_cls'))
    return build_model_with_cfg(
        DResNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=tuple(range(len(kwargs['layers']) + 1)), feature_cls=Features),
        **kwargs,
    )


_PROPOSAL = 'https://github.com/Mao-chuan/An_improve_on_ResNet--Introduces_dynamic_connections'

default_cfgs = generate_default_cfgs({
    'dresnet18.tiny_in': _cfg(
        file=packaged_file('dresnet18.tiny_in'), **packaged_classes('tiny_imagenet'), num_classes=200,
        input_size=(3, 64, 64), pool_size=(2, 2), crop_pct=1.0, interpolation='bicubic', origin_url=_PROPOSAL),
    **grown_cfgs('dresnet18', 'resnet18'),
    **grown_cfgs('dresnet18_gauss', 'resnet18'),
    **grown_cfgs('dresnet34', 'resnet34'),
    **grown_cfgs('dresnet34_gauss', 'resnet34'),
    **grown_cfgs('dresnet50', 'resnet50'),
    **grown_cfgs('dresnet50_gauss', 'resnet50'),
    **grown_cfgs('dresnet101', 'resnet101'),
    **grown_cfgs('dresnet101_gauss', 'resnet101'),
    'dresnet18_cifar': _cifar_cfg(pool_size=(4, 4), origin_url=_PROPOSAL),
    'dresnet20_cifar.c10': _c10_cfg('dresnet20_cifar.c10', origin_url=_PROPOSAL),
    'dresnet56_cifar': _cifar_cfg(origin_url=_PROPOSAL),
    'test_dresnet.c10': _c10_cfg('test_dresnet.c10', pool_size=(4, 4), origin_url=_PROPOSAL),
})


@register_model
def dresnet18(pretrained: bool = False, **kwargs) -> DResNet:
    """DResNet-18."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2))
    return _create_dresnet('dresnet18', pretrained, **dict(model_args, **kwargs))


@register_model
def dresnet18_gauss(pretrained: bool = False, **kwargs) -> DResNet:
    """DResNet-18 with Gauss gates."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2), gate='gauss')
    return _create_dresnet('dresnet18_gauss', pretrained, **dict(model_args, **kwargs))


@register_model
def dresnet34(pretrained: bool = False, **kwargs) -> DResNet:
    """DResNet-34, its connections low-rank."""
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3), connection_rank=64)
    return _create_dresnet('dresnet34', pretrained, **dict(model_args, **kwargs))


@register_model
def dresnet34_gauss(pretrained: bool = False, **kwargs) -> DResNet:
    """DResNet-34 with Gauss gates, its connections low-rank."""
    model_args = dict(block=BasicBlock, layers=(3, 4, 6, 3), connection_rank=64, gate='gauss')
    return _create_dresnet('dresnet34_gauss', pretrained, **dict(model_args, **kwargs))


@register_model
def dresnet50(pretrained: bool = False, **kwargs) -> DResNet:
    """DResNet-50, its connections low-rank."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), connection_rank=24)
    return _create_dresnet('dresnet50', pretrained, **dict(model_args, **kwargs))


@register_model
def dresnet50_gauss(pretrained: bool = False, **kwargs) -> DResNet:
    """DResNet-50 with Gauss gates, its connections low-rank."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 6, 3), connection_rank=24, gate='gauss')
    return _create_dresnet('dresnet50_gauss', pretrained, **dict(model_args, **kwargs))


@register_model
def dresnet101(pretrained: bool = False, **kwargs) -> DResNet:
    """DResNet-101, its connections low-rank."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3), connection_rank=8)
    return _create_dresnet('dresnet101', pretrained, **dict(model_args, **kwargs))


@register_model
def dresnet101_gauss(pretrained: bool = False, **kwargs) -> DResNet:
    """DResNet-101 with Gauss gates, its connections low-rank."""
    model_args = dict(block=Bottleneck, layers=(3, 4, 23, 3), connection_rank=8, gate='gauss')
    return _create_dresnet('dresnet101_gauss', pretrained, **dict(model_args, **kwargs))


@register_model
def dresnet18_cifar(pretrained: bool = False, **kwargs) -> DResNet:
    """DResNet-18 with a stem for small images."""
    model_args = dict(block=BasicBlock, layers=(2, 2, 2, 2), stem_type='cifar')
    return _create_dresnet('dresnet18_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def dresnet20_cifar(pretrained: bool = False, **kwargs) -> DResNet:
    """DResNet-20 for CIFAR, three stages of 16, 32 and 64 channels."""
    model_args = dict(block=BasicBlock, layers=(3, 3, 3), channels=(16, 32, 64), stem_type='cifar')
    return _create_dresnet('dresnet20_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def dresnet56_cifar(pretrained: bool = False, **kwargs) -> DResNet:
    """DResNet-56 for CIFAR, three stages of 16, 32 and 64 channels, its connections low-rank."""
    model_args = dict(block=BasicBlock, layers=(9, 9, 9), channels=(16, 32, 64), stem_type='cifar', connection_rank=8)
    return _create_dresnet('dresnet56_cifar', pretrained, **dict(model_args, **kwargs))


@register_model
def test_dresnet(pretrained: bool = False, **kwargs) -> DResNet:
    """A tiny DResNet for tests."""
    model_args = dict(block=BasicBlock, layers=(1, 2, 2, 1), channels=(16, 24, 32, 48), stem_type='cifar')
    return _create_dresnet('test_dresnet', pretrained, **dict(model_args, **kwargs))

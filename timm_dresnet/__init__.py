"""Residual networks with learned skip connections, for timm.

Importing this package registers its models with ``timm.create_model``. Where the package is installed, importing
timm is enough: see ``timm_dresnet_autoload``.
"""
from .adaresnet import (
    AdaResNet, adaresnet18, adaresnet34, adaresnet50, adaresnet101, adaresnet152, adaresnet18_cifar, adaresnet20_cifar,
    adaresnet56_cifar, adaresnet110_cifar, test_adaresnet)
from .dresnet import (
    DResNet, dresnet18, dresnet18_gauss, dresnet34, dresnet34_gauss, dresnet50, dresnet50_gauss, dresnet101,
    dresnet101_gauss, dresnet18_cifar, dresnet20_cifar, dresnet56_cifar, test_dresnet)
from .gates import GATES
from .growing import grow
from .inspection import connections, signal_propagation
from .pictures import plot_arcs, plot_connections, plot_gates, plot_history, plot_signal_propagation
from .plainnet import PlainNet, plainnet18, plainnet34, plainnet18_cifar, plainnet20_cifar, plainnet56_cifar
from .pruning import prune_connections
from .resnet import ResNet, resnet18_cifar, resnet20_cifar, resnet56_cifar
from .version import __version__

__all__ = [
    'AdaResNet', 'adaresnet18', 'adaresnet34', 'adaresnet50', 'adaresnet101', 'adaresnet152', 'adaresnet18_cifar',
    'adaresnet20_cifar', 'adaresnet56_cifar', 'adaresnet110_cifar', 'test_adaresnet',
    'DResNet', 'dresnet18', 'dresnet18_gauss', 'dresnet34', 'dresnet34_gauss', 'dresnet50', 'dresnet50_gauss',
    'dresnet101', 'dresnet101_gauss', 'dresnet18_cifar', 'dresnet20_cifar', 'dresnet56_cifar', 'test_dresnet',
    'PlainNet', 'plainnet18', 'plainnet34', 'plainnet18_cifar', 'plainnet20_cifar', 'plainnet56_cifar',
    'ResNet', 'resnet18_cifar', 'resnet20_cifar', 'resnet56_cifar',
    'GATES',
    'connections', 'grow', 'signal_propagation',
    'plot_arcs', 'plot_connections', 'plot_gates', 'plot_history', 'plot_signal_propagation',
    'prune_connections',
    '__version__',
]

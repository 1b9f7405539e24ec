"""Residual networks with learned skip connections, for timm.

Importing this package registers its models with ``timm.create_model``. Where the package is installed, importing
timm is enough: see ``timm_dresnet_autoload``.
"""
from .adaresnet import *
from .dresnet import *
from .gates import GATES
from .inspection import connections, signal_propagation
from .pictures import plot_arcs, plot_connections, plot_gates, plot_history, plot_signal_propagation
from .plainnet import *
from .pruning import prune_connections
from .resnet import *
from .version import __version__

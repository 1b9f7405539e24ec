"""Residual networks with learned skip connections, for timm.

Importing this package registers its models with ``timm.create_model``. Where the package is installed, importing
timm is enough: see ``timm_dresnet_autoload``.
"""
from .adaresnet import *
from .dresnet import *
from .gates import GATES
from .inspection import connections, plot_connections
from .plainnet import *
from .pruning import prune_connections
from .resnet import *
from .version import __version__

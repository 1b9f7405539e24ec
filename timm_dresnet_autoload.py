"""Registers timm_dresnet's models as soon as timm is imported, with no import by the user.

PyTorch calls `autoload` at the end of `import torch` (entry point group `torch.backends`), and timm imports torch
first. So this module must cost nothing and never fail: it imports only the standard library, and does nothing before
`timm.models` is imported. `TIMM_DRESNET_AUTOLOAD=0` switches it off.
"""
import os
import sys
import warnings
from typing import Any


def _register() -> None:
    try:
        import timm_dresnet  # noqa: F401
    except Exception as e:
        message = f'timm-dresnet could not register its models with timm: {type(e).__name__}: {e}'
        warnings.warn(message)  # whose line of code is printed too, and would say it twice


class _AfterTimmModels:
    """Import hook: finds `timm.models` as everyone does, and registers our models once it has been executed."""

    def find_spec(self, name, path=None, target=None):
        if name != 'timm.models':
            return None
        for finder in sys.meta_path:
            find_spec = getattr(finder, 'find_spec', None) if finder is not self else None  # old finders have none
            spec = find_spec and find_spec(name, path, target)
            if spec:
                break
        else:
            return None
        loader: Any = spec.loader
        exec_module = loader.exec_module

        def exec_and_register(module):
            del loader.exec_module  # the loader is as it was, whatever happens next
            exec_module(module)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            _register()

        loader.exec_module = exec_and_register
        return spec


def autoload() -> None:
    """Entry point of the group `torch.backends`."""
    if os.environ.get('TIMM_DRESNET_AUTOLOAD', '1') == '0':
        return
    if 'timm.models' in sys.modules:
        _register()
    elif not any(isinstance(finder, _AfterTimmModels) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterTimmModels())

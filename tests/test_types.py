"""Type annotations: a client of the package that mypy checks strictly, with `# type: ignore` where it must object."""
import os
import subprocess
import sys

import pytest

from conftest import ROOT

CLIENT = """
from pathlib import Path
from typing import Any, Dict, List, Tuple

import timm_dresnet
import torch
from typing_extensions import assert_type

images = torch.zeros(2, 3, 32, 32)
model: timm_dresnet.DResNet = timm_dresnet.test_dresnet(pretrained=True, gate='sigmoid')
assert_type(model.connection_pairs(), List[Tuple[int, int]])
assert_type(timm_dresnet.connections(model, images), List[Dict[str, Any]])
assert_type(timm_dresnet.prune_connections(model, keep=0.5, images=images), List[Dict[str, Any]])
assert_type(timm_dresnet.signal_propagation(model, images), Dict[str, List[Dict[str, Any]]])
timm_dresnet.plot_connections(model, Path('map.png'), images)
model.prune_connections([(5, 1)])

timm_dresnet.prune_connections(model, keep='half')  # type: ignore[arg-type]
timm_dresnet.connections('test_dresnet')  # type: ignore[arg-type]
timm_dresnet.no_such_function()  # type: ignore[attr-defined]
model.prune_connections([5, 1])  # type: ignore[list-item]
"""


def test_strict_client(tmp_path):
    pytest.importorskip('mypy')
    (tmp_path / 'client.py').write_text(CLIENT)
    done = subprocess.run(
        [sys.executable, '-m', 'mypy', '--strict', '--follow-imports=silent', '--config-file=', '--cache-dir',
         ROOT / '.mypy_cache/client', 'client.py'],
        cwd=tmp_path, env=os.environ | {'MYPYPATH': str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

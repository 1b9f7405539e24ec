"""README.md's snippets run as they stand, and its table of models is true."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

import timm_dresnet

README = (Path(__file__).parents[1] / 'README.md').read_text()
SNIPPETS = re.findall(r'```python\n(.*?)```', README, flags=re.DOTALL)
TABLE = re.findall(r'^\| .*\|$', README.split('\n## Models\n')[1].split('\n\n')[1], flags=re.MULTILINE)


@pytest.mark.parametrize('snippet', SNIPPETS, ids=range(1, len(SNIPPETS) + 1))
def test_snippet(snippet, digits_folder, tmp_path):
    (tmp_path / 'output').symlink_to(digits_folder.parent)
    done = subprocess.run([sys.executable, '-c', snippet], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_table_of_models():
    """Parameters and multiply-adds, in millions, by depth and family."""
    families, *rows = ([cell.strip(' `*') for cell in row.split('|')[1:-1]] for row in TABLE if '---' not in row)
    costs = {family + depth: cell for depth, *cells in rows for family, cell in zip(families[1:], cells) if '(' in cell}
    names = {name for name in timm.list_models() if callable(getattr(timm_dresnet, name, None))}
    assert set(costs) == {name for name in names if not re.search('_gauss$|^test_', name)}
    for name, cost in costs.items():
        size, num_classes = (32, 10) if name.endswith('_cifar') else (224, 1000)
        model = timm.create_model(name, num_classes=num_classes, device='meta').eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, size, size, device='meta'))
        parameters = sum(p.numel() for p in model.parameters()) / 1e6
        assert cost == f'{parameters:.2f} ({counter.get_total_flops() / 2e6:,.0f})', name

"""README.md's snippets run as they stand, and its table of models is true."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import timm_dresnet
import torch
from torch.utils.flop_counter import FlopCounterMode

README = (Path(__file__).parents[1] / 'README.md').read_text()
SNIPPETS = re.findall(r'```python\n(.*?)```', README, flags=re.DOTALL)
ROWS = re.findall(r'^\| `(\w+)` \| ([\d,]+) \| ([\d,]+) M \| (\d+) \|$', README, flags=re.MULTILINE)


@pytest.mark.parametrize('snippet', SNIPPETS, ids=range(1, len(SNIPPETS) + 1))
def test_snippet(snippet, digits_folder, tmp_path):
    (tmp_path / 'output').symlink_to(digits_folder.parent)
    done = subprocess.run([sys.executable, '-c', snippet], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_table_of_models():
    names = {name for name in timm.list_models() if hasattr(timm_dresnet, name)}
    assert {name for name, *_ in ROWS} == {name for name in names if not re.search('_gauss$|^test_', name)}
    for name, parameters, multiply_adds, size in ROWS:
        model = timm.create_model(name, num_classes=1000 if size == '224' else 10, device='meta').eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, int(size), int(size), device='meta'))
        measured = f'{sum(p.numel() for p in model.parameters()):,}', f'{counter.get_total_flops() / 2e6:,.0f}'
        assert measured == (parameters, multiply_adds), name

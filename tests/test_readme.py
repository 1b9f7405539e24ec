"""What README.md says is so: its snippets run as they stand, and its table of models is what the models are."""
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
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


def test_all_models_are_in_the_table():
    import timm_dresnet
    names = {name for name in timm.list_models() if hasattr(timm_dresnet, name)}
    assert {name for name, *_ in ROWS} == {name for name in names if not re.search('_gauss$|^test_', name)}


@pytest.mark.parametrize('name,parameters,multiply_adds,size', ROWS, ids=[row[0] for row in ROWS])
def test_row_of_the_table(name, parameters, multiply_adds, size):
    model = timm.create_model(name, num_classes=1000 if size == '224' else 10, device='meta').eval()
    with FlopCounterMode(display=False) as counter:
        model(torch.empty(1, 3, int(size), int(size), device='meta'))
    assert sum(p.numel() for p in model.parameters()) == int(parameters.replace(',', ''))
    assert round(counter.get_total_flops() / 2e6) == int(multiply_adds.replace(',', ''))

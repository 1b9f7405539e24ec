import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope='session')
def digits_folder(tmp_path_factory):
    """The folder that `python -m train --config train/recipes/digits.yaml` leaves."""
    output = tmp_path_factory.mktemp('output')
    done = subprocess.run(
        [sys.executable, '-m', 'train', '--config', 'train/recipes/digits.yaml', '--output', str(output)], cwd=ROOT,
        capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"local-dir:{output / 'digits'}" in done.stdout
    return output / 'digits'

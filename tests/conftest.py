import csv
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from hub_server import HubServer

ROOT = Path(__file__).parents[1]

if 'PYTEST_XDIST_WORKER' in os.environ:
    os.environ['OMP_NUM_THREADS'] = '1'  # workers share the cores, and threads that spin would slow all down

# tests talk to a Hub of their own: huggingface_hub reads where it is, and where its cache is, when it is imported
HUB = HubServer()
HOME = tempfile.TemporaryDirectory(prefix='hf-home-')
os.environ.update(HF_ENDPOINT=HUB.url, HF_HOME=HOME.name, HF_HUB_DISABLE_XET='1')
os.environ.pop('HF_TOKEN', None)


def rows(path):
    """The rows of a CSV file, as dictionaries."""
    with open(path, newline='') as f:
        return list(csv.DictReader(f))


def check_error(program, main, args, words, capsys):
    """That a program ends with one sentence that has these words."""
    with pytest.raises(SystemExit) as error:
        main(args)
    printed = capsys.readouterr().err.strip().splitlines()  # argparse has its own way
    message = printed[-1] if isinstance(error.value.code, int) else error.value.code
    assert message.startswith(f'{program}: error: ') and '\n' not in message
    assert all(word in message for word in words), message


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """An empty Hub, with an empty cache; nobody is logged in."""
    HUB.reset()
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_CACHE', str(tmp_path / 'cache'))
    yield HUB


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

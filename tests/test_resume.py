"""A run that was stopped resumes by the same command, to the very weights of one that was not."""
import os
import re
import signal
import subprocess
import sys
from unittest.mock import Mock

import pytest
from safetensors.torch import load_file

from conftest import ROOT, rows
from test_train import train
from train.engine import Stopped

# random numbers everywhere: in loading processes, in erasing, in the model; a moving average with warm-up; connections
# that are pruned before the second epoch
RECIPE = [
    '--config', 'train/recipes/digits.yaml', '--model', 'test_dresnet', '--epochs', '3', '--warmup-epochs', '1',
    '--opt', 'adamw', '--lr', '0.003', '--mixup', '0.2', '--cutmix', '1', '--reprob', '0.3', '--aa', 'rand-m5-n1',
    '--drop-path', '0.2', '--drop', '0.1', '--model-ema', '--model-ema-decay', '0.9', '--model-ema-warmup',
    '--grad-accum-steps', '2', '--recovery-interval', '2', '--deterministic',
    '--prune-connections', '0.5', '0.34',
]


def start(output, *args, recipe=RECIPE, launcher=(), **kwargs):
    command = [sys.executable, *launcher, '-m', 'train', *recipe, '--output', str(output), *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, **kwargs)


def finish(process):
    _, log = process.communicate()
    assert process.returncode == 0, log
    return log


def summary(folder):
    """What does not depend on the machine's speed."""
    return [{k: v for k, v in row.items() if k != 'train_images_per_second'} for row in rows(folder / 'summary.csv')]


def assert_same(folder, expected):
    weights, expected_weights = load_file(folder / 'model.safetensors'), load_file(expected / 'model.safetensors')
    assert weights.keys() == expected_weights.keys()
    assert all((weights[key] == expected_weights[key]).all() for key in weights)
    assert summary(folder) == summary(expected)
    assert (folder / 'connections.csv').read_text() == (expected / 'connections.csv').read_text()
    assert not [path for path in folder.iterdir() if path.name.startswith('.') or 'recovery' in path.name]


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    output = tmp_path_factory.mktemp('uninterrupted')
    finish(start(output))
    return output / 'digits'


def test_stopped_and_resumed(uninterrupted, tmp_path):
    """By a signal to all processes, as a terminal, a container or a cluster sends it."""
    first = start(tmp_path, '--workers', 2, start_new_session=True)
    log = ''
    while 'epoch   1/3' not in log:
        log += first.stderr.readline()
    os.killpg(first.pid, signal.SIGSTOP)  # so that the second finds it at work, however fast it is
    second = start(tmp_path)
    _, log = second.communicate()
    assert second.returncode == 1 and re.search(r'error: Another process trains into \S+digits', log), log
    os.killpg(first.pid, signal.SIGTERM)
    os.killpg(first.pid, signal.SIGCONT)
    _, log = first.communicate()
    assert first.returncode == 128 + signal.SIGTERM and 'Traceback' not in log, log
    assert re.search(r'Stopped.*same command.*recovery-\d+-\d+\.pth\.tar', log), log
    log = finish(start(tmp_path, '--workers', 0))  # nor does the number of worker processes matter
    assert re.search('Resuming from .*recovery', log)
    assert_same(tmp_path / 'digits', uninterrupted)
    assert [path.name for path in tmp_path.iterdir()] == ['digits']


def test_stopped_in_validation(tmp_path, monkeypatch):
    """After a last update of fewer batches, by which the learning rate follows."""
    args = ['--model', 'test_dresnet', '--grad-accum-steps', 3]
    expected = train(tmp_path / 'whole', *args)
    with monkeypatch.context() as patch:
        patch.setattr('train.run.validate', Mock(side_effect=Stopped(signal.SIGTERM)))
        with pytest.raises(SystemExit):
            train(tmp_path, *args)
    assert_same(train(tmp_path, *args), expected)

"""Whatever goes wrong in training: no finished epoch is lost, and the same command resumes the run.

faults.py makes the faults. Those of the fast suite are in tests/test_resume.py and tests/test_train.py.
"""
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT
from test_data import write_digits
from test_resume import assert_same, summary
from train.checkpoints import newest

CASES = {  # the batch of 3 epochs of 6; epoch and batch kept, of checkpoints 2 updates apart; exit status; message
    'sigkill': ('1,save', (1, 6), -signal.SIGKILL, ''),
    'full disk': ('1,save', (1, 6), 1, 'could not be written, there are '),
    'killed worker': ('1,3', (1, 0), 1, 'error: DataLoader worker '),
    'hanging worker': ('2,5', (2, 4), 1, 'timed out after 10 seconds. '),
    'vanished file': ('1,3', (1, 2), 1, '.png cannot be read '),
}


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    classes = dict(a=1, b=2, c=3)
    folder = write_digits(tmp_path_factory.mktemp('digits'), dict(train=classes, validation=classes))
    return [
        '--data-dir', str(folder), '--model', 'test_dresnet', '--input-size', '3', '16', '16', '--num-classes', '3',
        '--batch-size', '20', '--epochs', '3', '--warmup-epochs', '1', '--opt', 'adamw', '--lr', '0.003',
        '--reprob', '0.3', '--model-ema', '--recovery-interval', '2', '--deterministic', '--experiment', 'digits']


def run(program, recipe, output, workers):
    return subprocess.run(
        [sys.executable, *program, *recipe, '--output', str(output), '--workers', workers, '--worker-timeout', '10'],
        cwd=ROOT, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope='module')
def uninterrupted(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp('uninterrupted')
    done = run(['-m', 'train'], recipe, output, '0')
    assert done.returncode == 0, done.stderr
    return output / 'digits'


@pytest.mark.parametrize('fault', CASES)
@pytest.mark.slow
def test_no_finished_epoch_is_lost(fault, recipe, uninterrupted, tmp_path):
    folder = tmp_path / 'digits'
    moment, kept, status, message = CASES[fault]
    # worker processes would write to shared memory, which is no disk
    workers = '0' if fault == 'full disk' else '2'
    done = run(['tests/faults.py', fault, moment], recipe, tmp_path, workers)
    for path in Path(recipe[1]).rglob('*.gone'):
        path.rename(path.with_suffix(''))
    assert done.returncode == status, done.stderr
    assert message in done.stderr and 'train/__main__.py' not in done.stderr, done.stderr  # no traceback

    checkpoint = newest(folder)
    progress = torch.load(checkpoint, weights_only=False)['task_state']
    assert (progress['epoch'], progress['batch']) >= kept
    assert summary(folder)[:kept[0]] == summary(uninterrupted)[:kept[0]]

    done = run(['-m', 'train'], recipe, tmp_path, '2')
    assert done.returncode == 0, done.stderr
    assert f'Resuming from {checkpoint}' in done.stderr
    assert_same(folder, uninterrupted)
    assert not list(folder.glob('*tmp*'))

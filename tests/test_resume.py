"""A run that was stopped, or in which something went wrong, resumes by the same command, to the very weights of one
that was not. Several processes train as one, and go on when one of them dies.

faults.py makes the faults of the slow tests. Others are in tests/test_train.py.
"""
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from unittest.mock import Mock

import pytest
import torch
import yaml
from safetensors.torch import load_file

from conftest import ROOT, rows
from test_data import assert_equal, write_digits
from test_train import train
from train.checkpoints import newest, open_folder
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
PLAIN_RECIPE = [
    '--config', 'train/recipes/digits.yaml', '--device', 'cpu', '--model', 'test_dresnet', '--workers', '0',
    '--warmup-epochs', '0', '--deterministic']
CASES = {  # the batch of 3 epochs of 6; epoch and batch kept, of checkpoints 2 updates apart; exit status; message
    'sigkill': ('1,save', (1, 6), -signal.SIGKILL, ''),
    'full disk': ('1,save', (1, 6), 1, 'could not be written, there are '),
    'killed worker': ('1,3', (1, 0), 1, 'error: DataLoader worker '),
    'hanging worker': ('2,5', (2, 4), 1, 'timed out after 10 seconds. '),
    'vanished file': ('1,3', (1, 2), 1, '.png cannot be read '),
}


def start(output, *args, recipe=RECIPE, program=('-m', 'train'), **kwargs):
    command = [sys.executable, *program, *recipe, '--output', str(output), *map(str, args)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, **kwargs)


def start_together(output, processes, *args):
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}', '--max-restarts=3']
    return start(
        output, *args, recipe=PLAIN_RECIPE, program=[*(launcher if processes > 1 else []), '-m', 'train'],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'})


def wait_for(process, text):
    """Read what a process logs until it says this."""
    assert any(text in line for line in process.stderr), f'{text!r} was not logged'


def finish(process, status=0, timeout=None):
    _, log = process.communicate(timeout=timeout)
    assert process.returncode == status, log
    return log


def summary(folder):
    """What does not depend on the machine's speed."""
    return [{k: v for k, v in row.items() if k != 'train_images_per_second'} for row in rows(folder / 'summary.csv')]


def assert_same(folder, expected):
    assert_equal(*(load_file(path / 'model.safetensors') for path in (folder, expected)))
    assert summary(folder) == summary(expected)
    assert (folder / 'connections.csv').read_text() == (expected / 'connections.csv').read_text()
    assert not [path for path in folder.iterdir() if path.name.startswith('.') or 'recovery' in path.name]


def test_stopped_and_resumed(tmp_path):
    """By a signal to all processes, as a terminal, a container or a cluster sends it."""
    finish(start(tmp_path / 'uninterrupted'))
    output = tmp_path / 'stopped'
    first = start(output, '--workers', 2, start_new_session=True)
    wait_for(first, 'epoch   1/3')
    os.killpg(first.pid, signal.SIGSTOP)  # so that the second finds it at work, however fast it is
    second = start(output)
    _, log = second.communicate()
    assert second.returncode == 1 and re.search(r'error: Another process trains into \S+digits', log), log
    os.killpg(first.pid, signal.SIGTERM)
    os.killpg(first.pid, signal.SIGCONT)
    _, log = first.communicate()
    assert first.returncode == 128 + signal.SIGTERM and 'Traceback' not in log, log
    assert re.search(r'Stopped.*same command.*recovery-\d+-\d+\.pth\.tar', log), log
    log = finish(start(output, '--workers', 0))  # nor does the number of worker processes matter
    assert re.search('Resuming from .*recovery', log)
    assert_same(output / 'digits', tmp_path / 'uninterrupted/digits')
    assert [path.name for path in output.iterdir()] == ['digits']


@pytest.mark.parametrize('function,calls,args', [
    # after a last update of fewer batches, by which the learning rate follows
    ('run.validate', 0, ['--grad-accum-steps', 3]),
    ('run.choose_pruned', 0, ['--epochs', 3, '--mixup', 1, '--mixup-off-epoch', 1, '--prune-connections', 0.5, 0.7]),
    # in the fourth batch, where the schedule is a tenth of the learning rate from the first on
    ('engine.seed_everything', 3, ['--recovery-interval', 2, '--sched', 'multistep', '--decay-milestones', 1,
                                   '--no-sched-on-updates', '--warmup-epochs', 0]),
])
def test_stopped_between_batches(function, calls, args, tmp_path, monkeypatch):
    args = ['--model', 'test_dresnet', *args]
    expected = train(tmp_path / 'whole', *args)
    with monkeypatch.context() as patch:
        patch.setattr(f'train.{function}', Mock(side_effect=[*calls * [None], Stopped(signal.SIGTERM)]))
        with pytest.raises(SystemExit):
            train(tmp_path, *args)
    assert_same(train(tmp_path, *args), expected)


def test_two_processes_train_as_one(tmp_path):
    """On the same batches, half of each, by gradients that are averaged. Batch norms would see halves."""
    args = ['--epochs', 1, '--no-aug', '--grad-accum-steps', 2, '--model-kwargs', 'norm_layer=groupnorm1']
    for processes in (1, 2):
        finish(start_together(tmp_path / str(processes), processes, *args, '--batch-size', 64 // processes))
    alone, together = (load_file(tmp_path / name / 'digits/model.safetensors') for name in '12')
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-4)
    expected, found = (rows(tmp_path / name / 'digits/summary.csv')[0] for name in '12')
    for key in ('train_loss', 'eval_loss'):
        assert float(found[key]) == pytest.approx(float(expected[key]), rel=1e-3)


def test_runs_of_one_name_that_start_together(tmp_path):
    together = Barrier(8)

    def run(seed):
        together.wait()
        return open_folder(tmp_path, 'digits', dict(seed=seed))

    with ThreadPoolExecutor(8) as pool:
        folders = [*pool.map(run, range(8))]
    assert sorted(path.name for path in folders) == ['digits', *(f'digits-{i}' for i in range(1, 8))]
    assert [yaml.safe_load((path / 'args.yaml').read_text()) for path in folders] == [dict(seed=i) for i in range(8)]


@pytest.mark.slow
def test_a_killed_process_is_restarted(tmp_path):
    args = ['--batch-size', 32, '--epochs', 4, '--recovery-interval', 5, '--model-ema', '--model-ema-decay', 0.9]
    finish(start_together(tmp_path / 'whole', 2, *args))
    job = start_together(tmp_path / 'killed', 2, *args)
    wait_for(job, 'epoch   2/4')
    workers = subprocess.run(['pgrep', '-P', str(job.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(workers[-1]), signal.SIGKILL)
    assert 'Resuming from' in finish(job)
    assert_equal(*(load_file(tmp_path / name / 'digits/model.safetensors') for name in ('killed', 'whole')))
    assert [path.name for path in (tmp_path / 'killed').iterdir()] == ['digits']


@pytest.fixture(scope='module')
def recipe(tmp_path_factory):
    folder = write_digits(tmp_path_factory.mktemp('digits'), dict(a=1, b=2, c=3))
    return [
        '--data-dir', str(folder), '--model', 'test_dresnet', '--input-size', '3', '16', '16', '--num-classes', '3',
        '--batch-size', '20', '--epochs', '3', '--warmup-epochs', '1', '--opt', 'adamw', '--lr', '0.003',
        '--reprob', '0.3', '--model-ema', '--recovery-interval', '2', '--deterministic', '--experiment', 'digits',
        '--worker-timeout', '10']


@pytest.fixture(scope='module')
def without_faults(recipe, tmp_path_factory):
    output = tmp_path_factory.mktemp('without-faults')
    finish(start(output, '--workers', 0, recipe=recipe), timeout=300)
    return output / 'digits'


@pytest.mark.parametrize('fault', CASES)
@pytest.mark.slow
def test_no_finished_epoch_is_lost(fault, recipe, without_faults, tmp_path):
    folder = tmp_path / 'digits'
    moment, kept, status, message = CASES[fault]
    # worker processes would write to shared memory, which is no disk
    workers = 0 if fault == 'full disk' else 2
    process = start(tmp_path, '--workers', workers, recipe=recipe, program=['tests/faults.py', fault, moment])
    log = finish(process, status, timeout=300)
    for path in Path(recipe[1]).rglob('*.gone'):
        path.rename(path.with_suffix(''))
    assert message in log and 'train/__main__.py' not in log, log  # no traceback

    checkpoint = newest(folder)
    progress = torch.load(checkpoint, weights_only=False)['task_state']
    assert (progress['epoch'], progress['batch']) >= kept
    assert summary(folder)[:kept[0]] == summary(without_faults)[:kept[0]]
    assert f'Resuming from {checkpoint}' in finish(start(tmp_path, '--workers', 2, recipe=recipe), timeout=300)
    assert_same(folder, without_faults)
    assert not list(folder.glob('*tmp*'))

"""Several processes train as one, and go on when one of them dies."""
import os
import signal
import subprocess

import pytest
import torch
from safetensors.torch import load_file

import test_resume
from conftest import rows
from test_resume import finish

RECIPE = ['--config', 'train/recipes/digits.yaml', '--device', 'cpu', '--model', 'test_dresnet', '--workers', '0',
          '--warmup-epochs', '0', '--deterministic']


def start(output, processes, *args):
    launcher = ['-m', 'torch.distributed.run', '--standalone', f'--nproc-per-node={processes}', '--max-restarts=3']
    return test_resume.start(
        output, *args, recipe=RECIPE, launcher=launcher if processes > 1 else [],
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'})


def weights(output):
    return load_file(output / 'digits' / 'model.safetensors')


def test_two_processes_train_as_one(tmp_path):
    """On the same batches, half of each, by gradients that are averaged. Batch norms would see halves."""
    args = ['--epochs', 1, '--no-aug', '--grad-accum-steps', 2, '--model-kwargs', 'norm_layer=groupnorm1']
    for processes in (1, 2):
        finish(start(tmp_path / str(processes), processes, *args, '--batch-size', 64 // processes))
    alone, together = (weights(tmp_path / name) for name in '12')
    for key in alone:
        torch.testing.assert_close(together[key], alone[key], rtol=1e-3, atol=1e-4, msg=lambda m: f'{key}: {m}')
    expected, found = (rows(tmp_path / name / 'digits/summary.csv')[0] for name in '12')
    for key in ('train_loss', 'eval_loss'):
        assert float(found[key]) == pytest.approx(float(expected[key]), rel=1e-3)


@pytest.mark.slow
def test_a_killed_process_is_restarted(tmp_path):
    args = ['--batch-size', 32, '--epochs', 4, '--recovery-interval', 5, '--model-ema', '--model-ema-decay', 0.9]
    finish(start(tmp_path / 'whole', 2, *args))
    job = start(tmp_path / 'killed', 2, *args)
    log = ''
    killed = False
    for line in job.stderr:
        log += line
        if not killed and 'epoch   2/4' in line:
            workers = subprocess.run(['pgrep', '-P', str(job.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(workers[-1]), signal.SIGKILL)
            killed = True
    assert job.wait() == 0, log
    assert killed and 'Resuming from' in log, log
    found, expected = weights(tmp_path / 'killed'), weights(tmp_path / 'whole')
    assert all((found[key] == expected[key]).all() for key in expected)
    assert [path.name for path in (tmp_path / 'killed').iterdir()] == ['digits']

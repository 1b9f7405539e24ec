"""Several processes train as one, and go on when one of them dies."""
import copy
import os
import signal
import subprocess
import sys

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from safetensors.torch import load_file
from timm.scheduler import create_scheduler_v2
from timm.utils import distribute_bn

from conftest import ROOT
from train.__main__ import main
from train.arguments import parse_args
from train.build import Process, create_task
from train.engine import TrainState, train_one_epoch


class Batches(list):
    """A loader of given batches."""

    @property
    def loader(self):
        return self

    def set_epoch(self, epoch, start):
        pass


def train(model, batches, process):
    """One update over all batches, by the loop of `python -m train`. Returns its metrics."""
    args = parse_args(['--grad-accum-steps', str(len(batches))])
    task = create_task(args, model, process)
    if process.distributed:
        task.prepare_distributed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler, _ = create_scheduler_v2(optimizer, 'constant', num_epochs=1, warmup_epochs=0, updates_per_epoch=1)
    metrics = train_one_epoch(TrainState(args, process, task, Batches(batches), optimizer, scheduler))
    return {key: metrics[key] for key in ('loss', 'top1')}


def example(name, num_batches):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).double()
    images = torch.randn(num_batches, 8, 3, 32, 32, dtype=torch.float64)
    return model, list(zip(images, torch.randint(10, (num_batches, 8))))


def half(batches, rank):
    return [(images[rank::2], targets[rank::2]) for images, targets in batches]


def process(rank, file, name, num_batches):
    dist.init_process_group('gloo', f'file://{file}', rank=rank, world_size=2)
    model, batches = example(name, num_batches)
    metrics = train(model, half(batches, rank), Process(torch.device('cpu'), rank, 2))
    distribute_bn(model, 2, reduce=True)
    torch.save((model.state_dict(), metrics), f'{file}-{rank}')
    dist.destroy_process_group()


@pytest.mark.parametrize('name,num_batches', [('test_dresnet', 2), ('test_adaresnet', 1)])
def test_two_processes_with_reduced_batch_norm_average_their_halves(name, num_batches, tmp_path):
    mp.spawn(process, (tmp_path / 'store', name, num_batches), nprocs=2)
    model, batches = example(name, num_batches)
    halves = [copy.deepcopy(model) for _ in range(2)]
    losses = []
    for rank, copied in enumerate(halves):
        for images, targets in half(batches, rank):
            losses.append(F.cross_entropy(copied(images), targets, label_smoothing=0.1))
            (losses[-1] / num_batches).backward()
    with torch.no_grad():
        for parameter, *parts in zip(model.parameters(), *(copied.parameters() for copied in halves)):
            parameter -= 0.5 * (parts[0].grad + parts[1].grad) / 2
        for (key, buffer), *parts in zip(model.named_buffers(), *(copied.buffers() for copied in halves)):
            buffer.copy_(parts[0] if 'num_batches' in key else (parts[0] + parts[1]) / 2)
    for rank in range(2):
        state, metrics = torch.load(tmp_path / f'store-{rank}')
        assert state.keys() == model.state_dict().keys()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-9, msg=key)
        assert metrics['loss'] == pytest.approx(sum(loss.item() for loss in losses) / len(losses), rel=1e-6)


def test_synchronized_batch_norm_needs_cuda():
    with pytest.raises(SystemExit, match='--sync-bn needs CUDA'):
        main(['--config', 'train/recipes/digits.yaml', '--device', 'cpu', '--sync-bn'])


def torchrun(output):
    return subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '--max-restarts', '3',
         '-m', 'train', '--config', 'train/recipes/digits.yaml', '--device', 'cpu', '--model', 'test_dresnet',
         '--batch-size', '32', '--workers', '0', '--epochs', '4', '--warmup-epochs', '1', '--recovery-interval', '5',
         '--model-ema', '--model-ema-decay', '0.9', '--deterministic', '--output', str(output)],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'})


@pytest.mark.slow
def test_a_killed_process_is_restarted(tmp_path):
    expected = torchrun(tmp_path / 'whole')
    _, log = expected.communicate()
    assert expected.returncode == 0, log

    job = torchrun(tmp_path / 'killed')
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
    weights, others = (load_file(tmp_path / name / 'digits' / 'model.safetensors') for name in ('killed', 'whole'))
    assert all((weights[key] == others[key]).all() for key in others)
    assert [path.name for path in (tmp_path / 'killed').iterdir()] == ['digits']

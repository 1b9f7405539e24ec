"""Several processes train as one, and go on when one of them dies."""
import copy
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext

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
from train import sync_batch_norm
from train.arguments import parse_args
from train.engine import Stop, Task, train_one_epoch


class Batches:
    """A loader of given batches."""

    def __init__(self, *batches):
        self.batches = batches
        self.loader = self

    def set_epoch(self, epoch, start):
        pass

    def __len__(self):
        return len(self.batches)

    def __iter__(self):
        return iter(self.batches)


def train(model, batches, rank=0, world_size=1):
    """One update over all batches, by the loop of `python -m train`. Returns its metrics."""
    args = parse_args(['--grad-accum-steps', str(len(batches))])
    args.rank, args.world_size, args.distributed = rank, world_size, world_size > 1
    task = Task(model, criterion_kwargs=dict(smoothing=0.1), verbose=False)
    if args.distributed:
        task.prepare_distributed()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    scheduler, _ = create_scheduler_v2(optimizer, 'constant', num_epochs=1, warmup_epochs=0, updates_per_epoch=1)
    metrics = train_one_epoch(
        task, Batches(*batches), optimizer, scheduler, args, nullcontext, loss_scaler=None, stop=Stop(), save=None)
    return {key: metrics[key] for key in ('loss', 'top1')}


def example(name, num_batches):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).double()
    images = torch.randn(num_batches, 8, 3, 32, 32, dtype=torch.float64)
    return model, list(zip(images, torch.randint(10, (num_batches, 8))))


def half(batches, rank):
    return [(images[rank::2], targets[rank::2]) for images, targets in batches]


def process(rank, file, name, num_batches, sync_bn):
    dist.init_process_group('gloo', f'file://{file}', rank=rank, world_size=2)
    model, batches = example(name, num_batches)
    if sync_bn:
        sync_batch_norm.convert(model)
    metrics = train(model, half(batches, rank), rank, 2)
    if not sync_bn:
        distribute_bn(model, 2, reduce=True)
    torch.save((model.state_dict(), metrics), f'{file}-{rank}')
    dist.destroy_process_group()


def assert_close(states, expected):
    for state in states:
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(state[key], value, rtol=1e-9, atol=1e-9, msg=key)


@pytest.mark.parametrize('name,num_batches', [('test_dresnet', 1), ('test_adaresnet', 1), ('test_dresnet', 2)])
def test_two_processes_with_synchronized_batch_norm_are_one(name, num_batches, tmp_path):
    mp.spawn(process, (tmp_path / 'store', name, num_batches, True), nprocs=2)
    model, batches = example(name, num_batches)
    metrics = train(model, batches)
    states, found = zip(*(torch.load(tmp_path / f'store-{rank}') for rank in range(2)))
    assert_close(states, model.state_dict())
    assert all(both == pytest.approx(metrics, rel=1e-6) for both in found)  # sums of metrics are in float32


@pytest.mark.parametrize('name', ['test_dresnet', 'test_adaresnet'])
def test_two_processes_with_reduced_batch_norm_average_their_halves(name, tmp_path):
    mp.spawn(process, (tmp_path / 'store', name, 1, False), nprocs=2)
    model, batches = example(name, 1)
    halves = [copy.deepcopy(model) for _ in range(2)]
    for rank, copied in enumerate(halves):
        images, targets = half(batches, rank)[0]
        F.cross_entropy(copied(images), targets, label_smoothing=0.1).backward()
    with torch.no_grad():
        for parameter, *parts in zip(model.parameters(), *(copied.parameters() for copied in halves)):
            parameter -= 0.5 * (parts[0].grad + parts[1].grad) / 2
        for (key, buffer), *parts in zip(model.named_buffers(), *(copied.buffers() for copied in halves)):
            buffer.copy_(parts[0] if 'num_batches' in key else (parts[0] + parts[1]) / 2)
    assert_close([torch.load(tmp_path / f'store-{rank}')[0] for rank in range(2)], model.state_dict())


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_synchronized_batch_norm_of_one_process(dtype, tmp_path):
    dist.init_process_group('gloo', f'file://{tmp_path / "store"}', rank=0, world_size=1)
    try:
        norm = torch.nn.BatchNorm2d(4).double() if dtype == torch.float64 else torch.nn.BatchNorm2d(4)
        torch.nn.init.normal_(norm.weight)
        synchronized = sync_batch_norm.convert(torch.nn.Sequential(copy.deepcopy(norm)))
        for training in (True, False):
            x = torch.randn(3, 4, 5, 6, dtype=dtype)
            tolerance = 1e-9 if dtype == torch.float64 else 0.05
            result = synchronized.train(training)(x)
            assert result.dtype == dtype
            torch.testing.assert_close(result, norm.train(training)(x), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(synchronized[0].running_var, norm.running_var, rtol=1e-3, atol=1e-3)
    finally:
        dist.destroy_process_group()


def test_norms_that_cannot_be_synchronized():
    with pytest.raises(ValueError, match='--sync-bn.*0.*BatchNorm2d'):
        sync_batch_norm.convert(torch.nn.Sequential(torch.nn.BatchNorm2d(4, affine=False)))


def torchrun(output, *args):
    return subprocess.Popen(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2', '--max-restarts', '3',
         '-m', 'train', '--config', 'train/recipes/digits.yaml', '--device', 'cpu', '--model', 'test_dresnet',
         '--batch-size', '32', '--workers', '0', '--epochs', '4', '--warmup-epochs', '1', '--recovery-interval', '5',
         '--model-ema', '--model-ema-decay', '0.9', '--deterministic', '--output', str(output), *args],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env={**os.environ, 'OMP_NUM_THREADS': '1', 'TORCH_DISABLE_SHARE_RDZV_TCP_STORE': '1'})


@pytest.mark.slow
@pytest.mark.parametrize('sync_bn', [False, True], ids=['reduced', 'synchronized'])
def test_a_killed_worker_is_restarted(sync_bn, tmp_path):
    args = ['--sync-bn'] if sync_bn else []
    expected = torchrun(tmp_path / 'whole', *args)
    _, log = expected.communicate()
    assert expected.returncode == 0, log

    job = torchrun(tmp_path / 'killed', *args)
    log = ''
    killed = False
    for line in job.stderr:
        log += line
        if not killed and 'epoch   2/4' in line:
            workers = subprocess.run(['pgrep', '-P', str(job.pid)], capture_output=True, text=True).stdout.split()
            os.kill(int(workers[-1]), signal.SIGKILL)
            killed = True
    assert job.wait() == 0, log
    assert killed and re.search('Going on from', log), log
    weights, others = (load_file(tmp_path / name / 'digits' / 'model.safetensors') for name in ('killed', 'whole'))
    assert all((weights[key] == others[key]).all() for key in others)
    assert [path.name for path in (tmp_path / 'killed').iterdir()] == ['digits']

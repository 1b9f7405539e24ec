"""On a GPU: the models compute what they compute on a CPU, compiled and in CUDA graphs too, and training runs.

`pytest -m cuda -n 0 tests/test_cuda.py`; with TEST_DEVICE=cpu before it, what can be tried without a GPU is.
"""
import copy
import os
import warnings
from functools import partial
from unittest.mock import Mock

import pytest
import timm
import torch
import torch.distributed as dist
import torch.multiprocessing
from timm.layers import convert_sync_batchnorm
from timm.utils import reparameterize_model
from torch._dynamo.utils import counters
from torch.nn.parallel import DistributedDataParallel

from conftest import rows
from test_fuse import assert_same, create
from test_resume import assert_same as assert_same_run
from test_tools import called, check_compiled_under_autocast
from test_train import train
from train import engine, run
from train.benchmark import TrainingStep
from train.checkpoints import newest

DEVICE = os.environ.get('TEST_DEVICE', 'cuda')
cuda = pytest.mark.cuda
GRAPHS = 'reduce-overhead' if DEVICE == 'cuda' else None  # mode of torch.compile
only_cuda = pytest.mark.skipif(DEVICE != 'cuda', reason='no other device has this')

MODELS = dict(
    test_dresnet=dict(gate='gauss'), test_adaresnet=dict(skip_weight='shared'), dresnet18={},
    dresnet50=dict(gate='gauss'), plainnet18={}, dresnet=dict(grown_from='resnet18d'))
# relative errors of outputs and gradients; these are large where activations cross 0, most of all without shortcuts
LIMITS = dict(float32=(5e-4, 0.1), tf32=(2e-2, 0.4), float16=(2e-2, 0.4), bfloat16=(6e-2, 0.8))


@pytest.fixture(autouse=True)
def settings_of_torch(request):
    """What training sets for the process is as it was. Nothing has been compiled, or counted."""
    if request.node.get_closest_marker('cuda') and DEVICE == 'cuda' and not torch.cuda.is_available():
        pytest.skip('PyTorch finds no GPU')
    torch._dynamo.reset()
    counters.clear()
    tf32 = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(False)


def place(model, x, device, precision, **layout):
    """Model and images on a device, and the autocast, that make up a precision."""
    dtype = torch.float64 if precision == 'float64' else torch.float32
    half = dict(float16=torch.float16, bfloat16=torch.bfloat16).get(precision)
    model, x = (tensors.to(device, dtype).to(**layout) for tensors in (copy.deepcopy(model), x))
    return model, x, torch.autocast(device, half, enabled=half is not None)


def output_and_gradients(model, x, device, precision, **layout):
    model, x, autocast = place(model, x, device, precision, **layout)
    with autocast:
        output = model(x).double()
    scale = 1024 if precision == 'float16' else 1
    weights = torch.linspace(-scale, scale, output.numel(), dtype=torch.float64, device=device)
    (output.flatten() * weights).sum().backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()]).double() / scale
    return output.detach().cpu(), gradients.cpu()


@pytest.mark.parametrize('device,name,precision', [
    *(('cpu', name, precision) for name in list(MODELS)[:2] for precision in ('float16', 'bfloat16')),
    *(pytest.param(DEVICE, name, precision, marks=cuda) for name in MODELS for precision in LIMITS),
])
def test_values_and_gradients(device, name, precision):
    """Near to those of a CPU in float64, in training no further than with every module called; and fused."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision == 'tf32'
    model, x = create(name, (33, 49), **MODELS[name])
    x = torch.cat([x, x.flip(3)])

    def check(training, memory_format=torch.channels_last):
        model.train(training)
        networks = model, called(model)  # in the second no norm folds into a kernel
        expected = output_and_gradients(model, x, 'cpu', 'float64')
        for limit, *tensors in zip(LIMITS[precision], expected, *(
                output_and_gradients(m, x, device, precision, memory_format=memory_format) for m in networks)):
            error, called_error = (((t - tensors[0]).norm() / tensors[0].norm()).item() for t in tensors[1:])
            assert error < min(limit, 3 * called_error + 0.05 * limit)

    check(training=True)
    check(training=False)
    if device == 'cuda':
        check(training=True, memory_format=torch.contiguous_format)
    if name != 'plainnet18':  # which does not fuse
        fused, images, autocast = place(reparameterize_model(model), x, device, precision)
        with autocast:
            assert_same(lambda _: fused(images).double().cpu(), model, x, 2 * LIMITS[precision][0])


@cuda
def test_compiled_for_batches_of_any_size():
    """In training, without graph breaks: for the second size once more, and no more after that."""
    model, x = create('test_dresnet', (32, 32), torch.float32)
    model, x = model.train().to(DEVICE), torch.cat([x] * 6).to(DEVICE)
    compiled = torch.compile(model, fullgraph=True)
    for batch in (4, 6, 10, 8):
        reference = copy.deepcopy(model)
        model.zero_grad()
        output, expected = compiled(x[:batch]), reference(x[:batch])
        torch.testing.assert_close(output, expected, rtol=1e-3, atol=1e-3)
        output.square().mean().backward()
        expected.square().mean().backward()
        torch.testing.assert_close(model.conv1.weight.grad, reference.conv1.weight.grad, rtol=1e-2, atol=1e-3)
    assert counters['stats']['unique_graphs'] <= 2


@cuda
@pytest.mark.parametrize('name', ['test_dresnet', 'test_adaresnet'])
def test_compiled_training(name):
    """In bfloat16, as far from float32 as in eager mode, and whole in CUDA graphs."""
    check_compiled_under_autocast(name, DEVICE, GRAPHS)
    assert not counters['inductor']['cudagraph_skips']


@cuda
@pytest.mark.parametrize('fuse', [lambda model: model, reparameterize_model], ids=['whole', 'fused'])
def test_compiled_inference(fuse):
    model, x = create('test_dresnet', (32, 32), torch.float32)
    model, x = fuse(model).to(DEVICE), x.to(DEVICE)
    compiled = torch.compile(model, fullgraph=True, mode=GRAPHS)
    for _ in range(3):  # the second call records a graph, the third replays it
        x = x + 0.1
        assert_same(compiled, model, x, 1e-3)
    assert not counters['inductor']['cudagraph_skips']


@cuda
@pytest.mark.parametrize('name', ['dresnet18', 'dresnet50'])
def test_gradient_checkpointing_saves_memory(name):
    def peak(grad_checkpointing):
        model = timm.create_model(name).to(DEVICE, memory_format=torch.channels_last)
        model.set_grad_checkpointing(grad_checkpointing)
        x = torch.randn(64, 3, 128, 128, device=DEVICE).to(memory_format=torch.channels_last)
        return TrainingStep(model, x, partial(torch.autocast, DEVICE, torch.bfloat16)).peak_memory()

    assert peak(True) < 0.85 * peak(False)


@cuda
@pytest.mark.parametrize('accum_steps,args', [
    (2, ['--grad-checkpointing', '--model-ema']),
    pytest.param(1, ['--torchcompile', '--torchcompile-mode', 'reduce-overhead'], marks=only_cuda),
], ids=['eager', 'compiled'])
def test_training(accum_steps, args, tmp_path):
    """To nearly the losses that a CPU has in float32."""
    common = ['--model', 'test_dresnet', '--grad-accum-steps', accum_steps]
    expected = train(tmp_path / 'cpu', *common, '--device', 'cpu')
    found = train(
        tmp_path, *common, '--device', DEVICE, '--workers', 2, '--amp', '--amp-dtype', 'bfloat16', *args)
    for row, reference in zip(rows(found / 'summary.csv'), rows(expected / 'summary.csv')):
        assert float(row['train_loss']) == pytest.approx(float(reference['train_loss']), rel=0.05)


@cuda
def test_training_in_float16_resumes(tmp_path, monkeypatch):
    """To the very weights, and with the scale of the loss."""
    def stop_after_the_first(*args):
        monkeypatch.setattr(run, 'validate', Mock(side_effect=OSError('stopped')))
        return engine.validate(*args)

    args = ['--model', 'test_dresnet', '--device', DEVICE, '--amp', '--amp-dtype', 'float16', '--deterministic']
    expected = train(tmp_path / 'whole', *args)
    monkeypatch.setattr(run, 'validate', stop_after_the_first)
    with pytest.raises(SystemExit, match='stopped. The last good checkpoint is .*the same command resumes'):
        train(tmp_path, *args)
    monkeypatch.setattr(run, 'validate', engine.validate)
    folder = train(tmp_path, *args)
    assert_same_run(folder, expected)
    found, kept = (torch.load(newest(path), weights_only=False).get('amp_scaler') for path in (folder, expected))
    assert found == kept and (found or DEVICE != 'cuda')


@cuda
@only_cuda
def test_training_waits_for_the_gpu_only_to_show_progress(tmp_path, monkeypatch):
    reads, waits = Mock(side_effect=engine._read), []

    def train_one_epoch(state):
        torch.cuda.set_sync_debug_mode('warn')
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter('always')
                return engine.train_one_epoch(state)
        finally:
            torch.cuda.set_sync_debug_mode('default')
            waits.extend(str(warning.message) for warning in caught if 'synchronizing' in str(warning.message))

    monkeypatch.setattr(engine, '_read', reads)
    monkeypatch.setattr(run, 'train_one_epoch', train_one_epoch)
    train(tmp_path, '--model', 'test_dresnet', '--device', 'cuda', '--amp', '--amp-dtype', 'bfloat16', '--clip-grad', 1,
          '--model-ema', '--mixup', 0.2, '--reprob', 0.2, '--drop-path', 0.1)
    assert 0 < len(waits) <= reads.call_count < 22, waits  # of 44 updates


@cuda
def test_distributed_data_parallel():
    """In one process: nccl takes no second one on the same GPU."""
    model, x = create('test_dresnet', dtype=torch.float32)
    model, x = model.train().to(DEVICE), x.to(DEVICE)
    dist.init_process_group('nccl' if DEVICE == 'cuda' else 'gloo', rank=0, world_size=1, store=dist.HashStore())
    try:
        parallel = DistributedDataParallel(copy.deepcopy(model), device_ids=[0] if DEVICE == 'cuda' else None)
        for network in (model, parallel):
            network(x).square().mean().backward()
    finally:
        dist.destroy_process_group()
    torch.testing.assert_close(*([p.grad for p in m.parameters()] for m in (parallel, model)), rtol=1e-3, atol=1e-4)


def train_on_half_a_batch(rank, path, model, x):
    dist.init_process_group('gloo', init_method=f'file://{path}.store', rank=rank, world_size=2)
    model = convert_sync_batchnorm(model) if DEVICE == 'cuda' else model.eval()
    model = DistributedDataParallel(model.to(DEVICE))
    model(x[rank::2].to(DEVICE)).square().sum().backward()
    if rank == 0:
        torch.save([2 * p.grad.cpu() for p in model.parameters()], path)  # processes have taken the mean
    dist.destroy_process_group()


@cuda
def test_synchronized_batch_norm(tmp_path):
    """Two processes, with half of a batch each, have the gradients of one."""
    model, x = create('test_dresnet')
    x = torch.cat([x, x.flip(3)])
    model.train(DEVICE == 'cuda')  # a CPU has no such norm
    torch.multiprocessing.spawn(train_on_half_a_batch, (str(tmp_path / 'gradients'), model, x), nprocs=2)
    model(x).square().sum().backward()
    for p, found in zip(model.parameters(), torch.load(tmp_path / 'gradients')):
        torch.testing.assert_close(found, p.grad, rtol=1e-6, atol=1e-6 * p.grad.abs().max().item())

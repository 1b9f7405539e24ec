"""The models against their equations, written out naively in `naive.py`."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
from timm.utils import reparameterize_model

import naive

CONTIGUOUS, CHANNELS_LAST = torch.contiguous_format, torch.channels_last


def randomize(model):
    """Move every parameter and statistic away from its start, so that no term is 0 or equal to another."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in [*model.parameters(), *model.buffers()]:
            if p.is_floating_point() and p.ndim <= 1:
                noise = torch.rand(p.shape, generator=generator, dtype=p.dtype)
                p.mul_(0.8 + 0.4 * noise).add_(0.2 * noise)


def create(arch, dtype=torch.float64, num_classes=5, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=num_classes, dtype=dtype, **kwargs)
    randomize(model)
    return model


def assert_same_gradients(model, reference, output, expected, of_trunk=False):
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    grads, expected_grads = (
        dict(zip(dict(m.named_parameters()), torch.autograd.grad((y * target).sum(), list(m.parameters()))))
        for m, y in ((model, output), (reference, expected)))  # which raises an error where there is none
    for name in (name for name in grads if not of_trunk or '.connections.' not in name):
        scale = expected_grads[name].abs().max().clamp(min=1.)
        torch.testing.assert_close(
            grads[name] / scale, expected_grads[name] / scale, rtol=1e-9, atol=1e-9, msg=lambda m: f'{name}: {m}')


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('arch,gate,size,layout,kwargs', [
    ('dresnet18', 'sigmoid', (65, 97), CONTIGUOUS, {}), ('dresnet18', 'linear', (64, 96), CHANNELS_LAST, {}),
    ('dresnet50', 'gauss', (65, 97), CHANNELS_LAST, {}), ('dresnet50', 'linear', (64, 96), CONTIGUOUS, {}),
    ('dresnet18', 'gauss', (65, 97), CONTIGUOUS, dict(connection_rank=5)),
    ('dresnet20_cifar', 'sigmoid', (64, 96), CHANNELS_LAST, {}),
    ('dresnet20_cifar', 'linear', (65, 97), CONTIGUOUS, {}),
    ('dresnet18', 'sigmoid', (65, 97), CHANNELS_LAST, dict(output_stride=8)),
    ('dresnet50', 'sigmoid', (65, 97), CONTIGUOUS, dict(output_stride=16)),
    ('dresnet34', 'gauss', (65, 97), CHANNELS_LAST, dict(drop_path_rate=0.3)),
    ('dresnet50', 'sigmoid', (65, 97), CONTIGUOUS, dict(avg_down=True, act_layer='silu')),
    ('test_dresnet', 'gauss', (17, 23), CONTIGUOUS, {}), ('dresnet18_cifar', 'gauss', (17, 23), CONTIGUOUS, {}),
    ('adaresnet50', None, (33, 47), CONTIGUOUS, {}),
    *(('adaresnet18', None, (33, 47), CONTIGUOUS, dict(skip_weight=kind)) for kind in ('per_kind', 'shared')),
    pytest.param('dresnet18', 'sigmoid', (224, 224), CHANNELS_LAST, {}, marks=pytest.mark.slow),
], ids=str)
def test_outputs_gradients_and_statistics(arch, gate, size, layout, kwargs, training):
    model = create(arch, gate=gate, **kwargs).train(training)
    reference = copy.deepcopy(model)
    batch = 4 if size < (64, 64) else 2
    x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.manual_seed(3)  # for stochastic depth
    output = model.to(memory_format=layout)(x.to(memory_format=layout))
    torch.manual_seed(3)
    expected, stats = naive.dresnet(reference, gate, x) if gate else (naive.adaresnet(reference, x), [])
    assert_same_gradients(model, reference, output, expected)
    assert bool(stats) == (training and gate is not None)
    norms = dict(zip(reference.modules(), model.modules()))
    for norm, channels, mean, var in stats:
        torch.testing.assert_close(norms[norm].running_mean[channels], mean)
        torch.testing.assert_close(norms[norm].running_var[channels], var)
        assert norms[norm].num_batches_tracked == 1


@pytest.mark.parametrize('arch,kwargs', [
    ('dresnet20_cifar', dict(gate_init=0.5)), ('dresnet20_cifar', dict(gate_init=0.5, connection_rank=5)),
    ('adaresnet20_cifar', dict(skip_init=0.5)), ('adaresnet20_cifar', dict(skip_init=0.5, skip_weight='shared')),
], ids=str)
def test_gradients_of_gradients(arch, kwargs):
    """Those of a gradient penalty, and of optimizers of second order."""
    model = create(arch, **kwargs).train()
    reference = copy.deepcopy(model)
    x = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    output = model(x)
    expected = naive.adaresnet(reference, x) if arch.startswith('ada') else naive.dresnet(reference, 'sigmoid', x)[0]
    penalties = []
    for m, y in ((model, output), (reference, expected)):
        gradients = torch.autograd.grad(y.square().sum(), [x, *m.parameters()], create_graph=True)
        penalties.append(sum(gradient.square().sum() for gradient in gradients))
    torch.testing.assert_close(*penalties)
    gradients, expected_gradients = (
        torch.autograd.grad(penalty, list(m.parameters())) for penalty, m in zip(penalties, (model, reference)))
    for gradient, expected in zip(gradients, expected_gradients):
        torch.testing.assert_close(gradient, expected, rtol=1e-6, atol=1e-9 * expected.abs().max().item() + 1e-9)


def test_batch_norms_put_into_eval_mode():
    """As is done in fine-tuning: statistics stay, and those that were learned count."""
    model = create('test_dresnet').train()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    output = model(x)
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())
    torch.testing.assert_close(output, model.eval()(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('arch', ['dresnet20_cifar', 'adaresnet18'])
def test_batch_norms_without_bias(arch):
    """As of one whose bias is 0."""
    model = create(arch)
    without = copy.deepcopy(model)
    for zero, none in zip(model.modules(), without.modules()):
        if isinstance(zero, nn.BatchNorm2d):
            nn.init.zeros_(zero.bias)
            none.bias = None
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    torch.testing.assert_close(without(x), model(x), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(reparameterize_model(without.eval())(x), model.eval()(x), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('amp', [False, True], ids=['float32', 'amp'])
@pytest.mark.parametrize('arch,base,limit', [
    ('dresnet18', 'resnet18', 1.3), ('dresnet56_cifar', 'resnet56_cifar', 1.5), ('adaresnet50', 'resnet50', 1.1),
])
def test_memory_kept_for_the_backward_pass(arch, base, limit, amp):
    """For each image little more than for the blocks, although there are 325 pairs of them in 56 layers."""
    def kept(name, batch):
        model = timm.create_model(name).to(memory_format=torch.channels_last)
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        tensors = []

        def note(tensor):
            tensors.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast('cpu', torch.bfloat16, amp):
            model(torch.randn(batch, 3, 64, 64).to(memory_format=torch.channels_last))
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(size for pointer, size in storages.items() if pointer not in own)

    assert (kept(arch, 4) - kept(arch, 2)) / (kept(base, 4) - kept(base, 2)) < limit


@pytest.mark.parametrize('kind,count', [('per_block', 8), ('per_kind', 2), ('shared', 1)])
def test_number_of_skip_weights(kind, count):
    model = timm.create_model('adaresnet18', skip_weight=kind)
    assert sum(name.endswith('.alpha') for name, _ in model.named_parameters()) == count
    model.to_empty(device='cpu')  # makes new tensors: what is shared must stay shared
    assert sum(name.endswith('.alpha') for name, _ in model.named_parameters()) == count

"""The models against their equations, written out naively in `naive.py`."""
import copy

import pytest
import timm
import torch
import torch.nn as nn

import naive

GATES = ['sigmoid', 'gauss', 'linear']


def randomize(model):
    """Move every parameter and statistic away from its start, so that no term is 0 or equal to another."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if p.is_floating_point() and p.ndim <= 1:
                noise = torch.rand(p.shape, generator=generator, dtype=p.dtype)
                p.mul_(0.8 + 0.4 * noise).add_(0.2 * noise)


def create(arch, **kwargs):
    torch.manual_seed(0)
    model = timm.create_model(arch, num_classes=5, dtype=torch.float64, **kwargs)
    randomize(model)
    return model


def assert_same_gradients(model, reference, output, expected):
    torch.testing.assert_close(output, expected, rtol=1e-9, atol=1e-9)
    target = torch.randn(output.shape, generator=torch.Generator().manual_seed(1), dtype=output.dtype)
    grads = torch.autograd.grad((output * target).sum(), list(model.parameters()))
    expected_grads = torch.autograd.grad((expected * target).sum(), list(reference.parameters()))
    for (name, _), grad, expected_grad in zip(model.named_parameters(), grads, expected_grads):
        scale = expected_grad.abs().max().clamp(min=1.)
        torch.testing.assert_close(
            grad / scale, expected_grad / scale, rtol=1e-9, atol=1e-9, msg=lambda m: f'{name}: {m}')


def check_dresnet(arch, gate, size, training, batch=2, **kwargs):
    model = create(arch, gate=gate, **kwargs).train(training)
    reference = copy.deepcopy(model)
    x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.manual_seed(3)  # for stochastic depth
    output = model(x)
    torch.manual_seed(3)
    expected, stats = naive.dresnet(reference, gate, x)
    assert_same_gradients(model, reference, output, expected)
    assert bool(stats) == training
    norms = dict(zip(reference.modules(), model.modules()))
    for norm, channels, mean, var in stats:
        torch.testing.assert_close(norms[norm].running_mean[channels], mean)
        torch.testing.assert_close(norms[norm].running_var[channels], var)
        assert norms[norm].num_batches_tracked == 1


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('size', [(32, 32), (65, 97), pytest.param((224, 224), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize('gate', GATES)
@pytest.mark.parametrize('arch', ['dresnet18', 'dresnet50'])
def test_dresnet(arch, gate, size, training):
    check_dresnet(arch, gate, size, training, batch=4 if size == (32, 32) else 2)


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('kwargs', [
    dict(output_stride=16), dict(output_stride=8), dict(drop_path_rate=0.3), dict(connection_rank=5),
    dict(avg_down=True), dict(act_layer='silu'),
], ids=str)
@pytest.mark.parametrize('arch', ['dresnet18', 'dresnet50'])
def test_dresnet_with_arguments(arch, kwargs, training):
    check_dresnet(arch, 'sigmoid', (65, 97), training, **kwargs)


@pytest.mark.parametrize('arch', ['dresnet20_cifar', 'dresnet18_cifar', 'test_dresnet'])
def test_dresnet_for_small_images(arch):
    check_dresnet(arch, 'gauss', (17, 23), training=True, batch=4)


@pytest.mark.parametrize('norm_layer', ['groupnorm1', 'batchnorm2d'])
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
def test_norm_layers_see_one_connection_at_a_time(norm_layer, training):
    """The connections of one source share a module, and must not share statistics."""
    model = create('test_dresnet', norm_layer=norm_layer).train(training)
    stage = model.connections['layer2']
    projection = stage.projections['1']
    y = torch.randn(3, projection.conv.in_channels, 7, 7, dtype=torch.float64)
    gate = torch.tensor([0.3, 0.7], dtype=torch.float64)
    x = projection.conv(y)
    halves = []
    for half, g in zip(x.chunk(2, dim=1), gate):
        if norm_layer == 'groupnorm1':
            norm = projection.norm[len(halves)]
            half = (half - half.mean((1, 2, 3), keepdim=True)) / torch.sqrt(
                half.var((1, 2, 3), unbiased=False, keepdim=True) + norm.eps)
            half = half * norm.weight[:, None, None] + norm.bias[:, None, None]
        else:
            c = half.shape[1]
            half = naive.batch_norm(
                half, projection.norm, slice(len(halves) * c, (len(halves) + 1) * c), training, [])
        halves.append(g * half)
    torch.testing.assert_close(projection(y, gate), torch.cat(halves, dim=1), rtol=1e-9, atol=1e-9)


def test_frozen_batch_norm_keeps_the_gate():
    model = create('test_dresnet').eval()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(x)
    timm.utils.freeze(model)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    torch.testing.assert_close(model.train()(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('kwargs', [{}, dict(skip_weight='per_kind'), dict(skip_weight='shared')], ids=str)
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('arch', ['adaresnet18', 'adaresnet50', 'adaresnet20_cifar'])
def test_adaresnet(arch, kwargs, training):
    model = create(arch, **kwargs).train(training)
    reference = copy.deepcopy(model)
    x = torch.randn(4, 3, 33, 47, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    assert_same_gradients(model, reference, model(x), naive.adaresnet(reference, x))


@pytest.mark.parametrize('kind,count', [('per_block', 8), ('per_kind', 2), ('shared', 1)])
def test_number_of_skip_weights(kind, count):
    model = timm.create_model('adaresnet18', skip_weight=kind)
    assert sum(name.endswith('.alpha') for name, _ in model.named_parameters()) == count
    model.to_empty(device='cpu')  # makes new tensors: what is shared must stay shared
    assert sum(name.endswith('.alpha') for name, _ in model.named_parameters()) == count


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('gate', GATES)
@pytest.mark.parametrize('arch', ['test_dresnet', 'dresnet18', 'dresnet50'])
def test_gate_of_zero_cuts_its_connection(arch, gate, training):
    """In train mode too: a norm behind the gate would divide it away."""
    model = create(arch, gate=gate).train(training)
    stage = next(reversed(model.connections.values()))
    target = max(stage.sources)
    with torch.no_grad():
        stage.gates[str(target)].weight[0] = {'sigmoid': -1e4, 'gauss': 1e4, 'linear': 0.}[gate]
    x = torch.randn(4, 3, 64, 64, dtype=torch.float64)
    changed = copy.deepcopy(model)
    projection = changed.connections[list(model.connections)[-1]].projections['1']
    with torch.no_grad():  # the last target's channels come last
        projection.conv.weight[-projection.out_chs:].normal_(std=10.)
        projection.norm.bias[-projection.out_chs:].fill_(3.)
    torch.testing.assert_close(model(x), changed(x), rtol=1e-9, atol=1e-9)
    with torch.no_grad():
        for m in (model, changed):
            next(reversed(m.connections.values())).gates[str(target)].weight[0] = 0.3
    assert (model(x) - changed(x)).abs().max() > 1e-3


@pytest.mark.parametrize('gate,formula', [
    ('sigmoid', lambda w, k: 1 / (1 + torch.exp(-w))),
    ('gauss', lambda w, k: torch.exp(-k * w ** 2)),
    ('linear', lambda w, k: w),
])
def test_gates(gate, formula):
    from timm_dresnet.gates import create_gate
    module = create_gate(gate, 4, 0.3)
    torch.testing.assert_close(module(), torch.full((4,), 0.3))
    assert (module.weight != 0).all()
    with torch.no_grad():
        module.weight.copy_(torch.tensor([-1.5, -0.1, 0.2, 2.]))
    torch.testing.assert_close(module(), formula(module.weight, 10.))


@pytest.mark.parametrize('arch,count', [
    ('dresnet18', 12_475_837),
    ('dresnet18_gauss', 12_475_843),
    ('adaresnet18', 11_689_512 + 8),
    ('adaresnet50', 25_557_032 + 16),
    ('plainnet18', 11_689_512 - 64 * 128 - 128 * 256 - 256 * 512 - 2 * (128 + 256 + 512)),
])
def test_parameter_count(arch, count):
    assert sum(p.numel() for p in timm.create_model(arch, device='meta').parameters()) == count


@pytest.mark.parametrize('arch,base', [('dresnet50', 'resnet50'), ('dresnet101', 'resnet101')])
def test_low_rank_connections_cost_at_most_15_percent(arch, base):
    from torch.utils.flop_counter import FlopCounterMode
    cost = {}
    for name in (arch, base):
        model = timm.create_model(name, device='meta').eval()
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, 3, 224, 224, device='meta'))
        cost[name] = sum(p.numel() for p in model.parameters()), counter.get_total_flops()
    assert all(1 < a / b <= 1.15 for a, b in zip(cost[arch], cost[base]))

"""Tools that work through the call of a module."""
import copy
from functools import partial
from unittest.mock import Mock

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.resnet import BasicBlock
from timm.utils import reparameterize_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.utils import parametrizations, prune

import test_maths
import timm_dresnet
from test_models import assert_close, images

create = partial(test_maths.create, dtype=torch.float32)
models = pytest.mark.parametrize('name', ['dresnet18', 'dresnet56_cifar', 'adaresnet18'])


@models
@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('replace', [False, True], ids=['hooks', 'forward'])
def test_every_leaf_is_called_once(name, replace, training):
    """As Captum, torchinfo, profilers and accelerate's offloading need it; and they change nothing."""
    model, x = create(name).double().train(training), images(batch=4, size=32).double()
    expected = copy.deepcopy(model)(x)
    empty = nn.ModuleDict, nn.Sequential
    leaves = [m for m in model.modules() if not list(m.children()) and not isinstance(m, empty)]
    calls = [Mock(side_effect=m.forward) if replace else Mock(return_value=None) for m in leaves]
    for leaf, call in zip(leaves, calls):
        if replace:
            leaf.forward = call
        else:
            leaf.register_forward_hook(call)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)
    assert not [leaf for leaf, call in zip(leaves, calls) if call.call_count != 1]


@models
def test_a_hook_on_one_module_counts(name):
    """The network continues with what it returns."""
    model = create(name).eval()
    x = images(size=32)
    expected = model(x)
    for n, module in model.named_modules():
        if n.endswith(('.conv', '.norm', 'downsample.0', 'downsample.1', 'downsample', '.skip_weight')):
            handle = module.register_forward_hook(lambda module, args, output: output + 1)
            assert (model(x) - expected).abs().max() > 1e-6, n
            handle.remove()
    assert_close(model(x), expected)


class LoRA(nn.Module):
    """A frozen convolution with a trained low-rank addition, as peft has it."""

    def __init__(self, conv, rank=2):
        super().__init__()
        self.conv = conv.requires_grad_(False)
        self.down = nn.Conv2d(conv.in_channels, rank, conv.kernel_size, conv.stride, conv.padding, bias=False)
        self.up = nn.Conv2d(rank, conv.out_channels, 1, bias=False)

    def forward(self, x):
        return self.conv(x) + self.up(self.down(x))


@models
@pytest.mark.parametrize('change,new', [
    (lambda model, name, conv: model.set_submodule(name, LoRA(conv)), ('.down.weight', '.up.weight')),
    (lambda model, name, conv: prune.l1_unstructured(conv, 'weight', 0.5), ('.weight_orig',)),
    (lambda model, name, conv: parametrizations.weight_norm(conv), ('.original1',)),
    (lambda model, name, conv: nn.utils.spectral_norm(conv), ('.weight_orig',)),
], ids=['adapters', 'pruning', 'weight_norm', 'spectral_norm'])
def test_changed_convolutions_train(name, change, new):
    """Each new parameter gets a finite gradient that is not 0."""
    model = create(name).train()
    convolutions = [(n, module) for n, module in model.named_modules() if isinstance(module, nn.Conv2d)]
    for n, conv in convolutions:
        change(model, n, conv)
    model(images(batch=4, size=32)).square().mean().backward()
    parameters = {n: p for n, p in model.named_parameters() if n.endswith(new)}
    assert len(parameters) == len(convolutions) * len(new)
    assert not [n for n, p in parameters.items() if not p.grad.isfinite().all() or not p.grad.any()]


@models
def test_forward_mode_gradients(name):
    model = create(name, dtype=torch.float64).train()
    x, tangent = (torch.randn(4, 3, 32, 32, dtype=torch.float64) for _ in range(2))
    parameters = {n: p.detach() for n, p in model.named_parameters()}

    def forward(x):
        buffers = {n: buffer.clone() for n, buffer in model.named_buffers()}
        return torch.func.functional_call(model, {**parameters, **buffers}, x)

    output, found = torch.func.jvp(forward, (x,), (tangent,))
    weights = torch.randn_like(output)
    gradient, = torch.func.vjp(forward, x)[1](weights)
    torch.testing.assert_close((found * weights).sum(), (gradient * tangent).sum())


@models
def test_traced_by_fx_in_training(name):
    """The graph follows the mode of its modules, as that of a ResNet does."""
    model = create(name).train()
    traced = torch.fx.symbolic_trace(copy.deepcopy(model))
    x = images(batch=4, size=32)
    assert_close(traced(x), model(x))
    torch.testing.assert_close(*(dict(m.named_buffers()) for m in (traced, model)), rtol=1e-4, atol=1e-4)
    statistics = {n: buffer.clone() for n, buffer in traced.named_buffers()}
    assert_close(traced.eval()(x), model.eval()(x))
    assert all(torch.equal(buffer, statistics[n]) for n, buffer in traced.named_buffers())


@models
@pytest.mark.parametrize('convert', [
    nn.SyncBatchNorm.convert_sync_batchnorm, timm.layers.freeze_batch_norm_2d,
    lambda model: timm.layers.convert_splitbn_model(model, 2)], ids=['sync', 'frozen', 'split'])
def test_converted_batch_norms(name, convert):
    """Conversion reaches all, and what they have learned counts."""
    model = create(name)
    model(images(batch=8, size=32))
    x = images(size=32)
    expected = model.eval()(x)
    count = sum(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    converted = convert(copy.deepcopy(model)).eval()
    assert sum(type(m) is nn.BatchNorm2d for m in converted.modules()) in (0, count)  # split ones hold plain ones
    assert_close(converted(x), expected)
    assert_close(reparameterize_model(converted)(x), expected)
    if isinstance(model, timm_dresnet.DResNet):
        pairs = model.connection_pairs()[::2]
        for network in (model, converted):
            network.prune_connections(pairs)
        assert_close(converted(x), model(x))


def called(model):
    """A copy, in which hooks have every module called instead of folded into another."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.register_forward_hook(lambda module, args, output: None)
    return model


@models
def test_statistics_taken_again(name):
    """As after stochastic weight averaging."""
    model = create(name, dtype=torch.float64).train()
    reference = called(model)
    for m in (model, reference):
        torch.optim.swa_utils.update_bn(images(batch=8, size=32).double().split(4), m)
    torch.testing.assert_close(*(dict(m.named_buffers()) for m in (model, reference)))


@pytest.fixture(scope='module')
def one_process():
    torch.distributed.init_process_group('gloo', rank=0, world_size=1, store=torch.distributed.HashStore())
    yield
    torch.distributed.destroy_process_group()


@models
@pytest.mark.parametrize('parts', ['leaves', 'stages'])
def test_sharding(name, parts, one_process):
    """Of every leaf, or of stages and of their connections."""
    kwargs = dict(gate='gauss') if name.startswith('dresnet') else {}
    model = create(name, **kwargs).train()
    assert all(p.ndim for p in model.parameters())  # the older FSDP takes no parameter without a dimension
    x = images(batch=4, size=32)
    expected = copy.deepcopy(model)(x)
    mesh = torch.distributed.init_device_mesh('cpu', (1,))
    stages = [*getattr(model, 'connections', {}).values(), *(getattr(model, stage) for stage in model.stage_names)]
    leaves = [module for module in model.modules() if list(module.parameters(recurse=False))]
    for module in stages if parts == 'stages' else leaves:
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)
    output = model(x)
    assert_close(output, expected)
    output.square().mean().backward()
    assert all(p.grad is not None for p in model.parameters())
    with torch.no_grad():
        for value in model.state_dict().values():
            if isinstance(value, DTensor):
                value.to_local().zero_()
    assert not any(p.full_tensor().any() for p in model.parameters())


@pytest.mark.parametrize('name', ['test_dresnet', 'test_adaresnet'])
def test_weights_of_wrapped_blocks(name):
    """Load into blocks that are wrapped, whose parameters have other names there."""
    model, weights = create(name), create(name, pretrained=True).state_dict()
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, BasicBlock))
    model.load_state_dict(weights)
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=0)
    of_resnet = {key: value for key, value in weights.items() if 'skip_weight' not in key and 'connections' not in key}
    with pytest.raises(RuntimeError, match='those of a ResNet'):
        model.load_state_dict(of_resnet)


def test_large_means():
    """Folding into kernels keeps precision where the mean of what comes in is a thousand times its deviation."""
    model = create('test_dresnet').train()
    model.layer1[0].bn2.bias.data.fill_(1000.)
    x = images(batch=16, size=32)
    expected = copy.deepcopy(model).double()(x.double())
    errors = [(m(x).double() - expected).abs().max() / expected.abs().max() for m in (called(model), model)]
    assert errors[1] < 2 * errors[0] < 0.02


@pytest.mark.parametrize('name', ['dresnet20_cifar', *(
    pytest.param(name, marks=pytest.mark.slow)
    for name in ('resnet18', 'dresnet18', 'dresnet50', 'dresnet56_cifar', 'adaresnet18'))])
def test_compiled_under_autocast(name):
    """Three steps of training in bfloat16 are as far from those in float32 as eager ones are."""
    check_compiled_under_autocast(name)


def check_compiled_under_autocast(name, device='cpu', mode=None):
    torch.manual_seed(0)
    start = timm.create_model(name, num_classes=5).to(device, memory_format=torch.channels_last)
    x, target = images(batch=16).to(device, memory_format=torch.channels_last), torch.arange(16, device=device) % 5

    def train(amp, compiled):
        model = copy.deepcopy(start)
        forward = torch.compile(model, fullgraph=True, mode=mode) if compiled else model
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
        gradients, losses = [], []
        for _ in range(3):
            with torch.autocast(device, dtype=torch.bfloat16, enabled=amp):
                loss = F.cross_entropy(forward(x).float(), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        return gradients[0], torch.tensor(losses)

    torch._dynamo.reset()
    expected, eager, compiled = train(False, False), train(True, False), train(True, True)
    for exact, reference, found in zip(expected, eager, compiled):
        assert found.isfinite().all()
        assert (found - exact).norm() < 2 * (reference - exact).norm() + 0.01 * exact.norm()


@pytest.mark.parametrize('name,fused', [('test_dresnet', False), ('test_dresnet', True), ('test_adaresnet', False)])
def test_static_quantization_by_fx(name, fused):
    from torch.ao.quantization import get_default_qconfig_mapping
    from torch.ao.quantization.quantize_fx import convert_fx, prepare_fx
    torch.manual_seed(0)
    model, x = timm.create_model(name, pretrained=True).eval(), torch.randn(32, 3, 32, 32)
    network = timm.utils.reparameterize_model(model) if fused else copy.deepcopy(model)
    prepared = prepare_fx(network, get_default_qconfig_mapping('x86'), (x,))
    prepared(x)
    with torch.no_grad():
        quantized, exact = convert_fx(prepared)(x), model(x)
    assert torch.nn.functional.cosine_similarity(quantized - quantized.mean(0), exact - exact.mean(0)).mean() > 0.9

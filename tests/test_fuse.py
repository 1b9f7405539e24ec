"""Models fused for inference compute the same, as plain convolutions."""
import copy
import pickle

import pytest
import timm
import torch
import torch.nn as nn
from timm.utils import reparameterize_model

import test_maths
from test_models import assert_close, check_export_and_onnx

CHANNELS_LAST = dict(memory_format=torch.channels_last)


def create(name, size=(65, 97), dtype=torch.float64, **kwargs):
    """A model that has seen some images, so that numbers stay moderate in eval mode, and other images."""
    model = test_maths.create(name, dtype, **kwargs).train()
    x = torch.randn(4, 3, *size, dtype=dtype)
    with torch.no_grad():
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = 1.
        model(x)
    return model.eval(), torch.randn(2, 3, *size, dtype=dtype)


def assert_same(fused, model, x, tolerance):
    with torch.no_grad():
        assert_close(fused(x), model(x), tolerance, tolerance)


@pytest.mark.parametrize('name,kwargs', [
    ('dresnet18', {}), ('dresnet50', {}), ('adaresnet50', {}), ('adaresnet20_cifar', {}),
    *(pytest.param(name, kwargs, marks=pytest.mark.slow) for name, kwargs in (
        ('dresnet34', {}), ('dresnet101', {}), ('dresnet56_cifar', {}), ('adaresnet152', {}))),
    ('dresnet20_cifar', dict(gate='gauss')), ('dresnet20_cifar', dict(gate='linear', connection_rank=5)),
    ('test_dresnet', dict(gate='gauss', connection_rank=1)), ('dresnet18', dict(gate='linear')),
    *(('adaresnet18', dict(skip_weight=kind)) for kind in ('per_kind', 'shared')),
    ('dresnet18', dict(avg_down=True, output_stride=8)), ('adaresnet50', dict(avg_down=True, act_layer='silu')),
    ('adaresnet18', dict(block_args=dict(attn_layer='se'))), ('dresnet18', dict(stem_type='deep', stem_width=32)),
    ('dresnet18', dict(norm_layer='groupnorm')), ('adaresnet18', dict(norm_layer='groupnorm')),
    ('adaresnet18', dict(norm_layer=nn.Identity)),
], ids=str)
def test_same_function(name, kwargs):
    model, x = create(name, **kwargs)
    fused = reparameterize_model(model)
    norms = [name for name, module in fused.named_modules() if isinstance(module, nn.BatchNorm2d)]
    assert not [name for name in norms if name.startswith(('layer', 'connections'))]
    assert_same(fused, model, x, 1e-10)
    with torch.no_grad():
        expected = model(x)
        model, fused, x = model.float(), fused.float(), x.float()
        # networks that amplify rounding errors do so in either form
        tolerance = max(1e-4, 4 * ((model(x) - expected).abs().max() / expected.abs().max()).item())
    for layout in ({}, CHANNELS_LAST):
        assert_same(fused.to(**layout), model.to(**layout), x.to(**layout), tolerance)


@pytest.mark.parametrize('name', ['dresnet18', 'adaresnet18'])
def test_a_copy_or_in_place(name):
    model, x = create(name)
    before = copy.deepcopy(model.state_dict())
    expected = model(x)
    fused = reparameterize_model(model)
    assert fused is not model and not model.fused and fused.fused
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert reparameterize_model(model.train(), inplace=True) is model
    for again in (model.eval(), reparameterize_model(model), pickle.loads(pickle.dumps(model))):
        assert again.fused and again.state_dict().keys() == fused.state_dict().keys()
        torch.testing.assert_close(again(x), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('name', [
    'dresnet18', pytest.param('dresnet50', marks=pytest.mark.slow), 'adaresnet18'])
@pytest.mark.filterwarnings('ignore:`torch.jit:FutureWarning')
def test_export_onnx_compile_and_trace(name, tmp_path):
    model, x = create(name, dtype=torch.float32)
    model = reparameterize_model(model)
    with torch.no_grad():
        expected = model(x)
    torch._dynamo.reset()
    assert_close(torch.compile(model, fullgraph=True, backend='aot_eager')(x), expected)
    assert_close(torch.jit.trace(model, x)(x), expected)
    check_export_and_onnx(model, x, tmp_path / 'model.onnx')


@pytest.mark.parametrize('name,kwargs', [
    ('dresnet18', {}), ('dresnet18', dict(out_indices=(1, 3))), ('dresnet50', dict(out_indices=[1])),
    ('adaresnet50', dict(out_indices=(1, 3))),
], ids=str)
def test_features(name, kwargs):
    model, x = create(name, features_only=True, **kwargs)
    fused = reparameterize_model(model)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-9, atol=1e-9)
    built = timm.create_model(name, features_only=True, inference_mode=True, **kwargs)
    assert [tuple(p.shape) for p in built.parameters()] == [tuple(p.shape) for p in fused.parameters()]


@pytest.mark.parametrize('name', ['test_dresnet', 'test_adaresnet'])
def test_training_is_refused_but_inside_a_network(name):
    model, x = create(name)
    fused = reparameterize_model(model.train())
    with pytest.raises(RuntimeError, match='fused model is for inference: call eval'):
        fused(x)
    fused, expected = reparameterize_model(model.eval()), model(x)
    with pytest.raises(RuntimeError, match='fused for inference'):
        fused.train()
    network = nn.Sequential(fused.requires_grad_(False), nn.Linear(5, 2, dtype=x.dtype)).train()
    assert network[1].training and not any(module.training for module in fused.modules())
    network(x).sum().backward()
    assert_close(fused(x), expected)
    assert not reparameterize_model(model.requires_grad_(False)).train().training

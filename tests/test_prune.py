"""Pruned connections are gone, and what is left computes what it did."""
import copy

import pytest
import timm
import torch
from timm.models import save_for_hf
from timm.utils import ModelEmaV3, reparameterize_model

import timm_dresnet
from test_maths import assert_same_gradients, create
from timm_dresnet import prune_connections


def images(dtype=torch.float64, size=(65, 97)):
    return torch.randn(4, 3, *size, generator=torch.Generator().manual_seed(2), dtype=dtype)


@pytest.mark.parametrize('name,stages,first', [('dresnet18', 1, 8), ('dresnet18', 2, 6), ('test_dresnet', 9, 3)])
@torch.no_grad()
def test_connections_into_the_last_stages(name, stages, first):
    """Are those of the whole network, without those into the first ones."""
    pruned, model = create(name).eval(), create(name, connected_stages=stages).eval()
    pruned.prune_connections([(i, k) for i, k in pruned.connection_pairs() if i < first])
    assert min(model.connection_pairs()) == (first, 1) and model.pruned_connections == []
    model.load_state_dict(pruned.state_dict())
    torch.testing.assert_close(model(images()), pruned(images()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('training', [True, False], ids=['train', 'eval'])
@pytest.mark.parametrize('name,kwargs', [
    ('dresnet18', dict(gate='sigmoid')), ('dresnet18', dict(gate='gauss', connection_rank=5)),
    ('dresnet50', dict(gate='linear')), ('dresnet18', dict(gate='sigmoid', norm_layer='groupnorm')),
    *(pytest.param(f'dresnet{depth}', dict(gate='sigmoid'), marks=pytest.mark.slow) for depth in (34, 101)),
], ids=str)
def test_same_function_as_with_gates_of_zero(name, kwargs, training):
    model = create(name, **kwargs).train(training)
    pairs = [pair for pair in model.connection_pairs() if torch.rand(()) < 0.6]
    for i, k in pairs:
        stage, = (stage for stage in model.connections.values() if i in stage.sources)
        stage.gates[str(i)].weight.data[k - 1] = dict(sigmoid=-1e4, gauss=1e4, linear=0.)[kwargs['gate']]  # F(w) = 0
    pruned = copy.deepcopy(model)
    removed = prune_connections(pruned, min_gate=1e-9)
    assert [(record['target'], record['source']) for record in removed] == pairs
    assert len(timm_dresnet.connections(pruned)) == len(timm_dresnet.connections(model)) - len(pairs) > 0
    assert_same_gradients(pruned, model, pruned(images()), model(images()), of_trunk=True)


@pytest.mark.parametrize('name', ['dresnet18', 'dresnet50', 'test_dresnet'])
def test_saves_loads_fuses_and_trains(name, tmp_path):
    x = images(torch.float32)
    model = timm.create_model(name, num_classes=5)
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        prune_connections(model.eval(), keep=0.5, images=x)
    expected = model(x)
    save_for_hf(model, tmp_path)
    loaded = timm.create_model(f'local-dir:{tmp_path}', pretrained=True).eval()
    assert loaded.connection_pairs() == model.connection_pairs() and torch.equal(loaded(x), expected)
    fused = reparameterize_model(loaded)
    torch.testing.assert_close(fused(x), expected, rtol=1e-4, atol=1e-4)
    save_for_hf(fused, tmp_path / 'fused')
    assert torch.equal(timm.create_model(f'local-dir:{tmp_path}/fused', pretrained=True).eval()(x), fused(x))
    for network in (loaded, model):
        network.train()(x).square().mean().backward()
        assert all(p.grad is not None for p in network.parameters())
    features = timm.create_model(
        name, features_only=True, out_indices=(1, 2), pruned_connections=model.pruned_connections)(x)
    assert len(features) == 2


@pytest.mark.parametrize('name,base', [('dresnet18', 'resnet18'), ('dresnet50', 'resnet50')])
def test_without_connections_it_is_its_resnet(name, base):
    model = timm.create_model(name, num_classes=10).eval()
    removed = prune_connections(model, keep=0.)
    assert len(removed) == {'dresnet18': 21, 'dresnet50': 105}[name] and not model.connections
    resnet = timm.create_model(base, num_classes=10).eval()
    resnet.load_state_dict(model.state_dict())
    x = images(torch.float32)
    assert torch.equal(model(x), resnet(x))


@pytest.mark.parametrize('limits,strength', [
    (dict(min_gate=0.5), 'gate'), (dict(min_effect=0.2), 'effect'), (dict(keep=0.3), 'gate'),
    (dict(keep=0.3), 'effect'), (dict(keep=1.), 'gate'),
], ids=str)
def test_what_is_removed(limits, strength):
    model, x = create('dresnet18', gate='linear'), images()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if '.gates.' in name:
                parameter.copy_(torch.rand(parameter.shape) * 2 - 1)

    def pairs(records):
        return [(r['target'], r['source']) for r in records]

    records = timm_dresnet.connections(model, x)
    values = {pair: abs(r[strength]) for pair, r in zip(pairs(records), records)}
    removed = pairs(prune_connections(model, **limits, images=x if strength == 'effect' else None))
    left = pairs(timm_dresnet.connections(model, x))
    assert sorted(removed + left) == pairs(records) and model.pruned_connections == removed
    if 'keep' in limits:
        assert len(left) == round(limits['keep'] * 21)
        assert max((values[p] for p in removed), default=0) <= min(values[p] for p in left)
    else:
        limit, = limits.values()
        assert all((values[p] < limit) == (p in removed) for p in values)


def test_other_parameters_stay_as_they_are():
    """So optimizers keep their state."""
    model = timm.create_model('dresnet18')
    before = dict(model.named_parameters())
    model.prune_connections([(7, 1)])
    changed = {name.split('connections.')[1] for name, p in model.named_parameters() if p is not before[name]}
    assert changed == {f'{part}.weight' for part in ('gates.7', 'projections.1.conv', 'projections.1.norm')} | {
        'projections.1.norm.bias'}


def test_frozen_gates_stay_frozen():
    model = timm.create_model('test_dresnet').requires_grad_(False)
    prune_connections(model, keep=0.5)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize('wrap,arguments,words', [
    (None, dict(), 'min_gate.*min_effect.*keep'),
    (None, dict(min_gate=0.1, keep=0.5), 'one of'),
    (None, dict(min_effect=0.1), 'images'),
    (None, dict(min_gate=float('nan')), 'min_gate.*nan'),
    (None, dict(keep=1.5), r'between 0 and 1.*1\.5'),
    (ModelEmaV3, dict(keep=0.5), 'ModelEma.*the network itself'),
    (reparameterize_model, dict(min_gate=0.1), 'fused'),
])
def test_errors(wrap, arguments, words):
    model = timm.create_model('test_dresnet')
    with pytest.raises(ValueError, match=words):
        prune_connections(wrap(model) if wrap else model, **arguments)

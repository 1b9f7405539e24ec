"""ResNets of timm and their weights, grown into networks with learned connections."""
import copy

import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import save
from timm.layers import freeze_batch_norm_2d
from timm.models import model_entrypoint, save_for_hf
from timm.optim import create_optimizer_v2
from timm.utils import reparameterize_model

import test_fuse
import timm_dresnet

RESNETS = [name for name in timm.list_models() if model_entrypoint(name).__module__ == 'timm.models.resnet']
QUICK = {  # one of each kind
    'ecaresnet26t', 'ecaresnet50d_pruned', 'resnet18', 'resnet34d', 'resnet50_gn', 'resnet50s', 'resnet50t',
    'resnetblur50d', 'resnetrs50', 'resnext50_32x4d', 'seresnet50', 'test_resnet'}


def trained(arch):
    """A ResNet as if trained: no parameter or statistic at its start, and activations of a sane size."""
    return test_fuse.create(arch, (64, 64), torch.float32, num_classes=1000)[0]


@pytest.mark.parametrize('family,depth', [
    ('adaresnet', '18'), ('adaresnet', '50'), ('dresnet', '18'), ('dresnet', '50'), ('dresnet', '50_gauss'),
    *(pytest.param(family, depth, marks=pytest.mark.slow) for family, depth in (
        ('adaresnet', '152'), ('dresnet', '34'), ('dresnet', '101'))),
])
def test_grown_model_is_its_resnet(hub, family, depth):
    """A ResNet of timm, served as timm's repositories are, and loaded through the tag."""
    resnet_name = f'resnet{depth}'.replace('_gauss', '')
    resnet, tag = trained(resnet_name), timm.get_pretrained_cfg(resnet_name).tag
    hub.add_repo(f'timm/{resnet_name}.{tag}', {'model.safetensors': save(resnet.state_dict())})
    model = timm.create_model(f'{family}{depth}.init_{tag}', pretrained=True)
    overlay = dict(state_dict=resnet.state_dict(), num_classes=1000)
    x = torch.randn(2, 3, 96, 96)
    # adding connections of 0, a DResNet may have its maps in another memory layout, and kernels for that
    tolerance = 0. if family == 'adaresnet' else 1e-5
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), resnet(x), rtol=tolerance, atol=tolerance)
        others = [timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=5, in_chans=1,
        ).eval() for name in (f'{family}{depth}', resnet_name)]
        torch.testing.assert_close(*(m.forward_features(x[:, :1]) for m in others), rtol=1e-5, atol=1e-5)
    assert 'state_dict' not in others[0].pretrained_cfg  # else the weights would stay, twice
    assert timm.create_model(f'{family}{depth}', pretrained=True, num_classes=3)(x).shape == (2, 3)

    # and it learns: after one step the connections let something through
    optimizer = create_optimizer_v2(model.train(), 'sgd', lr=0.01)
    torch.nn.functional.cross_entropy(model(x), torch.tensor([1, 2])).backward()
    learned = {n: p for n, p in model.named_parameters() if '.connections.' in n or n.endswith('.alpha')}
    first = [p for n, p in learned.items() if '.expansions.' in n] or [
        p for n, p in learned.items() if n.endswith(('.norm.weight', '.alpha'))]
    assert first and all(p.grad.isfinite().all() and (p.grad != 0).any() for p in first)
    optimizer.step()
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), torch.tensor([1, 2])).backward()
    assert all((p.grad != 0).any() for n, p in learned.items())


def test_in_training_on_two_positions():
    """From two images in a 1x1 map, rounding could make variances of large activations negative, and outputs NaN."""
    torch.manual_seed(10)
    resnet = timm.create_model('resnet18', num_classes=5)
    for block in resnet.layer1:
        nn.init.constant_(block.bn2.weight, 1000.)
    model = timm_dresnet.grow(resnet)
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.train()(x), resnet.train()(x))
    assert all(statistic.isfinite().all() for statistic in model.buffers())


@pytest.mark.parametrize(
    'name', [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in RESNETS])
@torch.no_grad()
def test_every_resnet_of_timm(name):
    torch.manual_seed(0)
    resnet = timm.create_model(name).eval()
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.5, 1)
            module.running_mean.normal_(std=0.05)
    before, x = copy.deepcopy(resnet.state_dict()), torch.randn(1, 3, 224 if name == 'resnet18' else 65, 65)
    for kind in ('dresnet', 'adaresnet'):
        grown = timm_dresnet.grow(resnet, kind).eval()
        torch.testing.assert_close(grown(x), resnet(x), rtol=1e-5, atol=1e-5)
        learned = timm_dresnet.connections(grown)
        assert len(learned) > 1 and type(resnet) is timm.models.ResNet
        torch.testing.assert_close(resnet.state_dict(), before, rtol=0, atol=0)
        sizes = [sum(p.numel() for p in model.parameters()) for model in (grown, resnet)]
        assert sizes[0] <= 1.15 * sizes[1]
        again = timm.create_model(kind, device='meta', **grown._model_args)
        assert {key: tensor.shape for key, tensor in again.state_dict().items()} == {
            key: tensor.shape for key, tensor in grown.state_dict().items()}


@pytest.mark.parametrize('kind,kwargs', [
    ('dresnet', dict(connected_stages=None)), ('dresnet', dict(gate='gauss', connection_rank=4, connected_stages=4)),
    ('adaresnet', dict(skip_weight='shared')),
], ids=str)
def test_grown_is_a_model_of_timm(kind, kwargs, tmp_path):
    """Trained, pruned, saved, loaded, fused, and taken as a backbone."""
    resnet = timm.create_model('resnet10t', num_classes=5, in_chans=1, act_layer='silu')
    names = list('abcde')
    resnet.pretrained_cfg.update(num_classes=5, label_names=names)
    for training in (False, True):
        model = timm_dresnet.grow(resnet.train(training), kind, **kwargs)
        assert {module.training for module in model.modules()} == {training}
    x = torch.randn(4, 1, 65, 65)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
        optimizer.step()
    model.eval()
    if kind == 'dresnet':
        assert all(abs(record['effect']) > 0 for record in timm_dresnet.connections(model, x))
        assert timm_dresnet.prune_connections(model, keep=0.5)
    for saved, folder in ((model, 'model'), (reparameterize_model(model), 'fused')):
        save_for_hf(saved, tmp_path / folder, safe_serialization=True)
        loaded = timm.create_model(f'local-dir:{tmp_path / folder}', pretrained=True).eval()
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-4)
        assert loaded.pretrained_cfg['label_names'] == names and loaded.fused == (folder == 'fused')
        if kind == 'dresnet':  # which keeps it loadable when the defaults change
            assert loaded.pretrained_model_args.keys() >= {'gate', 'connection_rank', 'connected_stages'}
    backbone = timm.create_model(f'local-dir:{tmp_path / "model"}', pretrained=True, features_only=True).eval()
    torch.testing.assert_close(backbone(x)[-1], model.forward_features(x))


def test_grown_by_name():
    resnet = trained('resnet18d')
    overlay, x = dict(state_dict=resnet.state_dict()), torch.randn(2, 3, 64, 64)
    for name, kwargs in (
            ('dresnet18d', {}), ('adaresnet18d.init_ra2_in1k', {}), ('dresnet', dict(grown_from='resnet18d.ra2_in1k'))):
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
        torch.testing.assert_close(model(x), resnet(x), rtol=1e-5, atol=1e-5)
        assert model.pretrained_cfg['mean'] == resnet.pretrained_cfg['mean']
        assert model.pretrained_cfg.get('tag') in (None, 'init_ra2_in1k')  # not the ResNet's
    assert resnet.pretrained_cfg['tag'] and not timm_dresnet.grow(resnet).pretrained_cfg['tag']
    with pytest.raises(ValueError, match='start from 1: leave skip_init out'):
        timm.create_model('adaresnet18d', pretrained=True, pretrained_cfg_overlay=overlay, skip_init=0.)
    for name in timm_dresnet.growing._NAMES:
        assert timm.get_pretrained_cfg(name).tag.startswith('init_')
        assert timm.list_pretrained(f'{name}.init_*') and timm.create_model(name, device='meta').num_classes == 1000


@pytest.mark.parametrize('norm_layer', ['layernorm2d', 'groupnorm', nn.Identity])
def test_grown_where_there_are_no_batch_norms(norm_layer):
    resnet = timm.create_model('resnet18', channels=(32, 32, 64, 64), norm_layer=norm_layer)
    model = timm_dresnet.grow(resnet, gate_init=0.5)
    nn.init.ones_(model.connections['layer4'].projections['1'].norm[0].weight)
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(model(x)[:1], model(x[:1]))  # in training


@pytest.mark.parametrize('kwargs', [{}, dict(gate='gauss', connection_rank=4)], ids=str)
def test_grown_learns_with_frozen_norms(kwargs):
    resnet = trained('test_resnet')
    with torch.inference_mode():
        model = timm_dresnet.grow(resnet, **kwargs)
    model = freeze_batch_norm_2d(model).train()
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    assert any((p.grad != 0).any() for n, p in model.named_parameters() if '.connections.' in n)


@pytest.mark.parametrize('kind', ['dresnet', 'adaresnet'])
def test_grown_on_the_meta_device(kind):
    resnet = timm.create_model('test_resnet')
    model = timm_dresnet.grow(timm.create_model('test_resnet', device='meta'), kind)
    model.load_state_dict(timm_dresnet.grow(resnet, kind).state_dict(), assign=True)
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(model.eval()(x), resnet.eval()(x))


class OwnResNet(timm.models.resnet.ResNet):
    """Whose methods the network that is grown would not have."""


def cut(resnet):
    resnet.layer4 = torch.nn.Identity()
    return resnet


@pytest.mark.parametrize('make,kind,kwargs,words', [
    (lambda: timm.create_model('resnet18', features_only=True), 'dresnet', {}, 'FeatureListNet.*features_only'),
    (lambda: timm.create_model('test_vit'), 'dresnet', {}, 'a ResNet of timm.*VisionTransformer'),
    (lambda: timm.create_model('test_dresnet'), 'dresnet', {}, 'without learned connections.*DResNet'),
    (lambda: OwnResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1)), 'dresnet', {}, 'a ResNet of timm.*OwnResNet'),
    (lambda: cut(timm.create_model('test_resnet')), 'dresnet', {}, 'a whole ResNet.*layer4'),
    (lambda: timm.create_model('test_resnet', features_only=True, feature_cls='getter', out_indices=[2]).model,
     'dresnet', {}, 'a whole ResNet.*layer3'),
    (lambda: timm.create_model('skresnet18'), 'adaresnet', {}, 'SelectiveKernelBasic'),
    (lambda: timm_dresnet.AdaResNet(timm.models.resnet.BasicBlock, (1, 1, 1, 1)), 'dresnet', {}, 'AdaBasicBlock'),
    (lambda: timm.create_model('test_resnet'), 'plainnet', {}, "'dresnet', 'adaresnet', got 'plainnet'"),
    (lambda: timm.create_model('test_resnet'), 'adaresnet', dict(gate='gauss'), "skip_weight.*not 'gate'"),
    (lambda: timm.create_model('test_resnet'), 'dresnet', dict(gate='soft'), "sigmoid.*'soft'"),
    (lambda: timm.create_model('test_resnet'), 'dresnet', dict(connected_stages='2'), "connected_stages.*'2'"),
])
def test_what_cannot_grow(make, kind, kwargs, words):
    with pytest.raises(ValueError, match=words):
        timm_dresnet.grow(make(), kind, **kwargs)

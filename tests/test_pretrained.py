"""Pretrained configs, weights in the package, and networks grown from timm's checkpoints on the Hub."""
from shutil import copy

import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import load_file
from timm.data import resolve_model_data_config
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, list_pretrained

import timm_dresnet
from timm_dresnet import pretrained

PACKAGED = [name for name in list_pretrained(['*dresnet*', '*adaresnet*']) if '.init_' not in name]
FILE = 'test_dresnet.c10.safetensors'
GROWN = {
    **{f'dresnet{n}{gate}': f'resnet{n}' for n in (18, 34, 50, 101) for gate in ('', '_gauss')},
    **{f'adaresnet{n}': f'resnet{n}' for n in (18, 34, 50, 101, 152)},
}


@pytest.mark.parametrize('name,resnet', GROWN.items())
def test_every_checkpoint_of_timm_can_be_grown(name, resnet):
    """With its own preprocessing and license. timm's default is the default, unless the package has weights."""
    tags = [f'init_{cfg.tag}' for cfg in get_arch_pretrained_cfgs(resnet).values()]
    assert [cfg.tag for cfg in get_arch_pretrained_cfgs(name).values() if cfg.tag.startswith('init_')] == tags
    for cfg in get_arch_pretrained_cfgs(resnet).values():
        grown = get_pretrained_cfg(f'{name}.init_{cfg.tag}')
        assert grown.hf_hub_id == f'timm/{resnet}.{cfg.tag}'
        for key in ('input_size', 'test_input_size', 'crop_pct', 'test_crop_pct', 'interpolation', 'mean', 'std',
                    'num_classes', 'license', 'origin_url', 'paper_ids', 'label_offset'):
            assert getattr(grown, key) == getattr(cfg, key), key
    assert tags[0] == f'init_{get_pretrained_cfg(resnet).tag}'
    packaged = [tag.split('.')[1] for tag in PACKAGED if tag.split('.')[0] == name]
    assert get_pretrained_cfg(name).tag == (packaged or tags)[0]


@pytest.mark.parametrize('name', PACKAGED)
def test_packaged(hub, name):
    torch.manual_seed(0)
    cfg, model = get_pretrained_cfg(name), timm.create_model(name, pretrained=True).eval()
    assert cfg.has_weights and cfg.license and cfg.paper_ids and model.num_classes == len(cfg.label_names)
    config = resolve_model_data_config(model)
    assert config['input_size'] == cfg.input_size and config['mean'] == cfg.mean
    torch.testing.assert_close(model.state_dict(), load_file(cfg.file), rtol=0, atol=0, check_dtype=False)
    assert 'state_dict' not in model.pretrained_cfg
    assert isinstance(timm.create_model(name.split('.')[0], pretrained=True), type(model))  # it is the default

    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = timm.create_model(name, pretrained=True, features_only=True).eval()(images)
        torch.testing.assert_close(features[-1], model.forward_features(images))
    gray = timm.create_model(name, pretrained=True, num_classes=2, in_chans=1).eval()
    torch.testing.assert_close(gray.conv1.weight, model.conv1.weight.sum(1, keepdim=True))
    torch.testing.assert_close(gray.layer2[0].conv1.weight, model.layer2[0].conv1.weight)
    assert not hub.requests


@pytest.mark.parametrize('name,kwargs', [
    ('test_dresnet', dict(gate='linear')), ('test_dresnet', dict(gate='gauss')),
    ('test_dresnet', dict(connection_rank=2)), ('test_dresnet', dict(inference_mode=True)),
    ('test_dresnet', dict(pruned_connections=[(4, 1)])), ('test_dresnet', dict(layers=(1, 2, 2, 2))),
    ('test_adaresnet', dict(skip_weight='shared')), ('test_adaresnet', dict(inference_mode=True)),
], ids=str)
def test_weights_of_another_function_do_not_load(name, kwargs, tmp_path):
    """Whichever way they are loaded, and with another classifier too."""
    argument = next(iter(kwargs))
    weights = timm.create_model(name, pretrained=True).state_dict()
    torch.save(weights, tmp_path / 'weights.pth')
    for load in (
            lambda: timm.create_model(name, pretrained=True, **kwargs),
            lambda: timm.create_model(name, pretrained=True, num_classes=3, **kwargs),
            lambda: timm.create_model(name, checkpoint_path=str(tmp_path / 'weights.pth'), **kwargs),
            lambda: nn.ModuleDict(dict(model=timm.create_model(name, **kwargs))).load_state_dict(
                {f'model.{key}': weight for key, weight in weights.items()}, strict=False)):
        with pytest.raises(RuntimeError, match=f'^These weights are those of a network made with another {argument}'):
            load()


@pytest.mark.parametrize('strict', [True, False])
def test_weights_of_a_resnet_are_not_loaded_as_they_are(strict):
    resnet = timm.create_model('resnet18')
    for name in ('dresnet18', 'adaresnet18'):
        with pytest.raises(RuntimeError, match=r'of a ResNet.*timm_dresnet\.grow'):
            timm.create_model(name).load_state_dict(resnet.state_dict(), strict=strict)
    for name in ('dresnet18_cifar', 'adaresnet18_cifar'):
        with pytest.raises(RuntimeError, match='this one is a ResNet'):
            timm.create_model('resnet18_cifar').load_state_dict(timm.create_model(name).state_dict(), strict=strict)
    model = timm.create_model('dresnet18')
    without = {key: value for key, value in model.state_dict().items() if not key.startswith('layer4')}
    for part in ({'fc.weight': torch.ones(1000, 512)}, without):
        assert model.load_state_dict(part, strict=False).missing_keys


def test_untrained():
    """A network without a tag is what the ResNet of its name is."""
    for name, baseline in (('dresnet18', 'resnet18'), ('adaresnet50', 'resnet50')):
        model, resnet = timm.create_model(name), timm.create_model(baseline)
        assert model.num_classes == resnet.num_classes == 1000
        assert resolve_model_data_config(model) == resolve_model_data_config(resnet)
    for name, kwargs in ('dresnet18', {}), ('dresnext50_32x4d', {}), ('dresnet', dict(grown_from='resnext50_32x4d')):
        config = timm.create_model(name, device='meta', **kwargs).pretrained_cfg
        assert not any(config.get(key) for key in ('url', 'license', 'origin_url', 'tag', 'hf_hub_id'))  # of weights
    model = timm.create_model('dresnet20_cifar')
    assert model.num_classes == 10 and model.pretrained_cfg['input_size'] == (3, 32, 32)


def test_names_of_classes_go_with_the_weights(tmp_path):
    trained = timm.create_model('test_dresnet', pretrained=True)
    assert trained.pretrained_cfg['label_names'][1] == 'automobile'
    described = timm.create_model('dresnet18.tiny_in', pretrained=True).pretrained_cfg
    assert described['label_descriptions'][described['label_names'][0]].startswith('goldfish')
    torch.save(trained.state_dict(), tmp_path / 'weights.pth')
    file = str(tmp_path / 'weights.pth')
    for kwargs in (
            dict(), dict(checkpoint_path=file), dict(pretrained=True, num_classes=2),
            dict(pretrained=True, pretrained_cfg_overlay=dict(file=file))):
        for name in ('test_dresnet', 'test_dresnet.c10'):
            assert 'label_names' not in timm.create_model(name, **kwargs).pretrained_cfg, kwargs


def test_weights_of_a_shared_skip_weight():
    shared, single = (timm.create_model('test_adaresnet', skip_weight=kind) for kind in ('shared', 'per_block'))
    for network in (single, timm.create_model('test_adaresnet', skip_weight='shared')):
        network.load_state_dict({k: v + 0.5 if k.endswith('.alpha') else v for k, v in shared.state_dict().items()})
        assert [record['alpha'] for record in timm_dresnet.connections(network)] == 6 * [1.5]
        assert network.layer1[0].skip_weight.state_dict()['alpha'] == 1.5


@pytest.mark.parametrize('name,damage,words', [
    (FILE, lambda data: data[:-1], 'is damaged'), (FILE, None, 'cannot be read'),
    (FILE, lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:], 'is damaged'),
    ('manifest.json', lambda data: b'{}', 'missing or damaged'), ('manifest.json', None, 'missing or damaged'),
])
def test_damaged_files_do_not_load(name, damage, words, tmp_path, monkeypatch):
    registered = get_pretrained_cfg('test_dresnet').file
    for file in (FILE, 'manifest.json'):
        copy(pretrained._FOLDER / file, tmp_path)
    monkeypatch.setattr(pretrained, '_FOLDER', tmp_path)
    monkeypatch.setattr(pretrained, 'packaged_file', lambda tag: registered)
    path = tmp_path / name
    path.unlink() if damage is None else path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(RuntimeError, match=words) as error:
        timm.create_model('test_dresnet', pretrained=True)
    assert str(path) in str(error.value) and 'pip install' in str(error.value)

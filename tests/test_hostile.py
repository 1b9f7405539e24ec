"""Damaged and malicious files: each gives one clear error, and none runs code."""
import json
import os
import pickle

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import train.__main__
import train.validate
from timm_dresnet.folders import load_folder


@pytest.fixture
def folder(tmp_path):
    """A model's folder, alone in a folder."""
    path = tmp_path / 'model'
    save_for_hf(
        timm.create_model('test_dresnet', num_classes=4), path, dict(label_names=list('abcd')), safe_serialization=True)
    return path


def test_pickles_are_not_run(folder, tmp_path):
    pickled = tmp_path / 'last.pth.tar'
    trap = type('Trap', (), dict(__reduce__=lambda self: (os.mkdir, (str(tmp_path / 'trap'),))))()  # makes a folder
    torch.save({'state_dict': trap, 'task_state': trap}, pickled)
    for data in (pickle.dumps(trap), pickled.read_bytes()):
        (folder / 'model.safetensors').write_bytes(data)
        with pytest.raises(ValueError, match='model.safetensors is damaged'):
            load_folder(folder)
    (folder / 'model.safetensors').rename(folder / 'pytorch_model.bin')
    with pytest.raises(ValueError, match='holds no model.safetensors'):
        load_folder(folder)
    digits = ['--dataset', 'digits', '--workers', '0']
    for main, arguments in (
            (train.validate.main, [pickled]),
            (train.__main__.main, ['--model', 'test_dresnet', '--initial-checkpoint', pickled])):
        with pytest.raises(SystemExit, match='error: '):
            main([*map(str, arguments), *digits])
    assert not (tmp_path / 'trap').exists()


@pytest.mark.parametrize('damage', [
    lambda data: b'', lambda data: data[:-100], lambda data: data[:7] + b'\x80' + data[8:],  # a header of 2 ** 63 bytes
    lambda data: data.replace(b'"F32"', b'"F33"', 1),
], ids=['empty', 'cut', 'size', 'type'])
def test_damaged_safetensors(folder, damage):
    file = folder / 'model.safetensors'
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ValueError, match='model.safetensors is damaged') as error:
        load_folder(folder)
    assert len(str(error.value).splitlines()) == 1
    (folder / 'empty.pth').touch()
    for name, words in (file.name, ''), ('empty.pth', 'EOFError'), ('x', 'there is no such file'):
        path = str(folder / name)
        with pytest.raises(SystemExit, match=f'error: {path}: {words}'):
            train.__main__.main(['--model', 'test_dresnet', '--initial-checkpoint', path, '--dataset', 'digits'])


@pytest.mark.parametrize('name,change,message', [
    ('fc.weight', lambda w: w[:3].clone(), r'fc.weight has the shape \[3, 48\] and not \[4, 48\]'),
    ('more', lambda w: torch.ones(3), 'holds no model that timm can load'),
    ('layer1.0.conv1.weight', lambda w: None, 'holds no model that timm can load'),
    ('conv1.weight', lambda w: w.fill_(float('nan')), 'conv1.weight in .* is not finite'),
])
def test_weights_that_do_not_fit(folder, name, change, message):
    weights = load_file(folder / 'model.safetensors')
    weights[name] = change(weights.get(name))
    save_file({key: w for key, w in weights.items() if w is not None}, folder / 'model.safetensors')
    with pytest.raises(ValueError, match=message):
        load_folder(folder)


@pytest.mark.parametrize('change,message', [
    (dict(architecture='../../etc/passwd'), 'does not describe a model'), (dict(pretrained_cfg=3), 'does not describe'),
    (dict(architecture='resnet18'), 'has the shape'), (dict(model_args=dict(num_classes=5)), 'differ'),
    (dict(model_args=dict(unknown=1)), 'does not describe'),
    (dict(model_args=dict(connection_rank=10 ** 8)), 'has the shape'),
    (dict(architecture='test_vit'), 'it holds 105,620 numbers, the model 312,644'),
    (dict(model_args=dict(checkpoint_path='/etc/passwd')), 'does not describe'),
    (dict(model_args=dict(pretrained_cfg_overlay=dict(source='', file='/etc/passwd'))), 'does not describe'),
    ('[]', 'does not describe'), ('[' * 100_000, 'does not describe'),
], ids=lambda value: str(value)[:40])
def test_configs(folder, change, message):
    text = change
    if isinstance(change, dict):
        config = json.loads((folder / 'config.json').read_bytes())
        model_args = {**config['model_args'], **change.get('model_args', {})}
        text = json.dumps({**config, **change, 'model_args': model_args})
    (folder / 'config.json').write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        load_folder(folder)
    assert str(folder) in str(error.value) and len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize('make', [os.mkdir, os.mkfifo, lambda path: os.symlink(path, path)])
def test_what_is_not_a_regular_file(folder, make):
    (folder / 'config.json').unlink()
    make(folder / 'config.json')
    with pytest.raises(ValueError, match='holds no config.json'):
        load_folder(folder)


def test_files_may_be_links(folder, tmp_path):
    """As they are in the cache of the Hub."""
    (folder / 'config.json').rename(tmp_path / 'config.json')
    (folder / 'config.json').symlink_to(tmp_path / 'config.json')
    assert load_folder(folder).pretrained_cfg['label_names'] == list('abcd')

"""Files from elsewhere: each gives a result or one clear error. None runs code, hangs, or takes memory without end.

Each fuzz test runs a hundred cases; `python -m pytest tests/test_hostile.py -m slow` runs thousands.
"""
import io
import json
import os
import pickle
import resource
import struct
import zlib

import numpy as np
import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.models import save_for_hf

import train.__main__
import train.validate
from timm_dresnet.__main__ import Failed, _read_image
from timm_dresnet.classifier import Classifier
from timm_dresnet.untrusted import load_folder
from train.arguments import parse_args
from train.checkpoints import newest
from train.trainer import Trainer

CASES = pytest.mark.parametrize('cases', [100, pytest.param(4000, marks=pytest.mark.slow)])


def fuzz(cases, **strategies):
    """Run a test on that many cases, the same ones every time."""
    return lambda test: settings(
        max_examples=cases, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck))(given(**strategies)(test))()


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp('saved')
    save_for_hf(timm.create_model('test_dresnet', num_classes=4), folder, dict(label_names=list('abcd')),
                safe_serialization=True)
    return {name: (folder / name).read_bytes() for name in ('config.json', 'model.safetensors')}


@pytest.fixture
def folder(saved, tmp_path):
    """A model's folder, alone in a folder."""
    path = tmp_path / 'model'
    path.mkdir()
    for name, data in saved.items():
        (path / name).write_bytes(data)
    return path


def outcome(path):
    """What loading a folder gives: 'loaded', or the error's only line."""
    try:
        model = load_folder(path)
    except (ValueError, OSError) as e:
        message = str(e)
        assert len(message) < 2000
        return message
    assert model(torch.zeros(1, *model.pretrained_cfg['input_size'])).shape == (1, model.num_classes)
    return 'loaded'


class Payload:
    """Unpickling this makes a file."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_are_not_run(folder, tmp_path):
    trap = tmp_path / 'trap'
    pickles = {'plain': pickle.dumps(Payload(trap))}
    buffer = io.BytesIO()
    torch.save({'state_dict': Payload(trap), 'task_state': Payload(trap)}, buffer)
    pickles['zip'] = buffer.getvalue()
    for data in pickles.values():
        (folder / 'model.safetensors').write_bytes(data)
        assert 'damaged' in outcome(folder)
        (folder / 'model.safetensors').unlink()
        (folder / 'pytorch_model.bin').write_bytes(data)
        assert 'holds no model.safetensors' in outcome(folder)
        (folder / 'last.pth.tar').write_bytes(data)
        checkpoint, digits = str(folder / 'last.pth.tar'), ['--dataset', 'digits', '--workers', '0']
        for main, arguments in (
                (train.validate.main, [checkpoint]), (train.validate.main, [checkpoint, '--arch', 'test_dresnet']),
                (train.__main__.main, ['--model', 'test_dresnet', '--initial-checkpoint', checkpoint])):
            with pytest.raises(SystemExit, match='error: '):
                main([*arguments, *digits])
    assert newest(folder) is None
    assert not trap.exists()


RUN = [
    '--dataset', 'digits', '--model', 'test_dresnet', '--in-chans', '1', '--num-classes', '10', '--img-size', '16',
    '--batch-size', '512', '--epochs', '2', '--workers', '0', '--model-ema', '--checkpoint-hist', '1']


def start_run(output):
    return Trainer(parse_args([*RUN, '--output', str(output)]))


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory):
    """What a run has written at the end of its first epoch."""
    trainer = start_run(tmp_path_factory.mktemp('run'))
    trainer.task.progress.update(epoch=1, batch=0)
    trainer.saver.save_checkpoint(0, metric=1.)
    return (trainer.folder / 'last.pth.tar').read_bytes()


@pytest.mark.parametrize('change,wanted', [
    (lambda c: None, 'loaded'),
    (lambda c: c.pop('task_state'), 'left aside'), (lambda c: c.update(task_state=[1, 0]), 'left aside'),
    (lambda c: c['task_state'].update(epoch='1'), 'left aside'),
    (lambda c: c['task_state'].update(epoch=-1), 'left aside'),
    (lambda c: c['task_state'].update(batch=.5), 'left aside'),
    (lambda c: c['task_state'].update(images=None), 'left aside'),
    (lambda c: c['task_state'].update(totals=[0.]), 'left aside'),
    (lambda c: c['task_state'].update(totals=[0., 0., float('nan')]), 'left aside'),
    (lambda c: c.update(epoch='x'), 'does not fit'),
    (lambda c: c.update(state_dict=None), 'does not fit'), (lambda c: c.update(state_dict={}), 'does not fit'),
    (lambda c: c['state_dict'].update({'fc.weight': torch.zeros(3, 3)}), 'does not fit'),
    (lambda c: c['state_dict'].update({'fc.weight': 3}), 'does not fit'),
    (lambda c: c['state_dict_ema'].pop('fc.bias'), 'does not fit'),
    (lambda c: c.update(optimizer=None), 'does not fit'), (lambda c: c.update(optimizer={}), 'does not fit'),
    (lambda c: c['optimizer'].update(param_groups='ab'), 'does not fit'),
    (lambda c: c['optimizer'].update(state=[1]), 'does not fit'),
    (lambda c: c['saver'].pop('checkpoint_files'), 'does not fit'), (lambda c: c.update(saver=[1]), 'does not fit'),
    (lambda c: c['saver'].update(checkpoint_files=[1]), 'does not fit'),
    (lambda c: c['saver'].update(pending='abc'), 'does not fit'),
], ids=range(23))
def test_checkpoints_of_training(checkpoint, change, wanted, tmp_path):
    folder = start_run(tmp_path).folder
    content = torch.load(io.BytesIO(checkpoint), weights_only=False)
    change(content)
    torch.save(content, folder / 'last.pth.tar')
    if wanted == 'does not fit':
        with pytest.raises(ValueError, match='last.pth.tar does not fit this run') as error:
            start_run(tmp_path)
        assert len(str(error.value)) < 1000 and '\n' not in str(error.value)
    else:
        assert start_run(tmp_path).task.progress['epoch'] == (wanted == 'loaded')


def test_checkpoints_name_no_files_outside(checkpoint, tmp_path):
    """Those that a checkpoint lists are deleted when better ones come."""
    folder = start_run(tmp_path / 'output').folder
    precious = [tmp_path / 'precious', folder.parent / 'checkpoint-0.pth.tar', folder / 'args.yaml']
    content = torch.load(io.BytesIO(checkpoint), weights_only=False)
    names = [str(precious[0]), '../checkpoint-0.pth.tar', 'args.yaml', '../../precious', 'checkpoint-0.pth.tar']
    for path in (*precious[:2], folder / 'checkpoint-0.pth.tar'):
        path.write_text('mine')
    content['saver']['checkpoint_files'] = [(name, 0.5) for name in names]
    torch.save(content, folder / 'last.pth.tar')
    start_run(tmp_path / 'output').saver.save_checkpoint(1, metric=2.)
    assert all(path.exists() for path in precious)
    assert {path.name for path in folder.glob('checkpoint-*')} == {'checkpoint-1.pth.tar'}


def header(entries, size=None, data=b''):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack('<Q', len(text) if size is None else size) + text + data


TENSOR = dict(dtype='F32', shape=[2], data_offsets=[0, 8])


@pytest.mark.parametrize('data', [
    b'', b'\0' * 7, header({}), header(b'{', data=b'x'), header({}, size=2 ** 63), header({}, size=2 ** 40),
    header(b'[' * 100_000), header({'a': TENSOR}), header({'a': {**TENSOR, 'data_offsets': [-8, 0]}}, data=b'x' * 8),
    header({'a': {**TENSOR, 'data_offsets': [8, 0]}}, data=b'x' * 8),
    header({'a': {**TENSOR, 'shape': [2 ** 62, 8]}}, data=b'x' * 8),
    header({'a': {**TENSOR, 'shape': [-1, -2]}}, data=b'x' * 8),
    header({'a': {**TENSOR, 'dtype': 'PICKLE'}}, data=b'x' * 8),
    header({'a': TENSOR, 'b': TENSOR}, data=b'x' * 8),
    header({'a': TENSOR, 'b': {**TENSOR, 'data_offsets': [4, 12]}}, data=b'x' * 12),
    header(b'{"a":' + json.dumps(TENSOR).encode() + b',"a":' + json.dumps(TENSOR).encode() + b'}', data=b'x' * 8),
    header({'a': TENSOR}, data=b'x' * 8 + b'more'), header({'a': TENSOR}, data=b'x' * 8),
], ids=range(18))
def test_headers_of_safetensors(folder, data):
    (folder / 'model.safetensors').write_bytes(data)
    assert str(folder) in outcome(folder)


@pytest.mark.parametrize('change,word', [
    (lambda w: w.update({'fc.weight': w['fc.weight'].half()[:3]}), 'holds no model'),
    (lambda w: w.update({'fc.weight': torch.ones(4, 48, dtype=torch.int64)}), 'loaded'),
    (lambda w: w.pop('layer1.0.conv1.weight'), 'holds no model'),
    (lambda w: w.update({'more': torch.ones(3)}), 'holds no model'),
    (lambda w: w['conv1.weight'].fill_(float('nan')), 'not finite'),
    (lambda w: w['layer2.0.bn1.running_var'].fill_(float('inf')), 'not finite'),
], ids=range(6))
def test_weights_that_do_not_fit(folder, change, word):
    weights = load_file(folder / 'model.safetensors')
    change(weights)
    save_file(weights, folder / 'model.safetensors')
    assert word in outcome(folder)


@pytest.mark.parametrize('change,word', [
    (dict(architecture='../../etc/passwd'), 'no architecture'), (dict(architecture=None), 'no architecture'),
    (dict(architecture='x' * 10_000), 'no architecture'), (dict(architecture='hf-hub:evil/model'), 'no architecture'),
    (dict(architecture='resnet18'), 'too few numbers'), (dict(architecture='test_adaresnet'), 'holds no model'),
    (dict(num_classes=10 ** 9), ''), (dict(num_classes=2 ** 70), 'num_classes'), (dict(num_classes=-1), 'num_classes'),
    (dict(num_classes='4'), 'num_classes'), (dict(num_classes=5), 'differ'),
    (dict(model_args=dict(num_classes=5)), 'differ'), (dict(model_args=dict(num_classes=False)), 'differ'),
    (dict(num_classes=5, model_args=dict(num_classes=5)), 'label_names'),
    (dict(label_names='abcd'), 'label_names'), (dict(label_names=[1, 2, 3, 4]), 'label_names'),
    (dict(label_names={'0': 'a', '3': 'd'}), 'loaded'), (dict(label_names={'x': 'a'}), 'label_names'),
    (dict(model_args=[]), 'model_args'), (dict(model_args=dict(checkpoint_path='/etc/passwd')), 'checkpoint_path'),
    (dict(model_args=dict(pretrained=True)), 'pretrained'), (dict(model_args=dict(layers=[10 ** 8] * 4)), 'layers'),
    (dict(model_args=dict(channels=[10 ** 6] * 4)), 'too few numbers'), (dict(model_args=dict(block='os.system')), ''),
    (dict(model_args=dict(connection_rank=10 ** 8)), 'too few numbers'), (dict(model_args=dict(unknown=1)), 'describe'),
    (dict(model_args=dict(pruned_connections=[[10 ** 6, 1]])), 'describe'), (dict(pretrained_cfg=3), 'pretrained_cfg'),
    (dict(pretrained_cfg=dict(input_size=[3, 10 ** 6, 10 ** 6])), 'input_size'),
    (dict(pretrained_cfg=dict(input_size=[3, 0, 32])), 'input_size'),
    (dict(pretrained_cfg=dict(crop_pct=1e-9)), 'crop_pct'), (dict(pretrained_cfg=dict(std=[0, 0, 0])), 'std'),
    (dict(pretrained_cfg=dict(mean='abc')), 'mean'), (dict(pretrained_cfg=dict(custom_load=True)), 'custom_load'),
    (dict(pretrained_cfg=dict(input_size=[3, 32, 32], file='../../../secret', url='http://127.0.0.1:9/')), 'loaded'),
], ids=str)
def test_configs(folder, change, word):
    config = json.loads((folder / 'config.json').read_bytes())
    for key in {'pretrained_cfg', 'model_args'} & set(change):
        if isinstance(change[key], dict):
            change = {**change, key: {**config[key], **change[key]}}
    (folder / 'config.json').write_text(json.dumps({**config, **change}))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = outcome(folder)
    assert word in found and (found == 'loaded') == (word == 'loaded')
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500_000  # kB


@pytest.mark.parametrize('text', ['', '{', '[]', 'null', '1e400', '[' * 100_000, '{"architecture": "test_dresnet"}',
                                  '{"architecture": "test_dresnet", "model_args": ' + '{"a": [' * 500 + ']}' * 500 + '}',
                                  '\ud800', ' ' * 2 ** 25], ids=range(10))
def test_texts_of_configs(folder, text):
    (folder / 'config.json').write_bytes(text.encode('utf-8', 'surrogatepass'))
    assert str(folder) in outcome(folder)


def test_links_and_folders_in_place_of_files(folder, tmp_path):
    (folder / 'config.json').rename(tmp_path / 'config.json')
    assert 'holds no config.json' in outcome(folder)
    (folder / 'config.json').symlink_to(folder / 'config.json')
    assert 'holds no config.json' in outcome(folder)
    (folder / 'config.json').unlink()
    (folder / 'config.json').mkdir()
    assert 'holds no config.json' in outcome(folder)
    (folder / 'config.json').rmdir()
    os.mkfifo(folder / 'config.json')  # reading it would never end
    assert 'holds no config.json' in outcome(folder)
    (folder / 'config.json').unlink()
    (folder / 'config.json').symlink_to(tmp_path / 'config.json')  # as in the cache of the Hub
    assert outcome(folder) == 'loaded'


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2 ** 70, 2 ** 70) | st.floats() | st.text(max_size=20)
    | st.sampled_from(['test_dresnet', 'dresnet18', 'bicubic', 'avg', 0, 1, 3, 4, 1e9]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6)


@CASES
def test_fuzz_configs(folder, cases):
    config = json.loads((folder / 'config.json').read_bytes())
    places = [(key,) for key in (*config, 'more')] + [
        (part, key) for part in ('pretrained_cfg', 'model_args')
        for key in (*config[part], 'gate', 'gate_init', 'connection_rank', 'layers', 'channels', 'norm_layer', 'act_layer',
                    'stem_type', 'output_stride', 'pruned_connections', 'inference_mode', 'drop_path_rate', 'crop_pct')]

    @fuzz(cases, changes=st.dictionaries(st.sampled_from(places), VALUES, min_size=1, max_size=2))
    def run(changes):
        changed = json.loads(json.dumps(config))
        for place, value in changes.items():
            within = changed
            for key in place[:-1]:
                within = within[key] if isinstance(within.get(key), dict) else {}
            within[place[-1]] = value
        (folder / 'config.json').write_text(json.dumps(changed))
        outcome(folder)
        assert sorted(path.name for path in folder.parent.rglob('*')) == ['config.json', 'model', 'model.safetensors']


def mutated(data, changes, end):
    data = bytearray(data)
    for place, byte in changes:
        data[int(place * (len(data) - 1))] = byte
    return bytes(data[:int(end * len(data))])


MUTATIONS = dict(
    changes=st.lists(st.tuples(st.floats(0, 1), st.integers(0, 255)), max_size=5),
    end=st.just(1.) | st.floats(0, 1))


@CASES
def test_fuzz_safetensors(folder, cases):
    whole = (folder / 'model.safetensors').read_bytes()
    length = struct.unpack('<Q', whole[:8])[0]

    @fuzz(cases, **MUTATIONS, in_header=st.booleans())
    def run(changes, end, in_header):
        part = 8 + length if in_header else len(whole)
        (folder / 'model.safetensors').write_bytes(mutated(whole[:part], changes, end) + whole[part:])
        outcome(folder)


def png(width, height, bits=8, color=2):
    """A PNG file that claims to be of this size."""
    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', struct.pack('>IIBBBBB', width, height, bits, color, 0, 0, 0)) + chunk(
        b'IDAT', zlib.compress(b'\0' * 10_000_000)) + chunk(b'IEND', b'')


@pytest.fixture(scope='module')
def classifier():
    return Classifier(timm.create_model('test_dresnet', pretrained=True).eval())


@pytest.mark.parametrize('data', [
    png(50_000, 50_000), png(2 ** 31 - 1, 1), png(0, 5), png(3, 3, color=9), b'', b'GIF89a', b'%!PS-Adobe-3.0 EPSF-3.0\n',
    b'\x89PNG\r\n\x1a\n', b'II*\0' + b'\xff' * 40,
], ids=range(9))
def test_images_that_cannot_be_read(classifier, tmp_path, data):
    (tmp_path / 'image.png').write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Failed, match='image.png. cannot be read'):
        _read_image(str(tmp_path / 'image.png'), classifier)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000


@pytest.mark.parametrize('mode', ['1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr', 'HSV', 'I', 'I;16', 'F'])
def test_modes_of_images(classifier, mode):
    gray = np.full((40, 30), 128)
    if mode in ('I', 'I;16', 'F'):
        image = Image.fromarray({'I': np.int32, 'I;16': np.uint16, 'F': np.float32}[mode](
            gray if mode == 'F' else gray * 257))
        assert image.mode == mode
    elif mode == 'PA':
        image = Image.new(mode, (30, 40))
    else:
        image = Image.fromarray(np.uint8(np.dstack([gray] * 3))).convert(mode)
    pixels = classifier.preprocess(image)
    assert pixels.shape == (3, 32, 32) and pixels.isfinite().all()
    if mode not in ('1', 'P', 'PA'):  # which have no such gray
        expected = classifier.preprocess(Image.new('RGB', (30, 40), (128, 128, 128)))
        torch.testing.assert_close(pixels, expected, rtol=0, atol=0.06)


@CASES
def test_fuzz_images(classifier, tmp_path, cases):
    files = []
    for kind, mode in (('png', 'RGB'), ('png', 'P'), ('jpeg', 'RGB'), ('jpeg', 'CMYK'), ('gif', 'P'), ('tiff', 'RGB'),
                       ('webp', 'RGBA'), ('bmp', 'RGB'), ('ppm', 'L')):
        buffer = io.BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)).convert(mode).save(
            buffer, kind)
        files.append(buffer.getvalue())

    @fuzz(cases, whole=st.sampled_from(files), **MUTATIONS)
    def run(whole, changes, end):
        (tmp_path / 'image').write_bytes(mutated(whole, changes, end))
        try:
            assert _read_image(str(tmp_path / 'image'), classifier).shape == (3, 32, 32)
        except Failed:
            pass


def parse(path, capsys):
    """Arguments from a recipe, or what is said against it."""
    try:
        return parse_args(['--config', str(path)])
    except SystemExit as e:
        message = capsys.readouterr().err.splitlines()[-1]
        assert e.code == 2 and message.startswith('python -m train: error: ') and len(message) < 2000
        return message


@pytest.mark.parametrize('text,words', [
    ('a: &a [x, x]\nb: &b [*a, *a]\n' + ''.join(
        f'{chr(99 + i)}: &{chr(99 + i)} [*{chr(98 + i)}, *{chr(98 + i)}]\n' for i in range(20)), "'a'"),
    ('opt_kwargs:\n  a: &a [x, x]\n' + ''.join(
        f'  {chr(98 + i)}: &{chr(98 + i)} [*{chr(97 + i)}, *{chr(97 + i)}]\n' for i in range(20)), 'opt_kwargs'),
    ('model_kwargs: &a {x: *a}', 'model_kwargs'), ('model_kwargs: {x: 2020-01-01}', 'model_kwargs'),
    ('- &a [*a]', 'list'), ('!!python/object/apply:os.mkdir [trap]', 'not a YAML recipe'), ('epochs: [1, 2]', 'epochs'),
    ('epochs: true', 'epochs'), ('epochs: .inf', 'epochs'), ('epochs: 1.5', 'epochs'), ('model: 3', 'model'),
    ('scale: 0.5', 'scale'), ('scale: [0.1, 0.2, 0.3]', 'scale'), ('amp: 1', 'amp'), ('sched: [cosine]', 'sched'),
    ('sched: sinus', 'sched'), ('? [a, b]\n: 1', 'not a YAML recipe'), ('[' * 3000, 'not a YAML recipe'),
    ('\0', 'not a YAML recipe'), ('x' * 2 ** 21, 'bytes'), ('lr: ' + '9' * 5000, ''), ('momentum: yes', 'momentum'),
], ids=range(22))
def test_recipes(text, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'recipe.yaml').write_text(text)
    message = parse(tmp_path / 'recipe.yaml', capsys)
    assert isinstance(message, str) and words in message
    assert not (tmp_path / 'trap').exists()


@CASES
def test_fuzz_recipes(tmp_path, capsys, cases):
    import yaml
    keys = [*vars(parse_args([])), 'more']

    @fuzz(cases, recipe=st.dictionaries(st.sampled_from(keys), VALUES, max_size=3) | VALUES, **MUTATIONS)
    def run(recipe, changes, end):
        path = tmp_path / 'recipe.yaml'
        path.write_bytes(mutated(yaml.safe_dump(recipe).encode(), changes, end))
        parse(path, capsys)

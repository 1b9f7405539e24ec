"""`timm-dresnet`: each command through its entry point, and what it says of bad input."""
import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import entry_points

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.models import save_for_hf

import timm_dresnet
from conftest import ROOT, rows
from timm_dresnet.images import Classifier, convert_image
from timm_dresnet.resnet import CIFAR10_CLASSES


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Run `timm-dresnet` in an empty folder: returns its exit status, output and messages."""
    command, = entry_points(group='console_scripts', name='timm-dresnet')
    main = command.load()
    monkeypatch.chdir(tmp_path)

    def call(*args):
        try:
            status = main([str(arg) for arg in args])
        except SystemExit as e:  # argparse
            status = e.code
        captured = capsys.readouterr()
        assert 'Traceback' not in captured.err
        return status, captured.out, captured.err
    return call


@pytest.fixture(scope='module')
def photos(tmp_path_factory):
    """Six images in two folders, of several modes and sizes."""
    folder = tmp_path_factory.mktemp('photos')
    random = np.random.default_rng(0)
    for i, (mode, size) in enumerate([('RGB', (40, 32)), ('L', (32, 32)), ('RGBA', (50, 60)), ('P', (33, 31)),
                                      ('CMYK', (32, 48)), ('RGB', (200, 100))]):
        path = folder / 'ab'[i % 2] / f'{i}.{"jpg" if mode == "CMYK" else "png"}'
        path.parent.mkdir(exist_ok=True)
        channels = random.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(channels).convert(mode).save(path)
    (folder / 'a/loop').symlink_to(folder)
    return folder


def loaded(folder):
    return timm.create_model(f'local-dir:{folder}', pretrained=True).eval()


def test_list(run):
    status, out, _ = run('list', 'test_*')
    assert status == 0
    lines = out.splitlines()
    assert lines[0].split() == ['model', 'parameters', 'image_size', 'weights', 'top1', 'dataset']
    assert [line.split()[0] for line in lines[1:]] == ['test_adaresnet.c10', 'test_dresnet.c10']
    measured = rows(ROOT / 'hub/zoo/test_dresnet.c10/validation.csv')[0]
    assert f'{float(measured["top1"]):.2f} %' in lines[2] and '0.10 M' in lines[2] and 'package' in lines[2]

    records = json.loads(run('list', '--json')[1])
    records = {record['model']: record for record in records}
    assert records['adaresnet50.init_a1_in1k']['weights'] == 'hub'
    assert records['dresnet18.init_a1_in1k']['parameters'] == 12_475_837  # of 1,000 classes
    assert records['dresnet18.tiny_in']['parameters'] == 12_475_837 - 800 * 513
    assert "'nothing*'" in run('list', 'nothing*')[2]


@torch.no_grad()
def test_classify(run, photos, tmp_path):
    status, out, err = run('classify', photos, '--json')
    records = [json.loads(line) for line in out.splitlines()]
    assert status == 0 and not err
    assert [record['image'] for record in records] == sorted(str(path) for path in photos.rglob('*.*'))
    model = timm.create_model('dresnet18', pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    for record in records:
        best = model(transform(Image.open(record['image']).convert('RGB'))[None]).softmax(1)[0].topk(5)
        assert [c['index'] for c in record['classes']] == best.indices.tolist()
        assert [c['probability'] for c in record['classes']] == pytest.approx(best.values.tolist(), rel=1e-3)

    (tmp_path / 'linked').mkdir()
    (tmp_path / 'linked/photos').symlink_to(photos)
    odd = os.fsdecode(os.fsencode(tmp_path) + b'/linked/\xff.png')  # not UTF-8
    shutil.copyfile(photos / 'a/0.png', odd)
    lines = run('classify', 'linked')[1].splitlines()
    assert len(lines) == len(records) + 1 and lines[-1].startswith('linked/\\udcff.png: ')

    path = records[0]['image']
    status, out, _ = run('classify', path, '--top', 2, '--model', 'test_adaresnet.c10')
    assert status == 0 and out.startswith(f'{path}: ') and out.count(' %') == 2


@pytest.mark.parametrize('names,classes,expected', [
    (['n01443537', 'n99999999'], 2, ['goldfish, Carassius auratus', 'n99999999']),
    ({'0': 'cat', '2': 'owl'}, 3, ['cat', 'class 1', 'owl']),
    (['cat', 'owl'], 3, ['class 0', 'class 1', 'class 2']),  # those of a classifier that was replaced
    (None, 1000, ['tench, Tinca tinca', 'goldfish, Carassius auratus']),
])
def test_class_names(names, classes, expected):
    model = timm.create_model('test_dresnet', num_classes=classes, pretrained_cfg_overlay=dict(label_names=names))
    labels = Classifier(model).labels
    assert len(labels) == classes and labels[:len(expected)] == expected


@pytest.mark.parametrize('mode,scale', [
    ('L', 1), ('I', 1), ('I', 256), ('I;16', 256), ('I;16', 257), ('I;16B', 257), ('I;16', 1 / 256), ('F', 1),
    ('F', 1 / 255)])
def test_images_of_more_bits(mode, scale):
    gray = np.arange(256, dtype=np.float64).reshape(16, 16)
    dtype = {'L': np.uint8, 'I': np.int32, 'I;16': '<u2', 'I;16B': '>u2', 'F': np.float32}[mode]
    image = Image.fromarray((gray * scale).astype(dtype))
    expected = Image.fromarray((gray * ((mode, scale) != ('I;16', 1 / 256))).astype(np.uint8))
    assert image.mode == mode and np.array_equal(convert_image(image, 'L'), expected)
    preprocess = Classifier(timm.create_model('test_dresnet', pretrained=True)).preprocess
    assert torch.equal(preprocess(image), preprocess(expected))


def test_classify_images_that_cannot_be_read(run, photos, tmp_path, monkeypatch):
    (tmp_path / 'text.png').write_text('%!PS-Adobe-3.0 EPSF-3.0\n')  # a program, which Ghostscript would run
    (tmp_path / 'cut.jpg').write_bytes((photos / 'a/4.jpg').read_bytes()[:300])
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 15_000)  # PIL warns above it, and raises above twice as many
    status, out, err = run('classify', 'text.png', photos / 'a/0.png', 'missing.png', 'cut.jpg', photos / 'b/5.png')
    assert status == 1 and len(out.splitlines()) == 1 and 'a/0.png: ' in out
    first, second, third, fourth = err.splitlines()
    assert "'text.png' cannot be read as an image" in first and "no file 'missing.png'" in second and 'cut.jpg' in third
    assert "b/5.png' cannot be read as an image (DecompressionBombWarning)" in fourth
    missing, first, second = run('classify', 'missing.png', *2 * [photos / 'a/0.png'], '--json')[1].splitlines()
    assert first == second != '' and 'missing.png' in missing


@pytest.mark.parametrize('args,words', [
    (['classify', 'x.png', '--model', 'dresnet81'], ['dresnet81', 'dresnet18']),
    (['classify', 'x.png', '--model', 'dresnet20_cifar.nowhere'], ["'nowhere': timm.list_pretrained('dresnet20_"]),
    (['classify', 'x.png', '--model', 'resnet20_cifar'], ['resnet20_cifar', 'without weights']),
    (['classify', 'x.png', '--model', 'output/none'], ['no folder', 'output/none']),
    (['classify', 'x.png', '--model', '.'], ['config.json']),
    (['connections', 'local-dir:photos'], ['photos holds no config.json']),
    (['connections', 'test_dresnet', '--out', 'map.xyz'], ['xyz', 'png']),
    (['prune', 'test_adaresnet', 'out', '--keep', '0.5'], ['test_adaresnet is not a DResNet']),
    (['fuse', 'test_dresnet', '/proc/nowhere/fused'], ['/proc/nowhere/fused', 'cannot be written']),
    (['fuse', 'test_dresnet', 'photos'], ['photos', 'not an empty folder']),
    (['fuse', 'test_dresnet', '.'], ['. is not an empty folder']),
    (['fuse', 'test_dresnet', 'photos/kept', '--force'], ['photos/kept is not a folder']),
    (['connections', 'test_dresnet', '--out', 'photos'], ['photos is a folder']),
    (['connections', 'test_dresnet', '--images', 'photos'], ['no images in photos']),
    (['connections', 'test_dresnet', '--images', 'photos/kept'], ['no image to measure on']),
    (['connections', 'resnet18'], ['resnet18 is not a DResNet or AdaResNet']),
    (['connections', 'adaresnet'], ['adaresnet', 'without weights']),
    (['connections', 'photos/kept'], ['photos/kept cannot be loaded as a checkpoint of python -m train']),
    (['fuse', 'weights.pth', 'out'], ['weights.pth cannot be loaded', 'checkpoint_path=FILE']),
    (['signal', '--untrained', 'photos'], ['photos has weights']),
    (['export', 'test_dresnet', 'out', '--format', 'onnx', '--int8'], ['--int8', '--images']),
    (['export', 'test_dresnet', 'out', '--images', 'photos'], ['--int8', '--images']),
], ids=' '.join)
def test_what_cannot_be_done(run, tmp_path, args, words):
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'photos/kept').touch()
    torch.save({'fc.bias': torch.zeros(10)}, tmp_path / 'weights.pth')
    status, out, err = run(*args)
    assert (status, out) == (1, '') and err.startswith(f'timm-dresnet {args[0]}: error: ')
    assert all(word in err for word in words) and len(err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.rglob('*')) == ['kept', 'photos', 'weights.pth']


@pytest.mark.parametrize('args', [
    [], ['classify', 'x.png', '--top', '0'], ['prune', 'test_dresnet', 'out', '--keep', '0.5', '--min-gate', '1'],
], ids=str)
def test_wrong_command_lines(run, args):
    status, out, err = run(*args)
    assert (status, out) == (2, '') and 'usage: timm-dresnet' in err


def test_help(run):
    out = run('--help')[1]
    for command in ('list', 'classify', 'connections', 'signal', 'fuse', 'prune', 'export'):
        assert command in out and f'examples:\n  timm-dresnet {command}' in run(command, '--help')[1]
    assert run('--version')[1].strip() == timm_dresnet.__version__


def test_connections(run, photos, tmp_path, caplog):
    model = timm.create_model('test_dresnet', pretrained=True)
    expected = timm_dresnet.connections(model)
    assert json.loads(run('connections', 'test_dresnet', '--json')[1]) == expected
    (tmp_path / 'broken.png').touch()
    _, out, err = run('connections', 'test_dresnet', '--images', photos, 'broken.png')
    assert "'broken.png' cannot be read as an image" in caplog.text and 'share: its part of the sum' in err
    table = out.splitlines()
    assert table[0].split()[-2:] == ['effect', 'share'] and len(table) == 1 + len(expected)
    save_for_hf(timm.create_model('test_adaresnet', num_classes=0), 'ada', safe_serialization=True)
    assert 'has no classes to choose from' in run('classify', photos, '--model', 'ada')[2]
    status, out, err = run('connections', 'ada', '--out', 'new/map', '--arcs', 'arcs.svg', '--images', photos)
    assert status == 0 and 'alpha' in out and err.startswith('Wrote new/map.png\nWrote arcs.svg\n')
    assert Image.open('new/map.png').size > (300, 300) and '<svg' in (tmp_path / 'arcs.svg').read_text()


def test_signal(run, photos):
    status, out, err = run('signal', '--untrained', 'plainnet20_cifar', 'test_dresnet', '--json', '--out', 'signal.pdf')
    signals = json.loads(out)
    assert status == 0 and err == 'Wrote signal.pdf\n' and list(signals) == ['plainnet20_cifar', 'test_dresnet']
    assert json.loads(run('signal', 'test_dresnet', '--json')[1])['test_dresnet'] != signals['test_dresnet']
    assert [len(signal['blocks']) for signal in signals.values()] == [9, 6]
    blocks, correlations = run('signal', 'test_adaresnet', '--images', photos)[1].split('\n\n')
    assert len(blocks.splitlines()) == 7 and 'variance' in blocks and 'correlation at' in correlations


@torch.no_grad()
def test_models_to_folders(run, photos, tmp_path):
    model, x = timm.create_model('test_dresnet', pretrained=True).eval(), torch.randn(2, 3, 32, 32)
    assert run('export', 'test_dresnet', 'models/exported')[0] == 0
    assert torch.equal(loaded('models/exported')(x), model(x))
    assert loaded('models/exported').pretrained_cfg['label_names'] == list(CIFAR10_CLASSES)

    status, out, err = run('prune', 'models/exported', 'models/pruned', '--keep', 0.5)
    assert status == 0 and not out and err.startswith('Removed 5 of 10 connections.\nWrote models/pruned, ')
    assert len(loaded('models/pruned').connection_pairs()) == 5

    assert 'holds model.safetensors, beside' in run(
        'export', 'test_adaresnet', 'models/exported', '--format', 'onnx', '--force')[2]
    assert run('fuse', 'models/exported', 'models/fused') == run('fuse', 'models/exported', 'models/fused', '--force')
    assert loaded('models/fused').fused
    torch.testing.assert_close(loaded('models/fused')(x), model(x), rtol=1e-4, atol=1e-4)
    answer, = run('classify', photos / 'a/0.png', '--model', 'models/fused', '--top', 1, '--json')[1].splitlines()
    assert json.loads(answer)['classes'][0]['label'] in CIFAR10_CLASSES

    import onnxruntime
    assert run('export', 'models/pruned', 'models/onnx', '--format', 'onnx')[0] == 0
    session = onnxruntime.InferenceSession(tmp_path / 'models/onnx/model.onnx')
    x = torch.randn(5, 3, 32, 32)
    output = session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    torch.testing.assert_close(torch.from_numpy(output), loaded('models/pruned')(x), rtol=1e-3, atol=1e-3)
    assert run('export', 'models/pruned', 'models/int8', '--format', 'onnx', '--int8', '--images', photos)[0] == 0
    files = [tmp_path / 'models' / folder / 'model.onnx' for folder in ('int8', 'onnx')]
    assert not [file for file in files if str(ROOT).encode() in file.read_bytes()]
    assert files[0].stat().st_size < files[1].stat().st_size / 2
    quantized = onnxruntime.InferenceSession(files[0]).run(None, {session.get_inputs()[0].name: x.numpy()})[0]
    assert np.corrcoef(quantized.ravel(), output.ravel())[0, 1] > 0.9
    config = json.loads((tmp_path / 'models/onnx/config.json').read_text())
    assert config['architecture'] == 'test_dresnet'
    assert {path.name for path in (tmp_path / 'models').iterdir()} == {'exported', 'fused', 'int8', 'onnx', 'pruned'}


def test_in_a_pipe(photos):
    first = subprocess.Popen(
        [sys.executable, '-m', 'timm_dresnet', 'classify', str(photos), '--json'], stdout=subprocess.PIPE,
        stderr=subprocess.PIPE)
    line = first.stdout.readline()
    first.stdout.close()  # like head -n 1
    assert json.loads(line)['image'] and first.wait() == 0 and first.stderr.read() == b''

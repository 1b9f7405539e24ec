"""`python -m train` on scikit-learn's digits."""
import csv
import subprocess
import sys

import pytest
import timm
import torch
from timm.data import create_transform, resolve_model_data_config

import timm_dresnet
from train.__main__ import main
from train.arguments import parse_args
from train.data import Digits

from conftest import ROOT

RECIPE = ROOT / 'train' / 'recipes' / 'digits.yaml'


def run_training(*args):
    return subprocess.run([sys.executable, '-m', 'train', *map(str, args)], cwd=ROOT, capture_output=True, text=True)


def accuracy(model, dataset):
    model.eval()
    config = resolve_model_data_config(model)
    transform = create_transform(**config, is_training=False)
    images = torch.stack([transform(image) for image, _ in dataset])
    with torch.inference_mode():
        return (model(images).argmax(1) == torch.tensor(dataset.targets)).float().mean().item()


def test_digits(digits_folder):
    folder = digits_folder
    assert {path.name for path in folder.iterdir()} >= {
        'model.safetensors', 'config.json', 'summary.csv', 'args.yaml', 'curves.png', 'connections.csv',
        'connections.png'}
    assert not [path for path in folder.iterdir() if path.name.startswith('.')]
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert isinstance(model, timm_dresnet.DResNet)
    assert model.pretrained_cfg['label_names'] == Digits.classes
    measured = accuracy(model, Digits('validation'))
    assert measured >= 0.97
    rows = list(csv.DictReader((folder / 'summary.csv').open()))
    assert len(rows) == 20 and float(rows[-1]['eval_top1']) == pytest.approx(100 * measured)
    again = vars(parse_args(['--config', str(folder / 'args.yaml')]))
    asked = vars(parse_args(['--config', str(RECIPE), '--output', str(folder.parent)]))
    assert {k: v for k, v in again.items() if k != 'config'} == {k: v for k, v in asked.items() if k != 'config'}


def test_written_connections_are_the_models(digits_folder):
    folder = digits_folder
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    rows = list(csv.DictReader((folder / 'connections.csv').open()))
    records = timm_dresnet.connections(model)
    assert len(rows) == len(records) == 28
    for row, record in zip(rows, records):
        assert (row['target_name'], row['source_name']) == (record['target_name'], record['source_name'])
        assert float(row['gate']) == pytest.approx(record['gate'])


@pytest.mark.parametrize('args', [
    ['--model', 'test_adaresnet', '--model-ema', '--model-ema-decay', 0.5, '--mixup', 0.2, '--bce-loss', '--amp',
     '--amp-dtype', 'bfloat16', '--opt', 'lamb', '--lr', 0.005, '--clip-grad', 1, '--workers', 0],
    ['--model', 'resnet20_cifar', '--grad-checkpointing', '--layer-decay', 0.8, '--reprob', 0.2, '--aa', 'rand-m3',
     '--torchcompile', 'aot_eager'],
    ['--model', 'test_dresnet', '--model-kwargs', 'gate=gauss', '--in-chans', 3, '--mean', 0.5, 0.5, 0.5, '--std', 0.5,
     0.5, 0.5, '--drop-path', 0.1, '--sched', 'multistep', '--decay-milestones', 1],
], ids=lambda args: args[1])
def test_other_arguments(args, tmp_path):
    done = run_training('--config', RECIPE, '--output', tmp_path, '--epochs', 2, '--warmup-epochs', 0, *args)
    assert done.returncode == 0, done.stderr
    model = timm.create_model(f'local-dir:{tmp_path / "digits"}', pretrained=True)
    mode = 'RGB' if '--in-chans' in args else 'L'
    rows = list(csv.DictReader((tmp_path / 'digits' / 'summary.csv').open()))
    tolerance = 0.03 if '--amp' in args else 0.003  # measured in bf16
    written = float(rows[-1]['eval_top1']) / 100
    assert accuracy(model, Digits('validation', mode)) == pytest.approx(written, abs=tolerance)
    assert (tmp_path / 'digits' / 'connections.png').exists() == (args[1] != 'resnet20_cifar')


def test_earlier_results_are_kept(tmp_path):
    (tmp_path / 'digits').mkdir()
    done = run_training(
        '--config', RECIPE, '--output', tmp_path, '--epochs', 1, '--warmup-epochs', 0, '--model', 'test_dresnet')
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / 'digits').iterdir())
    assert (tmp_path / 'digits-1' / 'model.safetensors').exists()


@pytest.mark.parametrize('args,words', [
    (['--model', 'dresnet20_cifra'], ["'dresnet20_cifra'", 'dresnet20_cifar']),
    (['--model-kwargs', 'gate=sigmod'], ['gate', 'sigmoid', 'sigmod']),
    (['--model-kwargs', 'gat=gauss'], ['dresnet20_cifar', 'gat']),
    (['--pretrained'], ['--pretrained', 'dresnet20_cifar']),
    (['--config', '/no/such/recipe.yaml'], ['/no/such/recipe.yaml', 'No such file']),
    (['--dataset', ''], ['--config', '--data-dir', '--dataset']),
    (['--val-split', 'test'], ['train', 'validation', "'test'"]),
    (['--dataset', '', '--data-dir', '/no/such/folder'], ['/no/such/folder']),
    (['--batch-size', '2000'], ['--batch-size', '2000']),
    (['--lr', '1e30'], ['loss', '--lr']),
    (['--epochs', 'many'], ['--epochs', 'many']),
])
def test_errors_are_one_sentence(args, words, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(['--config', str(RECIPE), '--output', str(tmp_path), *args])
    message = error.value.code  # argparse has its own way
    if isinstance(message, int):
        message = capsys.readouterr().err.strip().splitlines()[-1]
    assert all(word in message for word in words) and '\n' not in message


@pytest.mark.parametrize('text,words', [
    ('modle: resnet18', ["'modle'", 'model']),
    ('- a\n- b', ['key: value', 'list']),
    ('a: [', ['YAML']),
])
def test_wrong_recipes(text, words, tmp_path, capsys):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(text)
    with pytest.raises(SystemExit):
        parse_args(['--config', str(recipe)])
    message = capsys.readouterr().err
    assert all(word in message for word in [*words, str(recipe)])


def test_command_line_overrides_recipe():
    args = parse_args(['--config', str(RECIPE), '--epochs', '3'])
    assert (args.epochs, args.model, args.momentum) == (3, 'dresnet20_cifar', 0.9)


def test_digits_split():
    train, held_out = Digits('train'), Digits('validation')
    assert (len(train), len(held_out)) == (1437, 360)
    assert sorted(set(train.targets)) == sorted(set(held_out.targets)) == list(range(10))
    image, target = train[0]
    assert image.size == (8, 8) and image.mode == 'L' and 0 <= target <= 9
    again = Digits('train')
    assert (train.images == again.images).all() and (train.targets == again.targets).all()
    from sklearn.datasets import load_digits
    images = load_digits().images
    both = sorted(image.tobytes() for split in (train, held_out) for image in split.images)
    assert both == sorted((image * 255 / 16).round().astype('uint8').tobytes() for image in images)

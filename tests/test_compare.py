"""`python -m train.compare` and `python -m train.validate`."""
import re
import signal
import statistics
import subprocess
import sys

import pytest
import timm
import yaml
from timm.models import save_for_hf

from conftest import ROOT, check_error, rows
from test_data import write_digits
from test_resume import finish, wait_for
from timm_dresnet.resnet import CIFAR10_MEAN
from train import compare, validate
from train.__main__ import main
from train.arguments import create_parser
from train.compare import load_config
from train.datasets import Digits


def test_comparison(tmp_path):
    """Stopped in the first of four runs, then resumed."""
    config = tmp_path / 'small.yaml'
    config.write_text(yaml.safe_dump(dict(
        recipe='digits',
        seeds=[0, 1, 1],  # once each
        arguments=dict(epochs=2, warmup_epochs=0, workers=0),
        models={'Ada': dict(model='test_adaresnet'),
                'Dynamic, gauss': dict(model='test_dresnet', model_kwargs=dict(gate='gauss'))},
    )))
    command = [sys.executable, '-m', 'train.compare', '--config', str(config), '--output', str(tmp_path),
               '--val-interval', '1', '--experiment', 'each-has-its-own']
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    wait_for(process, 'Training')
    process.send_signal(signal.SIGTERM)
    assert 'Stopped' in finish(process, 128 + signal.SIGTERM)
    command += ['--bad-images', 'skip', '--log-interval', '7']  # what does not change what comes out
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / 'small'
    assert len(re.findall('Training', done.stderr)) == 3 and len(re.findall('Resuming', done.stderr)) == 1

    table = rows(folder / 'comparison.csv')
    assert [line['model'] for line in table] == ['Ada', 'Dynamic, gauss']
    for line, slug in zip(table, ('ada', 'dynamic-gauss')):
        histories = [rows(folder / f'{slug}-seed{seed}' / 'summary.csv') for seed in (0, 1)]
        accuracies = [[float(row['eval_top1']) for row in history] for history in histories]
        best, last = [max(values) for values in accuracies], [values[1] for values in accuracies]
        for key, values in (('best', best), ('last', last)):
            assert float(line[f'{key}_top1']) == pytest.approx(statistics.mean(values))
            assert float(line[f'{key}_top1_std']) == pytest.approx(statistics.stdev(values))
        model = timm.create_model(f'local-dir:{folder / f"{slug}-seed1"}', pretrained=True)
        assert int(line['parameters']) == sum(p.numel() for p in model.parameters())
        assert (line['epochs'], line['seeds']) == ('2', '2') and float(line['images_per_second']) > 0
    assert (folder / 'acc.png').read_bytes().startswith(b'\x89PNG')
    assert '| Dynamic, gauss | 10' in (folder / 'comparison.md').read_text()


@pytest.mark.parametrize('path', sorted((ROOT / 'train' / 'comparisons').glob('*.yaml')), ids=lambda path: path.stem)
@pytest.mark.parametrize('smoke', [False, True], ids=['', 'smoke'])
def test_comparisons(path, smoke):
    config = load_config(path.stem, smoke)
    assert len(config['seeds']) == (1 if smoke else 3) and len(config['models']) >= 2
    known = vars(create_parser().parse_args([]))
    for recipe in config['models'].values():
        assert set(recipe) <= set(known)
        timm.create_model(recipe['model'], **recipe.get('model_kwargs', {}), device='meta')
        assert (recipe.get('dataset') == 'digits') == smoke


@pytest.mark.parametrize('epochs,accuracy,factor', [
    (10, 29., '<= 1.00'), (10, 35., '1.41'), (10, 40., '2.00'), (10, 45., '2.83'), (10, 51., '> 4.00'),
    (20, 45., '1.41'),
])
def test_break_even(epochs, accuracy, factor):
    assert compare.break_even([(10, 30.), (40, 50.), (20, 40.)], epochs, accuracy) == factor


def test_comparison_at_equal_cost(tmp_path):
    """A baseline of several lengths, beside a network that takes longer for an image."""
    names = {'Res': (2, 30., 200.), 'Res, longer': (4, 40., 200.), 'Dynamic': (2, 35., 100.)}
    lines = [
        dict(model=name, epochs=epochs, last_top1=top1, last_top1_std=None, images_per_second=speed)
        for name, (epochs, top1, speed) in names.items()]
    compare.compare_cost(lines, ['Res', 'Res, longer'])
    assert [(line['time'], line['break_even']) for line in lines] == [(1., None), (1., None), (2., '1.41')]
    for families, drawn in (([['Res'], ['Dynamic']], False), ([['Res', 'Res, longer'], ['Dynamic']], True)):
        compare.draw_cost(lines, families, tmp_path)
        assert (tmp_path / 'cost.png').exists() == drawn


def test_speed(tmp_path):
    """Of all epochs together, of an epoch the median over seeds; and of a run whose only epoch has none."""
    save_for_hf(timm.create_model('test_resnet'), tmp_path, safe_serialization=True)
    summary = tmp_path / 'summary.csv'
    summary.write_text('epoch,train_images_per_second,eval_top1\n0,300,50.0\n1,100,60.0\n')
    assert compare.summarize('Res', 3 * [tmp_path])['images_per_second'] == pytest.approx(2 / (1 / 300 + 1 / 100))
    summary.write_text('epoch,train_images_per_second,eval_top1\n0,,50.0\n')
    line = compare.summarize('Res', [tmp_path])
    compare.compare_cost([line], ['Res'])
    compare.write_table([line], tmp_path)
    assert (tmp_path / 'comparison.md').read_text().endswith('| 50.00 | 50.00 | 1 | 1 | nan |  |\n')


@pytest.mark.slow
@pytest.mark.parametrize('name', [path.stem for path in (ROOT / 'train' / 'comparisons').glob('*.yaml')])
def test_smoke(name, tmp_path):
    compare.main(['--config', name, '--smoke', '--output', str(tmp_path)])
    table = rows(tmp_path / f'{name}-smoke' / 'comparison.csv')
    assert [line['model'] for line in table] == list(load_config(name)['models'])


@pytest.mark.parametrize('args,words', [
    (['--config', 'nothing'], ['nothing.yaml', 'cifar_depth']),
    (['--config', str(ROOT / 'train' / 'recipes' / 'digits.yaml')], ['digits.yaml', 'recipe']),
    (['--config', 'cifar_depth', '--models', 'ResNet-21'], ['ResNet-21', 'ResNet-20']),
    (['--config', 'cifar_depth', '--seed', '3'], ['--seed 3', '--seeds']),
    (['--config', 'cifar_depth', '--model', 'resnet18'], ['--model would', 'differ']),
    (['--config', 'equal_time', '--epochs', '10'], ['--epochs would', 'differ']),
    (['--config', 'cifar_depth', '--output', '/dev/null/x'], ['/dev/null']),
    (dict(seeds=3), ['small.yaml', 'int']),  # in a file
    (dict(seeds='123'), ['small.yaml', 'whole numbers']),
    (dict(models={}), ['small.yaml', 'needs models']),
    (dict(recipe='digit'), ['digit.yaml', 'there are: ', 'digits']),
    (dict(args={}), ['small.yaml', "unknown key 'args'"]),
    (dict(models={'DResNet, a': {}, 'dresnet a': {}}), ['DResNet, a', 'dresnet a', 'differ']),
    (dict(models={'α=1': {}, '?': {}}), ['differ']),
])
def test_errors_of_comparisons(args, words, tmp_path, capsys):
    if isinstance(args, dict):
        path = tmp_path / 'small.yaml'
        path.write_text(yaml.safe_dump({**dict(recipe='digits', seeds=[0], models={20: {}}), **args}))
        args = ['--config', str(path)]
    check_error('python -m train.compare', compare.main, args, words, capsys)


def test_a_training_that_is_killed_is_named(tmp_path, monkeypatch, capsys):
    python = tmp_path / 'python'
    python.write_text('#!/bin/sh\nkill -9 $$\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, 'executable', str(python))
    args = ['--config', 'cifar_depth', '--seeds', '7', '--models', 'ResNet-20', '--output', str(tmp_path)]
    check_error('python -m train.compare', compare.main, args, ['ResNet-20, seed 7', 'signal 9', 'resumes'], capsys)


def test_validate(digits_folder, capsys):
    checkpoint = digits_folder / 'last.pth.tar'
    validate.main([str(digits_folder), str(checkpoint), '--dataset', 'digits', '--workers', '0', '--img-size', '16',
                   '24'])
    lines = [re.split(r' *\| *', line)[1:-1] for line in capsys.readouterr().out.splitlines()[4:]]
    assert [line[:2] for line in lines] == [
        [str(name), size] for name in (digits_folder, checkpoint) for size in ('16x16', '24x24')]
    assert lines[0][2:] == lines[2][2:] and lines[1][2:] == lines[3][2:] and lines[0][2:] != lines[1][2:]
    last = rows(digits_folder / 'summary.csv')[-1]
    assert [float(value) for value in lines[0][2:]] == pytest.approx(
        [float(last[f'eval_{key}']) for key in ('top1', 'top5', 'loss')], abs=0.006)


def test_validate_at_the_size_of_the_run(tmp_path, capsys):
    """Which trains on batches of 718 images and not 1,000, so that few are left over."""
    main(['--dataset', 'digits', '--model', 'test_dresnet', '--num-classes', '10', '--in-chans', '1', '--input-size',
          '1', '16', '24', '--gp', 'max', '--epochs', '1', '--warmup-epochs', '0', '--sched', 'constant', '-b', '1000',
          '--workers', '0', '--output', str(tmp_path), '--experiment', 'digits'])
    last = rows(tmp_path / 'digits' / 'summary.csv')[-1]
    assert float(last['lr']) == pytest.approx(0.1 * 718 / 256)
    capsys.readouterr()
    models = [str(tmp_path / 'digits' / name) for name in ('', 'last.pth.tar')]
    validate.main([*models, '--dataset', 'digits', '--workers', '0', '-b', '1000'])
    for line in capsys.readouterr().out.splitlines()[4:]:
        assert line.split(' | ')[1:3] == ['16x24', f'{float(last["eval_top1"]):.2f}']
    model = timm.create_model(f'local-dir:{models[0]}')
    assert model.pretrained_cfg['mean'] == pytest.approx([sum(CIFAR10_MEAN) / 3])  # that of gray images


def test_validate_a_folder_of_images(digits_folder, tmp_path, capsys, caplog):
    """Whose classes are held against the model's, and one of which cannot be read."""
    write_digits(tmp_path, {}, {str(i): i for i in range(1, 10)})
    paths = sorted(tmp_path.glob('validation/*/*.png'))
    paths[5].write_bytes(b'')
    (tmp_path / 'classes.txt').write_text('\n'.join(Digits.classes))
    arguments = [str(digits_folder), '--data-dir', str(tmp_path), '--workers', '0', '--bad-images', 'skip']
    with pytest.raises(SystemExit, match='class 1 has number 0 in the data set and 1 in the model.*--class-map'):
        validate.main(arguments)
    validate.main([
        *arguments, '--class-map', str(tmp_path / 'classes.txt'), '--csv', str(tmp_path / 'x.csv')])
    assert f'On {len(paths) - 1} images:' in capsys.readouterr().out and '1 images cannot be read' in caplog.text
    line, = rows(tmp_path / 'x.csv')
    assert (line['model'], line['images']) == (str(digits_folder), str(len(paths) - 1)) and float(line['top1']) > 90
    for folder in (tmp_path / 'validation').iterdir():
        folder.rename(folder.with_name(f'digit {folder.name}'))
    validate.main(arguments)
    assert 'no class named digit 1 or digit 2 or digit 3: ' in caplog.text


def test_validate_on_some_classes_of_imagenet(tmp_path):
    images = write_digits(tmp_path / 'images', *2 * [dict(n01440764=1, n02102040=2)])
    arguments = ['--data-dir', str(images), '--workers', '0']
    save_for_hf(timm.create_model('test_resnet'), tmp_path / 'model', safe_serialization=True)
    with pytest.raises(SystemExit, match='class n02102040 has number 1 in the data set and 217 in the model'):
        validate.main([str(tmp_path / 'model'), *arguments])
    # but those that a network is trained on have the numbers that they have in the data set
    main([*arguments, '--model', 'test_dresnet', '--num-classes', '1000', '--epochs', '1', '--warmup-epochs', '0',
          '--output', str(tmp_path), '--experiment', 'run'])


def test_errors_of_validate(digits_folder, tmp_path, capsys):
    cut_short = tmp_path / 'last.pth.tar'
    cut_short.write_bytes((digits_folder / 'last.pth.tar').read_bytes()[:100_000])
    for args, word in ((['no_such_model'], 'no_such_model'),
                       (['plainnet18'], 'plainnet18 comes without weights'),
                       ([str(cut_short)], str(cut_short)),
                       ([str(digits_folder), str(cut_short), '--csv', str(tmp_path / 'x.csv')], str(cut_short)),
                       ([str(digits_folder), '--val-split', 'test'], 'validation')):
        args += ['--dataset', 'digits', '--workers', '0', '--img-size', '16']
        check_error('python -m train.validate', validate.main, args, [word], capsys)
    assert len(rows(tmp_path / 'x.csv')) == 1

"""`python -m train` on scikit-learn's digits."""
import argparse
import logging
import re
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import timm
import torch
import yaml
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config

import timm_dresnet
from conftest import ROOT, check_error, rows
from test_data import write_digits
from timm_dresnet.folders import load_checkpoint, load_folder
from timm_dresnet.pretrained import packaged_file
from train import validate
from train.__main__ import main
from train.arguments import parse_args
from train.build import create_model
from train.checkpoints import newest
from train.datasets import Digits, check_classes
from train.run import resume

RECIPE = ROOT / 'train' / 'recipes' / 'digits.yaml'


def accuracy(model, dataset):
    model.eval()
    config = resolve_model_data_config(model)
    transform = create_transform(**config, is_training=False)
    images, targets = zip(*((transform(image), target) for image, target in dataset))
    with torch.inference_mode():
        return (model(torch.stack(images)).argmax(1) == torch.tensor(targets)).float().mean().item()


def test_digits(digits_folder):
    folder = digits_folder
    assert {path.name for path in folder.iterdir()} >= {
        'model.safetensors', 'config.json', 'summary.csv', 'args.yaml', 'curves.png', 'connections.csv',
        'connections.png', 'connections_history.png'}
    assert (folder / 'model.safetensors').stat().st_mode == (folder / 'args.yaml').stat().st_mode
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert isinstance(model, timm_dresnet.DResNet)
    assert model.pretrained_cfg['label_names'] == Digits.classes and not model.pretrained_cfg.get('license')
    measured = accuracy(model, Digits('validation'))
    assert measured >= 0.97
    summary, history = rows(folder / 'summary.csv'), rows(folder / 'connections.csv')
    assert len(summary) == 20 and float(summary[-1]['eval_top1']) == pytest.approx(100 * measured)
    records = timm_dresnet.connections(model)
    assert len(records) == 28 and [int(row['epoch']) for row in history] == [e for e in range(-1, 20) for _ in records]
    for row, record in zip(history[-28:], records):
        assert (row['target_name'], row['source_name']) == (record['target_name'], record['source_name'])
        assert float(row['gate']) == pytest.approx(record['gate'])
    again = vars(parse_args(['--config', str(folder / 'args.yaml')]))
    asked = vars(parse_args(['--config', str(RECIPE), '--output', str(folder.parent)]))
    assert {k: v for k, v in again.items() if k != 'config'} == {k: v for k, v in asked.items() if k != 'config'}


def train(output, *args):
    main(['--config', str(RECIPE), '--output', str(output), '--epochs', '2', '--warmup-epochs', '0', '--workers', '0',
          *map(str, args)])
    return output / 'digits'


@pytest.mark.parametrize('args', [
    ['--model', 'test_adaresnet', '--pretrained', '--num-classes', 12, '--model-ema', '--model-ema-decay', 0.5,
     '--mixup', 0.2, '--bce-loss', '--bce-target-thresh', 0.2, '--amp', '--amp-dtype', 'bfloat16', '--opt', 'lamb',
     '--lr', 0.005, '--clip-grad', 1, '--aug-repeats', 3, '--mixup-off-epoch', 1],
    ['--model', 'test_resnet', '--grad-checkpointing', '--layer-decay', 0.8, '--reprob', 0.2, '--aa', 'rand-m3',
     '--torchcompile', 'aot_eager', '--clip-grad', 0.01, '--clip-mode', 'agc', '--model-ema', '--in-memory'],
    ['--model', 'test_dresnet', '--model-kwargs', 'gate=gauss', '--in-chans', 3, '--mean', 0.5, 0.5, 0.5, '--std', 0.5,
     0.5, 0.5, '--drop-path', 0.1, '--sched', 'multistep', '--decay-milestones', 1, '--aa', '3a', '--opt', 'muon',
     '--lr', 0.01, '--grad-accum-steps', 3, '--val-interval', 2, '--aug-repeats', 2.5, '--log-tensorboard'],
    ['--model', 'test_dresnet', '--opt', 'sgd', '--lr', 0.1, '--prune-connections', 0.4, 0.5, '--amp'],
    ['--model', 'test_dresnet', '--aa', 'original', '--opt', 'adahessian', '--lr', 0.05, '--sched', 'wsd',
     '--decay-epochs', 1, '--cutmix', 1, '--eval-metric', 'loss', '--checkpoint-hist', 2, '--gp',
     'avgmax'],
], ids=lambda args: args[1])
def test_other_arguments(args, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr('train.run.computes_bfloat16', lambda: '--amp' not in args)
    with caplog.at_level(logging.INFO, 'train'):
        folder = train(tmp_path, *args)
    assert ('This CPU trains faster in bfloat16' in caplog.text) == ('--amp' not in args)
    assert ('This CPU has neither AMX nor AVX-512 BF16' in caplog.text) == ('--amp' in args)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    mode = 'RGB' if '--in-chans' in args else 'L'
    summary = rows(folder / 'summary.csv')
    tolerance = 0.03 if '--amp' in args else 0.003  # measured in bf16
    written = float(summary[-1]['eval_top1']) / 100
    images = Digits('validation')
    images = [(image.convert(mode), target) for image, target in images]
    assert accuracy(model, images) == pytest.approx(written, abs=tolerance)
    assert bool(summary[0]['eval_top1']) == ('--val-interval' not in args)
    assert load_checkpoint(folder / 'last.pth.tar').state_dict().keys() == model.state_dict().keys()
    assert (folder / 'connections.png').exists() == (args[1] != 'test_resnet')
    assert bool(list(folder.glob('events.out.tfevents*'))) == ('--log-tensorboard' in args)
    scaled = '--amp' in args and '--amp-dtype' not in args  # in float16 gradients would underflow
    assert ('amp_scaler' in torch.load(folder / 'last.pth.tar', weights_only=False)) == scaled
    if '--pretrained' in args:  # tag and classes of the weights it started from are gone
        text = (folder / 'config.json').read_text()
        assert 'c10' not in text and 'airplane' not in text and '"label_names"' not in text


def test_the_same_command_again(tmp_path, caplog):
    """Changes nothing, also after its images have moved; other images or another seed are another run."""
    first = write_digits(tmp_path / 'odd', dict(a=1, b=3))
    second = write_digits(tmp_path / 'even', dict(c=2, d=4))
    args = ['--model', 'test_dresnet', '--dataset', '', '--num-classes', 2, '--epochs', 1, '--batch-size', 20]
    train(tmp_path, *args, '--data-dir', first)
    train(tmp_path, *args, '--data-dir', second)
    train(tmp_path, *args, '--data-dir', second, '--seed', 1)
    runs = [tmp_path / name for name in ('digits', 'digits-1', 'digits-2')]
    assert [load_folder(run).pretrained_cfg['label_names'] for run in runs] == [
        ['a', 'b'], ['c', 'd'], ['c', 'd']]
    weights = (runs[1] / 'model.safetensors').stat()
    (tmp_path / 'moved').mkdir()
    with caplog.at_level(logging.INFO, 'train'):
        train(tmp_path, *args, '--workers', 1, '--data-dir', second.rename(tmp_path / 'moved' / 'even'))
    assert str(runs[1]) in caplog.text and 'already' in caplog.text
    assert (runs[1] / 'model.safetensors').stat() == weights


def test_other_classes_than_before(tmp_path, capsys, caplog):
    """End a run that resumes and one that is finished, of four channels; checkpoints have their names of classes."""
    folder = write_digits(tmp_path / 'images', dict(a=1, b=2, c=3))
    args = ['--model', 'test_dresnet', '--dataset', '', '--num-classes', 3, '--in-chans', 4, '--data-dir', folder,
            '--batch-size', 20]
    output = train(tmp_path, *args)
    validate.main([str(output), str(output / 'last.pth.tar'), '--data-dir', str(folder), '--workers', '0'])
    assert load_checkpoint(output / 'last.pth.tar').pretrained_cfg['label_names'] == ['a', 'b', 'c']
    for split in ('train', 'validation'):
        (folder / split / 'b').rename(folder / split / 'd')
    with pytest.raises(SystemExit, match='class c has number 1 in the data set and 2 in the model'):
        train(tmp_path, *args)
    (output / 'model.safetensors').unlink()
    with pytest.raises(SystemExit, match='was trained with other classes than the data set has .b, d.'):
        train(tmp_path, *args)


def test_classes_that_do_not_fit(tmp_path):
    """Else the numbers of classes mean one thing in training and another in validation."""
    folder = write_digits(tmp_path / 'images', dict(a=1, b=2, c=3), dict(a=1, c=3))
    of_folder = ['--model', 'test_dresnet', '--dataset', '', '--data-dir', folder]
    fewer = 'training has 3 classes, validation 2, and not the same ones: b. .* by --class-map'
    for args, message in (
            ([*of_folder, '--num-classes', 3], fewer),
            (of_folder, fewer),
            ([*of_folder, '--num-classes', 2], '3 classes, the model 2: see --num-classes')):
        with pytest.raises(SystemExit, match=message):
            train(tmp_path, *args)
    imagenet = SimpleNamespace(classes=[('crane', 'a bird'), ('ox',), ('crane', 'a machine')])  # as torchvision has it
    check_classes(imagenet, 3, ['crane', 'ox', 'crane'])
    with pytest.raises(ValueError, match='the class crane has number 0 in the data set and 1 in the model'):
        check_classes(imagenet, 3, ['ox', 'crane', 'crane'])
    with pytest.raises(SystemExit, match='the data set has 10 classes, the model 1000: say --num-classes 10, or 1000'):
        main(['--dataset', 'digits', '--model', 'dresnet18', '--in-chans', '1', '--output', str(tmp_path)])
    with pytest.raises(SystemExit, match='--pretrained-path needs --num-classes'):
        main(['--dataset', 'digits', '--pretrained-path', 'x.safetensors', '--output', str(tmp_path)])


@pytest.mark.parametrize('args,head', [
    (['--pretrained-path', '--linear-probe'], True),
    (['--pretrained-path', '--lr', 1e-9, '--weight-decay', 0, '--bn-momentum', 0], True),
    (['--initial-checkpoint', '--lr', 1e-9, '--weight-decay', 0, '--bn-momentum', 0], False),
], ids=str)
def test_fine_tuning_starts_from_the_file(args, head, digits_folder, tmp_path):
    file = digits_folder / 'model.safetensors'
    folder = train(tmp_path, args[0], file, *args[1:], '--epochs', 1)
    before, after = load_file(file), load_file(folder / 'model.safetensors')
    changed = {key for key in before if not torch.allclose(before[key], after[key], atol=1e-5)}
    assert {key for key in changed if 'num_batches' not in key} == ({'fc.weight', 'fc.bias'} if head else set())


def test_linear_probe_of_two_classifiers():
    args = parse_args(['--model', 'deit_tiny_distilled_patch16_224', '--num-classes', '3', '--linear-probe'])
    model = create_model(args)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {'head.weight', 'head.bias', 'head_dist.weight', 'head_dist.bias'}


@pytest.mark.parametrize('error,sentence', [
    (EOFError(), 'DataLoader worker was killed. If memory ran out, use fewer --workers.'),  # in the hand-over
    (RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed. '),
     'DataLoader worker (pid 7) is killed by signal: Killed. If memory ran out, use fewer --workers.'),
    (PermissionError(13, 'Permission denied', 'x/summary.csv'), "[Errno 13] Permission denied: 'x/summary.csv'."),
    (RuntimeError('a defect'), None),  # keeps its traceback
], ids=repr)
def test_errors_in_an_epoch(tmp_path, monkeypatch, error, sentence):
    monkeypatch.setattr('train.run.train_one_epoch', Mock(side_effect=error))
    monkeypatch.setenv('RANK', '3')
    message = f'error: process 3: {sentence} There is no checkpoint yet; the same command resumes'
    with pytest.raises(SystemExit if sentence else type(error), match=re.escape(message if sentence else str(error))):
        train(tmp_path, '--model', 'test_dresnet')


def test_the_newest_whole_checkpoint(digits_folder, tmp_path):
    checkpoint = torch.load(digits_folder / 'last.pth.tar', weights_only=False)
    assert newest(tmp_path) is None
    for name, epoch, batch in (('last', 3, 0), ('checkpoint-1', 2, 0), ('recovery-3-8', 3, 8), ('recovery-3-4', 3, 4),
                               ('recovery_tmp', 9, 0), ('tmp', 9, 0)):
        checkpoint['task_state'].update(epoch=epoch, batch=batch)
        torch.save(checkpoint, tmp_path / f'{name}.pth.tar')
    for expected in ('recovery-3-8', 'recovery-3-4', 'last', 'checkpoint-1'):
        path = newest(tmp_path)
        assert path.name == f'{expected}.pth.tar'
        path.write_bytes(path.read_bytes()[:-1000])
    assert newest(tmp_path) is None


def test_checkpoint_of_another_run(digits_folder, tmp_path):
    for name, text in ('digits', ''), ('digits-1', '- a'), ('digits-2', 'a: [1'):  # as an editor may leave it
        (tmp_path / name).mkdir()
        (tmp_path / name / 'args.yaml').write_text(text)
    folder = train(tmp_path, '--model', 'test_dresnet', '--epochs', 1).with_name('digits-3')
    (folder / 'model.safetensors').unlink()
    (folder / 'last.pth.tar').write_bytes((digits_folder / 'last.pth.tar').read_bytes())
    with pytest.raises(SystemExit, match='pth.tar does not fit this run') as error:
        train(tmp_path, '--model', 'test_dresnet', '--epochs', 1)
    assert len(error.value.code) < 1000 and '\n' not in error.value.code


def test_checkpoint_on_another_machine(tmp_path):
    with pytest.raises(ValueError, match='last.pth.tar is not on this machine: --output'):
        resume(Mock(), tmp_path / 'last.pth.tar')


def test_checkpoint_of_timm(tmp_path):
    def load(name, made_with, **args):
        args = argparse.Namespace(model=name, num_classes=5, **args)
        state_dict = timm.create_model(name, num_classes=5, **made_with).state_dict()
        torch.save(dict(state_dict=state_dict, args=args), tmp_path / 'last.pth.tar')
        return load_checkpoint(tmp_path / 'last.pth.tar')

    loaded = load('resnet18', dict(in_chans=1), in_chans=1, img_size=64, crop_pct=0.9)
    config = timm.data.resolve_model_data_config(loaded, use_test_size=True)
    assert (config['input_size'], config['crop_pct'], len(config['mean'])) == ((1, 64, 64), 0.9, 1)
    assert not {'tag', 'license'} & loaded.pretrained_cfg.keys()
    swsl = dict(grown_from='resnet18.fb_swsl_ig1b_ft_in1k')
    loaded = load('dresnet', dict(grown_from='resnet18'), pretrained=True, model_kwargs=swsl)
    assert loaded.pretrained_cfg['license'] == 'cc-by-nc-4.0'
    loaded = load('dresnet18', {}, pretrained=True, pretrained_path='weights.pth')
    assert loaded.pretrained_cfg['input_size'] == (3, 224, 224)  # not that of the packaged weights, 64x64


def test_loss_that_is_not_finite(tmp_path):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(RECIPE.read_text().replace('sched_on_updates: true', ''))
    with pytest.raises(SystemExit) as error:
        train(tmp_path, '--config', recipe, '--model', 'test_dresnet', '--lr', 1e30, '--warmup-epochs', 1,
              '--warmup-lr', 1e-3)
    message = error.value.code
    assert 'loss is nan at update' in message and 'epoch 2' in message and str(tmp_path / 'digits') in message
    state = torch.load(newest(tmp_path / 'digits'), weights_only=False)['state_dict']
    assert all(value.isfinite().all() for value in state.values())


@pytest.mark.parametrize('args,words', [
    (['--model', 'dresnet20_cifra'], ["'dresnet20_cifra'", 'dresnet20_cifar']),
    (['--model', 'dresnet20_cifar.c100'], ["'dresnet20_cifar.c100'", 'Invalid pretrained tag']),
    (['--model-kwargs', 'gat=gauss'], ['dresnet20_cifar', 'gat']),
    (['--model-kwargs', 'act_layer=reluu'], ['dresnet20_cifar', 'reluu']),
    (['--pretrained', '--model', 'dresnet56_cifar'], ['--pretrained', 'dresnet56_cifar']),
    (['--config', '/no/such/recipe.yaml'], ['/no/such/recipe.yaml', 'No such file']),
    (['--dataset', ''], ['--config', '--data-dir', '--dataset']),
    (['--batch-size', '2000', '--aug-repeats', '1'], ['1437 images', 'batch of 2000']),
    (['--epochs', '0'], ['--epochs', "'0'"]),
    (['--aa', 'rnad-m7'], ['--aa rnad-m7', 'Unknown']),
    (['--opt', 'fusedadam'], ['--opt fusedadam', 'required']),
    (['--opt-kwargs', 'speed=1'], ['sgd', '--opt-kwargs', 'speed']),
    (['--opt', 'adamw', '--opt-betas', '0.9'], ['adamw', '--opt-betas [0.9]']),
    (['--torchcompile', 'inducter'], ['--torchcompile inducter', 'inductor']),
    (['--input-img-mode', 'XX'], ['--input-img-mode', "'XX'", 'RGB']),
    (['--device', 'abacus'], ['--device abacus']),
    (['--device', 'cpu', '--sync-bn'], ['--sync-bn needs CUDA']),
    (['--smoothing', '1'], ['--smoothing must be']),
    (['--pretrained-path', __file__], ['test_train.py', 'weights_only']),
    (['--dataset', 'torch/cifar10'], ['--dataset torch/cifar10 --data-dir None']),
    (['--initial-checkpoint', packaged_file('dresnet20_cifar.c10'), '--num-classes', '12', '--in-chans', '3'],
     ['dresnet20_cifar.c10', 'size mismatch for fc.weight']),
    (['--model-kwargs', 'inference_mode=True'], ['dresnet20_cifar', 'fused']),
    (['--prune-connections', '0.5', '2'], ['--prune-connections', 'between 0 and 1']),
    (['--prune-connections', '0.5', 'inf'], ['--prune-connections', 'between 0 and 1']),
    (['--prune-connections', '0.5', '0.9', '--epochs', '3'], ['--prune-connections', 'of 3, at least one and not all']),
    (['--prune-connections', '0.5', '0.5', '--model', 'test_adaresnet'], ['test_adaresnet', 'no connections']),
])
def test_errors_are_one_sentence(args, words, tmp_path, capsys):
    check_error('python -m train', main, ['--config', str(RECIPE), '--output', str(tmp_path), *args], words, capsys)


@pytest.mark.parametrize('text,words', [
    ('modle: resnet18', ["'modle'", 'model']),
    ('- a\n- b', ['key: value', 'list']),
    ('a: [', ['not a YAML recipe']),
    ('!!python/object/apply:os.mkdir [trap]', ['not a YAML recipe']),
    ('momentum: yes', ['--momentum', 'True']),
    ('smoothing: null', ['smoothing needs a value']),
    ('sched: sinus', ['--sched', 'sinus', 'cosine']),
])
def test_wrong_recipes(text, words, tmp_path, capsys):
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(text)
    check_error('python -m train', parse_args, ['--config', str(recipe)], [*words, str(recipe)], capsys)


def test_recipe_becomes_arguments(tmp_path):
    """YAML reads 8e-2 as text; the command line overrides."""
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('scale: [8e-2, 1]\nepochs: 10\nlr: 1e-3\ncolor_jitter: null\nmixup: null\nchannels_last: true\n'
                      'torchcompile: false\n')
    args = parse_args(['--config', str(recipe), '--epochs', '3', '--no-channels-last', '--amp'])
    assert (args.scale, args.lr, args.color_jitter, args.mixup) == ([0.08, 1.], 0.001, None, 0.)
    assert args.torchcompile is None
    assert (args.epochs, args.channels_last, args.amp, args.deterministic) == (3, False, True, False)


def test_nested_arguments_of_recipes(tmp_path):
    """A run that was started with them on the command line can be run again."""
    given = parse_args(
        ['--model-kwargs', 'pruned_connections=[(3, 1)]', "block_args={'attn_layer': 'se'}"]).model_kwargs
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(yaml.safe_dump(dict(model_kwargs=given)))
    first, again = (timm.create_model('test_dresnet', **kwargs) for kwargs in (
        given, parse_args(['--config', str(recipe)]).model_kwargs))
    assert first.state_dict().keys() == again.state_dict().keys() and (3, 1) not in again.connection_pairs()


@pytest.mark.parametrize('recipe', sorted((ROOT / 'train' / 'recipes').glob('*.yaml')), ids=lambda path: path.stem)
def test_recipes(recipe):
    assert timm.is_model(parse_args(['--config', str(recipe)]).model)
    keys = set(yaml.safe_load(recipe.read_text()))
    ours = {'in_memory', 'bad_images', 'linear_probe', 'deterministic', 'log_tensorboard', 'worker_timeout'}
    assert not keys & ours  # timm's train.py does not know them

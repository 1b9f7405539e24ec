"""`python -m train.benchmark`."""
import json
import re
import statistics
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn

from conftest import check_error
from test_maths import randomize
from train import benchmark
from train.benchmark import TrainingStep, count_multiply_adds, prepare_for_inference

TIMES = ('image_seconds', 'batch_seconds', 'step_seconds')


def test_report(monkeypatch, capsys, tmp_path):
    """A model of a baseline, and the baseline of itself."""
    monkeypatch.setattr(benchmark, '_SAMPLE_SECONDS', 0.)
    arguments = ['--models', 'test_dresnet', 'test_resnet', '--baseline', 'test_resnet', '--img-size', '32', '-b', '2',
                 '--rounds', '3', '--device', 'cpu', '--md', str(tmp_path / 'x.md'), '--json', str(tmp_path / 'x.json')]
    benchmark.main(arguments)
    text = capsys.readouterr().out
    results = json.loads((tmp_path / 'x.json').read_text())['results']
    assert (tmp_path / 'x.md').read_text() == text
    assert text.startswith('`python -m train.benchmark ' + ' '.join(arguments) + '`\n')
    for setup in ('CPU: ', f'threads: {torch.get_num_threads()};', f'timm: {timm.__version__};', 'rounds: 3\n'):
        assert setup in text

    _, _, *lines = (re.split(r' *\| *', line)[1:-1] for line in text.splitlines() if line.startswith('|'))
    folded = 'test_resnet, norms folded'
    assert [line[:2] for line in lines] == [
        ['test_resnet', ''], [folded, ''],
        ['test_dresnet', 'test_resnet'], ['test_dresnet, fused', 'test_resnet'], ['test_dresnet, fused', folded],
        ['test_resnet', ''], [folded, ''],
        ['test_resnet', 'test_resnet'], [folded, 'test_resnet'], [folded, folded],
    ]
    model, baseline = (results[0]['variants'][key] for key in ('model', 'baseline'))
    assert model['parameters'] == sum(
        p.numel() for p in timm.create_model('test_dresnet', num_classes=1000).parameters())
    for cell, column in zip(lines[2][5:8], TIMES):
        each = [a / b for a, b in zip(model[column], baseline[column])]
        assert len(each) == 3 and min(each) > 0 and cell.startswith(f'{statistics.median(each):.2f} (')
    assert [lines[7][i] for i in (3, 4, 8)] == ['1.000'] * 3  # the baseline of itself
    batch = statistics.median(baseline['batch_seconds'])
    assert lines[0][3] == f'{baseline["parameters"]:,}' and lines[0][6] == f'{2 / batch:.1f} images/s'


def test_arguments_of_models(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, '_SAMPLE_SECONDS', 0.)
    benchmark.main(['--models', 'test_dresnet', '--baseline', 'test_resnet', '--model-kwargs', 'connected_stages=1',
                    '--img-size', '32', '-b', '2', '--rounds', '1', '--device', 'cpu'])
    models = (timm.create_model('test_dresnet', num_classes=1000, connected_stages=1), timm.create_model('test_resnet'))
    parameters, of = (sum(p.numel() for p in model.parameters()) for model in models)
    row = f'| test_dresnet connected_stages=1 | test_resnet | 2x3x32x32 | {parameters / of:.3f} |'
    assert row in capsys.readouterr().out


@pytest.mark.parametrize('name,what', [('test_dresnet', 'fused'), ('test_resnet', 'norms folded'), ('test_vit', None)])
def test_prepare_for_inference(name, what):
    model = timm.create_model(name).eval()
    randomize(model)
    prepared = prepare_for_inference(model)
    assert (prepared and prepared[0]) == what
    if prepared:
        x = torch.randn(2, *model.pretrained_cfg['input_size'])
        with torch.inference_mode():
            torch.testing.assert_close(prepared[1](x), model(x), rtol=1e-4, atol=1e-4)
        assert not [n for n, m in prepared[1].layer1.named_modules() if isinstance(m, nn.BatchNorm2d)]


def test_peak_memory_of_a_training_step():
    """The gradient of the weight is the last and largest tensor, made from that of the logits."""
    model = nn.Linear(64, 32, bias=False)
    step = TrainingStep(model, torch.randn(16, 64), partial(torch.autocast, 'cpu', enabled=False))
    weight, images, targets, logits = 4 * 64 * 32, 4 * 16 * 64, 8 * 16, 4 * 16 * 32
    before = model.weight.detach().clone()
    peak = weight + weight + images + targets + logits + weight  # of the weights: itself, momentum, gradient
    assert 0 <= step.peak_memory() - peak <= 16  # some scalars of the loss
    assert step.peak_memory() == step.peak_memory()
    assert model.weight.grad is None and torch.equal(model.weight, before)


def test_multiply_adds():
    assert count_multiply_adds(nn.Conv2d(3, 8, 3, padding=1), (3, 4, 4)) == 16 * 8 * 27


@pytest.mark.parametrize('args,words', [
    (['--models', 'test_dresnett', '--baseline', 'test_resnet'], ['test_dresnett', 'did you mean test_dresnet']),
    (['--models', 'test_dresnet'], ['--baseline']),
    (['--all', '--models', 'test_dresnet', '--baseline', 'test_resnet'], ['--all excludes them']),
    (['--model-kwargs', 'gate=gauss'], ['--model-kwargs needs them']),
    (['--models', 'test_dresnet', '--baseline', 'test_resnet', '--model-kwargs', 'gat=gauss'], ["no argument 'gat'"]),
    (['--models', 'local-dir:/no/such', '--baseline', 'test_resnet'], ['/no/such']),
    (['--batch-size', '1'], ['--batch-size must be 2 or more']),
    (['--cuda-graphs'], ['--cuda-graphs', 'cpu']),
    (['--md', 'no/such/x.md'], ['there is no folder no/such']),
    (['--device', 'nothing'], ['--device nothing']),
])
def test_errors(args, words, capsys):
    check_error('python -m train.benchmark', benchmark.main, ['--device', 'cpu', *args], words, capsys)

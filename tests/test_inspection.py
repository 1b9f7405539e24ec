"""Records and pictures of learned connections, and of the signal."""
import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image
from timm.utils import ModelEmaV3

import naive
import timm_dresnet
from conftest import ROOT, rows
from test_maths import create


def images(count=4, size=32, dtype=torch.float32):
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(3), dtype=dtype)


def part_of(part, whole):
    """Effect and share."""
    return (part.norm() / whole.norm()).item(), ((part * whole).sum() / (whole * whole).sum()).item()


@pytest.mark.parametrize('gate,value', [('sigmoid', 0.668188), ('gauss', 0.00744658), ('linear', 0.7)])  # k = 10
def test_records_of_a_dresnet(gate, value):
    model = timm.create_model('dresnet18', gate=gate)
    records = timm_dresnet.connections(model)
    assert [(r['target'], r['source']) for r in records] == [(i, k) for i in range(3, 9) for k in range(1, i - 1)]
    assert all(record['gate'] == pytest.approx(0.5 / (record['target'] - 2)) for record in records)
    with torch.no_grad():
        model.connections['layer3'].gates['7'].weight[2] = 0.7  # layer3's output is the input of block 7
    record, = (r for r in timm_dresnet.connections(model) if (r['target'], r['source']) == (7, 3))
    assert (record['target_name'], record['source_name']) == ('layer4.0', 'layer2.0')
    assert (record['weight'], record['gate']) == pytest.approx((0.7, value), rel=1e-4)
    assert record.get('sharpness') == (pytest.approx(10.) if gate == 'gauss' else None)
    model = timm.create_model('dresnet18', gate=gate, gate_init=0.3)
    assert all(record['gate'] == pytest.approx(0.3) for record in timm_dresnet.connections(model))


def test_records_of_an_adaresnet():
    model = timm.create_model('adaresnet18', skip_weight='per_kind', skip_init=0.25)
    with torch.no_grad():
        model.layer2[0].skip_weight.alpha.fill_(-1.)
    records = timm_dresnet.connections(model)
    assert [r['kind'] for r in records] == ['identity'] * 2 + ['projection', 'identity'] * 3
    assert [r['alpha'] for r in records] == [0.25] * 2 + [-1., 0.25] * 3
    assert [r['target_name'] for r in records][:3] == ['layer1.0', 'layer1.1', 'layer2.0']
    records = timm_dresnet.connections(timm.create_model('adaresnet18', skip_init=-1.), images())
    assert [r['share'] for r in records] == [1.] + [0.] * 7  # nothing is left behind the first block


@pytest.mark.parametrize('arch', ['test_dresnet', 'test_adaresnet'])
def test_wrapped(arch):
    model = timm.create_model(arch).eval()
    wrapped = torch.compile(ModelEmaV3(nn.DataParallel(model)))
    assert timm_dresnet.connections(wrapped, images()) == timm_dresnet.connections(model, images())
    assert arch in timm_dresnet.plot_connections(wrapped).get_suptitle()
    expected = timm_dresnet.connections(model, images())
    model.compile(backend='eager')
    with torch.no_grad():
        model(images())
    assert timm_dresnet.connections(model, images()) == expected  # by hooks that compiled code would not call


@pytest.mark.parametrize('name,kwargs', [
    ('dresnet18', dict(gate='gauss', connection_rank=5)), ('dresnet20_cifar', dict(gate='linear')),
], ids=str)
@torch.no_grad()
def test_what_comes_through_each_connection(name, kwargs):
    model = create(name, **kwargs).eval()
    x = images(dtype=torch.float64)
    records = timm_dresnet.connections(model, x)
    for i, (y, terms) in enumerate(naive.block_inputs(model, kwargs['gate'], x, []), start=1):
        whole = y + sum(terms.values())
        found = [record for record in records if record['target'] == i]
        assert [record['source'] for record in found] == list(terms)
        for record in found:
            assert (record['effect'], record['share']) == pytest.approx(part_of(terms[record['source']], whole), 1e-6)
        total = part_of(y, whole)[1] + sum(record['share'] for record in found)
        assert total == pytest.approx(1, abs=1e-9)


@torch.no_grad()
def test_what_comes_through_each_shortcut():
    model = create('adaresnet18').eval()
    for j, parameter in enumerate(p for n, p in model.named_parameters() if n.endswith('alpha')):
        parameter.fill_(0.3 * (-1) ** j)
    records = timm_dresnet.connections(model, images(dtype=torch.float64))
    x = model.maxpool(model.act1(model.bn1(model.conv1(images(dtype=torch.float64)))))
    for record in records:
        block = model.get_submodule(record['target_name'])
        shortcut = record['alpha'] * (x if block.downsample is None else block.downsample(x))
        branch = block.branch(x)
        expected = part_of(shortcut, branch + shortcut)
        assert (record['effect'], record['share']) == pytest.approx(expected, rel=1e-6)
        assert record['share'] + part_of(branch, branch + shortcut)[1] == pytest.approx(1, abs=1e-9)
        x = F.relu(branch + shortcut)


def state_of(model):
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()]
    return hooks, [module.training for module in model.modules()], [p.requires_grad for p in model.parameters()]


@pytest.mark.parametrize('measure', [timm_dresnet.connections, timm_dresnet.signal_propagation])
@pytest.mark.parametrize('name,kwargs', [
    ('test_dresnet', {}), ('test_adaresnet', {}), ('test_adaresnet', dict(skip_weight='shared'))], ids=str)
def test_measuring_leaves_no_trace(name, kwargs, measure):
    model = timm.create_model(name, **kwargs).train()
    model.set_grad_checkpointing()
    parameters = list(model.parameters())
    model.layer2.eval()
    model.conv1.weight.requires_grad_(False)
    before = state_of(model)
    tensors = {key: value.clone() for key, value in model.state_dict().items()}
    measure(model, images())
    assert state_of(model) == before
    assert all(torch.equal(value, tensors[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    with pytest.raises(RuntimeError):
        measure(model, images()[:, :1])
    assert state_of(model) == before


def test_signal_of_a_network():
    model, x = create('test_dresnet').eval().float(), images()
    targets = torch.tensor([1, 0, 3, 2])
    signal = timm_dresnet.signal_propagation(model, x, targets, num_points=3)
    outputs = {}
    for name in [f'{stage}.{j}' for stage in model.stage_names for j in range(len(getattr(model, stage)))]:
        model.get_submodule(name).register_forward_hook(lambda m, args, y, name=name: outputs.update({name: y}))
    logits = model(x)
    for y in outputs.values():
        y.retain_grad()
    F.cross_entropy(logits, targets).backward()
    assert [record['name'] for record in signal['blocks']] == list(outputs)
    for record, y in zip(signal['blocks'], outputs.values()):
        pixels = y.detach().transpose(0, 1).flatten(1)
        variance = ((pixels - pixels.mean(1, keepdim=True)) ** 2).sum(1) / (pixels.shape[1] - 1)
        expected = pixels.mean().item(), variance.mean().item(), y.grad.norm().item()
        assert (record['mean'], record['variance'], record['gradient_norm']) == pytest.approx(expected, rel=1e-4)
    weights = {record['name']: record for record in signal['layers']}
    assert set(weights) == {n for n, module in model.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}
    for name, record in weights.items():
        weight = model.get_submodule(name).weight
        assert record['gradient_norm'] == pytest.approx(weight.grad.norm().item(), rel=1e-4)
        assert record['weight_norm'] == pytest.approx(weight.norm().item(), rel=1e-5)
    correlations = signal['input_gradients']
    assert [record['distance'] for record in correlations] == [0, 0.5, 1]
    assert correlations[0]['correlation'] == pytest.approx(1) and -1 <= correlations[2]['correlation'] < 1


def test_what_cannot_be_measured():
    for name, count, message in (('mobilenetv3_small_050', 2, 'ResNets'), ('test_dresnet', 1, 'two images')):
        with pytest.raises(ValueError, match=message):
            timm_dresnet.signal_propagation(timm.create_model(name), images(count))
    for name, message in (('plainnet18', 'PlainNet'), ('test_dresnet', 'fused'), ('test_adaresnet', 'fused')):
        with pytest.raises(ValueError, match=message):
            timm_dresnet.connections(timm.utils.reparameterize_model(timm.create_model(name)))


def check_picture(path):
    image = Image.open(path).convert('RGB')
    assert min(image.size) > 300 and len(image.getcolors(1 << 24)) > 50
    assert image.getpixel((0, 0)) == (255, 255, 255)  # on dark pages too


def check_labels(figure, count):
    """That no two labels of blocks overlap."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    axes = max(figure.axes, key=lambda axes: len(axes.get_xticklabels()))
    for labels in (axes.get_xticklabels(), axes.get_yticklabels()):
        boxes = [label.get_window_extent(canvas.get_renderer()) for label in labels]
        assert not any(box.overlaps(following) for box, following in zip(boxes, boxes[1:]))
    assert count - 2 <= len(axes.get_xticklabels()) <= count + 1


@pytest.mark.parametrize('plot', [timm_dresnet.plot_connections, timm_dresnet.plot_arcs])
@pytest.mark.parametrize('arch,keep,blocks', [
    ('dresnet18', 0.5, 8), ('dresnet18', 0., 8), ('dresnet56_cifar', 1., 27), ('adaresnet110_cifar', 1., 54),
])
def test_picture(plot, arch, keep, blocks, tmp_path):
    model = timm.create_model(arch)
    if keep < 1:
        timm_dresnet.prune_connections(model, keep=keep)
    for x in (None, images()):
        check_labels(plot(model, tmp_path / 'connections.png', x), blocks)
    check_picture(tmp_path / 'connections.png')


def test_arcs_of_deep_networks_are_the_strongest():
    axes, = timm_dresnet.plot_arcs(timm.create_model('dresnet50')).axes
    assert len(axes.patches) == 30
    assert axes.get_title() == 'the 30 strongest of 105; 75 of 0.0625 or less are left out'  # 0.5 / 8


@pytest.mark.parametrize('name,panels,lines', [('dresnet18.tiny_in', 6, 21), ('adaresnet20_cifar.c10', 3, 9)])
def test_history(name, panels, lines, tmp_path):
    history = rows(ROOT / 'hub/zoo' / name / 'connections.csv')
    history += [{**row, 'epoch': -1} for row in history if row['epoch'] == '0']  # before training
    history.sort(key=lambda row: int(row['epoch']))
    figure = timm_dresnet.plot_history(history, tmp_path / 'history.png', name)
    check_picture(tmp_path / 'history.png')
    drawn = [line for axes in figure.axes for line in axes.get_lines()]
    assert len(figure.axes) == panels and len(drawn) == lines and name in figure.get_suptitle()
    assert all(line.get_xdata()[0] == 0 for line in drawn)
    with pytest.raises(ValueError, match='rows is empty'):
        timm_dresnet.plot_history([])


def test_other_pictures(tmp_path):
    timm_dresnet.plot_gates(tmp_path / 'gates.png')
    check_picture(tmp_path / 'gates.png')
    signals = {name: timm_dresnet.signal_propagation(timm.create_model(name), images()) for name in (
        'resnet20_cifar', 'test_adaresnet')}
    figure = timm_dresnet.plot_signal_propagation(signals, tmp_path / 'signal.png')
    assert [len(axes.get_lines()) for axes in figure.axes] == [2, 2, 2]
    check_picture(tmp_path / 'signal.png')

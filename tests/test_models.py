"""Every registered model keeps the contract of a timm model."""
import copy
import pickle

import pytest
import timm
import torch
import torch.nn as nn
from safetensors.torch import load_file, save_file
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from timm.utils import ModelEmaV3

import naive
import timm_dresnet

MODELS = [name for name in timm.list_models() if hasattr(timm_dresnet, name)]
# those that stand for the others: all are created and trained for a step, and timm's own tests run over all
QUICK = ['dresnet50', 'dresnet20_cifar', 'adaresnet18', 'plainnet18']
models = pytest.mark.parametrize('name', QUICK)


def create(name, **kwargs):
    torch.manual_seed(0)
    return timm.create_model(name, **kwargs)


def images(batch=2, size=64):
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


def assert_close(actual, expected, rtol=1e-4, atol=1e-5):
    """Equal to float precision, relative to the largest: untrained networks can put out large numbers in eval mode."""
    scale = expected.abs().max()
    assert scale.isfinite() and scale > 0
    torch.testing.assert_close(actual / scale, expected / scale, rtol=rtol, atol=atol)


@pytest.mark.parametrize('name', MODELS)
def test_forward_and_backward(name):
    model = create(name)
    output = model(images())
    assert output.shape == (2, model.num_classes)
    output.square().mean().backward()
    gradient = model.conv1.weight.grad
    assert gradient.isfinite().all() and (gradient != 0).any()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@models
def test_features(name):
    full = create(name).eval()
    x = images()
    final, expected = full.forward_intermediates(x)
    assert_close(final, full.forward_features(x))
    assert_close(expected[-1], final)
    last = full.forward_intermediates(x, [-2], stop_early=True, intermediates_only=True)
    assert_close(last[0], expected[-2])
    assert_close(full.forward_head(final), full(x))
    assert full.forward_head(final, pre_logits=True).shape == (2, full.head_hidden_size)

    for indices in (None, (1, 2)):
        model = create(name, features_only=True, **(dict(out_indices=indices) if indices else {})).eval()
        features = model(x)
        info = zip(model.feature_info.channels(), model.feature_info.reduction())
        chosen = [expected[i] for i in indices or range(len(full.stage_names) + 1)]
        assert len(features) == len(chosen)
        for feature, e, (channels, reduction) in zip(features, chosen, info):
            assert_close(feature, e)
            assert feature.shape == (2, channels, -(-64 // reduction), -(-64 // reduction))
        model.set_grad_checkpointing()
        if indices:  # what is not used is gone
            features = model(x)
            sum(feature.mean() for feature in features).backward()
            assert not [n for n, p in model.named_parameters() if p.grad is None]


@models
def test_classifier(name):
    model = create(name).eval()
    x = images()
    assert model.get_classifier() is model.fc and model.get_classifier(name_only=True) == 'fc'
    # timm's adaptive gradient clipping leaves out the last two parameters
    assert [key for key, _ in model.named_parameters()][-2:] == ['fc.weight', 'fc.bias']
    model.reset_classifier(7)
    assert model(x).shape == (2, 7)
    model.reset_classifier(0, '')
    assert_close(model(x), model.forward_features(x))
    assert create(name, num_classes=0).eval()(x).shape == (2, model.num_features)


@models
def test_gradient_checkpointing(name):
    model = create(name).double()
    reference = copy.deepcopy(model)
    model.set_grad_checkpointing()
    x = images().double()
    model(x).square().mean().backward()
    reference(x).square().mean().backward()
    torch.testing.assert_close(*({n: p.grad for n, p in m.named_parameters()} for m in (model, reference)))


@models
def test_copy_pickle_safetensors_and_meta_device(name, tmp_path):
    model = create(name).eval()
    x = images()
    expected = model(x)
    assert_close(copy.deepcopy(model)(x), expected)
    assert_close(pickle.loads(pickle.dumps(model))(x), expected)
    save_file(model.state_dict(), tmp_path / 'model.safetensors')
    other = timm.create_model(name, device='meta').eval()
    assert all(t.is_meta for t in [*other.parameters(), *other.buffers()])
    other.to_empty(device='cpu').load_state_dict(load_file(tmp_path / 'model.safetensors'))
    assert torch.equal(other(x), expected)


@models
def test_dtype_and_autocast(name):
    model = timm.create_model(name, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model(images().bfloat16()).dtype == torch.bfloat16
    model = create(name)
    dtypes = set()
    gates = [m for m in model.modules() if type(m) in timm_dresnet.GATES.values()]
    for gate in gates:
        gate.register_forward_hook(lambda module, args, output: dtypes.add(output.dtype))
    model, x = (value.to(memory_format=torch.channels_last) for value in (model, images()))
    with torch.autocast('cpu', torch.bfloat16):
        output = model(x)
    assert output.dtype == torch.bfloat16 and dtypes == ({torch.float32} if gates else set())
    output.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


@torch.no_grad()
def test_moving_average():
    model = create('test_adaresnet', skip_weight='shared')
    average = ModelEmaV3(model, decay=0.75)
    before = [p.clone() for p in model.parameters()]
    for p in model.parameters():
        p.add_(4.)
    average.update(model)
    torch.testing.assert_close([*average.module.parameters()], [start + 1. for start in before])


@models
def test_compile_without_graph_breaks(name):
    model = create(name)
    reference = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    output, expected = compiled(images()), reference(images())
    assert_close(output, expected)
    output.square().mean().backward()
    expected.square().mean().backward()
    assert_close(model.conv1.weight.grad, reference.conv1.weight.grad)
    torch.testing.assert_close(*(dict(m.named_buffers()) for m in (model, reference)), rtol=1e-4, atol=1e-4)


def test_compiled_for_images_of_any_size():
    """In training, where it depends on their size whether norms fold."""
    model = create('test_dresnet')
    reference = copy.deepcopy(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    for size in (64, 96, 16, 80):
        x = images(size=size)
        assert_close(compiled(x), reference(x))


def check_export_and_onnx(model, x, path):
    expected = model(x).detach()
    program = torch.export.export(model, (x,))
    assert_close(program.module()(x), expected)
    onnxruntime = pytest.importorskip('onnxruntime')
    torch.onnx.export(program, dynamo=True, verbose=False).save(path)
    session = onnxruntime.InferenceSession(path)
    assert_close(torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0]), expected)


@models
def test_export_and_onnx(name, tmp_path):
    check_export_and_onnx(create(name).eval(), images(), tmp_path / 'model.onnx')


def test_export_in_training():
    """With batches of any size."""
    model = create('test_dresnet').train()
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim('batch', max=64)},))
    x = images(batch=5)
    assert_close(program.module()(x), model(x))


@models
@pytest.mark.filterwarnings('ignore:`torch.jit:FutureWarning')
def test_torchscript(name):
    model = create(name).eval()
    x = images(batch=3)
    assert_close(torch.jit.trace(model, images())(x), model(x))
    scriptable = model
    if name.startswith('dresnet'):
        with pytest.raises(NotImplementedError, match='torch.export'):
            torch.jit.script(model)
        scriptable = torch.fx.symbolic_trace(model)
    assert_close(torch.jit.script(scriptable)(x), model(x))


@pytest.mark.parametrize('kwargs', [
    dict(drop_rate=0.1, drop_path_rate=0.1, drop_block_rate=0.1, act_layer='gelu', global_pool='catavgmax'),
    dict(stem_type='deep', stem_width=32, avg_down=True, replace_stem_pool=True),
    dict(block_args=dict(attn_layer='se'), norm_layer='groupnorm', aa_layer=timm.layers.BlurPool2d, connection_rank=8),
    dict(channels=(17, 34, 68, 136), stem_type='cifar'),
], ids=lambda kwargs: next(iter(kwargs)))
def test_arguments_of_resnet(kwargs):
    model = create('dresnet18', **kwargs)
    model(images(batch=4)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize('name,kwargs,words', [
    ('dresnet18', dict(gates='gauss'), "DResNet has no argument 'gates'.* act_layer,.* gate,"),
    ('dresnet18', dict(gate='sigmod'), 'gate.*sigmoid.*gauss.*linear.*sigmod'),
    ('dresnet18', dict(gate_init=1.), r'gate_init.*1\.0'),
    ('dresnet18_gauss', dict(gate_init=1.), 'gate_init.*slope'),
    ('dresnet18', dict(connection_rank=-1), 'connection_rank.*-1'),
    ('dresnet18', dict(connected_stages=0), 'connected_stages.*0'),
    ('dresnet18', dict(pruned_connections=[(3, 2)]), 'into block 3 from block 2'),
    ('dresnet18', dict(stem_type='cifra'), 'stem_type.*cifar.*cifra'),
    ('dresnet18', dict(output_stride=7), 'output_stride.*8, 16, 32.*7'),
    ('dresnet18', dict(layers=(2, 2)), 'layers.*channels'),
    ('adaresnet18', dict(skip_weight='x'), 'skip_weight.*per_block.*per_kind.*shared.*x'),
    ('adaresnet18', dict(skip_init='x'), 'skip_init.*x'),
    ('adaresnet18', dict(skip_init=0., zero_init_last=True), 'zero_init_last.*skip_init'),
    ('adaresnet', dict(grown_from='resnet18', skip_init=0., zero_init_last=True), 'zero_init_last.*skip_init'),
    ('dresnet', dict(grown_from='resnet999'), r'grown_from.*resnet999.*grow\(model\)'),
    ('adaresnet18d', dict(stem_type='cifar'), 'stem_type.*resnet18d'),
    ('plainnet18', dict(zero_init_last=True), 'zero_init_last'),
    ('plainnet18', dict(drop_path_rate=0.1), 'drop_path_rate'),
    ('plainnet18', dict(block=timm.models.resnet.BasicBlock), 'PlainBlock.*BasicBlock'),
])
def test_wrong_arguments(name, kwargs, words):
    with pytest.raises((TypeError, ValueError), match=words):
        timm.create_model(name, **kwargs)


def test_freezing_stages_freezes_their_connections():
    model = timm.create_model('test_dresnet', pretrained=True).train()
    frozen = ['conv1', 'bn1', 'layer1', 'layer2']
    timm.utils.freeze(model, frozen)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=1.)
    model(images(batch=4)).square().sum().backward()
    optimizer.step()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith(tuple(f'{module}.' for module in frozen)), name
    model.load_state_dict(before)
    fused = timm.create_model('test_dresnet', inference_mode=True)
    fused.load_state_dict(dict(timm.utils.reparameterize_model(model.eval()).state_dict()))
    assert_close(fused(images()), model(images()))


@torch.no_grad()
def test_stride_of_the_last_stage_changed_by_hand():
    model, x = timm.create_model('test_dresnet', pretrained=True).eval(), images()
    model.layer4[0].stride = 1
    for conv in (model.layer4[0].conv1, model.layer4[0].downsample[0]):
        conv.stride = (1, 1)
    assert_close(model(x), naive.dresnet(model, 'sigmoid', x)[0])


def test_stages_taken_out_of_the_network():
    model, x = timm.create_model('test_dresnet').eval(), images()
    without = copy.deepcopy(model)
    without.layer4, without.fc = nn.Identity(), nn.Identity()
    assert max(record['target'] for record in timm_dresnet.connections(without, x) if record['effect'] > 0) == 5
    assert len(timm_dresnet.signal_propagation(without, x)['blocks']) == 5
    assert len(model.layer3) == len([*model.layer3]) == 2 and model.layer3[-1] is model.layer3[1]
    with pytest.raises(RuntimeError, match='need all blocks before them.*features_only=True'):
        nn.Sequential(*[*model.children()][:-2])(x)
    model.layer3 = nn.Sequential(model.layer3[0])
    with pytest.raises(RuntimeError, match='need all blocks before them.*features_only=True'):
        model(x)


@pytest.mark.parametrize('name', ['dresnet18_gauss', 'adaresnet18'])
def test_gates_and_skip_weights_do_not_decay(name):
    model = create(name)
    names = {n for n, _ in model.named_parameters() if '.gates.' in n or n.endswith('.alpha')}
    assert names and model.no_weight_decay() == names
    optimizer = create_optimizer_v2(model, 'sgd', lr=0.1, weight_decay=0.1)
    decay = {id(p): group['weight_decay'] for group in optimizer.param_groups for p in group['params']}
    assert all((decay[id(p)] == 0.) == (n in names or p.ndim == 1) for n, p in model.named_parameters())


@models
def test_layer_decay_groups(name):
    model = create(name, device='meta')
    depth = sum(len(getattr(model, stage)) for stage in model.stage_names)
    for coarse, count in ((False, depth + 2), (True, len(model.stage_names) + 2)):
        groups = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
        assert len(set(groups.values())) == count
        for n, group in groups.items():
            if '.connections.' in n:
                assert group == groups['fc.weight']  # what is new learns as the classifier does
    optimizer = create_optimizer_v2(model, 'adamw', lr=0.1, weight_decay=0.1, layer_decay=0.5)
    assert {group['lr_scale'] for group in optimizer.param_groups} == {0.5 ** i for i in range(depth + 2)}


def test_other_feature_extractors():
    x, full = images(), create('dresnet18').eval()
    for kind in ('hook', 'fx'):
        model = create('dresnet18', features_only=True, feature_cls=kind).eval()
        for feature, expected in zip(model(x), full.forward_intermediates(x, intermediates_only=True), strict=True):
            assert_close(feature, expected)
    for name in ('dresnet18', 'dresnet18d'):
        with pytest.raises(RuntimeError, match='features_only=True'):  # it runs stage after stage, without connections
            create(name, features_only=True, feature_cls='list')


@pytest.mark.parametrize('name,kwargs', [
    ('adaresnet18', dict(skip_init=0.)), ('adaresnet18d', dict(skip_init=0.)),
    ('adaresnet18d', dict(zero_init_last=False)),
], ids=str)
def test_without_shortcuts_there_are_branches(name, kwargs):
    """From the start, and when weights are made again."""
    model = create(name, **kwargs)
    stem = next(model.conv1.parameters())
    before = {name: (p == 0).all() for name, p in model.named_parameters() if '.bn' in name}
    for _ in range(2):
        stem.grad = None
        model(images()).square().mean().backward()
        assert stem.grad.isfinite().all() and stem.grad.any()
        nn.init.normal_(model.layer1[0].bn2.weight)
        model.init_weights()
        assert {name: (p == 0).all() for name, p in model.named_parameters() if '.bn' in name} == before


@pytest.mark.parametrize('name,kwargs', [
    ('dresnet18', {}), ('dresnet18_gauss', {}), ('dresnet18', dict(gate='linear')),
    ('adaresnet18', dict(skip_init=0.5, skip_weight='shared')),
], ids=str)
def test_what_is_learned_begins_anew(name, kwargs):
    """As programs do it that train a network once more, or fill one that was made without memory."""
    expected = create(name, **kwargs).state_dict()
    model = timm.create_model(name, device='meta', **kwargs).to_empty(device='cpu')
    for module in model.modules():
        if hasattr(module, 'reset_parameters'):
            module.reset_parameters()
    state = model.state_dict()
    learned = [key for key in state if '.gates.' in key or key.endswith('.alpha')]
    assert learned and all(torch.equal(state[key], expected[key]) for key in learned)
    assert all(value.isfinite().all() for value in state.values())


def test_connections_at_full_width():
    """Also where the default is a number: `timm.create_model` drops arguments that are None."""
    full = timm.create_model('dresnet56_cifar', connection_rank=0, device='meta').state_dict()
    expected = timm_dresnet.dresnet56_cifar(connection_rank=None, device='meta').state_dict()
    assert {k: v.shape for k, v in full.items()} == {k: v.shape for k, v in expected.items()}
    assert not any('expansions' in name for name in full)


def test_same_seed_same_trunk():
    """A seed gives a DResNet the very trunk it gives a ResNet, which makes comparisons paired."""
    trunk = create('resnet18', num_classes=10).state_dict()
    state = create('dresnet18', num_classes=10).state_dict()
    assert all(torch.equal(value, state[name]) for name, value in trunk.items())

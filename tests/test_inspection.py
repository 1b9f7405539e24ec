"""Records and pictures of learned connections."""
import pytest
import timm
import torch
from PIL import Image

import timm_dresnet


@pytest.mark.parametrize('gate', ['sigmoid', 'gauss', 'linear'])
def test_records_of_a_dresnet(gate):
    model = timm.create_model('dresnet18', gate=gate)
    with torch.no_grad():
        model.connections['layer3'].gates['7'].weight[2] = 0.7  # layer3's output is the input of block 7
    records = timm_dresnet.connections(model)
    assert [(r['target'], r['source']) for r in records] == [(i, k) for i in range(3, 9) for k in range(1, i - 1)]
    record = next(r for r in records if (r['target'], r['source']) == (7, 3))
    assert (record['target_name'], record['source_name']) == ('layer4.0', 'layer2.0')
    assert record['weight'] == pytest.approx(0.7)
    value = {'sigmoid': 0.668188, 'gauss': 0.00744658, 'linear': 0.7}[gate]  # by hand, k = 10
    assert record['gate'] == pytest.approx(value, rel=1e-4)
    assert record.get('sharpness', 10.) == pytest.approx(10.)
    assert ('sharpness' in record) == (gate == 'gauss')


def test_records_of_an_adaresnet():
    model = timm.create_model('adaresnet18', skip_weight='per_kind', skip_init=0.25)
    with torch.no_grad():
        model.layer2[0].skip_weight.alpha.fill_(-1.)
    records = timm_dresnet.connections(model)
    assert [r['kind'] for r in records] == ['identity'] * 2 + ['projection', 'identity'] * 3
    assert [r['alpha'] for r in records] == [0.25] * 2 + [-1., 0.25] * 3
    assert [r['target_name'] for r in records][:3] == ['layer1.0', 'layer1.1', 'layer2.0']


def test_no_learned_connections():
    with pytest.raises(ValueError, match='PlainNet'):
        timm_dresnet.connections(timm.create_model('plainnet18', device='meta'))


@pytest.mark.parametrize('arch', ['test_dresnet', 'test_adaresnet'])
def test_fused(arch):
    with pytest.raises(ValueError, match='fused'):
        timm_dresnet.connections(timm.utils.reparameterize_model(timm.create_model(arch)))


@pytest.mark.parametrize('arch,share', [
    ('test_dresnet', None), ('dresnet50', None), ('adaresnet18', None), ('dresnet18', 0.5), ('dresnet18', 0.),
])
def test_picture(arch, share, tmp_path):
    model = timm.create_model(arch)
    if share is not None:
        timm_dresnet.prune_connections(model, share=share)
    timm_dresnet.plot_connections(model, tmp_path / 'connections.png')
    image = Image.open(tmp_path / 'connections.png').convert('RGB')
    assert min(image.size) > 300 and len(image.getcolors(1 << 24)) > 50

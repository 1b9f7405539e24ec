"""The weights of timm's ResNets, grown into networks with learned connections."""
import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.optim import create_optimizer_v2


def trained(arch, **kwargs):
    """A ResNet as if trained: no parameter or statistic at its start, and activations of a sane size."""
    torch.manual_seed(0)
    model = timm.create_model(arch, zero_init_last=False, **kwargs)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if 'bn' in name or 'downsample.1' in name:
                p.add_(0.2 * torch.randn_like(p))
        model.train()
        for _ in range(3):  # running statistics
            model(torch.randn(8, model.in_chans, 64, 64))
    return model.eval()


@pytest.mark.parametrize('family,depth', [
    ('adaresnet', '18'), ('adaresnet', '50'), ('dresnet', '18'), ('dresnet', '50'), ('dresnet', '50_gauss'),
    *(pytest.param(family, depth, marks=pytest.mark.slow) for family, depth in (
        ('adaresnet', '152'), ('dresnet', '34'), ('dresnet', '101'))),
])
def test_grown_model_is_its_resnet(family, depth, tmp_path):
    resnet = trained(f'resnet{depth}'.replace('_gauss', ''))
    save_file(resnet.state_dict(), tmp_path / 'resnet.safetensors')
    overlay = dict(file=str(tmp_path / 'resnet.safetensors'), num_classes=1000)
    model = timm.create_model(f'{family}{depth}', pretrained=True, num_classes=1000, pretrained_cfg_overlay=overlay)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), resnet(x), rtol=1e-5, atol=1e-5)

    # and it learns: after one step the connections let something through
    optimizer = create_optimizer_v2(model.train(), 'sgd', lr=0.01)
    torch.nn.functional.cross_entropy(model(x), torch.tensor([1, 2])).backward()
    learned = {n: p for n, p in model.named_parameters() if '.connections.' in n or n.endswith('.alpha')}
    assert learned
    norm_or_alpha = [p for n, p in learned.items() if n.endswith(('.norm.weight', '.alpha'))]
    assert all(p.grad.isfinite().all() and (p.grad != 0).any() for p in norm_or_alpha)
    optimizer.step()
    optimizer.zero_grad()
    torch.nn.functional.cross_entropy(model(x), torch.tensor([1, 2])).backward()
    assert all((p.grad != 0).any() for n, p in learned.items())


@pytest.mark.parametrize('arch', ['dresnet18', 'adaresnet18'])
def test_grown_from_memory_for_other_classes_and_channels(arch):
    overlay = dict(state_dict=trained('resnet18').state_dict())
    kwargs = dict(num_classes=5, in_chans=1)
    model = timm.create_model(arch, pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
    resnet = timm.create_model('resnet18', pretrained=True, pretrained_cfg_overlay=overlay, **kwargs).eval()
    x = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), resnet.forward_features(x), rtol=1e-5, atol=1e-5)
    assert 'state_dict' not in model.pretrained_cfg  # else the weights would stay, twice


@pytest.mark.parametrize('arch', ['dresnet18', 'adaresnet18'])
def test_own_weights_are_loaded_as_they_are(arch, tmp_path):
    torch.manual_seed(1)
    source = timm.create_model(arch).eval()
    save_file(source.state_dict(), tmp_path / 'model.safetensors')
    overlay = dict(file=str(tmp_path / 'model.safetensors'))
    model = timm.create_model(arch, pretrained=True, pretrained_cfg_overlay=overlay).eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.equal(model(x), source(x))


def test_weights_of_another_network_are_refused(tmp_path):
    save_file(timm.create_model('resnet34').state_dict(), tmp_path / 'resnet.safetensors')
    with pytest.raises(RuntimeError, match='another layers'):
        timm.create_model(
            'dresnet18', pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'resnet.safetensors')))

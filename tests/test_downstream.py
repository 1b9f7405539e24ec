"""The models in the libraries that people use timm's models with. Each test is skipped where its library is missing."""
import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from timm.models import save_for_hf

from hub.push import Upload, build
from test_models import images

MODELS = ['dresnet18', 'adaresnet18']


@pytest.mark.parametrize('name', MODELS)
def test_segmentation_models_pytorch(name):
    smp = pytest.importorskip('segmentation_models_pytorch')
    for decoder in (smp.Unet, smp.FPN, smp.DeepLabV3Plus):
        model = decoder(f'tu-{name}', encoder_weights=None, classes=4)
        mask = model(images())
        assert mask.shape == (2, 4, 64, 64)
    assert model.encoder.out_channels == [3, 64, 64, 128, 256, 512]
    F.cross_entropy(mask, torch.zeros(2, 64, 64, dtype=torch.long)).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A model as it is published, with names of its classes."""
    torch.manual_seed(0)
    saved, published = tmp_path_factory.mktemp('saved'), tmp_path_factory.mktemp('published')
    model = timm.create_model('test_dresnet', num_classes=3)
    save_for_hf(model, saved, dict(label_names=['cat', 'dog', 'owl']), safe_serialization=True)
    build(Upload(saved, 'me/test_dresnet'), published)
    return published


@torch.no_grad()
def test_transformers(folder, tmp_path):
    transformers = pytest.importorskip('transformers')
    model = transformers.TimmWrapperForImageClassification.from_pretrained(folder).eval()
    expected = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    torch.testing.assert_close(model(images(size=32)).logits, expected(images(size=32)))
    assert model.config.id2label == {0: 'cat', 1: 'dog', 2: 'owl'}
    model.save_pretrained(tmp_path)
    again = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(images(size=32)).logits, expected(images(size=32)))

    processor = transformers.TimmWrapperImageProcessor.from_pretrained(folder)
    classify = transformers.pipeline('image-classification', model=model, image_processor=processor)
    assert {result['label'] for result in classify(Image.new('RGB', (40, 50), 'red'))} == {'cat', 'dog', 'owl'}


def test_transformers_trainer(folder, tmp_path):
    transformers = pytest.importorskip('transformers')
    pytest.importorskip('accelerate')
    model = transformers.TimmWrapperForImageClassification.from_pretrained(folder)
    before = model.timm_model.conv1.weight.clone()
    data = [dict(pixel_values=image, labels=i % 3) for i, image in enumerate(images(8, 32))]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=2, per_device_train_batch_size=4, report_to=[], use_cpu=True, save_strategy='no')
    transformers.Trainer(model, arguments, train_dataset=data).train()
    assert not torch.equal(model.timm_model.conv1.weight, before)


@pytest.mark.parametrize('name', MODELS)
def test_transformers_backbone(name):
    transformers = pytest.importorskip('transformers')
    config = transformers.TimmBackboneConfig(backbone=name, use_pretrained_backbone=False, out_indices=[1, 2, 3, 4])
    backbone = transformers.TimmBackbone(config)
    assert [tuple(f.shape[1:]) for f in backbone(images()).feature_maps] == [
        (64, 16, 16), (128, 8, 8), (256, 4, 4), (512, 2, 2)]


@pytest.mark.parametrize('name', MODELS)
def test_fastai(name, tmp_path):
    vision = pytest.importorskip('fastai.vision.all')
    for i in range(16):
        folder = tmp_path / ('cat' if i % 2 else 'dog')
        folder.mkdir(exist_ok=True)
        Image.effect_noise((64, 64), 60).convert('RGB').save(folder / f'{i}.png')
    data = vision.ImageDataLoaders.from_folder(
        tmp_path, valid_pct=0.25, bs=4, item_tfms=vision.Resize(64), num_workers=0)
    learner = vision.vision_learner(data, name, pretrained=False, metrics=vision.accuracy)
    with learner.no_bar(), learner.no_logging():
        learner.fine_tune(1)
    assert len(learner.recorder.values[-1]) == 3 and np.isfinite(learner.recorder.values[-1]).all()
    learner.export(tmp_path / 'learner.pkl')


@pytest.mark.parametrize('name', MODELS)
def test_lightning(name, tmp_path):
    lightning = pytest.importorskip('lightning')

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = timm.create_model(name, num_classes=3)

        def training_step(self, batch, index):
            return F.cross_entropy(self.model(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    data = torch.utils.data.DataLoader(list(zip(images(8), torch.arange(8) % 3)), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=1, accelerator='cpu', logger=False, enable_progress_bar=False, default_root_dir=tmp_path)
    trainer.fit(Module(), data)
    assert trainer.global_step == 2


@pytest.mark.parametrize('name', MODELS)
def test_torchvision_detection(name):
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.rpn import AnchorGenerator
    backbone = timm.create_model(name, num_classes=0, global_pool='')
    backbone.out_channels = backbone.num_features
    anchors = AnchorGenerator(((16, 32, 64),), ((0.5, 1.0, 2.0),))
    model = FasterRCNN(backbone, 3, min_size=96, max_size=96, rpn_anchor_generator=anchors)
    targets = [dict(boxes=torch.tensor([[10., 10., 50., 60.]]), labels=torch.tensor([1])) for _ in range(2)]
    losses = model(list(images(size=96)), targets)
    sum(losses.values()).backward()
    assert not [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert set(model.eval()(list(images(size=96)))[0]) == {'boxes', 'labels', 'scores'}


@pytest.mark.parametrize('name', MODELS)
def test_pytorch_grad_cam(name):
    cam = pytest.importorskip('pytorch_grad_cam')
    model = timm.create_model(name, num_classes=5).eval()
    with cam.GradCAM(model=model, target_layers=[model.layer4[-1]]) as grad_cam:
        maps = grad_cam(input_tensor=images(), targets=None)
    assert maps.shape == (2, 64, 64) and np.isfinite(maps).all() and maps.max() > 0


@pytest.mark.parametrize('name', MODELS)
@torch.no_grad()
def test_int8_weights_in_torchao(name):
    quantization = pytest.importorskip('torchao.quantization')
    model = timm.create_model(name, num_classes=10).eval()
    expected = model(images())
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())  # of its linear layers
    assert F.cosine_similarity(model(images()), expected).min() > 0.999


@pytest.mark.parametrize('name', ['dresnet18', 'dresnet56_cifar', 'adaresnet18'])
def test_peft(name):
    """Adapters on every convolution train, and merging them changes nothing."""
    peft = pytest.importorskip('peft')
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, zero_init_last=False)
    targets = [n for n, module in model.named_modules() if isinstance(module, torch.nn.Conv2d)]
    model = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    F.cross_entropy(model.train()(images(4)), torch.arange(4)).backward()
    adapters = {n: p for n, p in model.named_parameters() if '.lora_' in n}
    assert len(adapters) == 2 * len(targets)
    assert all(p.grad.isfinite().all() and p.grad.any() for p in adapters.values())
    expected = model.eval()(images())
    torch.testing.assert_close(model.merge_and_unload()(images()), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize('name', ['dresnet18', 'dresnet56_cifar', 'adaresnet18'])
@torch.no_grad()
def test_offloading(name):
    accelerate = pytest.importorskip('accelerate')
    model = timm.create_model(name, num_classes=5).eval()
    expected = model(images())
    output = accelerate.cpu_offload(model, torch.device('cpu'))(images())
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('name', MODELS)
def test_captum(name):
    captum = pytest.importorskip('captum.attr')
    model = timm.create_model(name, num_classes=5).eval()
    for layer in ('layer2.0.downsample', 'layer2.0.bn2', 'layer4.1'):
        activation = captum.LayerActivation(model, model.get_submodule(layer)).attribute(images())
        assert activation.shape[0] == 2 and activation.isfinite().all()

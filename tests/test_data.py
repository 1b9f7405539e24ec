"""What a run is trained on: timm's data sets, the same images in the same order however they are loaded."""
import io
import itertools
import json
import tarfile
from contextlib import nullcontext

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

from train.arguments import parse_args
from train.data import BadImageError, Digits, class_names, count_bad_images, create_eval_loader, create_train_loader
from train.engine import validate

SIZE = dict(
    input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bicubic', crop_pct=1., crop_mode='center')
CPU = torch.device('cpu')


def arguments(*args):
    parsed = parse_args(['--batch-size', '32', '--workers', '0', *map(str, args)])
    parsed.distributed, parsed.rank, parsed.world_size = False, 0, 1
    return parsed


def batches(loader, epoch=0, start=0, count=None):
    loader.loader.set_epoch(epoch, start)
    return list(itertools.islice(loader, count))


def assert_equal(first, second):
    assert len(first) == len(second) > 0
    for (images, targets), (other_images, other_targets) in zip(first, second):
        assert torch.equal(images, other_images) and torch.equal(targets, other_targets)


@pytest.fixture(scope='module')
def image_folder(tmp_path_factory):
    """240 digits to train on and 60 to validate, as PNG files in folders of classes."""
    root = tmp_path_factory.mktemp('images')
    for split, count in (('train', 240), ('validation', 60)):
        dataset = Digits(split)
        for i in range(count):
            image, target = dataset[i]
            folder = root / split / f'digit {target}'
            folder.mkdir(parents=True, exist_ok=True)
            image.resize((16, 16)).save(folder / f'{i:04}.png')
    return root


AUGMENT = ['--dataset', 'digits', '--aa', 'rand-m9-n3-mstd0.5', '--mixup', 0.2, '--cutmix', 1, '--reprob', 0.5]


@pytest.mark.parametrize('args', [['--workers', 2], ['--in-memory'], ['--workers', 1, '--in-memory']], ids=str)
def test_how_images_are_loaded_changes_nothing(args):
    expected = create_train_loader(arguments(*AUGMENT), SIZE, 10, CPU)
    loader = create_train_loader(arguments(*AUGMENT, *args), SIZE, 10, CPU)
    for epoch in range(2):
        assert_equal(batches(loader, epoch), batches(expected, epoch))


def test_an_epoch_from_any_batch_on():
    loader = create_train_loader(arguments(*AUGMENT), SIZE, 10, CPU)
    whole = batches(loader, epoch=1)
    assert len(whole) == len(loader) == 1437 // 32
    for start in (0, 1, 17, len(whole) - 1):
        assert_equal(batches(loader, 1, start), whole[start:])
    assert batches(loader, 1, len(whole)) == []
    assert not torch.equal(batches(loader, 0)[0][0], whole[0][0])


@pytest.mark.parametrize('folders,create,words', [
    (['train', 'test'], create_eval_loader, ['no folder validation', 'test and train', '--val-split']),
    (['cat', 'dog'], create_train_loader, ['no folder train:', '--train-split']),
])
def test_missing_split(image_folder, tmp_path, folders, create, words):
    for name in folders:
        (tmp_path / name).symlink_to(image_folder / 'train')
    with pytest.raises(ValueError) as error:
        create(arguments('--data-dir', tmp_path), SIZE, *[10] * (create is create_train_loader), CPU)
    assert all(word in str(error.value) for word in [str(tmp_path), *words])
    loader = create_eval_loader(arguments('--data-dir', image_folder / 'validation'), SIZE, CPU)  # classes alone
    assert len(loader.dataset) == 60


def test_growing_resolution():
    args = ['--dataset', 'digits', '--epochs', 3, '--train-img-sizes', 8, 12, 16, '--train-size-schedule', 'progressive']
    one = create_train_loader(arguments(*args, '--train-size-schedule-spread', 0, '--train-size-random-mix', 0), SIZE, 10, CPU)
    for epoch, size in enumerate((8, 12, 16)):
        epoch_batches = batches(one, epoch)
        assert len(epoch_batches) == len(one) == 1437 // 32
        assert {images.shape for images, _ in epoch_batches} == {(32, 3, size, size)}

    drawn = create_train_loader(arguments(*args), SIZE, 10, CPU)
    loaded = create_train_loader(arguments(*args, '--workers', 2), SIZE, 10, CPU)
    whole = batches(drawn, 1)
    assert {images.shape[-1] for images, _ in whole} == {8, 12, 16}
    assert_equal(batches(loaded, 1), whole)
    assert_equal(batches(drawn, 1, 17), whole[17:])
    assert count_bad_images([drawn], CPU, distributed=False) == 0


def test_two_processes_share_a_batch_of_one():
    args = arguments('--dataset', 'digits', '--no-aug')
    both = create_train_loader(args, SIZE, 10, CPU)
    args.batch_size, args.world_size = 16, 2
    args.distributed = True
    parts = []
    for args.rank in range(2):
        parts.append(batches(create_train_loader(args, SIZE, 10, CPU), epoch=3))
    for (images, targets), *halves in zip(batches(both, epoch=3), *parts):
        for rank, (half, half_targets) in enumerate(halves):
            assert torch.equal(images[rank::2], half) and torch.equal(targets[rank::2], half_targets)


def test_repeated_augmentation():
    loader = create_train_loader(arguments('--dataset', 'digits', '--aug-repeats', 3, '--no-aug'), SIZE, 10, CPU)
    images = batches(loader)[0][0]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert not torch.equal(images[2], images[3])
    other = arguments('--dataset', 'digits', '--aug-repeats', 3, '--no-aug', '--seed', 43)
    assert not torch.equal(images, batches(create_train_loader(other, SIZE, 10, CPU))[0][0])


def test_mixup_ends():
    loader = create_train_loader(
        arguments('--dataset', 'digits', '--mixup', 1, '--mixup-off-epoch', 1, '--workers', 1), SIZE, 10, CPU)
    assert (batches(loader, 0, count=1)[0][1].max(1).values < 0.9).any()
    loader.mixup_enabled = False
    targets = batches(loader, 1, count=1)[0][1]
    assert (targets.max(1).values > 0.9).all()


def shards(image_folder, root):
    """The image folder as WebDataset: two shards of each split."""
    info = {}
    for split in ('train', 'validation'):
        files = sorted(image_folder.glob(f'{split}/*/*.png'))
        names, lengths = [], []
        for part in range(2):
            names.append(f'digits-{split}-{part}.tar')
            lengths.append(len(files[part::2]))
            with tarfile.open(root / names[-1], 'w') as tar:
                for file in files[part::2]:
                    for ending, data in (('png', file.read_bytes()), ('cls', file.parent.name[-1].encode())):
                        member = tarfile.TarInfo(f'{file.stem}.{ending}')
                        member.size = len(data)
                        tar.addfile(member, io.BytesIO(data))
        info[split] = dict(name=split, filenames=names, shard_lengths=lengths, num_samples=len(files))
    (root / '_info.json').write_text(json.dumps(dict(splits=info)))
    return root


@pytest.mark.parametrize('kind', ['', 'torch/image_folder', 'hfds', 'hfids', 'wds'])
def test_kinds_of_data_sets(kind, image_folder, tmp_path):
    args = {
        '': ['--data-dir', image_folder],
        'torch/image_folder': ['--data-dir', image_folder, '--dataset', kind],
        'hfds': ['--data-dir', tmp_path, '--dataset', f'hfds/{image_folder}'],
        'hfids': ['--data-dir', tmp_path, '--dataset', f'hfids/{image_folder}', '--train-num-samples', 240,
                  '--val-num-samples', 60],
        'wds': ['--dataset', 'wds/digits'],
    }[kind]
    if kind == 'wds':
        args += ['--data-dir', shards(image_folder, tmp_path)]
    streamed = kind in ('hfids', 'wds')
    if streamed:
        args += ['--workers', 1]
    args = arguments(*args)
    evaluated = create_eval_loader(args, SIZE, CPU)
    expected = {}  # pixels: class
    transform = create_transform(**SIZE, is_training=False)
    for path in image_folder.glob('validation/*/*.png'):
        with Image.open(path) as image:
            expected[transform(image.convert('RGB')).numpy().round(3).tobytes()] = int(path.parent.name[-1])
    found = {}
    for images, targets in evaluated:
        found.update((image.numpy().round(3).tobytes(), target) for image, target in zip(images, targets.tolist()))
    assert found == expected
    if not streamed:
        assert class_names(evaluated.dataset) == [f'digit {i}' for i in range(10)]

    loader = create_train_loader(args, SIZE, 10, CPU)
    whole = batches(loader, epoch=1)
    assert len(whole) == len(loader) and sum(len(targets) for _, targets in whole) >= 224
    assert_equal(batches(loader, epoch=1, start=3), whole[3:])
    assert_equal(batches(create_train_loader(args, SIZE, 10, CPU), epoch=1), whole)


@pytest.fixture(params=['empty', 'truncated', 'text'])
def bad_folder(request, image_folder, tmp_path):
    """The image folder with one file that is no image. Returns the folder and the file."""
    for path in image_folder.glob('*/*/*.png'):
        copy = tmp_path / path.relative_to(image_folder)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.symlink_to(path)
    bad = sorted(tmp_path.glob('train/*/*.png'))[100]
    data = bad.read_bytes()
    bad.unlink()
    bad.write_bytes({'empty': b'', 'truncated': data[:len(data) // 2], 'text': b'no image, <html>'}[request.param])
    return tmp_path, bad


@pytest.mark.parametrize('args', [[], ['--workers', 1], ['--in-memory']], ids=str)
def test_bad_images_are_named(args, bad_folder):
    folder, bad = bad_folder
    with pytest.raises(BadImageError) as error:
        batches(create_train_loader(arguments('--data-dir', folder, '--batch-size', 30, *args), SIZE, 10, CPU))
    assert str(bad) in str(error.value)


@pytest.mark.parametrize('args', [[], ['--workers', 1], ['--in-memory']], ids=str)
def test_bad_images_are_skipped_and_counted(args, bad_folder):
    folder, bad = bad_folder
    loader = create_train_loader(
        arguments('--data-dir', folder, '--bad-images', 'skip', '--no-aug', '--batch-size', 240, *args), SIZE, 10, CPU)
    (images, _), = batches(loader)
    assert torch.equal(loader.dataset.images.bad.nonzero(), torch.tensor([[100]]))
    pixels = images.numpy().reshape(240, -1)
    copies = [index for index, row in enumerate(pixels) if (pixels == row).all(1).sum() == 2]
    assert len(copies) == 2  # the next one stands in
    with Image.open(sorted(folder.glob('train/*/*.png'))[101]) as image:
        expected = np.asarray(image.convert('RGB')).transpose(2, 0, 1) / 127.5 - 1
    assert np.allclose(images[copies[0]], expected, atol=1e-5)


@pytest.mark.parametrize('args', [[], ['--workers', 1], ['--in-memory']], ids=str)
@pytest.mark.parametrize('limit', [None, 150])
def test_bad_images_are_left_out_of_validation(args, limit, bad_folder):
    folder, bad = bad_folder
    model = timm.create_model('test_adaresnet', num_classes=10)
    args = arguments('--data-dir', folder, '--val-split', 'train', '--bad-images', 'skip', *args)

    def measure(limit):
        loader = create_eval_loader(args, SIZE, CPU)
        loader.sampler.num_valid_samples = limit  # the others fill batches of several processes
        return validate(model, loader, args, CPU, nullcontext), count_bad_images([loader], CPU, distributed=False)

    measured, count = measure(limit)
    assert count == 1
    bad.unlink()
    assert measured == pytest.approx(measure(limit and limit - 1)[0])


def test_crop_mode_of_the_model(image_folder):
    image = Image.effect_noise((24, 16), 60).convert('RGB')
    for mode in ('center', 'squash', 'border'):
        loader = create_eval_loader(arguments('--data-dir', image_folder), {**SIZE, 'crop_mode': mode}, CPU)
        expected = create_transform(**{**SIZE, 'crop_mode': mode}, normalize=False)
        assert torch.equal(loader.dataset.transform(image), expected(image)), mode


@pytest.fixture(params=['sample', 'shard'])
def bad_shards(request, image_folder, tmp_path):
    """WebDataset shards, of whose training images one is damaged, or the end of one shard lost. Names what is bad."""
    root = shards(image_folder, tmp_path)
    path = root / 'digits-train-1.tar'
    if request.param == 'shard':
        path.write_bytes(path.read_bytes()[:20000])
        return root, [str(path)]
    with tarfile.open(path) as tar:
        members = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(path, 'w') as tar:
        for i, (member, data) in enumerate(members):
            data = data if i != 20 else b'x' * len(data)
            tar.addfile(member, io.BytesIO(data))
    return root, [str(path), members[20][0].name.split('.')[0]]


@pytest.mark.parametrize('workers', [0, 1])
def test_bad_shards(workers, bad_shards):
    root, names = bad_shards
    args = ['--data-dir', root, '--dataset', 'wds/digits', '--workers', workers, '--batch-size', 30]
    with pytest.raises(BadImageError) as error:
        batches(create_train_loader(arguments(*args), SIZE, 10, CPU))
    assert all(name in str(error.value) for name in names)

    loader = create_train_loader(arguments(*args, '--bad-images', 'skip'), SIZE, 10, CPU)
    assert all(len(batches(loader, epoch)) == 8 for epoch in range(2))
    assert count_bad_images([loader], CPU, distributed=False) == 1


def test_all_images_of_shards_bad(image_folder, tmp_path):
    root = shards(image_folder, tmp_path)
    for path in root.glob('digits-train-*.tar'):
        path.write_bytes(b'')
    args = arguments('--data-dir', root, '--dataset', 'wds/digits', '--batch-size', 30, '--bad-images', 'skip')
    with pytest.raises(BadImageError, match='None of the images'):
        batches(create_train_loader(args, SIZE, 10, CPU))


def test_all_images_bad(tmp_path):
    for i in range(4):
        (tmp_path / 'train' / 'a').mkdir(parents=True, exist_ok=True)
        (tmp_path / 'train' / 'a' / f'{i}.png').write_bytes(b'')
    args = arguments('--data-dir', tmp_path, '--bad-images', 'skip', '--batch-size', 4)
    with pytest.raises(BadImageError, match='None of the 4 images'):
        batches(create_train_loader(args, SIZE, 10, CPU))


@pytest.mark.parametrize('args,words', [
    (['--data-dir', '/no/such/folder'], ['/no/such/folder']),
    (['--dataset', 'torch/nothing', '--data-dir', '.'], ['torch/nothing']),
    (['--dataset', 'digits', '--mixup', 1, '--batch-size', 31], ['even', '31']),
    (['--dataset', 'digits', '--train-split', 'test'], ['train', 'validation', "'test'"]),
])
def test_errors(args, words):
    with pytest.raises(ValueError) as error:
        create_train_loader(arguments(*args), SIZE, 10, CPU)
    assert all(word in str(error.value) for word in words)


def test_empty_folder(tmp_path):
    (tmp_path / 'train').mkdir()
    with pytest.raises(ValueError, match='0 images'):
        create_train_loader(arguments('--data-dir', tmp_path), SIZE, 10, CPU)

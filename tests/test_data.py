"""What a run is trained on: timm's data sets, the same images in the same order however they are loaded."""
import itertools
import json
import shutil
import struct
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

from timm_dresnet.images import convert_image
from train.arguments import parse_args
from train.build import Process
from train.datasets import BadImageError, Digits, class_names, count_bad_images, open_dataset
from train.engine import validate
from train.loading import create_eval_loader, create_train_loader

SIZE = dict(
    input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.5,) * 3, interpolation='bicubic', crop_pct=1., crop_mode='center')
ALONE = Process(torch.device('cpu'))
assert_equal = partial(torch.testing.assert_close, rtol=0, atol=0)


def arguments(*args):
    return parse_args(['--batch-size', '32', '--workers', '0', *map(str, args)])


def train_loader(*args, process=ALONE):
    args = arguments(*args)
    return create_train_loader(args, open_dataset(args, True, 3), SIZE, 10, process)


def eval_loader(*args, config=SIZE):
    args = arguments(*args)
    return create_eval_loader(args, open_dataset(args, False, 3), config, ALONE)


def batches(loader, epoch=0, start=0, count=None):
    loader.loader.set_epoch(epoch, start)
    return list(itertools.islice(loader, count))


def write_digits(folder, train, validation=None):
    """Write 40 images of each class, `{name: digit}`, to train on, and 10 to validate, of these classes or others."""
    for split, count, classes in (('train', 40, train), ('validation', 10, validation or train)):
        digits = Digits(split)
        for name, digit in classes.items():
            (folder / split / name).mkdir(parents=True)
            for i in [i for i, (_, target) in enumerate(digits) if target == digit][:count]:
                digits[i][0].resize((16, 16)).save(folder / split / name / f'{i:04}.png')
    return folder


@pytest.fixture(scope='module')
def image_folder(tmp_path_factory):
    """240 digits to train on and 60 to validate."""
    return write_digits(tmp_path_factory.mktemp('images'), {f'digit {i}': i for i in range(6)})


AUGMENT = ['--dataset', 'digits', '--aa', 'rand-m9-n3-mstd0.5', '--mixup', 0.2, '--cutmix', 1, '--reprob', 0.5]


@pytest.mark.parametrize('args', [['--workers', 2], ['--workers', 1, '--in-memory']], ids=str)
def test_how_images_are_loaded_changes_nothing(args):
    expected = train_loader(*AUGMENT)
    loader = train_loader(*AUGMENT, *args)
    for epoch in range(2):
        assert_equal(batches(loader, epoch), batches(expected, epoch))


@pytest.mark.parametrize('mode', ['L', 'RGB', 'HSV', 'CMYK', 'F'])
def test_modes_in_memory(mode):
    args = '--dataset', 'digits', '--input-img-mode', mode
    (image, _), (expected, _) = (
        open_dataset(arguments(*args, *more), False, Image.getmodebands(mode))[7] for more in (['--in-memory'], []))
    assert (image.mode, image.size, image.tobytes()) == (mode, expected.size, expected.tobytes())


def test_an_epoch_from_any_batch_on():
    loader = train_loader(*AUGMENT)
    whole = batches(loader, epoch=1)
    assert len(whole) == len(loader) == 1437 // 32
    for start in (0, 1, 17, len(whole) - 1):
        assert_equal(batches(loader, 1, start), whole[start:])
    assert batches(loader, 1, len(whole)) == []
    assert not torch.equal(batches(loader, 0)[0][0], whole[0][0])
    other = train_loader('--dataset', 'digits', '--no-aug', '--seed', 43)  # not the order of 42 one epoch later
    assert not torch.equal(batches(other)[0][1], batches(train_loader('--dataset', 'digits', '--no-aug'), 1)[0][1])


def test_missing_split(image_folder, tmp_path):
    (tmp_path / 'train').symlink_to(image_folder / 'train')
    with pytest.raises(ValueError, match='no folder validation.* train.*--val-split') as error:
        open_dataset(arguments('--data-dir', tmp_path), False, 3)
    assert str(tmp_path) in str(error.value)
    with pytest.raises(ValueError, match='only train'):
        open_dataset(arguments('--data-dir', tmp_path, '--val-split', ''), False, 3)
    assert len(open_dataset(arguments('--data-dir', image_folder / 'validation'), False, 3)) == 60  # classes alone


def test_growing_resolution():
    args = [
        '--dataset', 'digits', '--epochs', 3, '--train-img-sizes', 8, 12, 16, '--train-size-schedule', 'progressive']
    fixed = train_loader(*args, '--train-size-schedule-spread', 0, '--train-size-random-mix', 0)
    for epoch, size in enumerate((8, 12, 16)):
        assert {images.shape for images, _ in batches(fixed, epoch)} == {(32, 3, size, size)}
    mixed = train_loader(*args)
    whole = batches(mixed, 1)
    assert {images.shape[-1] for images, _ in whole} == {8, 12, 16} and len(whole) > 17
    assert_equal(batches(train_loader(*args, '--workers', 2), 1, 17), whole[17:])


def test_repeated_augmentation_and_the_end_of_mixup():
    args = '--dataset', 'digits', '--aug-repeats', 3, '--no-aug'
    images = batches(train_loader(*args))[0][0]
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert not torch.equal(images[2], images[3])
    assert not torch.equal(images, batches(train_loader(*args, '--seed', 43))[0][0])

    loader = train_loader('--dataset', 'digits', '--mixup', 1, '--mixup-off-epoch', 1, '--workers', 1)
    for epoch, enabled in enumerate((True, False)):
        loader.mixup_enabled = enabled
        assert (batches(loader, epoch, count=1)[0][1].max(1).values < 0.9).any() == enabled


def shards(image_folder, root):
    """The image folder as WebDataset: two shards of each split."""
    webdataset = pytest.importorskip('webdataset')
    info = {}
    for split in ('train', 'validation'):
        files = sorted(image_folder.glob(f'{split}/*/*.png'))
        names = [f'digits-{split}-{part}.tar' for part in range(2)]
        for part, name in enumerate(names):
            with webdataset.TarWriter(str(root / name)) as tar:
                for file in files[part::2]:
                    tar.write(dict(__key__=file.stem, png=file.read_bytes(), cls=file.parent.name[-1]))
        lengths = [len(files[part::2]) for part in range(2)]
        info[split] = dict(name=split, filenames=names, shard_lengths=lengths, num_samples=len(files))
    (root / '_info.json').write_text(json.dumps(dict(splits=info)))


@pytest.mark.parametrize('dataset,streamed', [
    ('', []), ('torch/image_folder', []), ('hfds/{}', []), ('wds/digits', ['--workers', 1]),
    ('hfids/{}', ['--workers', 1, '--train-num-samples', 240, '--val-num-samples', 60]),
], ids=str)
def test_kinds_of_data_sets(dataset, streamed, image_folder, tmp_path):
    if dataset == 'wds/digits':
        shards(image_folder, tmp_path)
    folder = image_folder if dataset in ('', 'torch/image_folder') else tmp_path
    args = ['--data-dir', folder, '--dataset', dataset.format(image_folder), *streamed]
    evaluated = eval_loader(*args)
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
        assert class_names(evaluated.dataset) == [f'digit {i}' for i in range(6)]

    loader = train_loader(*args)
    whole = batches(loader, epoch=1)
    assert len(whole) == len(loader) and sum(len(targets) for _, targets in whole) >= 224
    assert_equal(batches(loader, epoch=1, start=3), whole[3:])
    assert_equal(batches(train_loader(*args), epoch=1), whole)


@pytest.fixture(params=[('truncated', ['--workers', 1]), ('text', ['--in-memory'])], ids=str)
def bad_folder(request, image_folder, tmp_path):
    """The image folder with one file that is no image. Returns the folder, the file, and how it is to be read."""
    kind, args = request.param
    shutil.copytree(image_folder, tmp_path, dirs_exist_ok=True)
    bad = sorted(tmp_path.glob('train/*/*.png'))[100]
    bad.write_bytes(bad.read_bytes()[:60] if kind == 'truncated' else b'no image, <html>')
    return tmp_path, bad, args


def test_bad_images_are_named_or_skipped_and_counted(bad_folder):
    folder, bad, args = bad_folder
    with pytest.raises(BadImageError) as error:
        batches(train_loader('--data-dir', folder, '--batch-size', 30, *args))
    assert str(error.value).startswith(f'{bad} cannot be read') and '\n' not in str(error.value)

    args = arguments('--data-dir', folder, '--bad-images', 'skip', '--no-aug', '--batch-size', 240, *args)
    dataset = open_dataset(args, True, 3)
    (images, _), = batches(create_train_loader(args, dataset, SIZE, 10, ALONE))
    assert count_bad_images([dataset], ALONE) == 1
    pixels = images.numpy().reshape(240, -1)
    copies = [index for index, row in enumerate(pixels) if (pixels == row).all(1).sum() == 2]
    assert len(copies) == 2  # the next one stands in
    with Image.open(sorted(folder.glob('train/*/*.png'))[101]) as image:
        expected = np.asarray(image.convert('RGB')).transpose(2, 0, 1) / 127.5 - 1
    assert np.allclose(images[copies[0]], expected, atol=1e-5)


def test_bad_images_are_left_out_of_validation(bad_folder):
    folder, bad, args = bad_folder
    model = timm.create_model('test_adaresnet', num_classes=10)
    args = arguments('--data-dir', folder, '--val-split', 'train', '--bad-images', 'skip', *args)

    def measure(limit):
        dataset = open_dataset(args, False, 3)
        loader = create_eval_loader(args, dataset, SIZE, ALONE)
        loader.sampler.num_valid_samples = limit  # the others fill batches of several processes
        return validate(model, loader, args, ALONE), count_bad_images([dataset], ALONE)

    measured, count = measure(150)
    assert count == 1
    bad.unlink()
    assert measured == pytest.approx(measure(149)[0])


@pytest.mark.parametrize('images,sizes', [(120, [30] * 4), (40, [20] * 2), (241, [32] * 7), (7, [6]), (1, [])], ids=str)
def test_small_data_sets_are_not_cut(tmp_path, images, sizes):
    (tmp_path / 'train/a').mkdir(parents=True)
    for i in range(images):
        Image.new('RGB', (8, 8)).save(tmp_path / f'train/a/{i}.png')
    assert [len(targets) for _, targets in batches(train_loader('--data-dir', tmp_path))] == sizes


def test_order_of_classes(tmp_path):
    """It does not depend on the order of a set, which differs between processes."""
    for name in ('1', '01', '001', '0001', '00001', 'A', 'a', 'b', '10', '2'):
        (tmp_path / 'train' / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / f'train/{name}/x.png')
    dataset = open_dataset(arguments('--data-dir', tmp_path), True, 3)
    names = ['00001', '0001', '001', '01', '1', '2', '10', 'A', 'a', 'b']
    assert class_names(dataset) == names
    assert [dataset.dataset.filename(i) for i in range(10)] == [f'{names[dataset[i][1]]}/x.png' for i in range(10)]


def test_images_of_phones_and_of_other_formats(tmp_path, caplog):
    """Images are turned upright, those of every usual format are read, and what is not read is named once.

    Here by 90 degrees clockwise, as orientation (0x112) 6 says, beside a resolution (0x11a) that is not a number.
    """
    image = Image.linear_gradient('L').resize((16, 16)).convert('RGB')
    exif = b'Exif\0\0II*\0' + struct.pack('<IHHHIIHHI4sI', 8, 2, 0x112, 3, 1, 6, 0x11a, 7, 4, b'odd.', 0)
    (tmp_path / 'validation/a').mkdir(parents=True)
    image.save(tmp_path / 'validation/a/0.webp', lossless=True)
    image.rotate(90).save(tmp_path / 'validation/a/1.png', exif=exif)
    image.save(tmp_path / 'validation/a/2.png', exif=b'Exif\0\0damaged')
    image.rotate(90).save(tmp_path / 'validation/a/3.tif', exif={0x112: 6})
    for name in ('notes.txt', 'x.heic', 'y.heic'):
        (tmp_path / 'validation/a' / name).touch()
    for _ in range(2):
        (images, _), = eval_loader('--data-dir', tmp_path)
    assert len(images) == 4 and (images == images[0]).all()
    for path in tmp_path.glob('validation/a/[0-3]*'):
        assert convert_image(Image.open(path), 'RGB').tobytes() == image.tobytes()
    assert caplog.text.count('not read as images: 2 .heic, 1 .txt') == 1


@pytest.mark.parametrize('files,words', [
    (['a/images/0.png', 'b/images/0.png'], 'train/a/images.*train/b/images.*one class'),
    (['a/x/0.png', 'b/y/x/0.png'], 'train/a/x.*train/b/y/x.*one class'),
    (['0.png', 'a/0.png'], 'holds images itself'),
], ids=str)
def test_other_folders_than_those_of_classes(files, words, tmp_path):
    """timm names a class by the last folder: it would take these for one, and images in none for one without a name."""
    for file in files:
        (tmp_path / 'train' / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'train' / file)
    with pytest.raises(ValueError, match=f'one folder for each class.*{words}'):
        train_loader('--data-dir', tmp_path)


def test_folders_that_a_class_map_leaves_out(tmp_path, caplog):
    """As one does that an editor has begun with a byte order mark."""
    for name in ('a', 'b', 'x/c'):
        (tmp_path / 'train' / name).mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(tmp_path / f'train/{name}/0.png')
    (tmp_path / 'map.txt').write_text('a\nb\n', encoding='utf-8-sig')
    dataset = open_dataset(arguments('--data-dir', tmp_path, '--class-map', tmp_path / 'map.txt'), True, 3)
    assert len(dataset) == 1 and caplog.text.count('that --class-map leaves out: a, c') == 1


def test_folders_without_images(tmp_path):
    (tmp_path / 'train/a').mkdir(parents=True)
    with pytest.raises(ValueError, match='0 images'):
        train_loader('--data-dir', tmp_path)
    for i in range(4):
        (tmp_path / f'train/a/{i}.png').write_bytes(b'')
    with pytest.raises(BadImageError, match='None of the 4 images'):
        batches(train_loader('--data-dir', tmp_path, '--bad-images', 'skip', '--batch-size', 4))


@pytest.mark.parametrize('args,words', [
    (['--data-dir', '/no/such/folder'], '/no/such/folder'),
    (['--data-dir', 'x', '--dataset', 'ImageFolder'], 'no folder x'),
    (['--dataset', 'torch/nothing', '--data-dir', '.'], 'torch/nothing'),
    (['--dataset', 'torc/cifar10', '--data-dir', '.'], 'torc/cifar10.*torch/'),
    (['--dataset', 'digits', '--mixup', 1, '--batch-size', 31], 'even.*31'),
    (['--dataset', 'digits', '--input-img-mode', 'RGBA'], '3 channels.*RGBA.*--in-chans'),
    (['--dataset', 'digits', '--train-split', 'test'], "train.*validation.*'test'"),
])
def test_errors(args, words):
    with pytest.raises(ValueError, match=words):
        train_loader(*args)

"""Data sets of images, and what is wrong with them: unreadable files, missing splits, classes that do not fit."""
import argparse
import logging
import os
from collections import Counter
from functools import lru_cache
from pathlib import Path
from typing import Any, Dict, FrozenSet, List, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import create_dataset, set_img_extensions
from timm.data.dataset_factory import _EVAL_SYNONYM, _TRAIN_SYNONYM, _search_split
from timm.utils import natural_key
from torch.utils.data import Dataset, IterableDataset
from tqdm.contrib.concurrent import thread_map

from timm_dresnet.images import SUFFIXES, convert_image

from .build import Process

_logger = logging.getLogger('train')
_MODES = {1: 'L', 2: 'LA', 3: 'RGB', 4: 'RGBA'}
_SPLITS = {*_TRAIN_SYNONYM, *_EVAL_SYNONYM, 'test'}

UNREADABLE = -100  # the class of an image that stands in for an unreadable one in validation


class BadImageError(Exception):
    """An image cannot be read."""

    def __init__(self, message: str) -> None:
        # PyTorch repeats an error of a worker process with its traceback as the message; the last line is ours
        super().__init__(message.strip().splitlines()[-1].split('BadImageError: ')[-1])


class Digits(Dataset):
    """scikit-learn's handwritten digits: 1,797 images of 8x8 pixels, a fifth of them held out.

    The split is the same in every run: stratified, with seed 0.
    """
    classes = [str(digit) for digit in range(10)]

    def __init__(self, split: str) -> None:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
        splits = ('train', 'validation')
        if split not in splits:
            raise ValueError(f'digits has the splits {" and ".join(splits)}, not {split!r}.')
        images, targets = load_digits(return_X_y=True)
        images = np.round(images.reshape(-1, 8, 8) * (255 / 16)).astype(np.uint8)
        split_images = train_test_split(images, targets, test_size=360, random_state=0, stratify=targets)
        self.images, self.targets = split_images[splits.index(split)::2]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tuple[Image.Image, int]:
        return Image.fromarray(self.images[index]), int(self.targets[index])


class Images(Dataset):
    """A map-style data set in which an unreadable image is an error, or is skipped and counted.

    The next image stands in for a skipped one: in training with its own class, in validation with the class
    `UNREADABLE`, which is not measured.

    Attributes:
        mode: Mode of the images, as in PIL.
        transform: What is done to each image.
        bad: Which images could not be read so far, in memory that is shared with the worker processes.
    """

    def __init__(
            self,
            dataset: Dataset,
            mode: str,
            is_training: bool = True,
            skip_bad: bool = False,
            in_memory: bool = False,
    ) -> None:
        self.dataset = dataset
        # ImageDataset.__getitem__ would log an unreadable image and return another
        self.reader = getattr(dataset, 'reader', dataset)
        self.mode = mode
        self.is_training = is_training
        self.skip_bad = skip_bad
        self.transform = None
        self.bad = torch.zeros(len(dataset), dtype=torch.bool).share_memory_()
        self.decoded = None
        if in_memory:
            self._decode_all()

    def __len__(self) -> int:
        return len(self.dataset)

    def _name(self, index: int) -> str:
        samples = getattr(self.reader, 'samples', None)  # of folders
        return samples[index][0] if samples else f'image {index} of {type(self.dataset).__name__}'

    def _read(self, index: int) -> Optional[Tuple[Image.Image, Any]]:
        try:
            image, target = self.reader[index]
            if not isinstance(image, Image.Image):
                with image:
                    image = Image.open(image)
                    image.load()
            return convert_image(image, self.mode), target
        except Exception as e:  # damaged files make PIL raise nearly anything
            self.bad[index] = True
            if self.skip_bad:
                return None
            reason = f'{type(e).__name__}: {" ".join(str(e).split())}'
            raise BadImageError(
                f'{self._name(index)} cannot be read ({reason}). Repair or remove it, or add --bad-images skip.') from e

    def _decode_all(self) -> None:
        def decode(index: int) -> Tuple[np.ndarray, Tuple[int, int], Any]:
            image, target = self._read(index) or (Image.new(self.mode, (0, 0)), None)
            return np.frombuffer(image.tobytes(), np.uint8), image.size, target

        decoded = thread_map(decode, range(len(self)), desc='decode', unit='image', leave=False, disable=None)
        pixels, self.sizes, self.targets = zip(*decoded)
        self.starts = np.cumsum([0, *(array.size for array in pixels)])
        # one tensor in shared memory: worker processes neither copy it nor decode again
        self.decoded = torch.empty(int(self.starts[-1]), dtype=torch.uint8).share_memory_()
        np.concatenate(pixels, out=self.decoded.numpy())

    def _get(self, index: int) -> Optional[Tuple[Image.Image, Any]]:
        if self.decoded is None:
            return self._read(index)
        if self.bad[index]:
            return None
        pixels = self.decoded.numpy()[self.starts[index]:self.starts[index + 1]]
        return Image.frombytes(self.mode, self.sizes[index], pixels), self.targets[index]

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        for candidate in range(index, index + len(self)):
            sample = self._get(candidate % len(self))
            if sample is None:
                continue
            image, target = sample
            if candidate != index and not self.is_training:
                target = UNREADABLE
            return image if self.transform is None else self.transform(image), -1 if target is None else target
        raise BadImageError(f'None of the {len(self)} images can be read, the first is {self._name(0)}.')


def open_dataset(args: argparse.Namespace, is_training: bool, in_chans: int) -> Dataset:
    """The data set of `--train-split` or `--val-split`: `Images`, or a stream of timm's."""
    split = args.train_split if is_training else args.val_split
    mode = args.input_img_mode or _MODES.get(in_chans)
    if not mode or Image.getmodebands(mode) != in_chans:
        raise ValueError(f'the model takes {in_chans} channels, and images have {mode or ", ".join(_MODES.values())}: '
                         'see --in-chans and --input-img-mode.')
    source, slash, _ = (args.dataset or '').lower().partition('/')
    if slash and source not in ('torch', 'hfds', 'hfids', 'tfds', 'wds'):  # timm would take it for a folder
        raise ValueError(f'--dataset {args.dataset}: its name must begin with torch/, hfds/, hfids/, tfds/ or wds/.')
    is_folder = not slash and args.dataset != 'digits'
    if is_folder:
        _check_folder(args.data_dir, split, is_training)
        set_img_extensions(sorted(SUFFIXES))
    if args.dataset == 'digits':
        dataset = Digits(split)
    else:
        try:
            dataset = create_dataset(
                args.dataset,
                root=args.data_dir,
                download=args.dataset_download,
                split=split,
                is_training=is_training,
                class_map=args.class_map,
                batch_size=args.batch_size,
                num_samples=args.train_num_samples if is_training else args.val_num_samples,
                seed=args.seed,
                input_img_mode=mode,
                input_key=args.input_key,
                target_key=args.target_key,
            )
        except (AssertionError, ImportError, RuntimeError, TypeError) as e:
            raise ValueError(f'--dataset {args.dataset} --data-dir {args.data_dir}: {e}') from e
    if isinstance(dataset, IterableDataset):
        if args.in_memory:
            raise ValueError(f'--in-memory needs a map-style data set, {args.dataset} is a stream.')
        return dataset
    if is_folder:
        _check_class_folders(dataset.reader)
        _name_unread(dataset.reader.root, frozenset(dataset.reader.class_to_idx))
        if not args.class_map:
            _order_classes(dataset.reader)
    if not len(dataset):
        raise ValueError(f'there are no images in {args.data_dir} (split {split}).')
    return Images(dataset, mode, is_training, skip_bad=args.bad_images == 'skip', in_memory=args.in_memory)


def _check_folder(data_dir: Optional[str], split: str, is_training: bool) -> None:
    """Refuse a folder without the split, of which timm would take all images: to validate, those of training too."""
    if not data_dir:
        recipe = 'a recipe (--config train/recipes/digits.yaml), ' if is_training else ''
        raise ValueError(
            f'say which images: by {recipe}a folder (--data-dir DIR), or a data set that timm knows (--dataset NAME).')
    if not Path(data_dir).exists():
        raise ValueError(f'there is no folder {data_dir}, check --data-dir.')
    splits = sorted(folder.name for folder in Path(data_dir).iterdir() if folder.name in _SPLITS)
    if Path(_search_split(data_dir, split)) == Path(data_dir) and (is_training or splits):
        raise ValueError(
            f'{data_dir} has no folder {split}{", only " + " and ".join(splits) if splits else ""}: '
            f'put the images there, or name another by {"--train-split" if is_training else "--val-split"}.')


@lru_cache(maxsize=None)  # once, although a folder is opened several times
def _name_unread(folder: str, classes: FrozenSet[str]) -> None:
    suffixes: Counter[str] = Counter()
    left_out = set()
    for path, _, files in os.walk(folder, followlinks=True):
        found = [Path(file).suffix.lower() or 'without a suffix' for file in files]
        suffixes.update(found)
        if SUFFIXES.intersection(found) and os.path.basename(path) not in classes:
            left_out.add(os.path.basename(path))
    unread = [f'{count:,} {suffix}' for suffix, count in sorted(suffixes.items()) if suffix not in SUFFIXES]
    if unread:
        _logger.warning(f'Files in {folder} that are not read as images: {", ".join(unread)}')
    if left_out:
        _logger.warning(f'Folders in {folder} that --class-map leaves out: {", ".join(sorted(left_out))}')


def _check_class_folders(reader: Any) -> None:
    """Refuse images outside of class folders, and several folders of one name, which are one class to timm."""
    folders: Dict[str, str] = {}
    for folder in sorted({os.path.dirname(path) for path, _ in reader.samples}):
        other = folders.setdefault(os.path.basename(folder), folder)
        if other != folder or Path(folder) == Path(reader.root):
            found = f'{other} and {folder} would be one class' if other != folder else 'it holds images itself'
            raise ValueError(f'{reader.root} must have one folder for each class, with its images: {found}.')


def _order_classes(reader: Any) -> None:
    """Give classes the same numbers in every process: timm leaves those of 'a', 'A', '1' and '01' to the hash seed."""
    names = sorted(reader.class_to_idx, key=reader.class_to_idx.get)
    reader.class_to_idx = {name: i for i, name in enumerate(sorted(names, key=lambda name: (natural_key(name), name)))}
    reader.samples = [(path, reader.class_to_idx[names[index]]) for path, index in reader.samples]


def count_bad_images(datasets: Sequence[Dataset], process: Process) -> int:
    """Number of images that no process could read so far; streams do not count theirs."""
    flags = [dataset.bad for dataset in datasets if isinstance(dataset, Images)]
    if not flags:
        return 0
    bad = torch.cat(flags).to(process.device, torch.int32)
    if process.distributed:
        dist.all_reduce(bad, dist.ReduceOp.MAX)
    return int(bad.sum())


def class_names(dataset: Dataset) -> Optional[List[str]]:
    """Names of the classes in the order of their indices, if the data set tells."""
    dataset = getattr(dataset, 'dataset', dataset)
    names = getattr(dataset, 'classes', None)
    if names is None:
        index = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
        names = sorted(index, key=index.get) if index else None
    # torchvision's ImageNet has tuples of synonyms
    return [str(name[0] if isinstance(name, tuple) else name) for name in names] if names else None


def check_classes(dataset: Dataset, num_classes: int, label_names: Sequence[str] = ()) -> None:
    """Raise a ValueError for a data set with more classes than the model, or with other ones or another order."""
    names = class_names(dataset) or []
    if len(names) > num_classes:
        raise ValueError(
            f'the data set has {len(names)} classes, the model {num_classes}: see --num-classes, and whether all of '
            f'these are classes: {", ".join(names[:10])}{", ..." if len(names) > 10 else ""}.')
    known = {*names} & {*label_names}
    if names and label_names and not known:
        _logger.warning(
            f'The model has no class named {" or ".join(names[:3])}: classes of the data set count by their numbers.')
    for index, name in enumerate(names):
        if known and label_names[index] != name:  # a name may stand twice, as in ImageNet
            number = label_names.index(name) if name in label_names else 'none'
            raise ValueError(
                f'the class {name} has number {index} in the data set and {number} in the model: give all of the '
                "model's, in its order, in a text file of one name on a line, by --class-map.")

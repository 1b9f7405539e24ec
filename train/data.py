"""Data sets and loaders: timm's, in an order and with augmentations that depend only on seed, epoch and batch."""
import argparse
import atexit
import multiprocessing
import random
import signal
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from timm.data import FastCollateMixup, create_dataset, create_loader
from timm.data.dataset import IterableImageDataset
from timm.data.dataset_factory import _EVAL_SYNONYM, _TRAIN_SYNONYM, _search_split
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.readers.reader_wds import ReaderWds, WdsTargetKeyError, _decode
from timm.data.scheduled_sampler import ScheduledBatchSampler, ScheduledTransformDataset
from timm_dresnet.images import convert_image
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, IterableDataset, Sampler
from tqdm import tqdm


_SPLITS = {*_TRAIN_SYNONYM, *_EVAL_SYNONYM, 'test'}


UNREADABLE = -100  # class of what stands in for an image that could not be read


class BadImageError(Exception):
    """An image cannot be read."""


class Digits(Dataset):
    """The handwritten digits that scikit-learn brings along: 1,797 images of 8x8 pixels, a fifth of them held out.

    The split is the same in every run: stratified, with seed 0.
    """
    classes = [str(digit) for digit in range(10)]

    def __init__(self, split: str) -> None:
        """
        Args:
            split: 'train' (1,437 images) or 'validation' (360).

        Raises:
            ValueError: If there is no such split.
        """
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
    """Images by their number, where one that cannot be read is never passed over in silence.

    It is replaced by the next one, in training with its class, otherwise with the class `UNREADABLE`.

    Attributes:
        transform: What is done to each image; set by timm's loader.
        bad: Which images could not be read so far, in memory that is shared with the loader's processes.
    """

    def __init__(
            self,
            dataset: Dataset,
            mode: str,
            is_training: bool = True,
            skip_bad: bool = False,
            in_memory: bool = False,
    ) -> None:
        """
        Args:
            dataset: One of timm's, of torchvision's, or the digits.
            mode: Mode of the images, as in PIL.
            is_training: Whether images are trained on.
            skip_bad: Replace images that cannot be read, instead of raising.
            in_memory: Decode all images now and keep them, in shared memory.
        """
        self.dataset = dataset
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
        if hasattr(self.dataset, 'filename'):
            name = self.dataset.filename(index, absolute=True)
        else:
            name = getattr(self.dataset, 'samples', {index: [None]})[index][0]  # torchvision's ImageFolder
        return name or f'image {index} of {type(self.dataset).__name__}'

    def _read(self, index: int) -> Tuple[Image.Image, Any]:
        # past ImageDataset.__getitem__, which logs an unreadable image and takes another
        reader = getattr(self.dataset, 'reader', self.dataset)
        try:
            image, target = reader[index]
            if not isinstance(image, Image.Image):
                with image:
                    image = Image.open(image)
                    image.load()
            return convert_image(image, self.mode), target
        except Exception as e:  # damaged files make PIL raise nearly anything
            self.bad[index] = True
            raise BadImageError(f'{self._name(index)} cannot be read ({type(e).__name__}: {e}).') from e

    def _decode_all(self) -> None:
        def decode(index: int) -> Optional[Tuple[np.ndarray, Any]]:
            try:
                image, target = self._read(index)
            except BadImageError:
                if not self.skip_bad:
                    raise
                return None
            return np.asarray(image), target

        with ThreadPoolExecutor() as pool:
            items = list(tqdm(
                pool.map(decode, range(len(self))), 'decode', len(self), unit='image', leave=False, disable=None))
        pixels = [np.empty(0, np.uint8) if item is None else item[0] for item in items]
        self.shapes = [array.shape for array in pixels]
        self.targets = [None if item is None else item[1] for item in items]
        self.starts = np.cumsum([0, *(array.size for array in pixels)])
        # one tensor in shared memory: loader processes neither copy it nor decode again
        self.decoded = torch.empty(int(self.starts[-1]), dtype=torch.uint8).share_memory_()
        for start, array in zip(self.starts, pixels):
            self.decoded[start:start + array.size] = torch.from_numpy(array.reshape(-1).copy())

    def _get(self, index: int) -> Tuple[Image.Image, Any]:
        if self.decoded is None:
            return self._read(index)
        if self.bad[index]:
            raise BadImageError(f'{self._name(index)} cannot be read.')
        pixels = self.decoded[self.starts[index]:self.starts[index + 1]].numpy()
        return Image.fromarray(pixels.reshape(self.shapes[index])), self.targets[index]

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        for candidate in range(index, index + len(self)):
            try:
                image, target = self._get(candidate % len(self))
            except BadImageError:
                if not self.skip_bad:
                    raise
                continue
            if candidate != index and not self.is_training:
                target = UNREADABLE
            return image if self.transform is None else self.transform(image), -1 if target is None else target
        raise BadImageError(f'None of the {len(self)} images can be read, the first is {self._name(0)}.')


class Shards(ReaderWds):
    """timm's reader of WebDataset shards, where what cannot be read is never passed over in silence.

    Attributes:
        bad: As of `Images`, but at hashes of their names: how many a stream has is known only at its end.
    """

    def __init__(self, *args: Any, skip_bad: bool = False, **kwargs: Any) -> None:
        """
        Args:
            skip_bad: Pass over what cannot be read, instead of raising.
        """
        super().__init__(*args, **kwargs)
        self.skip_bad = skip_bad
        self.bad = torch.zeros(2 ** 20, dtype=torch.bool).share_memory_()

    def _lazy_init(self) -> None:
        super()._lazy_init()
        for stage in self.ds.pipeline:
            if 'handler' not in getattr(stage, 'kw', {}):
                continue
            stage.kw['handler'] = self._handle
            if getattr(stage.args[:1] and stage.args[0], 'func', None) is _decode:
                stage.args = partial(self._decode, stage.args[0]),

    @staticmethod
    def _decode(decode: Callable[[Dict[str, Any]], Any], sample: Dict[str, Any]) -> Any:
        try:
            return decode(sample)
        except (TypeError, WdsTargetKeyError):  # of the arguments, not of this sample
            raise
        except Exception as e:
            name = f'{sample["__key__"]} in {sample["__url__"]}'
            raise BadImageError(f'{name} cannot be read ({type(e).__name__}: {e}).') from e

    def _handle(self, error: Exception) -> bool:
        if isinstance(error, (TypeError, WdsTargetKeyError)):
            raise error
        reason, *where = error.args or ('',)  # webdataset adds where it was
        if isinstance(error, BadImageError):
            error.args = reason,
        else:
            shard = where[-1] if where else f'a shard in {self.root}'
            error = BadImageError(f'{shard} cannot be read to its end ({type(error).__name__}: {reason}).')
        if not self.skip_bad:
            raise error
        name = str(error).split(' cannot be read')[0]  # the reason may hold an address in memory
        self.bad[zlib.crc32(name.encode()) % len(self.bad)] = True
        return True

    def __iter__(self) -> Iterator[Tuple[Image.Image, Any]]:
        empty = True
        for item in super().__iter__():
            empty = False
            yield item
        if empty and self.bad.any():
            raise BadImageError(f'None of the images in {self.root} can be read.')


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and PyTorch with what `key` (numbers from 0) is hashed to."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed notes the stack for every absent kind of device: slow
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


class SeededBatch(NamedTuple):
    """A batch to load: the key that it is seeded with, and the numbers of its images (each with that of its size)."""
    key: Tuple[int, ...]
    indices: List[Any]


class SeededBatchSampler(Sampler):
    """Batches of an epoch, from any batch on."""

    def __init__(self, batches: Sampler, seed: int, rank: int) -> None:
        self.batches = batches
        self.key = seed, rank
        self.set_epoch(0)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose what comes next, as in `EpochLoader.set_epoch`."""
        getattr(self.batches, 'set_epoch', self.batches.sampler.set_epoch)(epoch)
        self.epoch, self.start = epoch, start

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[SeededBatch]:
        for number, indices in islice(enumerate(self.batches), self.start, None):
            yield SeededBatch((*self.key, self.epoch, number), indices)


class SeededRepeats(RepeatAugSampler):
    """timm's sampler for repeated augmentation, whose order depends on the epoch alone, with an order for each seed."""

    def __init__(self, seed: int, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.seed = seed

    def set_epoch(self, epoch: int) -> None:
        super().set_epoch(self.seed + epoch)


class SeededImages(Dataset):
    """Images in whole batches, augmented with random numbers that depend on the batch alone.

    So neither the number of loading processes nor where a run was stopped and resumed changes what is trained on.
    """

    def __init__(self, images: Dataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, batch: SeededBatch) -> List[Tuple[Any, int]]:
        seed_everything(*batch.key, 0)
        return [self.images[index] for index in batch.indices]


class EpochLoader:
    """What timm's PrefetchLoader takes its batches from in training: an epoch, from any batch on.

    Before each batch the random numbers of this process are seeded, for random erasing. Of a stream, the batches that
    are left out must be loaded all the same.
    """

    def __init__(self, loader: DataLoader, seed: int, rank: int) -> None:
        self.loader = loader
        self.key = seed, rank
        self.set_epoch(0)

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose what comes next.

        Args:
            epoch: Epoch to go through next.
            start: Number of batches that are left out at its beginning.
        """
        self.epoch = epoch
        self.start = start
        if isinstance(self.loader.batch_sampler, SeededBatchSampler):
            self.loader.batch_sampler.set_epoch(epoch, start)
        elif hasattr(self.loader.dataset, 'set_epoch'):
            self.loader.dataset.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        seed_everything(*self.key, self.epoch)  # the processes that load a stream are seeded from here
        batches = iter(self.loader)
        if not isinstance(self.loader.batch_sampler, SeededBatchSampler):
            batches = islice(batches, self.start, None)
        for number, batch in enumerate(batches, self.start):
            seed_everything(*self.key, self.epoch, number, 1)
            yield batch


def _start_worker(init: Optional[Callable[[int], None]], number: int) -> None:
    # a signal to the whole process group is for the main process, which still needs its batches to end well
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if init is not None:
        init(number)


def _guard_workers(loader: DataLoader, args: argparse.Namespace) -> None:
    loader.worker_init_fn = partial(_start_worker, loader.worker_init_fn)
    loader.timeout = args.worker_timeout if args.workers else 0


def is_worker_lost(error: Exception) -> bool:
    """Whether it says that a process that loads was killed or gives nothing; PyTorch may do so at any moment."""
    if isinstance(error, (EOFError, ConnectionRefusedError, ConnectionResetError)):  # while it handed over a batch
        return not str(error).startswith('Caught ')  # the data set's own, raised in such a process
    return str(error).startswith(('DataLoader worker (pid', 'DataLoader timed out'))


@atexit.register
def _kill_workers() -> None:
    # multiprocessing would ask them to end by a signal that they ignore, and wait for it
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises an error when one is killed
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _create_images(args: argparse.Namespace, split: str, is_training: bool, in_chans: int) -> Dataset:
    mode = args.input_img_mode or ('RGB' if in_chans == 3 else 'L')
    if args.dataset == 'digits':
        dataset = Digits(split)
    elif not args.dataset and not (args.data_dir and Path(args.data_dir).exists()):
        raise ValueError(
            f'there is no folder {args.data_dir}, check --data-dir.' if args.data_dir else
            f'say what to {"train on: a recipe (--config train/recipes/digits.yaml)," if is_training else "measure on:"} '
            'a folder of images (--data-dir DIR) or a data set that timm knows (--dataset NAME).')
    else:
        if not args.dataset and _search_split(args.data_dir, split) == args.data_dir:
            # timm would take all images there are: those of training to validate on
            splits = [folder.name for folder in Path(args.data_dir).iterdir() if folder.name in _SPLITS]
            if is_training or splits:
                option = '--train-split' if is_training else '--val-split'
                raise ValueError(
                    f'{args.data_dir} has no folder {split}{", only " + " and ".join(sorted(splits)) if splits else ""}: '
                    f'put the images there, or name another by {option}.')
        options = dict(
            split=split,
            is_training=is_training,
            class_map=args.class_map,
            batch_size=args.batch_size,
            num_samples=args.train_num_samples if is_training else args.val_num_samples,
            seed=args.seed,
            repeats=args.epoch_repeats,
            input_img_mode=mode,
            input_key=args.input_key,
            target_key=args.target_key,
        )
        try:
            if (args.dataset or '').startswith('wds/'):
                options = {key: value for key, value in options.items() if value is not None}
                reader = Shards(args.data_dir, skip_bad=args.bad_images == 'skip', **options)
                dataset = IterableImageDataset(args.data_dir, reader)
            else:
                dataset = create_dataset(args.dataset, root=args.data_dir, download=args.dataset_download, **options)
        except (AssertionError, ImportError, RuntimeError) as e:
            raise ValueError(f'--dataset {args.dataset} --data-dir {args.data_dir}: {e}') from e
    if isinstance(dataset, IterableDataset):
        if args.in_memory:
            raise ValueError(f'--in-memory needs images that are numbered, {args.dataset} is a stream.')
        return dataset
    if not len(dataset):
        raise ValueError(f'there are no images in {args.data_dir} (split {split}).')
    return Images(dataset, mode, is_training, skip_bad=args.bad_images == 'skip', in_memory=args.in_memory)


def _unwrap(dataset: Dataset) -> Dataset:
    """What a loader reads, without what seeds it and sets its image sizes."""
    dataset = getattr(dataset, 'images', dataset)
    return dataset.dataset if isinstance(dataset, ScheduledTransformDataset) else dataset


def count_bad_images(loaders: Sequence[Any], device: torch.device, distributed: bool) -> int:
    """Number of images that could not be read so far, by any process; of `hfids/` streams nothing is known."""
    datasets = [_unwrap(loader.dataset) for loader in loaders]
    sources = [getattr(dataset, 'reader', dataset) for dataset in datasets]
    flags = [source.bad for source in sources if isinstance(source, (Images, Shards))]
    if not flags:
        return 0
    bad = torch.cat(flags).to(device, torch.int32)
    if distributed:
        dist.all_reduce(bad, dist.ReduceOp.MAX)
    return int(bad.sum())


def class_names(dataset: Dataset) -> Optional[List[str]]:
    """Names of the classes in the order of their indices, if the data set tells."""
    dataset = _unwrap(dataset)
    dataset = getattr(dataset, 'dataset', dataset)
    names = getattr(dataset, 'classes', None)
    if names is None:
        index = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
        names = sorted(index, key=index.get) if index else None
    # torchvision's ImageNet has tuples of synonyms
    return [str(name[0] if isinstance(name, tuple) else name) for name in names] if names else None


def check_classes(dataset: Dataset, num_classes: int, label_names: Sequence[str] = ()) -> None:
    """Refuse a data set that has more classes than the model, or some of the same name at other indices.

    Args:
        dataset: The data set.
        num_classes: Number of classes of the model.
        label_names: Their names, as far as they are known.

    Raises:
        ValueError: If it has.
    """
    names = class_names(dataset) or []
    if len(names) > num_classes:
        raise ValueError(f'the data set has {len(names)} classes, the model {num_classes}: see --num-classes.')
    for index, name in enumerate(names):
        if name in label_names and label_names.index(name) != index:
            raise ValueError(
                f'the class {name} has number {index} in the data set and {label_names.index(name)} in the model: give '
                'all of the model\'s, in its order, in a text file of one name on a line, by --class-map.')


def _common(args: argparse.Namespace, data_config: Dict[str, Any], device: torch.device) -> Dict[str, Any]:
    return dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        pin_memory=args.pin_mem,
        device=device,
    )


def create_eval_loader(args: argparse.Namespace, data_config: Dict[str, Any], device: torch.device):
    """Loader of the validation split.

    Args:
        args: The run's arguments.
        data_config: Input size and preprocessing, as from timm's `resolve_input_data_config`.
        device: Where batches go.
    """
    loader = create_loader(
        _create_images(args, args.val_split, False, data_config['input_size'][0]),
        batch_size=args.validation_batch_size or args.batch_size,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        crop_mode=data_config['crop_mode'],
        distributed=args.distributed,
        persistent_workers=args.workers > 0,
        **_common(args, data_config, device),
    )
    _guard_workers(loader.loader, args)
    return loader


def create_train_loader(
        args: argparse.Namespace,
        data_config: Dict[str, Any],
        num_classes: int,
        device: torch.device,
):
    """Loader of the training split; `loader.loader` is the `EpochLoader` that epochs are set on.

    Args:
        args: The run's arguments.
        data_config: Input size and preprocessing, as from timm's `resolve_input_data_config`.
        num_classes: Number of classes that Mixup and CutMix spread targets over.
        device: Where batches go.
    """
    collate_fn = None
    if args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None:
        if args.batch_size % 2:
            raise ValueError(f'Mixup and CutMix need an even --batch-size, got {args.batch_size}.')
        collate_fn = FastCollateMixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            cutmix_minmax=args.cutmix_minmax,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )
    dataset = _create_images(args, args.train_split, True, data_config['input_size'][0])
    if args.train_img_sizes and not isinstance(dataset, Images):
        raise ValueError(f'--train-img-sizes needs images that are numbered, {args.dataset} is a stream.')
    try:
        loader = create_loader(
            dataset,
            batch_size=args.batch_size,
            is_training=True,
            no_aug=args.no_aug,
            re_prob=args.reprob,
            re_mode=args.remode,
            re_count=args.recount,
            train_crop_mode=args.train_crop_mode,
            scale=args.scale,
            ratio=args.ratio,
            hflip=args.hflip,
            vflip=args.vflip,
            color_jitter=args.color_jitter,
            color_jitter_prob=args.color_jitter_prob,
            grayscale_prob=args.grayscale_prob,
            gaussian_blur_prob=args.gaussian_blur_prob,
            auto_augment=args.aa,
            interpolation=args.train_interpolation if args.train_interpolation and not args.no_aug
            else data_config['interpolation'],
            collate_fn=collate_fn,
            # fresh processes every epoch where theirs have a state: the random numbers of a stream, whether Mixup is off
            persistent_workers=False,
            input_size_choices=args.train_img_sizes,
            **_common(args, data_config, device),
        )
    except AssertionError as e:  # timm's, of a policy that it does not know
        raise ValueError(f'--aa {args.aa}: {e}') from e
    batches = loader.loader
    if isinstance(dataset, Images):
        if args.aug_repeats:
            sampler = SeededRepeats(args.seed, dataset, args.world_size, args.rank, num_repeats=args.aug_repeats)
        else:
            sampler = DistributedSampler(dataset, args.world_size, args.rank, seed=args.seed)
        if args.train_img_sizes:
            batch_sampler = ScheduledBatchSampler(
                sampler,
                [args.batch_size] * len(args.train_img_sizes),
                seed=args.seed,
                choice_schedule=args.train_size_schedule,
                schedule_epochs=args.epochs,
                schedule_spread=args.train_size_schedule_spread,
                schedule_random_mix=args.train_size_random_mix,
            )
        else:
            batch_sampler = BatchSampler(sampler, args.batch_size, drop_last=True)
        batches = DataLoader(
            SeededImages(batches.dataset),
            batch_sampler=SeededBatchSampler(batch_sampler, args.seed, args.rank),
            num_workers=args.workers,
            collate_fn=batches.collate_fn,
            pin_memory=args.pin_mem,
            persistent_workers=args.workers > 0 and not args.mixup_off_epoch,
        )
    elif args.aug_repeats:
        raise ValueError(f'--aug-repeats needs images that are numbered, {args.dataset} is a stream.')
    _guard_workers(batches, args)
    loader.loader = EpochLoader(batches, args.seed, args.rank)
    return loader

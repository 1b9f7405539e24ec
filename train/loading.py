"""Loaders: timm's, in an order and with augmentations that depend only on seed, epoch and batch."""
import argparse
import atexit
import multiprocessing
import random
import signal
from itertools import islice
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import numpy as np
import torch
from timm.data import FastCollateMixup, ScheduledBatchSampler, create_loader
from timm.data.distributed_sampler import RepeatAugSampler
from timm.data.loader import PrefetchLoader, fast_collate
from torch.utils.data import BatchSampler, DataLoader, Dataset, DistributedSampler, Sampler

from .build import Process
from .datasets import Images


def seed_everything(*key: int) -> None:
    """Seed Python, NumPy and PyTorch with what `key` (numbers from 0) is hashed to."""
    seed = int(np.random.SeedSequence(key).generate_state(1)[0])
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed notes the stack for every absent kind of device: slow
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(seed)


class SeededImages(Dataset):
    """Images in whole batches, augmented with random numbers that depend on the batch alone.

    So neither the number of worker processes nor where a run was stopped and resumed changes what is trained on.
    """

    def __init__(self, images: Dataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, batch: Tuple[Tuple[int, ...], List[Any]]) -> List[Tuple[Any, int]]:
        key, indices = batch
        seed_everything(*key, 0)
        return [self.images[index] for index in indices]


class EpochLoader(DataLoader):
    """Batches of an epoch, from any batch on.

    Before each batch the random numbers of this process are seeded, for random erasing. The batches of a stream that
    are skipped must be loaded all the same.
    """

    def __init__(self, dataset: Dataset, batches: Optional[Sampler], *key: int, **kwargs: Any) -> None:
        if batches is not None:  # of a stream there are none
            kwargs['batch_sampler'] = []  # what is left of the epoch: keys, each with the indices of a batch
        super().__init__(dataset, **kwargs)
        self.batches, self.key = batches, key
        self.set_epoch(0)

    def __len__(self) -> int:
        return super().__len__() if self.batches is None else len(self.batches)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Choose the epoch to go through next, and how many batches are skipped at its beginning."""
        self.epoch, self.start = epoch, start
        if self.batches is None:
            self.dataset.set_epoch(epoch)
            return
        if isinstance(self.batches, ScheduledBatchSampler):
            self.batches.set_epoch(epoch)
        # not seed + epoch, by which one seed would have the orders of the next; timm's RepeatAugSampler takes no seed
        self.batches.sampler.set_epoch((self.key[0] << 20) + epoch)
        self.batch_sampler[:] = [
            ((*self.key, epoch, number), indices) for number, indices in islice(enumerate(self.batches), start, None)]

    def __iter__(self) -> Iterator[Any]:
        seed_everything(*self.key, self.epoch)  # the worker processes of a stream are seeded from here
        batches = super().__iter__()
        if self.batches is None:
            batches = islice(batches, self.start, None)
        for number, batch in enumerate(batches, self.start):
            seed_everything(*self.key, self.epoch, number, 1)
            yield batch


def _start_worker(number: int) -> None:
    # a signal to the whole process group is for the main process, which needs its workers to finish the batch
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _kill_workers() -> None:
    # multiprocessing would ask them to end by a signal that they ignore, and wait for it
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises an error when one is killed
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _guard_workers(loader: DataLoader, args: argparse.Namespace) -> None:
    if args.workers:
        loader.worker_init_fn = _start_worker
        loader.timeout = args.worker_timeout
        atexit.register(_kill_workers)


def _pins_memory(args: argparse.Namespace, process: Process) -> bool:
    return process.device.type == 'cuda' if args.pin_mem is None else args.pin_mem


def create_eval_loader(
        args: argparse.Namespace,
        dataset: Dataset,
        data_config: Dict[str, Any],
        process: Process,
) -> PrefetchLoader:
    """Loader of the validation split, with size and preprocessing from timm's `resolve_input_data_config`."""
    loader = create_loader(
        dataset,
        batch_size=args.validation_batch_size or args.batch_size,
        num_workers=args.workers,
        pin_memory=_pins_memory(args, process),
        distributed=process.distributed,
        device=process.device,
        **data_config,
    )
    _guard_workers(loader.loader, args)
    return loader


def create_train_loader(
        args: argparse.Namespace,
        dataset: Dataset,
        data_config: Dict[str, Any],
        num_classes: int,
        process: Process,
) -> PrefetchLoader:
    """Loader of the training split, whose `loader` is the `EpochLoader` that epochs are set on.

    timm's `create_loader` sets transforms, random erasing and prefetching up. Its `DataLoader` is replaced by one that
    can begin at any batch.
    """
    is_stream = not isinstance(dataset, Images)
    for option, given in (('--train-img-sizes', args.train_img_sizes), ('--aug-repeats', args.aug_repeats)):
        if given and is_stream:
            raise ValueError(f'{option} needs a map-style data set, {args.dataset} is a stream.')
    if args.train_interpolation and not args.no_aug:
        data_config = dict(data_config, interpolation=args.train_interpolation)
    batch_size = train_batch_size(args, dataset, process)
    loader_kwargs = dict(
        num_workers=args.workers,
        collate_fn=_create_collate(args, num_classes),
        pin_memory=_pins_memory(args, process),
    )
    try:
        loader = create_loader(
            dataset,
            batch_size=batch_size,
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
            auto_augment=args.aa,
            device=process.device,
            input_size_choices=args.train_img_sizes,
            **data_config,
            **loader_kwargs,
        )
    except AssertionError as e:  # timm's, of a policy that it does not know
        raise ValueError(f'--aa {args.aa}: {e}') from e
    if is_stream:
        batches = None
        loader_kwargs.update(batch_size=batch_size, drop_last=True)
    else:
        dataset = SeededImages(loader.dataset)
        batches = _create_batch_sampler(args, dataset, batch_size, process)
        # Mixup ends in the processes that are started after it was switched off
        loader_kwargs.update(persistent_workers=args.workers > 0 and not args.mixup_off_epoch)
    loader.loader = EpochLoader(dataset, batches, args.seed, process.rank, **loader_kwargs)
    _guard_workers(loader.loader, args)
    return loader


def _create_collate(args: argparse.Namespace, num_classes: int) -> Callable[[List[Any]], Any]:
    if not (args.mixup > 0 or args.cutmix > 0):
        return fast_collate
    if args.batch_size % 2:
        raise ValueError(f'Mixup and CutMix need an even --batch-size, got {args.batch_size}.')
    return FastCollateMixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )


def train_batch_size(args: argparse.Namespace, dataset: Dataset, process: Process) -> int:
    """`--batch-size`, or less where more than a tenth of the images would be left over at the end of an epoch."""
    if not isinstance(dataset, Images) or args.aug_repeats:
        return args.batch_size
    images = len(dataset) // process.world_size
    batches, left = divmod(images, args.batch_size)
    if 10 * left <= images:
        return args.batch_size
    size = images // (batches + 1)
    return max(2, size - size % 2)  # even, as Mixup needs


def _create_batch_sampler(
        args: argparse.Namespace,
        dataset: Dataset,
        batch_size: int,
        process: Process,
) -> Sampler:
    if args.aug_repeats:
        sampler = RepeatAugSampler(dataset, process.world_size, process.rank, num_repeats=args.aug_repeats)
    else:
        sampler = DistributedSampler(dataset, process.world_size, process.rank)
    if not args.train_img_sizes:
        return BatchSampler(sampler, batch_size, drop_last=True)
    return ScheduledBatchSampler(
        sampler,
        [batch_size] * len(args.train_img_sizes),
        seed=args.seed,
        choice_schedule=args.train_size_schedule,
        schedule_epochs=args.epochs,
        schedule_spread=args.train_size_schedule_spread,
        schedule_random_mix=args.train_size_random_mix,
    )

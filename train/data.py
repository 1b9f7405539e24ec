"""Data sets and loaders of a training run."""
import argparse
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
import torch
from PIL import Image
from timm.data import FastCollateMixup, create_dataset, create_loader


class Digits(torch.utils.data.Dataset):
    """The handwritten digits that scikit-learn brings along: 1,797 images of 8x8 pixels, a fifth of them held out.

    The split is the same in every run: stratified, with seed 0.
    """
    classes = [str(digit) for digit in range(10)]

    def __init__(self, split: str, mode: str = 'L') -> None:
        """
        Args:
            split: 'train' (1,437 images) or 'validation' (360).
            mode: Mode of the images, as in PIL.

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
        self.mode = mode
        self.transform = None  # set by timm's loader

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tuple[Any, int]:
        image = Image.fromarray(self.images[index]).convert(self.mode)
        return image if self.transform is None else self.transform(image), int(self.targets[index])


def _create_dataset(args: argparse.Namespace, split: str, is_training: bool, in_chans: int):
    mode = 'RGB' if in_chans == 3 else 'L'
    if args.dataset == 'digits':
        return Digits(split, mode)
    if not args.dataset and not (args.data_dir and Path(args.data_dir).exists()):
        raise ValueError(
            f'there is no folder {args.data_dir}, check --data-dir.' if args.data_dir else
            'say what to train on: a recipe (--config train/recipes/digits.yaml), a folder of images (--data-dir DIR) '
            'or a data set that timm knows (--dataset NAME).')
    return create_dataset(
        args.dataset,
        root=args.data_dir,
        split=split,
        is_training=is_training,
        download=args.dataset_download,
        batch_size=args.batch_size,
        seed=args.seed,
        input_img_mode=mode,
    )


def class_names(dataset: torch.utils.data.Dataset) -> Optional[List[str]]:
    """Names of the classes in the order of their indices, if the data set tells."""
    names = getattr(dataset, 'classes', None)
    if names is None:
        index = getattr(getattr(dataset, 'reader', None), 'class_to_idx', None)
        names = sorted(index, key=index.get) if index else None
    return list(names) if names else None


def create_loaders(args: argparse.Namespace, data_config: Dict[str, Any], num_classes: int, device: torch.device):
    """Loaders of the training and the validation split.

    Args:
        args: The run's arguments.
        data_config: Input size and preprocessing, as from timm's `resolve_data_config`.
        num_classes: Number of classes that Mixup and CutMix spread targets over.
        device: Where batches go.
    """
    in_chans = data_config['input_size'][0]
    common = dict(
        input_size=data_config['input_size'],
        mean=data_config['mean'],
        std=data_config['std'],
        num_workers=args.workers,
        persistent_workers=args.workers > 0,
        pin_memory=args.pin_mem,
        device=device,
    )
    collate_fn = None
    if args.mixup > 0 or args.cutmix > 0:
        collate_fn = FastCollateMixup(
            mixup_alpha=args.mixup,
            cutmix_alpha=args.cutmix,
            prob=args.mixup_prob,
            switch_prob=args.mixup_switch_prob,
            mode=args.mixup_mode,
            label_smoothing=args.smoothing,
            num_classes=num_classes,
        )
    train_loader = create_loader(
        _create_dataset(args, args.train_split, True, in_chans),
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
        auto_augment=args.aa,
        interpolation=data_config['interpolation'] if args.no_aug else args.train_interpolation,
        collate_fn=collate_fn,
        **common,
    )
    eval_loader = create_loader(
        _create_dataset(args, args.val_split, False, in_chans),
        batch_size=args.validation_batch_size or args.batch_size,
        interpolation=data_config['interpolation'],
        crop_pct=data_config['crop_pct'],
        **common,
    )
    return train_loader, eval_loader

"""`python -m train.validate`: accuracy and loss of models at one or several resolutions, as a table."""
import argparse
import logging
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset, resolve_input_data_config
from timm.utils import setup_default_logging

from timm_dresnet.cli import load, positive
from timm_dresnet.images import label_names

from .arguments import add_common_arguments
from .build import Process, set_up_process
from .datasets import BadImageError, check_classes, count_bad_images, open_dataset
from .engine import validate
from .loading import create_eval_loader
from .results import format_head, format_row, write_csv

_logger = logging.getLogger('train')


def measure(
        model: torch.nn.Module,
        data_config: Dict[str, Any],
        args: argparse.Namespace,
        process: Process,
) -> Dict[str, Any]:
    """Measure a model on the validation split: number of ``images``, ``loss``, and ``top1`` and ``top5`` accuracy."""
    model.to(process.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    dataset = open_dataset(args, False, data_config['input_size'][0])
    names, subset = label_names(model.pretrained_cfg, model.num_classes), infer_imagenet_subset(model)
    if not names and subset and model.pretrained_cfg.get('tag'):  # which models trained here have not
        names = ImageNetInfo(subset).label_names()
    check_classes(dataset, model.num_classes, names)
    metrics = validate(model, create_eval_loader(args, dataset, data_config, process), args, process)
    bad = count_bad_images([dataset], process)
    if bad and process.primary:
        _logger.warning(f'{bad:,} images cannot be read, and are left out.')
    return dict(images=len(dataset) - bad, **metrics)


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m train.validate',
        description='Measure models: top-1 and top-5 accuracy and loss.',
        epilog='example: python -m train.validate output/digits --dataset digits --img-size 16 24 32',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('models', nargs='+', metavar='MODEL',
                        help="folder of a run, checkpoint, hf-hub:owner/name, or one of timm's pretrained models")
    parser.add_argument('--img-size', type=positive, nargs='+', metavar='N',
                        help="image sizes (the model's if not set)")
    parser.add_argument('-b', '--batch-size', type=positive, default=128, metavar='N', help='images in a batch')
    parser.add_argument('--csv', type=Path, metavar='FILE', help='write what is measured to a file as well')
    add_common_arguments(parser)
    parser.set_defaults(deterministic=False, seed=0, validation_batch_size=None)
    args = parser.parse_args(argv)

    rows = []
    try:
        process = set_up_process(args)
        for name in args.models:
            model = load(name)
            config = resolve_input_data_config(model, use_test_size=True)
            channels, *model_size = config['input_size']
            for height, width in [(size, size) for size in args.img_size or ()] or [model_size]:
                measured = measure(model, {**config, 'input_size': (channels, height, width)}, args, process)
                row = dict(model=name, size=f'{height}x{width}', dataset=args.dataset or Path(args.data_dir).name,
                           split=args.val_split, **measured)
                if process.primary and not rows:
                    print(f'On {row["images"]:,} images:\n')
                    print(format_head(['model', 'size', 'top-1, %', 'top-5, %', 'loss']))
                if process.primary:
                    numbers = f'{row["top1"]:.2f}', f'{row["top5"]:.2f}', f'{row["loss"]:.4f}'
                    print(format_row([name, row['size'], *numbers]), flush=True)
                rows.append(row)
                if args.csv and process.primary:
                    write_csv(args.csv, rows)
    except (OSError, ValueError, BadImageError) as e:
        sys.exit(f'python -m train.validate: error: {" ".join(str(e).split())}')


if __name__ == '__main__':
    setup_default_logging()
    main()

"""`python -m train.validate`: accuracy and loss of models at one or several resolutions, as a table."""
import argparse
import sys
from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import timm
import torch
from timm.data import resolve_input_data_config
from timm.models import is_model_pretrained, load_checkpoint
from timm.utils import setup_default_logging
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from timm_dresnet.folders import load_folder

from .arguments import KeyValues, add_data_arguments, add_device_arguments, create_parser, positive
from .build import Process, create_model, set_up_process
from .datasets import BadImageError, check_classes, count_bad_images, open_dataset
from .engine import validate
from .loading import WorkerError, create_eval_loader, worker_errors
from .results import write_csv

# what a run may begin with, but its checkpoints do not
_WITHOUT_WEIGHTS = dict(pretrained=False, pretrained_path=None, initial_checkpoint='', linear_probe=False)


def load_model(name: str, args: argparse.Namespace) -> Tuple[torch.nn.Module, Dict[str, Any]]:
    """Load a model by what it is called.

    Args:
        name: A pretrained model of timm's, a folder that a run has left, a checkpoint (of a run, or weights for
            `--arch`), or a repository on the Hub as `hf-hub:owner/name`.
        args: The arguments of the program.

    Returns:
        The model, and its input size and preprocessing.

    Raises:
        ValueError: If there is no such model, it cannot be read, or weights do not fit it.
    """
    path = Path(name)
    try:
        if path.is_dir():
            model = load_folder(path)
        elif path.is_file():
            run = load_checkpoint_metadata(name).get('args') if name.endswith('.pth.tar') else None
            if run is None and not args.arch:
                raise ValueError(f'{name} holds weights alone: say with --arch what model they are of.')
            trained = vars(run) if run is not None else {}
            made = argparse.Namespace(**{**vars(create_parser().parse_args([])), **trained, **_WITHOUT_WEIGHTS})
            made.model, made.in_chans = args.arch or made.model, args.in_chans or made.in_chans
            made.num_classes = made.num_classes if args.num_classes is None else args.num_classes
            made.model_kwargs = {**made.model_kwargs, **args.model_kwargs}
            model = create_model(made)
            load_checkpoint(model, name)  # the moving average, if there is one
            return model, resolve_input_data_config(model, trained)
        elif ':' not in name and not is_model_pretrained(name):
            raise ValueError(f'there is no folder, file or pretrained model {name}.')
        else:
            model = timm.create_model(
                name, pretrained=True, num_classes=args.num_classes, **args.model_kwargs)
    except (OSError, RuntimeError) as e:
        raise ValueError(f'{name}: {e}') from e
    return model, resolve_input_data_config(model, use_test_size=True)


def measure(name: str, args: argparse.Namespace, process: Process, first: bool) -> List[Dict[str, Any]]:
    """Measure a model at each size, and print a line of the table for each, below its head if it is the first."""
    model, data_config = load_model(name, args)
    model.to(process.device)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    channels, *model_size = data_config['input_size']
    rows = []
    for height, width in [(size, size) for size in args.img_size or ()] or [model_size]:
        config = {**data_config, 'input_size': (channels, height, width)}
        config['crop_pct'] = args.crop_pct or config['crop_pct']
        dataset = open_dataset(args, False, channels)
        check_classes(dataset, model.num_classes, model.pretrained_cfg.get('label_names') or ())
        metrics = validate(model, create_eval_loader(args, dataset, config, process), args, process)
        bad = count_bad_images([dataset], process)
        row = dict(model=name, size=f'{height}x{width}', images=len(dataset) - bad, **metrics)
        if process.primary:
            if first and not rows:
                print(f'On {row["images"]:,} images{f", {bad:,} more cannot be read" if bad else ""}:\n')
                print('| model | size | top-1, % | top-5, % | loss |')
                print('| --- | --- | --- | --- | --- |')
            accuracies = f'{metrics["top1"]:.2f} | {metrics["top5"]:.2f}'
            print(f'| {name} | {row["size"]} | {accuracies} | {metrics["loss"]:.4f} |', flush=True)
        rows.append(row)
    return rows


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
    parser.add_argument('--crop-pct', type=float, metavar='X', help="center crop (the model's if not set)")
    parser.add_argument('-b', '--batch-size', type=positive, default=128, metavar='N', help='images in a batch')
    parser.add_argument('--csv', type=Path, metavar='FILE', help='write what is measured to a file as well')
    group = parser.add_argument_group('files that hold weights alone')
    group.add_argument('--arch', metavar='NAME', help='architecture')
    group.add_argument('--num-classes', type=int, metavar='N', help='number of classes')
    group.add_argument('--in-chans', type=int, metavar='N', help='number of image channels')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
                       help='other arguments of the model')
    add_data_arguments(parser)
    add_device_arguments(parser)
    parser.set_defaults(deterministic=False, seed=0, validation_batch_size=None)
    args = parser.parse_args(argv)
    if args.csv and (not args.csv.parent.is_dir() or args.csv.is_dir()):
        parser.error(f'--csv {args.csv} cannot be written: no such folder, or a folder itself.')

    rows = []
    try:
        process = set_up_process(args)
        with worker_errors():
            for name in args.models:
                rows += measure(name, args, process, first=not rows)
        if args.csv and process.primary:
            write_csv(args.csv, rows)
    except (OSError, ValueError, BadImageError, WorkerError) as e:
        sys.exit(f'python -m train.validate: error: {" ".join(str(e).split())}')


if __name__ == '__main__':
    setup_default_logging()
    main()

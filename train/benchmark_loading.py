"""`python -m train.benchmark_loading`: does loading hold training up? Images/s as loaded, and with one batch repeated.

Takes the arguments of `python -m train`. Both are measured in turns, in one run, after a warm-up.
"""
import itertools
import statistics
import sys
import time
from typing import Callable, Iterator, List, Optional, Tuple

import torch
from timm.data import resolve_input_data_config
from timm.utils import setup_default_logging

from .arguments import parse_args
from .data import BadImageError, create_train_loader
from .trainer import create_autocast, create_model, create_optimizer, create_task, set_up_device

_ROUNDS, _BATCHES = 5, 30


def main(argv: Optional[List[str]] = None) -> None:
    args = parse_args(argv)
    try:
        device = set_up_device(args)
        model = create_model(args).to(device)
        loader = create_train_loader(args, resolve_input_data_config(model, vars(args)), model.num_classes, device)
        if not len(loader):
            raise ValueError(f'--batch-size {args.batch_size} is more than there are training images.')
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        task = create_task(args, model, device).train()
        optimizer = create_optimizer(args, model)
    except (OSError, ValueError, BadImageError) as e:
        sys.exit(f'python -m train.benchmark_loading: error: {e}')
    autocast = create_autocast(args, device)

    def images_per_second(next_batch: Callable[[], Tuple[torch.Tensor, torch.Tensor]], count: int) -> float:
        start = time.perf_counter()
        for _ in range(count):
            images, targets = next_batch()
            if args.channels_last:
                images = images.contiguous(memory_format=torch.channels_last)
            with autocast():
                loss = task(images, targets)['loss']
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            loss.item()
        return count * len(images) / (time.perf_counter() - start)

    def load() -> Iterator[Tuple[torch.Tensor, torch.Tensor]]:
        for epoch in itertools.count():
            loader.loader.set_epoch(epoch)
            yield from loader

    batches = load()
    batch = next(batches)
    sources = {'loaded': lambda: next(batches), 'one batch repeated': lambda: batch}
    for source in sources.values():
        images_per_second(source, 5)
    speeds = {name: [] for name in sources}
    for _ in range(_ROUNDS):
        for name, source in sources.items():
            speeds[name].append(images_per_second(source, _BATCHES))
    loaded, repeated = (statistics.median(values) for values in speeds.values())
    print(f'{args.model} on {device.type}, {args.workers} loading processes, batches of {args.batch_size}: '
          f'{loaded:.0f} images/s as loaded, {repeated:.0f} with one batch repeated, ratio {loaded / repeated:.2f}')


if __name__ == '__main__':
    setup_default_logging()
    main()

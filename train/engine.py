"""One epoch of training, and one of measuring."""
import argparse
import logging
import math
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Callable, Dict, Iterator, List, Optional, Sequence

import torch
import torch.distributed as dist
import torch.nn as nn
from timm.data.loader import PrefetchLoader
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationEvaluator, evaluation_sample_limit
from timm.utils import NativeScaler, dispatch_clip_grad, unwrap_model
from torch.utils.data import Dataset
from tqdm import tqdm

from .build import Process, Task
from .datasets import UNREADABLE
from .loading import seed_everything

_logger = logging.getLogger('train')


class Stopped(Exception):
    """A signal, of this number, has asked the run to end."""


@contextmanager
def handle_signals(handle: Callable[[int], Any]) -> Iterator[None]:
    """Call a function with the number of each signal that asks the program to end, instead of ending it."""
    numbers = signal.SIGTERM, signal.SIGINT
    handlers = [signal.signal(number, lambda number, _: handle(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers):
            signal.signal(number, handler)


@dataclass
class Run:
    """What is built for a run that is not finished.

    Attributes:
        signals: Those that have asked for its end.
        save: Writes a checkpoint from inside the epoch.
    """
    args: argparse.Namespace
    process: Process
    task: Task
    loader: PrefetchLoader
    optimizer: torch.optim.Optimizer
    lr_scheduler: Scheduler
    loss_scaler: Optional[NativeScaler]
    num_epochs: int
    train_set: Dataset
    eval_set: Dataset
    eval_loader: PrefetchLoader
    data_config: Dict[str, Any]
    signals: List[int] = field(default_factory=list)
    save: Callable[[], None] = lambda: None

    @property
    def networks(self) -> List[nn.Module]:
        """The network that is trained and, with `--model-ema`, its moving average. The last one is the result."""
        modules = (self.task.get_trainable_module(ema=ema) for ema in (False, True))
        return [unwrap_model(module) for module in modules if module is not None]


def count_updates(num_batches: int, args: argparse.Namespace) -> int:
    """Number of optimizer steps that batches of an epoch make; the last step may take fewer of them."""
    return -(-num_batches // args.grad_accum_steps)


def autocast(args: argparse.Namespace, device: torch.device) -> torch.autocast:
    """The context of `--amp`."""
    return torch.autocast(device.type, getattr(torch, args.amp_dtype), enabled=args.amp)


def train_one_epoch(run: Run) -> Dict[str, Optional[float]]:
    """Train for one epoch, or for what `task.progress` leaves of it.

    Returns:
        Means over the epoch and all processes: ``loss``, ``top1`` accuracy in percent (on images as augmented; of mixed
        ones, for the larger part), and ``images_per_second`` (None if nothing was left of it).

    Raises:
        FloatingPointError: If the loss is no longer finite, before anything is saved.
        Stopped: If a signal has asked for it, after `run.save`.
    """
    args, process, task, optimizer = run.args, run.process, run.task, run.optimizer
    progress, accum_steps, num_batches = task.progress, args.grad_accum_steps, len(run.loader)
    epoch, start = progress['epoch'], progress['batch']
    remainder = num_batches % accum_steps
    first_update = epoch * count_updates(num_batches, args)
    num_updates = first_update + count_updates(start, args)
    run.loader.loader.set_epoch(epoch, start)
    _set_training_mode(task.get_trainable_module())
    optimizer.zero_grad()

    plain = process.primary and not sys.stderr.isatty()
    sums = torch.zeros(3, device=process.device)  # of an update: losses, correct predictions, images
    unread: List[torch.Tensor] = []  # the sums of about a second, for a GPU is idle while the host reads
    read_every = updates_per_second = 1.
    first_images, begin = progress['totals'][2], time.perf_counter()
    last_read = begin
    bar = tqdm(
        run.loader, f'epoch {epoch + 1}', num_batches, initial=start, unit='batch', leave=False,
        disable=None if process.primary else True)
    for batch, (images, targets) in enumerate(bar, start):
        seed_everything(args.seed, process.rank, epoch, batch, 2)
        need_update = (batch + 1) % accum_steps == 0 or batch + 1 == num_batches
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with nullcontext() if need_update else task.no_sync():
            with autocast(args, process.device):
                result = task(images, targets)
            loss = result['loss'] / (remainder if num_batches - remainder <= batch < num_batches else accum_steps)
            _learn(run, loss, need_update)

        with torch.no_grad():
            labels = targets.argmax(1) if targets.ndim == 2 else targets
            sums[0] += result['loss'] * len(images)
            sums[1] += (result['output'].argmax(1) == labels).sum()
            sums[2] += len(images)
        if not need_update:
            continue

        optimizer.zero_grad()
        num_updates += 1
        task.update_ema(step=num_updates)
        run.lr_scheduler.step_update(num_updates=num_updates)
        unread.append(sums)
        sums = torch.zeros_like(sums)
        stopping = bool(run.signals)
        log, recover = (n > 0 and num_updates % n == 0 for n in (args.log_interval, args.recovery_interval))
        if not (log or recover or batch + 1 == num_batches or len(unread) >= read_every
                or stopping and not process.distributed):
            continue

        # the first process's speed counts, so that all read after the same updates and stop at the same one
        *updates, (asked_to_stop, read_every, _) = _read(
            unread, (stopping, process.primary * updates_per_second, 0.), process)
        totals = progress['totals']
        for number, update_sums in enumerate(updates, num_updates - len(updates) + 1):
            mean_loss = update_sums[0] / update_sums[2]
            if not math.isfinite(mean_loss):
                raise FloatingPointError(
                    f'The loss is {mean_loss} at update {number} (epoch {epoch + 1}, batch '
                    f'{min((number - first_update) * accum_steps, num_batches)}). '
                    'A lower --lr, a longer warm-up or --clip-grad may help.')
            totals = [total + added for total, added in zip(totals, update_sums)]
        progress.update(batch=batch + 1, totals=totals)
        last_read, seconds = time.perf_counter(), time.perf_counter() - last_read
        updates_per_second = len(updates) / seconds
        unread.clear()

        elapsed = last_read - begin
        speed = (totals[2] - first_images) / elapsed
        lr = optimizer.param_groups[0]['lr']
        bar.set_postfix_str(f'loss {totals[0] / totals[2]:.3f}, lr {lr:.2g}, {speed:.0f} images/s', refresh=False)
        if plain and log:
            left = elapsed / (batch + 1 - start) * (num_batches - batch - 1)
            _logger.info(
                f'epoch {epoch + 1}  [{batch + 1}/{num_batches}]  loss {mean_loss:.4f}  lr {lr:.3g}  '
                f'{speed:.0f} images/s  {left:.0f} s left in the epoch')
        if asked_to_stop or recover:
            run.save()
        if asked_to_stop:
            raise Stopped(run.signals[-1] if run.signals else signal.SIGTERM)  # another process may have got it

    if hasattr(optimizer, 'sync_lookahead'):
        optimizer.sync_lookahead()
    total_loss, correct, count = progress['totals']
    return dict(
        loss=total_loss / count,
        top1=100 * correct / count,
        images_per_second=(count - first_images) / (time.perf_counter() - begin) if count > first_images else None,
    )


def _learn(run: Run, loss: torch.Tensor, need_update: bool) -> None:
    """The backward pass of a batch and, where it is the last of an update, the step."""
    args, optimizer = run.args, run.optimizer
    parameters = run.task.get_clip_parameters(exclude_head=args.clip_mode == 'agc')
    second_order = getattr(optimizer, 'is_second_order', False)
    if run.loss_scaler is not None:
        run.loss_scaler(
            loss, optimizer, clip_grad=args.clip_grad, clip_mode=args.clip_mode, parameters=parameters,
            need_update=need_update, create_graph=second_order)
        return
    loss.backward(create_graph=second_order)
    if need_update:
        if args.clip_grad is not None:
            dispatch_clip_grad(parameters, value=args.clip_grad, mode=args.clip_mode)
        optimizer.step()


def _read(sums: List[torch.Tensor], status: Sequence[float], process: Process) -> List[List[float]]:
    """The sums of updates and a last row, ``status``, each over all processes."""
    rows = torch.stack([*sums, torch.tensor(status).to(process.device, non_blocking=True)])
    if process.distributed:
        dist.all_reduce(rows)
    return rows.tolist()


def _set_training_mode(model: nn.Module) -> None:
    for module in model.train().modules():  # frozen layers keep their statistics
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


@torch.inference_mode()
def validate(
        model: nn.Module,
        loader: PrefetchLoader,
        args: argparse.Namespace,
        process: Process,
        signals: Sequence[int] = (),
) -> Dict[str, float]:
    """Measure a model, over all processes, on the images that can be read.

    Returns:
        Cross-entropy ``loss``, and ``top1`` and ``top5`` accuracy in percent.

    Raises:
        Stopped: When a signal is added to `signals`.
    """
    model.eval()
    evaluator = ClassificationEvaluator(process.device)
    left = evaluation_sample_limit(loader)  # without those that fill the batches of several processes
    for images, targets in tqdm(
            loader, 'validate', unit='batch', leave=False, disable=None if process.primary else True):
        if signals:
            raise Stopped(signals[-1])
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast(args, process.device):
            output = model(images)
        if left is not None:
            output, targets, left = output[:left], targets[:left], max(left - len(targets), 0)
        if args.bad_images == 'skip':  # how many are left is known only when the GPU has got here
            readable = targets != UNREADABLE
            output, targets = output[readable], targets[readable]
        evaluator.update(output, targets)
    return dict(evaluator.compute(distributed=process.distributed))

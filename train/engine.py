"""One epoch of training, and one of measuring."""
import argparse
from contextlib import AbstractContextManager
from typing import Callable, Dict, Optional

import torch
import torch.nn as nn
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationEvaluator, TrainingTask
from timm.utils import AverageMeter, NativeScaler, dispatch_clip_grad
from tqdm import tqdm


def train_one_epoch(
        epoch: int,
        task: TrainingTask,
        loader,
        optimizer: torch.optim.Optimizer,
        lr_scheduler: Scheduler,
        args: argparse.Namespace,
        autocast: Callable[[], AbstractContextManager],
        loss_scaler: Optional[NativeScaler] = None,
) -> Dict[str, float]:
    """Train for one epoch.

    Returns:
        Mean training loss of the epoch, under ``loss``.

    Raises:
        FloatingPointError: If the loss is no longer finite.
    """
    task.get_trainable_module().train()
    losses = AverageMeter()
    num_updates = epoch * len(loader)
    progress = tqdm(loader, desc=f'epoch {epoch}', unit='batch', leave=False, disable=None)
    for images, targets in progress:
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast():
            loss = task(images, targets)['loss']
        losses.update(loss.item(), len(images))
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f'The loss is {loss.item()} in epoch {epoch}. A lower --lr, a longer warm-up or --clip-grad may help.')

        clip_parameters = task.get_clip_parameters(exclude_head=args.clip_mode == 'agc')
        if loss_scaler is not None:
            loss_scaler(
                loss, optimizer, clip_grad=args.clip_grad, clip_mode=args.clip_mode, parameters=clip_parameters)
        else:
            loss.backward()
            if args.clip_grad is not None:
                dispatch_clip_grad(clip_parameters, value=args.clip_grad, mode=args.clip_mode)
            optimizer.step()
        optimizer.zero_grad()

        num_updates += 1
        task.update_ema(step=num_updates)
        lr_scheduler.step_update(num_updates=num_updates, metric=losses.avg)
        progress.set_postfix(loss=f'{losses.avg:.3f}', lr=f'{optimizer.param_groups[0]["lr"]:.2g}')
    return dict(loss=losses.avg)


@torch.inference_mode()
def validate(
        model: nn.Module,
        loader,
        args: argparse.Namespace,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager],
) -> Dict[str, float]:
    """Measure a model.

    Returns:
        Cross-entropy ``loss``, and ``top1`` and ``top5`` accuracy in percent.
    """
    model.eval()
    evaluator = ClassificationEvaluator(device)
    for images, targets in tqdm(loader, desc='validate', unit='batch', leave=False, disable=None):
        if args.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        with autocast():
            output = model(images)
        evaluator.update(output, targets)
    return dict(evaluator.compute())

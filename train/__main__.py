"""`python -m train`: train a model, leave a folder that timm loads, load it back and measure it."""
import argparse
import difflib
import logging
import sys
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import List, Optional

import timm
import torch
import yaml
from timm.data import resolve_data_config
from timm.models import safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import ClassificationTask
from timm.utils import CheckpointSaver, NativeScaler, get_outdir, init_distributed_device, random_seed, \
    setup_default_logging, unwrap_model, update_summary

from .arguments import parse_args
from .data import class_names, create_loaders
from .engine import train_one_epoch, validate
from .results import save_results

_logger = logging.getLogger('train')


def create_model(args: argparse.Namespace) -> torch.nn.Module:
    """The model that a run trains.

    Raises:
        ValueError: If there is no such model, or it does not take the arguments.
    """
    if ':' not in args.model and not timm.is_model(args.model):
        near = difflib.get_close_matches(args.model, timm.list_models())
        hint = f', did you mean {" or ".join(near)}?' if near else '.'
        raise ValueError(f'There is no model {args.model!r}{hint}')
    try:
        return timm.create_model(
            args.model,
            pretrained=args.pretrained,
            num_classes=args.num_classes,
            in_chans=args.in_chans,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            **args.model_kwargs,
        )
    except TypeError as e:
        raise ValueError(f'{args.model} does not take all of --model-kwargs {args.model_kwargs}: {e}') from e
    except RuntimeError as e:
        if not args.pretrained:
            raise
        raise ValueError(f'--pretrained: {e}') from e


def create_task(args: argparse.Namespace, model: torch.nn.Module, device: torch.device) -> ClassificationTask:
    """The model with its loss."""
    loss = dict(
        smoothing=args.smoothing,
        soft_targets=args.mixup > 0 or args.cutmix > 0,  # then the smoothing is in the targets
    )
    if args.bce_loss:
        loss.update(loss_type='bce', bce_target_thresh=args.bce_target_thresh)
    task = ClassificationTask(model, criterion_kwargs=loss, device=device, verbose=False)
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    if args.torchcompile:
        task.compile(backend=args.torchcompile)
        if args.model_ema:
            task.compile_ema(backend=args.torchcompile)
    return task


def resolve_learning_rate(args: argparse.Namespace) -> float:
    """`--lr`, or `--lr-base` scaled to the batch size by timm's rule."""
    if args.lr is not None:
        return args.lr
    ratio = args.batch_size / args.lr_base_size
    scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    return args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)


def main(argv: Optional[List[str]] = None) -> None:
    setup_default_logging()
    logging.getLogger('timm').setLevel(logging.WARNING)
    args = parse_args(argv)
    recipe = {key: value for key, value in vars(args).items() if key != 'config'}
    device = init_distributed_device(args)
    if args.distributed:
        sys.exit('python -m train: error: it runs in one process, start it without torchrun.')
    random_seed(args.seed)

    try:
        model = create_model(args).to(device)
        data_config = resolve_data_config(vars(args), model=model)
        train_loader, eval_loader = create_loaders(args, data_config, model.num_classes, device)
        if not len(train_loader):
            raise ValueError(f'--batch-size {args.batch_size} is more than there are training images.')
    except (OSError, ValueError) as e:
        sys.exit(f'python -m train: error: {e}')
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()

    task = create_task(args, model, device)
    args.lr = resolve_learning_rate(args)
    optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args), updates_per_epoch=len(train_loader))
    autocast = partial(
        torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype), enabled=args.amp)
    loss_scaler = None
    if args.amp and args.amp_dtype == 'float16' and device.type == 'cuda':
        loss_scaler = NativeScaler(device=device.type)

    name = args.experiment or '-'.join([
        datetime.now().strftime('%Y%m%d-%H%M%S'), safe_model_name(args.model), str(data_config['input_size'][-1])])
    folder = Path(get_outdir(args.output, name, inc=True))
    (folder / 'args.yaml').write_text(yaml.safe_dump(recipe))
    saver = CheckpointSaver(
        model=model,
        optimizer=optimizer,
        args=args,
        amp_scaler=loss_scaler,
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
        decreasing=args.eval_metric == 'loss',
        max_history=args.checkpoint_hist,
        task=task,
    )
    _logger.info(
        f'Training {args.model} ({sum(p.numel() for p in model.parameters()):,} parameters) on '
        f'{len(train_loader.dataset):,} images of {"x".join(map(str, data_config["input_size"]))} for {num_epochs} '
        f'epochs on {device}, into {folder}')

    start = time.time()
    for epoch in range(num_epochs):
        lr = sum(group['lr'] for group in optimizer.param_groups) / len(optimizer.param_groups)
        try:
            train_metrics = train_one_epoch(
                epoch, task, train_loader, optimizer, lr_scheduler, args, autocast, loss_scaler)
        except FloatingPointError as e:
            sys.exit(f'python -m train: error: {e} Checkpoints of earlier epochs are in {folder}.')
        eval_metrics = validate(task.get_eval_model(ema=args.model_ema), eval_loader, args, device, autocast)
        update_summary(epoch, train_metrics, eval_metrics, folder / 'summary.csv', lr=lr)
        saver.save_checkpoint(epoch, metric=eval_metrics[args.eval_metric])
        lr_scheduler.step(epoch + 1, eval_metrics[args.eval_metric])
        _logger.info(
            f'epoch {epoch + 1:>3}/{num_epochs}  loss {train_metrics["loss"]:.4f}  '
            f'validation loss {eval_metrics["loss"]:.4f}  top-1 {eval_metrics["top1"]:.2f} %  '
            f'{time.time() - start:.0f} s')

    trained = unwrap_model(task.get_trainable_module(ema=args.model_ema))
    save_results(trained, folder, data_config, class_names(eval_loader.dataset))

    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).to(device)
    if args.channels_last:
        loaded.to(memory_format=torch.channels_last)
    metrics = validate(loaded, eval_loader, args, device, autocast)
    print(f"timm.create_model('local-dir:{folder}', pretrained=True) has a top-1 accuracy of {metrics['top1']:.2f} % "
          f"on the {len(eval_loader.dataset):,} images of {args.val_split}. It lies in {folder.resolve()}")


if __name__ == '__main__':
    main()

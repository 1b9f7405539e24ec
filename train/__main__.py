"""`python -m train`: train a model, leave a folder that timm loads, load it back and measure it."""
import argparse
import difflib
import logging
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Callable, List, NoReturn, Optional

import timm
import torch
import torch.distributed as dist
from timm.data import resolve_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import NativeScaler, distribute_bn, init_distributed_device, is_primary, random_seed, \
    setup_default_logging, unwrap_model
from torch.nn.parallel import DistributedDataParallel

from . import sync_batch_norm
from .arguments import parse_args
from .checkpoints import Checkpoints, newest, open_folder, restore
from .data import BadImageError, class_names, create_eval_loader, create_train_loader
from .engine import Stop, Stopped, Task, train_one_epoch, updates_per_epoch, validate
from .results import Log, save_results

_logger = logging.getLogger('train')


def create_model(args: argparse.Namespace) -> torch.nn.Module:
    """The model that a run trains.

    Raises:
        ValueError: If there is no such model, it does not take the arguments, or weights do not fit it.
    """
    if ':' not in args.model and not timm.is_model(args.model):
        near = difflib.get_close_matches(args.model, timm.list_models())
        hint = f', did you mean {" or ".join(near)}?' if near else '.'
        raise ValueError(f'There is no model {args.model!r}{hint}')
    overlay = {}
    if args.pretrained_path:
        overlay = dict(pretrained_cfg_overlay=dict(file=args.pretrained_path, num_classes=-1))  # with another head
    try:
        model = timm.create_model(
            args.model,
            pretrained=args.pretrained or bool(args.pretrained_path),
            checkpoint_path=args.initial_checkpoint,
            num_classes=args.num_classes,
            in_chans=args.in_chans or (args.input_size or [3])[0],
            global_pool=args.gp,
            drop_rate=args.drop,
            drop_path_rate=args.drop_path,
            drop_block_rate=args.drop_block,
            bn_momentum=args.bn_momentum,
            bn_eps=args.bn_eps,
            **overlay,
            **args.model_kwargs,
        )
    except TypeError as e:
        raise ValueError(f'{args.model} does not take all of --model-kwargs {args.model_kwargs}: {e}') from e
    except (OSError, RuntimeError) as e:
        option = next((o for o in ('initial_checkpoint', 'pretrained_path', 'pretrained') if getattr(args, o)), None)
        if option is None:
            raise
        raise ValueError(f'--{option.replace("_", "-")}: {str(e) or type(e).__name__}') from e
    head = model.get_classifier()
    with torch.no_grad():
        if args.head_init_scale is not None:
            head.weight.mul_(args.head_init_scale)
            head.bias.mul_(args.head_init_scale)
        if args.head_init_bias is not None:
            head.bias.fill_(args.head_init_bias)
    if args.linear_probe:
        model.requires_grad_(False)
        head.requires_grad_(True)
    return model


def create_task(args: argparse.Namespace, model: torch.nn.Module, device: torch.device) -> Task:
    """The model with its loss, its moving average, compiled and distributed as asked for."""
    loss = dict(
        smoothing=args.smoothing,
        soft_targets=args.mixup > 0 or args.cutmix > 0 or args.cutmix_minmax is not None,  # these smooth targets too
    )
    if args.bce_loss:
        loss.update(
            loss_type='bce',
            bce_target_thresh=args.bce_target_thresh,
            bce_sum=args.bce_sum,
            pos_weight=args.bce_pos_weight,
        )
    task = Task(model, criterion_kwargs=loss, device=device, verbose=False)
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        if args.model_ema:
            task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    return task


def resolve_learning_rate(args: argparse.Namespace) -> float:
    """`--lr`, or `--lr-base` scaled to the images in an update by timm's rule."""
    if args.lr is not None:
        return args.lr
    ratio = args.batch_size * args.world_size * args.grad_accum_steps / args.lr_base_size
    scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
    return args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)


def set_up_device(args: argparse.Namespace) -> torch.device:
    """Device of this process, with its libraries set for speed, or for repeatable numbers."""
    device = init_distributed_device(args)
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = not args.deterministic
    torch.use_deterministic_algorithms(args.deterministic)
    return device


def create_autocast(args: argparse.Namespace, device: torch.device) -> Callable[[], torch.autocast]:
    """Makes a context of `--amp`."""
    return partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype), enabled=args.amp)


def _fail(args: argparse.Namespace, message: Any) -> NoReturn:
    sys.exit(f'python -m train: error: {message}' if is_primary(args) else 1)


def _from_first(args: argparse.Namespace, value: Callable[[], Any]) -> Any:
    """What the first process finds, in all of them."""
    found = [value() if is_primary(args) else None]
    if args.distributed:
        dist.broadcast_object_list(found)
    return found[0]


def _count_bad(args: argparse.Namespace, loaders: List[Any], device: torch.device) -> int:
    flags = torch.cat([loader.dataset.bad if hasattr(loader.dataset, 'bad') else loader.dataset.images.bad
                       for loader in loaders]).to(device, torch.int32)
    if args.distributed:
        dist.all_reduce(flags, dist.ReduceOp.MAX)
    return int(flags.sum())


def main(argv: Optional[List[str]] = None) -> None:
    setup_default_logging()
    logging.getLogger('timm').setLevel(logging.WARNING)
    args = parse_args(argv)
    recipe = {key: value for key, value in vars(args).items() if key != 'config'}
    device = set_up_device(args)
    random_seed(args.seed)
    try:
        model = create_model(args).to(device)
        data_config = resolve_data_config(vars(args), model=model)
        train_loader = create_train_loader(args, data_config, model.num_classes, device)
        eval_loader = create_eval_loader(args, data_config, device)
        if not len(train_loader):
            raise ValueError(f'--batch-size {args.batch_size} is more than there are training images.')
        if args.distributed and args.sync_bn:
            model = convert_sync_batchnorm(model) if device.type == 'cuda' else sync_batch_norm.convert(model)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        if args.grad_checkpointing:
            model.set_grad_checkpointing()
        task = create_task(args, model, device)
        args.lr = resolve_learning_rate(args)
        optimizer = create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
        lr_scheduler, num_epochs = create_scheduler_v2(
            optimizer, **scheduler_kwargs(args), updates_per_epoch=updates_per_epoch(train_loader, args))
        loss_scaler = None
        if args.amp and args.amp_dtype == 'float16' and device.type == 'cuda':
            loss_scaler = NativeScaler(device=device.type)

        name = args.experiment or f'{safe_model_name(args.model)}-{data_config["input_size"][-1]}'
        folder = _from_first(args, lambda: open_folder(Path(args.output), name, recipe))
        checkpoint = _from_first(args, lambda: newest(folder))
        if checkpoint is not None:
            restore(checkpoint, task, optimizer, loss_scaler)
    except (OSError, ValueError, BadImageError) as e:
        _fail(args, e)
    if args.distributed:
        task.prepare_distributed(
            device_ids=None if device.type == 'cpu' else [device], broadcast_buffers=not args.no_ddp_bb)

    progress, batch_images = task.progress, args.batch_size * args.world_size
    if checkpoint is not None:  # perhaps with another number of processes
        progress['batch'] = progress['batch'] * progress['images'] // batch_images
        progress['batch'] -= progress['batch'] % args.grad_accum_steps if progress['batch'] < len(train_loader) else 0
        lr_scheduler.step(progress['epoch'])
        lr_scheduler.step_update(progress['epoch'] * updates_per_epoch(train_loader, args)
                                 + progress['batch'] // args.grad_accum_steps)
    progress['images'] = batch_images
    autocast = create_autocast(args, device)
    if is_primary(args):
        saver = Checkpoints(
            model=task.get_trainable_module(),
            optimizer=optimizer,
            args=args,
            amp_scaler=loss_scaler,
            checkpoint_dir=str(folder),
            recovery_dir=str(folder),
            decreasing=args.eval_metric == 'loss',
            max_history=args.checkpoint_hist,
            task=task,
        )
        log = Log(args, folder, progress['epoch'])
        if checkpoint is None:
            _logger.info(
                f'Training {args.model} ({sum(p.numel() for p in model.parameters()):,} parameters) on '
                f'{len(train_loader.dataset):,} images of {"x".join(map(str, data_config["input_size"]))} for '
                f'{num_epochs} epochs on {args.world_size} x {device}, into {folder}')
        else:
            saver.continue_from(checkpoint)
            _logger.info(f'Going on from {checkpoint}: epoch {progress["epoch"] + 1}, batch {progress["batch"] + 1}')

    def save_recovery() -> None:
        if is_primary(args):
            saver.save_recovery(progress['epoch'], progress['batch'])

    start, first_epoch = time.time(), progress['epoch']
    try:
        with Stop() as stop:
            for epoch in range(first_epoch, num_epochs):
                train_metrics = train_one_epoch(
                    task, train_loader, optimizer, lr_scheduler, args, autocast, loss_scaler, stop, save_recovery)
                if args.distributed and args.dist_bn and not args.sync_bn:
                    distribute_bn(task.get_trainable_module(), args.world_size, args.dist_bn == 'reduce')
                    if args.model_ema:
                        distribute_bn(task.get_trainable_module(ema=True), args.world_size, args.dist_bn == 'reduce')

                lr = sum(group['lr'] for group in optimizer.param_groups) / len(optimizer.param_groups)
                eval_metrics = {}
                if (epoch + 1) % args.val_interval == 0 or epoch + 1 == num_epochs:
                    eval_model = task.get_eval_model(ema=args.model_ema)
                    if isinstance(eval_model, DistributedDataParallel):
                        eval_model = eval_model.module
                    try:
                        eval_metrics = validate(eval_model, eval_loader, args, device, autocast, stop)
                    except Stopped:
                        save_recovery()
                        raise
                bad = _count_bad(args, [train_loader, eval_loader], device) if args.bad_images == 'skip' else 0
                lr_scheduler.step(epoch + 1)
                progress.update(epoch=epoch + 1, batch=0, totals=[0., 0., 0.])
                if is_primary(args):
                    trained = unwrap_model(task.get_trainable_module(ema=args.model_ema))
                    log.epoch(epoch, train_metrics, eval_metrics, lr, trained)
                    saver.save_checkpoint(epoch, metric=eval_metrics.get(args.eval_metric))
                    left = (time.time() - start) / (epoch + 1 - first_epoch) * (num_epochs - epoch - 1)
                    _logger.info('  '.join([
                        f'epoch {epoch + 1:>3}/{num_epochs}',
                        f'loss {train_metrics["loss"]:.4f}',
                        *([f'validation loss {eval_metrics["loss"]:.4f}', f'top-1 {eval_metrics["top1"]:.2f} %']
                          if eval_metrics else []),
                        f'{train_metrics["images_per_second"]:.0f} images/s',
                        *([f'{bad} bad images skipped'] if args.bad_images == 'skip' else []),
                        f'{timedelta(seconds=round(left))} left',
                    ]))
        if is_primary(args):
            trained = unwrap_model(task.get_trainable_module(ema=args.model_ema))
            save_results(trained, folder, data_config, class_names(eval_loader.dataset))
    except Stopped:
        if is_primary(args):
            _logger.info(f'Stopped. The same command goes on from here: {newest(folder)}')
        sys.exit(128 + (stop.signal or 0))
    except BadImageError as e:
        # of one raised in another process, PyTorch gives the traceback as text
        reason = str(e).strip().splitlines()[-1].split('BadImageError: ')[-1]
        sys.exit(f'python -m train: error: {reason} Mend or remove it, or add --bad-images skip.')
    except FloatingPointError as e:
        _fail(args, f'{e} The last good checkpoint is {newest(folder) or "none yet"}.')
    except OSError as e:
        _fail(args, f'{e.strerror or e}. The last good checkpoint is {newest(folder) or "none yet"}; make room and run '
                    'the same command again to go on from there.')

    if args.distributed:
        dist.barrier()
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).to(device)
    if args.channels_last:
        loaded.to(memory_format=torch.channels_last)
    metrics = validate(loaded, eval_loader, args, device, autocast)
    if is_primary(args):
        print(f"timm.create_model('local-dir:{folder}', pretrained=True) has a top-1 accuracy of "
              f"{metrics['top1']:.2f} % on the {len(eval_loader.dataset):,} images of {args.val_split}. It lies in "
              f"{folder.resolve()}")
    if args.distributed:
        dist.destroy_process_group()


if __name__ == '__main__':
    main()

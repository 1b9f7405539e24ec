"""A run: everything that training needs, built from the arguments and set to where a stopped run was."""
import argparse
import difflib
import logging
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Optional

import timm
import torch
import torch.distributed as dist
from timm.data import resolve_input_data_config
from timm.layers import convert_sync_batchnorm
from timm.models import safe_model_name
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.utils import (
    NativeScaler, distribute_bn, init_distributed_device, is_distributed_env, is_primary, random_seed, unwrap_model)
from torch.nn.parallel import DistributedDataParallel

from . import sync_batch_norm
from .checkpoints import Checkpoints, is_finished, lock_folder, newest, open_folder, restore
from .data import check_classes, class_names, count_bad_images, create_eval_loader, create_train_loader
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
            **overlay,
            **args.model_kwargs,
        )
    except TypeError as e:
        raise ValueError(f'{args.model} does not take all of --model-kwargs {args.model_kwargs}: {e}') from e
    except AssertionError as e:  # of timm's layers
        raise ValueError(f'{args.model} cannot be made with these arguments: {e}') from e
    except (OSError, RuntimeError) as e:
        source = args.initial_checkpoint or args.pretrained_path or (args.pretrained and '--pretrained')
        if not source:
            raise
        raise ValueError(f'{source}: {str(e).splitlines()[0] if str(e) else "no such file"}') from e
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = module.momentum if args.bn_momentum is None else args.bn_momentum
    head = model.get_classifier()
    if args.num_classes == 0 and (args.head_init_scale, args.head_init_bias, args.linear_probe) != (None, None, False):
        raise ValueError('--head-init-scale, --head-init-bias and --linear-probe need more classes than 0.')
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
    """The model with its loss, its moving average, compiled and distributed as asked for.

    Raises:
        ValueError: If the model cannot be trained.
    """
    if getattr(model, 'fused', False):
        raise ValueError(f'{args.model} is fused for inference: train the model that it was made from.')
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


def create_optimizer(args: argparse.Namespace, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `--opt`, with the learning rate set.

    Raises:
        ValueError: If there is none of this name, or it does not take the arguments.
    """
    args.lr = resolve_learning_rate(args)
    try:
        return create_optimizer_v2(model, **optimizer_kwargs(args), **args.opt_kwargs)
    except TypeError as e:
        raise ValueError(f'{args.opt} does not take all of --opt-kwargs {args.opt_kwargs}: {e}') from e


def set_up_device(args: argparse.Namespace) -> torch.device:
    """Device of this process, with its libraries set for speed, or for repeatable numbers.

    Raises:
        ValueError: If there is no such device.
    """
    args.device = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        device = init_distributed_device(args)
    except (AssertionError, RuntimeError) as e:
        if is_distributed_env():  # it may be that processes do not find each other
            raise
        raise ValueError(f'--device {args.device}: {str(e).splitlines()[0]}') from e
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = not args.deterministic
    torch.use_deterministic_algorithms(args.deterministic)
    return device


def create_autocast(args: argparse.Namespace, device: torch.device) -> Callable[[], torch.autocast]:
    """Makes a context of `--amp`."""
    return partial(torch.autocast, device_type=device.type, dtype=getattr(torch, args.amp_dtype), enabled=args.amp)


class Trainer:
    """One training run.

    Attributes:
        folder: Where its results go.
        finished: Whether they are there already.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        """
        Args:
            args: The run's arguments.

        Raises:
            OSError: If a file cannot be read or written.
            ValueError: If arguments do not fit each other, the model or the data.
            BadImageError: If an image cannot be read.
        """
        recipe = {key: value for key, value in vars(args).items() if key != 'config'}
        self.args = args
        self.device = device = set_up_device(args)
        random_seed(args.seed)
        model = create_model(args).to(device)
        self.data_config = resolve_input_data_config(model, vars(args))
        self.train_loader = create_train_loader(args, self.data_config, model.num_classes, device)
        self.eval_loader = create_eval_loader(args, self.data_config, device)
        for loader in (self.train_loader, self.eval_loader):
            check_classes(loader.dataset, model.num_classes)
        self.class_names = class_names(self.eval_loader.dataset)
        if args.num_classes is None and self.class_names and len(self.class_names) < model.num_classes:
            raise ValueError(
                f'the data set has {len(self.class_names)} classes, the model {model.num_classes}: say --num-classes '
                f'{len(self.class_names)}, or {model.num_classes} to train that.')
        trained_names = class_names(self.train_loader.dataset)
        if trained_names and self.class_names and trained_names != self.class_names:
            odd = sorted({*trained_names} ^ {*self.class_names}) or ['the same in another order']
            raise ValueError(
                f'training has {len(trained_names)} classes, validation {len(self.class_names)}, and not the same '
                f'ones: {", ".join(odd[:5])}{", ..." if len(odd) > 5 else ""}.')
        if not len(self.train_loader):
            raise ValueError(f'--batch-size {args.batch_size} is more than there are training images.')
        if args.distributed and args.sync_bn:
            model = convert_sync_batchnorm(model) if device.type == 'cuda' else sync_batch_norm.convert(model)
        if args.channels_last:
            model.to(memory_format=torch.channels_last)
        if args.grad_checkpointing:
            model.set_grad_checkpointing()

        self.task = create_task(args, model, device)
        self.optimizer = create_optimizer(args, model)
        self.updates_per_epoch = updates_per_epoch(self.train_loader, args)
        self.lr_scheduler, self.num_epochs = create_scheduler_v2(
            self.optimizer, **scheduler_kwargs(args), updates_per_epoch=self.updates_per_epoch)
        self.autocast = create_autocast(args, device)
        self.loss_scaler = None
        if args.amp and args.amp_dtype == 'float16' and device.type == 'cuda':
            self.loss_scaler = NativeScaler(device=device.type)

        name = args.experiment or f'{safe_model_name(args.model)}-{self.data_config["input_size"][-1]}'
        self.folder = self._from_primary(lambda: open_folder(Path(args.output), name, recipe))
        self.finished = self._from_primary(lambda: is_finished(self.folder))
        if is_primary(args) and not self.finished:
            self.lock = lock_folder(self.folder)
        checkpoint = self._from_primary(lambda: newest(self.folder)) if not self.finished else None
        if checkpoint is not None:
            self._go_on(checkpoint)
        self.task.progress['images'] = args.batch_size * args.world_size
        if args.distributed:
            # torch warns of the argument, whose default is True
            buffers = dict(broadcast_buffers=False) if args.no_ddp_bb else {}
            self.task.prepare_distributed(device_ids=None if device.type == 'cpu' else [device], **buffers)
        if is_primary(args) and not self.finished:
            self._open_log(checkpoint)

    def _from_primary(self, find: Callable[[], Any]) -> Any:
        found = [find() if is_primary(self.args) else None]
        if self.args.distributed:
            dist.broadcast_object_list(found)
        return found[0]

    def _go_on(self, checkpoint: Path) -> None:
        restore(checkpoint, self.task, self.optimizer, self.loss_scaler)
        progress, accum_steps = self.task.progress, self.args.grad_accum_steps
        # in batches of this run, which may have another number of processes
        batch = progress['batch'] * progress['images'] // (self.args.batch_size * self.args.world_size)
        progress['batch'] = batch if batch >= len(self.train_loader) else batch - batch % accum_steps
        self.lr_scheduler.step(progress['epoch'])
        self.lr_scheduler.step_update(progress['epoch'] * self.updates_per_epoch + progress['batch'] // accum_steps)

    def _open_log(self, checkpoint: Optional[Path]) -> None:
        self.saver = Checkpoints(
            model=self.task.get_trainable_module(),
            optimizer=self.optimizer,
            args=self.args,
            amp_scaler=self.loss_scaler,
            checkpoint_dir=str(self.folder),
            recovery_dir=str(self.folder),
            decreasing=self.args.eval_metric == 'loss',
            max_history=self.args.checkpoint_hist,
            task=self.task,
        )
        progress = self.task.progress
        self.log = Log(self.args, self.folder, progress['epoch'])
        if checkpoint is None:
            parameters = sum(p.numel() for p in self.trained_model.parameters())
            _logger.info(
                f'Training {self.args.model} ({parameters:,} parameters) on {len(self.train_loader.dataset):,} images '
                f'of {"x".join(map(str, self.data_config["input_size"]))} for {self.num_epochs} epochs on '
                f'{self.args.world_size} x {self.device.type}, into {self.folder}')
        else:
            self.saver.continue_from(checkpoint)
            _logger.info(f'Going on from {checkpoint}: epoch {progress["epoch"] + 1}, batch {progress["batch"] + 1}')

    @property
    def trained_model(self) -> torch.nn.Module:
        """The model that comes out: the one that is trained, or its moving average."""
        return unwrap_model(self.task.get_trainable_module(ema=self.args.model_ema))

    def train(self) -> None:
        """Train to the end, and write the results.

        Raises:
            Stopped: If a signal has asked for it; what was reached is saved.
            FloatingPointError: If loss or weights are no longer finite.
            BadImageError: If an image cannot be read.
            OSError: If a file cannot be written.
        """
        args, progress = self.args, self.task.progress
        start, first_epoch = time.time(), progress['epoch']
        with Stop() as stop:
            for epoch in range(first_epoch, self.num_epochs):
                train_metrics = train_one_epoch(
                    self.task, self.train_loader, self.optimizer, self.lr_scheduler, args, self.autocast,
                    self.loss_scaler, stop, self._save_recovery)
                if args.distributed and args.dist_bn and not args.sync_bn:
                    for module in filter(None, (self.task.get_trainable_module(ema=ema) for ema in (False, True))):
                        distribute_bn(module, args.world_size, args.dist_bn == 'reduce')
                lr = sum(group['lr'] for group in self.optimizer.param_groups) / len(self.optimizer.param_groups)
                eval_metrics = {}
                if (epoch + 1) % args.val_interval == 0 or epoch + 1 == self.num_epochs:
                    try:
                        eval_metrics = self._validate(stop)
                    except Stopped:
                        self._save_recovery()
                        raise
                bad = None
                if args.bad_images == 'skip':
                    bad = count_bad_images([self.train_loader, self.eval_loader], self.device, args.distributed)
                self.lr_scheduler.step(epoch + 1)
                progress.update(epoch=epoch + 1, batch=0, totals=[0., 0., 0.])
                if is_primary(args):
                    self.log.epoch(epoch, train_metrics, eval_metrics, lr, self.trained_model)
                    self.saver.save_checkpoint(epoch, metric=eval_metrics.get(args.eval_metric))
                    left = (time.time() - start) / (epoch + 1 - first_epoch) * (self.num_epochs - epoch - 1)
                    self._report(epoch, train_metrics, eval_metrics, bad, left)
        if is_primary(args):
            save_results(self.trained_model, self.folder, self.data_config, self.class_names)
            self.lock.release(force=True)
            Path(self.lock.lock_file).unlink(missing_ok=True)
        if args.distributed:
            dist.barrier()

    def _save_recovery(self) -> None:
        if is_primary(self.args):
            self.saver.save_recovery(self.task.progress['epoch'], self.task.progress['batch'])

    def _validate(self, stop: Stop) -> Dict[str, float]:
        model = self.task.get_eval_model(ema=self.args.model_ema)
        if isinstance(model, DistributedDataParallel):
            model = model.module
        return validate(model, self.eval_loader, self.args, self.device, self.autocast, stop)

    def _report(
            self,
            epoch: int,
            train_metrics: Dict[str, Optional[float]],
            eval_metrics: Dict[str, float],
            bad: Optional[int],
            left: float,
    ) -> None:
        words = [f'epoch {epoch + 1:>3}/{self.num_epochs}', f'loss {train_metrics["loss"]:.4f}']
        if eval_metrics:
            words += [f'validation loss {eval_metrics["loss"]:.4f}', f'top-1 {eval_metrics["top1"]:.2f} %']
        if train_metrics['images_per_second']:
            words.append(f'{train_metrics["images_per_second"]:.0f} images/s')
        if bad is not None:
            words.append(f'{bad} bad images skipped')
        _logger.info('  '.join([*words, f'{timedelta(seconds=round(left))} left']))

    def measure(self) -> Dict[str, float]:
        """Load the results as timm does, and measure them on the validation split."""
        model = timm.create_model(f'local-dir:{self.folder}', pretrained=True).to(self.device)
        if self.args.channels_last:
            model.to(memory_format=torch.channels_last)
        return validate(model, self.eval_loader, self.args, self.device, self.autocast)

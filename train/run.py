"""A run: find its folder and, unless it is finished, build what training needs, resume, train and write the results."""
import argparse
import copy
import logging
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
import torch.distributed as dist
from timm.data import resolve_input_data_config
from timm.models import safe_model_name
from timm.scheduler import create_scheduler_v2, scheduler_kwargs
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import NativeScaler, distribute_bn, random_seed
from timm.utils.checkpoint_saver import load_checkpoint_metadata
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset

import timm_dresnet
from timm_dresnet.folders import load_folder

from .build import Process, computes_bfloat16, create_model, create_optimizer, create_task, set_up_process
from .checkpoints import Checkpoints, find_folder, is_finished, lock_folder, newest, open_folder
from .datasets import BadImageError, check_classes, class_names, count_bad_images, open_dataset
from .engine import Run, Stopped, count_updates, handle_signals, train_one_epoch, validate
from .loading import create_eval_loader, create_train_loader, train_batch_size
from .results import Log, save_results
from .validate import measure

_logger = logging.getLogger('train')


class RunError(Exception):
    """A run has ended early; says why, and from which checkpoint it resumes."""


def run(args: argparse.Namespace) -> None:
    """Train, unless the results are there, and measure what timm loads from the folder.

    Raises:
        ValueError: If arguments do not fit each other, the model or the data.
        OSError: If a file cannot be read.
        BadImageError: If an image cannot be read.
        RunError: If the run has ended early.
        Stopped: If a signal has asked for it; what was reached is saved.
    """
    process = set_up_process(args)
    recipe = {key: value for key, value in vars(args).items() if key != 'config'}
    place = Path(args.output), _name(args), recipe
    folder = _from_primary(process, lambda: find_folder(*place))
    if _from_primary(process, lambda: is_finished(folder)):
        if process.primary:
            _logger.info(f'{folder} holds the results of this command already; --experiment names another folder.')
    else:
        built = build(args, process)
        folder = _from_primary(process, lambda: open_folder(*place))
        with _named_checkpoint(folder, process), lock_folder(folder) if process.primary else nullcontext():
            train(built, folder)
    with _named_checkpoint(folder, process):
        model = load_folder(folder)
        measured = measure(model, resolve_input_data_config(model, vars(args)), args, process)
    if process.primary:
        print(f"timm.create_model('local-dir:{folder}', pretrained=True) has a top-1 accuracy of "
              f"{measured['top1']:.2f} % on the {measured['images']:,} images of {args.val_split}. It lies in "
              f"{folder.resolve()}")
    if process.distributed:
        dist.destroy_process_group()


def _name(args: argparse.Namespace) -> str:
    size = (args.input_size or [args.img_size])[-1]
    if not args.experiment and size is None:
        size = create_model(args).pretrained_cfg['input_size'][-1]
    return args.experiment or f'{safe_model_name(args.model)}-{size}'


def _from_primary(process: Process, find: Callable[[], Any]) -> Any:
    found = [find() if process.primary else None]
    if process.distributed:
        dist.broadcast_object_list(found)
    return found[0]


@contextmanager
def _named_checkpoint(folder: Path, process: Process) -> Iterator[None]:
    """Names the checkpoint that the run resumes from, whatever ends it."""
    try:
        yield
    except Stopped:
        if process.primary:
            _logger.info(f'Stopped. The same command resumes from {newest(folder)}')
        raise
    except (BadImageError, EOFError, FloatingPointError, MemoryError, OSError, RuntimeError) as e:
        reason = ' '.join(str(e).split()).rstrip('.') or type(e).__name__
        if reason.startswith('Caught ') or isinstance(e, RuntimeError) and not reason.startswith('DataLoader '):
            raise  # a defect, which keeps its traceback
        if isinstance(e, (ConnectionRefusedError, ConnectionResetError, EOFError)):  # while it handed over a batch
            reason = 'DataLoader worker was killed'
        if reason.startswith('DataLoader ') or isinstance(e, MemoryError):
            reason += '. If memory ran out, use fewer --workers'
        path = newest(folder)
        resumes = f'The last good checkpoint is {path}' if path else 'There is no checkpoint yet'
        raise RunError(f'{reason}. {resumes}; the same command resumes the run.') from e


def build(args: argparse.Namespace, process: Process) -> Run:
    """Build data, model and optimizer."""
    random_seed(args.seed)
    model = create_model(args).to(process.device)
    data_config = resolve_input_data_config(model, vars(args))
    train_set, eval_set = (open_dataset(args, training, data_config['input_size'][0]) for training in (True, False))
    _check_data(args, model.num_classes, train_set, eval_set)
    batch_size = train_batch_size(args, train_set, process)
    if batch_size < args.batch_size and process.primary:
        _logger.info(f'Batches have {batch_size} images and not {args.batch_size}, so that few are left over.')
    loader = create_train_loader(args, train_set, data_config, model.num_classes, process)
    if not len(loader):
        raise ValueError(f'there are {len(train_set)} images to train on, too few for a batch of {batch_size}.')
    task = create_task(args, model, process)
    task.progress.update(images=batch_size * process.world_size, classes=class_names(train_set))
    optimizer = create_optimizer(args, model, task.progress['images'])
    lr_scheduler, num_epochs = create_scheduler_v2(
        optimizer, **scheduler_kwargs(args), updates_per_epoch=count_updates(len(loader), args))
    _check_pruning(args, model, num_epochs)
    if process.primary and process.device.type == 'cpu':
        if not args.amp and computes_bfloat16():
            _logger.info('This CPU trains faster in bfloat16: --amp --amp-dtype bfloat16.')
        elif args.amp and computes_bfloat16() is False:
            _logger.warning('This CPU has neither AMX nor AVX-512 BF16, and trains slower with --amp: leave it out.')
    scaled = args.amp and args.amp_dtype == 'float16'
    return Run(
        args=args,
        process=process,
        task=task,
        loader=loader,
        optimizer=optimizer,
        lr_scheduler=lr_scheduler,
        loss_scaler=NativeScaler(device=process.device.type) if scaled else None,
        num_epochs=num_epochs,
        train_set=train_set,
        eval_set=eval_set,
        eval_loader=create_eval_loader(args, eval_set, data_config, process),
        data_config=data_config,
    )


def _check_data(args: argparse.Namespace, num_classes: int, train_set: Dataset, eval_set: Dataset) -> None:
    for dataset in (train_set, eval_set):
        check_classes(dataset, num_classes)
    trained, measured = class_names(train_set), class_names(eval_set)
    if trained and measured and trained != measured:
        odd = sorted({*trained} ^ {*measured}) or ['the same in another order']
        raise ValueError(
            f'training has {len(trained)} classes, validation {len(measured)}, and not the same ones: '
            f'{", ".join(odd[:5])}{", ..." if len(odd) > 5 else ""}. If one of them has no images of some, name all in '
            'a text file of one name on a line, by --class-map.')
    if measured and len(measured) < num_classes:
        fewer = f'the data set has {len(measured)} classes, the model {num_classes}'
        if args.num_classes is None:
            raise ValueError(f'{fewer}: say --num-classes {len(measured)}, or {num_classes} to train that.')
        _logger.warning(f'{fewer[0].upper()}{fewer[1:]}: their names are not kept.')


def _check_pruning(args: argparse.Namespace, model: torch.nn.Module, num_epochs: int) -> None:
    if not args.prune_connections:
        return
    keep, at = args.prune_connections
    if not getattr(model, 'connections', None):
        raise ValueError(f'--prune-connections needs a DResNet, {args.model} has no connections.')
    if not (0 <= keep <= 1 and 0 < at < 1 and 0 < round(at * num_epochs) < num_epochs):
        raise ValueError(
            '--prune-connections needs two numbers between 0 and 1, the share of the connections to keep and the share '
            f'of the epochs after which the others go: of {num_epochs}, at least one and not all.')


def train(run: Run, folder: Path) -> None:
    """Train to the end, from the newest checkpoint on if there is one, and write the results."""
    args, process, progress = run.args, run.process, run.task.progress
    checkpoint = _from_primary(process, lambda: newest(folder))
    if checkpoint is not None:
        resume(run, checkpoint)
    set_schedule(run)  # in the first epoch too, where some schedules do not begin at the optimizer's rate
    if process.distributed:
        _average_gradients(run)
    with handle_signals(run.signals.append):  # before the log says that training begins
        if process.primary:
            saver, log = _open_log(run, folder, checkpoint)
            run.save = lambda: saver.save_recovery(progress['epoch'], progress['batch'])
        prune_epoch = round(args.prune_connections[1] * run.num_epochs) if args.prune_connections else None
        for epoch in range(progress['epoch'], run.num_epochs):
            if args.mixup_off_epoch and epoch >= args.mixup_off_epoch:
                run.loader.mixup_enabled = False
            if epoch == prune_epoch and progress['pruned'] is None:
                prune(run, choose_pruned(run))
                if process.primary:
                    saver.model, saver.optimizer = run.task.get_trainable_module(), run.optimizer
            train_metrics, eval_metrics = _train_and_validate(run)
            bad = count_bad_images([run.train_set, run.eval_set], process) if args.bad_images == 'skip' else 0
            rates = [group['lr'] for group in run.optimizer.param_groups]
            run.lr_scheduler.step(epoch + 1)
            progress.update(epoch=epoch + 1, batch=0, totals=[0., 0., 0.])
            if process.primary:
                log.epoch(epoch, train_metrics, eval_metrics, sum(rates) / len(rates), run.networks[-1], bad)
                saver.save_checkpoint(epoch, metric=eval_metrics.get(args.eval_metric))
    if process.primary:
        save_results(run.networks[-1], folder, run.data_config, class_names(run.eval_set))
    if process.distributed:
        dist.barrier()


def _average_gradients(run: Run) -> None:
    on_cpu = run.process.device.type == 'cpu'
    run.task.prepare_distributed(device_ids=None if on_cpu else [run.process.device])


def choose_pruned(run: Run) -> List[Tuple[int, int]]:
    """The connections that do least to the first images of the epoch, (target, source)."""
    run.loader.loader.set_epoch(run.task.progress['epoch'], 0)
    images, _ = next(iter(run.loader))

    def choose() -> List[Tuple[int, int]]:
        model = copy.deepcopy(run.networks[0])
        removed = timm_dresnet.prune_connections(model, keep=run.args.prune_connections[0], images=images)
        _logger.info(f'{len(removed)} connections are pruned, {len(model.connection_pairs())} are left.')
        return [(record['target'], record['source']) for record in removed]

    return _from_primary(run.process, choose)


def prune(run: Run, pairs: List[Tuple[int, int]]) -> None:
    """Remove connections, (target, source); the optimizer keeps its state of all parameters that stay as they are."""
    task = run.task
    for network in run.networks:
        network.prune_connections(pairs)
    if isinstance(task.trainable_module, DistributedDataParallel):
        task.trainable_module = task.trainable_module.module
        _average_gradients(run)
    model = run.networks[0]
    task.progress['pruned'] = pairs
    before = run.optimizer
    run.optimizer = run.lr_scheduler.optimizer = create_optimizer(run.args, model, task.progress['images'])
    old, new = (getattr(optimizer, '_base_optimizer', optimizer) for optimizer in (before, run.optimizer))  # Lookahead
    new.state.update({p: old.state[p] for p in model.parameters() if p in old.state})
    for group, old_group in zip(new.param_groups, old.param_groups):  # numbers of steps, of some optimizers
        group.update({key: value for key, value in old_group.items() if key not in group})
    set_schedule(run)


def set_schedule(run: Run) -> None:
    """Set the learning rate to that of the next update."""
    progress, args = run.task.progress, run.args
    updates = progress['epoch'] * count_updates(len(run.loader), args) + count_updates(progress['batch'], args)
    run.lr_scheduler.step(progress['epoch'])
    run.lr_scheduler.step_update(updates)


def resume(run: Run, checkpoint: Path) -> None:
    """Set everything but the learning rate to where a checkpoint was written."""
    if not checkpoint.is_file():
        raise ValueError(f'{checkpoint} is not on this machine: --output must be a folder that all machines share.')
    progress, accum_steps = run.task.progress, run.args.grad_accum_steps
    images, classes = progress['images'], progress['classes']
    if pruned := load_checkpoint_metadata(checkpoint)['task_state'].get('pruned'):
        prune(run, pruned)
    try:
        resume_task_checkpoint(run.task, str(checkpoint), run.optimizer, run.loss_scaler, log_info=False)
        if run.task.has_ema():
            load_task_ema_checkpoint(run.task, str(checkpoint))
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
        reason = f'{type(e).__name__}: {e}'.splitlines()[0]
        raise ValueError(f'{checkpoint} does not fit this run ({reason[:300]}), use another --experiment.') from e
    if progress['classes'] != classes:
        odd = sorted({*progress['classes']} ^ {*classes}) or ['the same in another order']
        raise ValueError(f'{checkpoint} was trained with other classes than the data set has ({", ".join(odd[:5])}): '
                         'use another --experiment.')
    # in batches of this run, which may have another number of processes
    batch = progress['batch'] * progress['images'] // images
    progress['batch'] = batch if batch >= len(run.loader) else batch - batch % accum_steps
    progress['images'] = images


def _open_log(run: Run, folder: Path, checkpoint: Optional[Path]) -> Tuple[Checkpoints, Log]:
    args, progress = run.args, run.task.progress
    saver = Checkpoints(
        model=run.task.get_trainable_module(),
        optimizer=run.optimizer,
        args=args,
        amp_scaler=run.loss_scaler,
        checkpoint_dir=str(folder),
        recovery_dir=str(folder),
        decreasing=args.eval_metric == 'loss',
        max_history=args.checkpoint_hist,
        task=run.task,
    )
    log = Log(args, folder, progress['epoch'], run.num_epochs)
    if checkpoint is None:
        log.connections(-1, run.networks[-1])
        parameters = sum(p.numel() for p in run.networks[0].parameters())
        _logger.info(
            f'Training {args.model} ({parameters:,} parameters) on {len(run.train_set):,} images of '
            f'{"x".join(map(str, run.data_config["input_size"]))} for {run.num_epochs} epochs on '
            f'{run.process.world_size} x {run.process.device.type}, into {folder}')
    else:
        saver.resume(checkpoint)
        _logger.info(f'Resuming from {checkpoint}: epoch {progress["epoch"] + 1}, batch {progress["batch"] + 1}')
    return saver, log


def _train_and_validate(run: Run) -> Tuple[Dict[str, Optional[float]], Dict[str, float]]:
    """Metrics of an epoch in training and in validation (empty if it is not validated)."""
    args, process, epoch = run.args, run.process, run.task.progress['epoch']
    train_metrics = train_one_epoch(run)
    if process.distributed and args.dist_bn and not args.sync_bn:
        for network in run.networks:
            distribute_bn(network, process.world_size, args.dist_bn == 'reduce')
    if (epoch + 1) % args.val_interval and epoch + 1 < run.num_epochs:
        return train_metrics, {}
    model = run.task.get_eval_model(ema=args.model_ema)
    if isinstance(model, DistributedDataParallel):
        model = model.module
    try:
        return train_metrics, validate(model, run.eval_loader, args, process, run.signals)
    except Stopped:
        run.save()
        raise

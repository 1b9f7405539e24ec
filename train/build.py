"""What a run is made of: device, model, task and optimizer, from its arguments."""
import argparse
import os
from dataclasses import dataclass
from typing import Any, Dict, Optional

import timm
import torch
from safetensors import SafetensorError
from timm.layers import convert_sync_batchnorm
from timm.optim import create_optimizer_v2, get_optimizer_class, optimizer_kwargs
from timm.task import ClassificationTask
from timm.utils import is_distributed_env
from timm.utils.distributed import init_distributed_device_so

from timm_dresnet.cli import check_model_name

_NOT_FUSED = {'foreach', 'differentiable'}


@dataclass(frozen=True)
class Process:
    """This process, its device, and its place among those that train together."""
    device: torch.device
    rank: int = 0
    world_size: int = 1

    @property
    def distributed(self) -> bool:
        return self.world_size > 1

    @property
    def primary(self) -> bool:
        return self.rank == 0


def set_up_process(args: argparse.Namespace) -> Process:
    """Join the other processes, and set the device for speed, or for repeatable numbers."""
    name = args.device or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        found = init_distributed_device_so(name)
        device = torch.device(found['device'])
    except (AssertionError, RuntimeError) as e:
        if is_distributed_env():  # it may be that processes do not find each other
            raise
        raise ValueError(f'--device {name}: {str(e).splitlines()[0]}') from e
    if device.type == 'cuda':
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.benchmark = not args.deterministic
    if args.deterministic:
        os.environ.setdefault('CUBLAS_WORKSPACE_CONFIG', ':4096:8')  # without which older PyTorch raises errors on GPUs
    torch.use_deterministic_algorithms(args.deterministic)
    return Process(device, found['global_rank'], found['world_size'])


def computes_bfloat16() -> bool | None:
    """Whether an x86 CPU has instructions for bfloat16, None where PyTorch cannot tell."""
    found = getattr(torch.cpu, 'get_capabilities', dict)()  # of newer PyTorch
    if 'avx512_bf16' in found:
        return found['amx_bf16'] or found['avx512_bf16']
    return False if torch.backends.cpu.get_cpu_capability() == 'AVX2' else None


def create_model(args: argparse.Namespace) -> torch.nn.Module:
    """The model that a run trains."""
    check_model_name(args.model)
    overlay = {}
    if args.pretrained_path:
        if args.num_classes is None:
            raise ValueError('--pretrained-path needs --num-classes, for which a new classifier is made.')
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
            **overlay,
            **args.model_kwargs,
        )
    except (AssertionError, KeyError, TypeError) as e:  # of timm's layers
        raise ValueError(f'{args.model} does not take these arguments: {e}') from e
    except (EOFError, OSError, RuntimeError, SafetensorError) as e:
        source = args.initial_checkpoint or args.pretrained_path or (args.pretrained and '--pretrained')
        if not source:
            raise
        reason = ' '.join(str(e).split())[:300] or type(e).__name__
        if reason == 'FileNotFoundError':  # timm's own, without a word
            reason = 'there is no such file, give that of the weights, such as model.safetensors.'
        raise ValueError(f'{source}: {reason}') from e
    if not args.pretrained or args.pretrained_path:
        model.pretrained_cfg.pop('license', None)  # that of timm's weights
    if args.bn_momentum is not None:
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.momentum = args.bn_momentum
    if args.linear_probe:
        model.requires_grad_(False)
        heads = model.get_classifier()  # of distilled models, two
        torch.nn.ModuleList(heads if isinstance(heads, tuple) else [heads]).requires_grad_(True)
    return model


class Task(ClassificationTask):
    """timm's task, whose checkpoints also hold the progress of the run.

    Attributes:
        progress: ``epoch`` and ``batch`` that come next, ``images`` in a batch of all processes, ``totals`` of the
            epoch so far (sum of losses, correct predictions, images), names of the ``classes``, and the connections
            that were ``pruned``, (target, source).
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.progress = dict(epoch=0, batch=0, images=0, totals=[0., 0., 0.], classes=None, pruned=None)

    def get_task_state(self, ema: bool = False, **_: Any) -> Dict[str, Any]:
        return {} if ema else self.progress

    def load_task_state(self, state: Optional[Dict[str, Any]], ema: bool = False, **_: Any) -> None:
        if not ema:
            self.progress.update(state)


def create_task(args: argparse.Namespace, model: torch.nn.Module, process: Process) -> Task:
    """The model with its loss and its moving average, compiled if asked for."""
    if getattr(model, 'fused', False):
        raise ValueError(f'{args.model} is fused for inference: train the model that it was made from.')
    if args.sync_bn:
        if process.device.type != 'cuda':
            raise ValueError(f'--sync-bn needs CUDA devices, not {process.device.type}: leave it out.')
        if process.distributed:
            model = convert_sync_batchnorm(model)
    graphs = args.torchcompile and args.torchcompile_mode in ('max-autotune', 'reduce-overhead')
    if graphs and args.grad_accum_steps > 1 and process.device.type == 'cuda':
        raise ValueError(f'--grad-accum-steps does not work with --torchcompile-mode {args.torchcompile_mode}, whose '
                         'CUDA graphs overwrite gradients (pytorch#169545): leave out either.')
    if args.torchcompile and args.torchcompile not in (backends := torch.compiler.list_backends(())):
        raise ValueError(f'--torchcompile {args.torchcompile}: there are the backends {", ".join(backends)}.')
    if not 0 <= args.smoothing < 1:
        raise ValueError(f'--smoothing must be at least 0 and less than 1, got {args.smoothing}.')
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    if args.grad_checkpointing:
        model.set_grad_checkpointing()
    loss = dict(smoothing=args.smoothing, soft_targets=args.mixup > 0 or args.cutmix > 0)  # these smooth targets too
    if args.bce_loss:
        loss.update(loss_type='bce', bce_target_thresh=args.bce_target_thresh)
    task = Task(model, criterion_kwargs=loss, device=process.device, verbose=False)
    if args.model_ema:
        task.setup_ema(decay=args.model_ema_decay, use_warmup=args.model_ema_warmup)
    if args.torchcompile:
        task.compile(backend=args.torchcompile, mode=args.torchcompile_mode)
        task.compile_ema(backend=args.torchcompile, mode=args.torchcompile_mode)
    return task


def create_optimizer(args: argparse.Namespace, model: torch.nn.Module, images: int) -> torch.optim.Optimizer:
    """The optimizer of `--opt`, with the rate `--lr`, or `--lr-base` scaled as timm does.

    Args:
        images: Images in a batch of all processes.
    """
    kwargs = optimizer_kwargs(args)
    if args.lr is None:
        ratio = images * args.grad_accum_steps / args.lr_base_size
        scale = args.lr_base_scale or ('sqrt' if any(o in args.opt.lower() for o in ('ada', 'lamb')) else 'linear')
        kwargs['lr'] = args.lr_base * (ratio ** 0.5 if scale == 'sqrt' else ratio)
    try:
        optimizer_class = get_optimizer_class(args.opt.lower().removeprefix('lookahead_'), bind_defaults=False)
        if optimizer_class in (torch.optim.Adam, torch.optim.AdamW) and not args.opt_kwargs.keys() & _NOT_FUSED:
            kwargs['fused'] = True  # faster; a fused SGD would need the momentum of all parameters, also of new ones
        return create_optimizer_v2(model, **{**kwargs, **args.opt_kwargs})
    except (AssertionError, ImportError) as e:  # it needs CUDA, or what is not installed
        raise ValueError(f'--opt {args.opt}: {e}') from e
    except (IndexError, TypeError) as e:
        raise ValueError(
            f'{args.opt} does not take --opt-betas {args.opt_betas} or --opt-kwargs {args.opt_kwargs}: {e}') from e

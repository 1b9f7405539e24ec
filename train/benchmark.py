"""`python -m train.benchmark`: what models cost in inference and in training, as ratios to a baseline.

The two models of a pair, and both as prepared for inference, are timed in turns, in one run, after a warm-up: whatever
else slows the machine down slows all of them down.
"""
import argparse
import copy
import gc
import itertools
import json
import os
import platform
import re
import shlex
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.resnet import ResNet
from timm.utils import reparameterize_model
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from timm_dresnet.cli import check_model_name, positive
from timm_dresnet.folding import fold_norms

from .arguments import KeyValues
from .build import set_up_process
from .results import format_head, format_row

_PAIRS = [('dresnet18', 'resnet18'), ('adaresnet50', 'resnet50'), ('dresnet50', 'resnet50')]
_ALL = [('adaresnet50', 'resnet50'), *((f'dresnet{depth}', f'resnet{depth}') for depth in (18, 34, 50, 101))]
_ALL_CIFAR = [(f'dresnet{depth}_cifar', f'resnet{depth}_cifar') for depth in (20, 56)]
_SAMPLE_SECONDS = 0.2  # calls that take less are repeated for so long in every round
_COLUMNS = {  # what is measured: its heading, and how a value and the batch size are written for a baseline
    'parameters': ('parameters', lambda value, batch: f'{value:,.0f}'),
    'multiply_adds': ('multiply-adds', lambda value, batch: f'{value / 1e6:,.1f} M'),
    'image_seconds': ('one image', lambda value, batch: f'{1e3 * value:.1f} ms'),
    'batch_seconds': ('batch', lambda value, batch: f'{batch / value:.1f} images/s'),
    'step_seconds': ('training step', lambda value, batch: f'{1e3 * value:.1f} ms'),
    'peak_memory': ('peak memory', lambda value, batch: f'{value / 1e6:.1f} MB'),
}


def count_multiply_adds(model: nn.Module, input_size: Sequence[int]) -> int:
    """Multiply-adds of convolutions and matrix products for one input of the given size, `[C, H, W]`."""
    model = copy.deepcopy(model).eval().requires_grad_(False)  # the counter's hooks fail on parameters as outputs
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.zeros(1, *input_size))
    return counter.get_total_flops() // 2


def prepare_for_inference(model: nn.Module) -> Optional[Tuple[str, nn.Module]]:
    """Fuse a copy of a model or, of a ResNet with nothing to fuse, fold the norms of its blocks.

    Fusing folds these norms too: beside a baseline whose norms are folded, one sees what the rest of a model costs.

    Returns:
        What was done, in words, and the copy; None if there is nothing to do.
    """
    what, prepared = 'fused', reparameterize_model(model.eval())
    if prepared.state_dict().keys() == model.state_dict().keys():
        if not isinstance(model, ResNet):
            return None
        what = 'norms folded'
        for block in itertools.chain(prepared.layer1, prepared.layer2, prepared.layer3, prepared.layer4):
            fold_norms(block)
    return what, prepared


class TrainingStep:
    """Forward, cross-entropy, backward, and an SGD update with momentum. There are no gradients before or after.

    The learning rate is 0, so that every step does the same work on the same weights.
    """

    def __init__(self, model: nn.Module, images: torch.Tensor, autocast: Callable[[], torch.autocast]) -> None:
        self.model = model.train()
        self.images = images
        self.targets = torch.zeros(len(images), dtype=torch.long, device=images.device)
        self.autocast = autocast
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0., momentum=0.9)

    def __call__(self) -> None:
        with self.autocast():
            loss = F.cross_entropy(self.model(self.images), self.targets)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def peak_memory(self) -> int:
        """The most bytes that a step holds: parameters, buffers, momentum, batch, and all that it makes of them."""
        self()  # the first step makes the momentum
        held = [*self.model.parameters(), *self.model.buffers(), self.images, self.targets]
        held += [value for state in self.optimizer.state.values() for value in state.values()]
        device = self.images.device
        if device.type == 'cuda':
            before = torch.cuda.memory_allocated(device)
            torch.cuda.reset_peak_memory_stats(device)
            self()
            made = torch.cuda.max_memory_allocated(device) - before
        else:
            with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
                self()
            events = [event for event in profiler.profiler.kineto_results.events() if event.name() == '[memory]']
            events.sort(key=lambda event: event.start_ns())
            made = max(itertools.accumulate((event.nbytes() for event in events), initial=0))
        return sum(tensor.nbytes for tensor in held) + made


def time_in_turns(
        tasks: Dict[Any, Callable[[], None]],
        rounds: int,
        wait: Callable[[], None],
        title: str,
) -> Dict[Any, List[float]]:
    """Seconds of a call of each task, in each round; `wait` returns when the device has finished all work."""
    def seconds(task: Callable[[], None], calls: int) -> float:
        wait()
        start = time.perf_counter()
        for _ in range(calls):
            task()
        wait()
        return (time.perf_counter() - start) / calls

    calls = {}
    times: Dict[Any, List[float]] = {key: [] for key in tasks}
    for key, task in tqdm(tasks.items(), f'{title}, warm-up'):
        seconds(task, 2)  # compiles, captures, allocates
        calls[key] = max(1, round(_SAMPLE_SECONDS / seconds(task, 1)))
    for i in tqdm(range(rounds), title):
        for key in list(tasks)[::-1 if i % 2 else 1]:
            times[key].append(seconds(tasks[key], calls[key]))
    return times


def measure(
        model: str,
        baseline: str,
        img_size: int,
        batch_size: int,
        args: argparse.Namespace,
        device: torch.device,
) -> Dict[str, Any]:
    """Measure a model and what it is compared with.

    Returns:
        Size of the ``input``, and for each of the ``variants`` its name and the table's columns, times of every round.
    """
    size = (3, img_size, img_size)
    with torch.device('meta'):
        num_classes = timm.create_model(baseline).num_classes
    torch.manual_seed(0)
    models, results = {}, {}
    for role, name in (('model', model), ('baseline', baseline)):
        kwargs = args.model_kwargs if role == 'model' else {}
        models[role] = timm.create_model(name, num_classes=num_classes, **kwargs)
        name = ' '.join([name, *(f'{key}={value}' for key, value in kwargs.items())])
        results[role] = dict(name=name)
        prepared = prepare_for_inference(models[role])
        if prepared is not None:
            results[f'prepared_{role}'] = dict(name=f'{name}, {prepared[0]}')
            models[f'prepared_{role}'] = prepared[1]
    for role, result in results.items():
        result['parameters'] = sum(p.numel() for p in models[role].parameters())
        result['multiply_adds'] = count_multiply_adds(models[role], size)

    images = torch.randn(batch_size, *size).to(device, memory_format=torch.channels_last)
    wait = partial(torch.cuda.synchronize, device) if device.type == 'cuda' else lambda: None
    autocast = partial(torch.autocast, device.type, torch.bfloat16, enabled=args.amp)

    def place(model: nn.Module) -> nn.Module:
        model.to(device, memory_format=torch.channels_last)
        if args.compile:
            return torch.compile(model, dynamic=False, mode='reduce-overhead' if args.cuda_graphs else None)
        return model

    @torch.inference_mode()
    def infer(model: nn.Module, images: torch.Tensor, then: Callable[[], None] = lambda: None) -> None:
        with autocast():
            model(images)
        then()

    steps = {role: TrainingStep(place(copy.deepcopy(models[role])), images, autocast) for role in ('model', 'baseline')}
    networks = {role: place(models[role].eval()) for role in results}
    tasks = {(role, 'image_seconds'): partial(infer, model, images[:1], wait) for role, model in networks.items()}
    tasks |= {(role, 'batch_seconds'): partial(infer, model, images) for role, model in networks.items()}
    tasks |= {(role, 'step_seconds'): step for role, step in steps.items()}
    for (role, column), seconds in time_in_turns(tasks, args.rounds, wait, f'{model} / {baseline}').items():
        results[role][column] = seconds
    if not args.cuda_graphs:  # these keep their memory between steps
        for role, step in steps.items():
            results[role]['peak_memory'] = step.peak_memory()
    return dict(input=[batch_size, *size], variants=results)


def table_rows(result: Dict[str, Any]) -> List[List[str]]:
    """What `measure` returns as rows: baselines in numbers, models as ratios to them, as they are and as prepared."""
    def cell(key: str, of: Dict[str, Any], variant: Optional[Dict[str, Any]]) -> str:
        if key not in of or variant is not None and key not in variant:
            return ''
        if variant is None:
            return _COLUMNS[key][1](np.median(of[key]), result['input'][0])
        if isinstance(of[key], list):
            ratios = np.divide(variant[key], of[key])
            return '{1:.2f} ({0:.2f} to {2:.2f})'.format(*np.quantile(ratios, [0.25, 0.5, 0.75]))
        return f'{variant[key] / of[key]:.3f}'

    rows = []
    for role, of in ((None, 'baseline'), (None, 'prepared_baseline'), ('model', 'baseline'),
                     ('prepared_model', 'baseline'), ('prepared_model', 'prepared_baseline')):
        baseline, variant = result['variants'].get(of), result['variants'].get(role)
        if baseline and (variant or role is None):
            names = [variant['name'], baseline['name']] if variant else [baseline['name'], '']
            cells = [cell(key, baseline, variant) for key in _COLUMNS]
            rows.append([*names, 'x'.join(map(str, result['input'])), *cells])
    return rows


def describe(args: argparse.Namespace, device: torch.device) -> Dict[str, Any]:
    """What the numbers depend on, apart from the models."""
    cpu = Path('/proc/cpuinfo')  # what Python knows of a processor on Linux is its architecture
    name = re.search(r'^model name\s*: (.*)', cpu.read_text(), re.MULTILINE) if cpu.exists() else None
    return {
        'device': torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type,
        'CPU': f'{name[1] if name else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})',
        'threads': torch.get_num_threads(),
        'torch': torch.__version__,
        'timm': timm.__version__,
        'dtype': ('bfloat16 autocast, else ' if args.amp else '') + 'float32' + ' (TF32)' * (device.type == 'cuda'),
        'layout': 'channels-last',
        'compiler': 'torch.compile' * args.compile + ' with CUDA graphs' * args.cuda_graphs or 'none',
        'rounds': args.rounds,
    }


def main(argv: Optional[List[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog='python -m train.benchmark',
        description='Time and memory of models as ratios to a baseline. Without --models: dresnet18 of resnet18, '
                    'adaresnet50 and dresnet50 of resnet50.',
        epilog='example: python -m train.benchmark --models dresnet18 dresnet18_gauss --baseline resnet18',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--models', nargs='+', metavar='NAME', help='architectures, any of timm.list_models()')
    parser.add_argument('--baseline', metavar='NAME', help='the architecture to compare them with')
    parser.add_argument('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
                        help='other arguments of the models, not of the baseline, such as connected_stages=1')
    parser.add_argument('--all', action='store_true',
                        help='besides these, DResNets of 34 and 101 layers, and of 20 and 56 on batches of 128x3x32x32')
    parser.add_argument('--img-size', type=positive, default=224, metavar='N', help='image size')
    parser.add_argument('-b', '--batch-size', type=positive, default=8, metavar='N', help='images in a batch')
    parser.add_argument('--rounds', type=positive, default=10, metavar='N', help='how often each is timed')
    parser.add_argument('--device', metavar='NAME', help='device to run on (a GPU if there is one, if not set)')
    parser.add_argument('--amp', action='store_true', help='bfloat16 autocast')
    parser.add_argument('--compile', action='store_true', help='torch.compile the models')
    parser.add_argument('--cuda-graphs', action='store_true', help='with CUDA graphs; peak memory is not measured')
    parser.add_argument('--md', type=Path, metavar='FILE', help='write what is printed')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write all that was measured, times of every round')
    parser.set_defaults(deterministic=False)
    args = parser.parse_args(argv)
    args.compile |= args.cuda_graphs
    if bool(args.models) != bool(args.baseline) or args.all and args.models or args.model_kwargs and not args.models:
        parser.error('--models and --baseline need each other, --model-kwargs needs them, and --all excludes them.')
    names = [(model, args.baseline) for model in args.models or ()] or (_ALL if args.all else _PAIRS)
    pairs = [(*pair, args.img_size, args.batch_size) for pair in names]
    if args.all:
        pairs += [(*pair, 32, 128) for pair in _ALL_CIFAR]
    try:
        for path in (args.md, args.json):
            if path and not path.parent.is_dir():
                raise ValueError(f'there is no folder {path.parent} to write {path.name} into.')
        for model, baseline, *_ in pairs:
            check_model_name(model)
            check_model_name(baseline)
            with torch.device('meta'):
                timm.create_model(model, **args.model_kwargs)
        device = set_up_process(args).device
    except (KeyError, OSError, TypeError, ValueError) as e:
        parser.error(str(e))
    if args.batch_size < 2:
        parser.error('--batch-size must be 2 or more: batch norm cannot train on a single value.')
    if args.cuda_graphs and device.type != 'cuda':
        parser.error(f'--cuda-graphs needs a CUDA device, not {device.type}.')

    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler logs that it finds no GPU
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # all variants share the code that is compiled for each of them
    command = shlex.join(['python', '-m', 'train.benchmark', *argv])
    report: Dict[str, Any] = dict(command=command, setup=describe(args, device), results=[])
    setup = '; '.join(f'{key}: {value}' for key, value in report['setup'].items())
    files = [sys.stdout, *([args.md.open('w')] if args.md else [])]

    def write(text: str) -> None:
        for file in files:
            print(text, file=file, flush=True)

    write(f"""`{command}`

{setup}

Baselines in numbers, models as ratios to them: 1.10 is 10 % more time for the same images, or 10 % more of anything \
else. Of times, the median over the rounds and, in brackets, the quartiles.
""")
    write(format_head(['model', 'of', 'input', *(head for head, _ in _COLUMNS.values())]))
    for pair in pairs:
        report['results'].append(measure(*pair, args, device))
        for row in table_rows(report['results'][-1]):
            write(format_row(row))
        if args.json:
            args.json.write_text(json.dumps(report, indent=1))
        gc.collect()
        if args.compile:
            torch.compiler.reset()


if __name__ == '__main__':
    main()

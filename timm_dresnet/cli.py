"""`timm-dresnet`, the command line: which models there are, what they see in images, and what their connections do."""
import argparse
import csv
import difflib
import fnmatch
import json
import logging
import os
import sys
from contextlib import contextmanager
from importlib.resources import files
from importlib.util import find_spec
from io import TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, Iterator, List, Optional, Sequence

import timm
import torch
import torch.nn as nn
from safetensors import SafetensorError
from timm.data import resolve_model_data_config
from timm.models import get_arch_pretrained_cfgs, get_pretrained_cfg, list_models, save_for_hf
from timm.models._hub import save_config_for_hf
from timm.utils import reparameterize_model

import timm_dresnet

from .folders import atomic_folder, first_line, load_checkpoint, load_folder
from .images import Classifier, find_images

_MAX_MEASURED = 128  # images to measure on, in one batch


def check_model_name(name: str, what: str = 'model') -> None:
    """Raise a ValueError if timm knows no model of this name and tag."""
    if ':' in name:
        return
    architecture, _, tag = name.partition('.')
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, list_models())
        hint = f'did you mean {" or ".join(near)}?' if near else 'timm.list_models() lists all.'
        raise ValueError(f'There is no {what} {name!r}: {hint}')
    if tag and name not in get_arch_pretrained_cfgs(architecture):
        raise ValueError(f"There is no model {name!r}. Invalid pretrained tag {tag!r}: "
                         f"timm.list_pretrained('{architecture}.*') lists all.")


def load(name: str, pretrained: bool = True, families: Sequence[str] = ()) -> nn.Module:
    """Create a model in eval mode.

    Args:
        name: Folder, checkpoint of a run, `hf-hub:owner/name`, or model with or without a tag.
        pretrained: Whether it has its weights. A folder, a checkpoint or a model of the Hub always has.
        families: Names of classes that it must be of.

    Raises:
        ValueError: If there is no such model, or its weights cannot be loaded.
    """
    if not pretrained and (Path(name).exists() or ':' in name):
        raise ValueError(f'{name} has weights: for an untrained model, give a name that timm.create_model takes.')
    folder = Path(name.removeprefix('local-dir:'))
    if folder.is_dir():
        return load_folder(folder)
    if Path(name).is_file():
        return load_checkpoint(Path(name))
    check_model_name(name, 'folder and no model')
    if ':' not in name:
        architecture, _, tag = name.partition('.')
        module = timm.models.model_entrypoint(architecture).__module__
        if families and module not in [f'timm_dresnet.{family.lower()}' for family in (*families, 'growing')]:
            raise ValueError(f'{name} is not a {" or ".join(families)}, and so has no learned connections.')
        if pretrained and not tag and not timm.models.is_model_pretrained(architecture):
            raise ValueError(f'{architecture} comes without weights: train it, and give the folder of the run.')
    try:
        return timm.create_model(name, pretrained=pretrained).eval()
    except Exception as e:  # whatever a damaged file, timm, or the network raises
        raise ValueError(f'{name} cannot be loaded: {first_line(e)}') from e


def _print_table(rows: Sequence[Dict[str, Any]]) -> None:
    if not rows:
        return
    lines = [list(rows[0])]
    for row in rows:
        lines.append([
            '' if value is None else f'{value:.4g}' if isinstance(value, float) else str(value)
            for value in row.values()])
    widths = [max(map(len, column)) for column in zip(*lines)]
    aligned = ['>' if isinstance(value, (int, float)) else '<' for value in rows[0].values()]
    for line in lines:
        print('  '.join(f'{cell:{a}{width}}' for cell, a, width in zip(line, aligned, widths)).rstrip())


def list_command(args: argparse.Namespace) -> None:
    with (files('timm_dresnet') / 'weights/results.csv').open() as f:
        results = {row['model']: row for row in csv.DictReader(f)}
    rows: List[Dict[str, Any]] = []
    for name in list_models():
        if not timm.models.model_entrypoint(name).__module__.startswith('timm_dresnet.'):
            continue
        tags = timm.list_pretrained(f'{name}.*')
        parameters: Dict[int, int] = {}  # by number of classes
        for tag in tags or [name]:
            if not fnmatch.fnmatch(tag, args.filter) and not fnmatch.fnmatch(name, args.filter):
                continue
            cfg: Any = get_pretrained_cfg(tag)
            if cfg.num_classes not in parameters:
                model = timm.create_model(name, num_classes=cfg.num_classes, device='meta')
                parameters[cfg.num_classes] = sum(p.numel() for p in model.parameters())
            measured = results.get(tag)
            rows.append(dict(
                model=tag,
                parameters=parameters[cfg.num_classes],
                image_size=cfg.input_size[-1],
                weights='package' if cfg.file else 'hub' if cfg.has_weights else None,
                top1=float(measured['top1']) if measured else None,
                dataset=measured['dataset'] if measured else None,
            ))
    if not rows:
        raise ValueError(f'No model matches {args.filter!r}.')
    if args.json:
        print(json.dumps(rows, indent=2))
    else:
        _print_table([
            {**row, 'parameters': f'{row["parameters"] / 1e6:6.2f} M',
             'top1': None if row['top1'] is None else f'{row["top1"]:.2f} %'} for row in rows])


def classify_command(args: argparse.Namespace) -> int:
    classifier, status = Classifier(load(args.model)), 0
    for path in find_images(args.images):
        record: Dict[str, Any] = dict(image=path)
        try:
            image = classifier.read(path)
        except ValueError as e:
            status, record['error'] = 1, str(e)
            print(f'timm-dresnet classify: error: {e}', file=sys.stderr)
        else:
            record['classes'], = classifier(image[None], args.top)
        if args.json:
            print(json.dumps(record), flush=True)
        elif 'classes' in record:
            words = ', '.join(f'{c["label"]} {100 * c["probability"]:.1f} %' for c in record['classes'])
            print(f'{path}: {words}', flush=True)
    return status


def connections_command(args: argparse.Namespace) -> None:
    model = load(args.model, families=('DResNet', 'AdaResNet'))
    images = Classifier(model).read_sample(args.images, _MAX_MEASURED) if args.images else None
    records = timm_dresnet.connections(model, images)
    for path, plot in ((args.out, timm_dresnet.plot_connections), (args.arcs, timm_dresnet.plot_arcs)):
        if path:
            with _picture(path) as new:
                plot(model, new, images)
    if args.json:
        print(json.dumps(records, indent=2))
        return
    _print_table(records)
    if images is not None:
        print('effect: norm of what the connection adds, over that of the whole sum. share: its part of the sum, '
              'negative where it works against the rest; all shares of a sum add up to 1.', file=sys.stderr)


def signal_command(args: argparse.Namespace) -> None:
    signals = {}
    for name in args.models:
        torch.manual_seed(0)
        model = load(name, pretrained=not args.untrained)
        if args.images:
            images = Classifier(model).read_sample(args.images, _MAX_MEASURED)
        else:
            size = resolve_model_data_config(model)['input_size']
            images = torch.randn(16, *size, generator=torch.Generator().manual_seed(0))
        signals[name] = timm_dresnet.signal_propagation(model.train(args.untrained), images)
    if args.out:
        with _picture(args.out) as new:
            timm_dresnet.plot_signal_propagation(signals, new)
    if args.json:
        print(json.dumps(signals, indent=2))
        return
    _print_table([dict(model=name, **record) for name, signal in signals.items() for record in signal['blocks']])
    print()
    _print_table([
        {'model': name, **{
            f'correlation at {record["distance"]:.2f}': record['correlation']
            for record in signal['input_gradients'][1:17:5]}}
        for name, signal in signals.items()])


def fuse_command(args: argparse.Namespace) -> None:
    model = load(args.model)
    fused = reparameterize_model(model)
    if getattr(model, 'fused', False) or not getattr(fused, 'fused', False):  # others would not load again
        raise ValueError(f'{args.model} has nothing that can be fused.')
    _write_model(fused, args.folder)


def grow_command(args: argparse.Namespace) -> None:
    _write_model(timm_dresnet.grow(load(args.model), args.kind), args.folder)


def prune_command(args: argparse.Namespace) -> None:
    model = load(args.model, families=['DResNet'])
    images = Classifier(model).read_sample(args.images, _MAX_MEASURED) if args.images else None
    removed = timm_dresnet.prune_connections(
        model, min_gate=args.min_gate, min_effect=args.min_effect, keep=args.keep, images=images)
    count = len(removed) + len(model.connection_pairs())
    print(f'Removed {len(removed)} of {count} connections.', file=sys.stderr)
    _write_model(model, args.folder)


def export_command(args: argparse.Namespace) -> None:
    if args.int8 != bool(args.images) or args.int8 and args.format != 'onnx':
        raise ValueError('--int8 needs --format onnx, and --images to measure the ranges of activations on; '
                         '--images is for nothing else.')
    model = load(args.model)
    if args.format == 'safetensors':
        return _write_model(model, args.folder)
    needed = ('onnx', 'onnxscript', 'onnxruntime') if args.int8 else ('onnx', 'onnxscript')
    if missing := [name for name in needed if find_spec(name) is None]:
        raise ValueError(f'ONNX needs what is not installed, try: pip install {" ".join(missing)}')
    import onnx
    from timm.utils.onnx import onnx_export
    logging.getLogger('onnxscript.optimizer').setLevel(logging.ERROR)  # it warns of each constant that it leaves
    images = Classifier(model).read_sample(args.images, _MAX_MEASURED) if args.int8 else None
    size = resolve_model_data_config(model, use_test_size=True)['input_size']
    fused = reparameterize_model(model)
    with _written(args.folder, args.folder) as folder:
        save_config_for_hf(model, str(folder / 'config.json'))
        onnx_export(
            fused, str(folder / 'model.onnx'), input_size=size, batch_size=2, use_dynamo=True,
            check_forward=find_spec('onnxruntime') is not None)
        network = onnx.load(folder / 'model.onnx')
        for node in network.graph.node:
            node.ClearField('metadata_props')  # with paths of files on this machine
        onnx.save(network, folder / 'model.onnx')
        if images is not None:
            from onnxruntime.quantization import quantize_static
            from onnxruntime.quantization.shape_inference import quant_pre_process
            quant_pre_process(folder / 'model.onnx', folder / 'model.onnx')
            batches = ({'input0': batch.numpy()} for batch in images.split(32))
            reader: Any = SimpleNamespace(get_next=lambda: next(batches, None))
            quantize_static(folder / 'model.onnx', folder / 'model.onnx', reader, per_channel=True)


@contextmanager
def _written(path: Path, folder: Path) -> Iterator[Path]:
    try:
        with atomic_folder(folder) as new:
            yield new
    except (OSError, SafetensorError) as e:
        raise ValueError(f'{path} cannot be written: {getattr(e, "strerror", None) or e}.') from e
    size = f', {sum(file.stat().st_size for file in path.iterdir()) / 1e6:.1f} MB' if path.is_dir() else ''
    print(f'Wrote {path}{size}', file=sys.stderr)


@contextmanager
def _picture(path: Path) -> Iterator[Path]:
    if find_spec('matplotlib') is None:
        raise ValueError('Pictures need what is not installed, try: pip install matplotlib')
    if path.is_dir():
        raise ValueError(f'{path} is a folder: name a file in it.')
    path = path if path.suffix else path.with_suffix('.png')  # as matplotlib names it
    with _written(path, path.parent) as new:
        yield new / path.name


def _check_folder(path: Path, weights: str, force: bool) -> None:
    if path.exists() and not path.is_dir():
        raise ValueError(f'{path} is not a folder: give another name.')
    files = [file.name for file in path.iterdir()] if path.exists() else []
    if files and not force:
        raise ValueError(f'{path} is not an empty folder: give another name, or --force.')
    # a run, or weights that another config.json is of
    for name in ('args.yaml', 'model.onnx', 'model.safetensors', 'pytorch_model.bin'):
        if name in files and name != weights:
            raise ValueError(f'{path} holds {name}, beside which no other model can be written: give another name.')


def _write_model(model: nn.Module, path: Path) -> None:
    with _written(path, path) as folder:
        save_for_hf(model, str(folder), safe_serialization=True)


def positive(text: str) -> int:
    """A whole number from 1 on."""
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text!r} is not a number from 1 on')
    return int(text)


def create_parser() -> argparse.ArgumentParser:
    """The parser of `timm-dresnet`."""
    parser = argparse.ArgumentParser(
        prog='timm-dresnet', description='Residual networks with learned skip connections, for timm.',
        epilog='MODEL is the folder of a model, a checkpoint of a run, hf-hub:owner/name, or a model of timm, with a '
               'tag or without. timm-dresnet COMMAND --help has examples.')
    parser.add_argument('--version', action='version', version=timm_dresnet.__version__)
    commands = parser.add_subparsers(title='commands', metavar='COMMAND', required=True)

    def add(name: str, function: Any, help: str, *examples: str, writes: bool = False) -> argparse.ArgumentParser:
        command = commands.add_parser(
            name, help=help, description=help[0].upper() + help[1:] + '.',
            epilog='\n'.join(['examples:', *(f'  timm-dresnet {name} {example}' for example in examples)]),
            formatter_class=argparse.RawDescriptionHelpFormatter)
        command.set_defaults(function=function, command=name)
        if writes:
            command.add_argument('model', metavar='MODEL', help='model to start from')
            command.add_argument('folder', type=Path, metavar='FOLDER', help='folder to write')
            command.add_argument('--force', action='store_true', help='write into a folder that is not empty')
        else:
            command.add_argument('--json', action='store_true', help='print JSON')
        return command

    def add_images(command: argparse.ArgumentParser, help: str) -> None:
        command.add_argument(
            '--images', nargs='+', metavar='PATH',
            help=f'{help}: files or folders; {_MAX_MEASURED} of them, evenly spread')

    command = add('list', list_command, 'list the models of this package and their weights',
                  '', "'dresnet18*'", '--json')
    command.add_argument('filter', nargs='?', default='*', help='names to list, with * and ?')

    command = add('classify', classify_command, 'say what images show, a line for each',
                  'cat.jpg --model resnet18', 'photos/ --model output/flowers --json')
    command.add_argument('images', nargs='+', metavar='IMAGE', help='files or folders')
    command.add_argument('--model', default='dresnet18', metavar='MODEL', help='what classifies (%(default)s)')
    command.add_argument('--top', type=positive, default=5, metavar='N', help='classes to name (%(default)s)')

    command = add('connections', connections_command, 'show the learned connections of a model',
                  'test_dresnet', 'output/digits --out map.png --arcs arcs.png --images photos/')
    command.add_argument('model', metavar='MODEL', help='a DResNet or AdaResNet')
    command.add_argument('--out', type=Path, metavar='FILE', help='draw them as a map of targets and sources')
    command.add_argument('--arcs', type=Path, metavar='FILE', help='draw them as arcs over the blocks')
    add_images(command, 'measure what comes through each on images')

    command = add('signal', signal_command, 'show how activations and gradients get through networks',
                  '--untrained plainnet56_cifar resnet56_cifar dresnet56_cifar --out signal.png',
                  'output/digits --images photos/')
    command.add_argument('models', nargs='+', metavar='MODEL', help='networks to compare')
    command.add_argument('--untrained', action='store_true', help='as they are before training, from a seed of 0')
    command.add_argument('--out', type=Path, metavar='FILE', help='draw it, side by side')
    add_images(command, 'measure on images instead of noise')

    add('fuse', fuse_command, 'fold norms, gates and the skip weights of projections into plain convolutions',
        'output/digits output/fused', writes=True)

    command = add('grow', grow_command, 'let a ResNet grow connections, which compute nothing until they are trained',
                  'resnet50d.ra4_e3600_r224_in1k output/grown', 'output/resnet output/grown --kind adaresnet',
                  writes=True)
    command.add_argument('--kind', default='dresnet', choices=('dresnet', 'adaresnet'), help='(%(default)s)')

    command = add('prune', prune_command, 'remove learned connections that do little',
                  'test_dresnet output/pruned --keep 0.5',
                  'test_dresnet output/pruned --min-effect 0.1 --images photos/', writes=True)
    group = command.add_mutually_exclusive_group(required=True)
    group.add_argument('--min-gate', type=float, metavar='X', help='remove those whose gate is smaller')
    group.add_argument('--min-effect', type=float, metavar='X', help='remove those whose effect on --images is smaller')
    group.add_argument('--keep', type=float, metavar='X', help='keep this share of them')
    add_images(command, 'measure effects on images')

    command = add('export', export_command, 'write a model as safetensors, or fused as ONNX',
                  'test_dresnet output/test_dresnet', 'output/digits output/onnx --format onnx',
                  'output/digits output/int8 --format onnx --int8 --images photos/', writes=True)
    command.add_argument('--format', default='safetensors', choices=('safetensors', 'onnx'), help='(%(default)s)')
    command.add_argument('--int8', action='store_true', help='quantize the ONNX file')
    add_images(command, 'measure the ranges of activations on images')
    return parser


def main(argv: Optional[List[str]] = None) -> int:
    """Run one command.

    Returns:
        Exit status: 0, 1 if something could not be done, 2 if the command line is wrong.
    """
    args = create_parser().parse_args(argv)
    try:
        if isinstance(sys.stdout, TextIOWrapper):
            sys.stdout.reconfigure(errors='backslashreplace')  # names of files may not be UTF-8
        if hasattr(args, 'folder'):
            onnx = getattr(args, 'format', None) == 'onnx'
            _check_folder(args.folder, 'model.onnx' if onnx else 'model.safetensors', args.force)
        status = args.function(args) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as e:
        print(f'timm-dresnet {args.command}: error: {" ".join(str(e).split())}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130

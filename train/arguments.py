"""The arguments of a run: those of timm's train.py, by the same names, from a YAML recipe and the command line."""
import argparse
import difflib
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any, List, Optional

import yaml
from PIL import Image
from timm.utils import ParseKwargs

from timm_dresnet.cli import positive

_CPUS = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
_INTERPOLATIONS = ('', 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos')


# `--amp`, off unless set, and `--no-amp`, over a recipe that sets it
_Switch = partial(argparse.BooleanOptionalAction, default=False)


class KeyValues(ParseKwargs):
    """`--model-kwargs gate=gauss skip_init=1.`"""

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        try:
            super().__call__(*args, **kwargs)
        except ValueError:
            raise argparse.ArgumentError(self, 'must be KEY=VALUE pairs, such as gate=gauss') from None


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """What `python -m train` and `python -m train.validate` both ask, about images and the device."""
    group = parser.add_argument_group('data')
    group.add_argument('--data-dir', metavar='DIR', help='folder of the data set')
    group.add_argument('--dataset', default='', metavar='NAME',
                       help="as in timm ('' for ImageFolder, torch/cifar10, ...), or digits: scikit-learn's 1,797 "
                            "handwritten digits, which need no download")
    group.add_argument('--dataset-download', action=_Switch, help='let timm download the data set')
    group.add_argument('--val-split', default='validation', metavar='NAME', help='split to measure on')
    group.add_argument('--val-num-samples', type=int, metavar='N', help='its number of images, if a stream')
    group.add_argument('-j', '--workers', type=int, default=min(4, _CPUS), metavar='N',
                       help='processes that load images')
    group.add_argument('--worker-timeout', type=int, default=600, metavar='N',
                       help='seconds to wait for a batch from them before the run ends, 0 for ever')
    group.add_argument('--pin-mem', action=_Switch, default=None,
                       help='pin memory, so that copies to a GPU go on beside its work (on a GPU, if not set)')
    group.add_argument('--class-map', default='', metavar='FILE', help='file that maps classes to indices')
    group.add_argument('--input-img-mode', choices=Image.MODES, metavar='MODE',
                       help='mode of images in PIL (L for one channel, else RGB)')
    group.add_argument('--input-key', metavar='KEY', help='where a sample of hfds/, hfids/ or wds/ has its image')
    group.add_argument('--target-key', metavar='KEY', help='and where its class')
    group.add_argument('--in-memory', action=_Switch, help='decode all images once and keep them in memory')
    group.add_argument('--bad-images', default='stop', choices=('stop', 'skip'),
                       help='what to do when an image cannot be read; skipped ones are counted')

    group = parser.add_argument_group('device')
    group.add_argument('--device', metavar='NAME', help='device to run on (a GPU if there is one, if not set)')
    group.add_argument('--channels-last', action=_Switch, help='channels-last memory layout')
    group.add_argument('--amp', action=_Switch, help='automatic mixed precision')
    group.add_argument('--amp-dtype', default='float16', choices=('float16', 'bfloat16'), help='its lower precision')


def create_parser() -> argparse.ArgumentParser:
    """The parser of `python -m train`."""
    parser = argparse.ArgumentParser(
        prog='python -m train',
        usage='python -m train [--config FILE] [options]',
        description="Train an image classifier with timm's recipe.",
        epilog='example: python -m train --config train/recipes/digits.yaml --epochs 5',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('-c', '--config', metavar='FILE', help='YAML recipe; the command line overrides it')

    add_common_arguments(parser)

    group = parser.add_argument_group('training data')
    group.add_argument('--train-split', default='train', metavar='NAME', help='split to train on')
    group.add_argument('--train-num-samples', type=int, metavar='N', help='its number of images, if a stream')

    group = parser.add_argument_group('model')
    group.add_argument('--model', default='dresnet18', metavar='NAME', help='architecture, any of timm.list_models()')
    group.add_argument('--pretrained', action=_Switch, help='start from the pretrained weights of the model')
    group.add_argument('--pretrained-path', metavar='FILE',
                       help='load these weights as the pretrained ones, with a classifier for --num-classes')
    group.add_argument('--initial-checkpoint', default='', metavar='FILE', help='start from exactly these weights')
    group.add_argument('--linear-probe', action=_Switch, help='freeze all but the classifier')
    group.add_argument('--num-classes', type=int, metavar='N', help='number of classes (the model default if not set)')
    group.add_argument('--in-chans', type=int, metavar='N', help='number of image channels (3 if not set)')
    group.add_argument('--img-size', type=positive, metavar='N', help='image size (the model default if not set)')
    group.add_argument('--input-size', type=int, nargs=3, metavar='N', help='channels, height and width of images')
    group.add_argument('--gp', metavar='NAME', help='global pooling: avg, max, avgmax or catavgmax')
    group.add_argument('--mean', type=float, nargs='+', metavar='X', help='mean pixel value (model default if not set)')
    group.add_argument('--std', type=float, nargs='+', metavar='X', help='its standard deviation')
    group.add_argument('--crop-pct', type=float, metavar='X', help='center crop, for validation only')
    group.add_argument('--interpolation', default='', choices=_INTERPOLATIONS, metavar='NAME',
                       help='resize interpolation for validation (model default if not set)')
    group.add_argument('--drop', type=float, default=0., metavar='X', help='dropout before the classifier')
    group.add_argument('--drop-path', type=float, metavar='X', help='stochastic depth')
    group.add_argument('--bn-momentum', type=float, metavar='X', help='momentum of batch norm')
    group.add_argument('--prune-connections', type=float, nargs=2, metavar=('KEEP', 'AT'),
                       help='share of the connections to keep, those with the largest effect on a batch, after this '
                            'share of the epochs: 0.5 0.6')
    group.add_argument('--model-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
                       help='other arguments of the model, such as gate=gauss')

    group = parser.add_argument_group('optimizer')
    group.add_argument('-b', '--batch-size', type=positive, default=128, metavar='N',
                       help='images in a batch of one process')
    group.add_argument('-vb', '--validation-batch-size', type=positive, metavar='N', help='the same for validation')
    group.add_argument('--grad-accum-steps', type=positive, default=1, metavar='N', help='batches in an update')
    group.add_argument('--opt', default='sgd', metavar='NAME', help='optimizer, any of timm.optim.list_optimizers()')
    group.add_argument('--opt-eps', type=float, metavar='X', help='epsilon (optimizer default if not set)')
    group.add_argument('--opt-betas', type=float, nargs='+', metavar='X', help='betas (optimizer default if not set)')
    group.add_argument('--momentum', type=float, default=0.9, metavar='X', help='momentum')
    group.add_argument('--weight-decay', type=float, default=2e-5, metavar='X', help='weight decay')
    group.add_argument('--layer-decay', type=float, metavar='X', help='decay of the learning rate from block to block')
    group.add_argument('--clip-grad', type=float, metavar='X', help='clip gradients at this value')
    group.add_argument('--clip-mode', default='norm', choices=('norm', 'value', 'agc'), help='how to clip')
    group.add_argument('--opt-kwargs', nargs='*', default={}, action=KeyValues, metavar='KEY=VALUE',
                       help='other arguments of the optimizer')

    group = parser.add_argument_group('learning rate')
    group.add_argument('--lr', type=float, metavar='X', help='learning rate (from --lr-base if not set)')
    group.add_argument('--lr-base', type=float, default=0.1, metavar='X', help='rate for --lr-base-size images')
    group.add_argument('--lr-base-size', type=int, default=256, metavar='N', help='batch size that --lr-base is for')
    group.add_argument('--lr-base-scale', default='', choices=('', 'linear', 'sqrt'),
                       help="how lr follows the batch size; '': sqrt for Ada* and LAMB, else linear")
    group.add_argument('--sched', default='cosine', choices=('cosine', 'tanh', 'step', 'multistep', 'poly', 'wsd',
                       'rsqrt', 'constant'), help='schedule of the learning rate')
    group.add_argument('--sched-on-updates', action=_Switch, help='step the schedule every update')
    group.add_argument('--epochs', type=positive, default=300, metavar='N', help='number of epochs')
    group.add_argument('--warmup-epochs', type=int, default=5, metavar='N', help='epochs of warm-up')
    group.add_argument('--warmup-lr', type=float, default=1e-5, metavar='X', help='learning rate to warm up from')
    group.add_argument('--warmup-prefix', action=_Switch, help='warm-up comes on top of --epochs')
    group.add_argument('--cooldown-epochs', type=int, default=0, metavar='N', help='epochs at --min-lr at the end')
    group.add_argument('--min-lr', type=float, default=0., metavar='X', help='lowest learning rate')
    group.add_argument('--decay-milestones', type=int, nargs='+', default=[90, 180, 270], metavar='N',
                       help='epochs at which a multistep schedule decays')
    group.add_argument('--decay-epochs', type=float, metavar='N',
                       help='interval of a step schedule (90 if not set), or epochs in which wsd and rsqrt decay at '
                            'the end (a fifth if not set)')
    group.add_argument('--decay-rate', type=float, default=0.1, metavar='X', help='factor of step and multistep')

    group = parser.add_argument_group('augmentation and regularization')
    group.add_argument('--no-aug', action='store_true', help='no augmentation at all')
    group.add_argument('--train-crop-mode', choices=('rrc', 'rkrc', 'rkrr'), help='how to crop (rrc if not set)')
    group.add_argument('--scale', type=float, nargs=2, default=[0.08, 1.0], metavar='X', help='area of random crops')
    group.add_argument('--ratio', type=float, nargs=2, default=[3. / 4., 4. / 3.], metavar='X', help='and their aspect')
    group.add_argument('--hflip', type=float, default=0.5, metavar='X', help='chance of a horizontal flip')
    group.add_argument('--vflip', type=float, default=0., metavar='X', help='chance of a vertical flip')
    group.add_argument('--color-jitter', type=float, default=0.4, metavar='X', help='color jitter')
    group.add_argument('--aa', metavar='NAME',
                       help='policy: rand-m7-mstd0.5 (RandAugment), original or v0 (AutoAugment), 3a (3-Augment), ...')
    group.add_argument('--aug-repeats', type=float, default=0., metavar='N', help='repeated augmentation of an image')
    group.add_argument('--reprob', type=float, default=0., metavar='X', help='chance of random erasing')
    group.add_argument('--remode', default='pixel', choices=('const', 'rand', 'pixel'), help='mode of random erasing')
    group.add_argument('--recount', type=int, default=1, metavar='N', help='number of erased regions')
    group.add_argument('--train-interpolation', default='random', choices=(*_INTERPOLATIONS, 'random'), metavar='NAME',
                       help='resize interpolation')
    group.add_argument('--mixup', type=float, default=0., metavar='X', help='Mixup alpha, off at 0')
    group.add_argument('--cutmix', type=float, default=0., metavar='X', help='CutMix alpha, off at 0')
    group.add_argument('--mixup-off-epoch', type=int, default=0, metavar='N', help='epoch from which both are off')
    group.add_argument('--mixup-prob', type=float, default=1., metavar='X', help='chance of either')
    group.add_argument('--mixup-switch-prob', type=float, default=0.5, metavar='X', help='chance of CutMix if both')
    group.add_argument('--smoothing', type=float, default=0.1, metavar='X', help='label smoothing')
    group.add_argument('--bce-loss', action=_Switch, help='binary cross-entropy instead of softmax')
    group.add_argument('--bce-target-thresh', type=float, metavar='X', help='threshold that makes its targets binary')

    group = parser.add_argument_group('resolution schedule')
    group.add_argument('--train-img-sizes', type=int, nargs='+', metavar='N', help='image sizes of training batches')
    group.add_argument('--train-size-schedule', default='constant', choices=('constant', 'progressive'),
                       help='draw them evenly, or move from the first to the last over the epochs')
    group.add_argument('--train-size-schedule-spread', type=float, default=0.65, metavar='X',
                       help='standard deviation of what a progressive schedule draws, in places of the list; '
                            'at 0 an epoch has one size')
    group.add_argument('--train-size-random-mix', type=float, default=0.1, metavar='X',
                       help='fraction of batches for which it draws evenly')

    group = parser.add_argument_group('speed')
    group.add_argument('--torchcompile', nargs='?', const='inductor', metavar='BACKEND', help='torch.compile the model')
    group.add_argument('--torchcompile-mode', metavar='MODE', help='mode of torch.compile')
    group.add_argument('--grad-checkpointing', action=_Switch, help='trade time for memory')
    group.add_argument('--deterministic', action=_Switch, help='deterministic algorithms only')

    group = parser.add_argument_group('several processes (torchrun)')
    group.add_argument('--sync-bn', action=_Switch, help='batch norm over the batches of all processes')
    group.add_argument('--dist-bn', default='reduce', choices=('reduce', 'broadcast', ''),
                       help='statistics of batch norm at the end of an epoch: mean, first process, or as they are')

    group = parser.add_argument_group('exponential moving average')
    group.add_argument('--model-ema', action=_Switch, help='keep a moving average of the weights, and publish it')
    group.add_argument('--model-ema-decay', type=float, default=0.9998, metavar='X', help='its decay')
    group.add_argument('--model-ema-warmup', action=_Switch, help='let the decay warm up')

    group = parser.add_argument_group('run')
    group.add_argument('--seed', type=int, default=42, metavar='N', help='random seed')
    group.add_argument('--output', default='output', metavar='DIR', help='folder for the folders of runs')
    group.add_argument('--experiment', default='', metavar='NAME',
                       help='name of the folder of this run (made from model and image size if empty)')
    group.add_argument('--eval-metric', default='top1', choices=('top1', 'top5', 'loss'),
                       help='what the best checkpoints are chosen by')
    group.add_argument('--checkpoint-hist', type=positive, default=10, metavar='N', help='checkpoints to keep')
    group.add_argument('--recovery-interval', type=int, default=0, metavar='N',
                       help='updates between checkpoints inside an epoch, none at 0')
    group.add_argument('--log-interval', type=positive, default=50, metavar='N',
                       help='updates between lines where there is no terminal')
    group.add_argument('--val-interval', type=positive, default=1, metavar='N', help='epochs between validations')
    group.add_argument('--log-tensorboard', action=_Switch, help='log to TensorBoard, into the folder of the run')
    group.add_argument('--log-wandb', action=_Switch, help='log to Weights & Biases')
    group.add_argument('--wandb-project', metavar='NAME', help='its project')
    return parser


def _read_recipe(path: Path, parser: argparse.ArgumentParser) -> List[str]:
    """The command line that a YAML recipe stands for. A null or false leaves an argument off, as it is by default."""
    try:
        recipe = yaml.safe_load(path.read_text()) or {}
    except (OSError, ValueError, yaml.YAMLError) as e:
        parser.error(f'{path} is not a YAML recipe: {" ".join(str(e).split())}')
    if not isinstance(recipe, dict):
        parser.error(f'{path} must hold one "key: value" a line, not a {type(recipe).__name__}.')
    actions = {action.dest: action for action in parser._actions if action.dest not in ('help', 'config')}
    argv = []
    for key, value in recipe.items():
        if key not in actions:
            near = difflib.get_close_matches(str(key), actions)
            parser.error(f'{path}: unknown key {key!r}'
                         + (f', did you mean {" or ".join(near)}?' if near else '; see --help for all.'))
        option = f'--{key.replace("_", "-")}'
        if value is None or value is False and actions[key].nargs != 0 and not actions[key].default:
            if key == 'color_jitter':  # which recipes of timm switch off by null
                parser.set_defaults(color_jitter=None)
            elif actions[key].default:
                parser.error(f'{path}: {key} needs a value.')
        elif isinstance(value, bool) and actions[key].nargs == 0:
            off = f'--no-{option[2:]}'
            argv += [option] if value else [off] if off in actions[key].option_strings else []
        elif isinstance(value, dict):
            argv += [option, *(f'{name}={argument!r}' for name, argument in value.items())]
        elif isinstance(value, list):
            argv += [option, *map(str, value)]
        else:
            argv.append(f'{option}={value}')
    return argv


def parse_args(argv: Optional[List[str]] = None) -> argparse.Namespace:
    """Parse the command line over the recipe that it names. What is wrong ends the program with one sentence."""
    argv = sys.argv[1:] if argv is None else argv
    parser = create_parser()
    config = parser.parse_known_args(argv)[0].config
    recipe = []
    if config:
        recipe = _read_recipe(Path(config), parser)
        in_recipe = create_parser()
        in_recipe.error = lambda message: parser.error(f'{config}: {message}')
        in_recipe.parse_args(recipe)
    return parser.parse_args([*recipe, *argv])

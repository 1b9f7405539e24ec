"""`python -m train`: train a model, leave a folder that timm loads, load it back and measure it."""
import logging
import sys
from typing import Any, List, NoReturn, Optional

import torch.distributed as dist
from timm.utils import is_primary, setup_default_logging

from .arguments import parse_args
from .checkpoints import newest
from .data import BadImageError, is_worker_lost
from .engine import Stopped
from .trainer import Trainer

_logger = logging.getLogger('train')


def main(argv: Optional[List[str]] = None) -> None:
    logging.getLogger('timm').setLevel(logging.WARNING)
    args = parse_args(argv)

    def fail(message: Any) -> NoReturn:
        rank = getattr(args, 'rank', 0)
        sys.exit(f'python -m train: error: {f"process {rank}: " if rank else ""}{message}')

    def last_good() -> str:
        path = newest(folder)
        return f'The last good checkpoint is {path}' if path else 'There is no checkpoint yet'

    try:
        trainer = Trainer(args)
    except (OSError, ValueError, BadImageError) as e:
        fail(e)
    folder = trainer.folder
    try:
        if not trainer.finished:
            trainer.train()
        elif is_primary(args):
            _logger.info(f'{folder} holds the results of this command already; --experiment names another folder.')
        metrics = trainer.measure()
    except Stopped as e:
        if is_primary(args):
            _logger.info(f'Stopped. The same command goes on from {newest(folder)}')
        sys.exit(128 + int(str(e)))
    except BadImageError as e:
        # of one raised in another process, PyTorch gives the traceback as text
        reason = str(e).strip().splitlines()[-1].split('BadImageError: ')[-1]
        fail(f'{reason} Mend or remove it, or add --bad-images skip.')
    except FloatingPointError as e:
        fail(f'{e} {last_good()}.')
    except MemoryError:
        fail(f'memory ran out. {last_good()}; the same command goes on, with fewer --workers.')
    except (EOFError, OSError, RuntimeError) as e:
        if is_worker_lost(e):
            reason = str(e).splitlines()[0].rstrip('. ') if isinstance(e, RuntimeError) else 'DataLoader worker was killed'
            fail(f'{reason}. {last_good()}; the same command goes on, with fewer --workers if memory ran out.')
        if not isinstance(e, OSError):
            raise
        reason = f'{e.strerror}: {e.filename}' if e.filename else e.strerror or e
        fail(f'{reason}. {last_good()}; mend this, and the same command goes on.')

    if is_primary(args):
        print(f"timm.create_model('local-dir:{folder}', pretrained=True) has a top-1 accuracy of "
              f"{metrics['top1']:.2f} % on the {len(trainer.eval_loader.dataset):,} images of {args.val_split}. It "
              f"lies in {folder.resolve()}")
    if args.distributed:
        dist.destroy_process_group()


if __name__ == '__main__':
    setup_default_logging()
    main()

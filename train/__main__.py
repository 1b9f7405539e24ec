"""`python -m train`: train a model, leave a folder that timm loads, load it back and measure it."""
import logging
import os
import signal
import sys
from typing import List, Optional

from timm.utils import setup_default_logging

from .arguments import parse_args
from .datasets import BadImageError
from .engine import Stopped
from .run import RunError, run


def main(argv: Optional[List[str]] = None) -> None:
    logging.getLogger('timm').setLevel(logging.WARNING)
    args = parse_args(argv)
    try:
        run(args)
    except Stopped as e:
        sys.exit(128 + e.args[0])
    except KeyboardInterrupt:  # before the first epoch, or after the last
        sys.exit(128 + signal.SIGINT)
    except (OSError, ValueError, BadImageError, RunError) as e:
        rank = int(os.environ.get('RANK', 0))
        sys.exit(f'python -m train: error: {f"process {rank}: " if rank else ""}{e}')


if __name__ == '__main__':
    setup_default_logging()
    main()

"""`python tests/faults.py FAULT MOMENT ARGUMENTS` is `python -m train ARGUMENTS`, in which one thing goes wrong once.

MOMENT is the batch `EPOCH,BATCH` (from 0), or `EPOCH,save` when half of that epoch's checkpoint has been written.
"""
import io
import os
import resource
import signal
import sys
import time
from pathlib import Path

import torch
from timm.utils import setup_default_logging

from train.__main__ import main
from train.arguments import parse_args
from train.loading import SeededImages

fault, moment, *arguments = sys.argv[1:]
moment = tuple(int(part) if part.isdigit() else part for part in moment.split(','))


def load(self, batch):
    if moment == batch[0][2:]:
        if fault == 'vanished file':
            path = sorted(Path(parse_args(arguments).data_dir, 'train').rglob('*.png'))[batch[1][0]]
            path.rename(f'{path}.gone')
        elif fault == 'killed worker':
            os.kill(os.getpid(), signal.SIGKILL)
        else:
            time.sleep(3600)
    return original_load(self, batch)


def save(state, path):
    progress = state['task_state']
    if moment == (progress['epoch'] - 1, 'save') and progress['batch'] == 0:
        buffer = io.BytesIO()
        original_save(state, buffer)
        half = buffer.getvalue()[:buffer.tell() // 2]
        Path(path).write_bytes(half)
        if fault == 'sigkill':
            os.kill(os.getpid(), signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(half), resource.RLIM_INFINITY))  # no file may grow any more
    original_save(state, path)


original_load, SeededImages.__getitems__ = SeededImages.__getitems__, load
original_save, torch.save = torch.save, save

if __name__ == '__main__':
    setup_default_logging()
    main(arguments)

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
from train.build import Task
from train.loading import SeededImages

HERE = {'sigterm', 'sigkill', 'full disk', 'nan'}  # in the main process; the others are in a worker process
fault, moment, *arguments = sys.argv[1:]
moment = tuple(int(part) if part.isdigit() else part for part in moment.split(','))


def vanish(number):
    path = sorted(Path(parse_args(arguments).data_dir, 'train').rglob('*.png'))[number]
    path.rename(f'{path}.gone')


def fail_here(room):
    if fault == 'full disk':  # no file may grow beyond what is left
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    elif fault != 'nan':
        os.kill(os.getpid(), {'sigterm': signal.SIGTERM, 'sigkill': signal.SIGKILL}[fault])


def forward(self, images, targets):
    if fault in HERE and moment == (self.progress['epoch'], self.progress['batch']):
        fail_here(0)
        if fault == 'nan':
            images = images * float('nan')
    return original_forward(self, images, targets)


def load(self, batch):
    if fault not in HERE and moment == batch[0][2:]:
        if fault == 'vanished file':
            vanish(batch[1][0])
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
        fail_here(len(half))
    original_save(state, path)


original_forward, Task.forward = Task.forward, forward
original_load, SeededImages.__getitems__ = SeededImages.__getitems__, load
original_save, torch.save = torch.save, save

if __name__ == '__main__':
    setup_default_logging()
    main(arguments)

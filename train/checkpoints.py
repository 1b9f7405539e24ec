"""The folder of a run: which one it is, and the checkpoints in it, from the newest of which a run resumes."""
import errno
import itertools
import logging
import os
import re
import shutil
import tempfile
import textwrap
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Optional, Tuple

import torch
import yaml
from filelock import FileLock, Timeout
from timm.task import TrainingTask, load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, NativeScaler
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from timm_dresnet.folders import replace

from .loading import is_worker_lost

_logger = logging.getLogger('train')

# arguments that may differ when a run resumes, since they do not change its results
_FREE = {
    'bad_images', 'checkpoint_hist', 'dataset_download', 'device', 'experiment', 'in_memory', 'log_interval',
    'log_tensorboard', 'log_wandb', 'output', 'pin_mem', 'recovery_interval', 'validation_batch_size', 'wandb_project',
    'worker_timeout', 'workers',
}


def is_finished(folder: Path) -> bool:
    """Whether the run that wrote the folder came to its end."""
    return (folder / 'model.safetensors').exists()


def _binding(recipe: Dict[str, Any]) -> Dict[str, Any]:
    bound = {key: value for key, value in recipe.items() if key not in _FREE}
    if bound.get('data_dir'):  # which may have another path on another machine, or in another job
        bound['data_dir'] = Path(str(bound['data_dir'])).name
    return bound


def find_folder(output: Path, name: str, recipe: Dict[str, Any]) -> Path:
    """Find the run of this name with the same arguments, finished or not, or the first folder that is free for it.

    Args:
        output: Folder of the folders of runs.
        name: Name of the run; where it is taken by another run, `-1`, `-2`, ... is added.
        recipe: All arguments of the run.
    """
    wanted = _binding(yaml.safe_load(yaml.safe_dump(recipe)))
    for number in itertools.count():
        folder = output / (f'{name}-{number}' if number else name)
        if not folder.exists():
            return folder
        try:
            found = yaml.safe_load((folder / 'args.yaml').read_text())
        except (OSError, ValueError, yaml.YAMLError):
            continue  # not of a run
        if isinstance(found, dict) and _binding(found) == wanted:
            return folder


def open_folder(output: Path, name: str, recipe: Dict[str, Any]) -> Path:
    """The folder that `find_folder` finds, made if it is free."""
    folder = find_folder(output, name, recipe)
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder.parent, prefix='.run-'))
    new.chmod(0o755)
    (new / 'args.yaml').write_text(yaml.safe_dump(recipe))
    try:
        replace(new, folder)
    except OSError as e:
        if e.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        shutil.rmtree(new)  # another run of this name has begun at the same moment
        return open_folder(output, name, recipe)
    return folder


def lock_folder(folder: Path) -> FileLock:
    """Take the folder of a run for this process, until the lock is released or the process ends.

    Raises:
        ValueError: If another process holds it.
    """
    # worker processes outlive one that was killed by some seconds; a run that has failed in this process is no other
    lock = FileLock(folder / '.lock', timeout=10, is_singleton=True)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f'Another process trains into {folder}: wait for its end, or use another --experiment. If there is none, '
            f'as may be on a network disk, remove {lock.lock_file}.') from None
    return lock


def _unfinished(folder: Path) -> Iterator[Path]:
    return folder.glob('*tmp.pth.tar')


def _progress(path: Path) -> Tuple[int, int]:
    progress = load_checkpoint_metadata(path)['task_state']
    return int(progress['epoch']), int(progress['batch'])


def newest(folder: Path) -> Optional[Path]:
    """The checkpoint of a folder that is furthest in training, among those that are whole."""
    found = {}
    for path in sorted({*folder.glob('*.pth.tar')} - {*_unfinished(folder)}, reverse=True):
        try:
            found[_progress(path)] = path
        except (OSError, RuntimeError, KeyError, EOFError, TypeError, ValueError) as e:
            _logger.warning(f'{path} is not a whole checkpoint and is skipped ({type(e).__name__}).')
    return found[max(found)] if found else None


class Checkpoints(CheckpointSaver):
    """timm's checkpoints, of which a kill or a loss of power leaves the old ones or the new ones, whole."""

    def _save(self, save_path: str, epoch: int, metric: Optional[float] = None) -> None:
        for name, parameter in self.task.get_trainable_module().named_parameters():
            if not parameter.isfinite().all():
                raise FloatingPointError(f'{name} is no longer finite after epoch {epoch}.')
        try:
            super()._save(save_path, epoch, metric)
        except (OSError, RuntimeError) as e:  # torch's own writer raises a RuntimeError when a disk is full
            Path(save_path).unlink(missing_ok=True)
            if is_worker_lost(e):
                raise
            free = shutil.disk_usage(Path(save_path).parent).free
            raise OSError(
                f'the checkpoint of epoch {epoch} could not be written, there are {free / 2 ** 20:.0f} MiB free on its '
                f'disk ({str(e).splitlines()[0]})') from e

    def _replace(self, src: str, dst: str) -> None:
        replace(Path(src), Path(dst))

    def _duplicate(self, src: str, dst: str) -> None:
        with tempfile.TemporaryDirectory(dir=self.checkpoint_dir, prefix='.link-') as folder:
            new = os.path.join(folder, 'new')
            super()._duplicate(src, new)
            self._replace(new, dst)

    def save_checkpoint(self, epoch: int, metric: Optional[float] = None):
        """Save the end of an epoch, which makes the checkpoints from inside it needless."""
        best = super().save_checkpoint(epoch, metric)
        for path in Path(self.recovery_dir).glob(f'{self.recovery_prefix}-*{self.extension}'):
            path.unlink()
        return best

    def load_state_dict(self, state_dict: Dict[str, Any]) -> None:
        """Take over the list of checkpoints, but no other files: those on it are deleted when better ones come."""
        files = [
            (name, metric) for name, metric in state_dict['checkpoint_files']
            if re.fullmatch(rf'{self.save_prefix}-\d+{re.escape(self.extension)}', name)]
        super().load_state_dict({**state_dict, 'checkpoint_files': files})

    def resume(self, path: Path) -> None:
        """Take over the files that were there when a checkpoint was written, and the best of them.

        Raises:
            ValueError: If the checkpoint does not fit.
        """
        for file in _unfinished(path.parent):
            file.unlink()
        with _fitting(path):
            self.load_state_dict_from_checkpoint(str(path))
        progress = self.task.progress
        if progress['batch'] == 0 and self.best_epoch == progress['epoch'] - 1:
            self._duplicate(str(path), os.path.join(self.checkpoint_dir, 'model_best' + self.extension))


@contextmanager
def _fitting(path: Path) -> Iterator[None]:
    try:
        yield
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as e:
        reason = textwrap.shorten(f'{type(e).__name__}: {e}', 300, placeholder=' ...')
        raise ValueError(f'{path} does not fit this run ({reason}), use another --experiment.') from e


def restore(
        path: Path,
        task: TrainingTask,
        optimizer: torch.optim.Optimizer,
        loss_scaler: Optional[NativeScaler] = None,
) -> None:
    """Load model, moving average, optimizer, loss scaler and progress.

    Raises:
        ValueError: If the checkpoint does not fit.
    """
    try:
        with _fitting(path):
            resume_task_checkpoint(task, str(path), optimizer, loss_scaler, log_info=False)
            if task.has_ema():
                load_task_ema_checkpoint(task, str(path))
    except FileNotFoundError:
        raise ValueError(f'{path} is not on this machine: --output must be a folder that all machines share.') from None

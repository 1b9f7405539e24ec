"""The folder of a run: which one it is, and the checkpoints in it, from the newest of which a run resumes."""
import itertools
import logging
import shutil
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, Optional

import yaml
from filelock import FileLock, Timeout
from timm.utils import CheckpointSaver
from timm.utils.checkpoint_saver import load_checkpoint_metadata

from timm_dresnet.folders import atomic_folder, replace

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

    Where the name is taken by a run with other arguments, `-1`, `-2`, ... is added.
    """
    wanted = _binding(yaml.safe_load(yaml.safe_dump(recipe)))
    for number in itertools.count():
        folder = output / (f'{name}-{number}' if number else name)
        if not folder.exists():
            return folder
        args = folder / 'args.yaml'
        try:
            found = yaml.safe_load(args.read_text()) if args.is_file() else None
        except (UnicodeDecodeError, yaml.YAMLError):
            continue
        if isinstance(found, dict) and _binding(found) == wanted:
            return folder


def open_folder(output: Path, name: str, recipe: Dict[str, Any]) -> Path:
    """The folder that `find_folder` finds, made if it is free."""
    while True:
        folder = find_folder(output, name, recipe)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            if folder == find_folder(output, name, recipe):  # else another run has taken it meanwhile
                return folder
        else:
            with atomic_folder(folder) as new:
                (new / 'args.yaml').write_text(yaml.safe_dump(recipe))
            return folder


@contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes from training into the folder of a run, or raise a ValueError if one does."""
    lock = FileLock(folder / '.lock', timeout=10)  # worker processes outlive one that was killed by some seconds
    try:
        acquired = lock.acquire()
    except Timeout:
        raise ValueError(
            f'Another process trains into {folder}: wait for its end, or use another --experiment. If there is none, '
            f'as may be on a network disk, remove {lock.lock_file}.') from None
    with acquired:
        yield
        Path(lock.lock_file).unlink(missing_ok=True)


def newest(folder: Path) -> Optional[Path]:
    """The checkpoint of a folder that is furthest in training, among those that are whole."""
    found = {}
    for path in sorted({*folder.glob('*.pth.tar')} - {*folder.glob('*tmp.pth.tar')}, reverse=True):
        try:
            progress = load_checkpoint_metadata(path)['task_state']
            found[progress['epoch'], progress['batch']] = path
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
            free = shutil.disk_usage(Path(save_path).parent).free
            raise OSError(
                f'the checkpoint of epoch {epoch} could not be written, there are {free / 2 ** 20:.0f} MiB free on its '
                f'disk ({str(e).splitlines()[0]})') from e

    def _replace(self, src: str, dst: str) -> None:
        replace(Path(src), Path(dst))

    def save_checkpoint(self, epoch: int, metric: Optional[float] = None):
        """Save the end of an epoch, which makes the checkpoints from inside it needless."""
        best = super().save_checkpoint(epoch, metric)
        for path in Path(self.recovery_dir).glob(f'{self.recovery_prefix}-*{self.extension}'):
            path.unlink()
        return best

    def resume(self, path: Path) -> None:
        """Take over the files that were there when a checkpoint was written, and the best of them."""
        for file in path.parent.glob('*tmp.pth.tar'):
            file.unlink()
        self.load_state_dict_from_checkpoint(str(path))
        progress = self.task.progress
        best = path.with_name('model_best' + self.extension)  # of an earlier epoch, if the run ended at this moment
        if progress['batch'] == 0 and self.best_epoch == progress['epoch'] - 1:
            if not (best.exists() and best.samefile(path)):
                self._duplicate(str(path), str(best))

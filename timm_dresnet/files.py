"""Files that are whole or not there: written beside their places, flushed to the disk, then renamed."""
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator


def replace(new: Path, path: Path) -> None:
    """Move a finished file, or a folder, to its place, so that a loss of power leaves the new one or the old one."""
    if new.is_file():
        with new.open('rb') as f:
            os.fsync(f.fileno())
    os.replace(new, path)
    if os.name == 'posix':
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A folder to write files into, which are moved to `folder` when all are whole, weights last."""
    with tempfile.TemporaryDirectory(dir=folder, prefix='.new-') as name:
        new = Path(name)
        yield new
        for file in sorted(new.iterdir(), key=lambda file: file.suffix == '.safetensors'):
            replace(file, folder / file.name)

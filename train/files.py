"""Files that are whole or not there: written beside their places, flushed to the disk, then renamed."""
import csv
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Dict, Iterator, List


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


def write_epoch(path: Path, epoch: int, rows: List[Dict[str, Any]]) -> None:
    """Put an epoch's rows at the end of a CSV table, in place of those that it holds of this epoch and later ones."""
    kept = [row for row in read_csv(path) if int(row['epoch']) < epoch] if path.exists() else []
    rows = [*kept, *(dict(epoch=epoch, **row) for row in rows)]
    write_csv(path, rows)


def read_csv(path: Path) -> List[Dict[str, str]]:
    """Rows of a CSV table with a header."""
    with path.open(newline='') as f:
        return list(csv.DictReader(f))


def write_csv(path: Path, rows: List[Dict[str, Any]]) -> None:
    """Write a CSV table whose columns are those of all its rows."""
    columns = dict.fromkeys(column for row in rows for column in row)
    with beside(path.parent) as new, (new / path.name).open('w', newline='') as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows)

"""CSV tables."""
import csv
from pathlib import Path
from typing import Any, Dict, List

from timm_dresnet.folders import atomic_folder


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
    with atomic_folder(path.parent) as new, (new / path.name).open('w', newline='') as f:
        writer = csv.DictWriter(f, columns)
        writer.writeheader()
        writer.writerows(rows)

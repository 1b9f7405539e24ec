"""Taking out learned connections that do little, with their parameters and all that they compute."""
from typing import Any, Dict, List, Optional

import torch
import torch.nn as nn

from .dresnet import DResNet
from .inspection import connections

__all__ = ['prune_connections']


def prune_connections(
        model: nn.Module,
        min_gate: Optional[float] = None,
        min_effect: Optional[float] = None,
        keep: Optional[float] = None,
        images: Optional[torch.Tensor] = None,
) -> List[Dict[str, Any]]:
    """Remove connections from a network, in place.

    Which ones is said by one of ``min_gate``, ``min_effect`` and ``keep``. The network trains, saves, loads and fuses
    as before; an optimizer made for it must be made again.

    Args:
        model: A DResNet.
        min_gate: Remove connections whose gate value is smaller than this, sign aside.
        min_effect: Remove connections whose effect is smaller than this: the norm of what they add to the input of
            their target over the norm of that input, on ``images``.
        keep: The share of the connections to keep, from 0 to 1: those with the largest effect where
            ``images`` are given, else those with the largest gate values, sign aside.
        images: Images to measure effects on, preprocessed, `[B, C, H, W]`, for ``min_effect`` and ``keep``.

    Returns:
        Records of what was removed, as `connections` lists them.

    Raises:
        ValueError: If the model is no DResNet with gates, or it is not clear what to remove.
    """
    if not isinstance(model, DResNet):
        raise ValueError(
            f'connections are pruned in a DResNet, got a {type(model).__name__}: give the network itself, not one that '
            'is compiled or wrapped.')
    if sum(limit is not None for limit in (min_gate, min_effect, keep)) != 1:
        raise ValueError('say what to remove by one of min_gate, min_effect and keep.')
    for name, limit in (('min_gate', min_gate), ('min_effect', min_effect)):
        if limit is not None and not limit >= 0:
            raise ValueError(f'{name} must be a number from 0 on, got {limit}.')
    if min_effect is not None and images is None:
        raise ValueError('min_effect needs images to measure effects on.')
    if min_gate is not None and images is not None:
        raise ValueError('min_gate looks at gates alone: leave images out, or say what to remove by min_effect.')
    if keep is not None and not 0 <= keep <= 1:
        raise ValueError(f'keep must lie between 0 and 1, got {keep}.')

    records = connections(model, images)
    strength = [abs(record['gate']) if images is None else record['effect'] for record in records]
    if keep is None:
        limit = min_gate if min_effect is None else min_effect
        removed = [record for record, value in zip(records, strength) if value < limit]
    else:
        weakest = sorted(range(len(records)), key=strength.__getitem__)[:len(records) - round(keep * len(records))]
        removed = [records[j] for j in sorted(weakest)]
    model.prune_connections([(record['target'], record['source']) for record in removed])
    return removed

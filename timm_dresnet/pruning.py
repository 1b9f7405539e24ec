"""Taking out learned connections that do little, with their parameters and all that they compute."""
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import torch
import torch.nn as nn

from .connections import Connections, SplitNorm

__all__ = ['prune_connections']


def _keep_rows(module: nn.Module, kept: Sequence[int], size: int) -> None:
    """Keep some of the parts of `size` entries that parameters and statistics of a module have side by side."""
    for part in module.modules():
        for name, tensor in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
            if tensor.numel() > 1:  # neither a count of batches nor what all parts share
                rows = tensor.detach().unflatten(0, (-1, size))[kept].flatten(0, 1)
                is_parameter = isinstance(tensor, nn.Parameter)
                setattr(part, name, nn.Parameter(rows, tensor.requires_grad) if is_parameter else rows)


@torch.inference_mode(False)  # or what is left could not be trained
def remove_connections(connections: Connections, pairs: Iterable[Tuple[int, int]]) -> None:
    """Remove connections, given as (target, source) block numbers, with all that only they use."""
    before, removed = connections.sources, set(pairs)
    connections.connect({i: [k for k in numbers if (i, k) not in removed] for i, numbers in before.items()})
    for modules in (connections.gates, connections.expansions):
        for i in [i for i in modules if int(i) not in connections.sources]:
            del modules[i]
    for i, gate in connections.gates.items():
        _keep_rows(gate, [before[int(i)].index(k) for k in connections.sources[int(i)]], 1)
    for k, projection in list(connections.projections.items()):
        targets = connections.targets.get(int(k), ())
        if not targets:
            del connections.projections[k]
        elif targets != projection.targets:
            kept, projection.targets = [projection.targets.index(i) for i in targets], targets
            _keep_rows(projection.conv, kept, projection.out_chs)
            if isinstance(projection.norm, SplitNorm):
                projection.norm = SplitNorm(projection.norm[j] for j in kept)
            else:
                _keep_rows(projection.norm, kept, projection.out_chs)
                projection.norm.num_features = len(targets) * projection.out_chs
            projection.conv.out_channels = len(targets) * projection.out_chs


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
    from .dresnet import DResNet  # these two import this module
    from .inspection import connections

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

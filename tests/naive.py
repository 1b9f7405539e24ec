"""DResNet and AdaResNet as their equations read, one connection at a time: the reference the package is tested with.

These run on the parameters of the package's models, but share no code with it: every pair of blocks has its own
convolution, pooling comes last, batch norm is written out, and the gate multiplies what the norm puts out.
"""
import torch
import torch.nn.functional as F


def gate_value(kind, gate, k):
    """F(w_k) of one weight array."""
    w = gate.weight[k]
    if kind == 'sigmoid':
        return 1 / (1 + torch.exp(-w))
    if kind == 'gauss':
        return torch.exp(-torch.exp(gate.log_sharpness) * w ** 2)
    return w


def batch_norm(x, norm, channels, training, stats):
    """Batch norm over the given channels of `norm`. In training, the new running statistics are noted in `stats`."""
    weight, bias = norm.weight[channels], norm.bias[channels]
    mean, var = norm.running_mean[channels], norm.running_var[channels]
    if training:
        count = x.shape[0] * x.shape[2] * x.shape[3]
        batch_mean = x.mean((0, 2, 3))
        batch_var = ((x - batch_mean[:, None, None]) ** 2).mean((0, 2, 3))
        stats.append((norm, channels, 0.9 * mean + 0.1 * batch_mean.detach(),
                      0.9 * var + 0.1 * batch_var.detach() * count / (count - 1)))
        mean, var = batch_mean, batch_var
    x = (x - mean[:, None, None]) / torch.sqrt(var[:, None, None] + norm.eps)
    return x * weight[:, None, None] + bias[:, None, None]


def connection(model, kind, names, i, k, y, stats):
    """F(w_{i,k}) * C_{i,k}(y_k), at the resolution of block i's input."""
    stages = list(model.stage_names)
    target_stage, source_stage = names[i - 2].split('.')[0], names[k - 1].split('.')[0]
    here = model.connections[target_stage]
    projection = here.projections[str(k)]
    # block i's place among the targets of block k at this resolution
    targets = [t for t in range(3, len(names) + 1) if names[t - 2].startswith(target_stage + '.') and k <= t - 2]
    width = projection.conv.weight.shape[0] // len(targets)
    channels = slice(targets.index(i) * width, (targets.index(i) + 1) * width)

    x = F.conv2d(y, projection.conv.weight[channels])
    for stage in stages[stages.index(source_stage) + 1:stages.index(target_stage) + 1]:
        if getattr(model, stage)[0].stride == 2:
            x = F.avg_pool2d(x, 2, ceil_mode=True, count_include_pad=False)
    x = batch_norm(x, projection.norm, channels, model.training, stats)
    return gate_value(kind, here.gates[str(i)], k - 1) * x


def block_inputs(model, kind, x, stats):
    """The parts of each x_i: y_{i-1}, and what the connection from block k adds, by k. At the end y_n, and no more."""
    names = [f'{stage}.{j}' for stage in model.stage_names for j in range(len(getattr(model, stage)))]
    y = model.maxpool(model.act1(model.bn1(model.conv1(x))))
    outputs = []
    for i, name in enumerate(names, start=1):
        terms = {k: connection(model, kind, names, i, k, outputs[k - 1], stats) for k in range(1, i - 1)}
        expansions = model.connections[names[i - 2].split('.')[0]].expansions if terms else {}
        if len(expansions):
            terms = {k: F.conv2d(term, expansions[str(i)].weight) for k, term in terms.items()}
        yield y, terms
        y = model.get_submodule(name)(y + sum(terms.values()))
        outputs.append(y)
    yield y, {}


def dresnet(model, kind, x):
    """Logits of a DResNet and the running statistics that its connections' norms should have afterwards."""
    stats = []
    *_, (y, _) = block_inputs(model, kind, x, stats)
    return model.fc(y.mean((2, 3))), stats


def adaresnet(model, x):
    """Logits of an AdaResNet of basic or bottleneck blocks."""
    x = model.maxpool(model.act1(model.bn1(model.conv1(x))))
    for stage in model.stage_names:
        for block in getattr(model, stage):
            shortcut = block.downsample(x) if block.downsample is not None else x
            branch = F.relu(block.bn1(block.conv1(x)))
            branch = block.bn2(block.conv2(branch))
            if hasattr(block, 'conv3'):
                branch = block.bn3(block.conv3(F.relu(branch)))
            x = F.relu(branch + block.skip_weight.alpha * shortcut)
    return model.fc(x.mean((2, 3)))

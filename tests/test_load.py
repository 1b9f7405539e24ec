"""Many threads and processes at once, from the first import on; and memory over many rounds."""
import os
import subprocess
import sys

import pytest

FIRST_USE = '''
import sys, threading
THREADS = int(sys.argv[1])
start, outputs, errors = threading.Barrier(THREADS), [], []

def use():
    try:
        start.wait()
        import timm, torch
        x = torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32)
        with torch.no_grad():
            for name in ('test_adaresnet', 'test_dresnet'):
                model = timm.create_model(name, pretrained=True).eval()
                output = model(x)
                assert torch.allclose(timm.utils.reparameterize_model(model)(x), output, atol=1e-4)
        outputs.append(output.tolist())
    except BaseException as e:
        errors.append(repr(e))

threads = [threading.Thread(target=use) for _ in range(THREADS)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not errors, errors
assert len(outputs) == THREADS and all(output == outputs[0] for output in outputs)
print(outputs[0])
'''

ROUNDS = '''
import gc, resource, timm, torch
from pathlib import Path

def resident():
    gc.collect()
    return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize() / 2 ** 20

x = torch.zeros(2, 3, 32, 32)
for number in range(1000):
    model = timm.create_model(('test_dresnet', 'test_adaresnet')[number % 2], pretrained=True)
    model(x).sum().backward()
    timm.utils.reparameterize_model(model.eval())(x)
    del model
    if number == 99:
        first = resident()
assert not [o for o in gc.get_objects() if isinstance(o, timm.models.ResNet)]
print(resident() - first)
'''


def start(code, *args):
    return subprocess.Popen(
        [sys.executable, '-c', code, *map(str, args)], env=os.environ | {'OMP_NUM_THREADS': '1'},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    output, log = process.communicate()
    assert process.returncode == 0, log
    assert 'timm-dresnet' not in log
    return output


@pytest.mark.parametrize('processes,threads', [(1, 64), pytest.param(8, 1, marks=pytest.mark.slow)])
def test_first_use_all_at_once(processes, threads):
    outputs = {finish(process) for process in [start(FIRST_USE, threads) for _ in range(processes)]}
    assert len(outputs) == 1


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists('/proc/self/statm'), reason='resident memory is read as Linux tells it')
def test_memory_is_flat():
    """A thousand models are created, trained for a step, fused and deleted; the last 900 must leave nothing."""
    assert float(finish(start(ROUNDS))) < 16  # MiB; a model and its gradients take one

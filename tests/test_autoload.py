"""Registration in fresh interpreters, against an installed wheel and an editable install."""
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from conftest import ROOT

CREATE = "timm.create_model('test_dresnet', pretrained=True)"
IN_MANY_THREADS = f"""
import concurrent.futures, threading
start = threading.Barrier(32)
def use(i):
    start.wait()
    import timm, torch
    with torch.no_grad():
        return {CREATE}.eval()(torch.ones(1, 3, 32, 32)).argmax().item()
with concurrent.futures.ThreadPoolExecutor(32) as pool:
    outputs = [*pool.map(use, range(32))]
assert len(set(outputs)) == 1, outputs
"""
PIP = [sys.executable, '-m', 'pip', '--disable-pip-version-check']
OPTIONS = ['--quiet', '--no-deps', '--no-build-isolation']


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp('wheel')
    subprocess.run([*PIP, 'wheel', *OPTIONS, '--wheel-dir', folder, ROOT], check=True)
    return next(folder.glob('timm_dresnet-*.whl'))


@pytest.fixture(scope='module', params=['wheel', 'editable'])
def python(request, tmp_path_factory, wheel):
    """An interpreter with this package installed, and all others borrowed from the environment of the tests."""
    folder = tmp_path_factory.mktemp(request.param)
    venv.create(folder / 'env', symlinks=True)
    python = folder / 'env' / 'bin' / 'python'
    site, = folder.glob('env/lib/python*/site-packages')
    (site / 'borrowed.pth').write_text(sysconfig.get_path('purelib'))
    source = [wheel] if request.param == 'wheel' else ['--editable', ROOT]
    subprocess.run([*PIP, '--python', python, 'install', *OPTIONS, *source], check=True)
    return python


def run(python, code, tmp_path, **env):
    env = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | {'OMP_NUM_THREADS': '1'} | env
    done = subprocess.run([python, '-W', 'always', '-c', code], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize('code', [
    f'import timm; {CREATE}',
    f'import torch, sys; assert not {{"timm", "timm_dresnet"}} & set(sys.modules); import timm; {CREATE}',
    f'import timm_dresnet, timm_dresnet, timm; {CREATE}',
    'from timm.models import create_model; create_model("dresnet18", device="meta")',
    f'import sys, torch; sys.meta_path.insert(0, type("Old", (), dict(find_module=print))()); import timm; {CREATE}',
    'import os; os.environ["TIMM_DRESNET_AUTOLOAD"] = "0"; import timm; assert "dresnet18" not in timm.list_models(); '
    'import timm_dresnet; assert "dresnet18" in timm.list_models()',
    IN_MANY_THREADS,
], ids=['timm', 'torch first', 'timm_dresnet first', 'timm.models', 'old finder', 'switched off', 'many threads'])
def test_registered(python, code, tmp_path):
    # the hook leaves the loader as it was
    done = run(python, f'{code}\nimport inspect, timm.models; assert inspect.getsource(timm.models)', tmp_path)
    assert 'timm-dresnet' not in done.stderr


def test_broken_package_breaks_nothing_else(python, tmp_path):
    (tmp_path / 'timm_dresnet').mkdir()
    (tmp_path / 'timm_dresnet' / '__init__.py').write_text('raise OSError("broken on purpose")')
    done = run(python, 'import torch; print(torch.ones(1).item())', tmp_path, PYTHONPATH=str(tmp_path))
    assert (done.stdout, done.stderr) == ('1.0\n', '')
    done = run(python, 'import timm; timm.create_model("resnet18", device="meta")', tmp_path, PYTHONPATH=str(tmp_path))
    assert done.stderr.count('timm-dresnet could not register') == 1 and 'broken on purpose' in done.stderr


def test_wheel_holds_the_package_and_nothing_else(wheel):
    assert wheel.stat().st_size < 95e6  # PyPI takes 100
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if '.dist-info/' not in name}
    package = [path for path in (ROOT / 'timm_dresnet').rglob('*') if path.is_file() and path.suffix != '.pyc']
    assert names == {'timm_dresnet_autoload.py', *(path.relative_to(ROOT).as_posix() for path in package)}
    assert 'timm_dresnet/py.typed' in names

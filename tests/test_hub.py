"""Models pushed to a Hub with huggingface_hub's own client, and what timm loads from there."""
import csv
import hashlib
import json
import os
import re
import resource
import shutil
import subprocess
import sys

import pytest
import timm
import timm_dresnet
import torch
import torch.nn.functional as F
import yaml
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from timm.models import save_for_hf
from timm.utils import reparameterize_model
from timm_dresnet.folders import load_folder

from conftest import ROOT
from hub import cards, package, repository
from hub.push import main
from hub_server import Fault

KINDS = ('dresnet', 'adaresnet', 'pruned', 'fused')


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Folders of models of each kind, and the models."""
    made = {}
    for kind in KINDS:
        torch.manual_seed(0)
        model = timm.create_model('test_adaresnet' if kind == 'adaresnet' else 'test_dresnet', num_classes=7).eval()
        if kind == 'pruned':
            timm_dresnet.prune_connections(model, keep=0.5)
        if kind == 'fused':
            model = reparameterize_model(model)
        folder = tmp_path_factory.mktemp(kind)
        save_for_hf(model, folder, safe_serialization=True)
        made[kind] = folder, model
    return made


@pytest.fixture
def alice(hub, monkeypatch):
    """The Hub, with a user logged in, and no waiting."""
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    return hub


@pytest.fixture
def push(folders, capsys):
    """Push one of the folders to alice/model: returns what is printed, and whether that is an error."""
    def run(*args, kind='dresnet', folder=None, repo_id='alice/model'):
        try:
            main([str(folder or folders[kind][0]), '--repo-id', repo_id, *args])
        except SystemExit as e:
            assert isinstance(e.code, str) and e.code.startswith('python -m hub.push: error: ')
            assert '\n' not in e.code
            printed = capsys.readouterr()
            assert 'hf_' not in printed.out + printed.err + e.code  # a token
            return e.code.removeprefix('python -m hub.push: error: '), True
        printed = capsys.readouterr()
        assert 'hf_' not in printed.out + printed.err
        return printed.out, False
    return run


def snippets(card):
    return re.findall(r'```python\n(.*?)```', card, flags=re.DOTALL)


def run_snippets(card, capsys):
    for snippet in snippets(card):
        exec(compile(snippet, 'snippet of a card', 'exec'), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize('kind', KINDS)
def test_published_is_loadable(alice, push, folders, kind, capsys):
    printed, failed = push(kind=kind)
    assert not failed and 'Loaded back, with equal logits' in printed
    assert len(alice.repos['alice/model'].commits) == 2  # the first comes with the repository
    assert sorted(HfApi().list_repo_files('alice/model')) == [
        '.gitattributes', 'README.md', 'config.json', 'model.safetensors']

    model, loaded = folders[kind][1], timm.create_model('hf-hub:alice/model', pretrained=True).eval()
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images))
    if kind == 'pruned':
        assert loaded.connection_pairs() == model.connection_pairs()
    if kind == 'fused':
        with pytest.raises(RuntimeError, match='fused'):
            loaded.train()
    else:
        tuned = timm.create_model('hf-hub:alice/model', pretrained=True, num_classes=2).train()
        before = tuned.conv1.weight.detach().clone()
        optimizer = torch.optim.SGD(tuned.parameters(), lr=0.1)
        F.cross_entropy(tuned(images), torch.tensor([0, 1])).backward()
        optimizer.step()
        assert not torch.equal(tuned.conv1.weight, before)

    run_snippets(alice.files('alice/model')['README.md'].decode(), capsys)

    assert 'nothing was changed' in push(kind=kind)[0]
    assert len(alice.repos['alice/model'].commits) == 2


def test_pull_request(alice, push):
    push(kind='adaresnet')
    printed, failed = push('--create-pr')
    assert not failed and f'Pushed to {alice.url}/alice/model/discussions/1' in printed
    assert alice.files('alice/model')['config.json'] != alice.files('alice/model', 'refs/pr/1')['config.json']
    assert "timm.create_model('hf-hub:alice/model@refs/pr/1', pretrained=True)" in printed
    proposed = timm.create_model('hf-hub:alice/model@refs/pr/1', pretrained=True)
    assert isinstance(proposed, timm_dresnet.DResNet)


def test_changes_are_one_commit(alice, push, digits_folder):
    """A second model takes the place of the first, no file of which is left over."""
    push(folder=digits_folder)
    alice.repos['alice/model'].commit('main', 'notes', {
        **alice.repos['alice/model'].commits[alice.repos['alice/model'].refs['main']].files,
        'notes.md': alice.store(b'mine')}, None)
    assert not push()[1]
    repo = alice.repos['alice/model']
    assert len(repo.commits) == 4
    assert sorted(alice.files('alice/model')) == [
        '.gitattributes', 'README.md', 'config.json', 'model.safetensors', 'notes.md']


def test_branch_and_private(alice, push):
    printed, failed = push('--private', '--revision', 'wide')
    assert not failed and "timm.create_model('hf-hub:alice/model@wide', pretrained=True)" in printed
    assert alice.repos['alice/model'].private
    assert set(alice.files('alice/model')) == {'.gitattributes'}
    assert 'model.safetensors' in alice.files('alice/model', 'wide')
    assert 'model.safetensors' in HfApi().list_repo_files('alice/model', revision='wide')


def test_dry_run(hub, push, folders):
    printed, failed = push('--dry-run')
    assert not failed and not hub.requests
    size = (folders['dresnet'][0] / 'model.safetensors').stat().st_size
    assert f'{size:,}  model.safetensors' in printed and 'README.md' in printed


def test_card_says_what_the_run_has_left(alice, push, digits_folder, capsys):
    assert not push('--dataset-id', 'alice/digits', folder=digits_folder)[1]
    files = alice.files('alice/model')
    for name in ('args.yaml', 'summary.csv', 'curves.png', 'connections.png', 'connections.csv'):
        assert name in files
    assert str(digits_folder.parent).encode() not in files['args.yaml']  # where it lies on this machine

    card = ModelCard(files['README.md'].decode())
    assert card.data.library_name == 'timm' and card.data.license == 'apache-2.0'
    assert card.data.datasets == ['alice/digits'] and 'dresnet' in card.data.tags
    with (digits_folder / 'summary.csv').open() as f:
        last = list(csv.DictReader(f))[-1]
    results = {result.metric_name: result for result in card.data.eval_results}
    assert results['Top-1 accuracy, %'].metric_value == round(float(last['eval_top1']), 2)
    assert results['Top-1 accuracy, %'].dataset_type == 'alice/digits'
    top1, top5, loss = (float(last[f'eval_{key}']) for key in ('top1', 'top5', 'loss'))
    assert f'| {top1:.2f} | {top5:.2f} | {loss:.4f} |' in card.text
    assert 'python -m train.validate hf-hub:alice/model --dataset digits\n' in card.text
    assert 'python -m train --config args.yaml --dataset digits\n' in card.text
    assert '![Loss and accuracy over the epochs](curves.png)' in card.text
    run_snippets(card.text, capsys)


def test_card_of_a_model_measured_at_several_sizes(digits_folder, tmp_path):
    folder = shutil.copytree(digits_folder, tmp_path / 'run')
    size = load_folder(folder).pretrained_cfg['input_size'][-1]
    (folder / 'validation.csv').write_text(
        f'model,size,images,top1,top5,loss\noutput/run,{size}x{size},360,71.5,99.5,0.5\n'
        f'output/run,{2 * size}x{2 * size},360,40.5,80.5,2.5\noutput/run/last.pth.tar,{size}x{size},360,99.9,99.9,0.1\n')
    (tmp_path / 'new').mkdir()
    repository.build(repository.Job(folder, 'alice/model'), tmp_path / 'new')
    card = ModelCard.load(tmp_path / 'new/README.md')
    assert f'at {size}x{size}:' in card.text and '| 71.50 | 99.50 | 0.5000 |' in card.text and '40.50' not in card.text
    assert card.data.eval_results[0].metric_value == 71.5


def test_card_of_the_author(alice, push, folders, tmp_path):
    folder = shutil.copytree(folders['dresnet'][0], tmp_path / 'run')
    (folder / 'README.md').write_text('---\nlibrary_name: timm\n---\n# Mine\n')
    assert not push(folder=folder)[1]
    assert alice.files('alice/model')['README.md'].decode() == (folder / 'README.md').read_text()
    error, failed = push('--license', 'mit', folder=folder)
    assert failed and '--license' in error
    (folder / 'README.md').write_text('---\nlicense: [a, b]\n---\n# Mine\n')  # which the Hub refuses
    error, failed = push(folder=folder)
    assert failed and 'Invalid metadata in README.md' in error
    assert len(alice.repos['alice/model'].commits) == 2


def test_card_of_a_grown_model(hub, push, folders, tmp_path):
    shutil.copytree(folders['adaresnet'][0], tmp_path / 'grown')
    (tmp_path / 'grown/args.yaml').write_text(
        'model: adaresnet50.init_a1_in1k\npretrained: true\nepochs: 2\nseed: 1\nopt: sgd\nlr: 0.1\nbatch_size: 8\n'
        'dataset: hfds/alice/birds\n')
    job = repository.Job(tmp_path / 'grown', 'alice/model')
    (tmp_path / 'new').mkdir()
    repository.build(job, tmp_path / 'new')
    card = ModelCard.load(tmp_path / 'new/README.md')
    assert card.data.base_model == 'timm/resnet50.a1_in1k' and card.data.datasets == ['alice/birds']
    assert 'starting from timm/resnet50.a1_in1k' in card.text and 'on alice/birds at 32x32' in card.text


@pytest.mark.parametrize('args,start', [
    (dict(model='dresnet18', pretrained=True), 'dresnet18.tiny_in'),
    (dict(model='dresnet18', pretrained=True, pretrained_path='/home/bob/flowers.safetensors'), 'flowers.safetensors'),
    (dict(model='resnet18', pretrained=True, initial_checkpoint='last.pth.tar'), 'last.pth.tar'),
    (dict(model='resnet18', pretrained=True), 'timm/resnet18.a1_in1k'),
    (dict(model='resnet18', pretrained=False), None),
])
def test_start_of_a_run(args, start, tmp_path):
    (tmp_path / 'args.yaml').write_text(yaml.safe_dump(dict(args, epochs=1, seed=0, opt='sgd', batch_size=2)))
    assert cards.Run.read(tmp_path).start == start


@pytest.mark.parametrize('args,name,arguments', [
    (dict(dataset='', data_dir='data/images/flowers/', val_split='validation'), 'flowers', '--data-dir PATH'),
    (dict(dataset='hfds/alice/birds', val_split='test', input_key='img', target_key='the label', class_map=''),
     'alice/birds', "--dataset hfds/alice/birds --val-split test --input-key img --target-key 'the label'"),
    (dict(dataset='torch/cifar10', data_dir='/data'), 'CIFAR-10', '--dataset torch/cifar10 --data-dir PATH'),
])
def test_data_of_a_run(args, name, arguments):
    run = cards.Run(args)
    assert (run.dataset, run.data_arguments) == (name, arguments)


@pytest.mark.parametrize('token,message', [
    (None, 'there is no token: log in'),
    ('hf_expired', 'does not accept this token'),
    ('hf_reader', 'this token may not write to alice/model'),
    ('hf_other', 'this token may not write to alice/model'),
])
def test_tokens(hub, push, monkeypatch, token, message):
    if token:
        monkeypatch.setenv('HF_TOKEN', token)
    error, failed = push()
    assert failed and message in error
    assert not hub.repos


def test_token_file(hub, push, tmp_path, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_expired')
    file = tmp_path / 'token'
    file.write_text('hf_writer\n')
    assert not push('--token-file', str(file))[1]
    for text in ('# hf_writer', 'hf_wr\u0456ter', ''):
        file.write_text(text)
        assert 'does not hold a token' in push('--token-file', str(file))[0]
    assert 'No such file' in push('--token-file', str(tmp_path / 'none'))[0]


def test_another_hub(hub, folders, tmp_path):
    """Named on the command line alone, of a program of its own."""
    (tmp_path / 'token').write_text('hf_writer')
    done = subprocess.run(
        [sys.executable, '-m', 'hub.push', str(folders['adaresnet'][0]), '--repo-id', 'alice/model',
         '--endpoint', hub.url, '--token-file', str(tmp_path / 'token')],
        cwd=ROOT, env={key: value for key, value in os.environ.items() if key != 'HF_ENDPOINT'}, capture_output=True,
        text=True)
    assert done.returncode == 0, done.stderr
    assert 'Loaded back, with equal logits' in done.stdout and 'model.safetensors' in hub.files('alice/model')
    assert '100%' in done.stderr  # of the upload


@pytest.mark.parametrize('faults', [
    [Fault('GET /api/whoami-v2', 429, headers={'Retry-After': '7'})],
    [Fault('POST /api/repos/create', 503)],
    [Fault('GET /api/models/alice/model', 502), Fault('POST */preupload/*', 500, times=2)],
    [Fault('POST */objects/batch', 429), Fault('PUT /lfs/*', times=2)],
    [Fault('PUT /lfs/*', 503, times=7)],  # the client gives up after six
    [Fault('POST */commit/*', 503, times=2)],
    [Fault('POST */commit/*', 429, headers={'Retry-After': '3'})],
    [Fault('POST */commit/*')],
    [Fault('POST */commit/*', after=True)],  # the commit is made, which the client does not hear
    [Fault('POST */commit/*', 412)],
    [Fault('GET */resolve/*/model.safetensors', cut_at=100_000)],
    [Fault('HEAD */resolve/*/model.safetensors', 503), Fault('GET */resolve/*/model.safetensors', 500)],
], ids=lambda faults: ', '.join(f'{f.request} {f.status or "cut"}' for f in faults))
def test_faults_that_pass(alice, push, faults):
    alice.faults += faults
    printed, failed = push()
    assert not failed, printed
    assert 'Loaded back, with equal logits' in printed
    assert not any(fault.times for fault in faults)
    assert len(alice.repos['alice/model'].commits) == 2


@pytest.mark.parametrize('fault,message,commits', [
    (Fault('GET /api/whoami-v2', times=99), 'cannot be reached', 0),
    (Fault('POST /api/repos/create', 409), 'does not show alice/model to this token', 0),
    (Fault('POST */preupload/*', 404, headers={'X-Error-Code': 'RepoNotFound'}), 'does not show alice/model', 1),
    (Fault('PUT /lfs/*', times=99), 'cannot be reached', 1),
    (Fault('PUT /lfs/*', 400), 'answers 400 for /lfs/', 1),  # the file is another by now
    (Fault('POST */commit/*', 500, times=99), 'still answers 500', 1),
    (Fault('POST */commit/*', 403), 'may not write to alice/model', 1),
    (Fault('POST */commit/*', 404, headers={'X-Error-Code': 'RepoNotFound'}), 'does not show alice/model', 1),
    (Fault('GET */resolve/*/model.safetensors', 503, times=99), 'is complete, but could not be loaded back', 2),
    (Fault('GET */resolve/*/model.safetensors', times=99, cut_at=0), 'is complete, but could not be loaded back', 2),
    (Fault('GET */resolve/*/model.safetensors', corrupt=True), 'is not what was pushed', 2),
    (Fault('GET */resolve/*/config.json', corrupt=True), 'cannot be loaded', 2),
], ids=lambda value: f'{value.request} {value.status or "cut"}' if isinstance(value, Fault) else '')
def test_faults_that_stay(alice, push, fault, message, commits):
    alice.faults.append(fault)
    error, failed = push()
    assert failed and message in error
    made = alice.repos['alice/model'].commits if commits else {}
    assert len(made) == commits
    for commit in made.values():  # whole, or not there
        assert set(commit.files) - {'.gitattributes'} in (set(), {'README.md', 'config.json', 'model.safetensors'})


def test_pull_request_is_not_opened_twice(alice, push):
    push(kind='adaresnet')
    alice.faults.append(Fault('POST */commit/*', after=True))
    error, failed = push('--create-pr')
    assert failed and f'If a pull request was opened, it is at {alice.url}/alice/model/discussions' in error
    assert sum(ref.startswith('refs/pr/') for ref in alice.repos['alice/model'].refs) == 1


def test_full_disk(alice, folders, tmp_path):
    """The cache cannot take what is loaded back."""
    job = repository.Job(folders['dresnet'][0], 'alice/model')
    model = repository.build(job, tmp_path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match='is complete, but could not be loaded back: .*File too large'):
            repository.push(job, tmp_path, model, private=False, revision=None, create_pr=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert 'model.safetensors' in alice.files('alice/model')


def test_folder_may_change_meanwhile(alice, folders, tmp_path):
    folder = shutil.copytree(folders['dresnet'][0], tmp_path / 'run')
    expected = (folder / 'model.safetensors').read_bytes()
    (tmp_path / 'new').mkdir()
    job = repository.Job(folder, 'alice/model')
    model = repository.build(job, tmp_path / 'new')
    (folder / 'model.safetensors').write_bytes(b'half of the next')
    repository.push(job, tmp_path / 'new', model, private=False, revision=None, create_pr=False)
    assert alice.files('alice/model')['model.safetensors'] == expected


@pytest.mark.parametrize('damage,message', [
    (lambda folder: shutil.rmtree(folder), 'there is no folder'),
    (lambda folder: (folder / 'model.safetensors').unlink(), 'holds no model.safetensors'),
    (lambda folder: (folder / 'config.json').write_text('{"architecture": "dresnet17"}'), 'Unknown model (dresnet17)'),
    (lambda folder: (folder / 'model.safetensors').write_bytes(b'\x80\x04.'), 'model.safetensors is damaged'),
    (lambda folder: (folder / 'args.yaml').write_text('a: [1'), 'a damaged file of its run'),
    (lambda folder: (folder / 'args.yaml').write_text('model: x'), 'does not say batch_size, epochs, opt, seed'),
    (lambda folder: (folder / 'summary.csv').write_text('epoch,eval_top1\n0,50\n'), 'the record of the run in'),
    (lambda folder: (folder / 'validation.csv').write_text('model\nrun\n'), 'the record of the run in'),
    (lambda folder: (folder / 'validation.csv').write_text('model\nx\n'), 'validation.csv is not of'),
    (lambda folder: (folder / 'validation.csv').write_text('size\n16\n'), 'validation.csv is not of'),
    (lambda folder: save_for_hf(not_finite(), folder, safe_serialization=True), 'not finite'),
    (lambda folder: save_for_hf(timm.create_model('test_dresnet', num_classes=0), folder, safe_serialization=True),
     'no classifier'),
])
def test_damaged_folders(alice, push, folders, tmp_path, damage, message):
    folder = shutil.copytree(folders['dresnet'][0], tmp_path / 'run')
    damage(folder)
    error, failed = push(folder=folder)
    assert failed and message in error and not alice.requests


def not_finite():
    model = timm.create_model('test_dresnet')
    model.conv1.weight.data[0, 0, 0, 0] = float('nan')
    return model


@pytest.mark.parametrize('args', [
    ['x'], ['--repo-id', 'alice/x'], ['x', '--repo-id', 'alice/x', '--zoo', 'y'], ['--zoo', 'y'],
    ['x', '--repo-id', 'alice/x', '--create-pr', '--revision', 'y'],
    ['x', '--repo-id', 'alice/x', '--endpoint', 'hub.example.org'],
])
def test_usage(args, capsys):
    with pytest.raises(SystemExit, match='2'):
        main(args)
    assert 'error:' in capsys.readouterr().err


@pytest.mark.parametrize('repo_id', ['model', 'a/b/c', 'alice/mo del', '../x'])
def test_bad_repository(hub, push, repo_id):
    error, failed = push(repo_id=repo_id)
    assert failed and repo_id in error


def test_zoo(alice, capsys):
    """Every model of the package, as its record says."""
    main(['--zoo', str(cards.ZOO.with_suffix('.yaml')), '--namespace', 'alice'])
    tags = [repo_id.removeprefix('alice/') for repo_id in alice.repos]
    pretrained = timm.list_pretrained(['*dresnet*', '*adaresnet*'])
    assert sorted(tags) == sorted(name for name in pretrained if '.init_' not in name)
    for tag in tags:
        files = alice.files(f'alice/{tag}')
        card = ModelCard(files['README.md'].decode())
        with (cards.ZOO / tag / 'validation.csv').open() as f:
            measured = float(next(csv.DictReader(f))['top1'])
        assert card.data.datasets and card.data.eval_results[0].metric_value == round(measured, 2)
        assert measured > {'tiny_in': 40, 'c10': 75}[tag.split('.')[1]]
        assert {'args.yaml', 'summary.csv', 'curves.png'} <= set(files)
        packaged, loaded = (timm.create_model(name, pretrained=True) for name in (tag, f'hf-hub:alice/{tag}'))
        assert all(torch.equal(w, loaded.state_dict()[key]) for key, w in packaged.state_dict().items())
        assert loaded.pretrained_cfg['label_names'] == list(packaged.pretrained_cfg['label_names'])


def test_family_card_is_up_to_date():
    assert cards.family_card().content == (ROOT / 'MODEL_CARD.md').read_text()
    assert cards.results_table() == (ROOT / 'timm_dresnet/weights/results.csv').read_text()


def test_package(digits_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(package, 'WEIGHTS', tmp_path / 'weights')
    monkeypatch.setattr(package, 'ZOO', tmp_path / 'zoo')
    folder = shutil.copytree(digits_folder, tmp_path / 'digits')
    (folder / 'validation.csv').write_text('model,size\ndigits,16x16\n')  # of weights that are not rounded yet
    package.main([str(folder), 'dresnet20_cifar.digits'])
    assert 'python -m train.validate dresnet20_cifar.digits --dataset digits --csv' in capsys.readouterr().out
    file = tmp_path / 'weights/dresnet20_cifar.digits.safetensors'
    assert json.loads((tmp_path / 'weights/manifest.json').read_text()) == {
        file.name: {'size': file.stat().st_size, 'sha256': hashlib.sha256(file.read_bytes()).hexdigest()}}
    for key, weight in load_file(digits_folder / 'model.safetensors').items():
        half = load_file(file)[key]
        assert half.dtype == (torch.float16 if weight.is_floating_point() else weight.dtype)
        torch.testing.assert_close(half.to(weight.dtype), weight, rtol=1e-3, atol=1e-6)
    assert str(digits_folder.parent) not in (tmp_path / 'zoo/dresnet20_cifar.digits/args.yaml').read_text()
    assert {path.name for path in (tmp_path / 'zoo/dresnet20_cifar.digits').iterdir()} == {
        'args.yaml', 'summary.csv', 'connections.csv', 'curves.png', 'connections.png', 'connections_history.png'}

    model = timm.create_model('test_dresnet')
    model.layer1[0].bn1.running_var[0] = 1e6
    save_for_hf(model, tmp_path / 'large', safe_serialization=True)
    for folder, tag, message in (
            (digits_folder, 'dresnet18.digits', 'holds a dresnet20_cifar'),
            (digits_folder, 'dresnet20_cifar', 'holds a dresnet20_cifar'),
            (digits_folder, 'dresnet20_cifar.a/b', 'holds a dresnet20_cifar'),
            (tmp_path, 'dresnet18.digits', 'holds no config.json'),
            (tmp_path / 'large', 'test_dresnet.c10', 'layer1.0.bn1.running_var in .* half precision cannot hold'),
    ):
        with pytest.raises(SystemExit, match=message):
            package.main([str(folder), tag])

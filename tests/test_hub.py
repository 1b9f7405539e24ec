"""Models pushed to a Hub with huggingface_hub's own client, and what timm loads from there."""
import hashlib
import json
import re
import shutil
from contextlib import nullcontext

import pytest
import timm
import torch
import yaml
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from timm.models import save_for_hf
from timm.utils import reparameterize_model

import timm_dresnet
from conftest import ROOT, rows
from hub import bundle, cards
from hub.push import Upload, build, main
from hub_server import Fault

KINDS = ('test_dresnet', 'test_adaresnet', 'grown')  # the last one also pruned and fused


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Folders of models of each kind, and the models."""
    made = {}
    for kind in KINDS:
        torch.manual_seed(0)
        if kind == 'grown':
            model = timm_dresnet.grow(timm.create_model('test_resnet', num_classes=7)).train()
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model(torch.randn(4, 3, 64, 64)).square().sum().backward()
            optimizer.step()
            timm_dresnet.prune_connections(model.eval(), keep=0.5)
            model = reparameterize_model(model)
        else:
            model = timm.create_model(kind, num_classes=7).eval()
        folder = tmp_path_factory.mktemp(kind)
        save_for_hf(model, folder, safe_serialization=True)
        made[kind] = folder, model
    return made


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of the folder of a DResNet, to change."""
    return shutil.copytree(folders['test_dresnet'][0], tmp_path / 'run')


@pytest.fixture
def alice(hub, monkeypatch):
    """The Hub, with a user logged in, and no waiting."""
    monkeypatch.setenv('HF_TOKEN', 'hf_writer')
    monkeypatch.setattr('time.sleep', lambda seconds: None)
    return hub


@pytest.fixture
def push(folders, capsys):
    """Push a folder to alice/model, without an error or with one that says this. Returns what is printed."""
    def run(*args, kind='test_dresnet', folder=None, repo_id='alice/model', error=''):
        with pytest.raises(SystemExit) if error else nullcontext() as raised:
            main([str(folder or folders[kind][0]), '--repo-id', repo_id, *args])
        message, printed = raised.value.code if error else '', capsys.readouterr()
        assert 'hf_' not in printed.out + printed.err + message  # a token
        if error:
            assert message.startswith('python -m hub.push: error: ') and '\n' not in message and error in message
        return printed.out
    return run


def run_snippets(card, capsys):
    for snippet in re.findall(r'```python\n(.*?)```', card, flags=re.DOTALL):
        exec(compile(snippet, 'snippet of a card', 'exec'), {})
    assert capsys.readouterr().out


@pytest.mark.parametrize('kind', KINDS)
def test_published_is_loadable(alice, push, folders, kind, capsys):
    assert 'Loaded back, with equal logits' in push(kind=kind)
    assert len(alice.repos['alice/model'].commits) == 2  # the first comes with the repository
    assert set(alice.files('alice/model')) == {'.gitattributes', 'README.md', 'config.json', 'model.safetensors'}

    model, loaded = folders[kind][1], timm.create_model('hf-hub:alice/model', pretrained=True).eval()
    images = torch.randn(2, 3, 40, 40)
    with torch.no_grad():
        torch.testing.assert_close(loaded(images), model(images))
    run_snippets(alice.files('alice/model')['README.md'].decode(), capsys)

    assert 'nothing was changed' in push(kind=kind)
    assert len(alice.repos['alice/model'].commits) == 2


def test_pull_request(alice, push):
    push('--create-pr', error='Repository Not Found')  # there is none
    push(kind='test_adaresnet')
    printed = push('--create-pr')
    assert f'Pushed to {alice.url}/alice/model/discussions/1' in printed
    assert alice.files('alice/model')['config.json'] != alice.files('alice/model', 'refs/pr/1')['config.json']
    assert "timm.create_model('hf-hub:alice/model@refs/pr/1', pretrained=True)" in printed
    alice.faults.append(Fault('POST */commit/*', after=True))
    push('--create-pr', error='disconnected')
    assert set(alice.repos['alice/model'].refs) == {'main', 'refs/pr/1', 'refs/pr/2'}  # none is opened twice


def test_branch_and_private(alice, push):
    assert "timm.create_model('hf-hub:alice/model@wide', pretrained=True)" in push(
        '--private', '--revision', 'wide', '--license', 'mit')
    assert alice.repos['alice/model'].private
    assert set(alice.files('alice/model')) == {'.gitattributes'}
    assert 'model.safetensors' in alice.files('alice/model', 'wide')
    assert json.loads(alice.files('alice/model', 'wide')['config.json'])['pretrained_cfg']['license'] == 'mit'


def test_card_of_a_run(alice, push, digits_folder, capsys):
    push('--dataset-id', 'alice/digits', folder=digits_folder)
    files = alice.files('alice/model')
    files['notes.md'] = b'mine'
    assert {'args.yaml', 'summary.csv', 'curves.png', 'connections.png', 'connections.csv'} <= set(files)
    assert str(digits_folder.parent).encode() not in files['args.yaml']

    card = ModelCard(files['README.md'].decode())
    assert card.data.library_name == 'timm' and card.data.license == 'apache-2.0'
    assert card.data.datasets == ['alice/digits'] and 'dresnet' in card.data.tags
    last = rows(digits_folder / 'summary.csv')[-1]
    top1, top5, loss = (float(last[f'eval_{key}']) for key in ('top1', 'top5', 'loss'))
    assert [result.metric_value for result in card.data.eval_results] == [round(top1, 2), round(top5, 2)]
    assert card.data.eval_results[0].dataset_type == 'alice/digits'
    assert f'| {top1:.2f} | {top5:.2f} | {loss:.4f} |' in card.text
    assert 'python -m train.validate hf-hub:alice/model --dataset digits\n' in card.text
    assert 'python -m train --config args.yaml --dataset digits\n' in card.text
    assert '![Loss and accuracy over the epochs](curves.png)' in card.text
    run_snippets(card.text, capsys)

    push()  # a second model takes its place by one commit, and none of its files is left over
    assert len(alice.repos['alice/model'].commits) == 3
    assert set(alice.files('alice/model')) == {
        '.gitattributes', 'README.md', 'config.json', 'model.safetensors', 'notes.md'}


def test_card_of_a_folder_of_images(folder, tmp_path, capsys):
    """Named as another data set, with cooldown epochs, four channels, and odd names of classes."""
    model = timm.create_model('test_dresnet', num_classes=3, in_chans=4)
    save_for_hf(model, folder, model_config=dict(label_names=['a|b', 'c\nd', 'e']), safe_serialization=True)
    args = dict(model='test_dresnet', epochs=1, seed=1, opt='sgd', batch_size=8, data_dir='/home/bob/digits')
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    (folder / 'summary.csv').write_text('epoch,eval_loss,eval_top1,eval_top5\n0,1,50,60\n1,1,70,80\n')
    (folder / 'validation.csv').write_text(
        'model,size,dataset,split,loss,top1,top5\n'
        + ''.join(f'{folder.resolve()},32x32,{measured}\n' for measured in (
            'digits,validation,1,50,60', 'digits,train,1,90,95', 'others,validation,1,20,30', '')))
    build(Upload(folder, 'alice/model'), tmp_path)
    card = (tmp_path / 'README.md').read_text()
    assert '2 epochs on digits at 32x32, ' in card and '3: a\\|b, c d, e |' in card
    assert '| 50.00 | 60.00 |' in card
    assert (tmp_path / 'validation.csv').read_text().splitlines()[1:] == ['run,32x32,digits,validation,1,50,60']
    run_snippets(card.replace('hf-hub:alice/model', f'local-dir:{folder}'), capsys)


def test_card_of_another_model(tmp_path):
    save_for_hf(timm.create_model('test_vit'), tmp_path / 'run', safe_serialization=True)
    build(Upload(tmp_path / 'run', 'alice/vit'), tmp_path)
    assert ModelCard.load(tmp_path / 'README.md').data.tags[-1] == 'visiontransformer'


def test_card_of_the_author(alice, push, folder):
    (folder / 'README.md').write_text('---\nlibrary_name: timm\n---\n# Mine\n')
    push(folder=folder)
    assert alice.files('alice/model')['README.md'].decode() == (folder / 'README.md').read_text()
    push('--license', 'mit', folder=folder, error='--license')


@pytest.mark.parametrize('args,start,base_model', [
    (dict(model='dresnet18', pretrained=True), 'dresnet18.tiny_in', None),
    (dict(model='dresnet18', pretrained=True, pretrained_path='/home/bob/a.safetensors'), 'a.safetensors', None),
    (dict(model='adaresnet50.init_a1_in1k', pretrained=True), 'timm/resnet50.a1_in1k', 'timm/resnet50.a1_in1k'),
    (dict(model='dresnet50d', pretrained=True), *2 * ['timm/resnet50d.ra2_in1k']),
    (dict(model='dresnet', pretrained=True, model_kwargs=dict(grown_from='resnet50')), *2 * ['timm/resnet50.a1_in1k']),
    (dict(model='dresnet', pretrained=True, model_kwargs=dict(grown_from='local-dir:/home/bob/resnet')),
     'local-dir:resnet', None),
    (dict(model='dresnet', pretrained=True, model_kwargs=dict(grown_from='hf_hub:bob/resnet@v1')), *2 * ['bob/resnet']),
])
def test_card_says_what_the_training_started_from(folder, tmp_path, args, start, base_model):
    args.update(epochs=2, seed=1, opt='sgd', lr=0.1, batch_size=8)
    args.update(dataset='HFDS/alice/birds', val_split='test', target_key='the label')
    (folder / 'args.yaml').write_text(yaml.safe_dump(args))
    build(Upload(folder, 'alice/model'), tmp_path)
    card = ModelCard.load(tmp_path / 'README.md')
    assert '/home' not in (tmp_path / 'args.yaml').read_text()
    assert card.data.base_model == base_model and card.data.datasets == ['alice/birds']
    assert '2 epochs on alice/birds at 32x32, seed 1, sgd, learning rate 0.1, batches of up to 8, ' in card.text
    assert f', starting from {start}.\n' in card.text
    assert ('Grown from' in card.text) == bool(base_model)
    assert "--config args.yaml --dataset HFDS/alice/birds --val-split test --target-key 'the label'\n" in card.text


@pytest.mark.parametrize('token,message', [
    (None, 'there is no token, or'),
    ('hf_expired', '401 Unauthorized'),
    ('hf_\x1bwriter', 'odd characters'),
])
def test_tokens(hub, push, monkeypatch, token, message):
    if token:
        monkeypatch.setenv('HF_TOKEN', token)
    push(error=message)
    assert not hub.repos


def test_faults_that_pass(alice, push):
    """huggingface_hub repeats what it can; after a commit whose answer is lost, one pushes again."""
    alice.faults += [
        Fault('POST */preupload/*', 500), Fault('POST */objects/batch', 429), Fault('PUT /lfs/*', times=2),
        Fault('POST */commit/*', after=True), Fault('GET */resolve/*/model.safetensors', 429),
    ]
    push(error='disconnected')
    printed = push()
    assert 'nothing was changed' in printed and 'Loaded back, with equal logits' in printed
    assert not any(fault.times for fault in alice.faults)
    assert len(alice.repos['alice/model'].commits) == 2


@pytest.mark.parametrize('fault,message,commits', [
    (Fault('POST /api/repos/create'), 'disconnected', 0),
    (Fault('PUT /lfs/*', 400), "uploading 'model.safetensors' to the Hub. Bad request: injected", 1),
    (Fault('POST */commit/*', 412), '412 Precondition Failed', 1),
    (Fault('GET */resolve/*/model.safetensors', 503, times=99), 'was pushed, but cannot be loaded back', 2),
    (Fault('GET */resolve/*/model.safetensors', corrupt=True), 'is not what was pushed', 2),
], ids=lambda value: f'{value.request} {value.status or "cut"}' if isinstance(value, Fault) else '')
def test_faults_that_stay(alice, push, fault, message, commits):
    alice.faults.append(fault)
    push(error=message)
    made = alice.repos['alice/model'].commits if commits else {}
    assert len(made) == commits
    for files in made.values():  # whole, or not there
        assert set(files) - {'.gitattributes'} in (set(), {'README.md', 'config.json', 'model.safetensors'})


@pytest.mark.parametrize('damage,message', [
    (shutil.rmtree, 'holds no config.json'),
    (lambda folder: (folder / 'model.safetensors').unlink(), 'holds no model.safetensors'),
    (lambda folder: (folder / 'args.yaml').write_text('a: [1'), 'while parsing'),
    (lambda folder: (folder / 'args.yaml').write_text(''), 'args.yaml holds no arguments'),
    (lambda folder: (folder / 'validation.csv').write_text(
        'model,size,dataset,split,loss,top1,top5\nother,1x1,unknown,validation,1,50,60\n'),
     'validation.csv has no row for'),
    (lambda folder: (folder / 'summary.csv').write_text('epoch,eval_top1\n0,50\n'),
     'summary.csv has no column eval_loss'),
    (lambda folder: save_for_hf(timm.create_model('test_dresnet', num_classes=0), folder, safe_serialization=True),
     'no classifier'),
])
def test_damaged_folders(alice, push, folder, damage, message):
    damage(folder)
    push(folder=folder, error=message)
    assert not alice.requests


def test_dry_run_and_wrong_command_lines(hub, push, capsys):
    printed = push('--dry-run')
    assert not hub.requests and '  model.safetensors' in printed and '  README.md' in printed
    assert 'library_name: timm' in printed  # the card
    for args in (['x'], ['x', '--repo-id', 'alice/x', '--zoo', 'y'], ['--zoo', 'y']):
        with pytest.raises(SystemExit, match='2'):
            main(args)
        assert 'error:' in capsys.readouterr().err
    push(repo_id='model', error="'model' is not a repository")


@pytest.mark.parametrize('text', ['- test_dresnet.c10', 'test_dresnet.c10: 1', 'test_dresnet.c10: {licence: mit}'])
def test_zoo_of_another_form(text, tmp_path):
    (tmp_path / 'zoo.yaml').write_text(text)
    with pytest.raises(SystemExit, match='zoo.yaml: it does not list models as'):
        main(['--zoo', str(tmp_path / 'zoo.yaml'), '--namespace', 'alice', '--dry-run'])


def test_zoo(alice):
    """Every model of the package, as its record says."""
    main(['--zoo', str(cards.ZOO.with_suffix('.yaml')), '--namespace', 'alice'])
    tags = [repo_id.removeprefix('alice/') for repo_id in alice.repos]
    pretrained = timm.list_pretrained(['*dresnet*', '*adaresnet*'])
    assert sorted(tags) == sorted(name for name in pretrained if '.init_' not in name)
    results = {row.pop('model'): row for row in rows(ROOT / 'timm_dresnet/weights/results.csv')}
    assert set(results) == set(tags)
    for tag in tags:
        files = alice.files(f'alice/{tag}')
        card = ModelCard(files['README.md'].decode())
        measured = rows(cards.ZOO / tag / 'validation.csv')[0]
        assert all(results[tag][key] == measured[key] for key in ('top1', 'top5', 'size', 'images'))
        assert card.data.datasets and card.data.eval_results[0].metric_value == round(float(measured['top1']), 2)
        assert {'args.yaml', 'summary.csv', 'curves.png'} <= set(files)
        packaged, loaded = (timm.create_model(name, pretrained=True) for name in (tag, f'hf-hub:alice/{tag}'))
        assert all(torch.equal(w, loaded.state_dict()[key]) for key, w in packaged.state_dict().items())
        assert loaded.pretrained_cfg['label_names'] == list(packaged.pretrained_cfg['label_names'])


def test_bundle(digits_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bundle, 'WEIGHTS', tmp_path)
    monkeypatch.setattr(bundle, 'ZOO', tmp_path)
    (tmp_path / 'manifest.json').write_text('{}')
    bundle.main([str(digits_folder), 'dresnet20_cifar.digits'])
    assert 'python -m train.validate dresnet20_cifar.digits --dataset digits --csv' in capsys.readouterr().out
    file = tmp_path / 'dresnet20_cifar.digits.safetensors'
    assert json.loads((tmp_path / 'manifest.json').read_text()) == {
        file.name: {'sha256': hashlib.sha256(file.read_bytes()).hexdigest()}}
    for key, weight in load_file(digits_folder / 'model.safetensors').items():
        half = load_file(file)[key]
        torch.testing.assert_close(half, weight.half() if weight.is_floating_point() else weight)
    assert {path.name for path in (tmp_path / 'dresnet20_cifar.digits').iterdir()} == {
        'args.yaml', 'summary.csv', 'connections.csv', 'curves.png', 'connections.png', 'connections_history.png'}

    with pytest.raises(SystemExit, match='holds a dresnet20_cifar'):
        bundle.main([str(digits_folder), 'dresnet18.digits'])
    model = timm.create_model('test_dresnet')
    model.layer1[0].bn1.running_var[0] = 1e6
    save_for_hf(model, tmp_path / 'large', safe_serialization=True)
    with pytest.raises(SystemExit, match='layer1.0.bn1.running_var in .* half precision cannot hold'):
        bundle.main([str(tmp_path / 'large'), 'test_dresnet.c10'])
    for made in (reparameterize_model(timm.create_model('test_dresnet').eval()),
                 timm.create_model('test_dresnet', global_pool='max')):
        save_for_hf(made, tmp_path / 'other', safe_serialization=True)
        with pytest.raises(SystemExit, match='another network than'):
            bundle.main([str(tmp_path / 'other'), 'test_dresnet.c10'])

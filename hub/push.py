"""`python -m hub.push`: publish the folder of a run on the Hugging Face Hub, in one commit."""
import argparse
import json
import re
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional

import timm
import torch
import torch.nn as nn
import yaml
from httpx2 import HTTPError
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.utils import validate_repo_id
from timm.models import save_for_hf

from timm_dresnet.folders import load_folder

from .cards import PICTURES, TABLES, ZOO, Run, copy_record, model_card

_PUBLISHED = ('README.md', 'config.json', 'model.safetensors', *TABLES, *PICTURES)


@dataclass
class Upload:
    """A model to publish.

    Attributes:
        folder: The folder of its run.
        repo_id: The repository, 'owner/name'.
        model: Name and tag of the model, if its weights are in the package instead of the folder.
        license: License of the weights. That of the model if None.
        dataset_id: Name of the training data on the Hub.
        note: What else to say about the data.
    """
    folder: Path
    repo_id: str
    model: Optional[str] = None
    license: Optional[str] = None
    dataset_id: Optional[str] = None
    note: str = ''

    def __post_init__(self) -> None:
        validate_repo_id(self.repo_id)  # raises a ValueError
        if self.repo_id.count('/') != 1:
            raise ValueError(f'{self.repo_id!r} is not a repository: give it as USER/NAME.')


def build(upload: Upload, folder: Path) -> nn.Module:
    """Write the files of the repository into an empty folder, and return the model, in eval mode.

    Raises:
        ValueError: If the folder of the run holds no model, or a damaged file.
    """
    run = Run.read(upload.folder, upload.dataset_id, upload.note)
    copy_record(run, upload.folder, folder, _PUBLISHED)
    if upload.model:
        save_for_hf(timm.create_model(upload.model, pretrained=True), folder, safe_serialization=True)
    model = load_folder(folder if upload.model else upload.folder)
    # timm 1.0.31 writes num_classes twice, and transformers 5.23 passes both to one function
    config = json.loads((folder / 'config.json').read_text())
    config.get('model_args', {}).pop('num_classes', None)
    if upload.license:
        config['pretrained_cfg']['license'] = upload.license  # that of what is fine-tuned from these weights, too
    (folder / 'config.json').write_text(json.dumps(config, indent=2))
    if model.num_classes == 0:
        raise ValueError(f'the model in {upload.folder} has no classifier (num_classes=0): push it with one.')
    if (folder / 'README.md').exists():  # the author's own card
        if upload.license or upload.dataset_id:
            raise ValueError(
                f'{upload.folder / "README.md"} is the card already: write license and data into it instead of '
                '--license and --dataset-id.')
        return model
    license = upload.license or model.pretrained_cfg.get('license') or 'apache-2.0'
    files = [file.name for file in folder.iterdir()]
    card = model_card(model, run, f'hf-hub:{upload.repo_id}', files, license)
    card.save(folder / 'README.md')
    return model


@torch.inference_mode()
def _logits(model: nn.Module) -> torch.Tensor:
    shape = timm.data.resolve_model_data_config(model)['input_size']
    return model(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))


def push(
        upload: Upload,
        folder: Path,
        model: nn.Module,
        private: bool = False,
        revision: Optional[str] = None,
        create_pr: bool = False,
) -> None:
    """Push a folder that `build` has written, load the model back, and compare logits.

    Raises:
        HTTPError: If the Hub cannot be reached.
        OSError: If the Hub refuses, or the model cannot be loaded back.
        ValueError: If there is no token, or what comes back is not what was pushed.
    """
    token = get_token()
    if not token or not re.fullmatch('[!-~]+', token):  # HTTP would refuse the header, and print it
        raise ValueError(
            'there is no token, or one with odd characters in it: log in with `hf auth login`, or set HF_TOKEN.')
    api = HfApi(library_name='timm-dresnet')
    repo_id, files = upload.repo_id, sorted(folder.iterdir())
    repo = f'{api.endpoint}/{repo_id}'
    if not create_pr:
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision:
            api.create_branch(repo_id, branch=revision, exist_ok=True)
    head = api.model_info(repo_id, revision=revision)
    left_over = {file.rfilename for file in head.siblings} & set(_PUBLISHED) - {file.name for file in files}
    commit = api.create_commit(  # not upload_folder, which may make several commits
        repo_id,
        operations=[
            *(CommitOperationAdd(file.name, file) for file in files),
            *(CommitOperationDelete(name) for name in sorted(left_over)),
        ],
        commit_message='Upload model with timm-dresnet',
        revision=revision,
        create_pr=create_pr,
        parent_commit=head.sha,
    )
    if commit.oid == head.sha:
        print(f'{repo} holds this already: nothing was changed.')
    else:
        print(f'Pushed to {commit.pr_url or commit.commit_url}')

    with tempfile.TemporaryDirectory(prefix='hub-cache-') as cache:
        try:
            name = f'hf-hub:{repo_id}@{commit.oid}'  # the commit itself, since a branch may have moved on
            loaded = timm.create_model(name, pretrained=True, cache_dir=cache)
        except Exception as e:  # of the network, or whatever a damaged file makes timm and safetensors raise
            raise OSError(f'{repo} was pushed, but cannot be loaded back: {e}') from e
    if not torch.allclose(_logits(loaded.eval()), _logits(model), rtol=1e-4, atol=1e-5):
        raise ValueError(f'{repo} is not what was pushed: its logits differ. Push it again.')
    branch = revision or commit.pr_revision
    name = f'{repo_id}@{branch}' if branch else repo_id
    print(f"Loaded back, with equal logits: timm.create_model('hf-hub:{name}', pretrained=True)")


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m hub.push',
        description='Push the folder of a run to the Hugging Face Hub, load the model back, and compare logits.',
        epilog='example: python -m hub.push output/digits --repo-id me/dresnet20-digits --dry-run. It logs in with '
               'HF_TOKEN, or the token of `hf auth login`; HF_ENDPOINT names another Hub.',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument('folder', nargs='?', type=Path, metavar='OUTPUT_FOLDER',
                        help='folder with model.safetensors and config.json, of a run or of timm.models.save_for_hf')
    source.add_argument('--zoo', type=Path, metavar='FILE',
                        help='push all models that this YAML file lists, such as hub/zoo.yaml, instead of one folder')
    parser.add_argument('--repo-id', metavar='USER/NAME', help='repository, made if there is none')
    parser.add_argument('--namespace', metavar='USER', help='with --zoo, owner of the repositories')
    parser.add_argument('--license', metavar='ID', help="of the weights (if not set, the model's own, or apache-2.0)")
    parser.add_argument('--dataset-id', metavar='ID', help='training data on the Hub, such as uoft-cs/cifar10')
    parser.add_argument('--private', action='store_true', help='make a new repository private')
    target = parser.add_mutually_exclusive_group()
    target.add_argument('--revision', metavar='BRANCH', help='branch, made if there is none (main if not set)')
    target.add_argument('--create-pr', action='store_true', help='open a pull request against main instead')
    parser.add_argument('--dry-run', action='store_true', help='show what would be pushed, and end')
    args = parser.parse_args(argv)
    if args.zoo and (not args.namespace or args.repo_id or args.license or args.dataset_id):
        parser.error('--zoo needs --namespace, and not --repo-id, --license or --dataset-id: the file has these.')
    if args.folder and (not args.repo_id or args.namespace):
        parser.error('a folder needs --repo-id USER/NAME, and not --namespace.')

    try:
        if args.zoo:
            zoo = yaml.safe_load(args.zoo.read_text())
            try:
                uploads = [
                    Upload(ZOO / tag, f'{args.namespace}/{tag}', model=tag, **facts or {})
                    for tag, facts in zoo.items()]
            except (AttributeError, TypeError) as e:
                raise ValueError(f'it does not list models as hub/zoo.yaml does ({e}).') from e
        else:
            uploads = [Upload(args.folder, args.repo_id, license=args.license, dataset_id=args.dataset_id)]
        for upload in uploads:
            with tempfile.TemporaryDirectory(prefix='hub-push-') as name:
                model = build(upload, Path(name))
                files = sorted(Path(name).iterdir())
                print(f'{upload.repo_id}: {sum(file.stat().st_size for file in files) / 1e6:,.2f} MB')
                for file in files:
                    print(f'  {file.stat().st_size:>12,}  {file.name}')
                if args.dry_run:
                    print(f'Nothing was pushed. README.md, the model card:\n\n{(Path(name) / "README.md").read_text()}')
                else:
                    push(upload, Path(name), model, args.private, args.revision, args.create_pr)
    except (HTTPError, OSError, RuntimeError, ValueError, yaml.YAMLError) as e:
        reason = f'{e} {e.__cause__ or ""}' if isinstance(e, RuntimeError) else str(e)  # the cause, of an upload
        sys.exit(f'python -m hub.push: error: {args.repo_id or args.zoo}: {" ".join(reason.split())}')


if __name__ == '__main__':
    main()

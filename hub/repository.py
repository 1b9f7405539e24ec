"""A repository on the Hugging Face Hub: built in a folder, pushed in one commit, and loaded back."""
import json
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable, List, Optional

import httpx2
import timm
import torch
import torch.nn as nn
import yaml
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OfflineModeIsEnabled, RepositoryNotFoundError,
    RevisionNotFoundError)
from huggingface_hub.utils import validate_repo_id
from timm.models import save_for_hf
from timm_dresnet.folders import load_folder

from .cards import PICTURES, TABLES, ZOO, Run, model_card

_PUBLISHED = ('README.md', 'config.json', 'model.safetensors', *TABLES, *PICTURES)
_WAITS = (1, 2, 4, 8)  # seconds before each new try


@dataclass
class Job:
    """What is to become which repository.

    Attributes:
        folder: What a run has left.
        repo_id: The repository, 'owner/name'.
        model: Name and tag of the model, if its weights are packaged and not in the folder.
        license: License of the weights. The model's own if None.
        dataset_id: The training data on the Hub.
        note: What else a reader should know of the data.
    """
    folder: Path
    repo_id: str
    model: Optional[str] = None
    license: Optional[str] = None
    dataset_id: Optional[str] = None
    note: str = ''

    def __post_init__(self) -> None:
        try:
            validate_repo_id(self.repo_id)
        except HFValidationError as e:
            raise ValueError(f'{self.repo_id!r} cannot be a repository: {e}') from e
        if self.repo_id.count('/') != 1:
            raise ValueError(f'{self.repo_id!r} is not a repository: give it as USER/NAME.')


def read_zoo(path: Path, namespace: str) -> List[Job]:
    """What a YAML file lists: packaged models, by name and tag, each with `dataset_id` and `note`.

    Raises:
        ValueError: If it is not such a file.
    """
    try:
        zoo = yaml.safe_load(path.read_text())
        return [Job(ZOO / tag, f'{namespace}/{tag}', model=tag, **(facts or {})) for tag, facts in zoo.items()]
    except (yaml.YAMLError, AttributeError, TypeError) as e:
        raise ValueError(f'{path} must list models, each with its dataset_id and note: {e}') from e


def build(job: Job, folder: Path) -> nn.Module:
    """Put together in a folder what is to be pushed.

    Returns:
        The model, in eval mode.

    Raises:
        OSError: If a file cannot be read.
        ValueError: If there is no model, or it is damaged.
    """
    if not job.folder.is_dir():
        raise ValueError(f'there is no folder {job.folder}.')
    for name in _PUBLISHED:
        if (job.folder / name).is_file():
            shutil.copyfile(job.folder / name, folder / name)
    run = Run.read(job.folder, job.dataset_id, job.note)
    if run.args:
        (folder / 'args.yaml').write_text(yaml.safe_dump(run.args))
    if job.model:
        try:
            save_for_hf(timm.create_model(job.model, pretrained=True), folder, safe_serialization=True)
        except RuntimeError as e:
            raise ValueError(f'{job.model} cannot be loaded: {e}') from e
    _drop_num_classes(folder / 'config.json')
    try:
        model = load_folder(folder)
    except ValueError as e:
        raise ValueError(str(e).replace(str(folder), str(job.folder))) from e
    if model.num_classes == 0:
        raise ValueError(f'the model in {job.folder} has no classifier (num_classes=0): push it with one.')
    if not torch.isfinite(_logits(model)).all():
        raise ValueError(f'the model in {job.folder} puts out numbers that are not finite.')
    if (folder / 'README.md').exists():  # one that its author has written is better
        if job.license or job.dataset_id:
            raise ValueError(
                f'{job.folder / "README.md"} is the card already: write license and data into it, in place of '
                '--license and --dataset-id.')
    else:
        license = job.license or model.pretrained_cfg.get('license') or 'apache-2.0'
        files = sorted(file.name for file in folder.iterdir())
        try:
            card = model_card(model, run, f'hf-hub:{job.repo_id}', files, license)
        except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as e:  # of values that no run writes
            raise ValueError(
                f'the record of the run in {job.folder} (args.yaml, summary.csv, validation.csv) is damaged: '
                f'{type(e).__name__} {e}.') from e
        card.save(folder / 'README.md')
    return model


def _drop_num_classes(path: Path) -> None:
    # timm 1.0.31 says it twice, and transformers 5.23 passes both on to one function
    try:
        config = json.loads(path.read_text())
        if config['model_args']['num_classes'] == config['num_classes']:
            del config['model_args']['num_classes']
            path.write_text(json.dumps(config, indent=2))
    except (OSError, ValueError, TypeError, KeyError):
        return  # whoever loads it says what is wrong


def show(job: Job, folder: Path) -> None:
    """Print what is in the folder."""
    files = sorted(folder.iterdir())
    print(f'{job.repo_id}: {sum(file.stat().st_size for file in files) / 1e6:,.2f} MB')
    for file in files:
        print(f'  {file.stat().st_size:>12,}  {file.name}')


@torch.inference_mode()
def _logits(model: nn.Module) -> torch.Tensor:
    shape = timm.data.resolve_model_data_config(model)['input_size']
    return model(torch.randn(2, *shape, generator=torch.Generator().manual_seed(0)))


def push(job: Job, folder: Path, model: nn.Module, private: bool, revision: Optional[str], create_pr: bool) -> None:
    """Push a folder that `build` has made, load it back, and compare.

    Args:
        job: See there.
        folder: The folder.
        model: What is in it.
        private: Make a new repository private.
        revision: Branch, or None for main.
        create_pr: Open a pull request instead.

    Raises:
        OSError: If the Hub refuses, or cannot be reached.
        ValueError: If what comes back is not what was pushed.
    """
    api = HfApi(library_name='timm-dresnet')
    repo = f'{constants.ENDPOINT}/{job.repo_id}'
    try:
        _try(api.whoami)
        if not create_pr:
            _try(lambda: api.create_repo(job.repo_id, private=private, exist_ok=True))
            if revision:
                _try(lambda: api.create_branch(job.repo_id, branch=revision, exist_ok=True))
        before = _try(lambda: api.model_info(job.repo_id, revision=revision))
        commit = _try(lambda: _commit(api, job.repo_id, folder, revision, create_pr), not create_pr)
    except (httpx2.HTTPError, OSError, RuntimeError) as e:
        raise OSError(_explain(e, job.repo_id, create_pr)) from e
    if commit.oid == before.sha:
        print(f'{repo} holds this already: nothing was changed.')
    else:
        print(f'Pushed to {commit.pr_url or commit.commit_url}')

    # from the commit itself: branches may have moved on
    with tempfile.TemporaryDirectory(prefix='hub-cache-') as cache:
        try:
            loaded = _try(lambda: timm.create_model(
                f'hf-hub:{job.repo_id}@{commit.oid}', pretrained=True, cache_dir=cache))
        except (httpx2.HTTPError, OSError, RuntimeError) as e:
            raise OSError(f'{repo} is complete, but could not be loaded back: {_explain(e, job.repo_id)}') from e
        except Exception as e:  # whatever a damaged file makes timm and safetensors raise
            raise ValueError(f'{repo} cannot be loaded: {e}. Push it again.') from e
    if not torch.allclose(_logits(loaded.eval()), _logits(model), rtol=1e-4, atol=1e-5):
        raise ValueError(f'{repo} is not what was pushed: its logits are others. Push it again.')
    branch = revision or commit.pr_revision
    name = f'{job.repo_id}@{branch}' if branch else job.repo_id
    print(f"Loaded back, with equal logits: timm.create_model('hf-hub:{name}', pretrained=True)")


def _commit(api: HfApi, repo_id: str, folder: Path, revision: Optional[str], create_pr: bool) -> Any:
    # not api.upload_folder, which may make several commits
    head = api.model_info(repo_id, revision=revision)
    left_over = {file.rfilename for file in head.siblings} & set(_PUBLISHED) - {file.name for file in folder.iterdir()}
    return api.create_commit(
        repo_id,
        operations=[
            *(CommitOperationAdd(file.name, file) for file in sorted(folder.iterdir())),
            *(CommitOperationDelete(name) for name in sorted(left_over)),
        ],
        commit_message='Upload model with timm-dresnet',
        revision=revision,
        create_pr=create_pr,
        parent_commit=head.sha,
    )


def _try(request: Callable[[], Any], again_after_loss: bool = True) -> Any:
    """Make a request, and make it again if it fails for a reason that may pass.

    Args:
        request: Makes it.
        again_after_loss: Whether it may be made twice, when it is not known if it had its effect.
    """
    for wait in (*_WAITS, None):
        try:
            return request()
        except (httpx2.HTTPError, OSError, RuntimeError) as e:
            cause = e.__cause__ if isinstance(e, RuntimeError) else e  # of an upload
            status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
            lost = isinstance(cause, (httpx2.TransportError, ConnectionError)) or status in (500, 502, 503, 504)
            lost = lost and not isinstance(cause, OfflineModeIsEnabled)
            if wait is None or not (lost and again_after_loss or status in (412, 429)):
                raise
            if status:
                after = cause.response.headers.get('Retry-After', '')
                wait = max(wait, int(after)) if after.isdigit() else wait
            print(f'The Hub {f"answers {status}" if status else "does not answer"}: trying again in {wait} s.')
            time.sleep(wait)


def _explain(error: Exception, repo_id: str, create_pr: bool = False) -> str:
    """One sentence: what was wrong, and what to do."""
    if isinstance(error, RuntimeError) and error.__cause__ is not None:
        error = error.__cause__
    hub = constants.ENDPOINT
    if isinstance(error, LocalTokenNotFoundError):
        return 'there is no token: log in with `hf auth login`, set HF_TOKEN, or give --token-file.'
    if isinstance(error, RepositoryNotFoundError):
        return f'{hub} does not show {repo_id} to this token: there is none, it is gone, or the name is taken.'
    if isinstance(error, RevisionNotFoundError):
        return f'{repo_id} has no such revision.'
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        said = error.server_message or error.response.reason_phrase
        if status == 401:
            return f'{hub} does not accept this token: make one that may write, at {hub}/settings/tokens.'
        if status == 403:
            return f'this token may not write to {repo_id} ({said}): take another token, or another repository.'
        if status == 409:
            return f'{repo_id} cannot be made ({said}): take another name.'
        if status == 412:
            return f'others keep pushing to {repo_id}: push again when they have finished.'
        if status == 429 or status >= 500:
            return f'{hub} still answers {status} ({said}): try again later.' + _unknown(create_pr, hub, repo_id)
        return f'{hub} answers {status} for {error.response.url.path}: {said}.'
    if isinstance(error, httpx2.TransportError):
        return (f'{hub} cannot be reached ({type(error).__name__}: {error}): look at the connection, and try again.'
                + _unknown(create_pr, hub, repo_id))
    return str(error)


def _unknown(create_pr: bool, hub: str, repo_id: str) -> str:
    return f' If a pull request was opened, it is at {hub}/{repo_id}/discussions.' if create_pr else ''

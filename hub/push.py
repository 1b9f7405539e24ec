"""`python -m hub.push`: the folder of a model becomes a repository on the Hugging Face Hub, in one commit."""
import argparse
import os
import sys
import tempfile
from pathlib import Path
from typing import List, Optional


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m hub.push',
        description='Push what python -m train has left to the Hugging Face Hub, and load it back to see that it is '
                    'the same.',
        epilog='example: python -m hub.push output/digits --repo-id me/dresnet20-digits --dry-run',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('folder', nargs='?', type=Path, metavar='OUTPUT_FOLDER',
                        help='folder with model.safetensors and config.json, of a run or of timm.models.save_for_hf')
    parser.add_argument('--repo-id', metavar='USER/NAME', help='repository, made if there is none')
    parser.add_argument('--zoo', type=Path, metavar='FILE',
                        help='push all models that this YAML file lists, such as hub/zoo.yaml, in place of one folder')
    parser.add_argument('--namespace', metavar='USER', help='with --zoo, whose the repositories are')
    parser.add_argument('--license', metavar='ID', help="of the weights (if not set, the model's own, or apache-2.0)")
    parser.add_argument('--dataset-id', metavar='ID', help='the training data on the Hub, such as uoft-cs/cifar10')
    parser.add_argument('--private', action='store_true', help='make a new repository private')
    parser.add_argument('--revision', metavar='BRANCH', help='branch, made if there is none (main if not set)')
    parser.add_argument('--create-pr', action='store_true', help='open a pull request instead')
    parser.add_argument('--endpoint', metavar='URL', help='of another Hub')
    parser.add_argument('--token-file', type=Path, metavar='FILE',
                        help='file that holds a token (if not set, HF_TOKEN or that of `hf auth login`)')
    parser.add_argument('--dry-run', action='store_true', help='show what would be pushed, and end')
    args = parser.parse_args(argv)
    if args.zoo:
        if args.folder or args.repo_id or args.license or args.dataset_id:
            parser.error('--zoo comes without a folder, --repo-id, --license and --dataset-id: the file says these.')
        if not args.namespace:
            parser.error('--zoo needs --namespace: whose repositories are they?')
    elif not args.folder or not args.repo_id:
        parser.error('name a folder and a repository: python -m hub.push OUTPUT_FOLDER --repo-id USER/NAME')
    elif args.namespace:
        parser.error('--namespace goes with --zoo.')
    if args.create_pr and args.revision:
        parser.error('--create-pr opens its pull request against main: leave --revision out.')

    if args.endpoint:
        if not args.endpoint.startswith(('http://', 'https://')):
            parser.error(f'--endpoint {args.endpoint} must start with https:// or http://.')
        os.environ['HF_ENDPOINT'] = args.endpoint  # read when huggingface_hub is imported, so not before
    try:
        if args.token_file:
            os.environ['HF_TOKEN'] = _read_token(args.token_file)
        from . import repository
        jobs = repository.read_zoo(args.zoo, args.namespace) if args.zoo else [
            repository.Job(args.folder, args.repo_id, license=args.license, dataset_id=args.dataset_id)]
        for job in jobs:
            with tempfile.TemporaryDirectory(prefix='hub-push-') as name:
                model = repository.build(job, Path(name))
                repository.show(job, Path(name))
                if args.dry_run:
                    print('Nothing was pushed.')
                else:
                    repository.push(job, Path(name), model, args.private, args.revision, args.create_pr)
    except (OSError, ValueError) as e:
        sys.exit(f'python -m hub.push: error: {" ".join(str(e).split())}')


def _read_token(path: Path) -> str:
    token = path.read_text().strip()
    if not token.isascii() or len(token.split()) != 1:
        raise ValueError(f'{path} does not hold a token: it must be the only word in it, in ASCII.')
    return token


if __name__ == '__main__':
    main()

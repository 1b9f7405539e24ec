"""`python -m hub.package`: the weights of a run become part of the package, in half precision."""
import argparse
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import List, Optional

import torch
import yaml
from safetensors.torch import save
from timm_dresnet.folders import atomic_folder, load_folder

from .cards import PICTURES, TABLES, ZOO, Run

WEIGHTS = Path(__file__).parents[1] / 'timm_dresnet/weights'


def package(folder: Path, tag: str) -> None:
    """Write a model's weights to the package, an entry in its manifest, and the record of its run to `hub/zoo`.

    Args:
        folder: What a run has left.
        tag: Model name and tag, such as 'test_dresnet.c10'.

    Raises:
        OSError: If a file cannot be read or written.
        ValueError: If the folder does not hold such a model, half precision cannot hold its weights, or the record of
            its run is damaged.
    """
    model = load_folder(folder)
    architecture = model.pretrained_cfg['architecture']
    if not re.fullmatch(rf'{architecture}\.\w+', tag):
        raise ValueError(
            f'{folder} holds a {architecture}: give its tag as {architecture}.RECIPE_DATASET, not {tag!r}.')
    run = Run.read(folder)
    weights = {name: w.half() if w.is_floating_point() else w for name, w in model.state_dict().items()}
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise ValueError(f'{name} in {folder} has values that half precision cannot hold.')

    data = save(weights)
    manifest = WEIGHTS / 'manifest.json'
    entries = json.loads(manifest.read_text()) if manifest.exists() else {}
    entries[f'{tag}.safetensors'] = {'size': len(data), 'sha256': hashlib.sha256(data).hexdigest()}
    WEIGHTS.mkdir(exist_ok=True)
    with atomic_folder(WEIGHTS) as new:
        (new / f'{tag}.safetensors').write_bytes(data)
        (new / manifest.name).write_text(json.dumps(entries, indent=2, sort_keys=True) + '\n')

    record = ZOO / tag
    record.mkdir(parents=True, exist_ok=True)
    for name in (*TABLES, *PICTURES):
        (record / name).unlink(missing_ok=True)
        if name != 'validation.csv' and (folder / name).exists():  # that is of the weights before they were rounded
            shutil.copyfile(folder / name, record / name)
    if run.args:
        (record / 'args.yaml').write_text(yaml.safe_dump(run.args))


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m hub.package', description='Put the weights of a run into timm_dresnet/weights.',
        epilog='example: python -m hub.package output/test_dresnet test_dresnet.c10')
    parser.add_argument('folder', type=Path, metavar='OUTPUT_FOLDER', help='what python -m train has left')
    parser.add_argument('tag', metavar='MODEL.TAG', help='model name and tag')
    args = parser.parse_args(argv)
    try:
        package(args.folder, args.tag)
    except (OSError, ValueError) as e:
        sys.exit(f'python -m hub.package: error: {" ".join(str(e).split())}')
    data_arguments = Run.read(ZOO / args.tag).data_arguments
    print(f"""Wrote timm_dresnet/weights/{args.tag}.safetensors and hub/zoo/{args.tag}. What is left to do:
  * name {args.tag} in default_cfgs of its model file, with file=packaged_file({args.tag!r}) and what config.json of the
    run says of input_size, mean, std, interpolation, crop_pct and label_names, and in hub/zoo.yaml
  * measure it: python -m train.validate {args.tag} {data_arguments} --csv hub/zoo/{args.tag}/validation.csv
  * write the card of all, and their accuracies into the package: python -m hub.cards""")


if __name__ == '__main__':
    main()

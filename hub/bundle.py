"""`python -m hub.bundle`: put the weights of a run into the package, in half precision."""
import argparse
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path
from typing import List, Optional

import timm
import torch
from safetensors.torch import save

from timm_dresnet.folders import atomic_folder, load_folder

from .cards import PICTURES, TABLES, ZOO, Run, copy_record

WEIGHTS = Path(__file__).parents[1] / 'timm_dresnet/weights'


def bundle(folder: Path, tag: str) -> Run:
    """Write weights into the package and their hash into its manifest, and copy the run's files to `hub/zoo`.

    Raises:
        ValueError: If the folder holds no such model, or one that its name alone does not make (pruned, fused), or a
            damaged file, or weights that overflow in half precision.
    """
    model = load_folder(folder)
    architecture = model.pretrained_cfg['architecture']
    if not re.fullmatch(rf'{architecture}\.\w+', tag):
        raise ValueError(
            f'{folder} holds a {architecture}: give its tag as {architecture}.RECIPE_DATASET, not {tag!r}.')
    images = torch.randn(2, *model.pretrained_cfg['input_size'])
    made = timm.create_model(architecture, num_classes=model.num_classes, in_chans=images.shape[1]).eval()
    try:
        made.load_state_dict(model.state_dict())
        with torch.inference_mode():
            torch.testing.assert_close(made(images), model(images))
    except (AssertionError, RuntimeError) as e:
        raise ValueError(f"{folder} holds another network than timm.create_model('{architecture}') makes: one that was "
                         'pruned, fused or made with other arguments.') from e
    run = Run.read(folder)
    weights = {name: w.half() if w.is_floating_point() else w for name, w in model.state_dict().items()}
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise ValueError(f'{name} in {folder} has values that half precision cannot hold.')

    data = save(weights)
    manifest = WEIGHTS / 'manifest.json'
    entries = json.loads(manifest.read_text())
    entries[f'{tag}.safetensors'] = {'sha256': hashlib.sha256(data).hexdigest()}
    with atomic_folder(WEIGHTS) as new:
        (new / f'{tag}.safetensors').write_bytes(data)
        (new / manifest.name).write_text(json.dumps(entries, indent=2, sort_keys=True) + '\n')

    record = ZOO / tag
    if record.exists():
        shutil.rmtree(record)
    record.mkdir(parents=True)
    # validation.csv is of the weights in full precision
    copy_record(run, folder, record, [name for name in (*TABLES, *PICTURES) if name != 'validation.csv'])
    return run


def main(argv: Optional[List[str]] = None) -> None:
    parser = argparse.ArgumentParser(
        prog='python -m hub.bundle', description='Put the weights of a run into timm_dresnet/weights.',
        epilog='example: python -m hub.bundle output/test_dresnet test_dresnet.c10')
    parser.add_argument('folder', type=Path, metavar='OUTPUT_FOLDER', help='folder of the run')
    parser.add_argument('tag', metavar='MODEL.TAG', help='model name and tag')
    args = parser.parse_args(argv)
    try:
        run = bundle(args.folder, args.tag)
    except (OSError, ValueError) as e:
        sys.exit(f'python -m hub.bundle: error: {" ".join(str(e).split())}')
    print(f"""Wrote timm_dresnet/weights/{args.tag}.safetensors and hub/zoo/{args.tag}. What is left to do:
  * name {args.tag} in hub/zoo.yaml, and in default_cfgs of its model file, with file=packaged_file({args.tag!r}) and
    num_classes, input_size, mean, std, interpolation, crop_pct and label_names from config.json of the run
  * measure it: python -m train.validate {args.tag} {run.data_arguments} --csv hub/zoo/{args.tag}/validation.csv
  * write its accuracy into timm_dresnet/weights/results.csv and MODEL_CARD.md""")


if __name__ == '__main__':
    main()

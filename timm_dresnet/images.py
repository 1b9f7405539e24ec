"""From image files to names of classes."""
import logging
import os
import re
import warnings
from pathlib import Path
from typing import Any, Dict, Iterable, List, Mapping

import numpy as np
import torch
import torch.nn as nn
from PIL import ExifTags, Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config

_logger = logging.getLogger(__name__)
_UPRIGHT = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180, 4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90}
SUFFIXES = {'.avif', '.bmp', '.gif', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp'}


def find_images(paths: Iterable[str]) -> List[str]:
    """List image files: those named, and those in folders.

    Raises:
        ValueError: If a folder has none.
    """
    found = []
    for path in paths:
        if os.path.isdir(path):
            files: List[Path] = []
            seen = set()  # a link may lead into a folder that it lies in
            for folder, folders, names in os.walk(path, followlinks=True):
                if os.path.realpath(folder) in seen:
                    folders.clear()
                    continue
                seen.add(os.path.realpath(folder))
                files += (Path(folder, name) for name in names)
            inside = sorted(str(file) for file in files if file.suffix.lower() in SUFFIXES)
            if not inside:
                raise ValueError(f'There are no images in {path}.')
            found += inside
        else:
            found.append(path)
    return found


def convert_image(image: Image.Image, mode: str) -> Image.Image:
    """Turn an image upright, as viewers do, and convert it to a mode. PIL alone would clip 16 bits at 255.

    Of floating point, images in the range from 0 to 1 are scaled.
    """
    image.load()  # which turns a TIFF, and takes its orientation away
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # whatever damaged tags make PIL raise, which reads the image without them
        orientation = None
    if orientation in _UPRIGHT:  # ImageOps.exif_transpose fails where it cannot write the other EXIF tags again
        image = image.transpose(_UPRIGHT[orientation])
    if image.mode.startswith('I;16') or image.mode == 'I' and np.asarray(image).max() > 255:
        image = image.convert('I').point(lambda value: value * (1 / 256)).convert('L')
    if image.mode == 'F' and np.asarray(image).max() <= 1:
        image = image.point(lambda value: value * 255 + 0.5)
    return image.convert(mode)


def label_names(cfg: Mapping[str, Any], num_classes: int) -> List[str]:
    """Names of the classes in a pretrained config, in order; none if they are those of another classifier."""
    names = cfg.get('label_names') or ()
    if isinstance(names, dict):  # by index, some of which may be left out
        names = [names.get(str(i), names.get(i, f'class {i}')) for i in range(num_classes)]
    return [str(name) for name in names] if len(names) == num_classes else []


class Classifier:
    """A model with its preprocessing and the names of its classes, `labels`."""

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: A model of timm, in eval mode, for images of one channel or three.

        Raises:
            ValueError: If it takes other images.
        """
        cfg: Dict[str, Any] = model.pretrained_cfg
        config = resolve_model_data_config(model, use_test_size=True)
        channels, modes = config['input_size'][0], {1: 'L', 3: 'RGB'}
        if channels not in modes:
            raise ValueError(f'the model takes images of {channels} channels, and image files have 1 or 3.')
        self.model = model
        self._mode = modes[channels]
        self._transform = create_transform(**config, is_training=False)
        names, subset = label_names(cfg, model.num_classes), infer_imagenet_subset(model)
        if names:
            descriptions = cfg.get('label_descriptions') or {}
            if all(re.fullmatch(r'n\d{8}', name) for name in names):  # as in ImageNet and its subsets
                imagenet: Any = ImageNetInfo().label_descriptions(as_dict=True)
                descriptions = {**imagenet, **descriptions}
            self.labels = [descriptions.get(name, name) for name in names]
        elif subset:
            self.labels = list(ImageNetInfo(subset).label_descriptions())
        else:
            self.labels = [f'class {i}' for i in range(model.num_classes)]

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """Make the model's input of an image, `[C, H, W]`."""
        pixels: torch.Tensor = self._transform(convert_image(image, self._mode))
        return pixels

    def read(self, path: str) -> torch.Tensor:
        """Read an image file and preprocess it.

        Raises:
            ValueError: If there is no such file, or it cannot be read as an image.
        """
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('error', Image.DecompressionBombWarning)
                with Image.open(path) as image:
                    return self.preprocess(image)
        except FileNotFoundError as e:
            raise ValueError(f'There is no file {path!r}.') from e
        except Exception as e:  # damaged files make PIL raise nearly anything
            raise ValueError(f'{path!r} cannot be read as an image ({type(e).__name__}).') from e

    def read_sample(self, paths: Iterable[str], size: int) -> torch.Tensor:
        """Read up to ``size`` of the images in files and folders, evenly spread, as a batch.

        One that cannot be read is logged and left out.

        Raises:
            ValueError: If there are none.
        """
        found, images = find_images(paths), []
        step = max(1, len(found) / size)
        for i in range(min(len(found), size)):
            try:
                images.append(self.read(found[int(i * step)]))
            except ValueError as e:
                _logger.warning(e)
        if not images:
            raise ValueError('There is no image to measure on.')
        return torch.stack(images)

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, top: int = 5) -> List[List[Dict[str, Any]]]:
        """Classify a batch.

        Args:
            images: Preprocessed, `[B, C, H, W]`.
            top: Number of classes to name.

        Returns:
            For each image its best classes, best first: ``label``, ``index`` and ``probability``.

        Raises:
            ValueError: If the model has no classes, or puts out numbers that are not finite.
        """
        if not self.model.num_classes:
            raise ValueError('the model has no classes to choose from: its num_classes is 0.')
        logits = self.model(images)
        if not logits.isfinite().all():
            raise ValueError('the model puts out numbers that are not finite: its weights are damaged.')
        best = logits.softmax(dim=1).topk(min(top, self.model.num_classes))
        return [
            [dict(label=self.labels[i], index=i, probability=value) for value, i in zip(values, indices)]
            for values, indices in zip(best.values.tolist(), best.indices.tolist())
        ]

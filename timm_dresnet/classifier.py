"""A model with what stands before and after it: from images to names of classes."""
import re
from typing import Any, Dict, List

import torch
import torch.nn as nn
from PIL import Image, ImageOps
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config

__all__ = ['Classifier', 'convert_image']


def convert_image(image: Image.Image, mode: str) -> Image.Image:
    """Convert a picture to a mode of PIL, those of 16 bits too, which PIL would cut off at 255."""
    if image.mode.startswith('I'):
        image = image.point(lambda value: value * (1 / 256)).convert('L')
    return image.convert(mode)


class Classifier:
    """Says what images show.

    Attributes:
        model: The model.
        labels: Names of its classes.
    """

    def __init__(self, model: nn.Module) -> None:
        """
        Args:
            model: A model of timm, in evaluation mode, for images of one channel or three.

        Raises:
            ValueError: If it takes other images, or has no classes.
        """
        cfg, config = model.pretrained_cfg, resolve_model_data_config(model, use_test_size=True)
        self.model = model
        channels, modes = config['input_size'][0], {1: 'L', 3: 'RGB'}
        if channels not in modes:
            raise ValueError(f'the model takes images of {channels} channels, which pictures do not have.')
        if not model.num_classes:
            raise ValueError('the model has no classes to choose from: its num_classes is 0.')
        self._mode = modes[channels]
        self._transform = create_transform(**config, is_training=False)
        names, subset = cfg.get('label_names'), infer_imagenet_subset(model)
        if isinstance(names, dict):  # by index, some of which may be left out
            names = [names.get(str(i), names.get(i, f'class {i}')) for i in range(model.num_classes)]
        if names and len(names) == model.num_classes:  # and not those of weights whose classifier was replaced
            descriptions = cfg.get('label_descriptions') or {}
            if all(re.fullmatch(r'n\d{8}', name) for name in names):  # as in ImageNet and its subsets
                descriptions = {**ImageNetInfo().label_descriptions(as_dict=True), **descriptions}
            self.labels = [descriptions.get(name, name) for name in names]
        elif subset:
            self.labels = ImageNetInfo(subset).label_descriptions()
        else:
            self.labels = [f'class {i}' for i in range(model.num_classes)]

    def preprocess(self, image: Image.Image) -> torch.Tensor:
        """What the model takes of a picture, turned upright, `[C, H, W]`."""
        return self._transform(convert_image(ImageOps.exif_transpose(image), self._mode))

    @torch.inference_mode()
    def __call__(self, images: torch.Tensor, top: int = 5) -> List[List[Dict[str, Any]]]:
        """Classify a batch.

        Args:
            images: Preprocessed, `[B, C, H, W]`.
            top: Number of classes to name.

        Returns:
            For each image its best classes, best first: ``label``, ``index`` and ``probability``.

        Raises:
            ValueError: If the model puts out numbers that are not finite.
        """
        logits = self.model(images)
        if not logits.isfinite().all():
            raise ValueError('the model puts out numbers that are not finite: its weights are damaged.')
        best = logits.softmax(dim=1).topk(min(top, self.model.num_classes))
        return [
            [dict(label=self.labels[i], index=i, probability=value) for value, i in zip(values, indices)]
            for values, indices in zip(best.values.tolist(), best.indices.tolist())
        ]

"""A web page that classifies an image, shows which connections carried it, and switches connections off."""
import copy
from functools import lru_cache
from typing import Any, Dict, List, Optional, Tuple

import gradio as gr
import timm
import torch
from matplotlib.figure import Figure
from PIL import Image

import timm_dresnet
from timm_dresnet.images import Classifier

MODELS = [
    name for name in timm.list_pretrained(['*dresnet*', '*adaresnet*']) if timm.get_pretrained_cfg(name).file]
_ABOUT = """# Learned skip connections
Drop an image. Each model says what it shows, and the arcs show which of its learned connections carried it: the wider,
the larger its share of the sum it is added to. Switch connections off, and see what changes."""


@lru_cache(maxsize=None)
def load(name: str) -> torch.nn.Module:
    """Create a model with its weights, once."""
    return timm.create_model(name, pretrained=True).eval()


def connection_names(name: str) -> Dict[str, Dict[str, Any]]:
    """Records of a model's connections, by their names on the page."""
    return {
        f'{record["source_name"]} → {record["target_name"]}' if 'source' in record
        else f'past {record["target_name"]}': record
        for record in timm_dresnet.connections(load(name))}


def switch_off(name: str, off: List[str]) -> torch.nn.Module:
    """Copy a model and switch some of its connections off."""
    model, records = copy.deepcopy(load(name)), connection_names(name)
    if isinstance(model, timm_dresnet.DResNet):
        model.prune_connections([(records[key]['target'], records[key]['source']) for key in off])
    else:
        for key in off:
            model.get_submodule(records[key]['target_name']).skip_weight.alpha.data.zero_()
    return model


def classify(image: Optional[Image.Image], name: str, on: List[str]) -> Tuple[Optional[Dict[str, float]], str, Figure]:
    """Classify an image with some connections switched on.

    Returns:
        The best classes and their probabilities, what the connections that are off change, and the arcs.
    """
    off = [key for key in connection_names(name) if key not in on]
    model = switch_off(name, off)
    if image is None:
        return None, '', timm_dresnet.plot_arcs(model)
    classifier = Classifier(model)
    batch = classifier.preprocess(image)[None]
    classes, = classifier(batch)
    change = ''
    if off:
        before, = Classifier(load(name))(batch, top=1)
        change = (f'All connections: **{before[0]["label"]}**, {100 * before[0]["probability"]:.1f} %. '
                  f'Without {len(off)}: **{classes[0]["label"]}**, {100 * classes[0]["probability"]:.1f} %.')
    best = {c['label']: c['probability'] for c in classes}
    return best, change, timm_dresnet.plot_arcs(model, images=batch)


def create_page() -> gr.Blocks:
    """Create the page, with two models side by side."""
    with gr.Blocks(title='timm-dresnet', analytics_enabled=False) as page:
        gr.Markdown(_ABOUT)
        image = gr.Image(type='pil', label='Image', height=240)
        with gr.Row():
            for number, name in enumerate(('dresnet18.tiny_in', 'test_dresnet.c10'), start=1):
                with gr.Column():
                    model = gr.Dropdown(MODELS, value=name, label=f'Model {number}')
                    best = gr.Label(num_top_classes=5, label='What it shows')
                    change = gr.Markdown()
                    arcs = gr.Plot(show_label=False)
                    names = list(connection_names(name))
                    on = gr.CheckboxGroup(names, value=names, label='Connections that are on')
                shown = [best, change, arcs]

                def switch_all_on(name: str) -> Any:
                    names = list(connection_names(name))
                    return gr.CheckboxGroup(names, value=names)

                for event in (image.change, on.input, page.load, model.change(switch_all_on, model, on).then):
                    event(classify, [image, model, on], shown, show_progress='hidden')
    return page


if __name__ == '__main__':
    create_page().launch()

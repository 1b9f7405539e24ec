"""The web page of hub/space: what it computes, and the page in a headless browser."""
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from hub.space import app


@pytest.fixture(scope='module')
def image():
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))


@pytest.mark.parametrize('name', ['test_dresnet.c10', 'test_adaresnet.c10'])
@torch.no_grad()
def test_switching_off(image, name):
    names = list(app.connection_names(name))
    best, change, _ = app.classify(image, name, names)
    model = timm.create_model(name, pretrained=True).eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    batch = transform(image)[None]
    assert change == ''
    assert list(best.values()) == pytest.approx(model(batch).softmax(1)[0].topk(5).values.tolist(), rel=1e-4)

    best, change, _ = app.classify(image, name, names[1:])
    if name == 'test_dresnet.c10':
        model.connections['layer2'].gates['3'].weight.data.fill_(-1e4)  # a gate of 0
    else:
        model.layer1[0].skip_weight.alpha.data.zero_()
    assert 'Without 1' in change
    assert list(best.values()) == pytest.approx(model(batch).softmax(1)[0].topk(5).values.tolist(), rel=1e-4)
    assert app.classify(None, name, names)[0] is None
    assert len(app.connection_names(name)) == len(names)  # all are on again


CHROMIUM = shutil.which('chromium') or shutil.which('chromium-browser')


@pytest.mark.skipif(not CHROMIUM, reason='no chromium here (apt install chromium)')
def test_page_in_a_browser(image, tmp_path):
    sync_api = pytest.importorskip('playwright.sync_api')
    image.resize((200, 160)).save(tmp_path / 'image.png')
    server = app.create_page()
    _, url, _ = server.launch(prevent_thread_lock=True, quiet=True)
    try:
        with sync_api.sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=['--no-sandbox'])
            page = browser.new_page(viewport=dict(width=1300, height=1500))
            errors = []
            page.on('pageerror', lambda error: errors.append(str(error)))  # playwright marks what it is given
            page.goto(url)
            page.set_input_files('input[type=file]', str(tmp_path / 'image.png'))
            page.wait_for_selector('text=%', timeout=60_000)
            boxes = page.locator('input[type=checkbox]')
            assert boxes.count() == 31 and all(boxes.nth(i).is_checked() for i in range(31))
            boxes.nth(0).uncheck()
            page.wait_for_selector('text=Without 1', timeout=60_000)
            page.get_by_label('Model 1').click()
            page.get_by_role('option', name='test_dresnet.c10').click()
            page.wait_for_function('document.querySelectorAll("input[type=checkbox]").length == 20', timeout=60_000)
            page.wait_for_function("""(() => {
                const shown = [...document.querySelectorAll(".output-class")].map(e => e.innerText);
                return shown.length == 2 && shown[0] == shown[1] && !document.body.innerText.includes("Without 1")
            })()""", timeout=60_000)
            assert not errors
            browser.close()
    finally:
        server.close()

"""The README's Python example, run as it stands but for its paths, with Lightning made unimportable."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import BertModel

from tests.support.tiny import text_folder, tiny_folder, tiny_pipeline, tiny_unet

ROOT = Path(__file__).parents[1]


def test_the_example_attributes_an_image_without_lightning(tmp_path: Path) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(code) == 1
    unet = tiny_unet()
    with torch.no_grad():  # a random U-Net hardly listens to its text: make it, or no step can raise a loss by 20 %
        for name, parameter in unet.named_parameters():
            if ".attn2.to_out.0.weight" in name:
                parameter.mul_(30.0)
    pipeline = tiny_pipeline(tmp_path / "pipeline", unet=unet)
    BertModel.from_pretrained(text_folder(pipeline)).save_pretrained(pipeline / "text_encoder")
    (pipeline / "text_encoder" / "source.json").unlink()
    images = tiny_folder(tmp_path / "images")
    Image.open(next((images / "train").glob("*.png"))).save(tmp_path / "generated.png")
    example = code[0].replace("path/to/pipeline", str(pipeline)).replace("path/to/images", str(images))
    # A random model's loss cannot be doubled by any step: a smaller one is taken here.
    smaller = 'method="abu_plus", options=AttributionOptions(settings={"unlearning.relative_loss_increase": 0.2})'
    example = example.replace('method="abu_plus"', smaller).replace("import ", "import AttributionOptions, ", 1)
    blocked = "import sys\nsys.modules['lightning'] = sys.modules['pytorch_lightning'] = None\n"
    done = subprocess.run(
        [sys.executable, "-c", blocked + example], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == 10
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)
    assert scores[0] > 0
    assert "a red square" in (tmp_path / "report.html").read_text()

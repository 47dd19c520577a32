"""Models as people have them, in one line each: a ranking, and what the page says of how the model was read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file

from tests.support.original_names import checkpoint_tensors, save_checkpoint
from tests.support.pipelines import stable_diffusion
from tests.support.user_world import FEW, SET, UserWorld, movable_unet
from wherefrom.api import AttributionOptions, attribute_images
from wherefrom.cli import main
from wherefrom.rankings.ranking_file import read_ranking


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("model") / "pipeline", unet=movable_unet())


def kohya_adapter(path: Path, folder: Path) -> Path:
    """A LoRA on the keys and values of one block, in kohya's names."""
    unet: Any = DiffusionPipeline.from_pretrained(folder).unet
    random = torch.Generator().manual_seed(1)
    tensors = {}
    for letter in "kv":
        name = f"mid_block.attentions.0.transformer_blocks.0.attn2.to_{letter}"
        out, into = unet.get_submodule(name).weight.shape
        key = "lora_unet_" + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = torch.randn(2, into, generator=random)
        tensors[f"{key}.lora_up.weight"] = torch.randn(out, 2, generator=random)
        tensors[f"{key}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path)
    return path


def sidecars(folder: Path, count: int = 6) -> Path:
    """Images with their captions in text files beside them."""
    folder.mkdir()
    random = np.random.default_rng(0)
    for number in range(count):
        Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"picture number {number}")
    return folder


def words(world: UserWorld) -> list[str]:
    return ["--images", str(world.images), *world.query, *SET]


def test_a_single_file_with_a_kohya_lora_and_sidecars_is_the_pipeline_with_it(
    world: UserWorld, folder: Path, empty: Path
) -> None:
    pytest.importorskip("peft")
    tensors = checkpoint_tensors(DiffusionPipeline.from_pretrained(folder), "sd1")
    file = save_checkpoint(Path("model.safetensors"), tensors)
    unet = {name: value for name, value in tensors.items() if name.startswith("model.")}
    part = save_checkpoint(Path("unet.safetensors"), unet)
    lora = ["--lora", str(kohya_adapter(Path("style.safetensors"), folder))]
    given_images = ["--images", str(sidecars(Path("images"))), *world.query, *SET]
    main(["attribute", "--model", str(folder), *lora, *given_images, "--output", "folder"])
    for name, given in (("file", file), ("part", part)):
        one = ["attribute", "--model", str(given), "--base", str(folder), *lora, *given_images, "--output", name]
        main(one)
        ((ids, scores),) = read_ranking(Path(name)).values()
        ((expected_ids, expected),) = read_ranking(Path("folder")).values()
        assert ids == expected_ids
        assert len(ids) == 6
        assert scores.tolist() == expected.tolist()
    assert "base: " in (Path("file") / "wherefrom.yaml").read_text()
    said = "Not in unet.safetensors, and so the base&#x27;s: vae, text_encoder."
    assert said in (Path("part") / "report.html").read_text()
    assert said not in (Path("file") / "report.html").read_text()


def test_remedies_are_flags_here_and_options_in_python(world: UserWorld, folder: Path, empty: Path) -> None:
    pipeline: Any = DiffusionPipeline.from_pretrained(folder)
    pipeline.unet.save_pretrained("checkpoint-500/unet")
    with pytest.raises(ValueError, match=r"--model: .*checkpoint-500 holds a unet .*was trained from as --base,"):
        main(["attribute", "--model", "checkpoint-500", *words(world)])
    query = [(str(world.generated), "a red square")]
    options = AttributionOptions(settings=FEW, progress=False)
    with pytest.raises(ValueError, match=r"model: .*as AttributionOptions\.base, whose"):
        attribute_images("checkpoint-500", world.images, query, options=options)
    with pytest.raises(ValueError, match=r"is loaded already.*leave out AttributionOptions\.base"):
        attribute_images(pipeline, world.images, query, options=AttributionOptions(base=str(folder)))
    Path("model.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"--model: .*model.ckpt is a pickled checkpoint"):
        main(["attribute", "--model", "model.ckpt", *words(world)])


def test_a_half_precision_pipeline_is_read_and_left_alone(world: UserWorld, folder: Path, empty: Path) -> None:
    pipeline: Any = DiffusionPipeline.from_pretrained(folder, dtype=torch.float16)
    pipeline.save_pretrained("half")
    pipeline.unet.train()
    before = {name: (id(value), value.clone()) for name, value in pipeline.unet.state_dict(keep_vars=True).items()}
    query = [(str(world.generated), "a red square")]
    options = AttributionOptions(settings=FEW, progress=False)
    (scores,) = attribute_images(pipeline, world.images, query, options=options)
    (expected,) = attribute_images("half", world.images, query, options=options)
    assert scores.top(16) == expected.top(16)
    (note,) = scores.notes
    assert "in float32 with a copy of the pipeline's weights" in note
    assert "unet is in float16" in note
    assert "float16" in scores.save_report("page.html").read_text()
    after = pipeline.unet.state_dict(keep_vars=True)
    assert all(id(after[name]) == key and torch.equal(after[name], value) for name, (key, value) in before.items())
    assert all(each.requires_grad for each in pipeline.unet.parameters())
    assert all(module.training for module in pipeline.unet.modules())

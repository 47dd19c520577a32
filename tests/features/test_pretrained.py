"""The encoders of the papers' baselines, on tiny random models saved in their libraries' own formats."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import Dinov2WithRegistersModel, ViTImageProcessor, ViTModel

from tests.support.attribution import HELD_OUT, QUERY, TRAIN
from tests.support.tiny import one_process, tiny_clip, tiny_vision_transformer
from wherefrom.attributors import CaptionSimilarity, ImageSimilarity, TrainingData
from wherefrom.features.pretrained import (
    MappedEncoder,
    OpenCLIPImageEncoder,
    OpenCLIPTextEncoder,
    TransformersImageEncoder,
)
from wherefrom.runtime.artifacts import Store

PIXELS = np.random.default_rng(0).integers(0, 256, (5, 12, 12, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dino_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_vision_transformer(tmp_path_factory.mktemp("dino"))


def test_clip_is_open_clip_with_its_own_preprocessing(clip_folder: Path) -> None:
    encoder = OpenCLIPImageEncoder(str(clip_folder), batch_size=2)
    model, preprocess = open_clip.create_model_from_pretrained(f"local-dir:{clip_folder}")
    model.eval()
    with torch.no_grad():
        expected = torch.cat([model.encode_image(preprocess(Image.fromarray(each))[None]) for each in PIXELS])
    result = encoder.encode_images(PIXELS)
    assert result.shape == (5, 6)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)
    floats = torch.from_numpy(PIXELS).movedim(-1, 1).float() / 127.5 - 1
    torch.testing.assert_close(encoder.encode_images(floats), result)
    assert encoder.identity() == OpenCLIPImageEncoder(str(clip_folder)).identity()
    text = OpenCLIPTextEncoder(str(clip_folder), batch_size=2)
    captions = ["a fox", "a cake", "a fox"]
    with torch.no_grad():
        wanted = model.encode_text(open_clip.get_tokenizer("ViT-B-32", context_length=16)(captions))
    torch.testing.assert_close(text.encode_texts(captions), wanted, rtol=1e-4, atol=1e-5)


def test_a_clip_without_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="'ViT-B-32' is no folder; for a model name of open_clip give `pretrained`"):
        OpenCLIPImageEncoder("ViT-B-32")


@pytest.mark.parametrize("kind", ["dino", "dinov2"])
def test_dino_is_the_class_token_s_state(dino_folder: Path, tmp_path: Path, kind: str) -> None:
    folder = dino_folder if kind == "dino" else tiny_vision_transformer(tmp_path, registers=2)
    model = (ViTModel if kind == "dino" else Dinov2WithRegistersModel).from_pretrained(folder).eval()
    processor = ViTImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        inputs = processor(images=[Image.fromarray(each) for each in PIXELS], return_tensors="pt")
        expected = model(**inputs).last_hidden_state[:, 0]
    result = TransformersImageEncoder(str(folder), batch_size=2).encode_images(PIXELS)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


def test_a_map_is_linear_with_bias(dino_folder: Path, tmp_path: Path) -> None:
    encoder = TransformersImageEncoder(str(dino_folder))
    weight, bias = torch.randn(4, 8), torch.randn(4)
    save_file({"weight": weight, "bias": bias}, tmp_path / "map.safetensors")
    mapped = MappedEncoder(encoder, str(tmp_path / "map.safetensors"))
    expected = encoder.encode_images(PIXELS) @ weight.T + bias
    torch.testing.assert_close(mapped.encode_images(PIXELS), expected, rtol=1e-5, atol=1e-5)
    assert mapped.identity() != encoder.identity()
    save_file({"weight": weight[:, :5].contiguous(), "bias": bias}, tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match=r"narrow\.safetensors maps 5 features, but the encoder gives 8"):
        MappedEncoder(encoder, str(tmp_path / "narrow.safetensors")).encode_images(PIXELS)
    save_file({"kernel": weight}, tmp_path / "wrong.safetensors")
    with pytest.raises(ValueError, match=r"wrong\.safetensors must hold 'weight' \(out, in\) and 'bias' \(out\)"):
        MappedEncoder(encoder, str(tmp_path / "wrong.safetensors"))


def test_image_similarity_is_the_larger_cosine_of_image_and_mirror_image(dino_folder: Path, tmp_path: Path) -> None:
    encoder = TransformersImageEncoder(str(dino_folder))
    data = TrainingData(TRAIN.images, held_out=HELD_OUT.images)
    method = ImageSimilarity(encoder)
    with pytest.raises(ValueError, match="fit must run before score"):
        next(iter(method.score([QUERY])))
    method.fit(data, None, Store(tmp_path), one_process())
    (result,) = method.score([QUERY])
    query = encoder.encode_images(QUERY.pixels[None])
    sides = [encoder.encode_images(p) for p in (TRAIN.images.pixels, TRAIN.images.pixels[:, :, ::-1].copy())]
    expected = torch.stack([torch.nn.functional.cosine_similarity(side, query) for side in sides]).amax(0)
    np.testing.assert_allclose(result.scores, expected.numpy(), rtol=1e-5)
    assert result.null.shape == (len(HELD_OUT),)
    (few,) = method.score([QUERY], [TRAIN.ids[3]])
    assert few.scores[0] == pytest.approx(result.scores[3])
    narrow = torch.ones(2, 8)
    save_file({"weight": narrow, "bias": torch.zeros(2)}, tmp_path / "map.safetensors")
    other = ImageSimilarity(encoder, MappedEncoder(encoder, str(tmp_path / "map.safetensors")))
    other.fit(data, None, Store(tmp_path), one_process())
    with pytest.raises(ValueError, match="The query's features have 2 numbers, those of the images 8"):
        next(iter(other.score([QUERY])))


def test_caption_similarity_takes_a_clip(clip_folder: Path, tmp_path: Path) -> None:
    method = CaptionSimilarity(OpenCLIPTextEncoder(str(clip_folder)))
    method.fit(TrainingData(TRAIN.images), None, Store(tmp_path), one_process())
    (result,) = method.score([QUERY])
    assert result.scores.shape == (len(TRAIN),)
    assert np.isfinite(result.scores).all()

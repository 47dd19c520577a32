"""Frozen feature encoders and their cache."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, BertTokenizer

from wherefrom.data.emoji import STYLES, _draw, _files
from wherefrom.data.image_set import ImageSet, joined_image_sets
from wherefrom.features.base import (
    EfficientNetLite0Encoder,
    MiniLMEncoder,
    caption_features,
    image_features,
    load_by_order,
)
from wherefrom.models.pixels import to_float
from wherefrom.runtime.artifacts import Store


class Affine(nn.Module):
    """Records its input and returns channel means, so that preprocessing can be read off."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.seen = images
        return images.mean((2, 3)) * self.scale


def pixels(count: int, side: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def images(count: int) -> ImageSet:
    return ImageSet(
        ids=tuple(f"p/{index}" for index in range(count)),
        captions=tuple((f"image {index}",) for index in range(count)),
        pixels=pixels(count),
        fingerprint="abc",
    )


@pytest.fixture
def bert(tmp_path) -> MiniLMEncoder:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fox", "a", "red", "house", "on", "the", "hill"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    return MiniLMEncoder(BertModel(config), BertTokenizer(str(tmp_path / "vocab.txt")))


class TestPixels:
    def test_input_is_value_minus_127_over_128_at_the_networks_size(self) -> None:
        encoder = EfficientNetLite0Encoder(Affine(), side=16)
        flat = np.full((1, 8, 8, 3), 255, dtype=np.uint8)
        flat[..., 1], flat[..., 2] = 127, 0
        features = encoder.encode_images(flat)
        assert encoder.model.seen.shape == (1, 3, 16, 16)
        assert torch.allclose(features, torch.tensor([[1.0, 0.0, -127 / 128]]), atol=1e-6)

    def test_upsampling_does_not_leave_the_range_of_an_image(self) -> None:
        encoder = EfficientNetLite0Encoder(Affine(), side=64)
        checkers = np.where((np.indices((8, 8)).sum(0) % 2)[..., None], 255, 0).astype(np.uint8)
        encoder.encode_images(np.broadcast_to(checkers, (1, 8, 8, 3)))
        assert encoder.model.seen.max() == pytest.approx(1.0)
        assert encoder.model.seen.min() == pytest.approx(-127 / 128)

    def test_bytes_floats_and_read_only_arrays_are_the_same_image(self) -> None:
        encoder = EfficientNetLite0Encoder(Affine(), side=16)
        given = pixels(5)
        expected = encoder.encode_images(given)
        given.flags.writeable = False
        assert torch.equal(encoder.encode_images(given), expected)
        assert torch.equal(encoder.encode_images(torch.tensor(given)), expected)
        assert torch.equal(encoder.encode_images(to_float(torch.tensor(given))), expected)

    def test_batches_do_not_matter(self) -> None:
        whole = EfficientNetLite0Encoder(Affine(), side=16, batch_size=7).encode_images(pixels(7))
        single = EfficientNetLite0Encoder(Affine(), side=16, batch_size=1).encode_images(pixels(7))
        assert whole.shape == (7, 3)
        assert torch.allclose(whole, single, atol=1e-6)

    @pytest.mark.parametrize(
        ("given", "message"),
        [
            (torch.full((1, 3, 8, 8), 200.0), r"\[-1, 1\]"),
            (torch.full((1, 3, 8, 8), float("nan")), "finite"),
            (np.zeros((1, 3, 8, 8), dtype=np.uint8), r"\(1, 3, 8, 8\)"),
            (np.zeros((1, 8, 8, 3), dtype=np.int64), "int64"),
        ],
    )
    def test_other_pixels_are_refused(self, given, message) -> None:
        with pytest.raises(ValueError, match=message):
            EfficientNetLite0Encoder(Affine(), side=16).encode_images(given)


class TestEfficientNetLite0:
    def test_published_weights_know_a_concept_in_another_style(self) -> None:
        def drawings(style):
            files = _files(STYLES[style])
            return np.stack([_draw(files[f"{0x1F400 + index:x}"], 32) for index in range(30)])

        def right(a, b):
            # Removing each style's mean: the style itself is not the concept.
            a, b = (nn.functional.normalize(side - side.mean(0), dim=-1) for side in (a, b))
            return int(((a @ b.T).argmax(1) == torch.arange(len(a))).sum())

        encoder = EfficientNetLite0Encoder.from_pretrained()
        twemoji, openmoji = drawings("twemoji"), drawings("openmoji")
        features = encoder.encode_images(twemoji), encoder.encode_images(openmoji)
        assert features[0].shape == (30, 1280)
        assert not features[0].requires_grad
        raw = (to_float(torch.tensor(side)).flatten(1) for side in (twemoji, openmoji))
        assert right(*features) >= 14 > 2 * right(*raw)

    def test_order_of_tensors_is_the_mapping(self) -> None:
        source = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
        source[1].running_mean.normal_()
        target = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2))
        # A file without the batch counters, under other names.
        renamed = {f"other.{name}": t for name, t in source.state_dict().items() if "num_batches" not in name}
        load_by_order(target, renamed)
        for name, tensor in source.state_dict().items():
            assert torch.equal(target.state_dict()[name], tensor), name

    def test_weights_of_another_network_are_refused(self) -> None:
        target = nn.Sequential(nn.Linear(3, 4))
        with pytest.raises(ValueError, match="1 tensors where the network has 2"):
            load_by_order(target, {"weight": torch.zeros(4, 3)})
        with pytest.raises(ValueError, match=r"weight has shape \(3, 4\) where 0.weight needs \(4, 3\)"):
            load_by_order(target, {"weight": torch.zeros(3, 4), "bias": torch.zeros(4)})

    def test_identity_follows_weights_and_size(self) -> None:
        model = Affine()
        identity = EfficientNetLite0Encoder(model, side=16).identity()
        assert identity == EfficientNetLite0Encoder(Affine(), side=16).identity()
        assert identity != EfficientNetLite0Encoder(model, side=32).identity()
        model.scale.data.fill_(2.0)
        assert identity != EfficientNetLite0Encoder(model, side=16).identity()


class TestMiniLM:
    def test_is_the_masked_mean_of_token_states_at_length_one(self, bert) -> None:
        captions = ["fox", "a red house on the hill"]
        vectors = bert.encode_texts(captions)
        for caption, vector in zip(captions, vectors, strict=True):
            ids = torch.tensor([bert.tokenizer(caption)["input_ids"]])
            with torch.no_grad():
                mean = bert.model(ids)[0][0].mean(0)
            assert torch.allclose(vector, mean / mean.norm(), atol=1e-6)

    def test_batches_and_padding_do_not_matter(self, bert) -> None:
        captions = ["fox", "a red house on the hill", "a fox", "the red hill"] * 3
        whole = bert.encode_texts(captions)
        bert.batch_size = 1
        assert torch.allclose(whole, bert.encode_texts(captions), atol=1e-6)

    def test_published_weights_know_what_is_alike(self) -> None:
        fire, flame, penguin = MiniLMEncoder.from_pretrained().encode_texts(["fire", "flame", "penguin"])
        assert fire.shape == (384,)
        assert float(fire @ flame) == pytest.approx(0.80, abs=0.02)
        assert float(fire @ penguin) == pytest.approx(0.30, abs=0.02)

    def test_identity_follows_the_weights(self, bert) -> None:
        before = bert.identity()
        bert.model.embeddings.word_embeddings.weight.data += 1
        assert before["text_encoder"] != bert.identity()["text_encoder"]


class Counting(EfficientNetLite0Encoder):
    """Counts the images that it encoded."""

    done = 0
    fails_after = 10**9

    def encode_images(self, pixels) -> torch.Tensor:
        if self.done >= self.fails_after:
            raise KeyboardInterrupt
        self.done += len(pixels)
        return super().encode_images(pixels)


class TestCache:
    def test_computed_once_and_equal_to_the_encoder(self, tmp_path) -> None:
        encoder, data, store = Counting(Affine(), side=8), images(600), Store(tmp_path)
        first = image_features(data, encoder, store)
        assert encoder.done == 600
        assert torch.equal(image_features(data, encoder, store), first)
        assert encoder.done == 600
        assert torch.allclose(first, EfficientNetLite0Encoder(Affine(), side=8).encode_images(data.pixels))

    def test_goes_on_from_finished_parts(self, tmp_path) -> None:
        data, store = images(600), Store(tmp_path)
        encoder = Counting(Affine(), side=8)
        encoder.fails_after = 512
        with pytest.raises(KeyboardInterrupt):
            image_features(data, encoder, store)
        # Another batch size must not matter: the parts are of fixed size.
        resumed = Counting(Affine(), side=8, batch_size=5)
        features = image_features(data, resumed, store)
        assert resumed.done == 600 - 512
        assert torch.allclose(features, EfficientNetLite0Encoder(Affine(), side=8).encode_images(data.pixels))
        (folder,) = (tmp_path / "image_features").iterdir()
        assert sorted(path.name for path in folder.iterdir()) == ["features.npy", "manifest.json"]

    def test_never_stale(self, tmp_path) -> None:
        encoder, data, store = Counting(Affine(), side=8), images(4), Store(tmp_path)
        first = image_features(data, encoder, store)
        reordered = data.subset([3, 2, 1, 0])
        assert torch.equal(image_features(reordered, encoder, store), first.flip(0))
        encoder.model.scale.data.fill_(2.0)
        assert torch.allclose(image_features(data, encoder, store), 2 * first)

    def test_what_is_known_of_a_part_of_joined_images_is_found_again(self, tmp_path) -> None:
        encoder, store = Counting(Affine(), side=8), Store(tmp_path)
        known, new = images(5), images(7).subset([5, 6])
        image_features(known, encoder, store)
        both = joined_image_sets(known, new)
        result = image_features(both, encoder, store)
        assert encoder.done == 7
        assert torch.allclose(result, EfficientNetLite0Encoder(Affine(), side=8).encode_images(images(7).pixels))
        # Other pixels under a fingerprint of their own are no longer what was joined.
        changed = replace(both, pixels=images(7).pixels[:, ::-1], fingerprint="upside down")
        assert changed.parts == (changed,)
        upside_down = EfficientNetLite0Encoder(Affine(), side=8).encode_images(changed.pixels)
        assert torch.allclose(image_features(changed, encoder, store), upside_down)
        assert both.subset([6, 0]).parts[0].ids == ("p/6", "p/0")

    def test_captions_too(self, tmp_path, bert) -> None:
        captions = ["fox", "a red house"]
        kept = caption_features(captions, bert, Store(tmp_path))
        assert torch.equal(kept, bert.encode_texts(captions))
        assert not torch.equal(caption_features(captions[::-1], bert, Store(tmp_path)), kept)

    def test_nothing_to_encode_is_refused(self, tmp_path, bert) -> None:
        with pytest.raises(ValueError, match="nothing to encode"):
            caption_features([], bert, Store(tmp_path))

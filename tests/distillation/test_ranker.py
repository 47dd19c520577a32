"""The learned ranker: its embedding, its file, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from wherefrom.distillation.ranker import WEIGHTS, Ranker, load_ranker, save_ranker
from wherefrom.runtime.artifacts import MANIFEST

RANDOM = torch.Generator().manual_seed(0)
FEATURES = torch.randn(37, 5, generator=RANDOM)


def made(**sizes: Any) -> Ranker:
    torch.manual_seed(3)
    ranker = Ranker(5, **{"width": 6, "hidden": 2, "outputs": 4, **sizes})
    with torch.no_grad():  # biases and scale start at round numbers
        for parameter in ranker.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return ranker.eval()


def test_logits_are_those_of_the_formula() -> None:
    ranker = made().double()
    state = ranker.state_dict()
    queries, images = FEATURES[:3].double(), FEATURES[3:8].double()

    def embed(rows: torch.Tensor) -> torch.Tensor:
        for layer in range(2):
            rows = (rows @ state[f"mlp.layers.{layer}.weight"].T + state[f"mlp.layers.{layer}.bias"]).clamp(min=0)
        rows = rows @ state["mlp.output_layer.weight"].T + state["mlp.output_layer.bias"]
        return rows / rows.square().sum(dim=1, keepdim=True).sqrt()

    expected = embed(queries) @ embed(images).T * state["scale"] + state["bias"]
    torch.testing.assert_close(ranker(queries, images).detach(), expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ranker.embed(images).detach(), embed(images), rtol=1e-10, atol=1e-12)


def test_parts_make_the_embedding_blind_to_the_scale_of_an_encoder() -> None:
    ranker = made(parts=(2, 3)).double()
    features = FEATURES.double()
    scaled = features * torch.tensor([100.0, 100.0, 0.01, 0.01, 0.01])
    torch.testing.assert_close(ranker.embed(scaled), ranker.embed(features))
    plain = made().double()
    assert not torch.allclose(plain.embed(scaled), plain.embed(features), atol=0.1)
    rows = [F.normalize(part, dim=1) * part.shape[1] ** 0.5 for part in features.split((2, 3), dim=1)]
    torch.testing.assert_close(ranker.embed(features), plain.embed(torch.cat(rows, dim=1)))
    with pytest.raises(ValueError, match=r"parts \[2, 2\] must sum to its inputs, 5"):
        Ranker(5, parts=(2, 2))


def test_with_a_skip_it_starts_at_the_untuned_features() -> None:
    torch.manual_seed(0)
    ranker = Ranker(5, width=6, outputs=5, parts=(2, 3), skip=True).double().eval()
    first, second = (F.normalize(part, dim=1) for part in FEATURES.double().split((2, 3), dim=1))
    embedded = ranker.embed(FEATURES.double())
    torch.testing.assert_close(embedded @ embedded.T, (first @ first.T + second @ second.T) / 2, rtol=0, atol=1e-6)
    trained = made(parts=(2, 3), skip=True).double()
    state, rows = trained.state_dict(), torch.cat([first * 2**0.5, second * 3**0.5], dim=1)
    plain = made().double()
    plain.load_state_dict({name: value for name, value in state.items() if name != "skip.weight"})
    expected = F.normalize(plain.mlp(rows) + rows @ state["skip.weight"].T, dim=1)
    torch.testing.assert_close(trained.embed(FEATURES.double()), expected)


def test_it_starts_as_the_paper_says() -> None:
    ranker = Ranker(1280)
    shapes = {name: tuple(value.shape) for name, value in ranker.state_dict().items()}
    assert shapes == {
        "scale": (1,),
        "bias": (1,),
        "mlp.layers.0.weight": (768, 1280),
        "mlp.layers.0.bias": (768,),
        **{
            f"mlp.layers.{layer}.{name}": (768, 768)[: 2 - (name == "bias")]
            for layer in (1, 2)
            for name in ("weight", "bias")
        },
        "mlp.output_layer.weight": (768, 768),
        "mlp.output_layer.bias": (768,),
    }
    assert (float(ranker.scale.detach()), float(ranker.bias.detach())) == (1.0, 0.0)
    # Xavier: uniform within √(6 / (inputs + outputs)).
    weight = ranker.mlp.layers[0].weight.detach()
    assert float(weight.abs().max()) == pytest.approx((6 / (1280 + 768)) ** 0.5, rel=1e-3)
    assert float(weight.std()) == pytest.approx((2 / (1280 + 768)) ** 0.5, rel=1e-2)


@pytest.mark.parametrize("batch_size", [1, 7, 37])
def test_embeddings_do_not_depend_on_the_batch(batch_size: int) -> None:
    ranker = made().double()
    with torch.no_grad():
        whole = ranker.embed(FEATURES.double())
        parts = torch.cat([ranker.embed(part) for part in FEATURES.double().split(batch_size)])
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(whole.norm(dim=1), torch.ones(37, dtype=torch.float64))


def test_dropout_is_for_training_only() -> None:
    ranker = made(dropout=0.5)
    assert torch.equal(ranker.embed(FEATURES), ranker.embed(FEATURES))
    ranker.train()
    assert not torch.equal(ranker.embed(FEATURES), ranker.embed(FEATURES))
    # A linear ranker has no hidden activation to drop.
    assert torch.equal(made(hidden=0, dropout=0.5).train().embed(FEATURES), made(hidden=0).embed(FEATURES))


def test_the_cosine_is_what_ranks() -> None:
    ranker = made()
    with torch.no_grad():
        ranker.scale.fill_(-3.0)
        queries, images = ranker.embed(FEATURES[:4]), ranker.embed(FEATURES[4:])
        order = ranker(FEATURES[:4], FEATURES[4:]).argsort(dim=1)
    assert torch.equal(
        order, F.cosine_similarity(queries[:, None], images[None], dim=2).argsort(dim=1, descending=True)
    )


def test_a_ranker_is_read_as_it_was_written(tmp_path: Path) -> None:
    ranker = made(dropout=0.25)
    save_ranker(tmp_path, ranker, ["b", "a"], training={"seed": 4})
    again, features = load_ranker(tmp_path)
    assert features == ["b", "a"]
    assert again.sizes == ranker.sizes
    assert not again.training
    assert torch.equal(again.embed(FEATURES), ranker.embed(FEATURES))
    assert again.identity() == ranker.identity()
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    assert manifest["training"] == {"seed": 4}
    assert manifest["identity"]["features"] == ["b", "a"]
    assert made(width=7).identity() != ranker.identity()
    with torch.no_grad():
        again.bias.add_(1.0)
    assert again.identity()["weights"] != ranker.identity()["weights"]


@pytest.mark.parametrize(
    "sizes",
    [{"inputs": 0}, {"width": 0}, {"outputs": -1}, {"hidden": -1}, {"dropout": 1.0}, {"dropout": -0.1}],
    ids=str,
)
def test_sizes_are_refused(sizes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="positive sizes and a dropout from 0 to below 1; given"):
        Ranker(**{"inputs": 5, **sizes})


def test_features_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match="The ranker takes 5 features, given 6"):
        made().embed(torch.zeros(2, 6))


def saved(folder: Path) -> Path:
    save_ranker(folder, made(), ["a"])
    return folder


def test_a_folder_without_a_ranker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no manifest\.json"):
        load_ranker(tmp_path)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path) / WEIGHTS
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"holds no ranker that can be read|is damaged: its tensors cannot be read"):
        load_ranker(tmp_path)
    flipped = bytearray(whole)
    flipped[-3] ^= 0x40  # in a weight: still a file that can be read
    path.write_bytes(bytes(flipped))
    with pytest.raises(ValueError, match=r"ranker\.safetensors does not match its manifest"):
        load_ranker(tmp_path)


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path) / WEIGHTS
    tensors = load_file(path)
    del tensors["mlp.layers.1.weight"]
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"holds no ranker that can be read: (?s:.)*mlp\.layers\.1\.weight"):
        load_ranker(tmp_path)


@pytest.mark.parametrize("change", [{"sizes": {"inputs": 5, "depth": 3}}, {"sizes": None}], ids=str)
def test_a_manifest_of_something_else_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = saved(tmp_path) / MANIFEST
    manifest = json.loads(path.read_text())
    manifest["identity"] |= change
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=r"holds no ranker that can be read|is damaged: its tensors cannot be read"):
        load_ranker(tmp_path)
    del manifest["identity"]["sizes"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="holds no ranker that can be read: 'sizes'"):
        load_ranker(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not valid JSON"):
        load_ranker(tmp_path)

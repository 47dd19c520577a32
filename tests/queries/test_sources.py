"""Queries: what they are named by, and image files that cannot be any."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.support.tiny import tiny_encoder, tiny_model
from wherefrom.attributors import Query
from wherefrom.queries.sources import (
    QueryImage,
    QueryRegion,
    QuerySource,
    generate,
    make_queries,
    read_query,
    read_regions,
)
from wherefrom.runtime import keyed_random
from wherefrom.runtime.salts import Salt


def test_images_that_cannot_be_queries_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG no more")
    with pytest.raises(ValueError, match=r"Query image .*broken\.png cannot be read"):
        read_query(QueryImage(str(broken), ""), (8, 8))
    with pytest.raises(ValueError, match=r"Query image .*nothing\.png is not a file"):
        read_query(QueryImage(str(tmp_path / "nothing.png"), ""), (8, 8))
    path = tmp_path / "twice.png"
    Image.new("RGB", (8, 8)).save(path)
    model = tiny_model()
    with pytest.raises(ValueError, match=r"There are no queries: give queries.prompts"):
        make_queries(model, source=QuerySource(), latent_shape=(4, 4, 4), size=(8, 8))
    twice = [QueryImage(str(path), "")] * 2
    with pytest.raises(ValueError, match=r"A query image is given twice"):
        make_queries(model, source=QuerySource(images=twice), latent_shape=(4, 4, 4), size=(8, 8))
    with pytest.raises(ValueError, match=r"Generating needs a model with an encoder"):
        generate(model, prompts=["red"], seed=0, shape=(4, 4, 4))


def test_a_generated_query_is_named_by_all_that_made_it(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.float32, encoder=tiny_encoder(tmp_path / "text"))

    def draw(prompts: list[str], seed: int = 0, steps: int = 2, guidance: float = 2.0, eta: float = 0.0) -> list[Query]:
        return generate(
            model, prompts=prompts, seed=seed, shape=(4, 4, 4), sampling_steps=steps, guidance=guidance, eta=eta
        )

    red, blue, again = draw(["red", "blue", "red"])
    assert red.id != again.id
    assert not np.array_equal(red.pixels, again.pixels)
    (alone,) = draw(["red"])
    assert alone.id == red.id
    assert np.abs(alone.pixels.astype(int) - red.pixels.astype(int)).max() <= 1
    others = [
        draw(["red"], seed=1)[0],
        draw(["red"], steps=3)[0],
        draw(["red"], guidance=3.0)[0],
        draw(["red"], eta=1.0)[0],
    ]
    encoder = model.encoder
    assert encoder is not None
    latents = encoder.identity()
    encoder.vae.decoder.conv_out.bias.data += 0.1
    others += draw(["red"])
    assert encoder.identity() == latents, "the decoder decides no latent, so what is kept of them stays valid"
    encoder.vae.encoder.conv_out.bias.data += 0.1
    assert encoder.identity() != latents
    assert len({query.id for query in (red, blue, again, *others)}) == 8
    assert generate(model, prompts=[], seed=0, shape=(4, 4, 4)) == []


def test_each_region_is_a_query_beside_its_whole_image(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.float32, encoder=tiny_encoder(tmp_path / "text"))
    path = tmp_path / "mine.png"
    Image.new("RGB", (8, 8)).save(path)
    mask = tmp_path / "mask.png"
    Image.fromarray(np.eye(8, dtype=np.uint8) * 255).save(mask)
    source = QuerySource(
        prompts=["red", "blue"],
        images=[QueryImage(str(path), "")],
        regions=[
            QueryRegion("blue", box=[0, 0, 4, 8]),
            QueryRegion(str(path), mask=str(mask)),
            QueryRegion("blue", box=[4, 0, 8, 8]),
        ],
        sampling_steps=2,
    )
    queries = make_queries(model, source=source, latent_shape=(4, 4, 4), size=(8, 8))
    assert [(query.prompt, query.region and query.region.name.split("-")[0]) for query in queries] == [
        ("", None),
        ("", "mask mask"),
        ("red", None),
        ("blue", None),
        ("blue", "box 0,0,4,8"),
        ("blue", "box 4,0,8,8"),
    ]
    assert len({query.name for query in queries}) == 6
    assert len({query.id for query in queries}) == 3, "a region shares its image's noise"
    assert queries[4].latent is queries[3].latent


@pytest.mark.parametrize(
    ("regions", "message"),
    [
        ([QueryRegion("green", box=[0, 0, 4, 8])], r"'green' is neither a prompt nor an image file.*there are 'red'"),
        ([QueryRegion("red", box=[0, 0, 9, 8])], r"Box \[0, 0, 9, 8\] is not a part of the image"),
        ([QueryRegion("red", mask="none.png")], r"Mask none\.png is not a file"),
        ([QueryRegion("red", box=[0, 0, 4, 8])] * 2, r"box 0,0,4,8 of 'red' is given twice"),
    ],
)
def test_regions_that_cannot_be_used_are_named_before_anything_is_drawn(
    regions: list[QueryRegion], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_queries(
            tiny_model(), source=QuerySource(prompts=["red"], regions=regions), latent_shape=(4, 4, 4), size=(8, 8)
        )


def test_a_region_is_of_a_files_name_where_it_is_unique(tmp_path: Path) -> None:
    files = [tmp_path / name / "mine.png" for name in ("a", "b")]
    for file in files:
        file.parent.mkdir()
        Image.new("RGB", (8, 8)).save(file)
    region, known = QueryRegion("mine.png", box=[0, 0, 4, 8]), [str(file) for file in files]
    ((of, regions),) = read_regions([region], [known[0], "red"], (8, 8)).items()
    assert (of, regions[0].name) == (known[0], "box 0,0,4,8")
    with pytest.raises(ValueError, match=r"several images are called 'mine.png'; give its whole path"):
        read_regions([region], known, (8, 8))
    with pytest.raises(ValueError, match=r"'mine.png' is neither a prompt nor an image file of this run"):
        read_regions([region], ["red", "there/mine.png"], (8, 8))


@pytest.mark.parametrize("region", [{}, {"box": [0, 0, 4, 8], "mask": "mask.png"}])
def test_a_region_is_a_box_or_a_mask(region: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"A region is either a box or a mask; that of 'red' has"):
        QueryRegion("red", **region)

    with pytest.raises(ValueError, match=r"A region is either a box or a mask; that of 'red' has"):
        QueryRegion("red", **region)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_a_kept_trajectory_is_what_the_sampler_predicted(tmp_path: Path, eta: float) -> None:
    model = tiny_model(dtype=torch.float32, encoder=tiny_encoder(tmp_path / "text"))
    bare = generate(model, prompts=["red", "blue"], seed=0, shape=(4, 4, 4), sampling_steps=4, guidance=3.0, eta=eta)
    kept = generate(
        model,
        prompts=["red", "blue"],
        seed=0,
        shape=(4, 4, 4),
        sampling_steps=4,
        guidance=3.0,
        eta=eta,
        keep_trajectory=True,
    )
    assert model.encoder is not None
    conditioning = model.encoder.text.encode(["red", ""])
    with_prompt, without = conditioning.at(0), conditioning.at(1)
    for with_steps, plain in zip(kept, bare, strict=True):
        assert plain.trajectory is None
        assert with_steps.id == plain.id
        np.testing.assert_array_equal(with_steps.pixels, plain.pixels)
        assert with_steps.trajectory is not None
        assert with_steps.latent is not None
        assert with_steps.trajectory.timesteps == (999, 749, 499, 249)
        assert with_steps.trajectory.predicted.shape == (4, 4, 4, 4)
        # The last step goes to timestep -1, where there is no noise: its prediction is the image.
        torch.testing.assert_close(with_steps.trajectory.predicted[-1], with_steps.latent, rtol=1e-4, atol=1e-4)
    # The first is predicted from pure noise, which is keyed: x̂₀ = √ᾱ x - √(1 - ᾱ) v.
    start = keyed_random.combine(
        Salt.SAMPLER_START, keyed_random.combine(0, keyed_random.hash_texts(["red"]), torch.zeros(1, dtype=torch.int64))
    )
    noise = keyed_random.normal(start, (4, 4, 4))
    with torch.no_grad():
        outputs = [model.predict(noise, torch.tensor([999]), states.at(None)) for states in (with_prompt, without)]
    output = outputs[1] + 3.0 * (outputs[0] - outputs[1])
    expected = model.noise_schedule.signal[999].float() * noise - model.noise_schedule.spread[999].float() * output
    trajectory = kept[0].trajectory
    assert trajectory is not None
    torch.testing.assert_close(trajectory.predicted[0], expected[0], rtol=1e-4, atol=1e-5)

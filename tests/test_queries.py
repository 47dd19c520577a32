"""Queries: what they are named by, and picture files that cannot be any."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.tiny import tiny_encoder, tiny_model
from wherefrom.attributors import Query
from wherefrom.queries import QueryPicture, QuerySource, generate, make_queries, read_query


def test_pictures_that_cannot_be_queries_are_named(tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG no more")
    with pytest.raises(ValueError, match=r"Query picture .*broken\.png cannot be read"):
        read_query(QueryPicture(str(broken), ""), (8, 8))
    with pytest.raises(ValueError, match=r"Query picture .*nothing\.png is not a file"):
        read_query(QueryPicture(str(tmp_path / "nothing.png"), ""), (8, 8))
    path = tmp_path / "twice.png"
    Image.new("RGB", (8, 8)).save(path)
    model = tiny_model()
    with pytest.raises(ValueError, match=r"There are no queries: give queries.prompts"):
        make_queries(model, QuerySource(), (4, 4, 4), (8, 8))
    twice = [QueryPicture(str(path), "")] * 2
    with pytest.raises(ValueError, match=r"A query picture is given twice"):
        make_queries(model, QuerySource(pictures=twice), (4, 4, 4), (8, 8))
    with pytest.raises(ValueError, match=r"Generating needs a model with an encoder"):
        generate(model, ["red"], 0, (4, 4, 4))


def test_a_generated_query_is_named_by_all_that_made_it(tmp_path: Path) -> None:
    model = tiny_model(dtype=torch.float32, encoder=tiny_encoder(tmp_path / "text"))

    def draw(prompts: list[str], seed: int = 0, steps: int = 2, guidance: float = 2.0, eta: float = 0.0) -> list[Query]:
        return generate(model, prompts, seed, (4, 4, 4), steps, guidance, eta)

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
    assert generate(model, [], 0, (4, 4, 4)) == []

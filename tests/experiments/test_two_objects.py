"""The two-object check: its scenes, what the model shows of them, and what is read from rankings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from experiments import two_objects
from experiments.alignment import rate
from experiments.scenes import AMONG, Admission, Scene, admit, denoised, fits, make_scenes
from tests.support.tiny import tiny_latents, tiny_model, tiny_text_encoder
from wherefrom.attributors import Query, Scores, TrainingData
from wherefrom.data.image_set import ImageSet
from wherefrom.models.conditioning import prompt_embeddings
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.encoders import CaptionEncoder
from wherefrom.runtime import keyed_random

STYLES = ("openmoji", "twemoji")
TIMESTEP, SAMPLING_STEPS = 300, 50


def world(concepts: int) -> ImageSet:
    """Every concept in both styles; an image's pixels are the number of its row."""
    pairs = [(f"{concept:03x}", style) for style in STYLES for concept in range(concepts)]
    shape = (len(pairs), 4, 4, 3)
    return ImageSet(
        ids=tuple(f"{style}/{concept}" for concept, style in pairs),
        captions=tuple((f"thing {concept}, {style} style",) for concept, style in pairs),
        pixels=np.broadcast_to(np.arange(len(pairs), dtype=np.uint8).reshape(-1, 1, 1, 1), shape),
        columns={
            "concept": tuple(concept for concept, _ in pairs),
            "name": tuple(f"thing {concept}" for concept, _ in pairs),
            "style": tuple(style for _, style in pairs),
        },
        fingerprint="world",
    )


def test_a_scene_is_two_images_of_one_style() -> None:
    images = world(4)
    scenes = make_scenes(images, [0, 6, 5, 3])  # the second is chosen in the other style, and taken in the first's
    assert [scene.id for scene in scenes] == ["openmoji/000|openmoji/002", "twemoji/001|twemoji/003"]
    assert scenes[0].prompt == "thing 000 and thing 002, openmoji style"
    assert scenes[1].concepts == ("001", "003")
    assert scenes[0].pixels.shape == (4, 8, 3)
    assert scenes[1].pixels[0, :, 0].tolist() == [5] * 4 + [7] * 4
    left, right = (scenes[1].box(name) for name in ("left", "right"))
    assert (left, right, scenes[1].box("whole")) == ((0, 0, 4, 4), (4, 0, 8, 4), (0, 0, 8, 4))


def test_a_caption_that_is_cut_does_not_fit(tmp_path: Path) -> None:
    text = CaptionEncoder.from_pretrained(str(tiny_text_encoder(tmp_path / "text")), 6)
    assert fits(text, "red green blue grey")  # with the tokens of start and end
    assert not fits(text, "red green blue grey dark")
    assert not fits(text, "red " * 40)


def ddim(model: DiffusionModel, latents: torch.Tensor, states: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Song et al. 2021, eq. 12 with σ = 0, one image at a time."""
    signal, stride = model.noise_schedule.signal, 1000 // SAMPLING_STEPS
    result = []
    for latent, state, key in zip(latents, states, keys, strict=True):
        noise = keyed_random.normal(keyed_random.combine(901, key)[None], latent.shape, torch.float64)[0]
        x = signal[TIMESTEP] * latent + (1 - signal[TIMESTEP] ** 2).sqrt() * noise
        for step in range(TIMESTEP, -1, -stride):
            a = signal[step]
            b = signal[step - stride] if step >= stride else torch.tensor(1.0, dtype=torch.float64)
            with torch.no_grad():
                v = model.predict(x[None], torch.tensor([step]), prompt_embeddings(state[None]))[0]
            spread = (1 - a**2).sqrt()
            x = b * (a * x - spread * v) + (1 - b**2).sqrt() * (a * v + spread * x)
        result.append(x)
    return torch.stack(result)


def test_denoising_starts_at_its_timestep() -> None:
    model, random = tiny_model(), torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 4, 8, generator=random, dtype=torch.float64)  # twice as wide as it was trained on
    states = torch.randn(3, 6, 12, generator=random, dtype=torch.float64)
    conditioning = prompt_embeddings(states)
    keys = keyed_random.hash_texts(["a", "b", "c"])
    result = denoised(
        model, latents=latents, conditioning=conditioning, keys=keys, timestep=TIMESTEP, steps=SAMPLING_STEPS
    )
    # diffusers keeps the signal levels in float32.
    torch.testing.assert_close(result, ddim(model, latents, states, keys), rtol=1e-4, atol=1e-5)
    alone = denoised(
        model,
        latents=latents[1:2],
        conditioning=conditioning.at(slice(1, 2)),
        keys=keys[1:2],
        timestep=TIMESTEP,
        steps=SAMPLING_STEPS,
    )
    torch.testing.assert_close(alone, result[1:2], rtol=1e-9, atol=1e-9)
    barely = denoised(model, latents=latents, conditioning=conditioning, keys=keys, timestep=0, steps=SAMPLING_STEPS)
    assert (barely - latents).abs().max() < 0.1
    with pytest.raises(ValueError, match=r"between 0 and 999; given 1000"):
        denoised(model, latents=latents, conditioning=conditioning, keys=keys, timestep=1000, steps=SAMPLING_STEPS)


def test_scenes_are_tried_until_enough_are_admitted() -> None:
    images = world(2 * AMONG)
    seen: list[str] = []

    def judged(scenes: Sequence[Scene]) -> Admission:
        seen.extend(scene.id for scene in scenes)
        ranks = np.full((len(scenes), 2), 5)
        ranks[3:, 1] = 6  # one object is not enough
        return Admission(list(scenes), torch.zeros(len(scenes), 1), np.zeros((len(scenes), 1)), ranks)

    assert [block.admitted().tolist() for block in admit(images, 3, 0, judged, most=2)] == [[0, 1, 2]]
    assert len(admit(images, 4, 0, judged, most=2)) == 2
    assert len(admit(images, 40, 0, judged, most=2)) == 2
    assert seen[:50] == seen[50:100]
    assert len(set(seen)) == AMONG
    concepts = [concept for scene in make_scenes(images, range(20)) for concept in scene.concepts]
    assert len(set(concepts)) == 20

    def blind(scenes: Sequence[Scene]) -> Admission:
        return Admission(list(scenes), torch.zeros(0), np.zeros(0), np.full((len(scenes), 2), 6))

    with pytest.raises(ValueError, match=r"Of 100 scenes the model shows none"):
        admit(images, 1, 0, blind, most=2)


def ranked(query: Query, images: ImageSet, best: Sequence[str]) -> Scores:
    """The best images first, the others by id."""
    order = [*best, *(name for name in images.ids if name not in best)]
    values = np.array([-float(order.index(name)) for name in images.ids])
    return Scores(query, images.ids, values, np.zeros(0), {})


def test_a_box_wins_if_its_own_concept_comes_first() -> None:
    images = world(6)
    scenes = make_scenes(images, [0, 1, 8, 9])
    queries = [query for scene in scenes for query in two_objects.queries_of(scene, torch.zeros(1, 1, 2))]
    assert len({query.name for query in queries}) == 6
    inside = [None if query.region is None else query.region.mask[0].tolist() for query in queries[:3]]
    assert inside == [[1.0] * 4 + [0.0] * 4, [0.0] * 4 + [1.0] * 4, None]
    best = [
        ["twemoji/005", "twemoji/000", "openmoji/001"],  # box A: A in the other style is second, B third
        ["openmoji/000", "twemoji/001"],  # box B: A first
        ["openmoji/001", "openmoji/000"],
        ["openmoji/002", "openmoji/003"],
        ["openmoji/002", "openmoji/000", "twemoji/003"],
        ["openmoji/002", "openmoji/003"],
    ]
    results = [ranked(query, images, names) for query, names in zip(queries, best, strict=True)]
    concepts = dict(zip(images.ids, images.columns["concept"], strict=True))
    result = two_objects.ranks_of(results, scenes, concepts)
    assert (result["left"].a, result["left"].b) == ([2, 1], [3, 2])
    assert (result["right"].a, result["right"].b) == ([1, 1], [2, 3])
    assert (result["whole"].a, result["whole"].b) == ([2, 1], [1, 2])
    both, none, half = (rate(np.array(wins)) for wins in ([True, True], [False, False], [True, False]))
    assert two_objects.shares(result) == {"box A": both, "box B": none, "whole": half}
    last = two_objects.table({"method": result}, 12).splitlines()[-1]
    assert last == "| method | 2 | 100% ± 0% | 0% ± 0% | 50% ± 35% | 2, 2 | 1, 2 | 2, 2 |"
    shown = np.broadcast_to(np.array([200, 0, 200], dtype=np.uint8), (2, 4, 8, 3))
    sheet = np.asarray(two_objects.contact_sheet(scenes, shown=shown, results=results, images=images))
    assert (sheet[10, 10].tolist(), sheet[10, 200].tolist()) == ([0, 0, 0], [200, 0, 200])
    for bar in ((50, 205, 50), (255, 0, 0)):
        assert (sheet == bar).all(axis=2).any()


def test_a_part_of_the_images_holds_the_scenes_concepts() -> None:
    latents = tiny_latents(12)
    images = world(6)
    data = TrainingData(images, replace(latents, images=images))
    scenes = make_scenes(images, [0, 4])
    part = two_objects.part_of(data, scenes, 6)
    assert len(part.images) == 6
    assert {"openmoji/000", "twemoji/000", "openmoji/004", "twemoji/004"} <= set(part.images.ids)
    assert part.latents is not None
    assert part.latents.ids == part.images.ids
    with pytest.raises(ValueError, match=r"1 images cannot hold all 2 concepts"):
        two_objects.part_of(data, scenes, 1)

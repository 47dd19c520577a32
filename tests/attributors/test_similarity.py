"""The attributors that need no model, against NumPy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.support.tiny import one_process
from wherefrom.attributors import Attributor, CaptionSimilarity, PixelSimilarity, Query, Random, Scores, TrainingData
from wherefrom.data.image_set import ImageSet, joined_image_sets
from wherefrom.runtime.artifacts import Store

SIZE = 6


def images(count: int, seed: int = 0, captions: int = 2) -> ImageSet:
    random = np.random.default_rng(seed)
    return ImageSet(
        ids=tuple(f"set{seed}/{index}" for index in range(count)),
        captions=tuple(
            tuple(f"{'red' if index % 2 else 'blue'} {k} {index}" for k in range(captions)) for index in range(count)
        ),
        pixels=random.integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8),
        fingerprint=f"random {seed}",
    )


TRAIN, HELD_OUT = images(7), images(3, seed=1)
QUERY = Query("query", "a red thing", np.random.default_rng(5).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8))


class Letters:
    """A text encoder that counts letters."""

    def encode_texts(self, captions: Sequence[str]) -> Tensor:
        return torch.tensor([[float(caption.count(letter)) for letter in "abdelru 0123"] for caption in captions])

    def identity(self) -> dict[str, Any]:
        return {"encoder": "letters"}


def fitted(attributor: Attributor, tmp_path: Path, held_out: ImageSet | None = HELD_OUT) -> Attributor:
    attributor.fit(TrainingData(TRAIN, held_out=held_out), None, Store(tmp_path), one_process())
    return attributor


def score(attributor: Attributor, query: Query = QUERY, candidates: Sequence[str] | None = None) -> Scores:
    (scores,) = attributor.score([query], candidates)
    return scores


def mirrored(query: Query) -> Query:
    return Query(query.id, query.prompt, np.ascontiguousarray(query.pixels[:, ::-1]))


def cosine(left: np.ndarray, right: np.ndarray) -> float:
    return float(left @ right / np.linalg.norm(left) / np.linalg.norm(right))


def shrink(pixels: np.ndarray, size: int | None) -> np.ndarray:
    signed = pixels.astype(np.float64) / 127.5 - 1
    if size is None:
        return signed
    step = SIZE // size
    return signed.reshape(size, step, size, step, 3).mean(axis=(1, 3))


@pytest.mark.parametrize("size", [None, 3, 2])
def test_pixel_similarity_is_the_larger_cosine_of_both_mirror_images(tmp_path: Path, size: int | None) -> None:
    scores = score(fitted(PixelSimilarity(size), tmp_path))
    for result, data in ((scores.scores, TRAIN), (scores.null, HELD_OUT)):
        both = [
            [
                cosine(shrink(query, size).ravel(), shrink(image, size).ravel())
                for query in (QUERY.pixels, QUERY.pixels[:, ::-1])
            ]
            for image in data.pixels
        ]
        np.testing.assert_allclose(result, np.max(both, axis=1), rtol=1e-5, atol=1e-6)
        winners = {int(np.argmax(pair)) for pair in both}
        assert winners == {0, 1} or data is HELD_OUT, "either mirror image wins somewhere"
    assert scores.ids == TRAIN.ids


def test_a_mirrored_query_has_the_same_pixel_scores(tmp_path: Path) -> None:
    attributor = fitted(PixelSimilarity(), tmp_path)
    np.testing.assert_allclose(score(attributor).scores, score(attributor, mirrored(QUERY)).scores, rtol=1e-12)


def test_an_image_is_most_like_itself_and_its_mirror_image(tmp_path: Path) -> None:
    attributor = fitted(PixelSimilarity(), tmp_path)
    for index in range(len(TRAIN)):
        query = Query("self", "", TRAIN.pixels[index])
        for each in (query, mirrored(query)):
            result = score(attributor, each).scores
            assert result.argmax() == index
            assert result[index] == pytest.approx(1.0, abs=1e-6)


def test_images_of_another_size_are_refused(tmp_path: Path) -> None:
    query = Query("wide", "", np.zeros((SIZE, SIZE + 1, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"Query 'wide' has shape \(6, 7, 3\), the training images \(6, 6, 3\)"):
        score(fitted(PixelSimilarity(), tmp_path), query)


def test_pixel_similarity_tells_subsets_of_one_data_set_apart(tmp_path: Path) -> None:
    attributor = PixelSimilarity()
    for chosen in ([0, 1, 2], [0, 3, 4]):
        part = TRAIN.subset(chosen)
        attributor.fit(TrainingData(part), None, Store(tmp_path), one_process())
        whole = score(fitted(PixelSimilarity(), tmp_path)).scores
        np.testing.assert_allclose(score(attributor).scores, whole[chosen], rtol=1e-12)


def test_caption_similarity_is_the_best_cosine_of_the_captions(tmp_path: Path) -> None:
    scores = score(fitted(CaptionSimilarity(Letters()), tmp_path))
    prompt = Letters().encode_texts([QUERY.prompt])[0].numpy()
    for result, data in ((scores.scores, TRAIN), (scores.null, HELD_OUT)):
        expected = [
            max(cosine(Letters().encode_texts([caption])[0].numpy(), prompt) for caption in several)
            for several in data.captions
        ]
        np.testing.assert_allclose(result, expected, rtol=1e-6)
    assert TRAIN.captions[int(scores.scores.argmax())][0].startswith("red")


def test_caption_similarity_takes_the_emoji_worlds_encoder_by_default(tmp_path: Path) -> None:
    scores = score(fitted(CaptionSimilarity(), tmp_path))
    reds = [caption[0].startswith("red") for caption in TRAIN.captions]
    assert min(scores.scores[reds]) > max(scores.scores[np.logical_not(reds)])


@pytest.mark.parametrize("attributor", [PixelSimilarity(), CaptionSimilarity(Letters())])
def test_joined_images_score_as_one_set(tmp_path: Path, attributor: Attributor) -> None:
    whole = score(fitted(attributor, tmp_path)).scores
    again = type(attributor)(**({} if isinstance(attributor, PixelSimilarity) else {"encoder": Letters()}))
    both = joined_image_sets(TRAIN.subset([0, 1, 2]), TRAIN.subset([3, 4, 5, 6]))
    again.fit(TrainingData(both, held_out=HELD_OUT), None, Store(tmp_path), one_process())
    np.testing.assert_allclose(score(again).scores, whole, rtol=1e-12)


def test_random_scores_are_keyed(tmp_path: Path) -> None:
    whole = score(fitted(Random(seed=2), tmp_path))
    assert ((whole.scores >= 0) & (whole.scores < 1)).all()
    assert len(set(whole.scores)) == len(TRAIN)
    assert np.array_equal(score(fitted(Random(seed=2), tmp_path)).scores, whole.scores)
    part = Random(seed=2)
    part.fit(TrainingData(TRAIN.subset([5, 2])), None, Store(tmp_path), one_process())
    assert np.array_equal(score(part).scores, whole.scores[[5, 2]])
    assert not np.isin(score(fitted(Random(seed=3), tmp_path)).scores, whole.scores).any()
    other = Query("another", QUERY.prompt, QUERY.pixels)
    assert not np.isin(score(fitted(Random(seed=2), tmp_path), other).scores, whole.scores).any()


@pytest.mark.parametrize(
    "attributor", [Random(), PixelSimilarity(), CaptionSimilarity(Letters())], ids=lambda a: type(a).__name__
)
def test_candidates_and_queries(tmp_path: Path, attributor: Attributor) -> None:
    with pytest.raises(ValueError, match="fit must run before score"):
        list(attributor.score([QUERY]))
    fitted(attributor, tmp_path)
    whole = score(attributor)
    chosen = [TRAIN.ids[4], TRAIN.ids[0]]
    part = score(attributor, candidates=chosen)
    assert list(part.ids) == chosen
    assert np.array_equal(part.scores, whole.scores[[4, 0]])
    assert np.array_equal(part.null, whole.null)
    assert len(part.null) == len(HELD_OUT)
    with pytest.raises(ValueError, match="1 candidates are not training images, such as 'nobody'"):
        score(attributor, candidates=["nobody", chosen[0]])
    names = [scores.query.id for scores in attributor.score([QUERY, Query("next", "blue", QUERY.pixels)])]
    assert names == ["query", "next"]
    assert len(score(fitted(attributor, tmp_path, held_out=None)).null) == 0
    assert attributor.identity()["method"]
    assert "model" not in attributor.requires


def test_training_captions_are_encoded_by_fit(tmp_path: Path) -> None:
    encoded: list[str] = []

    class Watched(Letters):
        def encode_texts(self, captions: Sequence[str]) -> Tensor:
            encoded.extend(captions)
            return super().encode_texts(captions)

    attributor = fitted(CaptionSimilarity(Watched()), tmp_path, held_out=None)
    assert encoded == [caption for several in TRAIN.captions for caption in several]
    encoded.clear()
    score(attributor)
    assert encoded == [QUERY.prompt]

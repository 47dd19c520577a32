"""Does an image show its prompt? A judge made of frozen features and one ridge regression.

Image features are mapped linearly to sentence vectors of captions; an image is recognised when its own prompt is among
the nearest few of a hundred captions. Two things keep the judge fair. It is cross-fitted: what judges an image has
never seen the image's concept in any style, so real and generated images of the same prompts are measured alike.
And a prompt is compared with prompts of its own style only, so that the style word does not decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from jaxtyping import Bool, Float, Int64
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from wherefrom.data.image_set import ImageSet
from wherefrom.features.base import ImageEncoder, Pixels, TextEncoder, caption_features, image_features
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.keyed_random import hash_text

# Relative ridge strengths to choose from.
ALPHAS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Moments:
    """Sums over images that decide a ridge regression; the sums of a union are the sums of its parts.

    Attributes:
        count: Number of images.
        image: Sum of image features, shape (D,).
        caption: Sum of caption features, shape (E,).
        gram: Sum of outer products of image features, shape (D, D).
        cross: Sum of outer products of image and caption features, shape (D, E).
    """

    count: int
    image: Float[Tensor, " d"]
    caption: Float[Tensor, " e"]
    gram: Float[Tensor, "d d"]
    cross: Float[Tensor, "d e"]

    @classmethod
    def of(cls, images: Float[Tensor, "n d"], captions: Float[Tensor, "n e"]) -> Moments:
        """The sums over these images, in float64."""
        x, y = images.double(), captions.double()
        return cls(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count,
            self.image + other.image,
            self.caption + other.caption,
            self.gram + other.gram,
            self.cross + other.cross,
        )


@dataclass(frozen=True)
class AlignmentModel:
    """A linear map from image features to caption vectors.

    Attributes:
        weight: Shape (D, E), float64.
        bias: Shape (E,), float64.
        centre: The average caption vector of the images that it learned from, shape (E,), float64. What captions have
            in common (the template, the style's name) says nothing of an image: cosines are taken around it.
    """

    weight: Float[Tensor, "d e"]
    bias: Float[Tensor, " e"]
    centre: Float[Tensor, " e"]

    @classmethod
    def fit(
        cls, image_features: Float[Tensor, "n d"], caption_features: Float[Tensor, "n e"], alpha: float
    ) -> AlignmentModel:
        """Ridge regression in closed form: (XᵀX + λI)⁻¹ XᵀY of centred X and Y, the intercept unpenalised.

        Args:
            image_features: X, one row an image.
            caption_features: Y, one row an image.
            alpha: Strength relative to the features' scale: λ = alpha · tr(XᵀX) / D.

        Raises:
            ValueError: `alpha` is not positive, or there are no images.
        """
        return cls.solve(Moments.of(image_features, caption_features), alpha)

    @classmethod
    def solve(cls, moments: Moments, alpha: float) -> AlignmentModel:
        """The ridge regression whose images have these moments.

        Raises:
            ValueError: `alpha` is not positive, or there are no images.
        """
        if not alpha > 0:
            raise ValueError(f"alpha must be positive, got {alpha}: without a ridge the map is not determined.")
        if moments.count == 0:
            raise ValueError("The alignment model needs images to learn from, and there are none.")
        mean_x, mean_y = moments.image / moments.count, moments.caption / moments.count
        gram = moments.gram - moments.count * torch.outer(mean_x, mean_x)
        cross = moments.cross - moments.count * torch.outer(mean_x, mean_y)
        scale = gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)  # one image alone has no spread
        gram.diagonal().add_(alpha * scale)
        weight = torch.cholesky_solve(cross, torch.linalg.cholesky(gram))
        return cls(weight, mean_y - mean_x @ weight, mean_y)

    def predict(self, image_features: Float[Tensor, "n d"]) -> Float[Tensor, "n e"]:
        """The caption vector that each image points to, in float64."""
        return image_features.double() @ self.weight + self.bias


def rank_of_prompt(
    predicted: Float[Tensor, "n e"],
    candidates: Float[Tensor, "c e"],
    own: Int64[Tensor, " n"],
    centre: Float[Tensor, " e"] | None = None,
) -> Int64[Tensor, " n"]:
    """From 1: where an image's own prompt stands among the candidate captions, by cosine.

    A tie, or a cosine that is not a number, counts against the image.

    Args:
        predicted: The caption vector that each image points to.
        candidates: Vectors of the captions that every image is compared with.
        own: Which candidate is the image's own prompt.
        centre: Subtracted from both sides first.
    """
    if centre is not None:
        predicted, candidates = predicted - centre, candidates - centre
    cosines = functional.normalize(predicted.double(), dim=-1) @ functional.normalize(candidates.double(), dim=-1).T
    # The own prompt is never below itself, so it is among the counted: ranks start at 1.
    return (~(cosines < cosines.gather(1, own[:, None]))).sum(1)


@dataclass(frozen=True)
class Rate:
    """A share of images with its standard error."""

    value: float
    error: float
    count: int

    def __str__(self) -> str:
        return f"{self.value:.3f} ± {self.error:.3f} (n = {self.count})"


def rate(result: Bool[NDArray[np.bool_], " n"]) -> Rate:
    """The share of images that were recognised, with its binomial standard error.

    Raises:
        ValueError: There are no images.
    """
    if len(result) == 0:
        raise ValueError("A rate over no images is not defined.")
    value = float(result.mean())
    return Rate(value, float(np.sqrt(value * (1 - value) / len(result))), len(result))


def rate_ratio(result: Bool[NDArray[np.bool_], " n"], reference: Bool[NDArray[np.bool_], " n"]) -> Rate:
    """The ratio of two rates over the same prompts, with its standard error by the delta method on the pairs.

    Not a number where the reference recognised nothing.

    Raises:
        ValueError: The lengths differ.
    """
    if len(result) != len(reference):
        raise ValueError(f"{len(result)} and {len(reference)} images are not of the same prompts.")
    if not reference.any():
        return Rate(float("nan"), float("nan"), len(result))
    ratio = float(result.mean() / reference.mean())
    residuals = result.astype(float) - ratio * reference
    return Rate(ratio, float(np.sqrt((residuals**2).mean() / len(result)) / reference.mean()), len(result))


class AlignmentJudge:
    """Ranks each image's prompt among captions of the same style, by ridges that never saw the image's concept.

    Args:
        images: Frozen image encoder.
        texts: Frozen caption encoder.
        store: Where features of the images are kept.
        folds: Concepts are dealt into this many folds; each fold is judged by the ridge of the others.
        alphas: Ridge strengths to choose from, by inner validation on real images of the other folds.
        seed: Seed of the folds.

    Raises:
        ValueError: Fewer than three folds: the strength is validated on one of those that are not judged.
    """

    def __init__(
        self,
        images: ImageEncoder,
        *,
        texts: TextEncoder,
        store: Store,
        folds: int = 5,
        alphas: Sequence[float] = ALPHAS,
        seed: int = 0,
    ) -> None:
        if folds < 3:
            raise ValueError(
                f"folds must be 3 or more, got {folds}: one is judged, one validates, the others are learned from."
            )
        self.images, self.texts, self.store = images, texts, store
        self.folds, self.alphas, self.seed = folds, tuple(alphas), seed
        self.captions: Mapping[tuple[str, str], str] = {}
        self.models: tuple[AlignmentModel, ...] = ()
        self.chosen_alphas: tuple[float, ...] = ()

    def fold(self, concept: str) -> int:
        """The fold of a concept: a hash, so that it does not move when images are added or left out."""
        return hash_text(f"alignment fold/{self.seed}/{concept}") % self.folds

    def fit(self, images: ImageSet, progress: Callable[[int, int], None] | None = None) -> AlignmentJudge:
        """Learns one ridge for each fold from the real images of the other folds.

        Args:
            images: Real images with the columns `concept` and, where there are several, `style`. Their first
                captions are used.
            progress: Called with (done, total) images while features are computed.

        Raises:
            ValueError: A column is missing, or the concepts are too few for the folds.
        """
        if "concept" not in images.columns:
            raise ValueError(
                f"The images need a column 'concept'; they have {', '.join(sorted(images.columns)) or 'none'}."
            )
        concepts = images.columns["concept"]
        styles = images.columns.get("style", ("",) * len(images))
        captions = [several[0] for several in images.captions]
        self.captions = dict(zip(zip(concepts, styles, strict=True), captions, strict=True))
        fold = torch.tensor([self.fold(concept) for concept in concepts])
        if len(set(fold.tolist())) < self.folds:
            raise ValueError(
                f"{len(set(concepts))} concepts fill only {len(set(fold.tolist()))} of {self.folds} folds; "
                "give more images or ask for fewer folds."
            )
        x = image_features(images, self.images, self.store, progress)
        y = caption_features(captions, self.texts, self.store)
        moments = [Moments.of(x[fold == k], y[fold == k]) for k in range(self.folds)]
        self.chosen_alphas = self._choose_alphas(x, y, fold, styles, moments)
        self.models = tuple(
            AlignmentModel.solve(_sum(moments, {k}), alpha) for k, alpha in enumerate(self.chosen_alphas)
        )
        return self

    def _choose_alphas(
        self, x: Tensor, y: Tensor, fold: Tensor, styles: Sequence[str], moments: Sequence[Moments]
    ) -> tuple[float, ...]:
        """For each fold, the strength that is best on the other folds, each of them left out in turn.

        The ridge without folds a and b serves both: validated on b it speaks for judging a, and the reverse.
        """
        hits = np.zeros((self.folds, len(self.alphas)))
        for a, b in combinations(range(self.folds), 2):
            rest = _sum(moments, {a, b})
            for index, alpha in enumerate(self.alphas):
                model = AlignmentModel.solve(rest, alpha)
                for judged, validated in ((a, b), (b, a)):
                    rows = (fold == validated).nonzero()[:, 0]
                    hits[judged, index] += _found_in_top(model, x[rows], y[rows], [styles[int(row)] for row in rows])
        return tuple(self.alphas[int(best)] for best in hits.argmax(1))

    def ranks(self, pixels: Pixels, concepts: Sequence[str], styles: Sequence[str]) -> Int64[NDArray[np.int64], " n"]:
        """From 1: the rank of each image's prompt among the captions of all the concepts in the image's style.

        Args:
            pixels: The images.
            concepts: What each was meant to show; all distinct. Together they are the candidates.
            styles: The style that each was asked for.

        Raises:
            ValueError: Concepts or candidate captions repeat, a caption is unknown, the lengths differ, or the judge is
                not fitted.
        """
        if not self.models:
            raise ValueError("The judge has not learned yet; call fit(images) first.")
        if not len(pixels) == len(concepts) == len(styles):
            raise ValueError(
                f"{len(pixels)} images, {len(concepts)} concepts and {len(styles)} styles were given; "
                "each image needs one of each."
            )
        _check_distinct("Concepts", concepts)
        features = self.images.encode_images(pixels)
        ranks = np.empty(len(concepts), dtype=np.int64)
        for style in sorted(set(styles)):
            captions = [self._caption(concept, style) for concept in concepts]
            _check_distinct("Candidate captions", captions)
            candidates = self.texts.encode_texts(captions)
            for fold, model in enumerate(self.models):
                rows = [row for row, c in enumerate(concepts) if styles[row] == style and self.fold(c) == fold]
                predicted = model.predict(features[rows])
                ranks[rows] = rank_of_prompt(
                    predicted, candidates, torch.tensor(rows, dtype=torch.int64), model.centre
                ).numpy()
        return ranks

    def top5(self, pixels: Pixels, concepts: Sequence[str], styles: Sequence[str]) -> Bool[NDArray[np.bool_], " n"]:
        """Whether each image's prompt is among the five nearest of `ranks`' candidates."""
        return self.ranks(pixels, concepts, styles) <= 5

    def _caption(self, concept: str, style: str) -> str:
        caption = self.captions.get((concept, style))
        if caption is None:
            raise ValueError(
                f"No image of concept {concept!r} in style {style!r} was given to fit, so its caption is not known."
            )
        return caption


def _sum(moments: Sequence[Moments], without: set[int]) -> Moments:
    """The moments of all folds but these: added up, never subtracted, so that nothing of a left-out fold remains."""
    first, *others = (part for index, part in enumerate(moments) if index not in without)
    for part in others:
        first = first + part
    return first


def _found_in_top(
    model: AlignmentModel, images: Tensor, captions: Tensor, styles: Sequence[str], share: float = 0.05
) -> int:
    """How many images have their own caption within the nearest `share` of the captions of their style."""
    result = 0
    for style in sorted(set(styles)):
        rows = torch.tensor([row for row, name in enumerate(styles) if name == style])
        ranks = rank_of_prompt(model.predict(images[rows]), captions[rows], torch.arange(len(rows)), model.centre)
        result += int((ranks <= max(1, round(share * len(rows)))).sum())
    return result


def _check_distinct(what: str, values: Sequence[str]) -> None:
    repeated = sorted({value for value in values if values.count(value) > 1}) if len(set(values)) < len(values) else []
    if repeated:
        raise ValueError(
            f"{what} must be distinct, but {repeated[0]!r} occurs more than once; a prompt cannot be told from itself."
        )

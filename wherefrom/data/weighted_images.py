"""What follows, for any form of a training set, from how often training sees each of its images."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from wherefrom.data.image_set import ImageSet
from wherefrom.data.repeats import weighted_fingerprint


class WeightedImages:
    """Base of forms of an image set that training averages over with the images' weights.

    Attributes:
        images: The images, whose column `repeats` says how often training sees each.
        fingerprint: Hash of everything that decides the values, weights apart.
    """

    images: ImageSet
    fingerprint: str

    @property
    def weights(self) -> Float[Tensor, " n"] | None:
        """How often training sees each image; None where it sees each once. See `ImageSet.weights`."""
        return None if self.images.weights is None else torch.from_numpy(self.images.weights)

    @property
    def seen(self) -> int:
        """Number of images that an epoch of training sees: Σ wᵢ."""
        return self.images.seen

    @property
    def weighted_fingerprint(self) -> str:
        """The fingerprint with the weights, for what is an average over the training set."""
        return weighted_fingerprint(self.fingerprint, self.images.weights)

"""Salts of keyed noise: one number for each use, so that two uses with the same other parts draw independent noise.

A key is `keyed_random.combine(salt, seed, …)`. The values are part of every number that was ever computed: a value that
is changed changes scores, images and trainings. So values stay for ever, and a new use takes a value that no other
has (`tests/runtime/test_salts.py`).

Two values were given twice before they stood in one place. Each second name is an alias of the first in Python's enum
(`Salt.TRAINING_SAMPLE is Salt.FISHER_TIMESTEP`), which is harmless: the parts that follow the salt differ in number, so
the keys do. `HISTORIC_ALIASES` lists them; there will be no others.
"""

from __future__ import annotations

from enum import IntEnum


class Salt(IntEnum):
    """First part of a key: what the noise is for."""

    # Training: order of an epoch, and what an image's visit draws.
    TRAINING_ORDER = 1
    TRAINING_FLIP = 2
    TRAINING_CAPTION = 3
    TRAINING_CAPTION_DROPOUT = 4
    TRAINING_TIMESTEP = 5
    TRAINING_NOISE = 6
    # Sampling of images: the first latent, and the noise of stochastic steps.
    SAMPLER_START = 101
    SAMPLER_STEP = 102
    # Losses of training images on a grid of timesteps, and at timesteps that each image draws.
    GRID_NOISE = 201
    SAMPLED_LOSS_NOISE = 202
    SAMPLED_LOSS_TIMESTEP = 203
    SAMPLED_LOSS_CAPTION = 204
    # The Fisher information.
    FISHER_TIMESTEP = 301
    FISHER_CAPTION = 302
    FISHER_NOISE = 303
    # A sample of training images, chosen by their ids (`EncodedImages.sample`).
    TRAINING_SAMPLE = 301
    # A query's loss.
    QUERY_TIMESTEP = 401
    QUERY_GRADIENT_NOISE = 402
    QUERY_VALUE_NOISE = 403
    # Rows of a random projection.
    PROJECTION_ROW = 502
    # JourneyTRAK's noise at the steps of a trajectory.
    JOURNEY_NOISE = 601
    # Training of a ranker: order of queries, images from outside, subsample of candidates, blocks of pairs.
    RANKER_QUERY_ORDER = 601
    RANKER_OUTSIDE_IMAGE = 602
    RANKER_SUBSAMPLE = 603
    RANKER_BLOCK = 604
    # Which queries of a teacher set validate, and which are left where fewer are asked for.
    TEACHER_SPLIT = 611
    TEACHER_SUBSET = 612
    # A query's loss beside those of training images.
    LOSS_EXCESS_NOISE = 702


# Second name -> first name of the values that were given twice.
HISTORIC_ALIASES = {"TRAINING_SAMPLE": "FISHER_TIMESTEP", "RANKER_QUERY_ORDER": "JOURNEY_NOISE"}

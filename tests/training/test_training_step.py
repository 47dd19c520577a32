"""The training step in plain PyTorch: a replay without Lightning ends on the same bits as the training."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
from diffusers import DDPMScheduler

import train
from tests.support.tiny import training_config
from wherefrom.models.noise_schedule import noise_schedule_of
from wherefrom.runtime.keyed_random import hash_texts
from wherefrom.training.keyed_batches import KeyedBatches
from wherefrom.training.training_step import TrainingStep, replay

STEPS, CLIP = 6, 0.05  # the clipping acts


@pytest.mark.filterwarnings(r"ignore:Checkpoint directory .* exists and is not empty:UserWarning")
@pytest.mark.parametrize(("max_snr_weight", "repeats"), [("5.0", False), ("null", True)])
def test_a_replay_is_the_training_to_the_last_bit(tmp_path: Path, max_snr_weight: str, repeats: bool) -> None:
    config = training_config(tmp_path, "run", steps=STEPS)
    if repeats:
        metadata = tmp_path / "pictures" / "train" / "metadata.jsonl"
        rows = [json.loads(line) for line in metadata.read_text().splitlines()]
        metadata.write_text(
            "".join(json.dumps({**row, "repeats": 1 + row["file_name"].count("1")}) + "\n" for row in rows)
        )
    options = ["--trainer.gradient_clip_val", str(CLIP), "--model.init_args.max_snr_weight", max_snr_weight]
    trained = train.main(["fit", "-c", str(config), *options])
    (losses,) = (tmp_path / "run").rglob("metrics.csv")
    logged = [float(row["train/loss"]) for row in csv.DictReader(losses.read_text().splitlines()) if row["train/loss"]]

    start = train.main(["-c", str(config), *options], run=False)  # the same seed: the same first weights
    module, data = start.model, start.datamodule
    assert not torch.equal(module.unet.conv_in.weight, trained.model.unet.conv_in.weight)
    data.prepare_data()
    data.setup()
    visits = data.visits(data.train_images, data.train_latents, training=True)
    weights = data.train_latents.weights
    assert (weights is None) != repeats
    stream = KeyedBatches(
        hash_texts(list(data.train_images.ids)),
        seed=data.seed,
        batch_size=data.batch_size,
        steps=STEPS,
        repeats=data.train_images.weights,
    )
    if repeats:  # 36 visits are more than one epoch of the 16 images and their copies
        assert len({visit for batch in stream for visit in batch}) == STEPS * data.batch_size
        assert data.train_images.seen == len(stream.positions) > 16
    optimizer = module.optimizer(module.unet.parameters())
    replayed = list(
        replay(
            module.recipe,
            network=module.unet,
            average=module.ema,
            optimizer=optimizer,
            batches=(visits.__getitems__(batch) for batch in stream),
            scheduler=module.scheduler(optimizer),
            gradient_clip_norm=CLIP,
        )
    )
    assert replayed == pytest.approx(logged, abs=1e-6)
    for name, value in trained.model.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


def test_settings_out_of_range_are_refused() -> None:
    schedule = noise_schedule_of(DDPMScheduler(prediction_type="v_prediction"))
    with pytest.raises(ValueError, match=r"ema_decay must be at least 0 and less than 1; given 1\.0"):
        TrainingStep(schedule, ema_decay=1.0)
    with pytest.raises(ValueError, match=r"max_snr_weight -1\.0: it must be positive"):
        TrainingStep(schedule, max_snr_weight=-1.0)

"""Training through the command line, in process: reproducible, resumable, recorded, and refusing what is wrong."""

from __future__ import annotations

import csv
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import wandb
import yaml
from diffusers import DDPMScheduler
from lightning.pytorch.cli import LightningCLI
from PIL import Image
from torch import Tensor, nn

import train
from callbacks import SampleGrid
from lightning_modules import Autoencoder, LatentDiffusion
from tests.support.tiny import tiny_folder, tiny_pipeline, tiny_unet, tiny_vae, training_config
from wherefrom.attributors.unlearning.unlearner import UnlearningSettings, unlearn
from wherefrom.curvature import fit_diagonal
from wherefrom.gradients.query_loss import QueryLatent
from wherefrom.models.diffusion import TRAINING_VERSION
from wherefrom.models.parameter_subsets import select_weights
from wherefrom.models.pipeline import load_model
from wherefrom.queries.sources import generate
from wherefrom.runtime.artifacts import Store
from wherefrom.runtime.distributed import Runner
from wherefrom.training.lr_schedules import WarmupStableDecay

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
    pytest.mark.filterwarnings("ignore:You passed in a `val_dataloader` but have no `validation_step`:UserWarning"),
]

# Recorded from this code; see `test_five_steps_give_the_recorded_losses`.
GOLDEN_LOSSES = [0.291809, 0.210322, 0.176916, 0.212383, 0.131465]

SGD = ["--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.init_args.lr"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where all runs share their images, latents and frozen parts."""
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def run(folder: Path) -> LightningCLI:
    """A whole run of eight steps, which also saves its pipeline."""
    return fit(folder, "whole", "--model.init_args.save_to", str(folder / "saved"))


def fit(folder: Path, name: str, *options: str, **settings: Any) -> LightningCLI:
    return train.main(["fit", "-c", str(training_config(folder, name, **settings)), *options])


def assert_same(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert result.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(result[name], value), name


def test_training_moves_the_weights_and_their_average_follows(run: LightningCLI, folder: Path) -> None:
    early = torch.load(folder / "whole" / "step=4.ckpt", weights_only=True)["state_dict"]
    late = run.model.state_dict()
    assert any(name.startswith("ema.") for name in late)
    for name in ("conv_in.weight", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"):
        for part in ("unet.", "ema."):
            assert not torch.equal(early[part + name], late[part + name])
        assert not torch.equal(late["unet." + name], late["ema." + name])
    assert run.trainer.global_step == 8


def test_the_average_is_the_recurrence(folder: Path) -> None:
    """θ̄ ← d θ̄ + (1 - d) θ, with d = min(decay, (1 + step) / (10 + step))."""
    name = "conv_in.weight"
    options = ["--trainer.callbacks.init_args.every_n_train_steps", "1"]
    fit(folder, "average", *options)
    states = [
        torch.load(folder / "average" / f"step={step}.ckpt", weights_only=True)["state_dict"] for step in range(1, 9)
    ]
    average = states[0]["ema." + name]
    for step, state in enumerate(states[1:], start=2):
        decay = min(0.5, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * state["unet." + name]
        torch.testing.assert_close(state["ema." + name], average, rtol=1e-5, atol=1e-7)


def test_two_trainings_with_one_seed_end_bit_identical(run: LightningCLI, folder: Path) -> None:
    again = fit(folder, "again")
    assert_same(again.model.state_dict(), run.model.state_dict())
    other = fit(folder, "other", "--seed_everything", "6").model.state_dict()
    assert not torch.equal(other["unet.conv_in.weight"], run.model.state_dict()["unet.conv_in.weight"])


def test_a_resumed_run_ends_bit_identical(run: LightningCLI, folder: Path) -> None:
    checkpoint = folder / "whole" / "step=4.ckpt"
    resumed = fit(folder, "resumed", "--ckpt_path", str(checkpoint))
    assert resumed.trainer.global_step == 8
    assert_same(resumed.model.state_dict(), run.model.state_dict())
    last = [torch.load(folder / name / "step=8.ckpt", weights_only=True) for name in ("whole", "resumed")]
    for left, right in zip(*(each["optimizer_states"][0]["state"].values() for each in last), strict=True):
        assert_same(left, right)
    assert last[0]["lr_schedulers"][0]["_last_lr"] == last[1]["lr_schedulers"][0]["_last_lr"]


def test_a_run_that_was_killed_after_its_last_checkpoint_leaves_its_model(run: LightningCLI, folder: Path) -> None:
    """Lightning calls no hook of training where a run resumes with no step left."""
    made = fit(
        folder,
        "ended",
        *(
            "--ckpt_path",
            str(folder / "whole" / "step=8.ckpt"),
            "--model.init_args.save_to",
            str(folder / "saved late"),
        ),
    )
    assert made.trainer.global_step == 8
    late, saved = (load_model(str(folder / name)).denoiser.state_dict() for name in ("saved late", "saved"))
    assert_same(late, saved)
    records = [json.loads((folder / name / "training.json").read_text()) for name in ("saved late", "saved")]
    assert all(each["steps"] == 8 for each in records)
    assert records[0]["metrics"]["val/loss"] == pytest.approx(records[1]["metrics"]["val/loss"], rel=1e-5)


def test_a_cut_checkpoint_is_got_over(run: LightningCLI, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / "cut").mkdir()
    whole = (folder / "whole" / "step=4.ckpt").read_bytes()
    (folder / "cut" / "step=4.ckpt").write_bytes(whole)
    (folder / "cut" / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    resumed = fit(folder, "from cut", "--ckpt_path", str(folder / "cut" / "last.ckpt"))
    assert re.search(r"last\.ckpt is damaged .*: going on from .*step=4\.ckpt instead", caplog.text)
    assert_same(resumed.model.state_dict(), run.model.state_dict())
    (folder / "cut" / "step=4.ckpt").write_bytes(b"")
    with pytest.raises(ValueError, match=r"last\.ckpt is damaged .* beside it is step=4\.ckpt"):
        fit(folder, "from nothing", "--ckpt_path", str(folder / "cut" / "last.ckpt"))


def test_leaving_images_out_changes_the_run(run: LightningCLI, folder: Path) -> None:
    left_out = fit(folder, "less", "--data.init_args.exclude", "[train/train-003.png]")
    assert len(left_out.datamodule.train_images) == 15
    assert not torch.equal(
        left_out.model.state_dict()["unet.conv_in.weight"], run.model.state_dict()["unet.conv_in.weight"]
    )


def test_an_unknown_id_in_exclude_is_an_error(folder: Path) -> None:
    with pytest.raises(ValueError, match="exclude names 1 ids that the data set does not have, such as 'nobody'"):
        fit(folder, "unknown", "--data.init_args.exclude", "[nobody]")


def test_a_loss_that_is_no_number_stops_the_run_and_keeps_what_was_saved(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"The training loss is (nan|inf) at step \d+\. Lower the learning rate"):
        fit(folder, "nan", *SGD, "1e15", "--trainer.callbacks.init_args.every_n_train_steps", "1")
    assert torch.load(folder / "nan" / "step=1.ckpt", weights_only=True)["global_step"] == 1


def test_training_without_a_number_of_steps_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="set max_steps"):
        fit(folder, "endless", "--trainer.max_steps", "-1", "--trainer.max_epochs", "1")


def test_accumulated_gradients_are_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match="accumulate_grad_batches is 2, but the keyed stream gives one batch"):
        fit(folder, "accumulated", "--trainer.accumulate_grad_batches", "2")


def test_the_pipeline_that_is_saved_is_the_average(run: LightningCLI, folder: Path) -> None:
    saved = load_model(str(folder / "saved"))
    for name, value in run.model.ema.state_dict().items():
        assert torch.equal(saved.denoiser.state_dict()[name], value.half().float()), name
    assert saved.noise_schedule.prediction == "v_prediction"
    drawn = generate(saved, prompts=["a red square"], seed=0, shape=run.model.latent_shape(), sampling_steps=2)
    assert drawn[0].pixels.shape == (8, 8, 3)


def test_a_run_can_start_from_saved_weights(run: LightningCLI, folder: Path) -> None:
    source = ["--model.init_args.init_from", str(folder / "saved" / "unet")]
    started = fit(folder, "started", *source, *SGD, "0.0", "--trainer.max_steps", "1")
    for part in (started.model.unet, started.model.ema):
        for name, value in run.model.ema.state_dict().items():
            assert torch.equal(part.state_dict()[name], value.half().float()), name


def read_metrics(folder: Path) -> list[dict[str, str]]:
    """The rows that the CSV logger left below a folder."""
    (metrics,) = folder.rglob("metrics.csv")
    return list(csv.DictReader(metrics.read_text().splitlines()))


def test_a_run_leaves_its_losses_and_its_configuration(run: LightningCLI, folder: Path) -> None:
    rows = read_metrics(folder / "whole")
    training = [float(row["train/loss"]) for row in rows if row["train/loss"]]
    assert len(training) == 8
    assert all(0 < loss < 100 for loss in training)
    assert [float(row["val/loss"]) for row in rows if row["val/loss"]] == [
        float(run.trainer.callback_metrics["val/loss"])
    ]
    (config_file,) = (folder / "whole").rglob("config.yaml")
    config = yaml.safe_load(config_file.read_text())
    assert config["seed_everything"] == 5
    assert config["model"]["init_args"]["ema_decay"] == 0.5
    assert config["data"]["init_args"]["batch_size"] == 6


def test_five_steps_give_the_recorded_losses(folder: Path) -> None:
    """Keyed draws, order, dropout, times, noise, weighting and optimizer together: the numerics of a training version.

    If this fails on purpose, raise `TRAINING_VERSION` with the new numbers: retrained models of the old one are others.
    """
    weighted = ["--model.init_args.max_snr_weight", "5.0", "--data.init_args.batch_size", "5"]
    fit(folder, "golden", *weighted, steps=5)
    losses = [float(row["train/loss"]) for row in read_metrics(folder / "golden") if row["train/loss"]]
    assert TRAINING_VERSION == 3
    np.testing.assert_allclose(losses, GOLDEN_LOSSES, rtol=1e-3)


def test_the_weight_of_a_timestep_caps_the_weight_of_the_squared_error_of_the_image() -> None:
    scheduler = DDPMScheduler(prediction_type="v_prediction")
    module = LatentDiffusion(tiny_unet(), noise_scheduler=scheduler, max_snr_weight=5.0)
    timesteps = torch.tensor([0, 50, 100, 200, 999])
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)[timesteps]
    ratio = alpha_bar / (1 - alpha_bar)
    expected = torch.minimum(ratio + 1, torch.tensor(5.0)) / (ratio + 1)
    torch.testing.assert_close(module.recipe.weights(timesteps), expected, rtol=1e-3, atol=0)
    assert LatentDiffusion(tiny_unet(), noise_scheduler=scheduler).recipe.weights(timesteps) == 1.0
    with pytest.raises(ValueError, match=r"max_snr_weight 0\.0: it must be positive"):
        LatentDiffusion(tiny_unet(), noise_scheduler=scheduler, max_snr_weight=0.0)
    with pytest.raises(ValueError, match=r"prediction_type 'v_prediction' \(it is 'epsilon'\)"):
        LatentDiffusion(tiny_unet(), noise_scheduler=DDPMScheduler(), max_snr_weight=5.0)


def test_validation_and_the_saved_configuration_give_the_same_loss(run: LightningCLI, folder: Path) -> None:
    (config,) = (folder / "whole").rglob("config.yaml")
    options = ["--ckpt_path", str(folder / "whole" / "step=8.ckpt"), "--trainer.logger", "false"]
    checked = train.main(["validate", "-c", str(config), *options])
    assert checked.trainer.callback_metrics["val/loss"] == run.trainer.callback_metrics["val/loss"]


def test_sample_grids_are_drawn_from_the_average(run: LightningCLI, tmp_path: Path) -> None:
    grids = SampleGrid(["a red square", "big blue circle"], str(tmp_path), sampling_steps=2)
    run.trainer.callbacks.append(grids)
    state = {name: value.clone() for name, value in run.model.state_dict().items()}

    def grid() -> np.ndarray:
        run.trainer.validate(run.model, run.datamodule, verbose=False)
        (path,) = tmp_path.iterdir()
        drawn = np.asarray(Image.open(path))
        path.unlink()
        return drawn

    def shake(module: nn.Module) -> None:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.mul_(1.5)

    try:
        first = grid()
        assert first.shape == (8, 16, 3)
        assert np.ptp(first) > 20
        assert np.array_equal(grid(), first)
        shake(run.model.unet)
        assert np.array_equal(grid(), first), "drawn from the weights that are trained"
        shake(run.model.ema)
        assert not np.array_equal(grid(), first)
    finally:
        run.trainer.callbacks.remove(grids)
        run.model.load_state_dict(state)


def test_the_grid_belongs_to_the_diffusion_model(folder: Path) -> None:
    grid = {"class_path": "SampleGrid", "init_args": {"prompts": ["a"], "folder": str(folder / "grids")}}
    with pytest.raises(ValueError, match="SampleGrid belongs to LatentDiffusion, not to Autoencoder"):
        train.main(autoencoder(folder, "no grid", "--trainer.callbacks", str([grid]), "--trainer.max_steps", "2"))


def test_wandb_works_offline_and_gets_the_configuration(folder: Path) -> None:
    logger = {
        "class_path": "lightning.pytorch.loggers.WandbLogger",
        "init_args": {"offline": True, "save_dir": str(folder / "wandb"), "project": "tests"},
    }
    (folder / "wandb").mkdir()
    done = fit(
        folder,
        "logged",
        "--trainer.logger+",
        str(logger),
        "--trainer.max_steps",
        "2",
        "--trainer.val_check_interval",
        "2",
    )
    result = done.trainer.loggers[1].experiment.config["config"]
    assert result["data"]["init_args"]["batch_size"] == 6
    assert result["model"]["init_args"]["unet"]["init_args"]["config"]["cross_attention_dim"] == 12
    wandb.finish()
    (record,) = (folder / "wandb").rglob("*.wandb")
    given_up = time.monotonic() + 60
    while b"train/loss" not in record.read_bytes() and time.monotonic() < given_up:
        time.sleep(0.1)  # wandb's own process writes the file, on a busy machine after `finish` has returned
    assert b"train/loss" in record.read_bytes()
    assert b"cross_attention_dim" in record.read_bytes()


def autoencoder(folder: Path, name: str, *options: str) -> list[str]:
    """Arguments of a short training of a tiny autoencoder on the same images."""
    training_config(folder, name)
    vae = {
        "down_block_types": ["DownEncoderBlock2D"] * 2,
        "up_block_types": ["UpDecoderBlock2D"] * 2,
        "block_out_channels": [4, 8],
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 8,
    }
    parts = {
        "--model": "Autoencoder",
        "--model.init_args.vae": "wherefrom.models.factories.autoencoder_from_config",
        "--model.init_args.vae.init_args.config": str(vae),
        "--data": "ImageFolder",
        "--data.init_args.folder": str(folder / "pictures"),
        "--data.init_args.store": str(folder / "store"),
        "--data.init_args.batch_size": "6",
        "--trainer.accelerator": "cpu",
        "--trainer.devices": "1",
        "--trainer.max_steps": "4",
        "--trainer.val_check_interval": "2",
        "--trainer.check_val_every_n_epoch": "null",
        "--trainer.num_sanity_val_steps": "0",
        "--trainer.use_distributed_sampler": "false",
        "--trainer.default_root_dir": str(folder / name),
        "--trainer.logger": "false",
        "--trainer.enable_checkpointing": "false",
        "--trainer.enable_progress_bar": "false",
        "--trainer.enable_model_summary": "false",
    }
    return ["fit", *(word for pair in parts.items() for word in pair), *options]


def test_the_autoencoder_trains_reproducibly_and_is_saved_with_its_scale(folder: Path) -> None:
    saved = folder / "vae"
    option = ["--model.init_args.save_to", str(saved)]
    first, again = (train.main(autoencoder(folder, f"autoencoder {run}", *option)) for run in range(2))
    assert_same(again.model.state_dict(), first.model.state_dict())
    spread = float(first.trainer.callback_metrics["val/latent_std"])
    loaded = type(first.model.vae).from_pretrained(saved)
    assert loaded.config.scaling_factor == pytest.approx(1 / spread, rel=1e-3)
    for name, value in first.model.vae.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].float(), value.half().float()), name


def test_the_decoder_alone_can_be_trained_further(folder: Path) -> None:
    """Its latents and their scale stay what they are, for the diffusion model that learned them."""
    first, second = folder / "first vae", folder / "second vae"
    train.main(autoencoder(folder, "first", "--model.init_args.save_to", str(first)))
    options = ["--model.init_args.init_from", str(first), "--model.init_args.decoder_only", "true"]
    further = train.main(
        autoencoder(folder, "second", *options, "--model.init_args.save_to", str(second), "--trainer.max_steps", "2")
    )
    before, after = (type(further.model.vae).from_pretrained(place) for place in (first, second))
    assert after.config.scaling_factor == before.config.scaling_factor
    same = {name: torch.equal(value, before.state_dict()[name]) for name, value in after.state_dict().items()}
    assert all(kept for name, kept in same.items() if not name.startswith("decoder."))
    assert not any(same[name] for name in ("decoder.conv_in.weight", "decoder.conv_out.weight"))


def test_the_decoder_learns_from_latents_with_keyed_noise(tmp_path: Path) -> None:
    vae, spread = tiny_vae(), 0.5
    type(vae).from_config(vae.config, scaling_factor=1 / spread).save_pretrained(tmp_path / "vae")
    settings = {"init_from": str(tmp_path / "vae"), "decoder_only": True, "latent_noise": 0.4}
    module = Autoencoder(vae, **settings)
    count = 2000
    pixels, keys = torch.zeros(count, 3, 8, 8), torch.arange(count)
    posterior = vae.encode(pixels).latent_dist
    added = (module.noisy(posterior, keys) - posterior.mean).detach()
    assert torch.equal(module.noisy(posterior, keys).detach(), posterior.mean.detach() + added)
    some = torch.tensor([7, 1900])
    alone = module.noisy(vae.encode(pixels[some]).latent_dist, keys[some]).detach()
    torch.testing.assert_close(alone, (posterior.mean.detach() + added)[some])
    # A standard deviation that is uniform between 0 and s has a mean square of s²/3.
    mean_square = added.square().flatten(1).mean(dim=1)
    assert float(mean_square.mean()) == pytest.approx((0.4 * spread) ** 2 / 3, rel=0.1)
    assert float(mean_square.min()) < 0.01 * float(mean_square.max()), "each image has a spread of its own"
    with pytest.raises(ValueError, match=re.escape("latent_noise -1.0: it must be positive")):
        Autoencoder(vae, **{**settings, "latent_noise": -1.0})
    with pytest.raises(ValueError, match="decoder_only true"):
        Autoencoder(vae, latent_noise=0.1)


def test_unlearning_under_lightning_is_unlearning(folder: Path, tmp_path: Path) -> None:
    """The ablation module moves the weights exactly as the plain function does, and logs what it did."""
    pipeline = tiny_pipeline(tmp_path / "pipeline")
    tiny_folder(tmp_path / "pictures")
    settings = {"steps": 2, "noise_samples": 8, "measurement_samples": 8, "relative_loss_increase": 0.01}
    parts = {
        "--model": "Unlearning",
        "--model.init_args.model": str(pipeline),
        "--model.init_args.prompt": "a red square",
        "--model.init_args.weights": "all",
        "--model.init_args.settings": str(settings),
        "--model.init_args.curvature.init_args.fisher.samples_per_image": "1",
        "--model.init_args.grid.timesteps": "2",
        "--model.init_args.save_to": str(tmp_path / "moved.safetensors"),
        "--data": "ImageFolder",
        "--data.init_args.folder": str(tmp_path / "pictures"),
        "--data.init_args.store": str(tmp_path / "store"),
        "--trainer.accelerator": "cpu",
        "--trainer.devices": "1",
        "--trainer.max_steps": "2",
        "--trainer.log_every_n_steps": "1",
        "--trainer.use_distributed_sampler": "false",
        "--trainer.logger": "CSVLogger",
        "--trainer.logger.save_dir": str(tmp_path / "log"),
        "--trainer.callbacks": "LossChange",
        "--trainer.enable_checkpointing": "false",
        "--trainer.enable_progress_bar": "false",
        "--trainer.enable_model_summary": "false",
        "--trainer.limit_val_batches": "0",
    }
    arguments = ["fit", *(word for pair in parts.items() for word in pair)]
    done = train.main(arguments)
    model, train_set = load_model(str(pipeline)), done.datamodule.train_latents
    names = list(select_weights(model.denoiser, "all"))
    runner = Runner(torch.device("cpu"))
    fisher = fit_diagonal(
        model,
        data=train_set,
        names=names,
        store=Store(tmp_path / "store"),
        runner=runner,
        settings=done.model.curvature.fisher,
    )
    query = generate(model, prompts=["a red square"], seed=0, shape=(4, 4, 4))[0]
    assert model.encoder is not None
    assert query.latent is not None
    latent = QueryLatent(query.id, query.latent, model.encoder.text.encode(["a red square"]).at(0))
    expected = unlearn(
        model,
        query=latent,
        weights="all",
        curvature=fisher,
        dataset_size=len(train_set),
        settings=UnlearningSettings(**settings),
        runner=runner,
    )
    assert done.trainer.global_step == 2
    assert_same({name: value.detach() for name, value in done.model.unet.named_parameters()}, expected.moved)
    assert (tmp_path / "moved.safetensors").exists()
    rows = read_metrics(tmp_path / "log")
    assert [float(row["unlearning/alpha"]) for row in rows] == pytest.approx(expected.alphas, rel=1e-5)
    loss_increases = [loss - expected.losses[0] for loss in expected.losses[1:]]
    assert [float(row["loss_change/query"]) for row in rows] == pytest.approx(loss_increases, rel=1e-4)
    assert all(float(row["loss_change/held_out"]) != 0 for row in rows)
    with pytest.raises(ValueError, match=r"trainer\.max_steps is 3, settings\.steps 2: make them equal"):
        train.main([*arguments, "--trainer.max_steps", "3"])


def rates(total: int, warmup: int, decay: int) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    schedule = WarmupStableDecay(optimizer, total, warmup, decay)
    result = []
    for _ in range(total + 1):
        result.append(schedule.get_last_lr()[0] / 2.0)
        optimizer.step()
        schedule.step()
    return result


def test_the_learning_rate_warms_up_stays_and_decays() -> None:
    root = [1 - (k / 4) ** 0.5 for k in range(5)]
    assert rates(12, 3, 4) == pytest.approx([1 / 3, 2 / 3, 1.0, 1, 1, 1, 1, 1, *root])
    assert rates(3, 0, 0) == [1.0] * 4
    assert rates(20, 3, 4)[:8] == rates(12, 3, 4)[:8], "until the decay begins the length does not matter"


def test_a_schedule_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=re.escape("warmup_steps 5 and decay_steps 6 do not fit into total_steps 10")):
        rates(10, 5, 6)

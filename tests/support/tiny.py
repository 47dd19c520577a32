"""Tiny real models and data sets, saved in their real formats, for tests."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    BertConfig,
    BertModel,
    BertTokenizer,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from wherefrom.data.encoded_images import EncodedImages
from wherefrom.data.image_set import ImageSet
from wherefrom.distillation.ranker import Ranker, save_ranker
from wherefrom.gradients.query_loss import QueryLatent
from wherefrom.models.conditioning import prompt_embeddings
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.encoders import CaptionEncoder, LatentEncoder, freeze
from wherefrom.models.factories import unet_from_config
from wherefrom.models.noise_schedule import NoiseSchedule
from wherefrom.models.pipeline import save_pipeline
from wherefrom.runtime.distributed import Runner

WORDS = [
    "red",
    "green",
    "blue",
    "grey",
    "dark",
    "light",
    "square",
    "circle",
    "stripe",
    "picture",
    "of",
    "a",
    "the",
    "big",
    "small",
]
LENGTH = 6


def unet_config(channels: tuple[int, ...] = (8, 16)) -> dict[str, Any]:
    """A U-Net of about 40,000 weights with cross-attention at every level."""
    return {
        "sample_size": 4,
        "in_channels": 4,
        "out_channels": 4,
        "block_out_channels": list(channels),
        "layers_per_block": 1,
        "down_block_types": ["CrossAttnDownBlock2D"] * len(channels),
        "up_block_types": ["CrossAttnUpBlock2D"] * len(channels),
        "cross_attention_dim": 12,
        "attention_head_dim": 2,
        "norm_num_groups": 4,
    }


def tiny_unet(seed: int = 0, channels: tuple[int, ...] = (8, 16)) -> UNet2DConditionModel:
    """That U-Net with random weights, frozen."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        unet = unet_from_config(unet_config(channels))
    freeze(unet)
    return unet


def tiny_schedule(prediction: str = "v_prediction") -> NoiseSchedule:
    """The papers' forward process."""
    return NoiseSchedule(DDPMScheduler(prediction_type=prediction))


def one_shape(images: ImageSet, latents: Tensor, embeddings: Tensor, null: Tensor, fingerprint: str) -> EncodedImages:
    """Encoded images of one shape, for a model conditioned on prompt embeddings alone."""
    return EncodedImages.of_one_shape(
        images,
        latents=latents,
        conditioning=prompt_embeddings(embeddings),
        empty=prompt_embeddings(null),
        fingerprint=fingerprint,
    )


def tiny_latents(count: int = 12, captions: int = 1, seed: int = 0) -> EncodedImages:
    """Random latents and prompt embeddings in float64, with ids that are not in the order of their hashes."""
    random = torch.Generator().manual_seed(seed)
    images = ImageSet(
        ids=tuple(f"picture/{index:03d}" for index in range(count)),
        captions=tuple(tuple(f"caption {index} {k}" for k in range(captions)) for index in range(count)),
        pixels=np.zeros((count, 8, 8, 3), dtype=np.uint8),
        columns={"license": ("CC0-1.0",) * count},
        fingerprint=f"tiny-{count}-{captions}-{seed}",
    )
    latents = torch.randn(count, 2, 4, 4, 4, generator=random, dtype=torch.float64)
    embeddings = torch.randn(count, captions, LENGTH, 12, generator=random, dtype=torch.float64)
    null = torch.zeros(LENGTH, 12, dtype=torch.float64)
    return one_shape(images, latents, embeddings, null, images.fingerprint)


def tiny_model(
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    encoder: LatentEncoder | None = None,
    prediction: str = "v_prediction",
    channels: tuple[int, ...] = (8, 16),
) -> DiffusionModel:
    """A tiny model, without an encoder unless one is given."""
    return DiffusionModel(tiny_unet(seed, channels).to(dtype), tiny_schedule(prediction), encoder)


def moved_copy(model: DiffusionModel, size: float = 0.02, seed: int = 7) -> DiffusionModel:
    """The model with Gaussian noise on all its weights, as if something had been unlearned."""
    random = torch.Generator().manual_seed(seed)
    denoiser = copy.deepcopy(model.denoiser)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            noise = torch.randn(parameter.shape, generator=random, dtype=torch.float64)
            parameter += (size * noise).to(parameter.dtype)
    return DiffusionModel(denoiser, model.noise_schedule, model.encoder)


def tiny_query(name: str = "query", seed: int = 3) -> QueryLatent:
    """A random query in float64."""
    random = torch.Generator().manual_seed(seed)
    latent = torch.randn(4, 4, 4, generator=random, dtype=torch.float64)
    return QueryLatent(name, latent, prompt_embeddings(torch.randn(LENGTH, 12, generator=random, dtype=torch.float64)))


def one_process() -> Runner:
    """The only process, on the CPU."""
    return Runner(torch.device("cpu"))


def tiny_text_encoder(folder: Path) -> Path:
    """A random BERT of 12 dimensions with a vocabulary of its own, saved with `save_pretrained`."""
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ",", *WORDS]
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    tokenizer = BertTokenizer(str(folder / "vocab.txt"), model_max_length=LENGTH)
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=16,
            max_position_embeddings=16,
        )
        BertModel(config).save_pretrained(folder)
    return folder


def tiny_vae() -> AutoencoderKL:
    """A random autoencoder from 8 x 8 images to 4 x 4 x 4 latents."""
    with torch.random.fork_rng():
        torch.manual_seed(2)
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(4, 8),
            layers_per_block=1,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=8,
            mid_block_add_attention=False,
        )
    return vae


def text_folder(pipeline: Path) -> Path:
    """Where the text encoder of a tiny pipeline is."""
    return pipeline.with_name(pipeline.name + "-text")


def tiny_encoder(folder: Path) -> LatentEncoder:
    """A tiny autoencoder, and a tiny text encoder that is kept in the folder."""
    return LatentEncoder(tiny_vae(), CaptionEncoder.from_pretrained(str(tiny_text_encoder(folder)), LENGTH))


def tiny_pipeline(folder: Path, seed: int = 0, unet: UNet2DConditionModel | None = None) -> Path:
    """A diffusers pipeline folder of tiny random parts."""
    encoder = tiny_encoder(text_folder(folder))
    model = DiffusionModel(tiny_unet(seed) if unet is None else unet, tiny_schedule(), encoder)
    save_pipeline(folder, model, str(text_folder(folder)), torch.float32)
    return folder


def tiny_folder(folder: Path, count: int = 16, size: int = 8, seed: int = 0) -> Path:
    """A folder of small random images in Hugging Face's imagefolder layout, with a validation split."""
    random = np.random.default_rng(seed)
    rows = []
    for split, number in (("train", count), ("validation", max(4, count // 4))):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for index in range(number):
            name = f"{split}-{index:03d}.png"
            Image.fromarray(random.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(folder / split / name)
            words = random.choice(WORDS, 3)
            rows.append(
                (
                    split,
                    {"file_name": name, "text": " ".join(words), "license": "CC0-1.0", "author": f"author {index % 3}"},
                )
            )
        lines = [json.dumps(row) for where, row in rows if where == split]
        (folder / split / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def training_config(folder: Path, name: str = "run", steps: int = 8, count: int = 16) -> Path:
    """An experiment file that trains the tiny U-Net on a tiny folder; all it makes goes below `folder / name`.

    Folder and pipeline are made once, so several runs below one folder share data and frozen parts.
    """
    images, pipeline, run = folder / "pictures", folder / "pipeline", folder / name
    if not images.exists():
        tiny_folder(images, count)
        tiny_pipeline(pipeline)
    optimizer = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.0}}
    schedule = {"total_steps": steps, "warmup_steps": 2, "decay_steps": 3}
    checkpoints = {"dirpath": str(run), "filename": "{step}", "every_n_train_steps": 4, "save_top_k": -1}
    config = {
        "seed_everything": 5,
        "model": {
            "class_path": "LatentDiffusion",
            "init_args": {
                "unet": {
                    "class_path": "wherefrom.models.factories.unet_from_config",
                    "init_args": {"config": unet_config()},
                },
                "noise_scheduler": {
                    "class_path": "diffusers.DDPMScheduler",
                    "init_args": {"prediction_type": "v_prediction"},
                },
                "optimizer": optimizer,
                "scheduler": {"class_path": "wherefrom.training.lr_schedules.WarmupStableDecay", "init_args": schedule},
                "ema_decay": 0.5,
                "text_source": str(text_folder(pipeline)),
            },
        },
        "data": {
            "class_path": "ImageFolder",
            "init_args": {
                "folder": str(images),
                "store": str(folder / "store"),
                "batch_size": 6,
                "encoder": {
                    "class_path": "wherefrom.models.encoders.LatentEncoder",
                    "init_args": {
                        "vae": str(pipeline / "vae"),
                        "text": str(text_folder(pipeline)),
                        "length": LENGTH,
                    },
                },
            },
        },
        "trainer": {
            "accelerator": "cpu",
            "devices": 1,
            "max_steps": steps,
            "val_check_interval": steps,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "use_distributed_sampler": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "default_root_dir": str(run),
            "logger": [{"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(run)}}],
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": checkpoints}],
        },
    }
    return _write_config(folder / f"{name}.yaml", config)


def attribution_config(folder: Path, name: str = "run", count: int = 16, **settings: Any) -> Path:
    """An experiment file that attributes one drawn image of a tiny pipeline over a tiny folder, in a few seconds."""
    images, pipeline = folder / "pictures", folder / "pipeline"
    if not images.exists():
        tiny_folder(images, count)
        tiny_pipeline(pipeline)
    config = {
        "model": str(pipeline),
        "data": {"class_path": "ImageFolder", "init_args": {"folder": str(images)}},
        "attributor": {
            "class_path": "AttributionByUnlearning",
            "init_args": {
                "weights": "all",
                "unlearning": {"noise_samples": 32, "measurement_samples": 32, "relative_loss_increase": 0.01},
                "grid": {"timesteps": 2},
                "curvature": {"class_path": "DiagonalFisher", "init_args": {"fisher": {"samples_per_image": 1}}},
            },
        },
        "queries": {"prompts": ["a big red square"], "sampling_steps": 2},
        "trainer": {"accelerator": "cpu", "devices": 1},
        "output": str(folder / name),
        "store": str(folder / "store"),
        **settings,
    }
    return _write_config(folder / f"{name}.yaml", config)


def _write_config(path: Path, config: dict[str, Any]) -> Path:
    path.write_text(json.dumps(config, indent=2))  # JSON is YAML
    return path


def tiny_clip(folder: Path) -> Path:
    """A random CLIP in open_clip's format."""
    sizes: dict[str, Any] = {
        "embed_dim": 6,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 64, "patch_size": 8, "head_width": 32},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1},
    }
    preprocess = {"size": 16, "mode": "RGB", "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    preprocess |= {"interpolation": "bicubic", "resize_mode": "shortest"}
    torch.manual_seed(0)
    state = {name: value.contiguous() for name, value in open_clip.CLIP(**sizes).state_dict().items()}
    folder.mkdir(parents=True, exist_ok=True)
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": sizes, "preprocess_cfg": preprocess}))
    return folder


def tiny_vision_transformer(folder: Path, registers: int = 0) -> Path:
    """A random vision transformer in transformers' format: a DINO, or with registers a DINOv2."""
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    torch.manual_seed(0)
    if registers:
        config = Dinov2WithRegistersConfig(**sizes, num_register_tokens=registers)
        Dinov2WithRegistersModel(config).save_pretrained(folder)
    else:
        ViTModel(ViTConfig(**sizes, intermediate_size=16), add_pooling_layer=False).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


def tiny_ranker(folder: Path, widths: dict[str, int], scale: float = -2.0, seed: int = 0) -> Path:
    """A random ranker for encoders of these names and widths, as if trained: its scale is negative."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        ranker = Ranker(sum(widths.values()), width=12, hidden=1, outputs=8)
    with torch.no_grad():
        ranker.scale.fill_(scale)
    save_ranker(folder, ranker, list(widths))
    return folder

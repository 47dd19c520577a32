"""Pipelines' folders as people have them: every tensor comes from the folder, or the folder is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.pipelines import pixart, stable_diffusion, stable_diffusion_3, stable_diffusion_xl
from tests.support.tiny import tiny_text_encoder
from wherefrom.models.loaded_parts import INDEX
from wherefrom.models.pipeline import TEXT_SOURCE, load_model

KINDS: dict[str, Callable[[Path], Path]] = {
    "sd1": stable_diffusion,
    "sdxl": stable_diffusion_xl,
    "pixart": pixart,
    "sd3": stable_diffusion_3,
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {kind: save(tmp_path_factory.mktemp(kind)) for kind, save in KINDS.items()}


@pytest.fixture
def folder(saved: dict[str, Path], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved["sd1"], tmp_path / "pipeline"))


def weights_of(part: Path) -> Path:
    (file,) = part.glob("*.safetensors")
    return file


def rewrite(part: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = weights_of(part)
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


PARTS = [
    ("sd1", "unet"),
    ("sd1", "vae"),
    ("sd1", "text_encoder"),
    ("sdxl", "text_encoder_2"),
    ("pixart", "transformer"),
    ("pixart", "text_encoder"),
    ("sd3", "transformer"),
    ("sd3", "text_encoder_3"),
]


@pytest.mark.parametrize(("kind", "part"), PARTS)
def test_a_tensor_that_is_missing_unknown_misshaped_or_infinite(
    saved: dict[str, Path], kind: str, part: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved[kind], tmp_path / "pipeline"))
    whole = load_file(weights_of(folder / part))
    name = sorted(key for key, value in whole.items() if value.dim() > 1 and key != "shared.weight")[-1]
    changes: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
        (lambda tensors: tensors.pop(name), f"{part} lacks the tensor {name}: .* random values"),
        (lambda tensors: tensors.update({name: tensors[name][1:].clone()}), f"{part}.*tensor {name} has shape"),
        (lambda tensors: tensors.update({"encoder.block.9.x": torch.ones(3)}), f"{part} holds the tensor encoder.bl"),
        (lambda tensors: tensors[name].view(-1)[:1].fill_(float("nan")), f"{part}.*tensor {name} holds values that"),
    ]
    for change, message in changes:
        save_file(whole, weights_of(folder / part), {"format": "pt"})
        rewrite(folder / part, change)
        with pytest.raises(ValueError, match=message) as caught:
            load_model(str(folder))
        assert "\n" not in str(caught.value)
        assert str(folder / part) in str(caught.value)


def test_the_keys_of_the_cross_attention_are_missed(folder: Path) -> None:
    """The fault that the issue tells of: all of them were random, and nothing was said."""

    def without_keys(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if ".attn2.to_k." in name]:
            del tensors[name]

    rewrite(folder / "unet", without_keys)
    with pytest.raises(ValueError, match=r"unet lacks \d+ tensors \(.*attn2.to_k.weight, .*, …\)"):
        load_model(str(folder))


def test_the_text_encoder_that_the_folder_names_is_checked_too(folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(folder / "text_encoder")
    (folder / "text_encoder").mkdir()
    text = tiny_text_encoder(tmp_path / "text")
    (folder / TEXT_SOURCE).write_text(json.dumps({"path": str(text)}))
    index = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps({**index, "text_encoder": ["transformers", "BertModel"]}))
    load_model(str(folder))
    # What no conditioning is made of may be missing, as in models that were saved without it.
    rewrite(text, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("pooler.")])
    load_model(str(folder))
    name = "encoder.layer.0.attention.self.key.weight"
    rewrite(text, lambda tensors: tensors.pop(name))
    with pytest.raises(ValueError, match=f"{text} lacks the tensor {name}"):
        load_model(str(folder))


def test_what_a_whole_clip_holds_beside_its_text_encoder_is_no_fault(folder: Path) -> None:
    before = load_model(str(folder))
    rewrite(
        folder / "text_encoder",
        lambda tensors: tensors.update(
            {
                "text_model.embeddings.position_ids": torch.arange(77)[None],
                "vision_model.pre_layrnorm.weight": torch.ones(4),
                "logit_scale": torch.tensor(1.0),
            }
        ),
    )
    after = load_model(str(folder))
    assert before.encoder is not None
    assert after.encoder is not None
    assert before.encoder.identity() == after.encoder.identity()


def test_tied_weights_are_in_the_file_once(saved: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved["pixart"], tmp_path / "pipeline"))
    before = load_model(str(folder))
    rewrite(
        folder / "text_encoder",
        lambda tensors: tensors.update({"encoder.embed_tokens.weight": tensors.pop("shared.weight")}),
    )
    after = load_model(str(folder))
    assert before.encoder is not None
    assert after.encoder is not None
    assert before.encoder.identity() == after.encoder.identity()


def test_parts_that_are_not_there(folder: Path) -> None:
    shutil.rmtree(folder / "vae")
    with pytest.raises(ValueError, match=r"has no folder 'vae'.*AutoencoderKL.*not whole"):
        load_model(str(folder))
    (folder / "vae").mkdir()
    with pytest.raises(ValueError, match=r"vae has no config.json.*not whole"):
        load_model(str(folder))
    (folder / "vae" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"vae holds no weights"):
        load_model(str(folder))
    (folder / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"version https://git-lfs")
    with pytest.raises(ValueError, match=r"vae cannot be loaded as a AutoencoderKL") as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


def test_the_index_leads_to_no_code(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    for kind, message in (
        (["this", "Antigravity"], "the part unet is of 'this'; only parts of diffusers and transformers"),
        (["diffusers", "UNetOfTomorrow"], "unet is a UNetOfTomorrow, which diffusers .* does not have"),
    ):
        (folder / INDEX).write_text(json.dumps({**index, "unet": kind}))
        with pytest.raises(ValueError, match=message):
            load_model(str(folder))
    for text in ("[]", "{"):
        (folder / INDEX).write_text(text)
        with pytest.raises(ValueError, match=INDEX):
            load_model(str(folder))


@pytest.mark.parametrize("kind", KINDS)
def test_folders_of_one_variant_shards_and_bins_give_what_the_plain_folder_gives(
    saved: dict[str, Path], kind: str, tmp_path: Path
) -> None:
    half = DiffusionPipeline.from_pretrained(saved[kind], dtype=torch.float16)
    half.save_pretrained(tmp_path / "plain")
    half.save_pretrained(tmp_path / "variant", variant="fp16")
    half.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    half.save_pretrained(tmp_path / "sharded_variant", max_shard_size="20KB", variant="fp16")
    half.save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert not list((tmp_path / "bin").rglob("diffusion_pytorch_model*.safetensors"))
    assert list((tmp_path / "sharded").rglob("*-00001-of-*"))
    plain = load_model(str(tmp_path / "plain"))
    assert plain.notes == ()
    for way in ("variant", "sharded", "sharded_variant", "bin"):
        model = load_model(str(tmp_path / way))
        assert model.fingerprint() == plain.fingerprint()
        assert model.encoder is not None
        assert plain.encoder is not None
        assert model.encoder.identity() == plain.encoder.identity()
        assert bool(model.notes) is way.endswith("variant"), model.notes
        assert all("'fp16'" in note for note in model.notes)


def test_of_several_variants_none_is_guessed(folder: Path) -> None:
    file = weights_of(folder / "unet")
    for variant in ("fp16", "non_ema"):
        shutil.copy(file, file.with_name(f"diffusion_pytorch_model.{variant}.safetensors"))
    assert load_model(str(folder)).notes == ()  # the file without a variant is the pipeline's own
    file.unlink()
    with pytest.raises(ValueError, match="several variants of the weights \\(fp16, non_ema\\)"):
        load_model(str(folder))


def test_nothing_is_unpickled(folder: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (Path(folder / "exploded"),))  # type: ignore[return-value]

    weights_of(folder / "unet").unlink()
    torch.save({"conv_in.weight": Bomb()}, folder / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="unet cannot be loaded"):
        load_model(str(folder))
    assert not (folder / "exploded").exists()
    weights_of(folder / "text_encoder").unlink()
    torch.save({"embeddings": Bomb()}, folder / "text_encoder" / "pytorch_model.bin")
    (folder / "unet" / "diffusion_pytorch_model.bin").unlink()
    with pytest.raises(ValueError, match=r"(text_encoder|unet)"):
        load_model(str(folder))
    assert not (folder / "exploded").exists()

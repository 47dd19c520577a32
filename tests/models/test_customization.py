"""Customized models: both layouts and both halves, what training moves, and attribution with the new word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import evaluate
import train
from datamodules import Exemplars, ImageFolder
from lightning_modules import CustomDiffusion
from tests.support.pipelines import stable_diffusion, stable_diffusion_xl
from tests.support.tiny import LENGTH, attribution_config, text_folder, tiny_folder, tiny_pipeline
from wherefrom.models.conditioning import PROMPT
from wherefrom.models.customization import WEIGHTS, read_customization, save_customized
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.parameter_subsets import select_weights
from wherefrom.models.pipeline import load_customized, load_model
from wherefrom.rankings.ranking_file import read_ranking
from wherefrom.runtime import keyed_random
from wherefrom.training.keyed_batches import NOISE

WORD = "<new1>"
pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Checkpoint directory .* exists and is not empty:UserWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed from:UserWarning"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("base"))


def own(base: Path) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """K/V and an embedding that a training of this base may have left."""
    random = torch.Generator().manual_seed(5)
    chosen = select_weights(load_model(str(base)).denoiser, "cross_attention_kv")
    weights = {name: torch.randn(value.shape, generator=random) for name, value in chosen.items()}
    return weights, torch.randn(12, generator=random)


def as_processors(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """diffusers' names, with the layers that have nothing of their own as its training script writes them."""
    result: dict[str, Any] = {}
    for name, value in weights.items():
        layer, kind, _ = name.rsplit(".", 2)
        result[f"{layer}.processor.{kind}_custom_diffusion.weight"] = value
        result[f"{layer.replace('attn2', 'attn1')}.processor"] = {}
    return result


def write(folder: Path, weights: dict[str, Any] | None, words: dict[str, Any] | None, suffix: str = ".bin") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in ((WEIGHTS, weights), (WORD, words)):
        if content is not None:
            torch.save(content, folder / f"{name}{suffix}")
    return folder


def states(model: DiffusionModel, caption: str) -> torch.Tensor:
    assert model.encoder is not None
    return model.encoder.text.encode([caption])[PROMPT][0]


@pytest.mark.parametrize("layout", ["papers", "diffusers", "safetensors"])
def test_both_layouts_give_the_weights_and_the_word(base: Path, layout: str, tmp_path: Path) -> None:
    weights, embedding = own(base)
    if layout == "papers":
        write(tmp_path / "model", weights, {WORD: embedding}, ".pt")
    elif layout == "diffusers":
        write(tmp_path / "model", as_processors(weights), {WORD: embedding[None]})
    else:
        (tmp_path / "model").mkdir()
        save_file(weights, tmp_path / "model" / f"{WEIGHTS}.safetensors")
        save_file({WORD: embedding}, tmp_path / "model" / f"{WORD}.safetensors")
    model, plain = load_customized(str(base), tmp_path / "model"), load_model(str(base))
    for name, value in model.denoiser.state_dict().items():
        torch.testing.assert_close(value, weights.get(name, plain.denoiser.state_dict()[name]), rtol=0, atol=0)
    assert model.encoder is not None
    assert plain.encoder is not None
    text = model.encoder.text
    assert text.tokenizer(f"a {WORD} b", add_special_tokens=False).input_ids[1] == len(plain.encoder.text.tokenizer)
    table: Any = text.model
    torch.testing.assert_close(table.get_input_embeddings().weight[-1], embedding, rtol=0, atol=0)
    before: Any = plain.encoder.text.model
    unchanged = before.get_input_embeddings().weight
    torch.testing.assert_close(table.get_input_embeddings().weight[:-1], unchanged, rtol=0, atol=0)
    torch.testing.assert_close(states(model, "a cat"), states(plain, "a cat"))
    assert not torch.allclose(states(model, f"a {WORD} cat"), states(plain, f"a {WORD} cat"))
    assert model.fingerprint() != plain.fingerprint()
    assert model.encoder.identity() != plain.encoder.identity()  # or states of the old meaning would be found again


def test_what_is_saved_is_read_again(base: Path, tmp_path: Path) -> None:
    weights, embedding = own(base)
    model = load_customized(str(base), write(tmp_path / "made", weights, {WORD: embedding}))
    save_customized(tmp_path / "saved", str(base), model, [WORD])
    kept = read_customization(tmp_path / "saved")
    assert set(kept.weights) == set(weights)
    assert all(torch.equal(kept.weights[name], value) for name, value in weights.items())
    assert torch.equal(kept.embeddings[WORD], embedding)
    again = load_model(str(tmp_path / "saved"))
    assert again.fingerprint() == model.fingerprint()
    torch.testing.assert_close(states(again, WORD), states(model, WORD))
    assert "processor.to_k_custom_diffusion.weight" in next(
        iter(load_file(tmp_path / "saved" / f"{WEIGHTS}.safetensors"))
    )
    with pytest.raises(ValueError, match="may hold no slash"):
        save_customized(tmp_path / "saved", str(base), model, ["<../new>"])


def test_half_a_model_is_named_as_such(base: Path, tmp_path: Path) -> None:
    weights, embedding = own(base)
    with pytest.raises(ValueError, match=r"only the cross-attention weights \(.*\.bin\) and no new word: without"):
        load_customized(str(base), write(tmp_path / "a", weights, None))
    with pytest.raises(ValueError, match=r"only the new word \(<new1>\.bin\) and no cross-attention weights: without"):
        load_customized(str(base), write(tmp_path / "b", None, {WORD: embedding}))
    with pytest.raises(ValueError, match="holds no customized model"):
        load_customized(str(base), write(tmp_path / "c", None, None))
    with pytest.raises(FileNotFoundError, match="no folder"):
        load_customized(str(base), tmp_path / "nowhere")


def test_what_does_not_belong_is_refused(base: Path, tmp_path: Path) -> None:
    weights, embedding = own(base)
    words = {WORD: embedding}
    first = next(iter(weights))

    def refused(match: str, weights: Any, words: Any = words) -> None:
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        with pytest.raises(ValueError, match=match):
            load_customized(str(base), write(folder, weights, words))

    refused("3 of the|of the .* cross-attention K/V weights", dict(list(weights.items())[1:]))
    refused("has shape", {**weights, first: weights[first][:, :-1]})
    refused("has no weight 'else'", {**weights, "else": embedding})
    refused("no weight of Custom Diffusion", {**weights, "a.attn2.processor.to_x.weight": embedding})
    refused("should be a tensor; found int", {**weights, first: 3})
    refused("should hold named tensors; found list", [1])
    refused("should hold named tensors; found a tensor", embedding)
    refused("customized from another base", weights, {WORD: embedding[:-1]})
    refused("should be one embedding", weights, {WORD: torch.stack([embedding] * 2)})
    refused("knows 'a' already", weights, {"a": embedding})
    folder = write(tmp_path / "twice", weights, words)
    torch.save(weights, folder / f"{WEIGHTS}.pt")
    with pytest.raises(ValueError, match="several files of weights"):
        load_customized(str(base), folder)
    (write(tmp_path / "damaged", weights, words) / f"{WEIGHTS}.bin").write_bytes(b"nothing")
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        load_customized(str(base), tmp_path / "damaged")
    (tmp_path / "no base").mkdir()
    (tmp_path / "no base" / "customized.json").write_text("[]")
    with pytest.raises(ValueError, match=r'should read \{"base"'):
        load_model(str(tmp_path / "no base"))
    for first, second in (("own", "own"), ("one", "other"), ("other", "one")):
        (tmp_path / first).mkdir(exist_ok=True)
        (tmp_path / first / "customized.json").write_text(json.dumps({"base": f"../{second}"}))
    for name in ("own", "one"):
        with pytest.raises(ValueError, match="leads back to"):
            load_model(str(tmp_path / name))
    both = stable_diffusion_xl(tmp_path / "xl")
    with pytest.raises(ValueError, match="cannot be customized"):
        load_customized(str(both), write(tmp_path / "for xl", weights, words))


class Ran:
    """Leaves a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (self.path,)  # type: ignore[return-value]


def test_nothing_in_a_file_is_run(base: Path, tmp_path: Path) -> None:
    weights, embedding = own(base)
    write(tmp_path / "hostile", {**weights, "x": Ran(tmp_path / "ran")}, {WORD: embedding})
    with pytest.raises(ValueError, match="cannot be read as tensors"):
        load_customized(str(base), tmp_path / "hostile")
    assert not (tmp_path / "ran").exists()


# Training.


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model, four exemplars of a new word, and a prior."""
    root = tmp_path_factory.mktemp("world")
    tiny_pipeline(root / "pipeline")
    tiny_folder(root / "prior", 12)
    (root / "exemplars").mkdir()
    random = np.random.default_rng(1)
    lines = []
    for index in range(4):
        Image.fromarray(random.integers(0, 255, (8, 8, 3), dtype=np.uint8)).save(root / "exemplars" / f"{index}.png")
        lines.append(json.dumps({"file_name": f"{index}.png", "text": f"a big {WORD} square"}))
    (root / "exemplars" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    return root


def fit(world: Path, name: str, *options: str, steps: int = 4, prior: bool = True, word: str = WORD) -> Path:
    encoder = {"vae": str(world / "pipeline" / "vae"), "text": str(text_folder(world / "pipeline")), "length": LENGTH}
    data: dict[str, Any] = {
        "folder": str(world / "exemplars"),
        "store": str(world / "store"),
        "batch_size": 2,
        "encoder": {"class_path": "wherefrom.models.encoders.LatentEncoder", "init_args": encoder},
    }
    if prior:
        init_args = {"folder": str(world / "prior"), "store": str(world / "store"), "batch_size": 3}
        data["prior"] = {"class_path": "ImageFolder", "init_args": init_args}
    config = {
        "seed_everything": 0,
        "model": {
            "class_path": "CustomDiffusion",
            "init_args": {
                "base": str(world / "pipeline"),
                "word": word,
                "start": "red",
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.0}},
                "save_to": str(world / name / "model"),
            },
        },
        "data": {"class_path": "Exemplars", "init_args": data},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": steps,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "use_distributed_sampler": False,
            "default_root_dir": str(world / name),
            "callbacks": [
                {
                    "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
                    "init_args": {
                        "dirpath": str(world / name),
                        "filename": "{step}",
                        "every_n_train_steps": 2,
                        "save_top_k": -1,
                    },
                }
            ],
        },
    }
    file = world / f"{name}.yaml"
    file.write_text(json.dumps(config))
    train.main(["fit", "-c", str(file), *options])
    return world / name / "model"


def test_only_keys_values_and_the_new_word_move(world: Path) -> None:
    model, plain = load_model(str(fit(world, "run"))), load_model(str(world / "pipeline"))
    moved = select_weights(plain.denoiser, "cross_attention_kv")
    for name, value in model.denoiser.state_dict().items():
        assert torch.equal(value, plain.denoiser.state_dict()[name]) == (name not in moved), name
    assert model.encoder is not None
    assert plain.encoder is not None
    after: Any = model.encoder.text.model.state_dict()
    for name, value in plain.encoder.text.model.state_dict().items():
        assert torch.equal(after[name][: len(value)], value), name
    table, known = after["embeddings.word_embeddings.weight"], plain.encoder.text.tokenizer
    assert len(table) == len(known) + 1
    start = known("red", add_special_tokens=False).input_ids[0]
    assert (table[-1] - table[start]).abs().max() > 1e-3


def test_gradients_are_those_of_the_written_out_loss(world: Path) -> None:
    """One step of plain gradient descent, by autograd through a text encoder whose whole table asks for gradients."""
    sgd = ["--model.init_args.optimizer", "torch.optim.SGD", "--model.init_args.optimizer.init_args.lr", "1.0"]
    folder = fit(world, "sgd", *sgd, steps=1)
    module = CustomDiffusion(str(world / "pipeline"), word=WORD, start="red")
    model = module.model()
    encoder = load_model(str(world / "pipeline")).encoder
    store = str(world / "store")
    prior = ImageFolder(str(world / "prior"), store=store, batch_size=3)
    data = Exemplars(str(world / "exemplars"), prior=prior, encoder=encoder, store=store, batch_size=2)

    class Steps:
        max_steps, global_step, global_rank, world_size, accumulate_grad_batches = 1, 0, 0, 1, 1

    data.trainer = Steps()  # type: ignore[assignment]
    data.setup()
    batches = {name: next(iter(loader)) for name, loader in data.train_dataloader().items()}
    text: Any = module.text[0].model
    table = text.get_input_embeddings().weight.requires_grad_(True)
    loss = torch.zeros(())
    for name, batch in batches.items():
        conditioning = module.text[0].embed(batch.captions) if name == "exemplars" else batch.conditioning
        noise = keyed_random.normal(
            keyed_random.combine(NOISE, batch.keys), batch.latents.shape[1:], batch.latents.dtype
        )
        loss = (
            loss
            + model.losses(batch.latents, conditioning, (batch.times * model.noise_schedule.steps).long(), noise).mean()
        )
    loss.backward()
    result = read_customization(folder)
    for name, parameter in module.moved.items():
        torch.testing.assert_close(result.weights[name], parameter.detach() - parameter.grad, rtol=1e-4, atol=1e-6)
    assert table.grad is not None
    expected = (table - table.grad)[module.number].detach()
    torch.testing.assert_close(result.embeddings[WORD], expected, rtol=1e-4, atol=1e-6)


def test_a_prior_without_weight_is_no_prior_and_a_resumed_run_is_a_whole_one(world: Path) -> None:
    without = read_customization(fit(world, "without", prior=False))
    weightless = read_customization(fit(world, "weightless", "--model.init_args.prior_weight", "0.0"))
    with_it = read_customization(fit(world, "with"))
    resumed = read_customization(fit(world, "resumed", "--ckpt_path", str(world / "with" / "step=2.ckpt")))
    for name, value in without.weights.items():
        assert torch.equal(weightless.weights[name], value)
        assert not torch.equal(with_it.weights[name], value)
        assert torch.equal(resumed.weights[name], with_it.weights[name])
    assert torch.equal(resumed.embeddings[WORD], with_it.embeddings[WORD])


def test_images_are_attributed_by_prompts_with_the_new_word(world: Path, tmp_path: Path) -> None:
    model = fit(world, "asked")
    config = attribution_config(tmp_path, model=str(model))
    evaluate.main(["attribute", "-c", str(config), "--queries.prompts", json.dumps([f"a {WORD} circle"])])
    ranking = read_ranking(tmp_path / "run")
    assert len(ranking) > 0


def test_what_cannot_be_learned_is_refused(world: Path) -> None:
    with pytest.raises(ValueError, match=r"lacks the new word <new2>: captions say what it means"):
        fit(world, "other", word="<new2>")
    with pytest.raises(ValueError, match="knows 'blue' already"):
        fit(world, "known", word="blue")
    with pytest.raises(ValueError, match="'red blue' is 2 tokens"):
        fit(world, "long", "--model.init_args.start", "red blue")
    with pytest.raises(ValueError, match=r"prior_weight must not be negative; given -1\.0"):
        fit(world, "negative", "--model.init_args.prior_weight", "-1.0")

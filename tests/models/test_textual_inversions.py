"""Learned words: prompts and captions are read as diffusers' own pipelines read them, to the last bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.support.pipelines import images, pixart, stable_diffusion, stable_diffusion_xl
from wherefrom.data.encoded_images import encode_image_set
from wherefrom.data.image_set import ImageSet
from wherefrom.models.conditioning import POOLED, PROMPT
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.pipeline import load_model, load_pipeline, model_from_pipeline
from wherefrom.models.textual_inversions import is_textual_inversion, read_inversions, several_vectors
from wherefrom.runtime.artifacts import Store

WORDS = ["a <cat> in red", "<dog> and <cat>, <cat>", "a cat", "", "blue<cat>"]


def vectors(count: int, width: int = 12, seed: int = 3) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion(tmp_path_factory.mktemp("sd"))


@pytest.fixture(scope="module")
def xl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stable_diffusion_xl(tmp_path_factory.mktemp("xl"))


def linked(folder: Path, base: Path) -> Path:
    """A pipeline's folder that shares another's parts."""
    folder.mkdir()
    for part in base.iterdir():
        (folder / part.name).symlink_to(part)
    return folder


@torch.no_grad()
def theirs(pipeline: Any, prompts: list[str]) -> tuple[Tensor, ...]:
    """Embeddings, and pooled vectors where there are any, by the pipeline itself."""
    result = pipeline.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return tuple(each for each in result[::2] if each is not None)


def ours(model: DiffusionModel, prompts: list[str]) -> tuple[Tensor, ...]:
    assert model.encoder is not None
    made = model.encoder.text.encode(prompts)
    return tuple(made[name] for name in (PROMPT, POOLED) if name in made)


def same(pipeline: Any, model: DiffusionModel, prompts: list[str]) -> bool:
    pairs = zip(theirs(pipeline, prompts), ours(model, prompts), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)


def test_words_of_several_vectors_are_read_as_the_pipeline_reads_them(sd: Path) -> None:
    pipeline: Any = load_pipeline(str(sd))
    earlier = model_from_pipeline(pipeline)
    assert earlier.encoder is not None
    (were,), before = ours(earlier, WORDS), earlier.encoder.text.identity()
    pipeline.load_textual_inversion({"<cat>": vectors(3)})
    pipeline.load_textual_inversion({"<dog>": vectors(1, seed=4)})
    assert several_vectors(pipeline.tokenizer) == ["<cat>"]
    model = model_from_pipeline(pipeline)
    assert same(pipeline, model, WORDS)
    (embeddings,) = ours(model, WORDS)
    assert not torch.equal(embeddings[0], were[0])
    torch.testing.assert_close(embeddings[2:4], were[2:4])
    # What was wrapped before has its own tokenizer and its own table, and stays what it was.
    assert torch.equal(ours(earlier, WORDS)[0], were)
    assert earlier.encoder.text.identity() == before
    # The three vectors follow each other: what the word alone would say is something else.
    tokens = pipeline.tokenizer("a <cat> <cat>_1 <cat>_2 in red").input_ids
    assert len(tokens) == 2 + 1 + 3 + 5
    assert model.encoder is not None
    identity = model.encoder.text.identity()
    changed = {name for name in identity if identity[name] != before.get(name)}
    assert changed == {"text_encoder", "tokenizer", "several_vectors"}
    pipeline.unload_textual_inversion()
    again = model_from_pipeline(pipeline).encoder
    assert again is not None
    assert again.text.identity() == before
    text = earlier.encoder.text  # a word that the model itself is taught later is seen too
    pipeline.load_textual_inversion({"<cat>": vectors(3)}, tokenizer=text.tokenizer, text_encoder=text.model)
    assert text.identity() != before
    assert torch.equal(ours(earlier, WORDS[:1])[0], embeddings[:1])


def test_captions_of_training_images_are_written_out_too(sd: Path, tmp_path: Path) -> None:
    folder = linked(tmp_path / "with", sd)
    save_file({"<cat>": vectors(3)}, folder / "learned_embeds.safetensors")
    model, plain = load_model(str(folder)), images(2)
    train = ImageSet(plain.ids, (("a <cat>",), ("a cat",)), plain.pixels, plain.columns, "cats")
    assert model.encoder is not None
    store = Store(tmp_path / "store")
    encoded = encode_image_set(train, encoder=model.encoder, store=store)
    expected = theirs(load_pipeline(str(folder)), ["a <cat>", "a cat"])[0]
    assert torch.equal(encoded.conditioning_at(torch.arange(2), 0)[PROMPT], expected)
    without = load_model(str(sd)).encoder
    assert without is not None
    other = encode_image_set(train, encoder=without, store=store)
    assert other.fingerprint != encoded.fingerprint
    assert not torch.equal(other.conditioning_at(torch.arange(2), 0)[PROMPT], expected)


def test_every_word_counts_where_captions_are_cut(sd: Path) -> None:
    pipeline: Any = load_pipeline(str(sd))
    pipeline.load_textual_inversion({"<cat>": vectors(5)})
    model = model_from_pipeline(pipeline)
    assert model.encoder is not None
    assert model.encoder.text.cut(["<cat> " * 15, "<cat> " * 16]) == [1]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("learned_embeds.safetensors", {"<cat>": vectors(3)}, ["<cat>"]),
        ("some style.safetensors", {"<cat>": vectors(1)[0]}, ["<cat>"]),
        ("embeddings.safetensors", {"<cat>": vectors(2), "<dog>": vectors(1)}, ["<cat>", "<dog>"]),
        ("cat.safetensors", {"emb_params": vectors(2)}, ["cat"]),
        ("learned_embeds.bin", {"<cat>": vectors(3)}, ["<cat>"]),
        ("cat-v2.pt", {"string_to_param": {"*": vectors(2)}, "name": "<cat>", "step": 1}, ["<cat>"]),
        ("mine.bin", {"<cat>": vectors(2)}, ["<cat>"]),
    ],
)
def test_files_in_the_folder_teach_their_words(
    sd: Path, tmp_path: Path, name: str, content: dict[str, Any], words: list[str]
) -> None:
    folder = linked(tmp_path / "with", sd)
    (save_file if name.endswith(".safetensors") else torch.save)(content, folder / name)
    pipeline: Any = load_pipeline(str(folder))
    assert set(words) <= set(pipeline.tokenizer.get_vocab())
    reference: Any = load_pipeline(str(sd))
    values = content.get("string_to_param", content)
    for word, value in zip(words, values.values(), strict=True):
        reference.load_textual_inversion({word: value})
    prompts = [f"a {word} in red" for word in words]
    assert same(reference, load_model(str(folder)), prompts)


def test_sdxl_has_a_word_in_both_text_encoders(xl: Path, tmp_path: Path) -> None:
    folder = linked(tmp_path / "with", xl)
    both = {"clip_l": vectors(2, 12), "clip_g": vectors(2, 8)}
    save_file(both, folder / "kitten.safetensors")
    save_file({"<second>": vectors(2, 8, seed=5)}, folder / "other.safetensors")  # of the second alone
    reference: Any = load_pipeline(str(xl))
    for value, suffix in ((both["clip_l"], ""), (both["clip_g"], "_2")):
        parts = {"tokenizer": f"tokenizer{suffix}", "text_encoder": f"text_encoder{suffix}"}
        named = {name: getattr(reference, part) for name, part in parts.items()}
        reference.load_textual_inversion({"kitten": value}, **named)
    reference.load_textual_inversion(
        {"<second>": vectors(2, 8, seed=5)}, tokenizer=reference.tokenizer_2, text_encoder=reference.text_encoder_2
    )
    model = load_model(str(folder))
    prompts = ["a kitten", "kitten and <second>", "red"]
    assert same(reference, model, prompts)
    assert not torch.equal(ours(model, prompts)[0][0], ours(load_model(str(xl)), prompts)[0][0])


def test_a_word_that_the_pipeline_was_saved_with_may_lie_beside_it(sd: Path, tmp_path: Path) -> None:
    pipeline: Any = load_pipeline(str(sd))
    pipeline.load_textual_inversion({"<cat>": vectors(2)})
    pipeline.save_pretrained(tmp_path / "whole")
    save_file({"<cat>": vectors(2)}, tmp_path / "whole" / "learned_embeds.safetensors")
    save_file({"<cat>": vectors(2, seed=9)}, tmp_path / "whole" / "learned_embeds-steps-5.safetensors")  # on its way
    assert same(pipeline, load_model(str(tmp_path / "whole")), WORDS)
    save_file({"<cat>": vectors(2, seed=9)}, tmp_path / "whole" / "learned_embeds.safetensors")
    with pytest.raises(ValueError, match=r"learned_embeds.*knows the word '<cat>' already, with other vectors"):
        load_model(str(tmp_path / "whole"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("learned_embeds.safetensors", {"<cat>": vectors(2, 7)}, "have 7 numbers, but this pipeline's .* have 12"),
        ("kitten.safetensors", {"clip_l": vectors(2), "clip_g": vectors(2, 8)}, "have 8 numbers.*no second one"),
        ("kitten.safetensors", {"emb_params": vectors(2), "clip_g": vectors(2)}, "should hold emb_params alone"),
        ("learned_embeds.bin", {"<cat>": "many"}, "'<cat>' should be the vectors of a learned word.*found str"),
        ("learned_embeds.bin", {"<cat>": vectors(2).fill_(float("nan"))}, "infinities or no numbers"),
        ("learned_embeds.bin", [vectors(2)], "should hold the vectors of learned words by name"),
        ("a.pt", {"a": Path("x")}, "cannot be read as a textual inversion, and nothing else in it is run"),
        ("pytorch_custom_diffusion_weights.bin", {"a": vectors(1)}, "beside a whole pipeline, which does not read it"),
    ],
)
def test_files_that_cannot_be_meant_are_refused(
    sd: Path, tmp_path: Path, name: str, content: Any, message: str
) -> None:
    folder = linked(tmp_path / "with", sd)
    (save_file if name.endswith(".safetensors") else torch.save)(content, folder / name)
    with pytest.raises(ValueError, match=message):
        load_model(str(folder))


def test_pipelines_that_know_no_such_words_refuse_them(tmp_path: Path) -> None:
    pixart(tmp_path)
    save_file({"<cat>": vectors(1, 24)}, tmp_path / "learned_embeds.safetensors")
    with pytest.raises(ValueError, match="holds a textual inversion, but a PixArtAlphaPipeline reads none"):
        load_model(str(tmp_path))


def test_other_files_are_no_words(sd: Path, tmp_path: Path) -> None:
    lora = {"unet.to_q.lora_A.weight": vectors(2), "lora_unet_x.alpha": torch.tensor(1.0)}
    for number, content in enumerate([lora, {"conv.weight": vectors(1)}, {"table": torch.zeros(300, 4)}, {}]):
        path = tmp_path / f"{number}.safetensors"
        save_file(content, path)
        assert not is_textual_inversion(path)
    (tmp_path / "broken.safetensors").write_bytes(b"no header")
    assert not is_textual_inversion(tmp_path / "broken.safetensors")
    folder = linked(tmp_path / "with", sd)
    torch.save({"state": {0: {"step": torch.ones(1)}}, "param_groups": []}, folder / "optimizer.bin")
    torch.save({"growth": 2.0}, folder / "some.pt")
    assert load_model(str(folder)).fingerprint() == load_model(str(sd)).fingerprint()
    (word,) = read_inversions(_saved(tmp_path / "one.safetensors", {"<cat>": vectors(1)[0]}))
    assert (word.word, word.vectors[0].shape) == ("<cat>", (1, 12))


def _saved(path: Path, content: dict[str, Tensor]) -> Path:
    save_file(content, path)
    return path

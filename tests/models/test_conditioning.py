"""Named tensors of captions: the same indexing, expanding and dropping as of each tensor alone, and what is refused."""

from __future__ import annotations

import pickle

import pytest
import torch

from tests.support.pipelines import pixart_transformer, sd3_transformer, unet_with
from tests.support.tiny import tiny_unet
from wherefrom.models.conditioning import MASK, POOLED, PROMPT, Conditioning, check_declared, concatenated
from wherefrom.models.families.base import ModelFamily
from wherefrom.models.families.pixart import PixArt
from wherefrom.models.families.registry import families, family_class_of, family_of, register_family, unregister_family
from wherefrom.models.families.stable_diffusion import StableDiffusion
from wherefrom.models.families.stable_diffusion_3 import StableDiffusion3
from wherefrom.models.families.stable_diffusion_xl import StableDiffusionXL

XL = {
    "cross_attention_dim": 20,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 10 + 6 * 4,
}


def told(count: int = 4) -> Conditioning:
    random = torch.Generator().manual_seed(0)
    return Conditioning(
        {
            PROMPT: torch.randn(count, 3, 5, generator=random, dtype=torch.float64),
            POOLED: torch.randn(count, 2, generator=random, dtype=torch.float64),
            MASK: torch.arange(3).expand(count, -1) < 2,
        }
    )


def test_every_change_is_that_of_each_tensor_alone() -> None:
    given, rows = told(), torch.tensor([2, 0])
    assert list(given) == [PROMPT, POOLED, MASK]
    assert given.batch_size == 4
    for name, each in given.items():
        assert torch.equal(given.at(rows)[name], each[rows])
        assert torch.equal(given.at(1).expand(3)[name], torch.stack([each[1]] * 3))
        assert torch.equal(concatenated([given.at(rows), given])[name], torch.cat([each[rows], each]))
    assert given.nbytes == sum(each.nbytes for each in given.values())


def test_a_type_of_number_is_that_of_numbers_alone() -> None:
    moved = told().to(dtype=torch.float16)
    assert [each.dtype for each in moved.values()] == [torch.float16, torch.float16, torch.bool]
    assert [each.dtype for each in moved.float().values()] == [torch.float32, torch.float32, torch.bool]


def test_dropped_captions_are_the_empty_prompt_and_others_as_they_were() -> None:
    given, drop = told(), torch.tensor([True, False, True, False])
    empty = given.at(3).map(torch.zeros_like)
    result = given.dropped(drop, empty)
    for name, each in result.items():
        assert torch.equal(each[~drop], given[name][~drop])
        assert not each[drop].any()


def test_conditioning_is_sent_between_processes() -> None:
    given = told()
    again = pickle.loads(pickle.dumps(given))
    assert all(torch.equal(again[name], each) for name, each in given.items())


def test_what_a_family_does_not_declare_is_refused() -> None:
    one, declared = told().at(0), {PROMPT: (None, 5), POOLED: (2,), MASK: (None,)}
    check_declared(one, declared, "Net")
    with pytest.raises(ValueError, match="Net takes prompt_embeds of a caption, but the conditioning holds"):
        check_declared(one, {PROMPT: (None, 5)}, "Net")
    with pytest.raises(ValueError, match="prompt embeddings are 5 wide, but the model takes 6"):
        check_declared(one, {**declared, PROMPT: (None, 6)}, "Net")
    with pytest.raises(ValueError, match=r"pooled_prompt_embeds of a caption has shape \(2,\), but the model takes 3"):
        check_declared(one, {**declared, POOLED: (3,)}, "Net")
    with pytest.raises(ValueError, match="holds no tensors"):
        Conditioning({})


def test_each_network_finds_its_family() -> None:
    networks = [tiny_unet(), unet_with(**XL), pixart_transformer(), sd3_transformer(), torch.nn.Linear(1, 1)]
    kinds = [StableDiffusion, StableDiffusionXL, PixArt, StableDiffusion3, StableDiffusion]
    assert [type(family_of(network)) for network in networks] == kinds
    assert family_class_of(networks[-1]) is None


def test_a_family_from_outside_is_added_by_a_call() -> None:
    class Net(torch.nn.Module):
        pass

    class Own(ModelFamily):
        networks = (Net,)
        description = "a network of ours"

    before = families()
    try:
        assert family_class_of(Net()) is None
        assert register_family(Own) is Own
        assert register_family(Own) is Own
        assert families() == (Own, *before)
        assert isinstance(family_of(Net()), Own)
    finally:
        unregister_family(Own)
    assert families() == before
    with pytest.raises(ValueError, match="is not a model family"):
        register_family(Net)  # type: ignore[type-var, arg-type]
    with pytest.raises(ValueError, match="does not say what it is: set its `networks`"):
        register_family(type("Empty", (ModelFamily,), {}))

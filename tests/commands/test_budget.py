"""Budgets: sizes to the byte, passes as the methods count them, and nothing made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import evaluate
from datamodules import LAION, MSCOCO, ImageFolder
from lightning_modules.launch.budget import removals
from lightning_modules.launch.training_speed import sizes_of
from tests.attributors.test_fixed_rankings import Lengths, MeanColour
from tests.support.tiny import attribution_config, tiny_folder, tiny_model, tiny_pipeline, tiny_ranker, training_config
from tests.support.worlds import make_coco, make_shards
from wherefrom.attributors import (
    AttributionByUnlearning,
    ImageSimilarity,
    LearnedRanker,
    Magnitude,
    PixelSimilarity,
    RankEnsemble,
    Rerank,
    TrainingData,
)
from wherefrom.commands.budget import Sizes, as_table, blank_images, blank_latents, encoding, method
from wherefrom.commands.estimate import Stage, forward_rate
from wherefrom.counterfactual.protocol import Protocol
from wherefrom.counterfactual.removal_plan import plan_evaluation
from wherefrom.data.encoded_images import encode_image_set
from wherefrom.models.conditioning import PROMPT, prompt_embeddings
from wherefrom.models.pipeline import load_model
from wherefrom.runtime.artifacts import Store


def test_disk_is_what_encoding_writes(tmp_path: Path) -> None:
    model = load_model(str(tiny_pipeline(tmp_path / "pipeline")))
    module = ImageFolder(str(tiny_folder(tmp_path / "pictures", 16)), store=str(tmp_path / "store"))
    sizes, decode_s = sizes_of(module)
    assert sizes == Sizes(16, 4, (8, 8), 1, False)
    assert decode_s > 0
    stages, blank = encoding(model, sizes, decode_s)
    training, held_out = module.load()
    assert model.encoder is not None
    made = [
        encode_image_set(images, encoder=model.encoder, store=Store(tmp_path / "store"))
        for images in (training, held_out)
    ]
    assert stages[0].disk == training.pixels.nbytes + held_out.pixels.nbytes
    assert stages[1].disk == sum(each.groups[0].latents.nbytes for each in made)
    assert stages[2].disk == sum(each.groups[0].conditioning.nbytes for each in made)
    assert blank.latents is not None
    assert blank.latents.latent_shape == made[0].latent_shape
    assert blank.latents.groups[0].conditioning[PROMPT].shape == made[0].groups[0].conditioning[PROMPT].shape


def test_methods_count_the_same_passes_on_blank_data_as_on_real(tmp_path: Path) -> None:
    model = load_model(str(tiny_pipeline(tmp_path / "pipeline")))
    module = ImageFolder(str(tiny_folder(tmp_path / "pictures", 16)), store=str(tmp_path / "store"))
    module.encoder = model.encoder
    module.prepare_data()
    module.setup()
    real = TrainingData(module.train_images, module.train_latents, module.validation_images, module.validation_latents)
    _, blank = encoding(model, *sizes_of(module))
    attributor = AttributionByUnlearning()
    work = attributor.estimate(real, 3)
    assert attributor.estimate(blank, 3) == work
    once, queries = method("abu", attributor=attributor, data=blank, queries=3, rate=10.0)
    assert once.seconds == work.once / 10
    assert queries.seconds == work.per_query / 10
    assert queries.times == 3
    few = method("abu", attributor=attributor, data=blank, queries=3, rate=10.0, candidates=4)
    assert few[0] == once, "what is made once is made of all images"
    assert method("abu", attributor=Magnitude(attributor), data=blank, queries=3, rate=10.0, candidates=4) == few
    both = method(
        "both", attributor=RankEnsemble([attributor, PixelSimilarity()]), data=blank, queries=3, rate=10.0, candidates=4
    )
    assert [stage.seconds for stage in both] == [few[0].seconds, few[1].seconds, 0, 0]
    losses = attributor.grid_passes(blank)
    assert queries.seconds - few[1].seconds == pytest.approx(losses * (16 - 4) / (16 + 4) / 10)


def test_methods_that_encode_or_rerank_state_their_own_stages(tmp_path: Path) -> None:
    model = load_model(str(tiny_pipeline(tmp_path / "pipeline")))
    _, blank = encoding(model, Sizes(16, 4, (8, 8), 1, False), 0.0)
    exact, candidates = AttributionByUnlearning(), 4
    reranked = Rerank(exact, ImageSimilarity(MeanColour()), k=candidates)
    stages = method("ours", attributor=reranked, data=blank, queries=3, rate=10.0)
    assert [stage.name for stage in stages] == [
        "features of 32 images by MeanColour",
        "ours, choosing: once for this model",
        "ours, choosing: queries",
        "ours: once for this model",
        "ours: queries",
    ]
    assert stages[0].disk == 4 * 32 * 3
    assert stages[0].seconds > 0
    assert stages[3:] == method("ours", attributor=exact, data=blank, queries=3, rate=10.0, candidates=candidates)
    encoders = {"colours": MeanColour(), "lengths": Lengths()}
    ranker = LearnedRanker(str(tiny_ranker(tmp_path / "ranker", {"lengths": 2, "colours": 3})), encoders=encoders)
    stages = method("fast", attributor=ranker, data=blank, queries=3, rate=10.0)
    assert [stage.name for stage in stages[:2]] == [f"features of 16 images by {name}" for name in ranker.encoders]
    assert [stage.disk for stage in stages[:2]] == [4 * 16 * {"colours": 3, "lengths": 2}[n] for n in ranker.encoders]
    assert stages[2].disk == ranker.estimate(blank, 3).disk


def test_totals() -> None:
    stages = [Stage("read", 30, disk=2**20), Stage("train", 100, each="a model", times=6, at_once=3), Stage("none", 0)]
    table = as_table(stages, devices=2).splitlines()
    assert table[2:] == [
        "| read | 15 s |  | 1.0 MiB |  |",
        "| train | 2 min | × 6 (50 s a model) |  |  |",
        "| all | 2 min | | 1.0 MiB |  |",
    ]
    assert stages[1].total(2) == 100


def test_a_census_counts_what_loading_finds(tmp_path: Path) -> None:
    make_coco(tmp_path / "coco", train=12, validation=4)
    make_shards(tmp_path / "laion", shards=2, count=10)
    for module in (
        MSCOCO(str(tmp_path / "coco"), subset=["9", "416"], store=str(tmp_path / "store")),
        LAION(str(tmp_path / "laion"), validation_share=0.2, store=str(tmp_path / "store")),
    ):
        census = module.census()
        assert census.decode is not None
        assert census.decode() > 0
        assert not (tmp_path / "store").exists() or isinstance(module, LAION), "nothing was decoded into the store"
        train, held_out = module.load()
        assert census.training + census.held_out == len(train) + len(held_out)
        assert census.size == train.pixels.shape[1:3]
        assert census.captions == len(train.captions[0])
        if isinstance(module, MSCOCO):
            assert (census.training, census.held_out) == (2, 4) == (len(train), len(held_out))


@pytest.mark.parametrize(
    "protocol",
    [Protocol(ks=[2], query_groups=[2]), Protocol(ks=[1, 2], query_groups=[3, 1], seeds=[0, 1], random=2)],
    ids=["one", "several"],
)
def test_trainings_are_counted_as_the_evaluation_plans_them(protocol: Protocol) -> None:
    ids = [f"p{index:03d}" for index in range(200)]
    rankings = {
        name: {f"q{query}": ids[shift + 10 * query :] + ids[: shift + 10 * query] for query in range(6)}
        for name, shift in (("one", 0), ("other", 5))
    }
    planned = {removal.ids for removal in plan_evaluation(rankings, protocol, ids)}
    assert removals(protocol, 2, 6) == (1 + len(planned)) * len(protocol.seeds)


def test_the_rate_is_measured_with_few_passes_where_one_takes_long() -> None:
    model = tiny_model()
    data = blank_latents(blank_images(4, (8, 8), 1), torch.zeros(4, 4, 4), prompt_embeddings(torch.zeros(5, 12)))
    sizes: list[int] = []
    losses = model.losses

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        sizes.append(len(args[0]))
        return losses(*args, **kwargs)

    model.losses = counted  # type: ignore[method-assign]
    assert forward_rate(model, data, batch_size=32) > 0
    assert sizes == [1, 1, 4, 16, 32, 32, 32, 32]
    sizes.clear()
    assert forward_rate(model, data, batch_size=32, enough=0.0) > 0
    assert sizes == [1, 1, 1], "a batch of one was long enough"


def test_the_command_line_says_what_an_attribution_takes_and_makes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = attribution_config(tmp_path)
    evaluate.main(["budget", "attribute", "-c", str(config)])
    printed = capsys.readouterr().out
    names = [line.split("|")[1].strip() for line in printed.splitlines() if line.startswith("|")][2:]
    assert names == [
        "read 20 images of 8 × 8",
        "latents of 20 images and their mirror images",
        "prompt embeddings of 20 captions",
        "draw the queries",
        "AttributionByUnlearning: once for this model",
        "AttributionByUnlearning: queries",
        "all",
    ]
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
def test_the_command_line_says_what_a_training_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = training_config(tmp_path, steps=8)
    evaluate.main(["budget", "fit", "-c", str(config), "--model.init_args.save_to", str(tmp_path / "model")])
    printed = capsys.readouterr().out
    assert "| training steps |" in printed
    assert "× 8 (" in printed
    assert not (tmp_path / "store").exists()
    assert not (tmp_path / "model").exists()


def test_a_command_without_a_budget_is_refused() -> None:
    for words in ([], ["report"], ["budget"]):
        with pytest.raises(ValueError, match="budget stands before a command"):
            evaluate.main(["budget", *words])


@pytest.mark.filterwarnings("ignore:You are trying to `self.log")
@pytest.mark.parametrize("command", ["counterfactual", "lds"])
def test_the_command_line_says_what_an_evaluation_takes(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = training_config(tmp_path, "recipe", steps=8)
    (tmp_path / "pixel.yaml").write_text(json.dumps({"class_path": "PixelSimilarity"}))
    config = {
        "recipe": str(recipe),
        "data": json.loads(recipe.read_text())["data"],
        "methods": [str(tmp_path / "pixel.yaml")],
        "queries": {"prompts": ["a big red square", "blue circle"], "sampling_steps": 2},
        "output": str(tmp_path / "judge"),
        "store": str(tmp_path / "store"),
        **(
            {"protocol": {"ks": [1], "query_groups": [1]}}
            if command == "counterfactual"
            else {"random_subsets": {"count": 4, "repeated": 2}}
        ),
    }
    (tmp_path / "judge.yaml").write_text(json.dumps(config))
    evaluate.main(["budget", command, "-c", str(tmp_path / "judge.yaml")])
    count = 1 + 2 * 2 if command == "counterfactual" else 1 + 4 + 2 * 2
    assert f"× {count} (" in capsys.readouterr().out
    assert not (tmp_path / "store").exists()


def test_blank_data_take_no_memory() -> None:
    images = blank_images(1000, (512, 512), 5)
    assert images.pixels.shape == (1000, 512, 512, 3)
    assert np.asarray(images.pixels).base is not None
    latents = blank_latents(images, torch.zeros(4, 64, 64), prompt_embeddings(torch.zeros(77, 1024)))
    assert latents.groups[0].conditioning[PROMPT].shape == (1000, 5, 77, 1024)
    assert latents.groups[0].conditioning[PROMPT].untyped_storage().nbytes() == 4  # type: ignore[union-attr]

"""The alignment judge and the recognisability benchmark, in a small world of images linear in captions."""

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from transformers import BertConfig, BertModel, BertTokenizer

from experiments.alignment import AlignmentJudge, AlignmentModel, Moments, rank_of_prompt, rate, rate_ratio
from experiments.recognisability import choose_prompts, contact_sheet, drawing_with, recognisability, summary
from wherefrom.data.image_set import ImageSet
from wherefrom.models.diffusion import DiffusionModel
from wherefrom.models.encoders import CaptionEncoder, LatentEncoder, freeze
from wherefrom.models.factories import autoencoder_from_config, unet_from_config
from wherefrom.models.noise_schedule import NoiseSchedule
from wherefrom.runtime import keyed_random
from wherefrom.runtime.artifacts import Store

WIDTH, SIDE = 6, 4
STYLES = ("ink", "wool")


def meaning(word: str) -> np.ndarray:
    return keyed_random.normal(keyed_random.hash_texts([word]), (WIDTH,), torch.float64)[0].numpy()


class Texts:
    """A caption "NAME, STYLE style" is the sum of what its two words mean; the style weighs more."""

    def encode_texts(self, captions):
        vectors = []
        for caption in captions:
            name, style = caption.removesuffix(" style").split(", ")
            vectors.append(meaning(name) + 5 * meaning(style))
        return torch.tensor(np.array(vectors), dtype=torch.float32)

    def identity(self):
        return {"texts": "sum"}


class Images:
    """The pixels themselves."""

    def encode_images(self, pixels):
        return torch.tensor(np.array(pixels)).flatten(1).float() / 127.5 - 1

    def identity(self):
        return {"images": "pixels"}


def world(concepts: int = 60, linear: bool = True) -> ImageSet:
    """Every concept in two styles; pixels are linear in the caption's vector, or (not `linear`) unrelated to it."""
    ids, captions, columns = [], [], {"concept": [], "style": [], "split": []}
    for style in STYLES:
        for number in range(concepts):
            ids.append(f"{style}/{number}")
            captions.append((f"thing {number}, {style} style",))
            columns["concept"].append(str(number))
            columns["style"].append(style)
            columns["split"].append("validation" if style == "wool" and number % 10 == 0 else "train")
    size = SIDE * SIDE * 3
    mixing = np.random.default_rng(0).normal(size=(WIDTH, size)) * 8
    vectors = Texts().encode_texts([several[0] for several in captions]).numpy()
    if linear:
        values = 128 + vectors @ mixing * 0.3
    else:  # a fixed code of the concept, the same in both styles: it can be learned by heart and not otherwise
        values = np.random.default_rng(1).normal(128, 40, size=(concepts, size))
        values = np.concatenate([values, values])
    pixels = values.round().clip(0, 255).astype(np.uint8).reshape(-1, SIDE, SIDE, 3)
    return ImageSet(
        tuple(ids),
        tuple(captions),
        pixels,
        {k: tuple(v) for k, v in columns.items()},
        fingerprint=str(hash(pixels.tobytes())),
    )


def fitted(images: ImageSet, tmp_path, **settings) -> AlignmentJudge:
    return AlignmentJudge(Images(), texts=Texts(), store=Store(tmp_path), **settings).fit(images)


def asked(images: ImageSet):
    return images.pixels, images.columns["concept"], images.columns["style"]


def tiny_model(folder) -> DiffusionModel:
    torch.manual_seed(0)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "fox", "red", "house", "hill"]
    (folder / "vocab.txt").write_text("\n".join(words))
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    text = CaptionEncoder(
        BertModel(BertConfig(vocab_size=len(words), **sizes)), BertTokenizer(str(folder / "vocab.txt")), 6
    )
    vae = autoencoder_from_config(
        {
            "block_out_channels": [4, 4],
            "down_block_types": ["DownEncoderBlock2D"] * 2,
            "up_block_types": ["UpDecoderBlock2D"] * 2,
            "latent_channels": 4,
            "norm_num_groups": 2,
            "sample_size": 16,
        }
    )
    unet = unet_from_config(
        {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": [8],
            "layers_per_block": 1,
            "down_block_types": ["CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D"],
            "cross_attention_dim": 8,
            "attention_head_dim": 2,
            "norm_num_groups": 2,
        }
    )
    return DiffusionModel(freeze(unet), NoiseSchedule(DDPMScheduler()), LatentEncoder(vae, text))


class TestAlignmentModel:
    @pytest.mark.parametrize(("count", "width"), [(50, 7), (5, 12)])  # more images than features, and fewer
    @pytest.mark.parametrize("alpha", [1e-3, 0.5, 20.0])
    def test_is_the_least_squares_solution_of_the_augmented_system(self, count, width, alpha) -> None:
        generator = np.random.default_rng(0)
        x = generator.normal(3.0, 1.0, size=(count, width)) * np.linspace(0.1, 4, width)
        y = generator.normal(-1.0, 1.0, size=(count, 3))
        centred = x - x.mean(0)
        strength = alpha * (centred**2).sum() / width
        # Rows sqrt(λ) I with target 0 are the penalty; the column of ones, zero in those rows, is the free intercept.
        left = np.block([[x, np.ones((count, 1))], [np.sqrt(strength) * np.eye(width), np.zeros((width, 1))]])
        right = np.concatenate([y, np.zeros((width, 3))])
        expected = np.linalg.lstsq(left, right, rcond=None)[0]
        model = AlignmentModel.fit(torch.tensor(x), torch.tensor(y), alpha)
        np.testing.assert_allclose(model.weight, expected[:-1], rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(model.bias, expected[-1], rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(model.predict(torch.tensor(x)), x @ expected[:-1] + expected[-1], rtol=1e-8)
        np.testing.assert_allclose(model.centre, y.mean(0), rtol=1e-12)

    def test_features_in_other_units_give_the_same_predictions(self) -> None:
        x, y = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)), torch.randn(30, 2)
        expected = AlignmentModel.fit(x, y, 0.3).predict(x)
        assert torch.allclose(
            AlignmentModel.fit(100 * x + 7, y, 0.3).predict(100 * x + 7), expected, rtol=1e-4, atol=1e-5
        )

    def test_moments_of_parts_add_up_to_the_whole(self) -> None:
        x, y = torch.randn(40, 6), torch.randn(40, 3)
        parts = Moments.of(x[:11], y[:11]) + Moments.of(x[11:12], y[11:12]) + Moments.of(x[12:], y[12:])
        whole = AlignmentModel.fit(x, y, 0.1)
        assert torch.allclose(AlignmentModel.solve(parts, 0.1).weight, whole.weight, rtol=1e-10)

    @pytest.mark.parametrize("alpha", [0.0, -1.0, float("nan")])
    def test_refuses_a_ridge_that_is_none(self, alpha) -> None:
        with pytest.raises(ValueError, match="alpha must be positive"):
            AlignmentModel.fit(torch.randn(4, 2), torch.randn(4, 2), alpha)


class TestRankOfPrompt:
    def test_is_the_position_in_the_sorted_cosines(self) -> None:
        generator = np.random.default_rng(0)
        predicted, candidates, centre = (generator.normal(size=shape) for shape in ((20, 5), (9, 5), (5,)))
        own = generator.integers(0, 9, 20)
        ranks = rank_of_prompt(*map(torch.tensor, (predicted, candidates, own, centre)))
        for row in range(20):
            p, c = predicted[row] - centre, candidates - centre
            cosines = c @ p / np.linalg.norm(c, axis=1) / np.linalg.norm(p)
            assert ranks[row] == 1 + np.argsort(-cosines).tolist().index(own[row])

    def test_ties_and_nan_count_against_the_image(self) -> None:
        candidates = torch.tensor([[1.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
        assert rank_of_prompt(torch.tensor([[1.0, 0.1]]), candidates, torch.tensor([0])).tolist() == [2]
        assert rank_of_prompt(torch.full((1, 2), torch.nan), candidates, torch.tensor([0])).tolist() == [3]


class TestRates:
    def test_rate_and_binomial_error(self) -> None:
        result = rate(np.array([True, False, False, False]))
        assert (result.value, result.count) == (0.25, 4)
        assert result.error == pytest.approx(np.sqrt(0.25 * 0.75 / 4))
        with pytest.raises(ValueError, match="no images"):
            rate(np.array([], dtype=bool))

    def test_error_of_a_ratio_is_its_spread_over_repetitions(self) -> None:
        generator = np.random.default_rng(0)
        ratios = []
        for _ in range(2000):
            real = generator.random(200) < 0.56
            drawn = np.where(real, generator.random(200) < 0.7, generator.random(200) < 0.2)
            ratios.append(rate_ratio(drawn, real))
        spread = np.std([ratio.value for ratio in ratios])
        # The spread of 2,000 repetitions is known to 1.6 %.
        assert np.mean([ratio.error for ratio in ratios]) == pytest.approx(spread, rel=0.06)

    def test_ratio_without_a_reference(self) -> None:
        nothing = np.zeros(3, dtype=bool)
        assert np.isnan(rate_ratio(~nothing, nothing).value)
        with pytest.raises(ValueError, match="3 and 2 images"):
            rate_ratio(nothing, nothing[:2])


class TestJudge:
    def test_finds_the_prompts_of_concepts_that_it_never_saw(self, tmp_path) -> None:
        images = world()
        judge, ink = fitted(images, tmp_path), images.where("style", "ink")
        assert (judge.ranks(*asked(ink)) == 1).mean() > 0.9
        assert judge.top5(*asked(ink)).all()

    def test_what_can_only_be_learned_by_heart_is_not_found(self, tmp_path) -> None:
        images = world(linear=False)
        features, captions = (
            Images().encode_images(images.pixels),
            Texts().encode_texts([c[0] for c in images.captions]),
        )
        ink = images.where("style", "ink")
        by_heart = AlignmentModel.fit(features, captions, 1e-6)
        ranks = rank_of_prompt(by_heart.predict(features[:60]), captions[:60], torch.arange(60), by_heart.centre)
        result = fitted(images, tmp_path).top5(*asked(ink)).mean()
        assert (ranks <= 5).float().mean() > 0.5
        assert result < 5 / 60 + 3 * np.sqrt(5 / 60 * 55 / 60 / 60)  # chance, and three standard errors

    def test_a_concept_never_reaches_its_own_ridge(self, tmp_path) -> None:
        images = world()
        judge = fitted(images, tmp_path / "before")
        pixels = np.array(images.pixels)
        pixels[[7, 67]] = 255 - pixels[[7, 67]]  # concept 7 in both styles
        changed = ImageSet(images.ids, images.captions, pixels, images.columns, "changed")
        after = fitted(changed, tmp_path / "after")
        same = [torch.equal(a.weight, b.weight) for a, b in zip(judge.models, after.models, strict=True)]
        assert same == [k == judge.fold("7") for k in range(5)]

    def test_ranks_match_a_loop_over_images(self, tmp_path) -> None:
        images = world(30)
        judge = fitted(images, tmp_path, folds=4, alphas=(0.3,), seed=3)
        rows = [0, 31, 2, 33, 4, 35, 26]
        chosen = images.subset(rows)
        features, texts = Images().encode_images(images.pixels).double().numpy(), Texts()
        targets = texts.encode_texts([c[0] for c in images.captions]).double().numpy()
        expected = []
        for row in rows:
            concept, style = images.columns["concept"][row], images.columns["style"][row]
            train = [i for i, c in enumerate(images.columns["concept"]) if judge.fold(c) != judge.fold(concept)]
            x, y = features[train], targets[train]
            gram = (x - x.mean(0)).T @ (x - x.mean(0))
            ridge = 0.3 * np.trace(gram) / len(gram) * np.eye(len(gram))
            deviation = (features[row] - x.mean(0)) @ np.linalg.solve(gram + ridge, (x - x.mean(0)).T @ (y - y.mean(0)))
            names = [f"thing {c}, {style} style" for c in chosen.columns["concept"]]
            candidates = texts.encode_texts(names).double().numpy() - y.mean(0)
            cosines = candidates @ deviation / np.linalg.norm(candidates, axis=1)
            expected.append(1 + (cosines > cosines[names.index(f"thing {concept}, {style} style")]).sum())
        assert judge.ranks(*asked(chosen)).tolist() == expected

    def test_prompts_compete_within_their_style_only(self, tmp_path) -> None:
        images = world()
        judge = fitted(images, tmp_path)
        competing = []

        class Recorded(Texts):
            def encode_texts(self, captions):
                competing.append(list(captions))
                return super().encode_texts(captions)

        judge.texts = Recorded()
        judge.ranks(*asked(images.subset([0, 61, 2])))
        assert competing == [[f"thing {number}, {style} style" for number in range(3)] for style in STYLES]

    def test_strength_is_best_on_the_folds_that_are_not_judged(self, tmp_path) -> None:
        images, alphas = world(50, linear=True), (1e-4, 1.0, 1e4)
        noisy = np.array(images.pixels).astype(int) + np.random.default_rng(5).integers(-90, 91, images.pixels.shape)
        images = ImageSet(images.ids, images.captions, noisy.clip(0, 255).astype(np.uint8), images.columns, "noisy")
        judge = fitted(images, tmp_path, folds=3, alphas=alphas)
        x = Images().encode_images(images.pixels)
        y = Texts().encode_texts([c[0] for c in images.captions])
        fold = np.array([judge.fold(c) for c in images.columns["concept"]])
        style = np.array(images.columns["style"])
        for judged in range(3):
            hits = []
            for alpha in alphas:
                count = 0
                for validated in set(range(3)) - {judged}:
                    train = (fold != judged) & (fold != validated)
                    model = AlignmentModel.fit(x[train], y[train], alpha)
                    for name in STYLES:
                        own = (fold == validated) & (style == name)
                        ranks = rank_of_prompt(model.predict(x[own]), y[own], torch.arange(own.sum()), model.centre)
                        count += int((ranks <= max(1, round(0.05 * own.sum()))).sum())
                hits.append(count)
            assert len(set(hits)) > 1
            assert judge.chosen_alphas[judged] == alphas[int(np.argmax(hits))]

    def test_misuse_is_refused(self, tmp_path) -> None:
        images = world()
        judge = AlignmentJudge(Images(), texts=Texts(), store=Store(tmp_path))
        ink = images.where("style", "ink").subset(range(10))
        pixels, concepts, styles = asked(ink)
        with pytest.raises(ValueError, match=r"call fit\(images\) first"):
            judge.ranks(pixels, concepts, styles)
        with pytest.raises(ValueError, match="fill only"):
            judge.fit(world(2))
        with pytest.raises(ValueError, match="need a column 'concept'"):
            judge.fit(ImageSet(ink.ids, ink.captions, ink.pixels, {"license": ("x",) * 10}))
        judge.fit(images)
        with pytest.raises(ValueError, match="10 images, 9 concepts and 10 styles"):
            judge.ranks(pixels, concepts[:9], styles)
        with pytest.raises(ValueError, match="'1' occurs more than once"):
            judge.ranks(pixels, ("1", "1", *concepts[2:]), styles)
        with pytest.raises(ValueError, match="concept 'new' in style 'ink'"):
            judge.ranks(pixels, ("new", *concepts[1:]), styles)
        with pytest.raises(ValueError, match="folds must be 3 or more"):
            AlignmentJudge(Images(), texts=Texts(), store=Store(tmp_path), folds=2)


class TestRecognisability:
    def test_prompts_are_distinct_training_concepts_that_do_not_move(self) -> None:
        images = world()
        rows = choose_prompts(images, 40, seed=0)
        concepts = [images.columns["concept"][row] for row in rows]
        assert len(set(concepts)) == 40
        assert {images.columns["split"][row] for row in rows} == {"train"}
        assert {images.columns["style"][row] for row in rows} == set(STYLES)
        assert choose_prompts(images, 20, seed=0) == rows[:20]
        assert choose_prompts(images, 40, seed=1) != rows
        # A concept that is not in every style has no caption in the other; it and nothing else drops out.
        without = images.subset([row for row in range(len(images)) if images.ids[row] != images.ids[rows[0]]])
        ids = [without.ids[row] for row in choose_prompts(without, 39, seed=0)]
        assert ids == [images.ids[row] for row in rows[1:]]

    def test_one_caption_for_two_concepts_is_one_prompt(self) -> None:
        images = world()
        captions = list(images.captions)
        captions[1], captions[61] = captions[2], captions[62]
        twins = ImageSet(images.ids, tuple(captions), images.pixels, images.columns, "twins")
        chosen = [twins.columns["concept"][row] for row in choose_prompts(twins, 59, seed=0)]
        assert len({"1", "2"} & set(chosen)) == 1
        with pytest.raises(ValueError, match="only 59 training concepts"):
            choose_prompts(twins, 60, seed=0)

    def test_real_images_reach_a_ratio_of_one_and_others_chance(self, tmp_path) -> None:
        images = world()
        judge = fitted(images, tmp_path)
        by_caption = {captions[0]: pixels for captions, pixels in zip(images.captions, images.pixels, strict=True)}

        def copy(prompts):
            return np.stack([by_caption[prompt] for prompt in prompts])

        perfect = recognisability(judge, images=images, draw=copy, count=60, seed=0, among=20)
        real, generated, ratio = perfect.rates(5)
        assert (real.value, generated.value, ratio.value, ratio.error, ratio.count) == (1.0, 1.0, 1.0, 0.0, 60)
        wrong = recognisability(
            judge, images=images, draw=lambda prompts: np.roll(copy(prompts), 1, axis=0), count=60, seed=0, among=20
        )
        assert wrong.rates(5)[1].value < 0.5
        assert wrong.rates(5)[2].value == wrong.rates(5)[1].value
        assert wrong.prompts == perfect.prompts
        assert (wrong.real_ranks == perfect.real_ranks).all()
        text = summary(wrong)
        assert "1.000 ± 0.000 (n = 60)" in text
        assert "top 1" in text

    def test_blocks_are_ranked_apart(self, tmp_path) -> None:
        images = world()
        judge = fitted(images, tmp_path)
        real = {c[0]: p for c, p in zip(images.captions, images.pixels, strict=True)}
        result = recognisability(
            judge, images=images, draw=lambda ps: 255 - np.stack([real[p] for p in ps]), count=60, among=10
        )
        assert result.generated_ranks.max() == 10  # the reversed image is as far from its prompt as it can be

    def test_misuse_is_refused(self, tmp_path) -> None:
        images = world()
        judge = fitted(images, tmp_path)
        with pytest.raises(ValueError, match="multiple of 100"):
            recognisability(judge, images=images, draw=lambda prompts: images.pixels[: len(prompts)], count=50)
        with pytest.raises(ValueError, match="returned 3 images for 20 prompts"):
            recognisability(judge, images=images, draw=lambda prompts: images.pixels[:3], count=20, among=20)

    def test_a_drawing_depends_on_prompt_and_seed_only(self, tmp_path) -> None:
        model = tiny_model(tmp_path)
        prompts = ["fox", "red house", "hill"]
        drawn = drawing_with(model, seed=0, steps=3, guidance=2.0)(prompts)
        assert (drawn.dtype, drawn.shape) == (np.uint8, (3, 16, 16, 3))
        one_by_one = drawing_with(model, seed=0, steps=3, guidance=2.0, batch_size=1)(prompts[::-1])[::-1]
        assert np.abs(drawn.astype(int) - one_by_one).max() <= 1
        assert np.abs(drawn.astype(int) - drawing_with(model, seed=1, steps=3, guidance=2.0)(prompts)).max() > 10
        assert np.abs(drawn[0].astype(int) - drawn[1]).max() > 10

    def test_sheet_shows_the_generated_image_above_the_real_one(self, tmp_path) -> None:
        images = world()
        judge = fitted(images, tmp_path)
        result = recognisability(
            judge,
            images=images,
            draw=lambda ps: np.full((len(ps), SIDE, SIDE, 3), (255, 0, 0), np.uint8),
            count=20,
            among=20,
        )
        sheet = np.asarray(contact_sheet(result, columns=5, cell=8))
        red, last = (sheet == (255, 0, 0)).all(-1), result.real[19].repeat(2, 0).repeat(2, 1)
        assert red.sum() == 20 * 8 * 8
        rows, columns = np.nonzero(red)
        top, left = rows.max() + 1 + 5, columns.max() - 7  # the bar and its gap lie between
        assert (sheet[top : top + 8, left : left + 8] == last).all()
        assert (sheet[top + 8, left] == (50, 205, 50)).all()  # the real one was recognised
        assert (sheet[top - 5, left] == (50, 205, 50)).all() == (result.generated_ranks[19] <= 5)

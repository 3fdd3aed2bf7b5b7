"""The miniatures: world, checker, checkpoints, and pipelines that show what their captions ask."""

from __future__ import annotations

import inspect
import math

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import miniatures
from miniatures.captioned import EMOJI
from miniatures.check import renders, sample
from miniatures.checker import accuracy, read
from miniatures.checkpoint import FOLDER, in_eight_bits, read_card, read_weights
from miniatures.forward import velocity
from miniatures.latents import pack, unpack
from miniatures.pipelines import SCHEDULERS
from miniatures.specs import DRAWN, SPECS
from miniatures.train_emoji import pictures
from miniatures.train_emoji import train as train_emoji
from miniatures.world import CLIPS, PICTURES

pytestmark = pytest.mark.usefixtures("one_thread")

MEGABYTE = 2**20
BLOCK_LISTS = ("blocks", "transformer_blocks", "single_transformer_blocks")


def _run(name, **options):
    pipe = miniatures.load_miniature(name)
    given = miniatures.call_kwargs(name, miniatures.captions(name, 2, 7), steps=3, **options)
    return miniatures.to_frames(name, pipe(**given))


@pytest.fixture(params=miniatures.NAMES)
def name(request):
    return request.param


@pytest.fixture(params=DRAWN)
def drawn(request):
    return request.param


@pytest.mark.parametrize("world", [PICTURES, CLIPS], ids=["pictures", "clips"])
def test_checker_reads_true_scenes(world):
    wanted, frames = renders(world, 500, seed=3)
    shares = accuracy(world, wanted, read(world, frames))
    assert min(shares.values()) >= 0.99, shares


def test_checker_does_not_read_noise_as_the_caption():
    wanted, frames = renders(PICTURES, 200, seed=3)
    noise = np.random.default_rng(0).random(frames.shape, dtype=np.float32)
    assert accuracy(PICTURES, wanted, read(PICTURES, noise))["all"] < 0.05


def test_world_is_the_same_for_the_same_seed_and_has_many_pictures_for_one_caption():
    choices = PICTURES.parse("large red circle left").expand(8, 4)
    first, again = (PICTURES.render(choices, torch.Generator().manual_seed(0)) for _ in range(2))
    assert torch.equal(first, again)
    assert (first[0] - first[1]).abs().max() > 0.1
    assert first.abs().max() <= 1


@pytest.mark.parametrize("caption", ["red circle", "large red circle up", "huge red circle left"])
def test_a_caption_that_the_world_lacks_is_refused(caption):
    with pytest.raises(ValueError, match="expected"):
        miniatures.call_kwargs("qwen", caption)


def test_captions_are_parsed_back(name):
    world = SPECS[name].world
    for caption in miniatures.captions(name, 20, 0):
        assert world.caption(world.parse(caption)) == caption
    assert miniatures.captions(name, 20, 0) == miniatures.captions(name, 20, 0)


def test_packing_matches_the_pipelines():
    pictures = torch.randn(2, 3, 1, 16, 16)
    theirs = diffusers.FluxPipeline._pack_latents(pictures[:, :, 0], 2, 3, 16, 16)
    assert torch.equal(pack(pictures), theirs)
    assert torch.equal(unpack(pack(pictures), (16, 16)), pictures)
    assert pack(pictures, 4).shape == (2, 16, 48)
    assert torch.equal(unpack(pack(pictures, 4), (16, 16), 4), pictures)


def test_checkpoint_is_small_and_deep(name):
    limit, kinds = (10, {torch.float16}) if name in DRAWN else (24, {torch.float16, torch.float32})
    assert (FOLDER / f"{name}.safetensors").stat().st_size <= limit * MEGABYTE
    assert {value.dtype for value in read_weights(name).values()} == kinds
    transformer = miniatures.load_miniature(name).transformer
    assert sum(len(getattr(transformer, blocks, ())) for blocks in BLOCK_LISTS) >= 12


def test_card_agrees_with_the_weights_and_the_specs(name):
    card, weights, spec = read_card(name), read_weights(name), SPECS[name]
    assert (card["pipeline"], card["transformer"]) == (spec.pipeline, spec.transformer)
    assert {key: tuple(v) if isinstance(v, list) else v for key, v in card["config"].items()} == dict(spec.config)
    assert card["scheduler"] == dict(spec.scheduler)
    extra = 1 if name in DRAWN else 2  # the empty caption, and a token that is not used
    assert weights["words.weight"].shape[0] == len(spec.world.words) + extra


def test_card_agrees_with_the_world_and_shows_that_it_has_learned(drawn):
    card = read_card(drawn)
    assert [tuple(slot) for slot in card["words"]] == list(SPECS[drawn].drawn.slots)
    assert len(card["loss_curve"]) <= 200
    assert card["loss_curve"][-1][1] < card["loss_curve"][0][1] / 5


def test_card_reports_the_checker(drawn):
    check = read_card(drawn)["check"]
    assert check["samples"] >= 200
    assert min(check["shows"]["colour"], check["shows"]["size"]) >= 0.95


def test_pipeline_is_of_the_real_classes_and_deterministic(name):
    pipe = miniatures.load_miniature(name)
    assert type(pipe) is getattr(diffusers, SPECS[name].pipeline)
    assert type(pipe.transformer) is getattr(diffusers, SPECS[name].transformer)
    assert not pipe.transformer.training
    first, again = _run(name, seed=1), _run(name, seed=1)
    assert np.array_equal(first, again)
    if name in DRAWN:  # the large one takes longer, and is no different
        assert not np.array_equal(first, _run(name, seed=2))
    side = SPECS[name].world.side
    assert first.shape == (2, SPECS[name].world.frames, side, side, 3)
    assert first.dtype == np.float32
    assert 0 <= first.min() <= first.max() <= 1


def test_training_calls_the_transformer_as_the_pipeline_does(drawn):
    name = drawn
    if name == "qwen" and diffusers.__version__ < "0.42":
        pytest.skip("training calls Qwen-Image's transformer as newer diffusers do")
    pipe, calls = miniatures.load_miniature(name), []
    pipe.transformer.register_forward_hook(lambda _, args, given, out: calls.append((given, out[0])), with_kwargs=True)
    pipe(**miniatures.call_kwargs(name, miniatures.captions(name, 2, 0), steps=2))
    given, theirs = calls[0]
    sigma = given["timestep"] / SPECS[name].timestep_scale
    assert sigma[0] == pytest.approx(1.0)
    ours = velocity(SPECS[name], pipe.transformer, given["hidden_states"], sigma, given["encoder_hidden_states"])
    assert torch.equal(ours, theirs)


def test_a_batch_starts_from_the_noise_of_its_single_runs(name):
    batch = miniatures.call_kwargs(name, miniatures.captions(name, 2, 0), seed=4)["latents"]
    single = miniatures.call_kwargs(name, miniatures.captions(name, 1, 0), seed=5)["latents"]
    assert torch.equal(batch[1:], single)


@pytest.mark.parametrize("name", ["wan", "qwen"])
def test_guidance_one_leaves_the_empty_caption_out(name):
    given = miniatures.call_kwargs(name, "small red ring left", guidance=1.0)
    assert "negative_prompt_embeds" not in given


def test_half_precision_runs(name):
    pipe = miniatures.load_miniature(name, dtype=torch.bfloat16)
    given = miniatures.call_kwargs(name, miniatures.captions(name, 1, 0), steps=2, dtype=torch.bfloat16)
    assert np.isfinite(miniatures.to_frames(name, pipe(**given))).all()


def test_unknown_name_and_scheduler_are_refused():
    with pytest.raises(ValueError, match="wan, qwen, emoji, flux"):
        miniatures.load_miniature("sora")
    with pytest.raises(ValueError, match="euler, unipc, dpm"):
        miniatures.load_miniature("wan", scheduler="ddim")
    with pytest.raises(ValueError, match=r"DPMSolver.* not take; type load_miniature\('flux'\)"):
        miniatures.load_miniature("flux", scheduler="dpm")


@pytest.mark.skipif(
    "sigmas" not in inspect.signature(diffusers.UniPCMultistepScheduler.set_timesteps).parameters,
    reason="this UniPC takes no noise levels of a pipeline's own",
)
@pytest.mark.parametrize("name", ["flux", "qwen"])
def test_unipc_goes_through_the_noise_levels_of_the_pipeline(name):
    given = miniatures.call_kwargs(name, miniatures.captions(name, 1, 0), steps=12)
    found = {}
    for scheduler in ("euler", "unipc"):
        pipe = miniatures.load_miniature(name, scheduler=scheduler)
        found[scheduler] = miniatures.to_frames(name, pipe(**given)), pipe.scheduler.sigmas
    assert torch.allclose(found["euler"][1], found["unipc"][1], atol=2e-3)
    assert np.abs(found["euler"][0] - found["unipc"][0]).mean() < 0.02


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("qwen", "euler"),
        pytest.param("flux", "euler", marks=pytest.mark.matrix),
        *(pytest.param("wan", scheduler, marks=pytest.mark.matrix) for scheduler in SCHEDULERS),
    ],
)
def test_samples_show_what_their_captions_ask(name, scheduler):
    wanted = miniatures.captions(name, 12, 11)
    pipe = miniatures.load_miniature(name, scheduler=scheduler)
    shares = accuracy(SPECS[name].world, wanted, read(SPECS[name].world, sample(pipe, name, wanted, steps=12)))
    assert min(shares["colour"], shares["size"]) >= 0.9, shares


# Emoji: given pictures, eight bits a weight


def test_eight_bits_are_a_scale_for_each_row(tmp_path):
    """What is stored as whole numbers comes back as a number times them, a row at a time; all else as it is."""
    weight = torch.tensor([[-127, 0, 127], [10, -20, 30]], dtype=torch.int8)
    stored = {
        "transformer.a": weight,
        "transformer.a.scale": torch.tensor([0.5, 2.0]).half(),
        "words.weight": torch.ones(2),
    }
    save_file(stored, tmp_path / "emoji.safetensors")
    read = read_weights("emoji", tmp_path)
    assert read.keys() == {"transformer.a", "words.weight"}
    assert torch.equal(read["transformer.a"], torch.tensor([[-63.5, 0, 63.5], [20, -40, 60]]))
    assert torch.equal(read["words.weight"], torch.ones(2))


def test_emoji_captions_have_up_to_eight_known_words():
    world = SPECS["emoji"].world
    assert len(world.names) > 2500
    assert max(len(name.split()) for name in world.names) == 8
    rows = world.parse("animals&nature cat face")
    assert rows.shape == (8,)
    assert rows[3:].unique().tolist() == [len(world.words)], "what is not used has a row of its own"
    for caption, words in (
        ("", "1 to 8"),
        ("cat " * 9, "9 words"),
        ("large unicorn-zebra", "unknown word 'unicorn-zebra'"),
    ):
        with pytest.raises(ValueError, match=words):
            world.parse(caption)


def test_emoji_has_nothing_to_draw():
    with pytest.raises(TypeError, match="given, not drawn"):
        _ = SPECS["emoji"].drawn


@pytest.mark.matrix
def test_emoji_pictures_follow_their_captions():
    """On a white ground, and coloured as the caption says."""
    pipe = miniatures.load_miniature("emoji")
    wanted = ["symbols large red circle", "symbols large blue circle"]
    given = miniatures.call_kwargs("emoji", wanted, steps=8, seed=3)
    red, blue = miniatures.to_frames("emoji", pipe(**given))[:, 0]
    for picture in (red, blue):
        assert picture[:2].mean() > 0.85, "a white edge"
    middle = slice(20, 44)
    for picture, wanted, other in ((red, 0, 2), (blue, 2, 0)):
        assert picture[middle, middle, wanted].mean() > picture[middle, middle, other].mean() + 0.2


def test_eight_bits_are_within_half_a_level_of_each_row(tmp_path):
    weights = {"transformer.a": torch.randn(5, 7) * torch.logspace(-4, 2, 5)[:, None], "transformer.b": torch.randn(6)}
    save_file(in_eight_bits(weights), tmp_path / "emoji.safetensors")
    back = read_weights("emoji", tmp_path)
    assert set(back) == set(weights)
    off = (back["transformer.a"] - weights["transformer.a"]).abs()
    assert (off <= weights["transformer.a"].abs().amax(1, keepdim=True) / 127 / 2 * 1.001).all()
    assert torch.equal(back["transformer.b"], weights["transformer.b"].half())


def test_emoji_pictures_are_those_of_the_captions():
    data, rows = pictures()
    assert data.shape == (len(EMOJI.names), 3, 64, 64)
    assert -1 <= float(data.min()) < float(data.max()) <= 1
    for index in range(0, len(rows), 97):
        assert torch.equal(EMOJI.parse(EMOJI.names[index]), rows[index])


@pytest.mark.matrix
def test_emoji_can_be_trained():
    weights, facts = train_emoji(60, 2, "cpu", most=2)
    assert set(weights) == set(read_weights("emoji"))
    assert facts["steps"] == 2
    assert math.isfinite(facts["loss"])

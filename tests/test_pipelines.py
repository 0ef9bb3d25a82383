"""Pipelines of `diffusers` as experts, held to `diffusers`' own samplers."""

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import diffusers
import pipeline_toys as toys
import torch
from PIL import Image

import composable_ebm as ceb
from composable_ebm.cli import main

STEPS, WEIGHT = 5, 3.0  # of 1000: with others DDIM steps to a level beside the next one
NOISE = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
CLOSE = {"rtol": 1e-3, "atol": 2e-3}


def ours(energy, start, num_steps=STEPS):
    return ceb.sample(energy, init=start, num_steps=num_steps).samples


def theirs(pipe, *prompts, **options):
    return pipe(
        *prompts,
        num_inference_steps=STEPS,
        guidance_scale=WEIGHT,
        latents=NOISE.clone(),
        output_type="latent",
        **options,
    ).images


def variance_preserving(sd):
    """The pipeline's latents in the frame of the chains, x = latents/√ᾱ."""
    sigma = sd.denoiser.levels(STEPS)[0]
    return NOISE * (1 + sigma**2) ** 0.5


# -- equal to the samplers of diffusers -------------------------------------------------------------

DDIM = {
    "epsilon": {},
    "v": {"prediction_type": "v_prediction"},
    "sample": {"prediction_type": "sample"},
    "trailing": {"timestep_spacing": "trailing"},
    "pure noise at the end": {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
}
EULER = {
    "epsilon": {},
    "v": {"prediction_type": "v_prediction"},
    "leading": {"timestep_spacing": "leading", "steps_offset": 1},
    "karras": {"use_karras_sigmas": True},
    "pure noise at the end": {
        "prediction_type": "v_prediction",
        "rescale_betas_zero_snr": True,
        "timestep_spacing": "trailing",
    },
}


@pytest.mark.parametrize("options", DDIM.values(), ids=DDIM)
def test_one_prompt_with_guidance_is_what_ddim_draws(options):
    pipe = toys.stable_diffusion(toys.ddim(**options))
    sd = ceb.from_pipeline(pipe, num_steps=STEPS)
    mix = ceb.given(sd, sd["a castle"], weight=WEIGHT)
    expected = theirs(pipe, ["a castle"] * 2)
    torch.testing.assert_close(ours(mix, variance_preserving(sd)), expected, **CLOSE)


@pytest.mark.parametrize("options", EULER.values(), ids=EULER)
@pytest.mark.parametrize("kind", [toys.stable_diffusion, toys.stable_diffusion_xl], ids=["sd", "sdxl"])
def test_one_prompt_with_guidance_is_what_euler_draws(kind, options):
    pipe = kind(toys.euler(**options))
    sd = ceb.from_pipeline(pipe, num_steps=STEPS)
    mix = ceb.given(sd, sd["a castle"], weight=WEIGHT)
    expected = theirs(pipe, ["a castle"] * 2)
    start = NOISE * pipe.scheduler.init_noise_sigma
    torch.testing.assert_close(ours(mix, start), expected, **CLOSE)


def test_a_negative_prompt_is_a_base_of_that_prompt():
    pipe = toys.stable_diffusion()
    sd = ceb.from_pipeline(pipe, num_steps=STEPS)
    mix = sd["a crowd"] + WEIGHT * (sd["a castle"] - sd["a crowd"])
    expected = theirs(pipe, ["a castle"] * 2, negative_prompt=["a crowd"] * 2)
    torch.testing.assert_close(ours(mix, variance_preserving(sd)), expected, **CLOSE)


@pytest.mark.parametrize("options", [{}, {"use_dynamic_shifting": True}], ids=["shift 3", "dynamic shift"])
def test_one_prompt_with_guidance_is_what_stable_diffusion_3_draws(options):
    pipe = toys.stable_diffusion_3(**options)
    sd = ceb.from_pipeline(pipe, num_steps=STEPS)
    mix = ceb.given(sd, sd["a castle"], weight=WEIGHT)
    start = NOISE * sd.denoiser.levels(STEPS)[0]
    torch.testing.assert_close(ours(mix, start), theirs(pipe, ["a castle"] * 2), **CLOSE)


@pytest.mark.parametrize("guidance", [False, True], ids=["schnell", "dev"])
def test_one_prompt_is_what_flux_draws(guidance):
    pipe = toys.flux(guidance)
    sd = ceb.from_pipeline(pipe, num_steps=STEPS, embedded_guidance=WEIGHT)
    packed = pipe._pack_latents(NOISE, 2, 4, 8, 8)
    expected = pipe(
        ["a castle"] * 2,
        num_inference_steps=STEPS,
        guidance_scale=WEIGHT,
        latents=packed,
        height=16,
        width=16,
        output_type="latent",
    ).images
    found = ours(sd["a castle"], NOISE * sd.denoiser.levels(STEPS)[0])
    torch.testing.assert_close(pipe._pack_latents(found, 2, 4, 8, 8), expected, **CLOSE)


def test_a_class_with_guidance_is_what_dit_draws():
    pipe = toys.dit()
    dit = ceb.from_pipeline(pipe, num_steps=STEPS)
    mix = ceb.given(dit, dit["golden retriever"], weight=WEIGHT)
    generator = torch.Generator().manual_seed(0)
    expected = pipe([207], WEIGHT, generator, STEPS, output_type="pt").images
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = dit.denoiser.levels(STEPS)[0]
    out = ceb.sample(mix, init=noise * (1 + sigma**2) ** 0.5, num_steps=STEPS)
    torch.testing.assert_close(out.images / 2 + 0.5, expected, **CLOSE)


def test_an_unconditional_network_draws_what_its_pipeline_draws():
    pipe = toys.pixels(toys.ddim(steps_offset=0))
    face = ceb.from_pipeline(diffusers.DDIMPipeline(pipe.unet, pipe.scheduler), num_steps=STEPS)
    own = diffusers.DDIMPipeline(pipe.unet, pipe.scheduler)
    own.scheduler = pipe.scheduler
    expected = own(2, torch.Generator().manual_seed(0), num_inference_steps=STEPS, output_type="np").images
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    sigma = face.denoiser.levels(STEPS)[0]
    found = ours(face, noise * (1 + sigma**2) ** 0.5)
    torch.testing.assert_close(found / 2 + 0.5, torch.from_numpy(expected).permute(0, 3, 1, 2), **CLOSE)


@pytest.mark.parametrize("predicts", ["epsilon", "v_prediction"])
def test_a_preconditioned_network_draws_what_edm_draws(predicts):
    scheduler = diffusers.EDMEulerScheduler(prediction_type=predicts)
    pipe = toys.pixels(scheduler, classes=5)
    face = ceb.from_pipeline(pipe, num_steps=STEPS)
    scheduler.set_timesteps(STEPS)
    x = start = torch.randn(2, 3, 8, 8) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        with torch.no_grad():
            shown = scheduler.scale_model_input(x, t)
            answer = pipe.unet(shown, t, class_labels=torch.tensor([3, 3])).sample
        x = scheduler.step(answer, t, x).prev_sample
    torch.testing.assert_close(ours(face[3], start), x.clamp(-1, 1), **CLOSE)


# -- one network, many prompts -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd():
    return ceb.from_pipeline(toys.stable_diffusion(), num_steps=4)


@pytest.fixture(scope="module")
def castle(sd):
    return ceb.given(sd, sd["a castle"], sd["at night"], ~sd["people"], weight=7)


def test_all_prompts_go_through_the_network_in_one_pass_and_text_is_encoded_once(sd, castle):
    passes, texts = [], []
    hooks = [
        sd.denoiser.network.register_forward_pre_hook(lambda _, args: passes.append(len(args[0]))),
        sd.denoiser.pipe.text_encoder.register_forward_pre_hook(lambda *_: texts.append(1)),
    ]
    ceb.sample(castle + 0 * sd["a moon"], num_chains=3, seed=0)
    for hook in hooks:
        hook.remove()
    assert passes == [4 * 3] * 5  # four terms, three chains, four levels and the end
    assert sum(texts) == 1  # the moon; the others were encoded where they were named


def test_rows_at_once_bounds_a_pass_and_changes_nothing(sd, castle):
    whole = ceb.sample(castle, num_chains=3, seed=0).samples
    sd.denoiser.rows_at_once, passes = 5, []
    hook = sd.denoiser.network.register_forward_pre_hook(lambda _, args: passes.append(len(args[0])))
    parts = ceb.sample(castle, num_chains=3, seed=0).samples
    hook.remove()
    sd.denoiser.rows_at_once = None
    assert max(passes) == 5
    torch.testing.assert_close(parts, whole, **CLOSE)


def test_not_asks_for_the_opposite_of_what_the_prompt_asks(sd):
    x, level = NOISE, torch.tensor(2.0)
    towards = sd["people"].score(x, noise_level=level) - sd.score(x, noise_level=level)
    away = (~sd["people"]).score(x, noise_level=level) - sd.score(x, noise_level=level)
    torch.testing.assert_close(away, -towards, rtol=1e-4, atol=1e-5)
    assert (~~sd["people"]).key == sd["people"].key


def test_prompts_are_quoted_in_recipes(sd, castle):
    asked = ceb.given(sd, sd['an "old" ü'], weight=2)
    for mix in (castle, asked, ~sd["people"], sd["a castle"] - sd):
        again = ceb.parse(str(mix), {"sd": sd})
        assert again.key == mix.key
        assert str(again) == str(mix)
    with pytest.raises(ceb.RecipeError, match="follows the rules of JSON"):
        ceb.parse(r'sd["\q"]', {"sd": sd})


def test_weights_are_data_and_a_row_may_have_its_own(sd):
    prompt = sd["a castle"]
    alone = [ceb.sample(ceb.given(sd, prompt, weight=w), init=NOISE[:1] * 5).samples for w in (1.0, 4.0)]
    mix = sd + torch.tensor([1.0, 4.0]) * (prompt - sd)
    together = ceb.sample(mix, init=NOISE[:1].repeat(2, 1, 1, 1) * 5).samples
    torch.testing.assert_close(together, torch.cat(alone), **CLOSE)


def test_requests_of_other_prompts_run_in_one_batch_of_an_engine(sd):
    mixes = [ceb.given(sd, sd[text], weight=3) for text in ("a castle", "a moon")]
    alone = [ceb.sample(mix, num_chains=2, seed=seed).samples for seed, mix in enumerate(mixes)]
    with ceb.Engine() as engine:
        runs = [engine.submit(mix, num_chains=2, seed=seed) for seed, mix in enumerate(mixes)]
        results = [run.result(60).samples for run in runs]
    for found, expected in zip(results, alone, strict=True):
        torch.testing.assert_close(found, expected, **CLOSE)


@pytest.mark.parametrize("kernel", [ceb.Langevin(0.1), ceb.UnderdampedLangevin(0.1)])
def test_a_corrector_takes_its_steps_at_each_level(sd, castle, kernel):
    out = ceb.sample(castle, num_chains=2, num_steps=6, sampler=sd.sampler(3, kernel, corrections=2))
    assert out.samples.isfinite().all()
    assert out.evaluations == 1 + 6 + 3


# -- the parts of the pipeline ------------------------------------------------------------------------


def test_latents_become_pictures_and_pictures_latents_as_in_the_pipeline(sd, tmp_path):
    vae, out = sd.denoiser.pipe.vae, ceb.sample(sd, num_chains=2, seed=0)
    with torch.no_grad():
        expected = vae.decode(out.samples / vae.config.scaling_factor).sample.clamp(-1, 1)
        latents = vae.encode(expected).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(out.images, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sd.states(out.images), latents, rtol=1e-3, atol=1e-3)
    out.save(tmp_path / "castle.png")
    assert (tmp_path / "castle.png").stat().st_size > 0


def test_a_mask_on_the_picture_holds_the_latents_of_a_picture(castle):
    picture = torch.rand(2, 3, 16, 16) * 2 - 1
    mask = torch.zeros(16, 16)
    mask[:8] = 1
    out = ceb.sample(castle, init=picture, mask=mask, held="noisy", seed=0)
    given = castle.states(picture)
    torch.testing.assert_close(out.samples[:, :, 4:], given[:, :, 4:])
    assert not torch.allclose(out.samples[:, :, :4], given[:, :, :4])


def test_pictures_that_the_safety_checker_flags_are_black():
    class Checker(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(()))

        def forward(self, images, clip_input):
            return images, [True, *[False] * (len(images) - 1)]

    pipe = toys.stable_diffusion()
    pipe.register_modules(
        safety_checker=Checker(),
        feature_extractor=toys.transformers.CLIPImageProcessor(size=16, crop_size=16),
    )
    images = ceb.sample(ceb.from_pipeline(pipe, num_steps=2), num_chains=2).images
    assert (images[0] == -1).all()
    assert (images[1] != -1).any()


def test_the_network_may_run_in_16_bits_while_chains_stay_in_32():
    pipe = toys.stable_diffusion()
    exact = ceb.sample(ceb.from_pipeline(pipe, num_steps=3), num_chains=2).samples
    coarse = ceb.from_pipeline(toys.stable_diffusion(), num_steps=3).bfloat16()
    assert coarse.denoiser.network.dtype == torch.bfloat16
    out = ceb.sample(ceb.given(coarse, coarse["a castle"], weight=1.0), num_chains=2)
    assert out.samples.dtype == out.images.dtype == torch.float32
    found = ceb.sample(coarse, num_chains=2).samples
    assert float((found - exact).abs().mean() / exact.abs().mean()) < 0.02


def test_casting_a_composition_copies_the_network_alone(sd):
    plain = ceb.given(sd, sd["a castle"], weight=3)
    before = ceb.sample(plain, num_chains=2).samples
    cast = ceb.given(sd, sd["a castle"], weight=3).bfloat16()
    (own,) = {leaf.denoiser for leaf in cast.leaves()}
    assert own.network.dtype == torch.bfloat16
    assert own.pipe is sd.denoiser.pipe
    assert own.codec is sd.denoiser.codec
    assert sd.denoiser.network.dtype == torch.float32
    after = ceb.sample(cast, num_chains=2).samples
    assert float((after - before).abs().mean() / before.abs().mean()) < 0.05
    torch.testing.assert_close(ceb.sample(plain, num_chains=2).samples, before)


def test_weights_that_are_offloaded_stay_where_the_pipeline_keeps_them():
    accelerate = pytest.importorskip("accelerate")
    pipe = toys.stable_diffusion()
    plain = ceb.sample(ceb.from_pipeline(pipe, num_steps=2), num_chains=2).samples
    accelerate.cpu_offload(pipe.unet, torch.device("cpu"))  # weights on the meta device between calls
    away = ceb.from_pipeline(pipe, num_steps=2)
    assert next(pipe.unet.parameters()).device.type == "meta"
    torch.testing.assert_close(ceb.sample(away, num_chains=2).samples, plain)
    assert next(pipe.unet.parameters()).device.type == "meta"


def test_the_progress_bar_is_the_pipelines_own(sd, capsys):
    pipe = sd.denoiser.pipe
    pipe.set_progress_bar_config(disable=False)
    ceb.sample(sd, num_chains=1, callback=sd.denoiser.progress())
    assert "4/4" in capsys.readouterr().err
    pipe.set_progress_bar_config(disable=True)
    ceb.sample(sd, num_chains=1, callback=sd.denoiser.progress())
    assert capsys.readouterr().err == ""


def test_height_and_width_are_those_of_the_picture():
    pipe = toys.stable_diffusion_xl()
    wide = ceb.from_pipeline(pipe, height=16, width=32, num_steps=2)
    out = ceb.sample(wide["a castle"], num_chains=1)
    assert out.samples.shape == (1, 4, 8, 16)
    assert out.images.shape == (1, 3, 16, 32)
    assert wide.denoiser.condition("a castle")["time_ids"].tolist() == [[16, 32, 0, 0, 16, 32]]


# -- what refuses --------------------------------------------------------------------------------------


def test_networks_that_cannot_be_asked_are_refused_with_what_to_do():
    with pytest.raises(TypeError, match=r"of a known kind \(StableDiffusionPipeline, .* subclass"):
        ceb.from_pipeline(object())
    inpainting = toys.stable_diffusion(network=toys.unet(in_channels=9))
    with pytest.raises(ValueError, match=r"shown 9 channels and the autoencoder has 4.* masks are given to"):
        ceb.from_pipeline(inpainting)
    learned = toys.unet(out_channels=8)
    with pytest.raises(ValueError, match=r'a variance after the mean.*variance_type="learned_range"'):
        ceb.from_pipeline(toys.stable_diffusion(network=learned))
    said = diffusers.DDPMScheduler(variance_type="learned_range")
    assert ceb.from_pipeline(toys.stable_diffusion(said, network=learned)).event_shape == (4, 8, 8)
    with pytest.raises(ValueError, match="must be multiples of 2, got 15 and 16"):
        ceb.from_pipeline(toys.stable_diffusion(), height=15)


def test_prompts_that_cannot_be_read_are_refused_with_the_near_ones(sd):
    dit = ceb.from_pipeline(toys.dit(), num_steps=2)
    assert dit["golden retriever"].key == dit[207].key == dit["207"].key
    assert str(dit["retriever"]) == "dit[207]"
    with pytest.raises(KeyError, match=r"no class 'golden retreiver'.*Did you mean 'golden retriever'"):
        dit["golden retreiver"]
    with pytest.raises(KeyError, match="no class 1000: classes are 0 to 999"):
        dit[1000]
    with pytest.raises(KeyError, match="a prompt is text, got int"):
        sd[3]
    with pytest.raises(KeyError, match="takes no prompt"):
        ceb.from_pipeline(toys.pixels(), num_steps=2)["a castle"]


def test_what_compares_energies_is_refused(sd):
    with pytest.raises(ValueError, match="known only by its gradient"):
        sd["a castle"] | sd["a moon"]
    with pytest.raises(ValueError, match="known only by its gradient"):
        ceb.sample(sd, sampler=ceb.MALA(0.1))
    with pytest.raises(TypeError, match="at a value of their attribute, got sd"):
        ceb.given(sd, sd)
    other = ceb.from_pipeline(toys.stable_diffusion(), num_steps=2)
    with pytest.raises(ValueError, match="the latents of"):
        sd + other["a castle"]


def test_a_pipeline_in_a_folder_is_sampled_from_the_command_line(tmp_path, monkeypatch):
    toys.stable_diffusion().save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    recipe = 'sd + 3*(sd["a castle"] - sd)'
    command = ["sample", recipe, "--pipeline", "tiny", "--num-chains", "2", "--num-steps", "2"]
    assert main([*command, "--out", "castle.png"]) == 0
    with Image.open("castle.png") as picture:
        assert picture.text["recipe"] == '-2*sd + 3*sd["a castle"]'
    assert main(["sample", "sd", "--pipeline", "nowhere", "--out", "nowhere.png"]) == 2

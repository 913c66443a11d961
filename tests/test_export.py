"""To diffusers and back: an exported model draws our pictures in diffusers' own pipeline, and the
README's recipe makes a pipeline a checkpoint of ours."""
import re

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import AutoTokenizer, CLIPTextModel

import data
import sample
from conftest import ROOT, assert_same, newest, run_ok, train_run
from models import PRESETS, Model, ModelConfig, load_model
from sample import export_pipeline

RECIPE = re.search(r"^```python\n(import torch\nfrom diffusers.*?)^```",
                   (ROOT / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE)[1]
PROMPTS = ["a dog runs over the grass", "two people on a beach"]
UNET = dict(PRESETS["standard"].unet, block_out_channels=[16, 32], layers_per_block=1,
            norm_num_groups=8, attention_head_dim=4)


def make_model(clip, vae, **more):
    torch.manual_seed(0)
    config = ModelConfig(unet=UNET, resolution=16, text_encoder=clip, vae=str(vae), **more)
    model = Model(config)
    model.unet.eval()
    return model


def assert_draws_ours(folder, model, sampler="ddim", steps=4, atol=1e-4):
    """StableDiffusionPipeline, loaded from the folder, draws our pictures from our noise."""
    rngs, shape = [data.counter_rng("sampling", 0, i) for i in range(2)], model.codec.latent_shape
    noise = np.stack([rng.standard_normal(shape, dtype=np.float32) for rng in rngs])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "to_uint8", lambda images: images)   # in full precision
        ours = sample.generate(model, PROMPTS, sampler=sampler, steps=steps, guidance_scale=3.0)
    assert (ours[0] - ours[1]).abs().max() > 0.1, "they depend on prompt and noise"
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    theirs = pipeline(PROMPTS, num_inference_steps=steps, guidance_scale=3.0, output_type="pt",
                      latents=torch.from_numpy(noise)).images
    torch.testing.assert_close(ours, theirs * 2 - 1, rtol=0, atol=atol)


@pytest.mark.slow
@pytest.mark.parametrize("sampler, steps, betas, predicts, zero_snr", [
    ("ddim", 30, "scaled_linear", "epsilon", False), ("dpm++", 20, "linear", "epsilon", False),
    ("ddim", 30, "scaled_linear", "v_prediction", True), ("dpm++", 30, "linear", "sample", False),
    ("ddim", 7, "cosine", "v_prediction", False)])
def test_our_pictures(tmp_path, clip, vae, sampler, steps, betas, predicts, zero_snr):
    """Also with fewer tokens than CLIP's 77 and where the number of steps does not divide T."""
    model = make_model(clip, vae, token_length=20, prediction_type=predicts, beta_schedule=betas,
                       zero_terminal_snr=zero_snr)
    export_pipeline(model, tmp_path, sampler)
    # At zero SNR diffusers' solver puts alpha_bar = 2^-24 in place of 0.
    assert_draws_ours(tmp_path, model, sampler, steps, atol=1e-3 if zero_snr else 1e-4)


def test_what_the_pipeline_cannot_draw_is_refused(tmp_path, clip, vae, monkeypatch):
    """The reason is said, and no folder is left."""
    monkeypatch.setitem(sample.SAMPLERS, "own", sample.ddim)
    latent, shifted = make_model(clip, vae), make_model(clip, vae)
    shifted.codec.shift = 0.1
    for wrong, sampler, reason in (
            (shifted, "ddim", "shift_factor"), (Model(PRESETS["tiny"]), "ddim", "--vae"),
            (latent, "ddpm", "--sampler"), (latent, "own", "--sampler"),
            (make_model(clip, vae, pooled_text=True), "ddim", "--no-pooled-text")):
        with pytest.raises(ValueError, match=f"^--export .*{reason}"):
            export_pipeline(wrong, tmp_path / "no", sampler)
    assert not (tmp_path / "no").exists()


@pytest.fixture
def pipeline(tmp_path, monkeypatch, clip, vae):
    """pipeline(T, **noise) writes one of diffusers' own with 20 tokens into my_pipeline, lets the
    README's recipe make my_model.pt of it, and returns its UNet's weights."""
    def make(T=1000, in_channels=4, **noise):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(8, in_channels, cross_attention_dim=32, **UNET)
        StableDiffusionPipeline(
            AutoencoderKL.from_pretrained(vae), CLIPTextModel.from_pretrained(clip),
            AutoTokenizer.from_pretrained(clip, model_max_length=20), unet,
            DDIMScheduler(T, clip_sample=False, steps_offset=1, timestep_spacing="trailing",
                          **noise), None, None,
            requires_safety_checker=False).save_pretrained("my_pipeline")
        exec(RECIPE, {})
        return unet.state_dict()

    monkeypatch.chdir(tmp_path)
    return make


STABLE_DIFFUSION = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
LINEAR = dict(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)


@pytest.mark.parametrize("T, predicts, noise", [
    (1000, "epsilon", STABLE_DIFFUSION), (900, "sample", LINEAR),
    (900, "v_prediction", LINEAR | dict(rescale_betas_zero_snr=True))])
def test_a_pipeline_becomes_a_checkpoint(pipeline, T, predicts, noise):
    """The recipe takes over weights, schedule, prediction type, tokens and size, so that our
    sampler draws the pipeline's pictures."""
    weights, model = pipeline(T, prediction_type=predicts, **noise), load_model("my_model.pt")
    assert_same(weights, model.unet.state_dict())
    assert dict(resolution=16, token_length=20, num_train_timesteps=T, prediction_type=predicts,
                beta_schedule=noise["beta_schedule"]).items() <= vars(model.config).items()
    assert model.config.zero_terminal_snr == ("rescale_betas_zero_snr" in noise)
    assert_draws_ours("my_pipeline", model)


@pytest.mark.parametrize("wrong, reason", [
    (dict(LINEAR, beta_end=0.03), "BETA_SCHEDULES"), (dict(LINEAR, in_channels=9), "UNet")])
def test_a_pipeline_that_is_not_ours(pipeline, wrong, reason):
    """Betas that are not ours, and a UNet with other inputs, are refused by the recipe."""
    with pytest.raises((AssertionError, ValueError), match=reason):
        pipeline(**wrong)


@pytest.mark.slow
def test_training_goes_on_from_a_pipeline(pipeline, photos, tmp_path):
    """From the recipe's checkpoint train.py --init-from starts without a flag of the model: with a
    rate of 0 it leaves the pipeline's weights. The run resumes, and sample.py --export writes its
    averaged weights, without the libraries' bars."""
    weights = pipeline(**STABLE_DIFFUSION)
    run = train_run(tmp_path, "--data", photos, "--init-from", "my_model.pt", "--batch-size", 4,
                    "--workers", 0, "--lr", 0, "--max-steps", 1, "--device", "cpu")
    assert_same(newest(run)["unet"], weights)
    run_ok("train.py", "--resume", run, "--lr", 0.01, "--max-steps", 3)
    assert not torch.equal(newest(run)["ema"]["conv_in.bias"], weights["conv_in.bias"])
    done = run_ok("sample.py", "--checkpoint", run, "--export", "exported", "--device", "cpu",
                  cwd=tmp_path)
    assert "StableDiffusionPipeline.from_pretrained" in done.stdout
    assert "Loading" not in done.stderr and "Writing" not in done.stderr
    assert_draws_ours("exported", load_model(run))

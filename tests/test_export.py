"""To diffusers and back: an exported model draws our pictures in diffusers' own pipeline, and its
UNet can be trained on."""
import shutil

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline

import data
import sample
import train
from conftest import TINY, newest, run_ok, scalars, train_run
from models import PRESETS, Model, ModelConfig, load_model, read_pipeline
from sample import export_pipeline
from tiny_networks import make_clip, make_vae
from train import diffusion_loss

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
    shifted = make_model(clip, vae)
    shifted.codec.shift = 0.1
    refused = [(shifted, "ddim", "it ignores the VAE's shift_factor; use another --vae"),
               (Model(PRESETS["tiny"]), "ddim", "the model draws pixels; train with --vae"),
               (make_model(clip, vae), "ddpm", "it has no other --sampler than ddim and dpm.*"),
               (make_model(clip, vae, pooled_text=True), "ddim", "it has no input for pooled.*")]
    monkeypatch.setitem(sample.SAMPLERS, "own", sample.ddim)
    refused.append((make_model(clip, vae), "own", "it has no other --sampler than ddim and dpm.*"))
    for wrong, sampler, reason in refused:
        with pytest.raises(ValueError, match=f"^--export .*: not for StableDiff.*: {reason}$"):
            export_pipeline(wrong, tmp_path / "no", sampler)
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_training_goes_on_from_an_exported_unet(tmp_path, photos, clip, vae):
    """--export writes the EMA weights; --init-unet takes architecture and weights from there, so
    that the first loss is the exported model's. That run resumes without the folder."""
    flags = [*TINY, "--data", photos, "--text-encoder", clip, "--vae", vae, "--no-pooled-text",
             "--pixel-unshuffle", 1, "--batch-size", 4, "--workers", 0, "--val-fraction", 0]
    run = train_run(tmp_path, *flags, "--preset", "tiny", "--max-steps", 6)
    folder, model = tmp_path / "pipeline", load_model(run)
    done = run_ok("sample.py", "--checkpoint", run, "--export", folder, "--device", "cpu")
    assert "for diffusers: StableDiffusionPipeline.from_pretrained" in done.stdout
    assert "Loading" not in done.stderr and "Writing" not in done.stderr   # the libraries' bars
    assert_draws_ours(folder, model, steps=10)
    tuned = train_run(tmp_path, *flags, "--init-unet", folder, "--preset", "standard",
                      "--max-steps", 2)
    source, images = data.CaptionedImages(photos), np.arange(24)
    samples = data.Samples(data.image_loader(source, model.config), source.captions, images,
                           model.config, model.codec.latent_shape)
    batch = next(iter(data.make_loader(samples, data.GlobalOrder(images, 4))))
    expected = diffusion_loss(model.unet, model, batch, min_snr_gamma=5.0).mean().item()
    assert scalars(tuned, "train/loss")[1] == pytest.approx(expected, rel=1e-4)
    shutil.rmtree(folder)
    run_ok("train.py", "--resume", tuned, "--max-steps", 3)
    assert newest(tuned)["step"] == 3
    assert newest(tuned)["config"]["unet"]["block_out_channels"] == [64, 128]


def test_a_pipeline_says_how_it_was_trained(tmp_path, clip, vae):
    """--init-unet takes schedule, prediction type, tokens and, unless told otherwise, the size from
    the pipeline; a flag that contradicts is refused, and so are betas that are not ours. A UNet
    alone is trained on with a warning."""
    said = dict(prediction_type="v_prediction", zero_terminal_snr=True, token_length=20,
                beta_schedule="linear", num_train_timesteps=900)
    export_pipeline(make_model(clip, vae, **said), tmp_path)
    flags = ["--data", "x", "--text-encoder", clip, "--vae", vae, "--init-unet"]
    config = train.parse_args([*flags, str(tmp_path)])[1]
    assert said.items() <= vars(config).items() and config.resolution == 16
    assert train.parse_args([*flags, str(tmp_path), "--resolution", "32"])[1].resolution == 32
    for flag, value in (("--prediction-type", "epsilon"), ("--token-length", "77"),
                        ("--beta-schedule", "cosine")):
        with pytest.raises(ValueError, match=f"^{flag} {value}: the model to start from has "):
            train.parse_args([*flags, str(tmp_path), flag, value])
    with pytest.warns(UserWarning, match="^--init-unet .*/unet: is no pipeline and does not say"):
        assert train.parse_args([*flags, str(tmp_path / "unet")])[1].resolution == 16
    path = tmp_path / "scheduler/scheduler_config.json"
    path.write_text(path.read_text().replace("0.02", "0.03"))
    with pytest.raises(ValueError, match=r"^--init-unet .*: its betas end at \[0.0001, 0.03\]"):
        train.parse_args([*flags, str(tmp_path)])


def test_a_unet_that_does_not_fit(tmp_path, clip, vae):
    """A pretrained UNet with another VAE, another text width or pooled text is refused in one line
    that says so, and so is what is no UNet."""
    export_pipeline(make_model(clip, vae), tmp_path)
    unet = read_pipeline(str(tmp_path), ModelConfig(vae=vae))["unet"]
    vae8, clip64 = make_vae(tmp_path / "a", latent_channels=8), make_clip(tmp_path / "b", width=64)
    for networks, pooled, reason in (((clip, vae), True, "class_embed_type None, .* projection"),
                                     ((clip, vae8), False, "in_channels 4, .* call for 8"),
                                     ((clip64, vae), False, "attention_dim 32, .* call for 64")):
        config = ModelConfig(unet=unet, resolution=16, text_encoder=networks[0], vae=networks[1],
                             pooled_text=pooled)
        with pytest.raises(ValueError, match=f"^--init-unet: that UNet has .*{reason}; choose"):
            Model(config)
    with pytest.raises(ValueError, match=f"^--init-unet {vae}: is a AutoencoderKL, not a UNet2D"):
        read_pipeline(vae, ModelConfig(vae=vae))

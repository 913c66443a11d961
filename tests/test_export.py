"""To diffusers and back: an exported run draws our pictures in diffusers' own pipeline, and its UNet can be trained on."""
import shutil

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline

from conftest import launch, run_ok, scalars, train_run
from data import CaptionedImages, Ranks, Samples, ShardedBatches, counter_rng, split_images
from models import PRESETS, Model, ModelConfig, load_checkpoint, load_model, read_unet_config
from sample import SAMPLERS, export_pipeline, guided_denoiser, make_timesteps
from tiny_networks import make_clip, make_vae
from train import diffusion_loss

PROMPTS = ["a dog runs over the grass", "two people on a beach"]
UNET = dict(block_out_channels=[16, 32], layers_per_block=1, norm_num_groups=8, attention_head_dim=4,
            down_block_types=["CrossAttnDownBlock2D", "DownBlock2D"], up_block_types=["UpBlock2D", "CrossAttnUpBlock2D"])


def ours_and_theirs(model, folder, sampler="ddim", steps=30):
    """The same prompts and noise drawn by our sampler and by the pipeline in the folder, float in [-1, 1]."""
    encode, prompts = model.text_encoder, PROMPTS
    noise = torch.from_numpy(np.stack([counter_rng("sampling", 0, i).standard_normal(model.codec.latent_shape, dtype=np.float32)
                                       for i in range(len(prompts))]))
    denoise = guided_denoiser(model, *(encode(encode.tokenize(texts)) for texts in (prompts, [""] * len(prompts))), 3.0)
    with torch.no_grad():
        *_, (x_t, _) = SAMPLERS[sampler](denoise, noise, model.schedule, make_timesteps(1000, steps), None, 0.0)
    pipeline = StableDiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(prompts, num_inference_steps=steps, guidance_scale=3.0, latents=noise, output_type="pt").images
    return model.codec.decode(x_t), theirs * 2 - 1


@pytest.mark.parametrize("prediction_type, beta_schedule, zero_snr, sampler, steps", [
    ("epsilon", "scaled_linear", False, "ddim", 30), ("epsilon", "linear", False, "dpm++", 20),
    ("v_prediction", "cosine", False, "ddim", 7), ("v_prediction", "scaled_linear", True, "ddim", 30),
    ("sample", "linear", False, "dpm++", 30)])
def test_the_pipeline_draws_our_pictures(tmp_path, clip, vae, prediction_type, beta_schedule, zero_snr, sampler, steps):
    """StableDiffusionPipeline, loaded from the exported folder, draws what our sampler draws from the same noise, also with
    fewer tokens than CLIP's 77 and where the number of steps does not divide T."""
    torch.manual_seed(0)
    model = Model(ModelConfig(UNET, 16, text_encoder=clip, vae=vae, token_length=20, prediction_type=prediction_type,
                                    beta_schedule=beta_schedule, zero_terminal_snr=zero_snr))
    model.unet.eval()
    export_pipeline(model, tmp_path, sampler)
    ours, theirs = ours_and_theirs(model, tmp_path, sampler, steps)
    assert (ours[0] - ours[1]).abs().max() > 0.1   # pictures that depend on prompt and noise
    # At zero SNR diffusers' solver puts alpha_bar = 2^-24 in place of 0.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3 if zero_snr else 1e-4)


def test_other_frozen_networks(tmp_path, clip):
    """AutoencoderTiny is exported too; what the pipeline would draw otherwise, or not at all, is refused with the reason."""
    tiny = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                           num_decoder_blocks=(1, 1), scaling_factor=0.5)
    tiny.save_pretrained(tmp_path / "vae")
    model = Model(ModelConfig(UNET, 16, text_encoder=clip, vae=str(tmp_path / "vae")))
    model.unet.eval()
    export_pipeline(model, tmp_path / "pipeline")
    torch.testing.assert_close(*ours_and_theirs(model, tmp_path / "pipeline", steps=4), rtol=0, atol=1e-4)
    model.codec.shift = 0.1
    with pytest.raises(ValueError, match="ignores the VAE's shift_factor"):
        export_pipeline(model, tmp_path)
    with pytest.raises(ValueError, match="draws with a VAE"):
        export_pipeline(Model(PRESETS["tiny"]), tmp_path)


@pytest.fixture(scope="module")
def run(tmp_path_factory, photos, clip, vae):
    return train_run(tmp_path_factory.mktemp("export"), *flags_of(photos, clip, vae), "--preset", "tiny", "--max-steps", 6)


def flags_of(photos, clip, vae):
    return ["--data", photos, "--text-encoder", clip, "--vae", vae, "--pixel-unshuffle", 1, "--no-pooled-text",
            "--resolution", 16, "--batch-size", 4, "--workers", 0, "--log-every", 1, "--sample-every", 0,
            "--val-fraction", 0.1, "--device", "cpu"]


@pytest.mark.slow
def test_training_goes_on_from_an_exported_unet(run, tmp_path, photos, clip, vae):
    """--init-unet takes architecture and weights from a pipeline's folder: the first loss is that of the exported model. The
    run resumes, and is sampled, without that folder."""
    export_pipeline(load_model(run), tmp_path / "pipeline")
    tuned = train_run(tmp_path, *flags_of(photos, clip, vae), "--preset", "standard", "--max-steps", 2,
                      "--init-unet", tmp_path / "pipeline", "--token-length", 16, "--beta-schedule", "linear",
                      "--prediction-type", "sample")
    model, source = load_model(run), CaptionedImages(photos)   # the standard preset: min-SNR 5 and no floor
    keys = next(iter(ShardedBatches(split_images(len(source), 0.1)[0], 4, Ranks(0, 0, 1, 1, torch.device("cpu")))))
    batch = Samples(source, model.text_encoder.tokenize, model.config, model.codec.latent_shape).__getitems__(keys)
    with torch.no_grad():
        expected = diffusion_loss(model.unet, model, batch, min_snr_gamma=5.0).mean().item()
    assert scalars(tuned, "train/loss")[1] == pytest.approx(expected, rel=1e-4)
    shutil.rmtree(tmp_path / "pipeline")
    run_ok("train.py", "--resume", tuned, "--max-steps", 3)
    assert load_checkpoint(tuned)[0]["step"] == 3 and load_model(tuned).unet.config.block_out_channels == [64, 128]


@pytest.mark.parametrize("changes, message", [
    (dict(pooled_text=True), "class_embed_type None, but .* call for projection"),
    (dict(vae="other"), "in_channels 4, but .* call for 8"),
    (dict(text_encoder="other"), "cross_attention_dim 32, but .* call for 64")])
def test_a_unet_that_does_not_fit(tmp_path, clip, vae, changes, message):
    """A pretrained UNet with another VAE, another text width or pooled text is refused in one line, and so is no UNet."""
    export_pipeline(Model(ModelConfig(UNET, 16, text_encoder=clip, vae=vae)), tmp_path)
    others = dict(vae=make_vae(tmp_path / "other_vae", latent_channels=8), text_encoder=make_clip(tmp_path / "clip", width=64))
    changes = {name: others[name] if value == "other" else value for name, value in changes.items()}
    with pytest.raises(ValueError, match=message):
        Model(ModelConfig(read_unet_config(str(tmp_path)), 16, **{"text_encoder": clip, "vae": vae, **changes}))
    with pytest.raises(ValueError, match="is a AutoencoderKL, not a UNet2DConditionModel"):
        read_unet_config(vae)


@pytest.mark.slow
def test_export_by_the_command_line(run, tmp_path):
    """--export writes the EMA weights; a model with pooled text is refused in one line and leaves no folder."""
    done = run_ok("sample.py", "--checkpoint", run, "--export", tmp_path / "pipeline", "--device", "cpu")
    assert "from_pretrained" in done.stdout
    torch.testing.assert_close(*ours_and_theirs(load_model(run), tmp_path / "pipeline", steps=10), rtol=0, atol=1e-4)
    builtin = train_run(tmp_path, "--resolution", 16, "--max-steps", 1, "--sample-every", 0, "--device", "cpu", "--vae", "none")
    done = launch("sample.py", "--checkpoint", builtin, "--export", tmp_path / "no", "--device", "cpu")
    assert done.returncode == 2 and "error: --export" in done.stderr and not (tmp_path / "no").exists()

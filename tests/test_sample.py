"""Sampling: the same pictures from any number of processes and any batch size, guidance, and the command line."""
import numpy as np
import pytest
import torch
from PIL import Image

import sample
from conftest import TINY, launch, run_ok, train_run
from data import counter_rng
from models import PRESETS, ImageCodec, ModelConfig, TextEncoder, load_model
from sample import generate, guided_denoiser, make_grid, rescale_guidance

PROMPTS = ["a small red circle on a white background", "a large blue square on a black background",
           "a small pink cross on a gray background", "a large green triangle on a white background", "a"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train_run(tmp_path_factory.mktemp("sample"), *TINY, "--batch-size", 24, "--max-steps", 3)


def starting_noise(monkeypatch, model, **kwargs):
    """The x_T of every picture, caught on its way into the sampler."""
    caught, plain = [], sample.SAMPLERS["ddim"]

    def spy(denoise, x_t, *args):
        caught.append(x_t.clone())
        return plain(denoise, x_t, *args)

    with monkeypatch.context() as patch:
        patch.setitem(sample.SAMPLERS, "ddim", spy)
        pictures = generate(model, PROMPTS, steps=3, **kwargs)
    return torch.cat(caught), pictures


def test_batch_size_does_not_change_the_pictures(run, monkeypatch):
    """The starting noise is exactly, and the pictures to one grey level, the same for batch sizes 1, 2 and 5."""
    model = load_model(run)
    noise, pictures = starting_noise(monkeypatch, model, batch_size=5)
    for batch_size in (1, 2):
        other_noise, other = starting_noise(monkeypatch, model, batch_size=batch_size)
        assert torch.equal(noise, other_noise)
        assert (pictures.int() - other.int()).abs().max() <= 1
    assert len(noise.flatten(1).unique(dim=0)) == len(PROMPTS)
    other_seed, _ = starting_noise(monkeypatch, model, seed=1)
    assert not torch.equal(noise, other_seed)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_later_draws_belong_to_the_picture(run, sampler):
    """With noise drawn at every step, a picture is the same alone and among others."""
    model = load_model(run)
    together = generate(model, PROMPTS, sampler=sampler, eta=1.0, steps=4)
    alone = generate(model, PROMPTS[3:4], indices=[3], sampler=sampler, eta=1.0, steps=4)
    assert (together[3].int() - alone[0].int()).abs().max() <= 1


@pytest.mark.slow
def test_compiled_pictures_are_the_same(run):
    """A compiled network draws the same pictures, to one grey level, also where the last batch is smaller."""
    plain, compiled = (generate(load_model(run, compiled=compiled), PROMPTS, steps=2, batch_size=3) for compiled in (False, True))
    assert (plain.int() - compiled.int()).abs().max() <= 1


@pytest.mark.slow
def test_processes_do_not_change_the_pictures(run, tmp_path):
    """One process and two write the same pictures (to one grey level), with how they were made in their text chunks."""
    for processes in (1, 2):
        done = run_ok("sample.py", "--checkpoint", run, "--prompts", *PROMPTS, "--steps", 4, "--seed", 7, "--device", "cpu",
                      "--sampler", "ddpm", "--output", tmp_path / str(processes), "--steps-strip", processes=processes)
        assert "5 pictures in" in done.stdout
    for i, prompt in enumerate(PROMPTS):
        one, two = (Image.open(tmp_path / str(processes) / f"{i:05d}.png") for processes in (1, 2))
        assert np.abs(np.asarray(one).astype(int) - np.asarray(two)).max() <= 1
        assert one.text["prompt"] == prompt and one.text["seed"] == "7" and one.text["sampler"] == "ddpm"
        assert one.text["steps"] == "4" and one.text["guidance_scale"] == "2.0" and one.text["checkpoint"].startswith(str(run))
    assert Image.open(tmp_path / "1" / "grid.png").width > Image.open(tmp_path / "1" / "steps.png").height


def test_guidance_is_uncond_plus_s_times_the_difference(run):
    """The guided x_0 equals the formula on two separate network calls; scale 1 and times outside the interval make one
    call with the captions alone."""
    model = load_model(run)
    encode = model.text_encoder
    cond, uncond = encode(encode.tokenize(PROMPTS[:2])), encode(encode.tokenize(["", ""]))
    x_t, calls = torch.randn(2, *model.codec.latent_shape), []
    model.unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))

    def output(emb, t):
        return model.unet(x_t, t, emb, class_labels=emb.mean(1)).sample

    guided = guided_denoiser(model, cond, uncond, 3.0)(x_t, 700)
    expected = (output(uncond, 700) + 3.0 * (output(cond, 700) - output(uncond, 700))).clamp(-1, 1)
    torch.testing.assert_close(guided, expected, rtol=1e-4, atol=1e-4)
    calls.clear()
    for denoise in (guided_denoiser(model, cond, uncond, 1.0),
                    guided_denoiser(model, cond, uncond, 3.0, guidance_interval=(0.0, 0.5))):
        torch.testing.assert_close(denoise(x_t, 700), output(cond, 700).clamp(-1, 1), rtol=1e-4, atol=1e-4)
    assert calls == [2, 2, 2, 2]


def test_guidance_rescale_restores_the_spread():
    """With phi 1 the guided output has the conditional's standard deviation per picture; phi 0 leaves it alone."""
    guided, cond = torch.randn(2, 3, 4, 4) * 5, torch.randn(2, 3, 4, 4)
    full = rescale_guidance(guided, cond, 1.0)
    torch.testing.assert_close(full.std(dim=(1, 2, 3)), cond.std(dim=(1, 2, 3)))
    torch.testing.assert_close(rescale_guidance(guided, cond, 0.0), guided)


def test_negative_prompt_changes_the_picture(run):
    """A negative prompt takes the place of the empty caption; guidance away from the prompt itself is no guidance."""
    model = load_model(run)
    plain = generate(model, PROMPTS[:1], steps=3, guidance_scale=1.0)
    cancelled = generate(model, PROMPTS[:1], steps=3, guidance_scale=4.0, negative_prompt=PROMPTS[0])
    assert (plain.int() - cancelled.int()).abs().max() <= 1


def test_no_caption_dropout_gets_a_warning(run):
    """Guidance asked of a model trained without caption dropout warns, naming the flag; scale 1 does not."""
    model = load_model(run)
    model.config = ModelConfig(**{**model.config.to_dict(), "caption_dropout": 0.0})
    with pytest.warns(UserWarning, match="--guidance-scale 2.0: the model was trained without caption dropout"):
        generate(model, PROMPTS[:1], steps=1)


@pytest.mark.parametrize("prompts, how, message", [
    (["a"], dict(eta=2.0), "--eta 2.0: must be from 0 to 1"), ("a red circle", {}, "must be a list of texts")])
def test_what_would_draw_nonsense_is_refused(run, prompts, how, message):
    """DDIM's variance is defined for eta up to 1 only; one text is not taken for a list of letters."""
    with pytest.raises(ValueError, match=message):
        generate(load_model(run), prompts, steps=2, **how)


@pytest.mark.slow
def test_words_that_the_model_does_not_know_are_named(run, tmp_path):
    """The built-in text encoder has a small vocabulary; a prompt with other words is drawn with a warning that lists them."""
    done = run_ok("sample.py", "--checkpoint", run, "--prompts", "a small grey Heart, red", PROMPTS[0], "--steps", 1, "--output",
                  tmp_path / "out", cwd=tmp_path)
    assert "warning: --prompts: grey, heart: not among the words of the built-in pictures, which are a, on," in done.stderr
    assert len(list((tmp_path / "out").glob("0*.png"))) == 2


# The frozen networks


def test_pixel_space_round_trip():
    """Without a VAE decode(encode(image)) is the image, and the latent shape is what encode gives."""
    codec = ImageCodec(PRESETS["tiny"])
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    assert codec.encode(images).shape[1:] == codec.latent_shape
    torch.testing.assert_close(codec.decode(codec.encode(images)), images)


@pytest.mark.parametrize("shift", [None, 0.3])
def test_vae_scaling_comes_from_its_config(tmp_path, shift):
    """encode and decode equal diffusers' AutoencoderKL with the scaling factor and shift of its own config."""
    from diffusers import AutoencoderKL

    from tiny_networks import make_vae
    folder = make_vae(tmp_path / "pipeline" / "vae", scaling_factor=0.37, shift_factor=shift)
    config = ModelConfig(vae=str(tmp_path / "pipeline"), resolution=16)   # the pipeline's folder finds its vae/
    codec, vae = ImageCodec(config), AutoencoderKL.from_pretrained(folder)
    images, posterior_eps = torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, 4, 8, 8)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        raw = posterior.mean + posterior.std * posterior_eps
        x_0 = codec.encode(images, posterior_eps)
        torch.testing.assert_close(x_0, (raw - (shift or 0)) * 0.37)
        torch.testing.assert_close(codec.decode(x_0, slice_size=2), vae.decode(raw).sample.clamp(-1, 1), rtol=1e-4, atol=1e-4)
    assert codec.latent_shape == (4, 8, 8)


def test_tiny_autoencoder(tmp_path):
    """An AutoencoderTiny is recognised by its config and encodes as diffusers does, without a posterior."""
    from diffusers import AutoencoderTiny
    vae = AutoencoderTiny(encoder_block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), num_encoder_blocks=(1, 1),
                          num_decoder_blocks=(1, 1), scaling_factor=0.5)
    vae.save_pretrained(tmp_path)
    codec, images = ImageCodec(ModelConfig(vae=str(tmp_path), resolution=16)), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(codec.encode(images, torch.randn(codec.latent_shape)), vae.encode(images).latents * 0.5)


def test_text_encoder_is_clips(clip):
    """text_emb is the CLIP model's own last_hidden_state; long captions are cut with the end token kept."""
    from transformers import AutoTokenizer, CLIPTextModel
    encoder = TextEncoder(ModelConfig(text_encoder=clip, token_length=16))
    tokens = encoder.tokenize(["a dog", "a dog runs over the grass " * 20])
    assert tokens.shape == (2, 16) and tokens[1, -1] == encoder.tokenizer.eos_token_id
    theirs = AutoTokenizer.from_pretrained(clip)(["a dog"], padding="max_length", max_length=16, return_tensors="pt").input_ids
    assert torch.equal(tokens[:1], theirs)
    expected = CLIPTextModel.from_pretrained(clip)(theirs).last_hidden_state
    torch.testing.assert_close(encoder(tokens)[:1], expected)


def test_builtin_text_encoder_is_always_the_same():
    """The built-in encoder depends on no global seed and leaves the global generator alone."""
    config = ModelConfig(text_encoder="builtin", builtin_words=["red", "blue"], token_length=16)
    torch.manual_seed(1)
    first, following = TextEncoder(config), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), following)
    torch.manual_seed(2)
    tokens = first.tokenize(["Red blue", "red green"])
    assert torch.equal(first(tokens), TextEncoder(config)(tokens))
    assert tokens[0, :4].tolist() == [0, 3, 4, 1] and tokens[1, 2] == 2   # known words, and an unknown one


def test_grid_has_every_picture_and_caption():
    """make_grid places all pictures, upright and in order, with room for their captions."""
    pictures = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    pictures[4, 0] = 255
    grid = make_grid(pictures, ["a caption that is long enough for two lines"] * 5, columns=3, cell=64)
    x, y = 8 + 64 + 8 + 32, 8 + grid.height // 2 + 20
    assert grid.getpixel((x, y)) == (255, 0, 0) and grid.width == 3 * 72 + 8


@pytest.mark.slow
def test_mistakes_get_one_line(run, tmp_path):
    """Wrong flags of sample.py end in one line and exit code 2."""
    for flags, message in ((["--checkpoint", tmp_path / "no", "--prompts", "a"], "no such file or run folder"),
                           (["--checkpoint", run], "no prompts: give --prompts"),
                           (["--checkpoint", run, "--prompts", "a", "--steps", 0], "--steps 0: must be from 1"),
                           (["--checkpoint", run, "--prompt-file", tmp_path / "no"], "--prompt-file .*: no such file")):
        done = launch("sample.py", *flags, cwd=tmp_path, timeout=120)
        assert done.returncode == 2 and "Traceback" not in done.stderr and message.split(": .*")[0].split(".*")[0] in done.stderr


def test_noise_is_standard_normal():
    """The counter-seeded noise has mean 0 and variance 1 within and across pictures, and its lags are uncorrelated."""
    noise = np.stack([counter_rng("sampling", 0, i).standard_normal(256) for i in range(400)])
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs(np.corrcoef(noise[:-1].ravel(), noise[1:].ravel())[0, 1]) < 0.01

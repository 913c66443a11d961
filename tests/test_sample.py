"""Sampling: the same pictures however they are shared out, guidance, and the frozen networks."""
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from transformers import AutoTokenizer, CLIPTextModel

import data
import sample
from conftest import Job, run_ok
from models import PRESETS, ImageCodec, ModelConfig, TextEncoder, load_model, with_words
from sample import SAMPLERS, generate, guided_denoiser, rescale_guidance, to_uint8
from tiny_networks import make_vae

PROMPTS = [scene.caption for scene in data.SCENES[::48]] + ["a small grey Heart, red"]


@pytest.fixture
def model(run):
    return load_model(run)


def difference(a, b):
    """The largest one, in grey levels."""
    return np.abs(np.asarray(a).astype(int) - np.asarray(b)).max()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_picture_depends_on_the_seed_and_its_number_alone(model, sampler):
    """To one grey level a picture is the same in any batch and alone, also with noise drawn at
    every step; another number or another seed gives another picture."""
    how = dict(sampler=sampler, eta=float(sampler == "ddim"), steps=4)
    pictures = generate(model, PROMPTS, **how)
    for batch_size in (1, 2):
        assert difference(generate(model, PROMPTS, batch_size=batch_size, **how), pictures) <= 1
    one = PROMPTS[3:4]
    assert difference(generate(model, one, indices=[3], **how), pictures[3:4]) <= 1
    assert difference(generate(model, one, indices=[2], **how), pictures[3:4]) > 9
    assert difference(generate(model, one, indices=[3], seed=1, **how), pictures[3:4]) > 9


@pytest.mark.slow
def test_an_interrupted_call_goes_on(run, tmp_path, monkeypatch):
    """Pictures are saved as they come, also where another call was killed before its first. After a
    SIGKILL the same call, on two processes, leaves those alone and draws the others; pictures and
    sheets are those of a call that was not interrupted. Words that the model does not know are
    named. Another call into the folder, or the same after an edit of the code, is refused."""
    a, b = tmp_path / "a", tmp_path / "b"
    a.mkdir()
    (a / "pictures.json").write_text("of another call")
    (tmp_path / "prompts").write_text("\n\n".join(PROMPTS), "utf-8-sig")
    flags = ["--checkpoint", run, "--prompt-file", tmp_path / "prompts", "--images-per-prompt", 8,
             "--sampler", "ddpm", "--steps", 20, "--seed", 7, "--guidance-scales", 1, 2,
             "--steps-strip", "--device", "cpu", "--output"]
    with Job(tmp_path, *flags, a, "--batch-size", 2, script="sample.py", processes=1) as job:
        job.until(lambda: len(list(a.glob("0*.png"))) > 3)
    before = {path: path.stat().st_mtime_ns for path in a.glob("0*.png")}
    assert 3 < len(before) < 40
    assert "heart: not among" in run_ok("sample.py", *flags, a, processes=2).stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}
    run_ok("sample.py", *flags, b)
    for name in [*(f"{i:05d}" for i in range(40)), "grid", "guidance", "steps"]:
        assert difference(*(Image.open(place / f"{name}.png") for place in (a, b))) <= 1, name
    # A picture of the first prompt at scale 2 is in the second column of the sheet of scales.
    drawn = np.asarray(Image.open(a / "guidance.png"))[8:136:8, 8 + 136:8 + 136 + 128:8]
    assert difference(drawn, Image.open(a / "00000.png")) <= 1
    for more in (["--seed", 1], ["--guidance-scale", 3], ["--images-per-prompt", 1], []):
        if not more:
            monkeypatch.setattr(data, "hash_of_code", lambda: "edited")
        with pytest.raises(ValueError, match="^--output"):
            sample.main([*map(str, [*flags, a, *more])])


def test_the_way_from_noise_to_picture(model):
    """`trajectory` gives what each step starts from, first the noise, and the estimate of x_0 made
    there, last the picture."""
    noise = data.counter_rng("sampling", 7, 0).standard_normal(
        (1, *model.codec.latent_shape), dtype=np.float32)
    pictures, states = generate(model, PROMPTS[:1], seed=7, steps=5, trajectory=True)
    assert [state.shape for state in states] == [(2, *pictures.shape)] * 5
    first = to_uint8(model.codec.decode(torch.from_numpy(noise)))
    assert difference(states[0][0], first) <= 1 and torch.equal(states[-1][1], pictures)


def test_guidance_is_uncond_plus_s_times_the_difference(model):
    """The guided x_0 is the formula on two separate network calls; with scale 1 the network is
    called with the captions alone. Rescaled by phi 1 the output has the conditional's standard
    deviation. Guidance away from the prompt itself is none."""
    cond, uncond = model.text_encoder(PROMPTS[:2]), model.text_encoder(["", ""])
    x_t, calls = torch.randn(2, *model.codec.latent_shape), []

    def output(emb):
        return model.unet(x_t, 700, emb, class_labels=emb.mean(1)).sample

    plain, guided = output(cond), output(uncond) + 3 * (output(cond) - output(uncond))
    full = rescale_guidance(guided, plain, 1.0)
    torch.testing.assert_close(full.std(dim=(1, 2, 3)), plain.std(dim=(1, 2, 3)))
    model.unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    for scale, phi, expected in ((3, 0, guided), (3, 1, full), (1, 0, plain)):
        x_0 = guided_denoiser(model, cond, uncond, scale, phi)(x_t, 700)
        torch.testing.assert_close(x_0, expected.clamp(-1, 1), rtol=1e-4, atol=1e-4)
    assert calls == [4, 4, 2]
    away, none = (generate(model, PROMPTS[:2], steps=3, **how) for how in (
        dict(guidance_scale=4.0, negative_prompt=PROMPTS[0]), dict(guidance_scale=1.0)))
    assert difference(away[0], none[0]) <= 1 < difference(away[1], none[1])


@pytest.mark.parametrize("prompt, how, words", [
    ("red " * 15, {}, "cut"), ("red", dict(negative_prompt="red " * 15), "cut"),
    ("red", dict(negative_prompt="blue", guidance_scale=1), "--negative-prompt"),
    ("red", dict(guidance_rescale=0.5, guidance_scale=1), "--guidance-rescale"),
    ("red", dict(), "caption dropout"), ("red " * 14, dict(guidance_scale=1), None)])
def test_what_has_no_effect_is_said(model, recwarn, prompt, how, words):
    """A warning for text beyond the model's 16 tokens, which hold 14 words, for flags that do
    nothing without guidance, and for guidance of a model that knows no empty caption."""
    if words == "caption dropout":
        model.config = replace(model.config, caption_dropout=0.0)
    generate(model, [prompt], steps=1, **how)
    said = [str(warning.message) for warning in recwarn if warning.category is UserWarning]
    assert [words in text for text in said] == ([True] if words else [])


def test_what_would_draw_nonsense_is_refused(model):
    """In Python too: settings out of range, a text in place of a list, and weights whose
    activations overflow in float16, where black pictures would come out."""
    for prompts, how, named in ((PROMPTS, dict(eta=2.0), "--eta"), ("red", {}, "prompts 'red'")):
        with pytest.raises(ValueError, match=f"^{named}"):
            generate(model, prompts, **how)
    model.unet.conv_in.weight.data *= 1e6
    assert generate(model, PROMPTS[:1], steps=1).float().std() > 0
    with pytest.raises(FloatingPointError, match="^--amp torch.float16"):
        generate(model, PROMPTS[:1], steps=1, dtype=torch.float16)


@pytest.mark.parametrize("shift", [None, 0.3])
def test_vae_scaling_comes_from_its_config(tmp_path, shift):
    """moments and decode are diffusers' AutoencoderKL with the scaling factor and shift of its own
    config, also when a pipeline's folder is named; without a VAE they are each other's inverse."""
    folder = make_vae(tmp_path / "vae", scaling_factor=0.37, shift_factor=shift)
    codec = ImageCodec(ModelConfig(vae=str(tmp_path), resolution=16))
    vae = AutoencoderKL.from_pretrained(folder).requires_grad_(False)
    images, posterior_eps = torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, 4, 8, 8)
    posterior, (mean, std) = vae.encode(images).latent_dist, codec.moments(images)
    raw, x_0 = posterior.mean + posterior.std * posterior_eps, mean + std * posterior_eps
    torch.testing.assert_close(x_0, (raw - (shift or 0)) * 0.37)
    torch.testing.assert_close(codec.decode(x_0), vae.decode(raw).sample.clamp(-1, 1),
                               rtol=1e-4, atol=1e-4)
    pixels = ImageCodec(replace(PRESETS["tiny"], resolution=16))
    x_0, std = pixels.moments(images)
    assert x_0.shape[1:] == pixels.latent_shape and not std.any()
    assert torch.equal(pixels.decode(x_0), images)


def test_text_encoder_is_clips(clip):
    """text_emb is the CLIP model's own last_hidden_state, remembered or not; a long caption is cut
    with the end token kept."""
    captions = ["a dog", "a dog runs over the grass " * 20]
    encoder = TextEncoder(ModelConfig(text_encoder=clip, token_length=16))
    tokens = AutoTokenizer.from_pretrained(clip)(captions).input_ids
    tokens = torch.tensor([tokens[0] + [1] * (16 - len(tokens[0])), tokens[1][:15] + [1]])
    expected = CLIPTextModel.from_pretrained(clip)(tokens).last_hidden_state
    torch.testing.assert_close(encoder(captions), expected)
    with torch.autocast("cpu", torch.bfloat16):   # as in training
        torch.testing.assert_close(encoder(captions), expected)
    encoder.remember(captions)
    torch.testing.assert_close(encoder(captions[::-1]), expected.flip(0))


def test_builtin_text_encoder_is_always_the_same():
    """It depends on no global seed and leaves the global generator alone. Its vocabulary has every
    word of the captions once, at most 5,000; an unknown word is unlike any known one."""
    config = with_words(ModelConfig(text_encoder="builtin"), ["A dog, a DOG's tail", "tail"])
    assert config.builtin_words == ["'", ",", "a", "dog", "s", "tail"]
    with pytest.raises(ValueError, match="^--text-encoder builtin"):
        with_words(ModelConfig(text_encoder="builtin"), map(str, range(5001)))
    torch.manual_seed(1)
    first, following = TextEncoder(config), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), following)
    captions = ["A dog's tail", "a DOG's TAIL", "a cat's tail", "a tail's tail"]
    features = first(captions)
    assert torch.equal(features, TextEncoder(config)(captions))
    assert len(features.unique(dim=0)) == 3 and torch.equal(features[0], features[1])


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n"
# What users have in place of a network, made of the file of weights in its folder.
DAMAGED = {
    "pointer": lambda file: file.write_text(POINTER),
    "half": lambda file: file.write_bytes(file.read_bytes()[:-999]),
    "fp16": lambda file: file.rename(file.with_suffix(".fp16.safetensors")),
    "config": lambda file: file.with_name("config.json").write_text(POINTER),
    "other": lambda file: save_file({"a": torch.ones(1)}, file, dict(format="pt")),
    "file": lambda file: None, "nothing": lambda file: shutil.rmtree(file.parent)}


@pytest.mark.parametrize("damage", DAMAGED)
@pytest.mark.parametrize("flag, make", [("--vae", ImageCodec), ("--text-encoder", TextEncoder)])
def test_networks_that_cannot_be_loaded(tmp_path, clip, vae, flag, make, damage):
    """A git-lfs pointer or half a download as weights or config, fp16 files alone, another
    network's weights, one file in place of a folder, a name that is nowhere: one line with the flag
    and the place, whatever the libraries raise."""
    place = shutil.copytree(vae if flag == "--vae" else clip, tmp_path / "network")
    file, = place.glob("*.safetensors")
    DAMAGED[damage](file)
    name = str(file if damage == "file" else place)
    with pytest.raises(FileNotFoundError if damage == "nothing" else ValueError) as caught:
        make(ModelConfig(resolution=16, vae=name, text_encoder=name))
    assert str(caught.value).startswith(f"{flag} {name}: ") and "\n" not in str(caught.value)
    assert damage != "fp16" or "fp16 in" in str(caught.value)

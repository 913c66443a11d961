"""Sampling: the same pictures however they are shared out, guidance, and the frozen networks."""
import os
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from transformers import AutoTokenizer, CLIPTextModel

from conftest import ROOT, TINY, Job, errors, launch, run_ok, train_run
from data import counter_rng
from models import (
    PRESETS,
    ImageCodec,
    ModelConfig,
    TextEncoder,
    builtin_tokenizer,
    load_model,
    with_words,
)
from sample import SAMPLERS, generate, guided_denoiser, make_grid, rescale_guidance, to_uint8
from tiny_networks import make_vae

PROMPTS = ["a small red circle on a white background", "a large blue square on a black background",
           "a small pink cross on a gray background", "a large cyan triangle on a white background",
           "a small grey Heart, red"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return train_run(tmp_path_factory.mktemp("sample"), *TINY, "--batch-size", 24, "--max-steps", 3)


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
def test_compiled_pictures_are_the_same(run, model):
    """A compiled network draws the same pictures, also where the last batch is smaller."""
    compiled = load_model(run, compiled=True)
    pictures = [generate(which, PROMPTS, steps=2, batch_size=3) for which in (model, compiled)]
    assert difference(*pictures) <= 1


@pytest.mark.slow
def test_the_command_line_on_one_process_and_on_two(run, tmp_path):
    """Both write the same pictures, with how they were made in the files, an overview, a sheet of
    guidance scales, the way from noise to picture, and a warning that names the words the model
    does not know."""
    (tmp_path / "prompts").write_text("\n\n".join(PROMPTS), "utf-8-sig")
    for processes, prompts in ((1, ["--prompts", *PROMPTS]), (2, ["--prompt-file", "prompts"])):
        done = run_ok("sample.py", "--checkpoint", run, *prompts, "--steps", 4, "--seed", 7,
                      "--sampler", "ddpm", "--output", tmp_path / str(processes), "--steps-strip",
                      "--guidance-scales", 1, 2, "--device", "cpu", processes=processes,
                      cwd=tmp_path)
        assert "5 pictures in" in done.stdout
        assert re.search(r"warning: --prompts: grey, heart: not among the 25 words", done.stderr)
    for i, prompt in enumerate(PROMPTS):
        one, two = (Image.open(tmp_path / str(processes) / f"{i:05d}.png") for processes in (1, 2))
        assert difference(one, two) <= 1
        made = dict(prompt=prompt, seed="7", sampler="ddpm", steps="4", guidance_scale="2.0")
        assert one.text == two.text and made.items() <= one.text.items()
        assert one.text["checkpoint"].startswith(str(run))
    assert Image.open(tmp_path / "1/grid.png").width > Image.open(tmp_path / "1/steps.png").height
    sheets = [np.asarray(Image.open(tmp_path / f"{n}/guidance.png"), int) for n in (1, 2)]
    assert abs(sheets[0] - sheets[1]).max() <= 1 and sheets[0].shape[1] == 2 * 136 + 8
    drawn = sheets[0][8:136, 8 + 136:8 + 136 + 128:128 // 16]   # the first prompt at scale 2
    assert abs(drawn[::8] - np.asarray(Image.open(tmp_path / "1/00000.png"), int)).max() <= 1


def test_the_way_from_noise_to_picture(run):
    """`trajectory` gives what each step starts from, first the noise, and the estimate of x_0 made
    there, last the picture."""
    model = load_model(run)
    noise = counter_rng("sampling", 7, 0).standard_normal(
        (1, *model.codec.latent_shape), dtype=np.float32)
    pictures, states = generate(model, PROMPTS[:1], seed=7, steps=5, trajectory=True)
    first = to_uint8(model.codec.decode(torch.from_numpy(noise)))
    assert [state.shape for state in states] == [(2, *pictures.shape)] * 5
    assert difference(states[0][0, 0].numpy(), first[0].numpy()) <= 1
    assert torch.equal(states[-1][1], pictures)


@pytest.mark.slow
def test_an_interrupted_call_goes_on(run, tmp_path):
    """Pictures are saved as they come; after a SIGKILL the same call, on two processes and in other
    batches, leaves those alone, draws the others, and ends with the pictures of one that was not
    interrupted. Another prompt, guidance or number of pictures is refused before anything is drawn.
    """
    names = [f"{i:05d}.png" for i in range(40)]
    flags = ["--checkpoint", run, "--prompts", *PROMPTS[:2], "--images-per-prompt", 20, "--device",
             "cpu", "--steps", 20, "--output"]
    with Job(tmp_path, *flags, tmp_path / "a", "--batch-size", 2, script="sample.py",
             processes=1) as job:
        job.until(lambda: len(list(tmp_path.glob("a/0*.png"))) > 3)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("a/0*.png")}
    assert 3 < len(before) < 40
    run_ok("sample.py", *flags, tmp_path / "a", "--batch-size", 5, processes=2)
    assert before.items() <= {path: path.stat().st_mtime_ns for path in before}.items()
    run_ok("sample.py", *flags, tmp_path / "b")
    for name in names:
        assert difference(*(Image.open(tmp_path / f"{x}/{name}") for x in "ab")) <= 1
    assert {path.name for path in (tmp_path / "a").iterdir()} == {"grid.png", *names}
    grids = [Image.open(tmp_path / f"{x}/grid.png") for x in "ab"]
    assert difference(*grids) <= 1
    for more in (["--seed", 1], ["--guidance-scale", 3], ["--images-per-prompt", 10]):
        done = launch("sample.py", *flags, tmp_path / "a", *more)
        assert done.returncode == 2 and re.fullmatch(
            rf"error: --output {tmp_path}/a: another call made 000\d\d.png; name a new folder",
            *errors(done.stderr))


def test_guidance_is_uncond_plus_s_times_the_difference(model):
    """The guided x_0 is the formula on two separate network calls; with scale 1 or outside the
    interval the network is called with the captions alone."""
    cond, uncond = model.text_encoder(PROMPTS[:2]), model.text_encoder(["", ""])
    x_t, calls = torch.randn(2, *model.codec.latent_shape), []

    def output(emb):
        return model.unet(x_t, 700, emb, class_labels=emb.mean(1)).sample

    guided = (output(uncond) + 3 * (output(cond) - output(uncond))).clamp(-1, 1)
    plain = output(cond).clamp(-1, 1)
    model.unet.register_forward_pre_hook(lambda _, inputs: calls.append(len(inputs[0])))
    for scale, interval, expected in ((3, (0, 1), guided), (1, (0, 1), plain), (3, (0, .5), plain)):
        denoise = guided_denoiser(model, cond, uncond, scale, guidance_interval=interval)
        torch.testing.assert_close(denoise(x_t, 700), expected, rtol=1e-4, atol=1e-4)
    assert calls == [4, 2, 2]


def test_guidance_rescale_restores_the_spread():
    """With phi 1 each guided output has the conditional's standard deviation; phi 0 is off."""
    guided, cond = torch.randn(2, 3, 4, 4) * 5, torch.randn(2, 3, 4, 4)
    full = rescale_guidance(guided, cond, 1.0)
    torch.testing.assert_close(full.std(dim=(1, 2, 3)), cond.std(dim=(1, 2, 3)))
    torch.testing.assert_close(rescale_guidance(guided, cond, 0.0), guided)


def test_guidance_away_from_the_prompt_itself_is_no_guidance(model):
    """A negative prompt takes the place of the empty caption."""
    plain = generate(model, PROMPTS[:1], steps=3, guidance_scale=1.0)
    how = dict(steps=3, guidance_scale=4.0)
    assert difference(generate(model, PROMPTS[:1], negative_prompt=PROMPTS[0], **how), plain) <= 1
    assert difference(generate(model, PROMPTS[:1], **how), plain) > 1


@pytest.mark.parametrize("how, message", [
    (dict(eta=2.0), "--eta 2.0: must be from 0 to 1"),
    (dict(eta=0.5, sampler="ddpm"), "--eta 0.5: ddpm has none; add --sampler ddim"),
    (dict(guidance_scale=float("nan")), "--guidance-scale nan: must be from 0 to 100"),
    (dict(guidance_scale=1e30), r"--guidance-scale 1e\+30: must be from 0 to 100"),
    (dict(guidance_rescale=7.0), "--guidance-rescale 7.0: must be from 0 to 1"),
    (dict(guidance_interval=(0.9, 0.1)), "--guidance-interval .*: the first must not be above .*"),
    (dict(sampler="euler"), "--sampler euler: choose from ddpm, ddim, dpm..")])
def test_values_out_of_range(model, how, message):
    """generate() names the flag, its value and the range, before it draws."""
    with pytest.raises(ValueError, match=f"^{message}$"):
        generate(model, PROMPTS, **how)


def test_pictures_that_are_not_finite_are_refused(model):
    """Weights whose activations overflow in float16 draw in float32; in float16 the error names
    --amp, where black pictures would come out."""
    model.unet.conv_in.weight.data *= 1e6
    assert generate(model, PROMPTS[:1], steps=1).float().std() > 0
    with pytest.raises(FloatingPointError, match="^--amp torch.float16: pictures are not fini"):
        generate(model, PROMPTS[:1], steps=1, dtype=torch.float16)


def test_what_would_draw_nonsense_is_refused(model):
    """A text in place of a list of texts; a model that was trained without caption dropout gets a
    warning for guidance."""
    with pytest.raises(ValueError, match="^prompts 'a red circle': must be a list of texts, one a"):
        generate(model, "a red circle")
    model.config = replace(model.config, caption_dropout=0.0)
    with pytest.warns(UserWarning, match="^--guidance-scale 2.0: the model was trained without"):
        generate(model, PROMPTS[:1], steps=1)


def test_pixel_space_round_trip():
    """Without a VAE decode gives the image back, of the latent shape in between."""
    codec, images = ImageCodec(PRESETS["tiny"]), torch.rand(2, 3, 32, 32) * 2 - 1
    x_0, std = codec.moments(images)
    assert x_0.shape[1:] == codec.latent_shape and not std.any()
    torch.testing.assert_close(codec.decode(x_0), images)


@pytest.mark.parametrize("shift", [None, 0.3])
def test_vae_scaling_comes_from_its_config(tmp_path, shift):
    """moments and decode are diffusers' AutoencoderKL with the scaling factor and shift of its own
    config, also when a pipeline's folder is named."""
    folder = make_vae(tmp_path / "vae", scaling_factor=0.37, shift_factor=shift)
    codec = ImageCodec(ModelConfig(vae=str(tmp_path), resolution=16))
    vae = AutoencoderKL.from_pretrained(folder).requires_grad_(False)
    images, posterior_eps = torch.rand(3, 3, 16, 16) * 2 - 1, torch.randn(3, 4, 8, 8)
    posterior = vae.encode(images).latent_dist
    raw = posterior.mean + posterior.std * posterior_eps
    mean, std = codec.moments(images)
    x_0 = mean + std * posterior_eps
    assert x_0.shape[1:] == codec.latent_shape
    torch.testing.assert_close(x_0, (raw - (shift or 0)) * 0.37)
    torch.testing.assert_close(codec.decode(x_0), vae.decode(raw).sample.clamp(-1, 1),
                               rtol=1e-4, atol=1e-4)


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


COMMIT = "0123456789" * 4


def test_what_is_in_the_cache_is_not_asked_of_the_hub(tmp_path, clip, vae):
    """With both networks in the hub's cache by name, and the hub within reach, nothing calls it."""
    for name, folder in dict(clip=clip, vae=vae).items():
        place = tmp_path / f"hub/models--tiny--{name}"
        shutil.copytree(folder, place / "snapshots" / COMMIT)
        (place / "refs").mkdir()
        (place / "refs/main").write_text(COMMIT)
    code = ("from models import *\n"
            "config = ModelConfig(text_encoder='tiny/clip', vae='tiny/vae', resolution=16)\n"
            "TextEncoder(config), ImageCodec(config)")
    asked = []

    class Hub(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_POST = do_GET

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        env = dict(os.environ, HF_HOME=str(tmp_path), HF_HUB_OFFLINE="0", no_proxy="*",
                   HF_ENDPOINT=f"http://127.0.0.1:{hub.server_port}")
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, timeout=100,
                              capture_output=True, text=True)
        hub.shutdown()
    assert done.returncode == 0, done.stderr[-2000:]
    assert not [path for path in asked if "tiny" in path]   # other calls are about no network


def test_builtin_text_encoder_is_always_the_same():
    """It depends on no global seed and leaves the global generator alone; an unknown word is
    unlike any known one."""
    config = ModelConfig(text_encoder="builtin", builtin_words=["red", "blue"], token_length=16)
    torch.manual_seed(1)
    first, following = TextEncoder(config), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), following)
    captions = ["Red blue", "red BLUE", "red green", "red red"]
    features = first(captions)
    assert torch.equal(features, TextEncoder(config)(captions))
    assert len(features.unique(dim=0)) == 3 and torch.equal(features[0], features[1])


def test_vocabulary_of_captions():
    """It has every word once, as the tokenizer takes captions apart, and no more than 5,000."""
    config = ModelConfig(text_encoder="builtin")
    words = with_words(config, ["A dog, a DOG's tail", "tail"]).builtin_words
    assert words == ["'", ",", "a", "dog", "s", "tail"]
    tokenizer = builtin_tokenizer(words)
    assert tokenizer.unk_token_id not in tokenizer("A dog, a DOG's tail").input_ids
    with pytest.raises(ValueError, match="^--text-encoder builtin: .* 5,001 different .* a CLIP"):
        with_words(config, map(str, range(5001)))


def test_grid_has_every_picture_and_caption():
    """All pictures, upright and in order, with room for their captions."""
    pictures = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    pictures[4, 0] = 255
    grid = make_grid(pictures, ["a caption that is long enough for two lines"] * 5, 3, cell=64)
    assert grid.getpixel((8 + 64 + 8 + 32, 8 + grid.height // 2 + 20)) == (255, 0, 0)
    assert grid.width == 3 * 72 + 8 and grid.height > 2 * (64 + 2 * 12)


@pytest.mark.slow
@pytest.mark.parametrize("flags, message", [
    (["--checkpoint", "no", "--prompts", "a"], "checkpoint no: no such file or run folder"),
    (["--checkpoint", "RUN"], "no prompts: give --prompts TEXT ... or --prompt-file FILE"),
    (["--checkpoint", "RUN", "--prompts", "a", "--steps", "0"],
     "--steps 0: must be from 1 to the model's 1000 timesteps"),
    (["--checkpoint", "RUN", "--prompt-file", "no"], "--prompt-file no: [Errno 2] No such file or "
     "directory: 'no'; a text file in UTF-8 is needed")])
def test_mistakes_get_one_line(run, tmp_path, flags, message):
    """A wrong flag ends the script with one line and exit code 2."""
    flags = [str(run) if flag == "RUN" else flag for flag in flags]
    done = launch("sample.py", *flags, cwd=tmp_path, timeout=120)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert errors(done.stderr) == [f"error: {message}"]

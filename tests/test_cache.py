"""The latent cache: the same training as without, whoever encoded what and when."""
import gc
import os
import re
import shutil
from contextlib import ExitStack

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import TINY, Job, errors, launch, make_pictures, run_ok, scalars, train_run
from data import OnDemand, cache_latents, make_loader, open_source, to_unit_range
from models import ImageCodec, ModelConfig, TextEncoder, write_atomically
from tiny_networks import make_vae


@pytest.fixture
def pictures(tmp_path):
    """40 noisy pictures in a folder of their own; the cache lies beside it."""
    return make_pictures(tmp_path / "data" / "set", 40, 1, sides=(16, 18), suffix="png", prefix="",
                         table="metadata.csv")


@pytest.fixture
def flags(pictures, clip, vae):
    return ["--data", pictures, "--text-encoder", clip, "--vae", vae, "--preset", "tiny", *TINY,
            "--pixel-unshuffle", 1, "--batch-size", 8, "--val-fraction", 0.2, "--workers", 0]


def files(pictures):
    """{path of a file in a cache beside the data: its bytes}."""
    found = sorted(pictures.parent.glob("latents_*/*"))
    return {path: path.read_bytes() for path in found}


def losses(run):
    return [*scalars(run, "train/loss").values(), *scalars(run, "epoch/validation_loss").values()]


def test_moments_are_the_codec_s(pictures, vae, tmp_path):
    """What the cache holds of an image and of its mirror image is the VAE's mean and standard
    deviation, rounded to float16."""
    config = ModelConfig(vae=vae, resolution=16)
    codec, source = ImageCodec(config), open_source(pictures, 16)
    load = cache_latents(tmp_path, source, config, codec.latent_shape,
                         lambda images: codec.moments(to_unit_range(images)), write_atomically,
                         flip=True)
    assert len(list(tmp_path.glob("*.npy"))) == 3
    for i, mirror in np.ndindex(40, 2):
        pixels = np.array(source.image(i, 3, 16)).transpose(2, 0, 1)[None]
        image = torch.from_numpy(pixels) / 127.5 - 1
        posterior = codec.vae.encode(image.flip(3) if mirror else image).latent_dist
        # 0.7 is the VAE folder's scaling factor.
        expected = torch.cat([posterior.mean, posterior.std]) * 0.7
        moments = load(i, (0.5, 0.5), bool(mirror))["moments"]
        assert moments.dtype == np.float16
        np.testing.assert_allclose(moments, expected, rtol=1e-3, atol=1e-4)


def test_the_vae_takes_no_more_than_a_slice(vae):
    """Encoding and decoding give the VAE 8 pictures of 256 px at a time, or as many pixels of
    others and at least one picture, and the results are those of all at once."""
    sizes = [ImageCodec(ModelConfig(vae=vae, resolution=side)).slice_size for side in (
        32, 256, 512, 1024)]
    assert sizes == [512, 8, 2, 1]
    codec, taken = ImageCodec(ModelConfig(vae=vae, resolution=16)), []
    images = torch.rand(5, 3, 16, 16) * 2 - 1
    posterior = codec.vae.encode(images).latent_dist
    pictures = codec.vae.decode(posterior.mean).sample
    for part in (codec.vae.encoder, codec.vae.decoder):
        part.register_forward_pre_hook(lambda _, given: taken.append(len(given[0])))
    codec.slice_size = 2
    mean, std = codec.moments(images)
    torch.testing.assert_close(mean / codec.scale + codec.shift, posterior.mean)
    torch.testing.assert_close(std / codec.scale, posterior.std)
    torch.testing.assert_close(codec.decode(mean), pictures.clamp(-1, 1))
    assert taken == [2, 2, 1] * 2


def test_workers_leave_the_parents_garbage_alone():
    """What was there at the fork is out of reach of a worker's garbage collector."""
    loader = make_loader(OnDemand(lambda _: gc.get_freeze_count()), [[0]], workers=1)
    assert next(iter(loader)).item() > 10000


@pytest.mark.slow
def test_cached_training_equals_uncached(flags, pictures, tmp_path):
    """With flips, posterior draws, caption dropout and a picture that cannot be read, the losses of
    a cached run are those of an uncached one to the rounding of float16; two processes make the
    same files as one, to that rounding."""
    (pictures / "003.png").write_bytes(b"no picture")
    flags += ["--flip", "--max-bad-images", 0.05, "--runs", tmp_path]
    runs = {}
    for name, *more in (("plain", "--epochs", 3), ("cached", "--epochs", 3, "--cache-latents")):
        done = run_ok("train.py", *flags, "--name", name, *more)
        assert re.search("^warning: 1 of 40 images .*: '003.png'$", done.stderr, re.M)
        runs[name], = tmp_path.glob(f"run_*_{name}")
    assert len(losses(runs["plain"])) == 12 + 3
    assert losses(runs["cached"]) == pytest.approx(losses(runs["plain"]), rel=2e-3)
    train_run(tmp_path, *flags, "--max-steps", 1, "--cache-latents", tmp_path / "two", processes=2)
    here, there = files(pictures), sorted((tmp_path / "two").glob("*/*"))
    assert [path.relative_to(tmp_path / "two") for path in there] == [
        path.relative_to(pictures.parent) for path in here]
    for one, two in zip(here, there):
        np.testing.assert_allclose(np.load(two), np.load(one), rtol=2e-3, atol=1e-4)


class Trap:
    """Unpickling one makes the folder `sprung`."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.slow
def test_the_cache_depends_on_what_it_is_made_of(flags, pictures, tmp_path):
    """New captions, names and dates find the cache; another picture, resolution, VAE or flipping
    makes another; damaged files and pickles are encoded again, and nothing in them is executed."""
    def train(*more):
        return run_ok("train.py", *flags, "--max-steps", 1, "--runs", tmp_path, "--cache-latents",
                      *more, cwd=tmp_path).stderr

    assert "caching latents" in train()
    whole = files(pictures)
    for path in pictures.glob("*.png"):
        path.rename(pictures / f"new{path.name}")
    lines = (pictures / "metadata.csv").read_text().splitlines()[1:]
    renamed = [f"new{line[:7]},other words\n" for line in lines]
    (pictures / "metadata.csv").write_text("file_name,text\n" + "".join(renamed))
    assert "caching latents" not in train() and files(pictures) == whole

    cut, pickled, _ = whole
    cut.write_bytes(whole[cut][:1000])
    np.save(pickled, np.array([Trap()], dtype=object), allow_pickle=True)
    said = train()
    assert len(re.findall(r"^warning: .*\.npy: damaged \(.*\); encoded again$", said, re.M)) == 2
    assert files(pictures) == whole and not (tmp_path / "sprung").exists()

    Image.new("RGB", (16, 16)).save(pictures / "new007.png")
    vae = make_vae(tmp_path / "vae", scaling_factor=0.5)
    for more in ([], ["--flip"], ["--resolution", 20], ["--vae", vae]):
        before = files(pictures)
        train(*more)
        assert len(files(pictures)) == len(before) + 3 and before.items() <= files(pictures).items()


@pytest.mark.slow
def test_a_killed_cache_is_continued(flags, pictures, tmp_path):
    """Killed while encoding, a job leaves whole files only; two jobs that start together then keep
    these, and finish the rest without harm to each other."""
    rows = [f"{i:04d}.png,a\n" for i in range(1000)]
    for i, row in enumerate(rows):
        shutil.copy(pictures / f"{i % 40:03d}.png", pictures / row[:8])
    (pictures / "metadata.csv").write_text("file_name,text\n" + "".join(rows))
    flags += ["--max-steps", 1, "--runs", tmp_path, "--cache-latents"]
    folders = [tmp_path / name for name in "abc"]
    for folder in folders:
        folder.mkdir()
    with Job(folders[0], *flags, processes=1) as first:
        first.until(lambda: len(list(pictures.parent.glob("latents_*/latents_*.npy"))) >= 5)
    done = {path: path.stat().st_mtime_ns for path in files(pictures) if path.suffix == ".npy"}
    assert 5 <= len(done) < 63 and all(np.load(path).shape[1:] == (1, 2, 4, 8, 8) for path in done)
    with ExitStack() as stack:
        jobs = [stack.enter_context(Job(folder, *flags, processes=1)) for folder in folders[1:]]
        for job in jobs:
            assert job.process.wait(200) == 0, job.text()
        assert any("caching latents" in job.text() for job in jobs)   # both, if no one is late
    made = [path for path in files(pictures) if path.suffix == ".npy"]
    assert len(made) == 63 and all(path.stat().st_mtime_ns == at for path, at in done.items())
    latents = np.concatenate([np.load(path) for path in made])
    np.testing.assert_allclose(latents, latents[np.arange(1000) % 40], rtol=2e-3, atol=1e-4)
    assert len(np.unique(latents[:40], axis=0)) == 40


@pytest.mark.slow
def test_mistakes(flags, tmp_path):
    """Nothing to cache, random crops, a VAE that makes NaN and a folder that cannot be written to
    each end in one line."""
    broken = make_vae(tmp_path / "broken", scaling_factor=float("inf"))
    (tmp_path / "file").write_text("")
    for more, message in (
            (["--vae", "none"], "--cache-latents.*: --vae none has no latents to cache.*"),
            (["--random-crop"], "--cache-latents.*: with --random-crop every visit has other.*"),
            (["--vae", broken], r"--cache-latents.*: image \d+\b.* not finite.*"),
            (["--cache-latents", tmp_path / "file"], "--cache-latents: .* cannot be written .*")):
        done = launch("train.py", *flags, "--runs", tmp_path / "runs", "--cache-latents", *more)
        line, = errors(done.stderr)
        assert done.returncode == 2 and re.fullmatch(f"error: {message}", line), done.stderr
    assert not (tmp_path / "runs").exists()


def test_captions_encoded_once(clip):
    """Remembered captions, and the empty one, get the encoder's own features without it; with one
    other caption in a batch all go through the encoder; too many are not remembered."""
    encoder, calls = TextEncoder(ModelConfig(text_encoder=clip, token_length=20)), []
    encoder.clip.register_forward_hook(lambda *_: calls.append(1))
    captions = [*(f"a dog, number {i}" for i in range(5)), ""]
    alone = torch.cat([encoder([caption]) for caption in captions])
    encoder.remember(captions[:3], most_bytes=1000)
    assert len(calls) == 6 and not encoder.rows
    encoder.remember(captions[:5], batch_size=4)
    assert len(calls) == 6 + 2 and torch.equal(encoder(captions[::-1]), alone.flip(0))
    half = 6 * 2 * encoder.features[0].numel()   # bytes: there is room for all in half precision
    encoder.remember(captions[:5], most_bytes=half)
    assert encoder.features.dtype == torch.half and encoder(captions).dtype == torch.float32
    torch.testing.assert_close(encoder(captions[::-1]), alone.flip(0), rtol=1e-3, atol=1e-3)
    assert len(calls) == 6 + 2
    torch.testing.assert_close(encoder([captions[3], "a cat"])[0], alone[3])
    assert len(calls) == 6 + 2 + 1

"""The latent cache: the same training as without, whoever encoded what and when; and captions encoded once."""
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import ROOT, launch, run_ok, train_run
from data import LatentCache, Pictures, Ranks, UnreadableImage, open_source, to_unit_range
from models import ImageCodec, ModelConfig, TextEncoder, write_atomically
from tiny_networks import make_vae

ALONE = Ranks(0, 0, 1, 1, torch.device("cpu"))


@pytest.fixture
def data(tmp_path):
    """40 noisy pictures in a folder of their own; the cache lies beside it."""
    folder, rng = tmp_path / "data" / "pictures", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for i in range(40):
        Image.fromarray(rng.integers(0, 256, (16, 18, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
    (folder / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i:03d}.png,number {i}\n" for i in range(40)))
    return folder


@pytest.fixture
def flags(data, clip, vae):
    return ["--data", data, "--text-encoder", clip, "--vae", vae, "--preset", "tiny", "--pixel-unshuffle", 1, "--resolution", 16,
            "--batch-size", 8, "--val-fraction", 0.2, "--sample-every", 0, "--log-every", 1, "--workers", 0, "--device", "cpu"]


def caches(data):
    return sorted(data.parent.glob("latents_*"))


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def losses(run):
    events = EventAccumulator(str(run)).Reload()
    return [[event.value for event in events.Scalars(tag)] for tag in ("train/loss", "epoch/validation_loss")]


def test_moments_are_the_codec_s(data, vae, tmp_path):
    """What the cache holds of an image and of its mirror image is the VAE's mean and standard deviation, rounded to float16."""
    config = ModelConfig(vae=vae, resolution=16)
    codec, source = ImageCodec(config), open_source(data, config)
    pictures = Pictures(len(source), lambda i: source.image(i, 3, 16), source.content)
    cache = LatentCache(tmp_path, 40, 2, codec.latent_shape)
    cache.build(pictures, lambda images: codec.moments(to_unit_range(images)), write_atomically, ALONE)
    assert len(list(tmp_path.glob("*.npy"))) == 3
    for i in (0, 17, 39):
        image = torch.from_numpy(np.array(source.image(i, 3, 16))).permute(2, 0, 1)[None].float() / 127.5 - 1
        for mirror in (False, True):
            posterior = codec.vae.encode(image.flip(3) if mirror else image).latent_dist
            expected = torch.cat([posterior.mean, posterior.std]) * 0.7      # the VAE folder's scaling factor
            torch.testing.assert_close(torch.tensor(cache.image(i, mirror)).float(), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_cached_training_equals_uncached(flags, data, tmp_path):
    """With flips, posterior draws and caption dropout, the losses of a cached run are those of an uncached one to the rounding of
    float16; two processes make the same files as one, to that rounding."""
    plain = losses(train_run(tmp_path, *flags, "--flip", "--epochs", 3))
    cached = losses(train_run(tmp_path, *flags, "--flip", "--epochs", 3, "--cache-latents", "--name", "cached"))
    assert len(plain[0]) == 12 and len(plain[1]) == 3
    for ours, theirs in zip(cached, plain):
        assert ours == pytest.approx(theirs, rel=2e-3)
    here, = caches(data)
    train_run(tmp_path, *flags, "--flip", "--max-steps", 1, "--cache-latents", tmp_path / "elsewhere", processes=2)
    there, = (tmp_path / "elsewhere").iterdir()
    assert there.name == here.name and contents(there).keys() == contents(here).keys()
    for path in here.iterdir():
        np.testing.assert_allclose(np.load(there / path.name), np.load(path), rtol=2e-3, atol=1e-4)


@pytest.mark.slow
def test_the_cache_depends_on_what_it_is_made_of(flags, data, tmp_path):
    """New captions, names and dates find the cache; another picture, resolution, VAE or flipping makes another; damaged files and
    pickles are encoded again, and nothing in them is executed."""
    def train(*more):
        return run_ok("train.py", *flags, "--max-steps", 1, "--runs", tmp_path / "runs", "--cache-latents", *more).stderr

    assert "caching latents" in train()
    first, = caches(data)
    whole = contents(first)
    for i in range(40):
        (data / f"{i:03d}.png").rename(data / f"renamed{i:03d}.png")
    (data / "metadata.csv").write_text("file_name,text\n" + "".join(f"renamed{i:03d}.png,other words\n" for i in range(40)))
    assert "caching latents" not in train() and caches(data) == [first]

    name, other = sorted(whole)[:2]
    (first / name).write_bytes(whole[name][:1000])
    np.save(first / other, np.array([Trap(str(tmp_path / "sprung"))], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError):
        np.load(first / other)
    assert "damaged" in train() and contents(first) == whole and not (tmp_path / "sprung").exists()
    assert not np.load(first / other, allow_pickle=False).dtype.hasobject

    Image.new("RGB", (16, 16)).save(data / "renamed007.png")
    train()
    train("--flip")
    train("--resolution", "20")
    train("--vae", make_vae(tmp_path / "vae", scaling_factor=0.5))
    assert len(caches(data)) == 5


@pytest.mark.slow
def test_preflight_says_what_the_cache_will_take(flags, data, tmp_path):
    """The preflight of a cached run tells the cache's size and time, measures steps without encoding, and makes no cache."""
    done = run_ok("train.py", *flags, "--flip", "--preflight", "--runs", tmp_path / "runs", "--cache-latents")
    size, = re.findall(r"pass  latent cache: (\S+) GiB", done.stdout)
    assert float(size) == pytest.approx(40 * 2 * 2 * 4 * 8 * 8 * 2 / 2**30, rel=0.01) and "pass  steps" in done.stdout
    assert not caches(data)


@pytest.mark.slow
def test_unreadable_pictures(flags, data, tmp_path):
    """A picture that cannot be read is replaced by the same one as without the cache, and counted."""
    (data / "003.png").write_bytes(b"no picture")
    more = ["--max-bad-images", 0.05, "--epochs", 2, "--runs", tmp_path]
    plain = run_ok("train.py", *flags, *more, "--name", "plain")
    cached = run_ok("train.py", *flags, *more, "--cache-latents", "--name", "cached")
    assert "1 of 40 images replaced" in plain.stderr and "1 of 40 images replaced" in cached.stderr
    ours, theirs = (losses(next(tmp_path.glob(f"run_*_{name}"))) for name in ("plain", "cached"))
    assert ours[0] == pytest.approx(theirs[0], rel=2e-3)


class Trap:
    """Unpickling one writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.slow
def test_a_killed_cache_is_continued_and_shared(flags, data, tmp_path):
    """Killed while encoding, a job leaves whole files only; two jobs that start together then finish the rest."""
    for i in range(40, 2000):
        shutil.copy(data / f"{i % 40:03d}.png", data / f"{i:03d}.png")
    (data / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i:03d}.png,a\n" for i in range(2000)))
    command = [sys.executable, str(ROOT / "train.py"), *map(str, flags), "--max-steps", "1", "--runs", str(tmp_path),
               "--cache-latents"]

    def files():
        return sorted(path for folder in caches(data) for path in folder.glob("latents_*.npy"))

    def start():
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)

    first, until = start(), time.monotonic() + 120
    while len(files()) < 5 and first.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    done = {path: path.stat().st_mtime_ns for path in files()}
    assert 5 <= len(done) < 65 and all(np.load(path).shape[1:] == (1, 2, 4, 8, 8) for path in done)
    for job in [start(), start()]:
        try:
            assert "caching latents" in job.communicate(timeout=200)[1] and job.returncode == 0
        finally:
            job.kill()
    assert len(files()) == 65 and all(path.stat().st_mtime_ns == at for path, at in done.items())
    again = LatentCache(files()[0].parent, 2000, 1, (4, 8, 8))
    assert all(again.open(k) for k in range(65))
    third, copy_of_third, fourth = (again.image(i, False) for i in (3, 43, 4))
    assert np.array_equal(third, copy_of_third) and not np.array_equal(third, fourth)


@pytest.mark.slow
def test_mistakes(flags, data, tmp_path):
    """Nothing to cache, random crops, a VAE that makes NaN and a folder that cannot be written to each end in one line."""
    broken = make_vae(tmp_path / "broken", scaling_factor=float("inf"))
    (tmp_path / "file").write_text("")
    for more, message in ((["--vae", "none"], "--cache-latents: --vae none has no latents"),
                          (["--random-crop"], "--cache-latents: with --random-crop"),
                          (["--vae", broken], "--cache-latents: image .* has latents that are not finite"),
                          (["--cache-latents", tmp_path / "file"], "Not a directory|File exists")):
        done = launch("train.py", *flags, "--runs", tmp_path / "runs", "--cache-latents", *more)
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and len(errors) == 1, done.stderr
        assert re.search(message, errors[0]), errors
    assert not (tmp_path / "runs").exists()


def test_captions_encoded_once(clip):
    """Remembered captions get row numbers whose features are the encoder's own; one other caption in a batch, and all go through
    the encoder."""
    encoder = TextEncoder(ModelConfig(text_encoder=clip, token_length=20))
    captions = [f"a dog, number {i}" for i in range(5)] + [""]
    alone = [encoder(encoder.tokenize([caption])) for caption in captions]
    encoder.remember(captions, batch_size=4)
    numbers = encoder.tokenize(["", captions[3]])
    assert numbers.tolist() == [5, 3]
    torch.testing.assert_close(encoder(numbers), torch.cat([alone[5], alone[3]]))
    tokens = encoder.tokenize([captions[3], "a cat"])
    assert tokens.shape == (2, 20)
    torch.testing.assert_close(encoder(tokens)[:1], alone[3])


def test_a_batch_may_hold_no_readable_picture():
    """Where all pictures of a batch are unreadable it is empty, not an error."""
    def image(i):
        if i != 3:
            raise UnreadableImage("on purpose")
        return np.full((4, 4), 7, np.uint8)

    pictures = Pictures(4, image, None)
    assert pictures.__getitems__([0, 1, 2])[0] == []
    readable, images = pictures.__getitems__([2, 3])
    assert readable == [3] and images.shape == (1, 1, 4, 4) and (images == 7).all()

"""The latent cache: the same training as without, whoever encoded what and when."""
import os
import re

import numpy as np
import pytest
import torch

from conftest import TINY, Job, make_pictures, run_ok, scalars, train_run
from data import CaptionedImages, Files, cache_latents, to_unit_range
from layouts import write
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
    return [*scalars(run, "loss/train").values(), *scalars(run, "loss/validation").values()]


def test_moments_are_the_codec_s(pictures, vae, tmp_path):
    """What the cache holds of an image and of its mirror image is the VAE's mean and standard
    deviation, rounded to float16; a VAE that makes NaN is refused."""
    config = ModelConfig(vae=vae, resolution=16)
    codec, source = ImageCodec(config), CaptionedImages(pictures)
    how = (source, config, codec.latent_shape, lambda x: codec.moments(to_unit_range(x)),
           write_atomically, True)
    load = cache_latents(tmp_path, *how)
    for i, mirror in ((0, False), (17, True), (39, False), (39, True)):
        pixels = np.array(source.image(i, 3, 16)).transpose(2, 0, 1)[None]
        image = torch.from_numpy(pixels) / 127.5 - 1
        posterior = codec.vae.encode(image.flip(3) if mirror else image).latent_dist
        # 0.7 is the VAE folder's scaling factor.
        expected = torch.cat([posterior.mean, posterior.std]) * 0.7
        moments = load(i, mirror)["moments"]
        assert moments.dtype == np.float16
        np.testing.assert_allclose(moments, expected, rtol=1e-3, atol=1e-4)
    codec.scale = float("inf")
    with pytest.raises(ValueError, match="--cache-latents.*image 0.*finite"):
        cache_latents(pictures, *how)


def test_the_vae_takes_no_more_than_a_slice(vae):
    """Encoding and decoding give the VAE 8 pictures of 256 px at a time, or as many pixels of
    others and at least one picture, and the results are those of all at once."""
    for side, size in ((32, 512), (256, 8), (512, 2), (1024, 1)):
        assert ImageCodec(ModelConfig(vae=vae, resolution=side)).slice_size == size
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


@pytest.mark.parametrize("suffix", ["", ".zip", ".tar"])
def test_what_pictures_are_told_by(tmp_path, monkeypatch, suffix):
    """The pictures' identity is the same elsewhere and with other captions, another with another
    name, size, some of the bytes or, in a .zip, any; it opens no more pictures than that."""
    def identity(**changed):
        files = {f"{n}.png": b"picture %d" % n for n in range(9)} | changed
        path = write(tmp_path / f"{len(list(tmp_path.iterdir()))}{suffix}", files)
        source = CaptionedImages(path, "")
        opened.clear()
        found = source.identity(most=3)   # of numbers 0, 4 and 8
        assert len(opened) == 3
        return found

    opened, open_file = [], Files.open
    monkeypatch.setattr(Files, "open", lambda *args: opened.append(1) or open_file(*args))
    same = identity()
    assert same == identity(**{"captions.csv": "image,caption\n"})
    for changed in ({"1.png": b"shorter"}, {"9.png": b"another"}, {"4.png": b"Picture 4"}):
        assert same != identity(**changed)
    assert (same == identity(**{"1.png": b"Picture 1"})) == (suffix != ".zip")


@pytest.mark.slow
def test_cached_training_equals_uncached(flags, pictures, tmp_path):
    """With flips, posterior draws, caption dropout and a picture that cannot be read, the losses of
    a cached run are those of an uncached one to the rounding of float16; two processes make the
    same files as one, to that rounding."""
    (pictures / "003.png").write_bytes(b"no picture")
    flags += ["--flip"]
    done = run_ok("train.py", *flags, "--epochs", 2, "--folder", tmp_path / "plain")
    assert re.search("warning: .*'003.png'.*identify", done.stderr)
    plain, cached = losses(tmp_path / "plain"), losses(
        train_run(tmp_path, *flags, "--epochs", 2, "--cache-latents"))
    assert len(plain) == 8 + 2 and cached == pytest.approx(plain, rel=2e-3)
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
    """New captions and dates find the cache; another resolution, VAE or flipping makes another;
    damaged files and pickles are encoded again, and nothing in them is executed."""
    def train(*more):
        return run_ok("train.py", *flags, "--max-steps", 1, "--runs", tmp_path, "--cache-latents",
                      *more, cwd=tmp_path).stderr

    assert "caching latents" in train()
    whole = files(pictures)
    table = pictures / "metadata.csv"
    table.write_text(table.read_text().replace("number", "other words"))
    assert "caching latents" not in train() and files(pictures) == whole

    cut, pickled, _ = whole
    cut.write_bytes(whole[cut][:1000])
    np.save(pickled, np.array([Trap()], dtype=object), allow_pickle=True)
    assert "caching latents" in train()
    assert files(pictures) == whole and not (tmp_path / "sprung").exists()

    vae = make_vae(tmp_path / "vae", scaling_factor=0.5)
    for more in (["--flip"], ["--resolution", 20], ["--vae", vae]):
        before = files(pictures)
        train(*more)
        assert len(files(pictures)) == len(before) + 3 and before.items() <= files(pictures).items()


@pytest.mark.slow
def test_a_killed_cache_is_continued(flags, pictures, tmp_path):
    """Killed while encoding, a job leaves whole files only; two jobs that start together then keep
    these, and finish the rest without harm to each other."""
    make_pictures(pictures, 480, 1, sides=(16, 18), suffix="png", prefix="", table="metadata.csv")
    flags += ["--max-steps", 1, "--runs", tmp_path, "--cache-latents"]
    for name in "abc":
        (tmp_path / name).mkdir()
    with Job(tmp_path / "a", *flags, processes=1) as first:
        first.until(lambda: len(list(pictures.parent.glob("latents_*/latents_*.npy"))) >= 5)
    done = {path: path.stat().st_mtime_ns for path in files(pictures) if path.suffix == ".npy"}
    assert 5 <= len(done) < 30 and all(len(np.load(path)) == 16 for path in done)
    with (Job(tmp_path / "b", *flags, processes=1) as second,
          Job(tmp_path / "c", *flags, processes=1) as third):
        for job in (second, third):
            assert job.process.wait(200) == 0, job.text()
    made = [path for path in files(pictures) if path.suffix == ".npy"]
    assert len(made) == 30 and all(path.stat().st_mtime_ns == at for path, at in done.items())
    latents = np.concatenate([np.load(path) for path in made])
    assert np.isfinite(latents).all() and len(np.unique(latents, axis=0)) == 480


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
    assert torch.equal(encoder(captions[::-1]), alone.flip(0))
    half = 6 * 2 * encoder.features[0].numel()   # bytes: there is room for all in half precision
    encoder.remember(captions[:5], most_bytes=half)
    assert encoder.features.dtype == torch.half and len(calls) == 6 + 2
    torch.testing.assert_close(encoder(captions[::-1]), alone.flip(0), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(encoder([captions[3], "a cat"])[0], alone[3])
    assert len(calls) == 6 + 2 + 1

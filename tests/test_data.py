"""Images on disk: kinds of pictures, those that cannot be read, order, memory, loader workers."""
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, features

import data
from conftest import ROOT
from data import CaptionedImages, GlobalOrder, first_readable, read_image, split_images
from layouts import picture, write
from models import ModelConfig

# Pictures


def test_suffixes(tmp_path):
    """Pictures are found under rarer suffixes too and read by content, whatever the suffix says."""
    kinds = {"a.jfif": "JPEG", "b.JPE": "JPEG", "c.png": "WEBP", "d.tif": "TIFF", "e.gif": "PNG",
             **({"f.avif": "AVIF"} if features.check("avif") else {})}
    image = Image.new("RGB", (20, 16), (200, 30, 60))
    source = CaptionedImages(write(tmp_path, {
        name: stored(image, format=kind) for name, kind in kinds.items()}), "")
    for i in range(len(kinds)):
        assert source.image(i, 3, 8).getpixel((4, 4)) == pytest.approx((200, 30, 60), abs=4)


def stored(image, **options):
    """The bytes of a picture's file."""
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG", **options})
    return buffer.getvalue()


def read_back(image, channels=3, side=8, **options):
    """`read_image` of the picture, as an array, after it was stored as `options` say."""
    return np.asarray(read_image(io.BytesIO(stored(image, **options)), channels, side), float)


@pytest.mark.parametrize("mode, fill, options, expected", [
    ("1", 1, {}, (255, 255, 255)), ("L", 77, {}, (77, 77, 77)),
    ("I;16", 77 * 257, {}, (77, 77, 77)), ("P", (40, 50, 60), {}, (40, 50, 60)),
    ("CMYK", (0, 255, 0, 0), dict(format="JPEG", quality=100), (255, 0, 255)),
    ("CMYK", (0, 0, 0, 255), dict(format="JPEG"), (0, 0, 0)),
    ("P", (40, 50, 60), dict(transparency=0), (255, 255, 255)),
    ("LA", (0, 0), {}, (255, 255, 255)), ("RGBA", (255, 0, 0, 51), {}, (255, 204, 204))])
def test_kinds_of_pictures(mode, fill, options, expected):
    """Bilevel, grey, 16-bit, palette and CMYK pictures come out right in colour and in grey, and
    transparent ones lie on white."""
    image, luma = Image.new(mode, (8, 8), fill), np.dot(expected, (0.299, 0.587, 0.114))
    assert read_back(image, 3, **options)[3, 3] == pytest.approx(expected, abs=3)
    assert read_back(image, 1, **options)[3, 3] == pytest.approx(luma, abs=3)


def test_exif_rotation_is_applied():
    """A picture stored lying on its side, with an EXIF note to turn it, is turned."""
    exif, upright = Image.Exif(), Image.linear_gradient("L")
    exif[0x0112] = 6   # turn by 90 degrees clockwise to show
    assert np.array_equal(read_back(upright.rotate(90), 1, 256, exif=exif), upright)


def test_resize_and_crop():
    """The middle of the long side is taken, and scaling down averages instead of picking pixels."""
    stripes = np.tile(255 * np.eye(3, dtype=np.uint8), (20, 1, 1)).repeat(20, axis=1)
    for image in (stripes, stripes.swapaxes(0, 1)):
        pixels = read_back(Image.fromarray(image), 3, 10)
        assert pixels.shape == (10, 10, 3) and (pixels[2:8, 2:8] == (0, 255, 0)).all()
    checker = Image.fromarray((np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8))
    assert read_back(checker, 1) == pytest.approx(127.5, abs=12)


def test_large_jpegs_decode_small_and_alike():
    """A JPEG decoded at reduced scale equals the full decoding, resized, up to few grey levels."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((1600, 1200), Image.BICUBIC)
    plain = smooth.crop((200, 0, 1400, 1200)).resize((64, 64), Image.BICUBIC)
    assert np.abs(read_back(smooth, 3, 64, format="JPEG", quality=95) - plain).mean() < 2


def test_why_a_picture_cannot_be_read(tmp_path, monkeypatch):
    """A dead link, what git-lfs leaves, HEIC, a picture of too many pixels, floats and 32-bit
    integers: the next takes its place, and a warning names each with the reason; so does the error
    where there is no next."""
    floats, integers = (stored(Image.new(mode, (8, 8)), format="TIFF") for mode in "FI")
    bad = {"dead": (Path("nowhere"), "No such file"), "heic": (b"\0\0\0\x18ftypheic", "identify"),
           "lfs": (b"version https://git-lfs.github.com/spec/v1\n", "identify"),
           "large": (picture(3), "limit"), "F": (floats, "mode F"), "I": (integers, "mode I")}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 200)
    source = CaptionedImages(write(tmp_path, {f"{name}.png": bad[name][0] for name in bad} | {
        "z.png": stored(Image.new("L", (8, 8)))}), "")
    load, last = data.image_loader(source, ModelConfig(resolution=8)), len(bad)
    for i in range(last):
        name = source.names[i].removesuffix(".png")
        with pytest.warns(UserWarning, match=f"{name}.png.*{bad[name][1]}.*next"):
            assert first_readable(load, np.array([i, last]), i)[0] == last
        with pytest.raises(ValueError, match=f"{name}.png.*{bad[name][1]}"):
            first_readable(load, np.array([i]), i)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_hundred_unreadable_pictures_end_a_run():
    """Up to 99 in a row are passed over, beyond the last number too; a hundred are an error with
    the last reason, whatever share of the data they are."""
    def load(i):
        if 50 <= i < 500:
            return i
        raise data.UnreadableImage(f"reason {i}")

    assert first_readable(load, np.arange(550), 501) == (50, 50)
    with pytest.raises(ValueError, match="100.*reason 49"):
        first_readable(load, np.arange(550), 500)


# Order


class Numbered(list):
    """A source of so many images, some of them the data's own validation images."""

    validation = np.array([], int)


def test_split_depends_on_the_count_alone():
    """Training and validation images are disjoint, complete and the same on every call; a split of
    the data's own comes first, and its validation images are never trained on."""
    source = Numbered(range(1000))
    train, val = split_images(source, 0.05)
    assert len(val) == 50 and sorted([*train, *val]) == source
    assert (split_images(source, 0.05)[1] == val).all() and not len(split_images(source, 0.0)[1])
    source.validation = np.array([3, 7])
    for fraction, expected in ((0.5, [3, 7]), (0.0, [])):
        train, val = split_images(source, fraction)
        assert len(train) == 998 and not {3, 7} & {*train} and val.tolist() == expected


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_image_is_visited_once(as_rank, ranks):
    """All ranks together visit each validation image once, without padding, and each training image
    but the remainder of the division."""
    images, train, val = np.arange(100, 150), [], []
    for rank in range(ranks):
        as_rank(rank, ranks)
        order = GlobalOrder(images, 8)
        assert len(order) == len(list(order)) == 6
        train += [key for batch in order for key in batch]
        val += [key for batch in data.validation_order(images, 4) for key in batch]
    assert sorted(val) == [(0, k, 100 + k) for k in range(50)]
    assert sorted(key[:2] for key in train) == [(0, k) for k in range(48)]
    assert len({key[2] for key in train} & set(images.tolist())) == 48


# Memory and processes


def run_python(code, *args):
    """What this code prints, which can import the project's scripts, once none has its output."""
    done = subprocess.run([sys.executable, "-c", code, *map(str, args)], cwd=ROOT, timeout=200,
                          capture_output=True, text=True)
    return done.stdout.split() or done.stderr


INDEX = r"""
import re, sys, data

def own(task):   # in a loader worker: how many bytes a picture are its own
    for i in range(0, count, 10) if task == 1 else ():
        assert source.captions(i)[4] == f"caption 4 of image {i}, a dog runs"
    if task == 2:
        source.identity(most=count // 10)
    with open("/proc/self/smaps_rollup") as text:
        return int(re.search(r"Private_Dirty:\s+(\d+)", text.read())[1]) * 1024 // count

source, count = data.CaptionedImages(sys.argv[1]), 20_000
held = [source.first, *vars(source.names).values(), *vars(source.texts).values()]
loader = data.make_loader(data.OnDemand(own), [[0], [1], [2]], workers=1)
print(sum(memoryview(part).nbytes for part in held) // count, *(batch.item() for batch in loader))
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_captions_stay_packed(tmp_path, kind):
    """Captions and names are packed in memory, and a loader worker copies none of them as it reads;
    what it copies of the places of pictures in an archive is bounded."""
    files = {f"Images/{i:05d}.jpg": b"picture %d" % i for i in range(20_000)}
    files["captions.txt"] = "image,caption\n" + "".join(
        f'{i:05d}.jpg,"caption {k} of image {i}, a dog runs"\n' for i, k in np.ndindex(20_000, 5))
    printed = run_python(INDEX, write(tmp_path / f"set.{kind}", files))
    held, before, captions, pictures = map(int, printed)
    assert held < 300 and captions - before < 200 and pictures - before < 1200, printed


def test_shards_do_not_stay_open(tmp_path):
    """Of a set of .tar shards, which may be more than a process may have open files, few are."""
    for n in range(150):
        write(tmp_path / f"{n:03d}.tar", {"a.png": picture(n % 30), "a.txt": f"number {n % 30}"})
    before, source = len(os.listdir("/proc/self/fd")), CaptionedImages(tmp_path)
    assert [source.captions(i) for i in range(150)] == [
        [f"number {np.mean(source.image(i, 1, 8)) / 8:.0f}"] for i in range(150)]
    assert len(os.listdir("/proc/self/fd")) < before + 100


WORKERS = """
import multiprocessing, os, signal, data

def main():
    captions = data.OnDemand(lambda k: f"{k} " + 20_000 * "x")   # a few fill the pipe to here
    batches = iter(data.make_loader(captions, [[k] for k in range(1000)], workers=2))
    next(batches), next(batches)   # one from each: both are up
    for worker in multiprocessing.active_children():
        for number in data.SIGNALS:
            os.kill(worker.pid, number)
    print([next(batches)[0].split()[0] for _ in range(49)][-1], flush=True)
    return batches

for end in ("1 / 0", "data.run_main(lambda: 1 / 0)", "os.kill(os.getpid(), signal.SIGKILL)"):
    if not (pid := os.fork()):
        batches = main()
        exec(end)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


@pytest.mark.slow
def test_loader_workers_outlive_a_signal_but_not_the_run():
    """Signals that reach a whole job do not end a worker, but it ends within seconds of its run,
    whether that breaks off or is killed."""
    assert run_python(WORKERS) == ["50", "1", "50", "1", "50", "-9"]


@pytest.mark.parametrize("started_by, expected", [({}, []), ({"TORCHELASTIC_RUN_ID": "1"}, [3])])
def test_threads_are_the_users_or_the_ranks_share(monkeypatch, started_by, expected):
    """OMP_NUM_THREADS is kept where the user set it; where torchrun did, a process takes its share
    of the cores, which in a Slurm job are those of the job."""
    chosen = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    for name, value in {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2", "SLURM_CPUS_ON_NODE": "6",
                        "TORCHELASTIC_RUN_ID": None, **started_by}.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    data.setup_processes("cpu")
    assert chosen == expected

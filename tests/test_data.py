"""Captioned images on disk: formats, kinds of pictures, crops, order, memory, loader workers."""
import io
import json
import os
import re
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features

import data
from conftest import ROOT
from data import CaptionedImages, GlobalOrder, available_cores, read_image, split_images
from layouts import packed

PAIRS = [("a.png", 'a dog, "the" dog'), ("b.png", "ein Bär"), ("a.png", "a second one")]
EXPECTED = {"pics/a.png": ['a dog, "the" dog', "a second one"], "pics/b.png": ["ein Bär"]}
QUOTED = 'a.png,"a dog, ""the"" dog"\nb.png,ein Bär\na.png,a second one\n'
TOKENS = [f"{name}#{k}\t{caption}" for k, (name, caption) in enumerate(PAIRS)]
LINES = [json.dumps({"file_name": name, "text": texts if len(texts) > 1 else texts[0]})
         for name, texts in EXPECTED.items()]
COCO = {"images": [{"id": 7, "file_name": "a.png"}, {"id": 3, "file_name": "b.png"}],
        "annotations": [{"image_id": k, "caption": pair[1]} for k, pair in zip((7, 3, 7), PAIRS)]}
# The same three captions of two pictures in each of the formats of the field.
CAPTION_FILES = {
    "captions.txt": f"image,caption\n{QUOTED}", "metadata.csv": f"file_name,text\n{QUOTED}",
    "captions.csv": "Image , Caption\n" + "\n".join(map(",".join, PAIRS)),   # commas, no quotes
    "text/Flickr8k.token.txt": "\n".join(TOKENS), "metadata.jsonl": "\n".join(LINES),
    "annotations/captions_train2017.json": json.dumps(COCO)}


def make_files(folder, pictures, texts):
    """Red pictures of these names, and files with these contents."""
    for name in (*pictures, *texts):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
    for name in pictures:
        Image.new("RGB", (20, 16), (200, 30, 60)).save(folder / name)
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())
    return folder


def index(source):
    return {source.names[i]: source.captions(i) for i in range(len(source))}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", CAPTION_FILES)
def test_caption_formats(tmp_path, name, zipped):
    """Every captions format, in a folder or a .zip, gives the same images with all captions."""
    folder = path = make_files(tmp_path / "set", EXPECTED, {
        name: CAPTION_FILES[name], "text/Flickr8k.lemma.token.txt": "a.png#0\tlemma"})
    if zipped:
        path = tmp_path / "set.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for file in folder.rglob("*"):
                archive.write(file, file.relative_to(folder))
            archive.writestr("__MACOSX/pics/._a.png", b"resource fork")
    source = CaptionedImages(path)
    assert index(source) == EXPECTED
    assert source.image(0, 3, 8).getpixel((4, 4)) == (200, 30, 60)


def test_one_folder_per_class(tmp_path):
    """Class folders get captions from the template; pictures in no class folder are refused."""
    expected = {"3/x.png": ["the digit 3"], "ankle_boot/z.png": ["the digit ankle boot"]}
    source = CaptionedImages(make_files(tmp_path, expected, {}), "the digit {}")
    assert index(source) == expected
    make_files(tmp_path, ["stray.png"], {})
    with pytest.raises(ValueError, match="^--data .*: no captions: stray.png is in no folder .*$"):
        CaptionedImages(tmp_path)


@pytest.mark.parametrize("text, problem", [
    (b'a.png,"a stray quote\nb.png,two\n', "not as expected: .*unexpected end of data"),
    (b"a.png,one\nb.png\n", "1 rows with too few or too many columns, such as 'line 3'; .*"),
    (b"a.png,un caf\xe9\nb.png,two\n", "1 images .* not in UTF-8, such as 'a.png'; .*"),
    (b"a.png,one\nc.png,two\n", "1 named .* not there or in several.*, such as 'c.png'; .*"),
    (b"a.png,one\n1/x.png,two\n", "1 named .* not there.*, such as '1/x.png'; .*")])
def test_captions_that_would_be_lost_are_refused(tmp_path, text, problem):
    """A stray quote, a line cut short, Latin-1, a name that two pictures have, one that is not in
    its folder: one line names the file and what is wrong."""
    folder = make_files(tmp_path / "set", ["../x.png", "a.png", "b.png", "1/c.png", "2/c.png"], {})
    (folder / "captions.txt").write_bytes(b"image,caption\n" + text)
    with pytest.raises(ValueError) as caught:
        CaptionedImages(folder)
    assert re.fullmatch(rf"--data {folder}: (?=.*captions\.txt).*{problem}.*", str(caught.value))


def test_few_missing_images_are_left_out_and_said(tmp_path):
    """Flickr8k's captions name one image that is not there; below 1% it is left out and counted."""
    names = [f"{i}.png" for i in range(120)]
    lines = ["image,caption", *(f"{name},a" for name in ["gone.jpg.1", *names])]
    make_files(tmp_path, names, {"captions.txt": "\n".join(lines)})
    source = CaptionedImages(tmp_path)
    assert len(source) == 120 and source.report["left out"] == (
        "1 named images that are not there or in several folders, such as 'gone.jpg.1'")


CSV = "image,caption\n"


@pytest.mark.parametrize("pictures, texts, problem", [
    (["a.png", "b.png"], {"a.txt": "one", "b.txt": None}, "b.txt is not as expected: FileNotFound"),
    (["cat/i/1.png"], {"captions.csv": CSV + "dog/i/1.png,a dog"}, "captions.csv may hold them"),
    (["cat/1.png", "dog/2.png"], {"captions.csv": CSV + "x9.png,a fish"}, "captions.csv may hold"),
    (["cat/1.png", "dog/2.png"], {"notes.txt": None}, "notes.txt may hold them .*No such file"),
    (["cat/1.png", "dog/2.png"], {"captions_x.json": '{"annotations": []}'}, "KeyError: .*images")])
def test_captions_are_not_guessed(tmp_path, pictures, texts, problem):
    """A file beside a picture that is gone, captions of a folder that is not there, of pictures
    that are not, a file that cannot be opened and one that is cut short are named in one line."""
    make_files(tmp_path, pictures, {name: text or "" for name, text in texts.items()})
    for name in (name for name, text in texts.items() if text is None):
        (tmp_path / name).unlink()
        (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(ValueError, match=f"^--data {tmp_path}: .*{problem}.*$"):
        CaptionedImages(tmp_path)


def test_captions_of_their_own_pictures(tmp_path):
    """A broken first row costs its own caption alone, accents may be written in two ways, a suffix
    in capitals, a picture of another folder is not meant, and --captions is never passed over."""
    names = [f"{accented}/{k}.png" for k, accented in enumerate(("e\u0301", "\u00e9"))]
    make_files(tmp_path / "1", names, {names[0][:-3] + "TXT": "zero", names[1][:-3] + "txt": "one"})
    make_files(tmp_path / "2", ["0.png", "1.png"], {"captions.txt": "image,n,caption\n0\n1,7,one"})
    make_files(tmp_path / "3", ["train/i/1.png"], {
        "captions.csv": CSV + "test/i/1.png,no\ntrain/i/1.png,one"})
    assert index(CaptionedImages(tmp_path / "1")) == {names[0]: ["zero"], names[1]: ["one"]}
    assert index(CaptionedImages(tmp_path / "2", None, 0.5)) == {"1.png": ["one"]}
    assert index(CaptionedImages(tmp_path / "3", None, 0.5)) == {"train/i/1.png": ["one"]}
    make_files(tmp_path / "4", ["cat/1.png", "dog/2.png"], {"../x.csv": "image,size\n1.png,3"})
    with pytest.raises(ValueError, match="^--captions .*x.csv: no captions of the images of .*$"):
        CaptionedImages(tmp_path / "4", captions=tmp_path / "x.csv")


# Pictures


def test_suffixes(tmp_path):
    """Pictures are found under rarer suffixes too and read by content, whatever the suffix says."""
    kinds = {"a.jfif": "JPEG", "b.JPE": "JPEG", "c.png": "WEBP", "d.tif": "TIFF", "e.gif": "PNG"}
    if features.check("avif"):
        kinds["f.avif"] = "AVIF"
    for name, kind in kinds.items():
        Image.new("RGB", (20, 16), (200, 30, 60)).save(tmp_path / name, kind)
    (tmp_path / "captions.csv").write_text("image,caption\n" + "".join(f"{n},x\n" for n in kinds))
    source = CaptionedImages(tmp_path)
    assert list(index(source)) == list(kinds)
    for i in range(len(source)):
        assert source.image(i, 3, 8).getpixel((4, 4)) == pytest.approx((200, 30, 60), abs=4)


def read_back(image, channels=3, side=8, place=(0.5, 0.5), **options):
    """`read_image` of the picture, as an array, after it was stored as `options` say."""
    buffer = io.BytesIO()
    image.save(buffer, **{"format": "PNG", **options})
    return np.asarray(read_image(buffer, channels, side, place)).astype(float)


TIFF = dict(format="TIFF")


@pytest.mark.parametrize("mode, fill, options, expected", [
    ("1", 1, {}, (255, 255, 255)), ("L", 77, {}, (77, 77, 77)),
    ("I;16", 77 * 257, {}, (77, 77, 77)), ("P", (40, 50, 60), {}, (40, 50, 60)),
    ("CMYK", (0, 255, 0, 0), dict(format="JPEG", quality=100), (255, 0, 255)),
    ("CMYK", (0, 0, 0, 255), dict(format="JPEG"), (0, 0, 0)),
    ("P", (40, 50, 60), dict(transparency=0), (255, 255, 255)),
    ("LA", (0, 0), {}, (255, 255, 255)), ("RGBA", (255, 0, 0, 51), {}, (255, 204, 204)),
    ("F", 0.3, TIFF, (76, 76, 76)), ("F", -0.4, TIFF, (76, 76, 76)), ("F", 77, TIFF, (77, 77, 77)),
    ("F", 1.01, TIFF, (255, 255, 255)), ("I", 77, TIFF, (77, 77, 77)),
    ("I", 77 * 257, TIFF, (77, 77, 77)),
    pytest.param("RGB", (40, 50, 60), dict(format="AVIF"), (40, 50, 60), marks=pytest.mark.skipif(
        not features.check("avif"), reason="this Pillow has no AVIF"))])
def test_kinds_of_pictures(mode, fill, options, expected):
    """Bilevel, grey, 16-bit, palette and CMYK pictures come out right in colour and in grey, floats
    of [0, 1], [-1, 1] and [0, 255] and 32-bit integers too, and transparent ones lie on white."""
    image, luma = Image.new(mode, (8, 8), fill), np.dot(expected, (0.299, 0.587, 0.114))
    assert read_back(image, 3, **options)[3, 3] == pytest.approx(expected, abs=3)
    assert read_back(image, 1, **options)[3, 3] == pytest.approx(luma, abs=3)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def display_p3():
    """The ICC profile of Display P3: sRGB's curves, other primaries (here relative to D50)."""
    profile = bytearray(SRGB.replace("sRGB".encode("utf-16-be"), "Disp".encode("utf-16-be")))
    primaries = dict(rXYZ=(0.51512, 0.24120, -0.00105), gXYZ=(0.29198, 0.69225, 0.04189),
                     bXYZ=(0.15710, 0.06657, 0.78407))
    for k in range(int.from_bytes(profile[128:132], "big")):   # the table of its tags
        tag, start, _ = struct.unpack_from(">4sII", profile, 132 + 12 * k)
        if xyz := primaries.get(tag.decode()):
            struct.pack_into(">3i", profile, start + 8, *(round(65536 * part) for part in xyz))
    return bytes(profile)


def p3_in_srgb(colour):
    """By the published matrices from P3 to XYZ and from XYZ to sRGB, both relative to D65."""
    to_xyz = [(0.48657, 0.26567, 0.19822), (0.22897, 0.69174, 0.07929), (0, 0.04511, 1.04394)]
    from_xyz = [(3.24097, -1.53738, -0.49861), (-0.96924, 1.87597, 0.04156),
                (0.05563, -0.20398, 1.05697)]
    colour = np.array(colour) / 255
    linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(from_xyz) @ to_xyz @ linear, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


P3 = display_p3()


@pytest.mark.parametrize("mode, fill, profile, expected", [
    *(("RGB", fill, P3, p3_in_srgb(fill)) for fill in [
        (255, 0, 0), (60, 180, 60), (200, 120, 40), (90, 90, 90)]),
    ("RGBA", (60, 180, 60, 51), P3, 0.8 * 255 + 0.2 * p3_in_srgb((60, 180, 60))),
    *(("RGB", (60, 180, 60), other, (60, 180, 60)) for other in (SRGB, P3[:300], b"damaged")),
    ("L", 77, P3, (77, 77, 77))])
def test_colour_profiles(mode, fill, profile, expected):
    """Colours of Display P3, as phones store them, become those of sRGB; a profile that is sRGB's,
    damaged or of another kind than the picture changes nothing."""
    pixels = read_back(Image.new(mode, (8, 8), fill), icc_profile=profile)
    assert pixels[3, 3] == pytest.approx(np.array(expected), abs=2)


def test_exif_rotation_is_applied():
    """A picture stored lying on its side, with an EXIF note to turn it, is turned."""
    exif, upright = Image.Exif(), Image.linear_gradient("L")
    exif[0x0112] = 6   # turn by 90 degrees clockwise to show
    assert np.array_equal(read_back(upright.rotate(90), 1, 256, exif=exif), upright)


def test_resize_and_crop():
    """The long side is cropped where asked, and scaling down averages instead of picking pixels."""
    stripes = np.tile(255 * np.eye(3, dtype=np.uint8), (20, 1, 1)).repeat(20, axis=1)
    for k, share in enumerate((0, 0.5, 1)):
        for image, place in ((stripes, (share, 0.3)), (stripes.swapaxes(0, 1), (0.3, share))):
            pixels = read_back(Image.fromarray(image), 3, 10, place)
            assert pixels.shape == (10, 10, 3) and (pixels[2:8, 2:8] == 255 * np.eye(3)[k]).all()
    checker = Image.fromarray((np.indices((64, 64)).sum(axis=0) % 2 * 255).astype(np.uint8))
    assert read_back(checker, 1) == pytest.approx(127.5, abs=12)


def test_large_jpegs_decode_small_and_alike():
    """A JPEG decoded at reduced scale equals the full decoding, resized, up to few grey levels."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    smooth = Image.fromarray(noise).resize((1600, 1200), Image.BICUBIC)
    plain = smooth.crop((200, 0, 1400, 1200)).resize((64, 64), Image.BICUBIC)
    assert np.abs(read_back(smooth, 3, 64, format="JPEG", quality=95) - plain).mean() < 2


# Order


class Numbered:
    """A source of so many images, some of them the data's own validation images."""

    def __init__(self, count, validation=()):
        self.count, self.validation = count, np.array(validation, int)

    def __len__(self):
        return self.count


def test_split_depends_on_the_count_alone():
    """Training and validation images are disjoint, complete and the same on every call; a split of
    the data's own comes first, and its validation images are never trained on."""
    source, few = Numbered(1000), Numbered(10, [3, 7])
    train, val = split_images(source, 0.05)
    assert len(val) == 50 and sorted([*train, *val]) == list(range(1000))
    assert (split_images(source, 0.05)[1] == val).all() and not len(split_images(source, 0.0)[1])
    for fraction, expected in ((0.5, [3, 7]), (0.0, [])):
        train, val = split_images(few, fraction)
        assert train.tolist() == [0, 1, 2, 4, 5, 6, 8, 9] and val.tolist() == expected


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


def run_python(code, *args, timeout):
    """Run this code, which can import the project's scripts, until nobody holds its output."""
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], timeout=timeout, text=True,
                          capture_output=True, env={**os.environ, "PYTHONPATH": str(ROOT)})


MILLION = r"""
import os, re, sys, data

def mib(what, file):
    with open("/proc/self/" + file) as text:
        return int(re.search(what + r":\s+(\d+) kB", text.read())[1]) / 1024

count, before = int(sys.argv[2]), mib("VmRSS", "status")
source = data.CaptionedImages(sys.argv[1])
assert len(source) == count and source.captions(3)[4] == "caption 4 of image 3, a dog runs"
held = [*vars(source.names).values(), *vars(source.texts).values(), source.first,
        source.files.places]
assert source.files.names is source.names
for value in [*vars(source).values(), *vars(source.files).values()]:
    assert not isinstance(value, (list, dict, set)) or len(value) < 10
print(sum(memoryview(part).nbytes for part in held) / (5 * count))
print(mib("VmRSS", "status") - before, flush=True)
if os.fork() == 0:   # a loader worker
    source.content(0)
    before = mib("Private_Dirty", "smaps_rollup")
    for i in range(0, count, 10):
        assert len(source.captions(i)) == 5 and source.content(i) == b"picture %d" % i
    print(mib("Private_Dirty", "smaps_rollup") - before)
else:
    assert os.wait()[1] == 0
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind, count", [("zip", 200_000), ("tar", 20_000)])
def test_a_million_captions(tmp_path, kind, count):
    """The index of 1,000,000 captions of 200,000 images in a .zip (of a tenth in a .tar) loads
    within a minute and holds at most 250 bytes a caption with the images' places, of which a forked
    worker copies none as it reads every tenth image and its captions."""
    lines = [f'{i:012d}.jpg,"caption {k} of image {i}, a dog runs"\n'
             for i, k in np.ndindex(count, 5)]
    files = {"captions.txt": "image,caption\n" + "".join(lines)}
    files |= {f"Images/{i:012d}.jpg": b"picture %d" % i for i in range(count)}
    (tmp_path / f"set.{kind}").write_bytes(packed(files, kind))
    done = run_python(MILLION, tmp_path / f"set.{kind}", count, timeout=60)
    assert done.returncode == 0, done.stderr
    held, grown, copied = map(float, done.stdout.split())
    print(f"{held:.0f} bytes a caption; the process grew by {grown:.0f}, a worker by {copied} MiB")
    assert held <= 250 and copied < 4


WORKERS = """
import multiprocessing, os, signal, data

class Captions:
    def __getitem__(self, k):
        return f"{k} " + 20_000 * "x"   # a few fill the pipe to the main process

def main():
    global loader, batches
    loader = data.make_loader(Captions(), [[k] for k in range(1000)], workers=2)
    batches = iter(loader)
    next(batches), next(batches)   # one from each: both are up
    for worker in multiprocessing.active_children():
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            os.kill(worker.pid, number)
    print([next(batches)[0].split()[0] for _ in range(49)][-1], flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("end, code", [
    ("main()\n1 / 0", 1), ("data.run_main(lambda: main() or 1 / 0)", 1),
    ("main()\nos.kill(os.getpid(), signal.SIGKILL)", -9)])
def test_loader_workers_outlive_a_signal_but_not_the_run(end, code):
    """Signals that reach a whole job do not end a worker, but it ends within seconds of its run,
    whether that breaks off or is killed."""
    done = run_python(WORKERS + end, timeout=30)   # a worker that stays holds the output open
    assert done.stdout == "50\n" and done.returncode == code, done.stderr


def test_available_cores(monkeypatch):
    """The cores are those of the process and, in a Slurm job, at most those of the job here."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    for cpus, expected in (("", 12), ("8", 8), ("64", 12)):
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", cpus)
        assert available_cores() == expected


@pytest.mark.parametrize("variable, expected", [("OMP_NUM_THREADS", None),
                                                ("TORCHELASTIC_RUN_ID", 3)])
def test_threads_are_the_users_or_the_ranks_share(monkeypatch, variable, expected):
    """OMP_NUM_THREADS is kept where the user set it; where torchrun did, a process takes its share
    of the cores."""
    chosen = []
    monkeypatch.setattr(data, "available_cores", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in (("OMP_NUM_THREADS", "1"), ("LOCAL_WORLD_SIZE", "2"), (variable, "1")):
        monkeypatch.setenv(name, value)
    data.setup_processes("cpu")
    assert chosen == ([expected] if expected else [])

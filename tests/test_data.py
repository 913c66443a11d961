"""Captioned images on disk: every format, every kind of picture, transforms, memory, and what is refused."""
import ast
import csv
import io
import json
import os
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
from conftest import ROOT
from data import CaptionedImages, Ranks, ShardedBatches, available_cores, read_image, split_images, validation_batches


def picture(path, size=(20, 16), colour=(200, 30, 60)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)


def index(source):
    return {source.names[i]: source.captions(i) for i in range(len(source))}


EXPECTED = {"pics/a.png": ['a dog, "the" dog', "a second one"], "pics/b.png": ["ein Bär"]}
PAIRS = [("a.png", 'a dog, "the" dog'), ("b.png", "ein Bär"), ("a.png", "a second one")]


def write_captions(folder, kind):
    """The same three captions of two pictures in one of the formats of the field."""
    if kind in ("captions.txt", "metadata.csv"):
        header = ["image", "caption"] if kind == "captions.txt" else ["file_name", "text"]
        with open(folder / kind, "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([header, *PAIRS])
    elif kind == "Flickr8k.token.txt":
        (folder / "Flickr8k_text").mkdir()
        lines = [f"{name}#{k}\t{caption}" for k, (name, caption) in enumerate(PAIRS)]
        (folder / "Flickr8k_text" / kind).write_text("\n".join(lines), "utf-8")
        (folder / "Flickr8k_text" / "Flickr8k.lemma.token.txt").write_text("a.png#0\tlemma dog\n")
    elif kind == "metadata.jsonl":
        rows = [{"file_name": "pics/a.png", "text": [PAIRS[0][1], PAIRS[2][1]]}, {"file_name": "pics/b.png", "text": "ein Bär"}]
        (folder / kind).write_text("\n".join(map(json.dumps, rows)), "utf-8")
    else:
        (folder / "annotations").mkdir()
        content = {"images": [{"id": 7, "file_name": "a.png"}, {"id": 3, "file_name": "b.png"}],
                   "annotations": [{"image_id": 7 if name == "a.png" else 3, "caption": text} for name, text in PAIRS]}
        (folder / "annotations" / kind).write_text(json.dumps(content))


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("kind", ["captions.txt", "metadata.csv", "metadata.jsonl", "Flickr8k.token.txt",
                                  "captions_train2017.json"])
def test_caption_formats(tmp_path, kind, zipped):
    """Every captions format, in a folder and in a .zip of it, gives the same images with all their captions."""
    folder = tmp_path / "set"
    for name in "ab":
        picture(folder / "pics" / f"{name}.png")
    write_captions(folder, kind)
    path = folder
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
    """MNIST-like class folders get captions from the template; images in no class folder are refused."""
    for name in ("3/x.png", "3/y.png", "ankle_boot/z.png"):
        picture(tmp_path / name)
    assert index(CaptionedImages(tmp_path, "the digit {}")) == {
        "3/x.png": ["the digit 3"], "3/y.png": ["the digit 3"], "ankle_boot/z.png": ["the digit ankle boot"]}
    picture(tmp_path / "stray.png")
    with pytest.raises(ValueError, match="no captions file .* one sub-folder per class"):
        CaptionedImages(tmp_path)


def test_captions_cannot_name_files_outside(tmp_path):
    """A captions file that names `..`, an absolute path or a picture behind a linked folder finds nothing there."""
    picture(tmp_path / "secret" / "s.png")
    picture(tmp_path / "set" / "a.png")
    os.symlink(tmp_path / "secret", tmp_path / "set" / "link")
    for name in ("../secret/s.png", str(tmp_path / "secret" / "s.png"), "link/s.png"):
        (tmp_path / "set" / "captions.txt").write_text(f"image,caption\na.png,fine\n{name},stolen\n")
        with pytest.raises(ValueError, match="1 image"):
            CaptionedImages(tmp_path / "set")


def test_few_missing_images_are_left_out_with_a_warning(tmp_path):
    """Flickr8k as downloaded names one image that is not there; below 1% such captions are left out and counted."""
    for i in range(120):
        picture(tmp_path / f"{i}.png", (4, 4))
    lines = [f"{i}.png,number {i}" for i in range(120)] + ["gone.jpg.1,gone"]
    (tmp_path / "captions.txt").write_text("\n".join(["image,caption", *lines]))
    with pytest.warns(UserWarning, match="1 image.s. named in captions.txt are not there, .* for example 'gone.jpg.1'"):
        assert len(CaptionedImages(tmp_path)) == 120


def test_captions_with_commas_that_are_not_quoted_stay_whole(tmp_path):
    """Where the caption is the last column of a table, its commas need no quotes."""
    picture(tmp_path / "a.png")
    (tmp_path / "captions.txt").write_text('image,caption\na.png,a red, shiny dog\na.png,"black, or brown"\n')
    assert index(CaptionedImages(tmp_path)) == {"a.png": ["a red, shiny dog", "black, or brown"]}


@pytest.mark.parametrize("text, message", [
    (b'a.png,"a stray quote\nb.png,two\n', "unexpected end of data"), (b"a.png,one\nb.png\n", "line 3 has 1 columns"),
    ("a.png,un café\nb.png,two\n".encode("latin-1"), "have captions that are not in UTF-8, for example 'a.png'"),
    (b"c.png,one of two\n", "or in several folders, for example 'c.png'")])
def test_captions_that_would_be_lost_are_refused(tmp_path, text, message):
    """A stray quote, a line cut short, bytes that are not UTF-8 and a name that two pictures have: one line names the file."""
    for name in ("a.png", "b.png", "one/c.png", "two/c.png"):
        picture(tmp_path / name)
    (tmp_path / "captions.txt").write_bytes(b"image,caption\n" + text)
    with pytest.raises(ValueError, match=f"--data {tmp_path}: .*captions.txt.*{message}") as caught:
        CaptionedImages(tmp_path)
    assert "\n" not in str(caught.value)


# Pictures


def read_back(image, channels=3, side=8, **options):
    buffer = io.BytesIO()
    image.save(buffer, **options)
    buffer.seek(0)
    return read_image(buffer, channels, side)


def test_transparent_pictures_lie_on_white():
    """RGBA, greyscale with alpha and palette transparency are composited on white; a half transparent red is pink."""
    rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert read_back(rgba, format="PNG").getpixel((3, 3)) == (255, 255, 255)
    rgba = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    red, green, blue = read_back(rgba, format="PNG").getpixel((3, 3))
    assert red == 255 and 120 <= green == blue <= 134
    assert read_back(Image.new("LA", (8, 8), (0, 0)), format="PNG").getpixel((3, 3)) == (255, 255, 255)
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    assert read_back(palette, format="PNG").getpixel((3, 3)) == (40, 50, 60)
    assert read_back(palette, format="PNG", transparency=1).getpixel((3, 3)) == (255, 255, 255)


@pytest.mark.parametrize("mode, fill, options, expected", [
    ("1", 1, dict(format="PNG"), 255), ("L", 77, dict(format="PNG"), 77), ("I;16", 77 * 257, dict(format="PNG"), 77),
    ("CMYK", (0, 0, 0, 255), dict(format="JPEG"), 0), ("CMYK", (0, 0, 0, 0), dict(format="JPEG"), 255)])
def test_other_modes(mode, fill, options, expected):
    """Bilevel, greyscale, 16-bit and CMYK pictures come out right as RGB and as greyscale."""
    image = Image.new(mode, (8, 8), fill)
    assert read_back(image, 3, **options).getpixel((3, 3)) == pytest.approx((expected,) * 3, abs=2)
    assert read_back(image, 1, **options).getpixel((3, 3)) == pytest.approx(expected, abs=2)


def test_exif_rotation_is_applied():
    """A picture stored lying on its side, with an EXIF note to turn it, is turned."""
    upright = Image.new("RGB", (8, 8), "black")
    upright.paste("white", (0, 0, 8, 4))   # the upper half white
    exif = Image.Exif()
    exif[0x0112] = 6                        # turn by 90 degrees clockwise to show
    turned = read_back(upright.rotate(90, expand=True), format="PNG", exif=exif)
    assert turned.getpixel((4, 0)) == (255, 255, 255) and turned.getpixel((4, 7)) == (0, 0, 0)


def test_resize_and_crop():
    """The short side is scaled and the long side cropped where asked; down-scaling averages instead of picking pixels."""
    wide = Image.new("RGB", (60, 20))
    for k, colour in enumerate(("red", "lime", "blue")):
        wide.paste(colour, (20 * k, 0, 20 * k + 20, 20))
    buffer = io.BytesIO()
    wide.save(buffer, "PNG")
    for place, colour in (((0, 0.5), (255, 0, 0)), ((0.5, 0.5), (0, 255, 0)), ((1, 0.5), (0, 0, 255))):
        buffer.seek(0)
        cropped = read_image(buffer, 3, 10, place)
        assert cropped.size == (10, 10) and cropped.getpixel((5, 5)) == colour
    checker = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    assert np.asarray(read_back(checker, 1, 8, format="PNG")).astype(float) == pytest.approx(127.5, abs=12)


def test_large_jpegs_decode_small_and_alike():
    """A JPEG decoded at reduced scale equals the full decoding, resized, up to a few grey levels."""
    rng = np.random.default_rng(0)
    smooth = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((1600, 1200), Image.BICUBIC)
    ours = np.asarray(read_back(smooth, 3, 64, format="JPEG", quality=95)).astype(float)
    plain = smooth.crop((200, 0, 1400, 1200)).resize((64, 64), Image.BICUBIC)
    assert np.abs(ours - np.asarray(plain)).mean() < 2


# Order and memory


def test_split_depends_on_the_count_alone():
    """Training and validation images are disjoint, complete and the same on every call."""
    train, val = split_images(1000, 0.05)
    assert len(val) == 50 and sorted([*train, *val]) == list(range(1000))
    assert (split_images(1000, 0.05)[1] == val).all() and split_images(10, 0.0)[1].size == 0


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_validation_images_are_visited_once(world_size):
    """Every validation image lies on exactly one rank, without padding, also where the count does not divide."""
    images = np.arange(100, 117)
    keys = [key for rank in range(world_size)
            for batch in validation_batches(images, 4, Ranks(rank, rank, world_size, world_size, None)) for key in batch]
    assert sorted(key[2] for key in keys) == images.tolist() and sorted(key[1] for key in keys) == list(range(17))


def test_an_epoch_visits_every_image_but_the_last_incomplete_batch():
    """All ranks together visit each image at most once; only the remainder of the division is left out."""
    seen = []
    for rank in range(2):
        batches = ShardedBatches(np.arange(50), 8, Ranks(rank, rank, 2, 2, None))
        seen += [index for keys in batches for _, _, index in keys]
        assert len(batches) == 6
    assert len(seen) == len(set(seen)) == 48


@pytest.mark.slow
def test_a_million_captions(tmp_path):
    """The index of 1,000,000 captions of 200,000 images loads within a minute and holds under 200 bytes a caption."""
    code = """
import resource, sys, time, numpy as np
sys.path.insert(0, sys.argv[1])
import data
class Files:
    def names(self):
        yield "captions.txt"
        for i in range(200_000):
            yield f"Images/{i:012d}.jpg"
    def open(self, name):
        return open(sys.argv[2], "rb")
data.FolderFiles = lambda root: Files()
start = time.perf_counter()
source = data.CaptionedImages(".")
seconds = time.perf_counter() - start
held = sum(array.nbytes for array in (source.names.buffer, source.names.ends, source.texts.buffer, source.texts.ends,
                                      source.caption_order, source.first_caption))
assert len(source) == 200_000 and source.captions(3)[4] == "caption 4 of image 3, a dog runs over the wet grass near a lake"
print(seconds, held / 1e6, sum(isinstance(value, (list, dict, set)) for value in vars(source).values()))
"""
    with open(tmp_path / "captions.txt", "w") as file:
        file.write("image,caption\n")
        for i in range(200_000):
            for k in range(5):
                file.write(f'{i:012d}.jpg,"caption {k} of image {i}, a dog runs over the wet grass near a lake"\n')
    done = subprocess.run([sys.executable, "-c", code, str(ROOT), str(tmp_path / "captions.txt")], capture_output=True, text=True,
                          timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    seconds, bytes_per_caption, containers = map(float, done.stdout.split())
    print(f"{seconds:.1f} s, {bytes_per_caption:.0f} bytes a caption")
    assert seconds < 60 and bytes_per_caption < 200 and containers == 0


def test_processes_of_a_node_share_one_index(tmp_path, photos):
    """Two processes map the same files, by then gone from the disk, and read from them what one process reads; where the data
    is wrong, only one looks and both say so."""
    code = """
import os, sys
sys.path.insert(0, sys.argv[1])
from data import CaptionedImages, setup_ranks
ranks = setup_ranks("cpu")
if ranks.rank == 1:
    CaptionedImages._index = None   # not called here
source = CaptionedImages(sys.argv[2], ranks=ranks)
ranks.gather(None)   # rank 0 has removed the files by the time it comes here
files = sorted({line.split()[4] for line in open("/proc/self/maps") if ".npy (deleted)" in line})
parts = ranks.gather(files)
assert len(files) == 6 and parts[0] == parts[1], parts
held = {source.names[i]: source.captions(i) for i in range(len(source))}
if ranks.is_main:
    print(held)
try:
    CaptionedImages(sys.argv[3], ranks=ranks)
    raise SystemExit("an empty folder was taken")
except ValueError as error:
    assert "holds no images" in str(error)
    assert all(ranks.gather(True))
sys.stdout.flush()
os._exit(0)
"""
    (tmp_path / "open.py").write_text(code)
    (tmp_path / "empty").mkdir()
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           tmp_path / "open.py", ROOT, photos, tmp_path / "empty"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert ast.literal_eval(done.stdout) == index(CaptionedImages(photos))


def test_available_cores(monkeypatch):
    """The core count is the process's allowance, and in a Slurm job at most what the job has on this node."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(12))
    monkeypatch.delenv("SLURM_CPUS_ON_NODE", raising=False)
    assert available_cores() == 12
    for cpus, expected in (("8", 8), ("64", 12)):
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", cpus)
        assert available_cores() == expected


def test_threads_are_the_users_or_the_ranks_share(monkeypatch):
    """OMP_NUM_THREADS is kept where the user set it; where torchrun did, or nobody, a process takes its share of the cores."""
    before = torch.get_num_threads()
    monkeypatch.setattr(data, "available_cores", lambda: before + 3)
    for name in ("OMP_NUM_THREADS", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    try:
        for variables, expected in (({"OMP_NUM_THREADS": "1"}, before), ({"TORCHELASTIC_RUN_ID": "none"}, before + 3)):
            for name, value in variables.items():
                monkeypatch.setenv(name, value)
            data.setup_ranks("cpu")
            assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)


@pytest.mark.slow
def test_loader_workers_outlive_a_signal_but_not_the_run(tmp_path):
    """After a SIGTERM a worker still delivers batches, and a run that breaks off while its workers wait ends by itself."""
    code = """
import multiprocessing, os, signal, sys, torch
sys.path.insert(0, sys.argv[1])
from data import make_loader
class Numbers:
    def __getitems__(self, keys):
        return torch.tensor(keys)
loader = make_loader(Numbers(), [[k] for k in range(1000)], torch.device("cpu"), workers=1)
batches = iter(loader)
next(batches)
for worker in multiprocessing.active_children():
    os.kill(worker.pid, signal.SIGTERM)
print([next(batches).item() for _ in range(20)][-1], flush=True)
held = loader, batches
raise RuntimeError("the run breaks off")
"""
    done = subprocess.run([sys.executable, "-c", code, str(ROOT)], capture_output=True, text=True, timeout=90, cwd=tmp_path)
    assert done.stdout.split() == ["20"] and "the run breaks off" in done.stderr

"""From files to batches: built-in pictures, captioned images, samples, their order, latent cache.

A training sample is a pure function of (seed, epoch, position in the epoch's global order): its
image, caption, crop, flip, timestep and noise all come from one generator seeded with these
counters. So there is no loader state to save, a resumed run continues exactly, and one process and
eight see the same samples with the same noise. The last section is about processes.

Images leave this file as uint8 (B, H, W, c); `to_unit_range` makes them (B, c, H, W) in [-1, 1] on
the device.
"""
import atexit
import csv
import errno
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import sys
import threading
import time
import traceback
import warnings
import zipfile
from contextlib import suppress
from dataclasses import astuple, dataclass
from datetime import timedelta
from itertools import chain, product, zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

# A stream's place is part of its seed, so new ones go to the end.
STREAMS = ("sample", "order", "split", "validation", "sampling", "shapes", "evaluation")


def counter_rng(stream, *counters):
    """A numpy Generator that depends on the named stream and the integer counters alone."""
    return np.random.default_rng((1 + STREAMS.index(stream), *counters))


def hash_of(parts):
    """SHA-256 of byte strings and arrays, or of anything that JSON can hold, one after another."""
    digest = hashlib.sha256()
    for part in parts:
        is_bytes = isinstance(part, (bytes, np.ndarray))
        digest.update(part if is_bytes else json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()


def hash_of_weights(module):
    return hash_of(t.cpu().numpy().tobytes() for _, t in sorted(module.state_dict().items()))


# Built-in pictures

COLOURS = {"red": (220, 30, 30), "orange": (255, 140, 0), "yellow": (255, 230, 30),
           "green": (20, 160, 50), "cyan": (0, 205, 225), "blue": (30, 60, 230),
           "purple": (145, 20, 190), "pink": (255, 110, 205)}
BACKGROUNDS = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0)}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.24, "large": 0.38}   # radius as a fraction of the picture's side
JITTER = 0.05                            # how far from the middle, likewise


@dataclass(frozen=True)
class Scene:
    """One thing on a background."""

    size: str
    colour: str
    shape: str
    background: str

    @property
    def caption(self):
        return "a {} {} {} on a {} background".format(*astuple(self))


SCENES = [Scene(*words) for words in product(SIZES, COLOURS, SHAPES, BACKGROUNDS)]
# The last five words are in no caption. They stay since the number of words decides the built-in
# text encoder's random weights, and so every figure of the README.
VOCABULARY = ["a", "on", "background", *BACKGROUNDS, *SIZES, *COLOURS, *SHAPES,
              "left", "of", "right", "above", "below"]


def is_held_out(scene):
    """Whether the scene is kept out of training: one in eight, chosen like the cells of a Latin
    square, so that any three of the four attributes still occur together in training."""
    places = [list(words).index(word)
              for words, word in zip((SIZES, COLOURS, SHAPES, BACKGROUNDS), astuple(scene))]
    return int(np.dot(places, (4, 1, 1, 3))) % 8 == 0


def outline(shape, x, y, r):
    """The corners of a shape of radius r around (x, y); a circle has 64 of them."""
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    arm = 0.34  # half the width of the cross's arms
    corners = {
        "circle": np.stack([np.cos(angles), np.sin(angles)], axis=1),
        "square": 0.9 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
        "triangle": np.array([(0, -1.05), (1.1, 0.9), (-1.1, 0.9)]),
        "cross": np.array([(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
                           (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)])}
    return [(x + r * dx, y + r * dy) for dx, dy in corners[shape]]


def draw(scene, resolution, rng):
    """The scene as an RGB picture, resolution x resolution; rng moves the thing a little.

    Drawn at eight times the resolution and averaged down, so that edges are smooth and positions
    are not whole pixels.
    """
    side = 8 * resolution
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    x, y = side * (0.5 + rng.uniform(-JITTER, JITTER, size=2))
    corners = outline(scene.shape, x, y, side * SIZES[scene.size])
    ImageDraw.Draw(canvas).polygon(corners, fill=COLOURS[scene.colour])
    return canvas.reduce(8)


class BuiltinShapes:
    """Pictures of the trained scenes with their captions, drawn once and kept in memory."""

    fingerprint = "built-in"

    def __init__(self, resolution, count=8192):
        scenes = [scene for scene in SCENES if not is_held_out(scene)]
        self.texts = [scene.caption for scene in scenes]
        self.scenes = counter_rng("shapes", 0, 0).permutation(count) % len(scenes)
        self.pictures = np.stack([draw(scenes[k], resolution, counter_rng("shapes", 1, i))
                                  for i, k in enumerate(self.scenes)])

    def __len__(self):
        return len(self.scenes)

    def captions(self, i):
        return [self.texts[self.scenes[i]]]

    def content(self, i):
        return self.pictures[i].tobytes()

    def image(self, i, channels, side, place=(0.5, 0.5)):
        return self.pictures[i] if channels == 3 else Image.fromarray(self.pictures[i]).convert("L")


# Captioned images on disk

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
# Formats are told by content; others, such as PostScript, may run programs.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")
# The file system's fault, not the file's.
OUT_OF_REACH = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN)
COLUMNS = {"image": ("file_name", "image", "image_name"), "caption": ("text", "caption", "comment")}


class UnreadableImage(ValueError):
    """A picture that is missing, damaged or hostile."""


class PackedStrings:
    """Strings end to end in one byte string. Forked loader workers would copy a list of them."""

    def __init__(self, strings):
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        self.buffer, self.ends = b"".join(encoded), np.cumsum([0, *map(len, encoded)])

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        return self.buffer[self.ends[i]:self.ends[i + 1]].decode("utf-8", "surrogateescape")


class Files:
    """The files of a folder, or of a .zip that is read in place, by their relative names."""

    def __init__(self, path):
        self.path, self.archive, self.owner = Path(path), None, None
        if not self.path.exists():
            raise FileNotFoundError(f"--data {path}: no such folder or .zip file")
        self.root = self.path.resolve() if self.path.is_dir() else None

    def names(self):
        """All names with forward slashes. Hidden files and linked folders are left out."""
        found = []
        for folder, folders, files in os.walk(self.root) if self.root else ():
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            found += [os.path.relpath(f"{folder}/{name}", self.root) for name in sorted(files)]
        if not self.root:
            found = [name for name in self.opened_zip().namelist() if not name.endswith("/")]
        return [name for name in found
                if not any(part.startswith((".", "__MACOSX")) for part in name.split("/"))]

    def open(self, name):
        """A file for reading bytes. Nothing outside the data is ever opened."""
        if self.root:
            path = (self.root / name).resolve()
            if not path.is_relative_to(self.root) or path.exists() and not path.is_file():
                raise ValueError("a link out of the data folder, or no ordinary file")
            return open(path, "rb")
        member = self.opened_zip().getinfo(name)
        packed = min(member.compress_size, self.path.stat().st_size)
        if member.file_size > 100 * max(2**20, packed):
            raise ValueError("unfolds to over 100 times its size: a zip bomb")
        return self.archive.open(member)

    def opened_zip(self):
        try:
            if not self.archive:
                self.archive, self.owner = zipfile.ZipFile(self.path), os.getpid()
            if self.owner != os.getpid():   # forked workers need a file position of their own
                self.archive.fp, self.owner = open(self.path, "rb"), os.getpid()
        except Exception as error:   # zipfile raises a dozen kinds on damaged bytes
            raise ValueError(f"--data {self.path}: no folder or whole .zip: {error}") from None
        return self.archive


def read_table(file):
    """(image, caption) pairs of a CSV file with a header such as `image,caption`."""
    rows = csv.DictReader(file, strict=True)
    header = rows.fieldnames = [column.strip().lower() for column in rows.fieldnames or []]
    image, text = (next((column for column in names if column in header), None)
                   for names in COLUMNS.values())
    if not (image and text):
        raise ValueError(f"header {','.join(header)[:80]!r}: must name one of each of {COLUMNS}")
    for row in rows:
        if None in row and header[-1] == text:   # a caption with commas, not quoted
            row[text] = ",".join([row[text], *row.pop(None)])
        if None in row or None in row.values():
            raise ValueError(f"line {rows.line_num} has not the header's {len(header)} columns")
        yield row[image].strip(), row[text]


def read_flickr_tokens(file):
    """(image, caption) pairs of `name.jpg#0<TAB>caption` lines, as Flickr8k and 30k come."""
    for line in file:
        name, tab, caption = line.partition("\t")
        if tab:
            yield name.rpartition("#")[0] or name, caption


def read_json_lines(file):
    """(image, caption) pairs of {"file_name": ..., "text": one caption or several} lines."""
    for row in map(json.loads, filter(str.strip, file)):
        texts = row["text"] if "text" in row else row["caption"]
        for text in [texts] if isinstance(texts, str) else texts:
            yield row["file_name"], text


def read_coco(file):
    """(image, caption) pairs of a COCO captions_*.json file."""
    content = json.load(file)
    names = {image["id"]: image["file_name"] for image in content["images"]}
    for annotation in content["annotations"]:
        yield names[annotation["image_id"]], annotation["caption"]


CAPTION_FILES = [   # (pattern of the base name, reader), tried in this order
    (r"metadata\.csv", read_table), (r"metadata\.jsonl", read_json_lines),
    (r"captions\.(txt|csv)", read_table),
    (r"(flickr\d+k|results_\d+)\.token(\.txt)?", read_flickr_tokens),
    (r"captions_.*\.json", read_coco)]


class CaptionedImages:
    """Images with one or more captions each, in a folder or a .zip.

    Images are in the order in which the captions file first names them (or by name, with one
    sub-folder per class). A caption's image is looked for beside the captions file and then by its
    base name anywhere in the data; only listed files can be named, so nothing leads outside.
    """

    def __init__(self, path, caption_template="a photo of a {}", max_missing=0.01):
        """Raises: FileNotFoundError, ValueError with one line that names the file and the fix."""
        self.path, self.files = Path(path), Files(path)
        captions = self._read_captions(caption_template, max_missing)   # {image name: captions}
        self.names = PackedStrings(captions)
        self.texts = PackedStrings(chain.from_iterable(captions.values()))
        self.first = np.cumsum([0, *map(len, captions.values())])   # image i's first text
        self.fingerprint = hash_of([self.names.buffer, self.names.ends, self.texts.buffer,
                                    self.texts.ends, self.first])

    def _caption_pairs(self, listed, images, caption_template):
        """(captions file or "folders", image name as written, caption) for every caption."""
        for pattern, reader in CAPTION_FILES:
            tables = [name for name in listed if re.fullmatch(pattern, Path(name).name, re.I)]
            for table in tables:
                try:
                    with io.TextIOWrapper(self.files.open(table), "utf-8-sig", "replace",
                                          newline="") as file:
                        for image, caption in reader(file):
                            yield table, "" + image, "" + caption   # both must be text
                except Exception as error:   # csv, json and zlib have a dozen kinds for damage
                    raise ValueError(f"--data {self.path}: {table} is not as expected: "
                                     f"{type(error).__name__}: {str(error)[:200]}") from None
            if tables:
                return
        folders = [Path(name).parent for name in images]
        if Path() in folders or len(set(folders)) < 2:
            raise ValueError(f"--data {self.path}: no captions file and not one sub-folder per "
                             "class either; add captions.txt or another of README.md's table")
        for name, folder in zip(images, folders):
            yield "folders", name, caption_template.replace("{}", folder.name.replace("_", " "))

    def _read_captions(self, caption_template, max_missing):
        """{image name: its captions}."""
        listed = self.files.names()
        images = dict.fromkeys(name for name in listed if name.lower().endswith(IMAGE_SUFFIXES))
        if not images:
            raise ValueError(f"--data {self.path}: holds no images ({', '.join(IMAGE_SUFFIXES)})")
        by_base = {}
        # Of two with the same base name nobody knows which is meant.
        for base, name in zip(map(os.path.basename, images), images):
            by_base[base] = None if base in by_base else name
        captions, missing, garbled = {}, {}, {}   # the last two: image as written to its table
        for table, written, caption in self._caption_pairs(listed, images, caption_template):
            beside = table[:table.rfind("/") + 1] + written.removeprefix("./")
            name = beside if beside in images else by_base.get(os.path.basename(written))
            caption = caption.encode("utf-8", "replace").decode()   # JSON may hold half characters
            if not name or "\ufffd" in caption:
                (garbled if name else missing).setdefault(written, table)
            if name:
                captions.setdefault(name, []).append(" ".join(caption.split()))
        # A few are said, more refused.
        for found, what in (
                (missing, "are not there, or in several folders; add the files or drop captions"),
                (garbled, "have captions that are not in UTF-8; convert that file")):
            if found:
                example, table = next(iter(found.items()))
                message = (f"--data {self.path}: {len(found)} image(s) named in {table} {what}, "
                           f"for example {example!r}")
                if len(found) > max_missing * (len(captions) + len(found)):
                    raise ValueError(message)
                warnings.warn(f"{message}; going on", stacklevel=2)
        if not captions:
            raise ValueError(f"--data {self.path}: the captions file holds no captions")
        return captions

    def __len__(self):
        """How many images have captions."""
        return len(self.names)

    def captions(self, i):
        """All captions of image i."""
        return [self.texts[k] for k in range(self.first[i], self.first[i + 1])]

    def content(self, i):
        """The bytes of image i's file; none where it cannot be read."""
        with suppress(UnreadableImage):
            return self._read(i, lambda file: file.read())
        return b""

    def image(self, i, channels, side, place=(0.5, 0.5)):
        """Image i as a (side, side) picture: see `read_image`. Raises: UnreadableImage, OSError."""
        return self._read(i, lambda file: read_image(file, channels, side, place))

    def _read(self, i, use):
        """use(file) of image i's file. Raises: UnreadableImage; OSError where not the file but all
        data are out of reach, for a minute, so that a passing fault changes no sample."""
        for wait in (1, 2, 4, 8, 16, 32, 0):
            try:
                with self.files.open(self.names[i]) as file:
                    return use(file)
            except Exception as error:   # Pillow and zipfile raise a dozen kinds on damaged bytes
                if self.path.exists() and getattr(error, "errno", None) not in OUT_OF_REACH:
                    raise UnreadableImage(f"--data {self.path}: {self.names[i]!r} cannot be read "
                                          f"as an image ({error}); repair or remove it") from None
                warnings.warn(f"--data {self.path}: out of reach ({error}); trying again for a "
                              "minute", stacklevel=2)
            time.sleep(wait)
        raise OSError(f"--data {self.path}: out of reach for a minute; bring it back and go on "
                      "with --resume")


def read_image(file, channels, side, place=(0.5, 0.5)):
    """A square crop of a picture, side x side pixels, mode "RGB" (channels 3) or "L" (1).

    The short side is scaled to `side` with antialiasing; `place` says where along the long side the
    crop lies, from 0 (left or top) to 1. Transparent pictures are laid on white, 16-bit ones scaled
    to 8, and EXIF rotation is applied.
    """
    image = Image.open(file, formats=FORMATS)
    image.draft("RGB", (2 * side, 2 * side))   # JPEG: decode small, never below twice the target
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB" if channels == 3 else "L")
    short = min(image.size)
    left, top = ((length - short) * share for length, share in zip(image.size, place))
    box = (left, top, left + short, top + short)
    return image.resize((side, side), Image.BICUBIC, box=box, reducing_gap=3.0)


def is_builtin(data):
    """Whether --data names the built-in pictures."""
    return data == "shapes"


def open_source(data, resolution, caption_template="a photo of a {}", max_missing=0.01):
    """The images and captions that --data names: "shapes", a folder or a .zip.

    Every source has a length, `texts` (all captions), `captions(i)`, `image(i, ...)`, `content(i)`
    and a `fingerprint` of its names and captions.
    """
    if is_builtin(data):
        return BuiltinShapes(resolution)
    return CaptionedImages(data, caption_template, max_missing)


# Training samples


def split_images(count, val_fraction):
    """(training, validation) image numbers, ascending: a fixed random split that depends on the
    count alone, not on the seed."""
    order = counter_rng("split", count).permutation(count)
    held = round(count * val_fraction)
    return np.sort(order[held:]), np.sort(order[:held])


def image_loader(source, config):
    """load(i, place, mirror): image i as dict(image=uint8 (H, W, c)). Raises: UnreadableImage."""
    side, channels = config.resolution, config.image_channels

    def load(i, place=(0.5, 0.5), mirror=False):
        pixels = np.array(source.image(i, channels, side, place)).reshape(side, side, channels)
        return dict(image=pixels[:, ::-1].copy() if mirror else pixels)

    return load


def first_readable(load, images, index):
    """(number, load(number)) of image `index` or, where it cannot be read, of the first after it in
    the ascending array `images` that can: a choice of the data alone. Raises: ValueError."""
    start, most = np.searchsorted(images, index), min(100, len(images))
    for k in range(start, start + most):
        number = int(images[k % len(images)])
        with suppress(UnreadableImage):
            return number, load(number)
    raise ValueError(f"--data: none of {most} images from number {index} on can be read; repair or "
                     "remove them")


class Samples(Dataset):
    """Everything that training needs of one sample, drawn from the sample's own counters."""

    def __init__(self, load, captions, images, config, latent_shape, seed=0, random_crop=False,
                 flip=False, validation=False):
        """load(i, place, mirror): see image_loader and cache_latents; captions(i): all of image i.
        `images`: the numbers of the split, ascending. With `validation` these are the fixed
        validation samples: no caption is dropped, and t is spread evenly over [0, T)."""
        self.load, self.captions, self.images, self.config = load, captions, images, config
        self.latent_shape, self.seed, self.validation = latent_shape, seed, validation
        self.random_crop, self.flip = random_crop, flip

    def __getitem__(self, key):
        """key: (epoch, position, image number). Returns a dict of image uint8 (H, W, c) or moments
        float16 (2, C, h, w); caption; t; eps and, with a VAE, posterior_eps float32 (C, h, w);
        wanted and number: where an image cannot be read, the next that can takes its place."""
        epoch, position, wanted = key
        rng = (counter_rng("validation", position) if self.validation
               else counter_rng("sample", self.seed, epoch, position))
        # One number for each choice, used or not, so that no flag shifts another choice.
        u_caption, u_drop, u_left, u_top, u_mirror, u_t = rng.random(6)
        place = (u_left, u_top) if self.random_crop else (0.5, 0.5)
        mirror = self.flip and u_mirror < 0.5
        number, loaded = first_readable(lambda i: self.load(i, place, mirror), self.images, wanted)
        choices = self.captions(number)
        caption = choices[int(u_caption * len(choices))]
        if self.validation:
            u_t = (position + 0.5) / len(self.images)
        elif u_drop < self.config.caption_dropout:
            caption = ""
        # torch draws normals three times as fast as numpy.
        generator = torch.Generator().manual_seed(int(rng.integers(2**63)))
        names = ["eps"] if self.config.vae == "none" else ["eps", "posterior_eps"]
        normals = {name: torch.randn(self.latent_shape, generator=generator) for name in names}
        return dict(loaded, **normals, caption=caption, wanted=wanted, number=number,
                    t=int(u_t * self.config.num_train_timesteps))


class GlobalOrder(Sampler):
    """This rank's micro-batches of an epoch, as lists of (epoch, position, image number).

    The epoch's order is one permutation, the same on all ranks. Step s takes positions [s B,
    (s + 1) B), whatever the number of ranks and micro-batches: these only decide who computes what.
    A last, incomplete batch is left out; another epoch's permutation leaves out others.
    """

    def __init__(self, images, batch_size, accumulation=1, seed=0):
        """`batch_size` is global. Raises: ValueError where it does not fit ranks or images."""
        ranks, parts = dist.get_world_size(), dist.get_world_size() * accumulation
        if batch_size < 1 or batch_size % parts:
            raise ValueError(f"--batch-size {batch_size}: must be a multiple of processes x "
                             f"--accumulation = {ranks} x {accumulation}; try "
                             f"{max(1, round(batch_size / parts)) * parts}")
        if len(images) < batch_size:
            raise ValueError(f"--batch-size {batch_size}: there are only {len(images)} training "
                             f"images; use at most {len(images) // parts * parts}")
        self.images, self.batch_size, self.accumulation = images, batch_size, accumulation
        self.micro_batch, self.steps_per_epoch = batch_size // parts, len(images) // batch_size
        self.seed, self.epoch, self.first_step = seed, 0, 0

    def start_at(self, epoch, step):
        """The next iteration begins at this step of this epoch."""
        self.epoch, self.first_step = epoch, step

    def __len__(self):
        return (self.steps_per_epoch - self.first_step) * self.accumulation

    def __iter__(self):
        order = counter_rng("order", self.seed, self.epoch).permutation(self.images)
        steps = range(self.first_step, self.steps_per_epoch)
        for step, micro in product(steps, range(self.accumulation)):
            part = dist.get_rank() * self.accumulation + micro
            start = step * self.batch_size + part * self.micro_batch
            yield [(self.epoch, k, int(order[k])) for k in range(start, start + self.micro_batch)]


def validation_order(images, batch_size):
    """Every validation image on exactly one rank, as lists of (0, position, image number)."""
    batches = rank_batches(len(images), batch_size)
    return [[(0, position, int(images[position])) for position in batch] for batch in batches]


def make_loader(samples, batches, device="cpu", workers=0):
    """A DataLoader over prepared batches of keys, with torch's default collate."""
    context, ahead = ("fork", 4) if workers else (None, None)
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, prefetch_factor=ahead,
                      multiprocessing_context=context, persistent_workers=workers > 0,
                      pin_memory=torch.device(device).type == "cuda", worker_init_fn=ignore_signals)


def ignore_signals(_):
    """A job's signals reach every process, but loader workers end when the main process does."""
    for number in (signal.SIGINT, signal.SIGUSR1, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, args=(os.getppid(),), daemon=True).start()


def end_with_parent(parent):
    """A worker whose pipe is full would wait for ever for its dead parent to read from it."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


@atexit.register
def kill_workers():
    """At its end Python sends SIGTERM to leftover workers, which ignore it, and waits for them."""
    for process in multiprocessing.active_children():
        process.kill()


def to_device(batch, device):
    """The batch with its tensors on the device, copied without waiting where they are pinned."""
    return {name: value.to(device, non_blocking=True) if isinstance(value, torch.Tensor) else value
            for name, value in batch.items()}


def to_unit_range(images):
    """uint8 (B, H, W, c) to float32 (B, c, H, W) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


# Latents, encoded once


class OnDemand(Dataset):
    """get(i) for any i, as a data set."""

    def __init__(self, get):
        self.get = get

    def __getitem__(self, i):
        return self.get(i)


def cache_latents(folder, source, config, latent_shape, encode, write, flip=False, workers=0,
                  batch_size=16):
    """load(i, place, mirror): the latents of image i as dict(moments=float16 (2, C, h, w)).

    All images are encoded once, with `flip` mirrored too, into memory-mapped files of some hundred
    images each. Files appear under their names when they are complete, so a killed job loses one
    file a rank, and jobs that start together do no harm. encode: uint8 (B, H, W, c) to mean and
    standard deviation, each (B, C, h, w); write(path, fill) lets fill(file) write atomically.
    Raises: ValueError where the disk is too small or a latent is not finite.
    """
    count, rank, ranks = len(source), dist.get_rank(), dist.get_world_size()
    size = min(256, max(16, count // 64))   # images a file: depends on the count alone
    for leftover in folder.glob(".*.tmp") if rank == 0 else ():
        with suppress(FileNotFoundError):   # of a killed job: a file is written in seconds
            if time.time() - leftover.stat().st_mtime > 3600:
                leftover.unlink()
    shape, load_image = (1 + flip, 2, *latent_shape), image_loader(source, config)
    files = {folder / f"latents_{start // size:05d}.npy": range(start, min(start + size, count))
             for start in range(0, count, size)}
    # One answer for all, also where another job is at work.
    missing = gather([p for p in files if open_latents(p, len(files[p]), shape) is None])[0]
    needed = 2 * int(np.prod(shape)) * sum(len(files[path]) for path in missing)
    if needed > (free := shutil.disk_usage(folder).free):
        raise ValueError(f"--cache-latents {folder}: needs {needed / 2**30:.1f} GiB, "
                         f"{free / 2**30:.1f} GiB are free; name another folder")

    def load_or_blank(i):
        with suppress(UnreadableImage):
            return load_image(i) | dict(number=i, readable=True)
        blank = np.zeros((config.resolution, config.resolution, config.image_channels), np.uint8)
        return dict(image=blank, number=i, readable=False)

    batches = [files[path][start:start + batch_size] for path in missing[rank::ranks]
               for start in range(0, len(files[path]), batch_size)]
    loader = iter(make_loader(OnDemand(load_or_blank), batches, workers=workers))
    # Ranks write a file each and then wait for each other, so that nobody waits for long.
    for start in tqdm(range(0, len(missing), ranks), desc="caching latents", unit="file",
                      disable=rank > 0 or not missing):
        for path in missing[start:start + ranks][rank:rank + 1]:
            parts = range(0, len(files[path]), batch_size)
            moments = np.concatenate([encoded(encode, next(loader), flip) for _ in parts])
            write(path, lambda file: np.save(file, moments))
        gather(None)
    chunks = [open_latents(path, len(numbers), shape) for path, numbers in files.items()]
    if any(chunk is None for chunk in chunks):
        raise ValueError(f"--cache-latents {folder}: lacks other ranks' files; use a shared folder")

    def load(i, place=None, mirror=False):
        moments = np.array(chunks[i // size][i % size, int(mirror)])
        if np.isnan(moments[0, 0, 0, 0]):
            raise UnreadableImage(f"image {i} could not be read when it was encoded")
        return dict(moments=moments)

    return load


def encoded(encode, batch, flip):
    """The moments of a batch, (B, flips, 2, C, h, w) float16; NaN for unreadable images."""
    views = [batch["image"], batch["image"].flip(2)][:1 + flip]
    moments = torch.stack([torch.stack(encode(view), dim=1) for view in views], dim=1).half().cpu()
    if not moments.isfinite().all():
        number = batch["number"][~moments.isfinite().flatten(1).all(dim=1)][0]
        raise ValueError(f"--cache-latents: image {number}: not finite; is --vae the right one?")
    moments[~batch["readable"]] = torch.nan
    return moments.numpy()


def open_latents(path, count, shape):
    """A file of the cache, mapped, or None where it is missing or damaged. Executes nothing."""
    with suppress(FileNotFoundError):
        try:
            chunk = np.load(path, mmap_mode="r", allow_pickle=False)
            if chunk.shape == (count, *shape) and chunk.dtype == np.float16:
                return chunk
            raise ValueError("not of this cache")
        except (ValueError, EOFError) as error:
            warnings.warn(f"{path}: damaged ({error}); encoded again", stacklevel=2)


# Processes. `rank` counts all of them, LOCAL_RANK those of a node: it picks the GPU.


def setup_processes(device="auto"):
    """Join the process group that torchrun announces, or make one of this process alone (plain
    `python`); returns the device. NCCL carries GPU tensors and gloo CPU tensors.

    Raises: ValueError where a node has fewer GPUs than processes, or none that can be used.
    """
    env = os.environ
    local_rank, local_size = int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_WORLD_SIZE", 1))
    env.setdefault("TOKENIZERS_PARALLELISM", "false")   # loader workers are forked
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if gpus and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: this build of PyTorch cannot use the GPU; install "
                         "one for the CUDA version that nvidia-smi shows, or use --device cpu")
    if device == "cuda" and not gpus:
        raise ValueError("--device cuda: PyTorch sees no GPU; see nvidia-smi, or use --device cpu")
    fix = f"start with torchrun --nproc_per_node={gpus}"
    if gpus and local_size > gpus:
        raise ValueError(f"--nproc_per_node={local_size}: only {gpus} GPUs are visible here; {fix}")
    if gpus > local_size and local_rank == 0:
        warnings.warn(f"{gpus} GPUs visible, {local_size} in use: {fix}", stacklevel=2)
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    elif "OMP_NUM_THREADS" not in env or "TORCHELASTIC_RUN_ID" in env:   # torchrun sets it to 1
        torch.set_num_threads(max(1, available_cores() // local_size))
    if not dist.is_initialized():   # a notebook may call main() twice
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        alone = {} if "RANK" in env else dict(store=dist.HashStore(), rank=0, world_size=1)
        # How long a rank may keep the others waiting, as it writes or hangs, before all end.
        timeout = timedelta(seconds=float(env.get("RANK_TIMEOUT_SECONDS", 600)))
        dist.init_process_group(backend, timeout=timeout, **alone)
    return device


def gather(value):
    """Every rank's value, any picklable object, in a list on every rank. Also a barrier."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def rank_batches(count, batch_size):
    """This rank's numbers of 0, 1, ... count - 1 in batches. Number i belongs to rank i mod
    world_size, so that each is on exactly one rank."""
    mine = range(dist.get_rank(), count, dist.get_world_size())
    return [list(mine[start:start + batch_size]) for start in range(0, len(mine), batch_size)]


def interleave(parts):
    """What belongs to numbers 0, 1, ..., from the parts of rank 0, 1, ..., shared out as above."""
    return [item for row in zip_longest(*parts) for item in row if item is not None]


def content_hashes(content, count):
    """A hash of content(i), the bytes of picture i, for each, whatever its name, place and date."""
    return interleave(gather([hash_of([content(i)]) for i, in rank_batches(count, 1)]))


def available_cores():
    """CPU cores that this process may use: on a cluster the allocation's, not the machine's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores, int(os.environ.get("SLURM_CPUS_ON_NODE") or cores))


def default_workers():
    """Loader processes per rank: the rank's cores less one, at most 8."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0, min(8, available_cores() // ranks - 1))


def amp_dtype(choice, device):
    """The autocast dtype, or None for float32. auto: bfloat16 where the GPU computes in it, else
    float16 (a V100); float32 on CPUs. Raises: ValueError where ranks differ."""
    if choice == "auto" and device.type == "cuda":
        choice = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    if len(set(gather(choice))) > 1:
        raise ValueError("--amp auto: means bfloat16 on some of these GPUs and float16 on others; "
                         "add --amp fp16, or ask for GPUs of one kind")
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(choice)


def run_main(main):
    """Run a script's main() and end the process. A user's mistake becomes one line from rank 0 and
    exit code 2, and no rank is left waiting."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    code, rank = 0, int(os.environ.get("RANK", 0))
    try:
        main()
    except KeyboardInterrupt:
        code = 130
    except SystemExit as exit:   # argparse's
        code = exit.code or 0
    except Exception as error:
        code, text = 2, str(error).strip()
        is_lost = re.search("gloo|NCCL|pair closure|closed by peer", text)
        if isinstance(error, dist.DistError) or isinstance(error, RuntimeError) and is_lost:
            text = (f"rank {rank} lost another process, which died or hangs "
                    f"({' '.join(text.split())[:600]}); go on with --resume")
        elif not isinstance(error, (ValueError, OSError)):
            code, text = 1, traceback.format_exc()
        if rank and code == 2:
            # Every rank meets the same mistake; the first exit makes torchrun stop the others.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        # An error in a loader worker carries that process's traceback; its last line says it.
        tqdm.write(f"error: {text.splitlines()[-1]}" if code == 2 else text, sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # Taking gloo down may hang (PyTorch 2.7), and Python's end with gloo up may abort: do neither.
    os._exit(code)

"""From files to batches: built-in pictures, captioned images, samples, their order, latent cache.

A training sample is a pure function of (seed, epoch, position in the epoch's global order): its
image, caption, crop, flip, timestep and noise all come from one generator seeded with these
counters. So there is no loader state to save, a resumed run continues exactly, and one process and
eight see the same samples with the same noise. The last section is about processes.

Images leave this file as uint8 (B, H, W, c); `to_unit_range` makes them (B, c, H, W) in [-1, 1] on
the device.
"""
import argparse
import atexit
import csv
import errno
import gc
import hashlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import sys
import tarfile
import threading
import time
import traceback
import unicodedata
import warnings
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass
from datetime import timedelta
from functools import lru_cache, partial
from itertools import chain, product, zip_longest
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageCms, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

# How long a rank may keep the others waiting, as it writes or hangs, before all end.
RANK_TIMEOUT = float(os.environ.get("RANK_TIMEOUT_SECONDS", 600))
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

    fingerprint, validation, report = "built-in", (), {}

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

# Formats are told by content; others, such as PostScript, may run programs.
SUFFIXES = {suffix: kind for suffix, kind in Image.registered_extensions().items()
            if kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")}
IMAGE_SUFFIXES, FORMATS = tuple(SUFFIXES), sorted(set(SUFFIXES.values()))
SRGB = ImageCms.createProfile("sRGB")
SIDECARS = (".txt", ".caption", ".json")   # beside an image of the same name
UNREAD = (".parquet", ".arrow")            # tables that are named, but not read
TEXT_SUFFIXES = (".txt", ".caption", ".csv", ".tsv", ".token", ".json", ".jsonl", ".ndjson")
# The file system's fault, not the file's.
OUT_OF_REACH = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN)


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


def folder_files(root):
    """Names of a folder's files. Links are followed, but no folder is entered twice, so that a
    circle of links ends."""
    entered = set()
    for folder, folders, files in os.walk(root, followlinks=True, onerror=warnings.warn):
        identity = os.stat(folder).st_dev, os.stat(folder).st_ino
        folders[:] = sorted(set(folders) if identity not in entered else ())
        if identity not in entered:
            entered.add(identity)
            yield from (os.path.join(folder, name)[len(root) + 1:] for name in files)


# What is kept of a file in a .zip; of one in a .tar only the first two differ from 0.
PLACE = ("header_offset", "file_size", "compress_size", "CRC", "compress_type", "flag_bits")


def archive_files(path):
    """(name, *PLACE) of the files in a .zip or .tar."""
    with open(path, "rb") as file:
        is_zip = file.read(2) == b"PK"
    with zipfile.ZipFile(path) if is_zip else tarfile.open(path, "r:") as archive:
        for file in archive.infolist() if is_zip else archive:
            if not is_zip and file.size < 0:   # Python would go round for ever
                raise ValueError(f"{file.name} has a negative size")
            if not is_zip and file.isreg() and not file.issparse():
                yield file.name, file.offset_data, file.size, 0, 0, 0, 0
            elif is_zip and not file.is_dir():
                with suppress(UnicodeError):   # not marked as UTF-8, which it often is
                    if not file.flag_bits & 0x800:
                        file.filename = file.filename.encode("cp437").decode()
                yield file.filename, *(getattr(file, field) for field in PLACE)
        if not is_zip:   # Python takes what it cannot read for the end
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(512) != bytes(512):
                raise ValueError(f"damaged or cut off at byte {archive.offset:,}")


@lru_cache(maxsize=64)
def open_archive(path, process):
    """One for each process: forked loader workers must not share a position in the file."""
    return open(path, "rb")


class Files:
    """The files of a folder, a .zip, a .tar or a folder of .tar shards, by number. Archives are
    read in place: all that is kept of them is where their files lie."""

    def __init__(self, path, flag="--data"):
        self.root, self.archives, plain = Path(path), [""], []   # archives: names below the root
        if self.root.is_dir():
            plain = list(folder_files(str(self.root)))
            has_images = any(name.lower().endswith(IMAGE_SUFFIXES) for name in plain)
            self.archives = sorted(name for name in plain
                                   if name.lower().endswith(".tar") and not has_images)
        elif self.root.suffix.lower() in TEXT_SUFFIXES:   # captions alone
            self.root, self.archives, plain = self.root.parent, [], [self.root.name]
        found = {name: [-1] * 7 for name in set(plain).difference(self.archives)}
        try:
            for number, archive in enumerate(self.archives):
                shard = archive and f"{archive}/"
                for name, *place in archive_files(self.root / archive):
                    name = name.replace("\\", "/").removeprefix("./")
                    found[shard + name] = [number, *place]
        except FileNotFoundError:
            raise FileNotFoundError(f"{flag} {path}: no such folder, .zip or .tar") from None
        except Exception as error:   # zipfile and tarfile raise a dozen kinds on damaged bytes
            raise ValueError(f"{flag} {path}: no folder, whole .zip or .tar (unpack a compressed "
                             f"one): {error}") from None
        names = [name for name in found if not re.search(r"(^|/)(\.|__MACOSX)", name)]
        # By name, so that a folder, a .zip and a .tar of it give the same samples.
        self.names = sorted(names, key=lambda name: name.split("/"))
        self.places = np.array([found[name] for name in self.names], np.int64).reshape(-1, 7)

    def open(self, number):
        """A file for reading bytes. Nothing but the listed files is ever opened."""
        archive, *place = map(int, self.places[number])
        if archive < 0:
            path = self.root / self.names[number]
            if path.exists() and not path.is_file():
                raise ValueError("no ordinary file")
            return open(path, "rb")
        file = open_archive(self.root / self.archives[archive], os.getpid())
        member = zipfile.ZipInfo()
        for field, value in zip(PLACE, place):
            setattr(member, field, value)
        file.seek(member.header_offset)
        if not any(place[2:]):
            return io.BytesIO(file.read(member.file_size))
        if member.flag_bits & 1:
            raise ValueError("needs a password")
        packed = min(member.compress_size, os.fstat(file.fileno()).st_size)
        if member.file_size > 100 * max(2**20, packed):
            raise ValueError("unfolds to over 100 times its size: a zip bomb")
        file.seek(sum(struct.unpack("<26xHH", file.read(30))), os.SEEK_CUR)   # its name, and more
        return zipfile.ZipExtFile(file, "r", member)


# Captions


SPLITS = {"train": "train", "training": "train", "restval": "train", "val": "val", "valid": "val",
          "validation": "val", "dev": "val", "test": "test", "testing": "test", "pred": "test",
          "unlabeled": "test"}
# Columns of tables and keys of JSON; of several that are there the first counts.
IMAGE_KEYS = ("file_name", "filename", "image", "image_name", "image_path", "img", "img_path",
              "filepath", "file_path", "path", "file", "name", "image_id", "id", "key")
CAPTION_KEYS = ("caption", "captions", "text", "prompt", "sentence", "sentences", "raw", "title",
                "description", "comment")
# Captions files that are read first, and that must not be damaged.
USUAL = re.compile(r"(.*/)?((metadata|captions?)\.\w+|captions?_[^/]*\.json|.*\.token(\.txt)?)",
                   re.IGNORECASE | re.DOTALL)
# What may be wrong with a row, and what to do where that happens too often.
MISSING = "named images that are not there or in several folders", "add them or drop captions"
NOT_UTF8 = "images with captions that are not in UTF-8", "convert that file"
BROKEN = "rows with too few or too many columns", "mend them"
NO_FOLDER, EMPTY = ("named images of folders that are not there", ""), ("empty captions", "")
HOW = ("give --captions FILE, --caption-column NAME or a --caption-template: {} in it stands for "
       "an image's folder, one without {} serves all images, an empty one is no caption")


@lru_cache
def split_of(name):
    """"train", "val" or "test" where a name says so, such as seg_train or captions_val2017."""
    words = re.findall("[a-z]+", name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def upwards(folder):
    """(folder above, own name) of a folder, of the folder above it, and so on."""
    while folder:
        folder, _, name = folder.rpartition("/")
        yield folder, name


def splits_and_classes(folders):
    """{folder: (its split or None, its class or "")}.

    A level of folders stands for splits where all of its names do, or names of two splits are among
    them, so that `train` among `bus` and `car` stays a class. Others are classes.
    """
    level = {}   # the splits that the folders beside one another stand for
    for above, name in chain.from_iterable(map(upwards, folders)):
        level.setdefault(above, set()).add(split_of(name))
    places = {}
    for folder in folders:
        split, word = None, ""   # of the innermost folders
        for above, name in upwards(folder):
            if None not in level[above] or len(level[above]) > 2 and split_of(name):
                split = split or split_of(name)
            else:
                word = word or name
        places[folder] = split, word
    return places


def shorten(path, suffixed, parts):
    """The last so many parts of a path, 0: all, with or without an image's suffix."""
    if not suffixed and path.lower().endswith(IMAGE_SUFFIXES):
        path = path.rpartition(".")[0]
    return "/".join(path.split("/")[-parts:])


class ImageNames:
    """Finds images, by their numbers among all files, from what captions files call them."""

    def __init__(self, names):
        self.names = {k: unicodedata.normalize("NFC", name) for k, name in enumerate(names)
                      if name.lower().endswith(IMAGE_SUFFIXES)}
        self.folders = splits_and_classes(set(map(os.path.dirname, self.names.values())))
        self.places = {k: self.folders[os.path.dirname(name)] for k, name in self.names.items()}
        self.parts = {"", *chain.from_iterable(folder.split("/") for folder in self.folders)}
        self.tables = {}

    def find(self, written, file=""):
        """The number of the image that a captions file calls so, or None.

        It is looked for beside the file, by its last folder and name and by its name alone; then
        without suffixes. Nothing written is contradicted: one of both paths ends with the other.
        Where images lie beside the file no others are meant.
        """
        written = written.strip().replace("\\", "/").removeprefix("./")
        file, written = (unicodedata.normalize("NFC", path) for path in (file, written))
        folder = file[:file.rfind("/") + 1]   # "" or with its slash
        within = folder if folder[:-1] in self.folders else ""
        for suffixed, parts in product((True, False), (0, 2, 1)):
            number = self._table(suffixed, parts).get(shorten(folder + written, suffixed, parts))
            if number is not None and self.names[number].startswith(within):
                listed, meant = (f"/{shorten(path, suffixed, 0)}"
                                 for path in (self.names[number], written))
                if listed.endswith(meant) or meant.endswith(listed):
                    return number
        return None

    def _table(self, *level):
        """{shortened name: number}, made when it is first needed."""
        if level not in self.tables:
            table = self.tables[level] = {}
            for number, name in self.names.items():
                name = shorten(name, *level)
                table[name] = None if name in table else number   # nobody knows which is meant
        return self.tables[level]


def reading_order(name):
    is_usual = USUAL.fullmatch(name) is not None
    return not is_usual, name.count("/"), is_usual and len(name)


def pick_keys(keys, wanted):
    """(key of the image, keys of its captions, keys that may hold other captions) of a table's
    columns or a JSON row's keys; wanted: --caption-column. Raises: LookupError."""
    image = next((key for key in IMAGE_KEYS if key in keys), None)
    fitting = ([key for key in CAPTION_KEYS if key in keys] or
               [key for key in keys if re.search(r"caption|(text|sentence|comment)_?\d+$", key)])
    captions = [key for key in fitting if key[-1].isdigit()] or fitting[:1]
    if wanted:
        captions = [key for key in keys if key == wanted.lower()]
    if not (image and captions):
        known = IMAGE_KEYS if not image else [wanted] if wanted else CAPTION_KEYS
        raise LookupError(f"no column {', '.join(known[:4])} ... among {', '.join(keys)[:80]}")
    return image, captions, [key for key in fitting if key not in captions]


def texts_in(value):
    """The captions in a cell: text, a list of texts or, as in Karpathy's files, {"raw": text}."""
    if isinstance(value, str):   # within a table a list may be JSON
        return texts_in(json.loads(value)) if value.startswith('["') else [value]
    if isinstance(value, dict):
        return texts_in(value["raw"])
    if value is None or value != value:
        return []
    return [text for item in value for text in texts_in(item)]   # TypeError: a number


def one_line(text):
    """Text as a caption: in one line, and without the half characters that JSON and names allow."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def read_json(lines, is_whole):
    """Rows of JSON lines or, as a whole, of a list of objects, alone or under any key, of COCO's
    annotations, or of a map {image: its captions}."""
    if not is_whole:
        return (json.loads(line) for line in lines if line.strip())
    content = json.loads("".join(lines))
    if isinstance(content, list):
        return content
    if "annotations" in content:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        return [dict(image=names[note["image_id"]], caption=note["caption"])
                for note in content["annotations"]]
    lists = [rows for rows in content.values() if isinstance(rows, list) and rows
             and isinstance(rows[0], dict)]
    return lists[0] if lists else [dict(image=k) | (v if isinstance(v, dict) else dict(caption=v))
                                   for k, v in content.items()]


def read_table(lines, find, wanted):
    """Rows of comma-, semicolon-, tab- or pipe-separated lines below a header or, without one, of
    `image,caption` or `image.jpg#0<TAB>caption` lines; {} for a row that is broken."""
    header, quoting = next(lines, ""), csv.QUOTE_MINIMAL
    comma = next((delimiter for delimiter in "\t|;" if delimiter in header), ",")
    keys = [key.strip(' "\r\n').lower() for key in header.split(comma)]
    try:
        captions = pick_keys(keys, wanted)[1]
    except LookupError:
        first, _, rest = header.partition(comma)
        if not rest or comma == "\t" and comma in rest or find(first.partition("#")[0]) is None:
            raise
        lines, keys, captions = chain([header], lines), ["image", "caption"], ["caption"]
        quoting = csv.QUOTE_MINIMAL if comma == "," else csv.QUOTE_NONE
    for row in csv.DictReader(lines, keys, strict=True, delimiter=comma, quoting=quoting):
        if None in row and keys[-1:] == captions:   # a caption with commas, not quoted
            row[keys[-1]] = comma.join([row[keys[-1]], *row.pop(None)])
        yield {} if None in row or None in row.values() else row


class Table:
    """What one captions file says of the images, or all files beside them of one kind."""

    def __init__(self, kind, files=()):
        """kind: the file's name, or the suffix of many."""
        self.is_beside = kind in SIDECARS
        self.name = f"{len(files):,} {kind} files" if self.is_beside else kind
        self.files, self.line = files, 0
        self.split = split_of(os.path.basename(kind))
        self.numbers = {}   # of images, by what they are called; None: which is not known
        self.captions, self.splits, self.faults = {}, {}, {}   # by number; by what is wrong

    def read(self, images, file, text, wanted):
        """Add the captions in a file. Raises: many kinds of errors where it is damaged, LookupError
        where it is no captions file."""
        stem, suffix = os.path.splitext(os.path.basename(file))
        if self.is_beside:
            return self._add(images, file, stem, filter(str.strip, text))
        keys = None
        lines = (line for self.line, line in enumerate(text, 1))   # in which a fault is met
        for row in (read_json(lines, suffix.lower() == ".json") if "json" in suffix.lower()
                    else read_table(lines, partial(images.find, file=file), wanted)):
            row = {str(key).strip().lower(): value for key, value in row.items()}
            keys = keys or row and pick_keys(list(row), wanted)
            if not keys or keys[0] not in row:
                self.faults.setdefault(BROKEN, {})[f"line {self.line}"] = None
                continue
            written = re.sub(r"(\.\w+)#\d+$", r"\1", str(row[keys[0]]).strip())
            if keys[0] == "filename" and "filepath" in row:   # Karpathy's COCO
                written = f"{row['filepath']}/{written}"
            texts = [text for key in keys[1] for text in texts_in(row.get(key))]
            self._add(images, file, written, texts, split_of(str(row.get("split"))))
        if keys and keys[2]:
            self.name += f" ({keys[1][0]}; --caption-column {keys[2][0]} takes the other)"

    def _add(self, images, file, written, texts, split=None):
        """The captions of the image that a file calls so."""
        key = file if self.is_beside else written
        if key not in self.numbers:
            number = images.find(written, file)
            if number in self.splits:   # of two names for one image, one means another
                number = None
            elif number is not None:
                self.splits[number] = split or images.places[number][0] or self.split
            self.numbers[key] = number
        number, fault = self.numbers[key], None
        texts = [one_line(text) for text in texts]
        kept = [text for text in texts if text.lower() not in ("", "nan")]
        if number is None:
            is_known = images.parts.issuperset(written.replace("\\", "/").split("/")[-2:-1])
            fault = None if split == "test" else MISSING if is_known else NO_FOLDER
        elif len(kept) < max(1, len(texts)):
            fault = EMPTY
        elif any("\ufffd" in text for text in kept):
            fault = NOT_UTF8
        if fault:
            self.faults.setdefault(fault, {})[written] = None
        if kept and number is not None:
            self.captions.setdefault(number, []).extend(kept)


def choose(tables):
    """Those that name most images. Two that name the same image are never both taken."""
    taken, covered = [], set()
    for table in sorted(tables, key=lambda table: -len(table.captions)):
        if covered.isdisjoint(table.captions):
            taken.append(table)
            covered.update(table.captions)
    return sorted(taken, key=tables.index)


def such_as(what, names):
    return f"{len(names):,} {what}, such as {', '.join(map(repr, list(names)[:3]))}"


class CaptionedImages:
    """Images with one or more captions each, in a folder, a .zip or .tar files.

    Images are in the order in which the captions file first names them (or by name). Captions can
    name listed files only, so nothing leads outside. `report` says what was understood.
    """

    def __init__(self, path, template=None, max_missing=0.01, captions=None, column=None):
        """template: --caption-template; captions: a file, folder or .zip with them elsewhere;
        column: --caption-column. Raises: FileNotFoundError, ValueError with one line that names
        the file and the fix."""
        self.path, self.files = Path(path), Files(path)
        listed, images = self.files.names, ImageNames(self.files.names)
        if not images.names:
            raise ValueError(f"--data {path}: no images among {len(listed)} file(s), such as "
                             f"{(listed or [None])[0]}; name a .zip itself, unpack a compressed "
                             ".tar; for parquet, arrow, npz or idx see README.md's recipe")
        tables, unread = [], {}
        if template is None or "{}" in template:
            source = Files(captions, "--captions") if captions else self.files
            tables, unread = self._read_tables(source, images, column)
            if (captions or column) and not tables:   # asked for, not to be passed over
                what = f"--captions {captions}" if captions else f"--caption-column {column}"
                raise ValueError(f"{what}: no captions of the images of --data {path}: "
                                 f"{unread or 'none is named'}; mend or drop it")
        taken = choose(tables) or [self._class_table(images, template, unread)]
        texts = {k: of_k for table in taken for k, of_k in table.captions.items()}
        splits = {k: table.splits[k] for table in taken for k in table.captions}
        known = "train" in splits.values()
        splits = {k: known and (split or "train") for k, split in splits.items()}
        self.report = self._report(images, taken, texts, splits, max_missing)
        texts = {k: of_k for k, of_k in texts.items() if splits[k] != "test"}
        self.validation = np.flatnonzero([splits[k] == "val" for k in texts])   # the data's own
        # All other files are forgotten, and these numbered anew.
        self.names = self.files.names = PackedStrings(listed[k] for k in texts)
        self.files.places = self.files.places[list(texts)]
        self.texts = PackedStrings(chain.from_iterable(texts.values()))
        self.first = np.cumsum([0, *map(len, texts.values())])   # image i's first text
        self.fingerprint = hash_of([self.names.buffer, self.names.ends, self.texts.buffer,
                                    self.texts.ends, self.first])

    def _read_tables(self, source, images, column):
        """(the tables in `source`, read until every image has a caption; {file that may hold
        captions all the same: why it gave none})."""
        numbers = {name: k for k, name in enumerate(source.names)
                   if name.lower().endswith(TEXT_SUFFIXES + UNREAD)}
        groups, tables, unread, covered = {}, [], {}, set()
        for name in sorted(numbers, key=reading_order):
            stem, suffix = os.path.splitext(os.path.basename(name))
            is_beside = (suffix.lower() in SIDECARS and not USUAL.fullmatch(name)
                         and images.find(stem, name) is not None)
            groups.setdefault(suffix.lower() if is_beside else name, []).append(name)
        for kind, files in groups.items():
            if len(covered) == len(images.names):
                break
            table, name, start = Table(kind, files), files[0], None
            try:
                if kind == ".json" or kind.lower().endswith(UNREAD):   # .json: of img2dataset
                    raise LookupError("not read")
                for name in files:
                    file = source.open(numbers[name])
                    with io.TextIOWrapper(file, "utf-8-sig", "replace", newline="") as text:
                        start = text.read(4096)
                        text.seek(0)
                        table.read(images, name, text, column)
                if not table.captions:
                    raise LookupError(such_as("names without image or caption", table.numbers))
                tables.append(table)
                covered.update(table.captions)
            except Exception as error:   # csv, json and zlib have a dozen kinds for damage
                reason = f"line {table.line}: {error}"[:200] if table.line else str(error)
                # LookupError alone: no captions file. Its kin, such as KeyError, are damage.
                if type(error) is not LookupError and (table.is_beside or USUAL.fullmatch(name)):
                    raise ValueError(f"--data {self.path}: {name} is not as expected: "
                                     f"{type(error).__name__}: {reason}") from None
                words = re.findall(r"[\w./-]{4,}", start or "")
                if start is None or table.numbers or set(map(images.find, words)) - {None}:
                    unread[name] = reason
        return tables, unread

    def _class_table(self, images, template, unread):
        """Captions from --caption-template. Raises: ValueError where the folders' names may be no
        captions and the template was not given by hand."""
        used = "a photo of a {}" if template is None else template
        table, classes, reason = Table(f"--caption-template {used!r}"), {}, None
        for number, (split, word) in images.places.items():
            # kohya's 10_dog and Caltech's 001.dog are dogs; a shard's name is no class.
            word = re.sub(r"^\d+[._](?=\D)|.*\.tar$", "", word)
            classes.setdefault(word, set()).add(os.path.basename(images.names[number]))
            table.captions[number] = [one_line(used.replace("{}", word.replace("_", " ")))]
            table.splits[number] = split
        if unread and template is None:
            reason = "{} may hold them ({})".format(*next(iter(unread.items())))
        elif "{}" in used and ("" in classes or len(classes) < 2):
            reason = f"{min(classes[min(classes)])} is in no folder of one class among others"
        elif template is None and len(set(map(frozenset, classes.values()))) == 1:
            reason = "the folders hold files of the same names, as masks do"
        if reason:
            raise ValueError(f"--data {self.path}: no captions: {reason}; {HOW}")
        return table

    def _report(self, images, taken, texts, splits, max_missing):
        """{title: what was understood}. Raises: ValueError where too many captions are lost."""
        left_out = []
        for table in taken:
            for (what, fix), examples in table.faults.items():
                left_out.append(such_as(what, examples))
                if fix and len(examples) > max_missing * (len(texts) + len(examples)):
                    raise ValueError(f"--data {self.path}: {table.name}: {left_out[-1]}; {fix}, or "
                                     f"allow more with --max-bad-images, {max_missing} now")
        without = [self.files.names[k] for k in images.names if k not in texts]
        used = set(chain.from_iterable(table.files for table in taken))
        aside = [name for k, name in enumerate(self.files.names)
                 if k not in images.names and name not in used]
        aside.sort(key=lambda name: not name.lower().endswith(TEXT_SUFFIXES))
        left_out += [such_as("images without a caption", without)] if without else []
        left_out += [such_as("other files", aside)] if aside else []
        count, kinds = sum(map(len, texts.values())), Counter(splits.values())
        report = {"captions": f"{count:,} of {', '.join(table.name for table in taken)}, "
                              f"{count / len(texts):.3g} an image, such as "
                              f"{next(iter(texts.values()))[0]!r}"}
        if len(kinds) > 1:
            report["splits"] = (f"the data's own: {kinds['train']:,} images to train on, "
                                f"{kinds['val']:,} to validate on, {kinds['test']:,} left out")
        return report | ({"left out": "; ".join(left_out)} if left_out else {})

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
                with self.files.open(i) as file:
                    return use(file)
            except Exception as error:   # Pillow and zipfile raise a dozen kinds on damaged bytes
                if os.path.exists(self.path) and getattr(error, "errno", None) not in OUT_OF_REACH:
                    raise UnreadableImage(f"--data {self.path}: {self.names[i]!r} cannot be read "
                                          f"as an image ({error}); repair or remove it") from None
                warnings.warn(f"--data {self.path}: out of reach ({error}); trying again for a "
                              "minute", stacklevel=2)
            open_archive.cache_clear()
            time.sleep(wait)
        raise OSError(f"--data {self.path}: out of reach for a minute; bring it back and go on "
                      "with --resume")


def read_image(file, channels, side, place=(0.5, 0.5)):
    """A square crop of a picture, side x side pixels, mode "RGB" (channels 3) or "L" (1).

    The short side is scaled to `side` with antialiasing; `place` says where along the long side the
    crop lies, from 0 (left or top) to 1. Transparent pictures are laid on white, deeper ones scaled
    to 8 bits, EXIF rotation and colour profiles applied.
    """
    image = Image.open(file, formats=FORMATS)
    image.draft("RGB", (2 * side, 2 * side))   # JPEG: decode small, never below twice the target
    image = in_srgb(ImageOps.exif_transpose(image))
    if image.mode[0] in "IF":
        image = Image.fromarray(in_8_bits(np.asarray(image), image.mode))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB" if channels == 3 else "L")
    short = min(image.size)
    left, top = ((length - short) * share for length, share in zip(image.size, place))
    box = (left, top, left + short, top + short)
    return image.resize((side, side), Image.BICUBIC, box=box, reducing_gap=3.0)


def in_srgb(image):
    """The picture as a viewer shows it: colours of another profile, such as a phone's Display P3,
    are converted."""
    with suppress(ImageCms.PyCMSError, OSError):   # a damaged profile counts as none
        profile = ImageCms.ImageCmsProfile(io.BytesIO(image.info.get("icc_profile") or b""))
        is_fit = profile.profile.xcolor_space.strip() == image.mode.removesuffix("A")
        if is_fit and "sRGB" not in ImageCms.getProfileDescription(profile):
            mode = "RGB" if image.mode == "CMYK" else image.mode
            return ImageCms.profileToProfile(image, profile, SRGB, outputMode=mode)
    return image


def in_8_bits(values, mode):
    """Grey values of more bits as uint8: of [0, 1], [-1, 1], [0, 255] or [0, 65535]; what the range
    is can be told from the values, but those of 16-bit files always use all of theirs."""
    low, high = np.nanmin(values), np.nanmax(values)
    if mode == "F" and high < 2:   # resizing may overshoot a little
        values = 255 * (values if low > -0.25 else (values + 1) / 2)
    elif high > 255 or mode.startswith("I;"):
        values = values / 257
    return np.nan_to_num(values).round().clip(0, 255).astype(np.uint8)


def is_builtin(data):
    """Whether --data names the built-in pictures."""
    return data == "shapes"


def open_source(data, resolution, *how):
    """The images and captions that --data names: "shapes", or see CaptionedImages for the rest.

    Every source has a length, `texts` (all captions), `captions(i)`, `image(i, ...)`, `content(i)`,
    a `fingerprint` of its names and captions, the numbers of the data's own `validation` images,
    and a `report` of what was understood.
    """
    return BuiltinShapes(resolution) if is_builtin(data) else CaptionedImages(data, *how)


# Training samples


def split_images(source, val_fraction):
    """(training, validation) image numbers, ascending: the data's own split or a fixed random one
    that depends on the count alone, not on the seed."""
    count, held = len(source), source.validation
    if not len(held):
        held = counter_rng("split", count).permutation(count)[:round(count * val_fraction)]
    return np.setdiff1d(np.arange(count), held), np.sort(held if val_fraction else held[:0])


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
    for number in images.take(range(start, start + most), mode="wrap").tolist():
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
    """A DataLoader over prepared batches of keys, with torch's default collate. Its workers, once
    started, stay; a batch that does not come is noticed before the other ranks end the run."""
    context, ahead, timeout = ("fork", 4, 0.9 * RANK_TIMEOUT) if workers else (None, None, 0)
    return DataLoader(samples, batch_sampler=batches, num_workers=workers, prefetch_factor=ahead,
                      multiprocessing_context=context, persistent_workers=workers > 0,
                      pin_memory=torch.device(device).type == "cuda", timeout=timeout,
                      worker_init_fn=start_worker)


def start_worker(_):
    """A job's signals reach every process, but loader workers end when the main process does."""
    gc.freeze()   # else collecting garbage writes to, and so copies, what was there at the fork
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
    everything = np.arange(count)
    for leftover in folder.glob(".*.tmp") if rank == 0 else ():
        with suppress(FileNotFoundError):   # of a killed job: a file is written in seconds
            if time.time() - leftover.stat().st_mtime > 3600:
                leftover.unlink()
    shape, load_image = (1 + flip, 2, *latent_shape), image_loader(source, config)
    files = {folder / f"latents_{k:05d}.npy": numbers
             for k, numbers in enumerate(in_batches(range(count), size))}
    # One answer for all, also where another job is at work.
    missing = gather([p for p in files if open_latents(p, len(files[p]), shape) is None])[0]
    needed = 2 * int(np.prod(shape)) * sum(len(files[path]) for path in missing)
    if needed > (free := shutil.disk_usage(folder).free):
        raise ValueError(f"--cache-latents {folder}: needs {needed / 2**30:.1f} GiB, "
                         f"{free / 2**30:.1f} GiB are free; name another folder")

    def load_or_next(i):
        number, loaded = first_readable(load_image, everything, i)
        return dict(loaded, number=i, readable=number == i)

    batches = {path: in_batches(files[path], batch_size) for path in missing[rank::ranks]}
    loader = iter(make_loader(OnDemand(load_or_next), [*chain(*batches.values())], workers=workers))
    # Ranks write a file each and then wait for each other, so that nobody waits for long.
    for start in tqdm(range(0, len(missing), ranks), desc="caching latents", unit="file",
                      disable=rank > 0 or not missing):
        for path in missing[start:start + ranks][rank:rank + 1]:
            moments = [encoded(encode, next(loader), flip) for _ in batches[path]]
            write(path, lambda file: np.save(file, np.concatenate(moments)))
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
    if (gpus or device == "cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: PyTorch cannot use a GPU here; install a build for "
                         "the CUDA version that nvidia-smi shows, or use --device cpu")
    fix = f"start with torchrun --nproc_per_node={gpus}"
    if gpus and local_size > gpus:
        raise ValueError(f"--nproc_per_node={local_size}: only {gpus} GPUs are visible here; {fix}")
    if gpus > local_size and local_rank == 0:
        warnings.warn(f"{gpus} GPUs visible, {local_size} in use: {fix}", stacklevel=2)
    device = torch.device("cuda", local_rank) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
        major, minor = torch.cuda.get_device_capability(device)
        oldest = min(map(int, re.findall(r"sm_(\d+)", str(torch.cuda.get_arch_list()))), default=0)
        if 10 * major + minor < oldest:
            raise ValueError(f"--device {device}: is sm_{major}{minor}; PyTorch is built for "
                             f"sm_{oldest} and newer: install one for CUDA 12.6")
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    elif "OMP_NUM_THREADS" not in env or "TORCHELASTIC_RUN_ID" in env:   # torchrun sets it to 1
        torch.set_num_threads(max(1, available_cores() // local_size))
    if not dist.is_initialized():   # a notebook may call main() twice
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        alone = {} if "RANK" in env else dict(store=dist.HashStore(), rank=0, world_size=1)
        dist.init_process_group(backend, timeout=timedelta(seconds=RANK_TIMEOUT), **alone)
    return device


def gather(value):
    """Every rank's value, any picklable object, in a list on every rank. Also a barrier."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


# What may go wrong with validation and samples without ending a run.
SPARED = torch.OutOfMemoryError, FloatingPointError


@contextmanager
def all_or_none():
    """Around what each rank does by itself. Raises: SPARED, on all ranks where it is raised on any,
    so that none waits for another."""
    error = None
    try:
        yield
    except SPARED as caught:
        error = type(caught), str(caught)
    for kind, text in filter(None, gather(error)):
        raise kind(text)


def in_batches(numbers, batch_size):
    return [numbers[start:start + batch_size] for start in range(0, len(numbers), batch_size)]


def rank_batches(count, batch_size):
    """This rank's numbers of 0, 1, ... count - 1 in batches. Number i belongs to rank i mod
    world_size, so that each is on exactly one rank."""
    return in_batches([*range(dist.get_rank(), count, dist.get_world_size())], batch_size)


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


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows every default that is a value."""

    def _get_help_string(self, action):
        has_none = action.default in (None, [], "")
        return action.help if has_none else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are said like all others: once, from rank 0."""

    def __init__(self, description, **more):
        super().__init__(description=description, usage="%(prog)s [flags]",
                         formatter_class=HelpFormatter, **more)

    def error(self, message):
        raise ValueError(f"{message}; {self.prog} --help lists the flags")


LOST = "(Dist.*Error|gloo|NCCL|pair closure|closed by peer)"
ADVICE = {   # by what a library says, and where; the first that fits
    "OutOfMemory|can't allocate memory": "a smaller --batch-size takes less memory and, in "
        "training, more --accumulation or --gradient-checkpointing",
    "DataLoader timed out|shared memory": "the data hang, or /dev/shm is too small (see df "
        "/dev/shm; docker run --shm-size=8g); --workers 0 does without it",
    f"(setup_processes|prepare_network): .*{LOST}": "the processes did not find each other at the "
        "start: each needs a GPU of its own, a free port and a host name that all can reach",
    LOST: "it lost another process, which died or hangs; go on with --resume"}


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
        calls = [call.name for call in traceback.extract_tb(error.__traceback__)
                 if Path(call.filename).parent == Path(__file__).parent]
        # An error in a loader worker carries that process's traceback; its last line says it.
        said = text.splitlines()[-1] if text.startswith("Caught ") else " ".join(text.split())[:600]
        said = f"rank {rank} in {' > '.join(calls[1:])}: {type(error).__name__}: {said}"
        advice = [fix for pattern, fix in ADVICE.items() if re.search(pattern, said)]
        if isinstance(error, RuntimeError) and advice:
            text = f"{said}; {advice[0]}"
        elif not isinstance(error, (ValueError, OSError, FloatingPointError)):
            code, text = 1, traceback.format_exc()
        if rank and code == 2:
            # Every rank meets the same mistake; the first exit makes torchrun stop the others.
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        tqdm.write(f"error: {text.splitlines()[-1]}" if code == 2 else text, sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # Taking gloo down may hang (PyTorch 2.7), and Python's end with gloo up may abort: do neither.
    os._exit(code)

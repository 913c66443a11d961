"""From files to batches: samples, their order, latent cache, processes, built-in data, captions.

A training sample is a pure function of (seed, epoch, position in the epoch's global order): its
image, caption, crop, flip, timestep and noise all come from one generator seeded with these
counters. So there is no loader state to save, a resumed run continues exactly, and one process and
eight see the same samples with the same noise.

Images leave this file as uint8 (B, H, W, c); `to_unit_range` makes them (B, c, H, W) in [-1, 1] on
the device.
"""
import argparse
import atexit
import csv
import ctypes
import errno
import gc
import hashlib
import io
import json
import multiprocessing
import os
import re
import signal
import sys
import tarfile
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
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

# How long a rank may keep the others waiting, as it writes or hangs, before all end.
RANK_TIMEOUT = float(os.environ.get("RANK_TIMEOUT_SECONDS", 600))
AMP, DEVICES = ("auto", "bf16", "fp16", "off"), ("auto", "cuda", "cpu")   # choices of flags
# With these a job is asked to stop; they reach all of its processes.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
# A stream's place is part of its seed, so new ones go to the end.
STREAMS = ("sample", "order", "split", "validation", "sampling", "shapes", "evaluation", "dropout")


def counter_rng(stream, *counters):
    """A numpy Generator that depends on the named stream and the integer counters alone."""
    return np.random.default_rng((1 + STREAMS.index(stream), *counters))


# Training samples


class Samples(Dataset):
    """Everything that training needs of one sample, drawn from the sample's own counters."""

    def __init__(self, load, captions, images, config, latent_shape, seed=0, flip=False,
                 validation=False):
        """load(i, mirror): see image_loader and cache_latents; captions(i): all of image i.
        `images`: the numbers of the split, ascending. With `validation` these are the fixed
        validation samples: no caption is dropped, and t is spread evenly over [0, T)."""
        self.load, self.captions, self.images, self.config = load, captions, images, config
        self.latent_shape, self.validation = latent_shape, validation
        self.seed, self.flip = seed, flip

    def __getitem__(self, key):
        """key: (epoch, position, image number). Returns a dict of image uint8 (H, W, c) or moments
        float16 (2, C, h, w); caption; t; eps and, with a VAE, posterior_eps float32 (C, h, w).
        Where an image cannot be read, the next that can takes its place."""
        epoch, position, index = key
        rng = (counter_rng("validation", position) if self.validation
               else counter_rng("sample", self.seed, epoch, position))
        # One number for each choice, used or not, so that no flag shifts another choice.
        u_caption, u_drop, _, _, u_mirror, u_t = rng.random(6)
        mirror = self.flip and u_mirror < 0.5
        number, loaded = first_readable(lambda i: self.load(i, mirror), self.images, index)
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
        return dict(loaded, **normals, caption=caption,
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
            fitting = [n for n in range(1, batch_size + 1) if batch_size % (n * accumulation) == 0]
            raise ValueError(f"--batch-size {batch_size}: must be a multiple of processes x "
                             f"--accumulation = {ranks} x {accumulation}, such as {parts}; it fits "
                             f"{', '.join(map(str, fitting)) or 'no number of'} processes")
        if len(images) < batch_size:
            raise ValueError(f"--batch-size {batch_size}: there are only {len(images)} training "
                             f"images; use at most {len(images) // parts * parts}")
        self.images, self.batch_size, self.accumulation = images, batch_size, accumulation
        self.micro_batch, self.steps_per_epoch = batch_size // parts, len(images) // batch_size
        self.seed, self.epoch, self.first_step = seed, 0, 0

    def start_at(self, epoch, step):
        """The next iteration begins at this step of this epoch."""
        self.epoch, self.first_step = epoch, step

    def dropout_seed(self, step, micro):
        """Of a micro-batch of update number `step`: the same wherever the same samples meet."""
        part = dist.get_rank() * self.accumulation + micro
        return int(counter_rng("dropout", self.seed, step, part).integers(2**63))

    def __len__(self):
        return (self.steps_per_epoch - self.first_step) * self.accumulation

    def __iter__(self):
        order = counter_rng("order", self.seed, self.epoch).permutation(self.images)
        steps = range(self.first_step, self.steps_per_epoch)
        for step, micro in product(steps, range(self.accumulation)):
            part = dist.get_rank() * self.accumulation + micro
            start = step * self.batch_size + part * self.micro_batch
            yield [(self.epoch, k, int(order[k])) for k in range(start, start + self.micro_batch)]


def image_loader(source, config):
    """load(i, mirror): image i as dict(image=uint8 (H, W, c)). Raises: UnreadableImage."""
    side, channels = config.resolution, config.image_channels

    def load(i, mirror=False):
        pixels = np.array(source.image(i, channels, side)).reshape(side, side, channels)
        return dict(image=pixels[:, ::-1].copy() if mirror else pixels)

    return load


def first_readable(load, images, index):
    """(number, load(number)) of image `index` or, where it cannot be read, of the first after it in
    the ascending array `images` that can: a choice of the data alone. Raises: ValueError."""
    start, most = np.searchsorted(images, index), min(100, len(images))
    for number in images.take(range(start, start + most), mode="wrap").tolist():
        try:
            return number, load(number)
        except UnreadableImage as error:   # Python says it once for each image and process
            warnings.warn(f"{error}; the next takes its place", stacklevel=2)
            reason = error
    raise ValueError(f"none of {most} images in a row can be read; the last: {reason}")


def split_images(source, val_fraction):
    """(training, validation) image numbers, ascending: the data's own split or a fixed random one
    that depends on the count alone, not on the seed."""
    count, held = len(source), source.validation
    if not len(held):
        held = counter_rng("split", count).permutation(count)[:round(count * val_fraction)]
    return np.setdiff1d(np.arange(count), held), np.sort(held if val_fraction else held[:0])


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
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    if sys.platform == "linux":   # the kernel ends it with its parent: PR_SET_PDEATHSIG
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


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


# Whoever reads for the method may stop here. The rest makes it fast, on many processes, from any
# files. Captions come last.


# Hashes of what a cache or a record depends on


def hash_of(parts):
    """SHA-256 of byte strings and arrays, or of anything that JSON can hold, one after another."""
    digest = hashlib.sha256()
    for part in parts:
        is_bytes = isinstance(part, (bytes, np.ndarray))
        digest.update(part if is_bytes else json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()


def hash_of_weights(module):
    return hash_of(t.cpu().numpy().tobytes() for _, t in sorted(module.state_dict().items()))


def hash_of_code():
    """Of what pictures and figures depend on."""
    names = ("models.py", "data.py", "sample.py", "evaluate.py")
    return hash_of(Path(__file__).with_name(name).read_bytes() for name in names)


# Latents, encoded once


class OnDemand(Dataset):
    """get(i) for any i, as a data set."""

    def __init__(self, get):
        self.get = get

    def __getitem__(self, i):
        return self.get(i)


def cache_latents(folder, source, config, latent_shape, encode, write, flip=False, workers=0,
                  batch_size=16):
    """load(i, mirror): the latents of image i as dict(moments=float16 (2, C, h, w)).

    All images are encoded once, with `flip` mirrored too, into memory-mapped files of some hundred
    images each. Files appear under their names when they are complete, so a killed job loses one
    file a rank, and jobs that start together do no harm. encode: uint8 (B, H, W, c) to mean and
    standard deviation, each (B, C, h, w); write(path, fill) lets fill(file) write atomically.
    Raises: OSError where the disk is full, ValueError where a latent is not finite.
    """
    count, rank, ranks = len(source), dist.get_rank(), dist.get_world_size()
    size = min(256, max(16, count // 64))   # images a file: depends on the count alone
    everything = np.arange(count)
    shape, load_image = (1 + flip, 2, *latent_shape), image_loader(source, config)
    files = {folder / f"latents_{k:05d}.npy": numbers
             for k, numbers in enumerate(in_batches(range(count), size))}
    # One answer for all, also where another job is at work.
    missing = gather([p for p in files if open_latents(p, len(files[p]), shape) is None])[0]

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

    def load(i, mirror=False):
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
    with suppress(FileNotFoundError, ValueError, EOFError):
        chunk = np.load(path, mmap_mode="r", allow_pickle=False)
        return chunk if (chunk.shape, chunk.dtype) == ((count, *shape), np.float16) else None


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


def available_cores():
    """CPU cores that this process may use: on a cluster the allocation's, not the machine's."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores, int(os.environ.get("SLURM_CPUS_ON_NODE") or cores))


def default_workers():
    """Loader processes per rank: the rank's cores less one, at most 8."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(0, min(8, available_cores() // ranks - 1))


def amp_dtype(choice, device):
    """The autocast dtype, or None for float32. auto: bfloat16 where all GPUs compute in it, else
    float16 (a V100); float32 on CPUs."""
    if choice == "auto" and device.type == "cuda":
        oldest = min(gather(torch.cuda.get_device_capability(device)))
        choice = "bf16" if oldest >= (8, 0) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(choice)


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are said like all others: once, from rank 0."""

    def __init__(self, description, **more):
        super().__init__(description=description, usage="%(prog)s [flags]",
                         formatter_class=argparse.ArgumentDefaultsHelpFormatter, **more)

    def error(self, message):
        raise ValueError(f"{message}; {self.prog} --help lists the flags")

    def add_options(self, options, title=None):
        """A flag for each of these fields of a dataclass, of which the first of a group has its
        title. What is not given is left out of what parse_args returns."""
        add = self.add_argument_group(title).add_argument if title else None
        for option in filter(lambda option: option.metadata, options):
            more = dict(option.metadata)
            if "title" in more:
                add = self.add_argument_group(more.pop("title")).add_argument
            if option.default not in (None, ""):
                more["help"] += f" (default: {option.default})"
            kind = (dict(action=argparse.BooleanOptionalAction) if option.type is bool
                    else dict(type=option.type))
            name = f"--{option.name.replace('_', '-')}"
            add(name, default=argparse.SUPPRESS, **kind | more)


def run_main(main):
    """Run a script's main() and end the process. A user's mistake becomes one line from rank 0 and
    exit code 2, and no rank is left waiting."""
    warnings.showwarning = lambda message, *_: tqdm.write(f"warning: {message}", sys.stderr)
    code, rank = 0, int(os.environ.get("RANK", 0))
    try:
        main()
    except KeyboardInterrupt:
        code = 130
    except SystemExit as exit:   # argparse's
        code = exit.code or 0
    except (ValueError, OSError, FloatingPointError) as error:
        code = 2
        if rank:   # all ranks meet the same mistake; the first exit makes torchrun stop them
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)
        tqdm.write(f"error: {str(error).strip().splitlines()[-1]}", sys.stderr)
    except Exception:
        code = 1
        tqdm.write(f"rank {rank}: {traceback.format_exc()}", sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # Taking gloo down may hang (PyTorch 2.7), and Python's end with gloo up may abort: do neither.
    os._exit(code)


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


def jitter(rng):
    """A place near the middle, as fractions of the picture's side."""
    return 0.5 + rng.uniform(-JITTER, JITTER, size=2)


def draw(scene, resolution, place):
    """The scene as an RGB picture, resolution x resolution, the thing at place (x, y) in [0, 1].

    Drawn at eight times the resolution and averaged down, so that edges are smooth and positions
    are not whole pixels.
    """
    side = 8 * resolution
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    corners = outline(scene.shape, side * place[0], side * place[1], side * SIZES[scene.size])
    ImageDraw.Draw(canvas).polygon(corners, fill=COLOURS[scene.colour])
    return canvas.reduce(8)


class BuiltinShapes:
    """Pictures of the trained scenes with their captions, drawn once and kept in memory."""

    fingerprint, validation, report = "built-in", (), {}

    def __init__(self, resolution, count=8192):
        scenes = [scene for scene in SCENES if not is_held_out(scene)]
        self.texts = [scene.caption for scene in scenes]
        self.scenes = counter_rng("shapes", 0, 0).permutation(count) % len(scenes)
        self.pictures = np.stack([draw(scenes[k], resolution, jitter(counter_rng("shapes", 1, i)))
                                  for i, k in enumerate(self.scenes)])

    def __len__(self):
        return len(self.scenes)

    def captions(self, i):
        return [self.texts[self.scenes[i]]]

    def identity(self):
        return hash_of([self.pictures])

    def image(self, i, channels, side):
        return self.pictures[i] if channels == 3 else Image.fromarray(self.pictures[i]).convert("L")


# Captioned images on disk

# Formats are told by content; others, such as PostScript, may run programs.
SUFFIXES = {suffix: kind for suffix, kind in Image.registered_extensions().items()
            if kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")}
IMAGE_SUFFIXES, FORMATS = tuple(SUFFIXES), sorted(set(SUFFIXES.values()))
SIDECARS = (".txt", ".caption")   # beside an image of the same name
TEXT_SUFFIXES = (*SIDECARS, ".csv", ".tsv", ".token", ".json", ".jsonl", ".ndjson")
# The file system's fault, not the file's.
OUT_OF_REACH = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN)


class UnreadableImage(ValueError):
    """A picture that is missing, damaged or hostile."""


class PackedStrings:
    """Strings end to end in one byte string. Forked loader workers would copy a list of them."""

    def __init__(self, strings):
        encoded = [string.encode("utf-8", "surrogateescape") for string in strings]
        self.buffer, self.ends = b"".join(encoded), np.cumsum([0, *map(len, encoded)])

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


@lru_cache(maxsize=64)
def own_file(path, process):
    """Forked loader workers must not share a position in an archive's file."""
    return open(path, "rb")


def archive_files(path):
    """(name, where it lies) of the files in a .zip or .tar: a ZipFile and its member, or a .tar's
    path and (offset, size). A set may have more .tar shards than a process may have open files."""
    if zipfile.is_zipfile(path) and not tarfile.is_tarfile(path):   # a .tar may end in a .zip
        archive = zipfile.ZipFile(own_file(path, os.getpid()))   # which it does not close
        for member in archive.infolist():
            name = member.filename
            with suppress(UnicodeError):   # often it is UTF-8 and not marked as such
                name = name if member.flag_bits & 0x800 else name.encode("cp437").decode()
            yield name, (archive, member)
        return
    with tarfile.open(path, "r:") as archive:
        for member in archive:
            if member.size < 0:   # Python would go round for ever
                raise ValueError(f"{member.name} has a negative size")
            is_plain = member.isreg() and not member.issparse()
            yield member.name + "/" * (not is_plain), (path, (member.offset_data, member.size))
        archive.fileobj.seek(archive.offset)   # Python takes what it cannot read for the end
        if archive.fileobj.read(512) != bytes(512):
            raise ValueError(f"damaged or cut off at byte {archive.offset:,}")


class Files:
    """The files of a folder, a .zip, a .tar or a folder of .tar shards, by number. Archives are
    read in place."""

    def __init__(self, path, flag="--data"):
        self.root, shards = Path(path), []
        own_file.cache_clear()   # in a notebook an archive may be written anew
        try:
            if self.root.is_dir():
                found = dict.fromkeys(folder_files(str(self.root)))
                if not any(name.lower().endswith(IMAGE_SUFFIXES) for name in found):
                    shards = [name for name in found if name.lower().endswith(".tar")]
            elif self.root.suffix.lower() in TEXT_SUFFIXES:   # captions alone
                self.root, found = self.root.parent, {self.root.name: None}
            else:
                found = dict(archive_files(self.root))
            for shard in shards:
                found.update((f"{shard}/{name}", member)
                             for name, member in archive_files(self.root / shard))
        except Exception as error:   # zipfile and tarfile raise a dozen kinds on damaged bytes
            raise ValueError(f"{flag} {path}: no folder, whole .zip or .tar (unpack a compressed "
                             f"one): {error}") from None
        found = {name.replace("\\", "/").removeprefix("./"): file for name, file in found.items()
                 if name not in shards}
        # Without folders and hidden files. By name, so that a .zip gives the samples of its folder.
        self.names = sorted((name for name in found
                             if not re.search(r"(^|/)(\.|__MACOSX)|/$", name)),
                            key=lambda name: name.split("/"))
        self.members = [found[name] for name in self.names]   # None: a file of the folder

    def keep(self, numbers):
        """Forget all other files, and number these anew."""
        self.names = PackedStrings(self.names[k] for k in numbers)
        self.members = [self.members[k] for k in numbers]

    def size(self, number):
        """In bytes; of a .zip's member its checksum as well, of a dead link nothing."""
        if self.members[number]:
            member = self.members[number][1]
            return member[1] if isinstance(member, tuple) else [member.file_size, member.CRC]
        path = self.root / self.names[number]
        return path.stat().st_size if path.exists() else None

    def open(self, number):
        """A file for reading bytes. Nothing but the listed files is ever opened."""
        if self.members[number] is None:
            path = self.root / self.names[number]
            if path.exists() and not path.is_file():   # a pipe would be waited for
                raise ValueError("no ordinary file")
            return open(path, "rb")
        archive, member = self.members[number]
        if isinstance(archive, zipfile.ZipFile):
            archive.fp = own_file(archive.filename, os.getpid())
            return archive.open(member)
        file, (offset, size) = own_file(archive, os.getpid()), member
        file.seek(offset)
        return io.BytesIO(file.read(size))


# Captions. The rules, so that nothing is guessed:
# 1. Captions are in tables, in JSON or in text files, each named as its image is, one caption a
#    line. A table has one column of images and one of captions, which may be numbered, as in
#    caption_0 to caption_4; where it has others, --caption-column chooses.
# 2. An image is found by its path from the file, or by the end of a path that only one image has;
#    no written folder may contradict. Its suffix may lack.
# 3. Files that give one image different captions are refused.
# 4. Folders' names are captions only if --caption-template says so.
# 5. Where there are no captions, the files that may hold some are named.

SPLITS = {word: split for split, words in dict(
    train="train training restval", val="val valid validation dev",
    test="test testing pred unlabeled").items() for word in words.split()}
# Columns of tables and keys of JSON: the first of these, and all captions of one word.
IMAGE_KEYS = ("file_name", "filename", "image", "image_name", "image_path", "img", "img_path",
              "filepath", "file_path", "path", "file", "name", "image_id", "id", "key")
CAPTION_KEY = re.compile("(captions?|text|prompt|sentences?|raw|title|description|comment)"
                         r"(_?\d+)?")
# Files that are read first and must not be damaged. Other .json files may be huge: they are read
# where captions lack.
USUAL = re.compile("caption|metadata", re.IGNORECASE)
LOST = ("rows whose image is not there, in several places or under two names, or that are broken: "
        "too few or too many columns, a stray quote")
HOW = ("put a.txt beside a.png, or give --captions FILE, --caption-column NAME, --caption-template "
       "'a photo of a {}' ({} is an image's folder; without {} it is every image's caption); "
       "name a .zip itself, unpack a .tar.gz; for other kinds see README.md's recipe")


@lru_cache
def split_of(name):
    """"train", "val" or "test" where a name says so, such as seg_train or captions_val2017."""
    words = re.findall("[a-z]+", name.lower())
    return next((SPLITS[word] for word in words if word in SPLITS), None)


def splits_and_classes(folders):
    """{folder: (its split or None, its class or "")}, both of the innermost folders.

    Folders beside one another are splits where all of their names are, or names of two splits are
    among them, so that `train` among `bus` and `car` stays a class. Others are classes.
    """
    levels = {folder: [*reversed(PurePosixPath(folder, "_").parents)][1:] for folder in folders}
    places, beside = {}, {}   # the splits that the names of the folders in a folder stand for
    for path in chain.from_iterable(levels.values()):
        beside.setdefault(path.parent, set()).add(split_of(path.name))
    for folder, level in levels.items():
        split, word = None, ""
        for path in level:
            splits = beside[path.parent]
            is_split = None not in splits or len(splits) > 2 and split_of(path.name)
            split, word = (split_of(path.name), word) if is_split else (split, path.name)
        places[folder] = split, word
    return places


def stem_of(path):
    """A path without the suffix of an image."""
    return path[:path.rfind(".")] if path.lower().endswith(IMAGE_SUFFIXES) else path


class ImageNames:
    """Finds images, by their numbers among all files, from what captions files call them."""

    def __init__(self, names):
        self.names = {k: unicodedata.normalize("NFC", name.strip()) for k, name in enumerate(names)
                      if name.lower().endswith(IMAGE_SUFFIXES)}
        self.folders = splits_and_classes({os.path.dirname(name) for name in self.names.values()})
        self.by_stem = {}
        for number, name in self.names.items():
            self.by_stem.setdefault(stem_of(os.path.basename(name)), []).append(number)

    def place(self, number):
        """What its folders say: (split or None, class or "")."""
        return self.folders[os.path.dirname(self.names[number])]

    def find(self, written, file=""):
        """The number of the image that a captions file calls so, or None. Where images lie beside
        the file no others are meant."""
        file, written = (unicodedata.normalize("NFC", path.strip().replace("\\", "/"))
                         for path in (file, written))
        folder, written = os.path.dirname(file), written.removeprefix("./")
        here = f"/{folder}".rstrip("/")
        for form in (str, stem_of):   # with its suffix, or else without
            meant, found = f"/{form(written)}", {}
            for number in self.by_stem.get(stem_of(os.path.basename(written)), ()):
                listed = f"/{form(self.names[number])}"
                is_near = folder not in self.folders or listed.startswith(f"{here}/")
                if is_near and (listed.endswith(meant) or meant.endswith(listed)):
                    # Best by the path from the file, else from the root, else by the path's end.
                    found.setdefault((listed != here + meant, listed != meant), []).append(number)
            if found:
                best = found[min(found)]
                return best[0] if len(best) == 1 else None
        return None


def pick_keys(keys, column):
    """(key of the image, keys of its captions) of a row. Raises: LookupError where there are none,
    or captions of several kinds."""
    image = next((key for key in IMAGE_KEYS if key in keys), None)
    named = CAPTION_KEY.fullmatch if column is None else column.lower().__eq__
    captions = [*filter(named, keys)]
    if image is None or len({key.rstrip("_0123456789") for key in captions}) != 1:
        found = f"images {image}, captions {' and '.join(captions) or None}"
        raise LookupError(f"of the columns {', '.join(keys)[:80]}: {found}; such as image and "
                          "caption are needed, and --caption-column chooses")
    return image, captions


def one_line(text):
    """A caption as it is trained on. JSON and names of folders may hold half letters."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def texts_in(value):
    """The captions in a cell: text, a list of texts or, as in Karpathy's files, {"raw": text}, each
    in one line. Raises: LookupError where it is none of these."""
    if isinstance(value, dict) and "raw" in value:
        value = value["raw"]
    if isinstance(value, str) and not value.startswith(("['", '["', "[{", "{")):
        return [one_line(value)]
    if value is None or value != value:
        return []
    if not isinstance(value, list):
        raise LookupError(f"{str(value)[:40]} is no caption")
    return [text for item in value for text in texts_in(item)]


def json_rows(text, is_whole):
    """Rows of JSON lines or, as a whole, of a list of objects, alone or as "images", of COCO's
    annotations, or of a map {image: its captions}."""
    if not is_whole:
        return map(json.loads, filter(str.strip, text.split("\n")))
    content = json.loads(text)
    if "annotations" in content and "images" in content:
        names = {str(image["id"]): image["file_name"] for image in content["images"]}
        return [dict(image=names.get(str(note["image_id"]), ""), caption=note.get("caption"))
                for note in content["annotations"]]
    return content if isinstance(content, list) else content.get("images") or [
        dict(image=name) | (value if isinstance(value, dict) else dict(caption=value))
        for name, value in content.items()]


def table_rows(text, find):
    """Rows of comma-, semicolon-, tab- or pipe-separated lines below a header, or of Flickr's
    `image.jpg#0<TAB>caption`, which have none; {} for a broken row. Raises: LookupError where the
    header is missing."""
    lines = io.StringIO(text, newline="")
    header, quoting = next(lines, ""), csv.QUOTE_MINIMAL
    comma = next((delimiter for delimiter in "\t|;" if delimiter in header), ",")
    keys = [key.strip().lower() for key in next(csv.reader([header], delimiter=comma)) or [""]]
    if re.match(r"[^\t]+\.\w+#\d+\t", header):
        lines, keys, quoting = chain([header], lines), ["image", "caption"], csv.QUOTE_NONE
    elif (keys[0] not in IMAGE_KEYS and find(keys[0]) is not None
          or max(Counter(filter(None, keys)).values(), default=0) > 1):
        raise LookupError("its first line is no header of different names, such as image,caption")
    for row in csv.DictReader(lines, keys, strict=True, delimiter=comma, quoting=quoting):
        if None in row and CAPTION_KEY.fullmatch(keys[-1]):   # commas in a caption without quotes
            row[keys[-1]] = comma.join([row[keys[-1]], *row.pop(None)]).rstrip(comma)
        # A stray quote takes the rows below it, with their images' names, for one cell.
        is_broken = None in row or None in row.values() or any(
            find(part) is not None for cell in row.values() for line in cell.splitlines()[1:]
            for part in line.split(comma))
        yield {} if is_broken else row


def caption_rows(suffix, text, find, column):
    """(what an image is called, its captions, its split) of each row of a captions file, or (its
    number, None, None) where it is broken. Raises: LookupError where the file is no captions file,
    and many kinds of errors where it is damaged."""
    keys, columns, rows = None, {}, (json_rows(text, suffix == ".json") if "json" in suffix
                                     else table_rows(text, find))
    for number, row in enumerate(rows, 1):
        row = {str(key).strip().lower(): value for key, value in row.items()}
        if not row.keys() <= columns.keys():   # in JSON each row may have others
            columns |= row
            keys = pick_keys(list(columns), column)
        if not keys or keys[0] not in row:
            yield f"row {number}", None, None
            continue
        written = re.sub(r"(\.\w+)#\d+$", r"\1", str(row[keys[0]]).strip())
        if keys[0] == "filename" and "filepath" in row:   # Karpathy's COCO
            written = f"{row['filepath']}/{written}"
        texts = [text for key in keys[1] for text in texts_in(row.get(key))]
        split = split_of(str(row.get("split")))
        if row.get("split") and not split:
            raise LookupError(f"its split {row['split']!r} is no word such as train, val, test")
        yield written, texts, split
    if not keys:
        raise LookupError("has no whole rows")


def such_as(names, what):
    """How many there are of what, and some of them; names may be {name: reason}."""
    shown = [repr(name) + (f" ({names[name]})" if isinstance(names, dict) and names[name] else "")
             for name in list(names)[:4]]
    return f"{len(names):,} {what}" + (f", such as {', '.join(shown)}" if shown else "")


class Captions:
    """What captions files say of the images."""

    def __init__(self, images, max_missing):
        """max_missing: the share of a file's rows that may be lost."""
        self.images, self.max_missing = images, max_missing
        self.texts, self.splits, self.origin = {}, {}, {}   # by an image's number
        self.used, self.unread, self.lost = Counter(), {}, []   # files; other files: why; rows

    def read(self, source, column):
        """Read all files of a source that may hold captions. Raises: ValueError where one is
        damaged or has lost too many rows, or two contradict each other."""
        def order(name):   # detectors' .json files are large: last, and only where captions lack
            return not USUAL.search(name), name.lower().endswith(".json"), name.count("/"), name

        numbers = {name: k for k, name in enumerate(source.names)}
        for name in sorted(numbers, key=order):
            (stem, suffix), is_other = os.path.splitext(os.path.basename(name)), order(name)[0]
            suffix, is_beside = suffix.lower(), self.images.find(stem, name) is not None
            is_whole = len(self.texts) == len(self.images.names)
            # Flickr8k has its captions' words without their endings in a file beside them.
            if (suffix not in TEXT_SUFFIXES or "lemma.token" in name
                    or suffix == ".json" and (is_beside or is_other and is_whole)):
                if suffix not in IMAGE_SUFFIXES:
                    self.unread[name] = ""
                continue
            is_beside, rows = is_beside and suffix in SIDECARS, []
            try:
                with source.open(numbers[name]) as file:
                    content = file.read()
                text = content.decode(json.detect_encoding(content))   # UTF-8, or by its mark
                find = partial(self.images.find, file=name)
                rows += ([(stem, texts_in(text.splitlines()), None)] if is_beside
                         else caption_rows(suffix, text, find, column))
            except LookupError as error:   # it is no captions file
                self.unread[name] = str(error)
            except Exception as error:   # csv, json and zlib have a dozen kinds for damage
                kind = type(error).__name__
                self.unread[name] = f"after {len(rows):,} rows {kind}: {str(error)[:200]}"
                if is_beside or not is_other:
                    raise ValueError(f"{name} is damaged: {self.unread[name]}") from None
            else:
                self._add(name, rows, f"{suffix} files" if is_beside else name)

    def _add(self, file, rows, title):
        """The captions of a file's rows."""
        numbers = {written: self.images.find(written, file)
                   for written in dict.fromkeys(row[0] for row in rows)}
        named, texts, splits, lost = Counter(numbers.values()), {}, {}, []
        for written, found, split in rows:
            number = numbers[written]   # of two names for one image, one means another
            number = number if named[number] == 1 else None
            if number is None and split != "test":
                lost.append(written)
            if number is not None:
                splits[number] = split or self.images.place(number)[0] or split_of(
                    file if title == file else os.path.dirname(file))
                texts.setdefault(number, []).extend(
                    text for text in found or () if text.lower() not in ("", "nan"))
        texts = {number: captions for number, captions in texts.items() if captions}
        if not texts:
            self.unread[file] = such_as(lost, LOST) if lost else "no text"
            return
        if len(lost) > self.max_missing * len(rows):
            raise ValueError(f"{file}: of {len(rows):,} rows {such_as(lost, LOST)}; mend them, or "
                             "see --max-bad-images")
        for number, captions in texts.items():
            other = self.origin.setdefault(number, file)
            if set(self.texts.setdefault(number, captions)) != set(captions):
                raise ValueError(f"{other} and {file} have different captions of "
                                 f"{self.images.names[number]!r}; choose with --captions FILE")
            self.splits[number] = self.splits.get(number) or splits[number]
        self.used[title] += 1
        self.lost += dict.fromkeys(lost)

    def use_folders(self, template):
        """Captions by --caption-template, of the innermost folder that is no split."""
        for number in self.images.names:
            self.splits[number], word = self.images.place(number)
            word = re.sub(r"^\d+[._](?=\D)|.*\.tar$", "", word)   # kohya's 10_dog is a dog
            if word or "{}" not in template:
                self.texts[number] = [one_line(template.replace("{}", word.replace("_", " ")))]
        self.used[f"--caption-template {template!r}"] += 1


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
        images = ImageNames(self.files.names)
        found = Captions(images, max_missing)
        try:
            if template is None or "{}" in template:
                found.read(Files(captions, "--captions") if captions else self.files, column)
            if found.used and template is not None:
                raise ValueError(f"--caption-template {template!r} is for folders' names, but "
                                 f"captions are in {', '.join(found.used)}; drop one of them")
            if template is not None:
                found.use_folders(template)
            if not found.texts:
                folders = sorted({word for _, word in images.folders.values()} - {""})
                raise ValueError(f"no {'captions' if images.names else 'images'}; "
                                 f"{such_as(found.unread, 'other files')}; "
                                 f"{such_as(folders, 'folders')}; {HOW}")
        except ValueError as error:
            raise ValueError(f"--data {path}: {error}") from None
        texts, known = found.texts, "train" in found.splits.values()
        splits = {k: known and (found.splits[k] or "train") for k in texts}
        self.report = self._report(found, splits)
        texts = {k: of_k for k, of_k in texts.items() if splits[k] != "test"}
        self.validation = np.flatnonzero([splits[k] == "val" for k in texts])   # the data's own
        self.files.keep(texts)
        self.names, self.texts = self.files.names, PackedStrings(chain(*texts.values()))
        self.first = np.cumsum([0, *map(len, texts.values())])   # image i's first text
        self.fingerprint = hash_of([self.names.buffer, self.names.ends, self.texts.buffer,
                                    self.texts.ends, self.first])

    def _report(self, found, splits):
        """{title: what was understood}."""
        count, kinds = sum(map(len, found.texts.values())), Counter(splits.values())
        used = [f"{n:,} {name}" if name[0] == "." else name for name, n in found.used.items()]
        said = {"captions": f"{count:,} of {', '.join(used[:4])}{', ...' if used[4:] else ''}, "
                            f"{count / len(splits):.3g} an image, such as "
                            f"{next(iter(found.texts.values()))[0]!r}"}
        if len(kinds) > 1:
            said["splits"] = (f"the data's own: {kinds['train']:,} images to train on, "
                              f"{kinds['val']:,} to validate on, {kinds['test']:,} left out")
        without = [name for k, name in found.images.names.items() if k not in found.texts]
        aside = {LOST: found.lost, "images without a caption": without, "other files": found.unread}
        said["left out"] = "; ".join(such_as(aside[what], what) for what in aside if aside[what])
        return said

    def __len__(self):
        """How many images have captions."""
        return len(self.first) - 1

    def captions(self, i):
        """All captions of image i."""
        return [self.texts[k] for k in range(self.first[i], self.first[i + 1])]

    def identity(self, most=256):
        """What tells these pictures from others, without opening all: names, sizes, in a .zip the
        checksums, and the bytes of some, spread evenly."""
        parts = [self.names.buffer, [self.files.size(i) for i in range(len(self))]]
        for i in np.linspace(0, len(self) - 1, min(most, len(self))).astype(int).tolist():
            with suppress(UnreadableImage):
                parts.append(self._read(i, lambda file: file.read()))
        return hash_of(parts)

    def image(self, i, channels, side):
        """Image i as a (side, side) picture: see `read_image`. Raises: UnreadableImage, OSError."""
        return self._read(i, lambda file: read_image(file, channels, side))

    def _read(self, i, use):
        """use(file) of image i's file. Raises: UnreadableImage; OSError where not the file but all
        data are out of reach, so that the fault changes no sample."""
        try:
            with self.files.open(i) as file:
                return use(file)
        except Exception as error:   # Pillow and zipfile raise a dozen kinds on damaged bytes
            if not os.path.exists(self.path) or getattr(error, "errno", None) in OUT_OF_REACH:
                raise OSError(f"--data {self.path}: out of reach: {error}; resume later") from None
            raise UnreadableImage(f"--data {self.path}: {self.names[i]!r} cannot be read as an "
                                  f"image: {error}") from None


def read_image(file, channels, side):
    """The middle of a picture, side x side pixels, mode "RGB" (channels 3) or "L" (1).

    The short side is scaled to `side` with antialiasing. EXIF rotation is applied, transparent
    pictures are laid on white, those of 16 bits scaled to 8. Raises: ValueError for floats and
    32-bit integers, whose range nobody knows, and many kinds of errors for damaged files.
    """
    image = Image.open(file, formats=FORMATS)
    image.draft("RGB", (2 * side, 2 * side))   # JPEG: decode small, never below twice the target
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(f"its mode {image.mode} has no known range; save it with 8 or 16 bits")
    if image.mode[0] == "I":
        image = Image.fromarray((np.asarray(image) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB" if channels == 3 else "L")
    short = min(image.size)
    left, top = ((length - short) * 0.5 for length in image.size)
    box = (left, top, left + short, top + short)
    return image.resize((side, side), Image.BICUBIC, box=box, reducing_gap=3.0)


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

"""Everything in which ranks differ: process group and device, data sets, captions, transforms, sharded batches.

A training sample is a pure function of (seed, epoch, position in the epoch's global order): its image, caption, crop,
flip, timestep and noise all come from one generator seeded with these counters. So there is no loader state to save,
a resumed run continues exactly, and one process and eight see the same samples with the same noise.

Images leave this file as uint8 (B, c, H, W); `to_unit_range` brings them to [-1, 1] on the device.
"""
import csv
import ctypes
import errno
import hashlib
import io
import json
import math
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
import zipfile
from array import array
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from itertools import product, zip_longest
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

STREAMS = {"sample": 1, "order": 2, "split": 3, "validation": 4, "sampling": 5, "shapes": 6, "evaluation": 7}


def counter_rng(stream, *counters):
    """A numpy Generator that depends on the named stream and the non-negative integer counters alone."""
    return np.random.default_rng((STREAMS[stream], *counters))


def hash_of(parts):
    """SHA-256 of byte strings and arrays, or of anything that JSON can hold, one after the other."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part if isinstance(part, (bytes, np.ndarray)) else json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()


def hash_of_weights(module):
    return hash_of(tensor.cpu().contiguous().numpy().tobytes() for _, tensor in sorted(module.state_dict().items()))


# Processes and devices


@dataclass(frozen=True)
class Ranks:
    """This process among the others. `local_rank` counts within the node and picks the GPU; `rank` counts them all."""

    rank: int
    local_rank: int
    local_world_size: int
    world_size: int
    device: torch.device

    @property
    def is_main(self):
        return self.rank == 0

    def sum(self, tensor):
        """The tensor summed over all ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def gather(self, value):
        """A list with every rank's value (any picklable object), on every rank."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def once_per_node(self, make):
        """make()'s list of numpy arrays, made by one process of each node and mapped by all, so that a node holds them once.

        Raises: what make() raises, on every rank."""
        if self.world_size == 1:
            return make()
        with tempfile.TemporaryDirectory() as folder:
            problem = None
            if self.local_rank == 0:
                try:
                    for k, values in enumerate(make()):
                        np.save(f"{folder}/{k}.npy", values)
                    call_libc("malloc_trim", 0)   # give back what making them took, several times their size
                except Exception as error:   # whatever it is, the others wait for it
                    problem = error
            parts = self.gather((folder, problem))
            if problem := next((problem for _, problem in parts if problem), None):
                raise problem
            files = sorted(Path(parts[self.rank - self.local_rank][0]).glob("*.npy"))
            arrays = [np.load(file, mmap_mode="r") for file in files]
            self.gather(None)   # mapped files outlive their names
        return arrays


def call_libc(function, *numbers):
    """A function of glibc, or nothing where there is another C library."""
    with suppress(OSError, AttributeError):
        getattr(ctypes.CDLL("libc.so.6"), function)(*numbers)


def setup_ranks(device="auto"):
    """Join the process group that torchrun announces in the environment (or none: plain `python`); pick the device.

    NCCL carries GPU tensors and gloo CPU tensors. Raises: ValueError where a node has fewer GPUs than processes.
    """
    rank, local_rank, local_world_size, world_size = (
        int(os.environ.get(name, default)) for name, default in
        (("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1), ("WORLD_SIZE", 1)))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # loader workers are forked
    gpus = torch.cuda.device_count()
    if gpus and device != "cpu" and not torch.cuda.is_available():
        raise ValueError("--device: this build of PyTorch cannot use the GPU, mostly as it is for a newer driver; install the "
                         "build for the one that nvidia-smi shows, or use --device cpu")
    if device == "cuda" and not gpus:
        raise ValueError("--device cuda: no GPU is visible to PyTorch; use --device cpu or check nvidia-smi and the CUDA build")
    if device == "cpu" or not gpus:
        device = torch.device("cpu")
        if "OMP_NUM_THREADS" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:   # torchrun sets it to 1
            torch.set_num_threads(max(1, available_cores() // local_world_size))
        # Let glibc reuse large blocks instead of returning each to the kernel, whose page faults cost 10-20% of a step.
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        call_libc("mallopt", M_MMAP_MAX, 0)
        call_libc("mallopt", M_TRIM_THRESHOLD, -1)
    else:
        if local_world_size > gpus:
            raise ValueError(f"--nproc_per_node={local_world_size}: only {gpus} GPUs are visible here; "
                             f"start with torchrun --nproc_per_node={gpus}")
        if gpus > local_world_size and rank == 0:
            print(f"warning: {gpus} GPUs visible, {local_world_size} in use: start with torchrun --nproc_per_node={gpus}",
                  file=sys.stderr)
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if world_size > 1:
        # How long a rank may keep the others waiting, by a checkpoint's writing or because it hangs, before all end.
        timeout = timedelta(seconds=float(os.environ.get("RANK_TIMEOUT_SECONDS", 600)))
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=timeout,
                                store=restarted_store(), rank=rank, world_size=world_size)
    return Ranks(rank, local_rank, local_world_size, world_size, device)


def restarted_store():
    """Where processes that torchrun has restarted on one node meet; None for the default place.

    torchrun keeps its store over a restart, and with it the addresses of the processes before, which are not to be read
    (pytorch issue 135712). Nodes do not count restarts alike, so that several need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1.
    """
    env = os.environ
    restarts, one_node = env.get("TORCHELASTIC_RESTART_COUNT", "0"), env.get("LOCAL_WORLD_SIZE") == env["WORLD_SIZE"]
    if restarts == "0" or not one_node or env.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return dist.PrefixStore(f"restart {restarts}", dist.TCPStore(env["MASTER_ADDR"], int(env["MASTER_PORT"])))


def available_cores():
    """CPU cores that this process may use: on a cluster the allocation's, not the machine's, also where nothing binds to it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return min(cores, int(os.environ.get("SLURM_CPUS_ON_NODE") or cores))


def loader_workers(ranks):
    """Loader processes per rank: the rank's cores less one, at most 8."""
    return max(0, min(8, available_cores() // ranks.local_world_size - 1))


def amp_dtype(choice, device):
    """The autocast dtype, or None for float32. auto: bfloat16 where the GPU computes in it, else float16 (a V100);
    float32 on CPUs."""
    if choice == "auto" and device.type == "cuda":
        choice = "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(choice)   # off, and auto on CPUs: none


def run_main(main):
    """Run a script's main(): a user's mistake becomes one line from rank 0 and exit code 2, and no rank is left waiting."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    try:
        main()
        if dist.is_initialized():   # taking gloo down may hang (PyTorch 2.7) and Python's end with gloo up may abort: do neither
            sys.stdout.flush()
            os._exit(0)
    except KeyboardInterrupt:
        os._exit(130)
    except Exception as error:
        rank, text = int(os.environ.get("RANK", 0)), str(error).strip()
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and
                                                 re.search(r"gloo|NCCL|pair closure|closed by peer", text)):
            text = f"rank {rank} lost another process, which died or hangs ({' '.join(text.split())[:600]}); go on with --resume"
        elif not isinstance(error, (ValueError, OSError)):
            raise
        if rank:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            time.sleep(5)  # every rank meets the same mistake; the first exit makes torchrun stop the others
        # An error in a loader worker carries that process's traceback; the last line is the message.
        print(f"error: {text.splitlines()[-1]}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)


class StopRequest:
    """SIGTERM, SIGUSR1, Ctrl-C, the clock or a file named `stop` ask the run to stop; all ranks learn of it at the same
    step. A second Ctrl-C kills."""

    def __init__(self, ranks, stop_file, deadline=math.inf):
        """`deadline`: a Unix time. Clock and file are the main rank's to watch, every few seconds."""
        self.ranks, self.stop_file, self.deadline = ranks, stop_file, deadline
        self.asked, self.next_look, self.vote, self.work = False, 0.0, None, None
        self.handlers = {}   # those before ours
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                self.handlers[number] = signal.signal(number, self._ask)

    def _ask(self, number, _):
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)   # what torchrun makes of a second Ctrl-C

    def close(self):
        """Give the signals back, for example to a notebook."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def poll(self):
        """Whether any rank had been asked by the previous step: one step late, so that nobody waits for the answer."""
        now = time.time()
        if self.ranks.is_main and now >= self.next_look:
            self.asked |= now >= self.deadline or self.stop_file.exists()
            self.next_look = now + 3
        if self.ranks.world_size == 1:
            return self.asked
        stop = False
        if self.work is not None:
            self.work.wait()
            stop = bool(self.vote.item())
        self.vote = torch.tensor([float(self.asked)])
        self.work = dist.all_reduce(self.vote, async_op=True)   # a CPU tensor: over gloo, beside the GPU's stream
        return stop


# Built-in pictures

COLOURS = {"red": (220, 30, 30), "orange": (255, 140, 0), "yellow": (255, 230, 30), "green": (20, 160, 50),
           "cyan": (0, 205, 225), "blue": (30, 60, 230), "purple": (145, 20, 190), "pink": (255, 110, 205)}
BACKGROUNDS = {"white": (255, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0)}
SHAPES = ("circle", "square", "triangle", "cross")
SIZES = {"small": 0.24, "large": 0.38}                 # radius as a fraction of the picture's side, one thing
HARD_SIZES = {"small": 0.11, "large": 0.18}            # the same where two things share the picture
POSITIONS = ("left of", "right of", "above", "below")  # of the first thing, seen from the second
OFFSET, JITTER, HARD_JITTER = 0.25, 0.05, 0.03         # distances from the middle, as fractions of the side
# A shape is read where the overlap with its template is at least this, and this much better than any other shape's.
MIN_OVERLAP, MIN_MARGIN = 0.84, 0.06


@dataclass(frozen=True)
class Thing:
    size: str
    colour: str
    shape: str


@dataclass(frozen=True)
class Scene:
    """One thing on a background, or two with a position: `thing` is `position` (for example "left of") `other`."""

    thing: Thing
    background: str
    position: str | None = None
    other: Thing | None = None


def caption_of(scene: Scene) -> str:
    """Return the caption, such as "a small red circle left of a large blue square on a white background"."""
    phrases = [f"a {thing.size} {thing.colour} {thing.shape}" for thing in (scene.thing, scene.other) if thing]
    return f" {scene.position} ".join(phrases) + f" on a {scene.background} background"


def vocabulary() -> list[str]:
    """Return every word that a caption can hold."""
    words = ["a", "on", "background", *BACKGROUNDS, *SIZES, *COLOURS, *SHAPES]
    return words + [word for word in dict.fromkeys(" ".join(POSITIONS).split()) if word not in words]


def all_scenes(hard: bool = False) -> list[Scene]:
    """Return every scene of the plain set, or of the hard one, in a fixed order."""
    things = [Thing(*words) for words in product(SIZES, COLOURS, SHAPES)]
    positions, others = (POSITIONS, things) if hard else ([None], [None])
    return [Scene(thing, background, position, other)
            for thing, position, other, background in product(things, positions, others, BACKGROUNDS)]


def as_drawn(scene: Scene) -> Scene:
    """Return the same picture described from left to right, or from top to bottom."""
    if scene.position not in ("right of", "below"):
        return scene
    return Scene(scene.other, scene.background, {"right of": "left of", "below": "above"}[scene.position], scene.thing)


def is_held_out(scene: Scene) -> bool:
    """Return whether the scene is kept out of training: one in eight, chosen like the cells of a Latin square.

    In the plain set any three of the four attributes still occur together in training. Two captions of one picture
    ("A left of B", "B right of A") are held out together.
    """
    scene = as_drawn(scene)

    def number(thing: Thing) -> int:
        return list(COLOURS).index(thing.colour) + SHAPES.index(thing.shape) + 4 * list(SIZES).index(thing.size)

    total = number(scene.thing) + 3 * list(BACKGROUNDS).index(scene.background)
    if scene.other:
        total += 3 * number(scene.other) + POSITIONS.index(scene.position)
    return total % 8 == 0


def _outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """Return the corners of a shape of radius r around (x, y); a circle has 64 of them."""
    angles = np.linspace(0, 2 * np.pi, 64, endpoint=False)
    arm = 0.34  # half the width of the cross's arms
    corners = {"circle": np.stack([np.cos(angles), np.sin(angles)], axis=1),
               "square": 0.9 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]),
               "triangle": np.array([(0, -1.05), (1.1, 0.9), (-1.1, 0.9)]),
               "cross": np.array([(-arm, -1), (arm, -1), (arm, -arm), (1, -arm), (1, arm), (arm, arm),
                                  (arm, 1), (-arm, 1), (-arm, arm), (-1, arm), (-1, -arm), (-arm, -arm)])}[shape]
    return [(x + r * dx, y + r * dy) for dx, dy in corners]


def draw(scene: Scene, resolution: int, rng: np.random.Generator) -> Image.Image:
    """Return the scene as an RGB picture of resolution x resolution pixels; rng moves each thing a little.

    Drawn at eight times the resolution and averaged down, so that edges are smooth and positions are not whole pixels.
    """
    scene = as_drawn(scene)
    side = 8 * resolution
    canvas = Image.new("RGB", (side, side), BACKGROUNDS[scene.background])
    sizes, jitter = (HARD_SIZES, HARD_JITTER) if scene.other else (SIZES, JITTER)
    step = {None: (0, 0), "left of": (OFFSET, 0), "above": (0, OFFSET)}[scene.position]
    for thing, sign in ((scene.thing, -1), (scene.other, 1)):
        if thing:
            x, y = 0.5 + sign * np.array(step) + rng.uniform(-jitter, jitter, size=2)
            outline = _outline(thing.shape, x * side, y * side, sizes[thing.size] * side)
            ImageDraw.Draw(canvas).polygon(outline, fill=COLOURS[thing.colour])
    return canvas.reduce(8)


def expected_reading(scene: Scene) -> dict[str, str]:
    """Return what `read_picture` finds in a right picture of the scene."""
    scene = as_drawn(scene)
    reading = asdict(scene.thing)
    if scene.other:
        reading |= {"position": scene.position} | {f"other_{name}": word for name, word in asdict(scene.other).items()}
    return reading | {"background": scene.background}


def _sharpen(coverage: np.ndarray) -> np.ndarray:
    """Return coverage with edges twice as steep, so that a faint halo around a thing does not count."""
    return (2 * coverage - 0.5).clip(0, 1)


def _template(shape: str, x: int, y: int, radius: float, resolution: int) -> np.ndarray:
    """Return the coverage (resolution, resolution) in [0, 1] of a shape whose centroid is at (x, y), in eighths of a pixel."""
    canvas = Image.new("L", (8 * resolution, 8 * resolution))
    # The triangle's centroid lies 0.25 radii below its middle; the other shapes are symmetric.
    outline = _outline(shape, x, y - (0.25 * radius if shape == "triangle" else 0), radius)
    ImageDraw.Draw(canvas).polygon(outline, fill=255)
    return _sharpen(np.asarray(canvas.reduce(8), dtype=np.float32) / 255)


def _split(mask: np.ndarray) -> list[np.ndarray]:
    """Return the parts of mask (H, H) that empty columns separate, from left to right, each as a mask of its own."""
    filled = mask.any(axis=0)
    run = np.cumsum(filled & np.diff(filled, prepend=False))   # for each column: runs of filled ones that have begun
    return [mask & (run == k) for k in range(1, run.max() + 1)]


def _neighbours(mask: np.ndarray) -> np.ndarray:
    """Return how many of the nine pixels around and at each pixel of mask (H, H) are set."""
    return np.lib.stride_tricks.sliding_window_view(np.pad(mask, 1), (3, 3)).sum(axis=(2, 3))


def _read_thing(pixels: np.ndarray, ground: np.ndarray, region: np.ndarray, hard: bool) -> dict[str, str | None]:
    """Return size, colour and shape of the thing in region (H, H), a mask; pixels (H, H, 3) are in [0, 1]."""
    # Each pixel is ground + coverage * (paint - ground): 1 inside the thing, a fraction where its edge passes.
    axis = np.median(pixels[region], axis=0) - ground
    if axis @ axis < 0.04:
        return {"size": None, "colour": None, "shape": None}
    coverage = np.where(_neighbours(region) > 0, _sharpen((pixels - ground) @ axis / (axis @ axis)), 0)
    inside = coverage > 0.5
    palette = np.array(list(COLOURS.values())) / 255
    votes = np.bincount(np.linalg.norm(pixels[inside][:, None] - palette, axis=-1).argmin(axis=1), minlength=8)
    # Edges are mixtures and may vote for others, but three fifths of the thing must agree.
    colour = list(COLOURS)[votes.argmax()] if votes.max() > 0.6 * inside.sum() else None

    # Intersection over union with each shape of each size, drawn around the thing's centroid.
    places = 8 * (np.arange(len(region)) + 0.5)
    y, x = (round(places @ coverage.sum(axis=other) / coverage.sum()) for other in (1, 0))
    overlaps = {}
    for (size, fraction), shape in product((HARD_SIZES if hard else SIZES).items(), SHAPES):
        template = _template(shape, x, y, 8 * len(region) * fraction, len(region))
        overlaps[size, shape] = np.minimum(template, coverage).sum() / np.maximum(template, coverage).sum()
    (size, shape), best = max(overlaps.items(), key=lambda item: item[1])
    rival = max(overlap for (_, other), overlap in overlaps.items() if other != shape)
    clear = best >= MIN_OVERLAP and best - rival >= MIN_MARGIN
    return {"size": size if best >= 0.6 else None, "colour": colour, "shape": shape if clear else None}


def read_picture(image: np.ndarray) -> dict[str, str | None]:
    """Return the attributes that a picture (H, H, 3) uint8 shows, None for each that it does not show clearly.

    The keys are those of `expected_reading`: size, colour, shape and background, and with two things also position,
    other_size, other_colour and other_shape (read from left to right, or from top to bottom).
    """
    pixels = np.asarray(image, dtype=np.float32) / 255
    nothing = {"size": None, "colour": None, "shape": None}
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3),
                             pixels[2:-2, :2].reshape(-1, 3), pixels[2:-2, -2:].reshape(-1, 3)])
    grounds = np.array(list(BACKGROUNDS.values())) / 255
    nearest = np.linalg.norm(grounds - np.median(border, axis=0), axis=1).argmin()
    background, ground = list(BACKGROUNDS)[nearest], grounds[nearest]
    if np.mean(np.linalg.norm(border - ground, axis=1) < 0.35) < 0.8:
        return nothing | {"background": None}

    # Foreground: what is far from the background, without pixels that stand alone.
    distance = np.linalg.norm(pixels - ground, axis=-1)
    mask = distance > 0.3
    mask &= _neighbours(mask) >= 4

    # An empty band of columns, or else of rows, separates two things.
    position, parts = "left of", _split(mask)
    if len(parts) < 2:
        position, parts = "above", [part.T for part in _split(mask.T)]
    parts = [part for part in parts if part.sum() >= 0.005 * mask.size]
    if len(parts) not in (1, 2):
        return nothing | {"background": background}
    reading, *others = (_read_thing(pixels, ground, part, hard=len(parts) == 2) for part in parts)
    for other in others:
        reading |= {"position": position} | {f"other_{name}": value for name, value in other.items()}
    return reading | {"background": background}


class BuiltinShapes:
    """Pictures of the trained scenes with their captions, drawn once and kept in memory; the held-out ones never appear."""

    fingerprint = "built-in"

    def __init__(self, resolution, hard=False, count=8192):
        self.scenes = [scene for scene in all_scenes(hard) if not is_held_out(scene)]
        self.texts = [caption_of(scene) for scene in self.scenes]
        self.order = counter_rng("shapes", 0, 0).permutation(count) % len(self.scenes)
        self.pictures = np.stack([np.asarray(draw(self.scenes[k], resolution, counter_rng("shapes", 1, i)))
                                  for i, k in enumerate(self.order)])

    def __len__(self):
        return len(self.order)

    def captions(self, i):
        return [self.texts[self.order[i]]]

    def content(self, i):
        return self.pictures[i].tobytes()

    def image(self, i, channels, side, place=(0.5, 0.5)):
        return self.pictures[i] if channels == 3 else Image.fromarray(self.pictures[i]).convert("L")


def is_builtin(data):
    """Whether --data names the built-in pictures."""
    return data in ("shapes", "shapes-hard")


def open_source(data, config, caption_template="a photo of a {}", max_missing=0.01, ranks=None):
    """The images and captions that --data names: "shapes", "shapes-hard", a folder or a .zip."""
    if is_builtin(data):
        return BuiltinShapes(config.resolution, hard=data == "shapes-hard")
    return CaptionedImages(data, caption_template, max_missing, ranks)


# Captioned images on disk

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF")   # by content; others, such as PostScript, may run programs
OUT_OF_REACH = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN)   # the file system's fault, not the file's


class UnreadableImage(ValueError):
    """A picture that is missing, damaged or hostile."""


class PackedStrings:
    """Strings end to end in one byte buffer: 8 bytes each beside the text, and no Python object for workers to copy."""

    def __init__(self, buffer, ends):
        self.buffer, self.ends = buffer, ends

    @staticmethod
    def pack(strings):
        """The two arrays for all of these strings."""
        buffer, ends = bytearray(), array("q", [0])
        for string in strings:
            buffer += string.encode("utf-8", "surrogateescape")
            ends.append(len(buffer))
        return np.frombuffer(buffer, np.uint8), np.frombuffer(ends, np.int64)

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        return self.buffer[self.ends[i]:self.ends[i + 1]].tobytes().decode("utf-8", "surrogateescape")


class FolderFiles:
    """The files below a folder, named by their path relative to it with forward slashes; linked folders are not entered."""

    def __init__(self, root):
        self.root = Path(root).resolve()

    def names(self):
        for folder, folders, files in os.walk(self.root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            prefix = Path(folder).relative_to(self.root).as_posix()
            for name in sorted(files):
                if not name.startswith("."):
                    yield name if prefix == "." else f"{prefix}/{name}"

    def open(self, name):
        path = (self.root / name).resolve()
        if not path.is_relative_to(self.root) or path.exists() and not path.is_file():
            raise ValueError("a link out of the data folder, or no ordinary file")
        return open(path, "rb")


class ZipFiles:
    """The same for the members of a .zip, read in place; each process opens the archive for itself."""

    def __init__(self, path):
        self.path, self.archive, self.owner = Path(path), None, None
        self._open_archive()

    def _open_archive(self):
        if self.owner != os.getpid():   # a file position must not be shared with a forked worker
            try:
                self.archive, self.owner = zipfile.ZipFile(self.path), os.getpid()
            except Exception as error:   # as its bytes please
                raise ValueError(f"--data {self.path}: not a zip archive or damaged ({error}); give a folder or a .zip") from None
        return self.archive

    def names(self):
        for name in self._open_archive().namelist():
            parts = PurePosixPath(name).parts
            if not name.endswith("/") and not any(part.startswith(".") or part == "__MACOSX" for part in parts):
                yield name

    def open(self, name):
        member = self._open_archive().getinfo(name)
        if member.file_size > 100 * max(2**20, min(member.compress_size, self.path.stat().st_size)):
            raise ValueError(f"unfolds to {member.file_size} bytes, over 100 times its size: a zip bomb")
        return self.archive.open(member)


def read_table(file, image_columns=("file_name", "image", "image_name"), text_columns=("text", "caption", "comment")):
    """(image, caption) pairs of a CSV file with a header such as `image,caption` or `file_name,text`."""
    rows = csv.reader(io.TextIOWrapper(file, "utf-8-sig", "replace", newline=""), strict=True)
    header = [column.strip().lower() for column in next(rows, [])]
    image = next((header.index(name) for name in image_columns if name in header), None)
    text = next((header.index(name) for name in text_columns if name in header), None)
    if image is None or text is None:
        raise ValueError(f"the header is {','.join(header)[:80]!r}; it must name an image column "
                         f"({', '.join(image_columns)}) and a caption column ({', '.join(text_columns)})")
    for row in filter(None, rows):
        if len(row) > len(header) == text + 1:
            row[text:] = [",".join(row[text:])]   # a caption with commas, not quoted
        if len(row) != len(header):
            raise ValueError(f"line {rows.line_num} has {len(row)} columns, the header {len(header)}")
        yield row[image].strip(), row[text]


def read_flickr_tokens(file):
    """(image, caption) pairs of `name.jpg#0<TAB>caption` lines, as Flickr8k and Flickr30k come."""
    for line in io.TextIOWrapper(file, "utf-8-sig", "replace"):
        name, tab, caption = line.partition("\t")
        if tab:
            yield name.rpartition("#")[0] or name, caption


def read_json_lines(file):
    """(image, caption) pairs of {"file_name": ..., "text": ...} lines; text may be a list of captions."""
    for line in io.TextIOWrapper(file, "utf-8-sig", "replace"):
        if line.strip():
            row = json.loads(line)
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
    (r"captions\.(txt|csv)", read_table), (r"(flickr\d+k|results_\d+)\.token(\.txt)?", read_flickr_tokens),
    (r"captions_.*\.json", read_coco)]


class CaptionedImages:
    """An index of images with one or more captions each, in a folder or a .zip.

    Images are ordered as the captions file first names them (or by name, with one sub-folder per class). A caption's
    image is looked for beside the captions file and, failing that, by its base name anywhere in the data; only files
    that were listed there can be named, so a captions file cannot reach outside.
    """

    def __init__(self, path, caption_template="a photo of a {}", max_missing=0.01, ranks=None):
        """Raises: FileNotFoundError, ValueError with one line that names the file and the fix."""
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"--data {path}: no such folder or .zip file")
        self.files = FolderFiles(path) if self.path.is_dir() else ZipFiles(path)

        def make():
            return self._index(caption_template, max_missing)

        arrays = ranks.once_per_node(make) if ranks else make()
        *strings, self.caption_order, self.first_caption = arrays
        self.texts, self.names, self.fingerprint = PackedStrings(*strings[:2]), PackedStrings(*strings[2:]), hash_of(arrays)

    def _caption_pairs(self, listed, images, caption_template):
        """(captions file or None, image name as written, caption) for every caption of the data."""
        for pattern, reader in CAPTION_FILES:
            found = [name for name in listed if re.fullmatch(pattern, PurePosixPath(name).name, re.IGNORECASE)]
            for name in found:
                try:
                    with self.files.open(name) as file:
                        for image, caption in reader(file):
                            yield name, "" + image, "" + caption   # both must be text
                except Exception as error:   # csv, json and zlib have a dozen kinds for damaged bytes
                    raise ValueError(f"--data {self.path}: {name} is not as expected: "
                                     f"{type(error).__name__}: {str(error)[:200]}") from None
            if found:
                return
        classes = {name.rpartition("/")[0] for name in images}
        if "" in classes or len(classes) < 2:
            raise ValueError(f"--data {self.path}: no captions file (captions.txt, metadata.csv, metadata.jsonl, "
                             "Flickr8k.token.txt, captions_*.json) and not one sub-folder per class either; add one of them")
        for name in images:
            yield None, name, caption_template.replace("{}", PurePosixPath(name).parent.name.replace("_", " "))

    def _index(self, caption_template, max_missing):
        """Six arrays: two each for captions and image names, and for image i the numbers of its captions,
        caption_order[first_caption[i]:first_caption[i + 1]]."""
        listed = list(self.files.names())
        images = {name: None for name in listed if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES}
        if not images:
            raise ValueError(f"--data {self.path}: holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
        pairs = self._caption_pairs(listed, images, caption_template)
        by_base_name = {}
        for image in images:
            base_name = image.rpartition("/")[2]
            by_base_name[base_name] = None if base_name in by_base_name else image   # which of two is meant is not known
        order, owners, missing, garbled = {}, array("q"), {}, {}

        def present():
            """Captions whose image is there; `order` and `owners` collect their images, `missing` and `garbled` the mistakes."""
            for captions_file, written, caption in pairs:
                folder, slash, _ = (captions_file or "").rpartition("/")
                beside = folder + slash + written.removeprefix("./")
                name = beside if beside in images else by_base_name.get(written.rpartition("/")[2])
                if name is None:
                    missing.setdefault(written, captions_file)
                else:
                    owners.append(order.setdefault(name, len(order)))
                    caption = caption.encode("utf-8", "replace").decode()   # no half characters
                    if "\ufffd" in caption:
                        garbled.setdefault(written, captions_file)
                    yield " ".join(caption.split())

        texts = PackedStrings.pack(present())
        for found, what, fix, so in (
                (missing, "are not there, or in several folders", "add the files or remove their captions", "these are left out"),
                (garbled, "have captions that are not in UTF-8", "convert that file", "what cannot be read becomes \ufffd")):
            if not found:
                continue
            example, captions_file = next(iter(found.items()))
            message = f"--data {self.path}: {len(found)} image(s) named in {captions_file} {what}, for example {example!r}"
            if len(found) > max_missing * (len(missing) + len(order)):
                raise ValueError(f"{message}; {fix}")
            warnings.warn(f"{message}; {so}", stacklevel=3)
        if not order:
            raise ValueError(f"--data {self.path}: the captions file holds no captions")
        owners = np.frombuffer(owners, np.int64)
        caption_order = np.argsort(owners, kind="stable").astype(np.int32 if len(owners) < 2**31 else np.int64)
        first_caption = np.concatenate([[0], np.bincount(owners, minlength=len(order)).cumsum()])
        return *texts, *PackedStrings.pack(order), caption_order, first_caption

    def __len__(self):
        """How many images have captions."""
        return len(self.names)

    def captions(self, i):
        """All captions of image i."""
        return [self.texts[k] for k in self.caption_order[self.first_caption[i]:self.first_caption[i + 1]]]

    def content(self, i):
        """The bytes of image i's file; none where it cannot be read."""
        with suppress(UnreadableImage):
            return self._read(i, lambda file: file.read())
        return b""

    def image(self, i, channels, side, place=(0.5, 0.5)):
        """Image i as a (side, side) picture: see `read_image`. Raises: UnreadableImage, OSError."""
        return self._read(i, lambda file: read_image(file, channels, side, place))

    def _read(self, i, use):
        """use(file) of image i's file. Raises: UnreadableImage; OSError where not the file but the whole data cannot be
        reached, for a minute, so that a passing fault of the file system changes no sample."""
        for wait in (1, 2, 4, 8, 16, 32, 0):
            try:
                with self.files.open(self.names[i]) as file:
                    return use(file)
            except Exception as error:   # Pillow and zipfile raise a dozen kinds on damaged bytes
                if self.path.exists() and getattr(error, "errno", None) not in OUT_OF_REACH:
                    raise UnreadableImage(f"--data {self.path}: {self.names[i]!r} cannot be read as an image ({error}); "
                                          "repair or remove it") from None
                warnings.warn(f"--data {self.path}: out of reach ({error}); trying again for a minute", stacklevel=2)
            time.sleep(wait)
        raise OSError(f"--data {self.path}: out of reach for a minute; bring it back and go on with --resume")


def first_readable(source, images, index, *how):
    """(number, picture, numbers passed over) of image `index` or, where it cannot be read, of the first after it in the
    ascending array `images` that can: a choice of the data alone. Raises: ValueError after a hundred in a row."""
    start, passed = np.searchsorted(images, index), []
    for k in range(start, start + min(100, len(images))):
        number = int(images[k % len(images)])
        with suppress(UnreadableImage):
            return number, source.image(number, *how), passed
        passed.append(number)
    raise ValueError(f"--data: none of {len(passed)} images from number {passed[0]} on can be read; repair or remove them")


def read_image(file, channels, side, place=(0.5, 0.5)):
    """A square crop of a picture, side x side pixels, mode "RGB" (channels 3) or "L" (1).

    The short side is scaled to `side` with antialiasing; `place` says where along the long side the crop lies, from 0
    (left or top) to 1. Transparent pictures are laid on white, 16-bit ones scaled to 8, and EXIF rotation is applied.
    """
    image = Image.open(file, formats=FORMATS)
    image.draft("RGB", (2 * side, 2 * side))   # JPEG only: decode at reduced scale, never below twice the target
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image) / 257).round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB" if channels == 3 else "L")
    short = min(image.size)
    left, top = ((length - short) * share for length, share in zip(image.size, place))
    return image.resize((side, side), Image.BICUBIC, box=(left, top, left + short, top + short), reducing_gap=3.0)


# Pictures one by one, and their latents


class Pictures(Dataset):
    """Pictures one by one: image(i) is picture i as PIL image, content(i) what it is made of. Unreadable ones are left out."""

    def __init__(self, count, image, content):
        self.count, self.image, self.content = count, image, content

    def __getitems__(self, indices):
        pictures = {}
        for i in indices:
            with suppress(UnreadableImage):
                pictures[i] = np.atleast_3d(np.asarray(self.image(i)))   # (H, W, c)
        arrays = np.stack(list(pictures.values()) or [np.zeros((0, 0, 0))])
        return list(pictures), torch.from_numpy(arrays).permute(0, 3, 1, 2)

    def batches(self, numbers, ranks):
        """(image numbers, uint8 (B, c, H, W)) for each of these lists of image numbers."""
        return make_loader(self, numbers, torch.device("cpu"), loader_workers(ranks))

    def contents(self, ranks):
        """A hash of each picture's bytes, whatever its name, place and date."""
        return in_order(ranks.gather([hash_of([self.content(i)]) for i in range(ranks.rank, self.count, ranks.world_size)]))


def shares(count, ranks, batch_size):
    """This rank's image numbers in batches; image i belongs to rank i mod world_size, so each is there exactly once."""
    mine = list(range(ranks.rank, count, ranks.world_size))
    return [mine[start:start + batch_size] for start in range(0, len(mine), batch_size)]


def in_order(parts):
    """What belongs to images 0, 1, ..., from every rank's part of it in a list or tensor, shared out as above."""
    return [item for row in zip_longest(*parts) for item in row if item is not None]


class LatentCache:
    """Mean and standard deviation of the latents of every image, encoded once: (count, flips, 2, C, h, w) float16.

    They lie in memory-mapped files of `chunk` images each, which appear under their names only when they are complete. So a
    killed job loses one chunk per rank at most, and jobs that start together share the work: each takes what is not there yet,
    in an order of its own.
    """

    def __init__(self, folder, count, flips, latent_shape):
        self.folder, self.count, self.shape = Path(folder), count, (flips, 2, *latent_shape)
        self.chunk = min(256, max(16, count // 64))   # depends on the count alone
        self.chunks = [None] * math.ceil(count / self.chunk)

    def image(self, i, mirror):
        """The moments (2, C, h, w) of image i or of its mirror image. Raises: UnreadableImage where it could not be read."""
        moments = self.chunks[i // self.chunk][i % self.chunk, int(mirror)]
        if np.isnan(moments[0, 0, 0, 0]):
            raise UnreadableImage(f"--cache-latents {self.folder}: image {i} could not be read when it was encoded")
        return moments

    def path(self, k):
        return self.folder / f"latents_{k:05d}.npy"

    def images(self, k):
        """The numbers of chunk k's images."""
        return range(k * self.chunk, min(self.count, (k + 1) * self.chunk))

    def open(self, k):
        """Map chunk k; returns whether it is there and whole. Nothing in the file is executed."""
        with suppress(FileNotFoundError):
            try:
                chunk = np.load(self.path(k), mmap_mode="r", allow_pickle=False)
                if chunk.shape == (len(self.images(k)), *self.shape) and chunk.dtype == np.float16:
                    self.chunks[k] = chunk
            except (ValueError, EOFError) as error:
                warnings.warn(f"{self.path(k)}: damaged ({error}); its images are encoded again", stacklevel=2)
        return self.chunks[k] is not None

    def build(self, pictures, encode, write, ranks, batch_size=16):
        """Encode what is missing, shared out over all ranks, and map all of it. encode: uint8 images (B, c, H, W) to mean and
        standard deviation, each (B, C, h, w); write(path, fill): lets fill(file) write a file atomically.

        Raises: ValueError where the disk is too small or a latent is not finite.
        """
        missing = [k for k in range(len(self.chunks)) if not self.open(k)]
        missing = ranks.gather(np.random.default_rng().permutation(missing).tolist())[0]
        needed, free = math.prod(self.shape) * 2 * sum(len(self.images(k)) for k in missing), shutil.disk_usage(self.folder).free
        if needed > free:
            raise ValueError(f"--cache-latents {self.folder}: needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free; "
                             "name another folder")
        for leftover in self.folder.glob(".*.tmp"):
            with suppress(FileNotFoundError):
                if time.time() - leftover.stat().st_mtime > 3600:   # of a killed job; a chunk is written in seconds
                    leftover.unlink()
        mine = missing[ranks.rank::ranks.world_size]
        with tqdm(total=sum(len(self.images(k)) for k in mine), desc="caching latents", unit="image",
                  disable=not (ranks.is_main and missing)) as bar:
            for k in mine:
                if not self.open(k):   # another job may have been faster
                    numbers = self.images(k)
                    batches = [list(numbers[i:i + batch_size]) for i in range(0, len(numbers), batch_size)]
                    moments = np.full((len(numbers), *self.shape), np.nan, np.float16)   # what cannot be read stays NaN
                    for readable, images in pictures.batches(batches, ranks):
                        if readable:
                            moments[np.array(readable) - numbers[0]] = self._encode(encode, images.to(ranks.device), readable)
                    write(self.path(k), lambda file: np.save(file, moments))
                bar.update(len(self.images(k)))
        until = time.monotonic() + 600
        while missing := [k for k in range(len(self.chunks)) if self.chunks[k] is None]:
            if any([self.open(k) for k in missing]):   # another rank is still at work, perhaps a slower one
                until = time.monotonic() + 600
            elif time.monotonic() > until:
                raise ValueError(f"--cache-latents {self.folder}: {len(missing)} files of other ranks are missing, and none came "
                                 "in ten minutes; is it on a shared file system?")
            else:
                time.sleep(1)
        return self

    def _encode(self, encode, images, numbers):
        views = [images, images.flip(-1)][:self.shape[0]]
        moments = torch.stack([torch.stack(encode(view), dim=1) for view in views], dim=1).half()   # (B, flips, 2, C, h, w)
        finite = moments.isfinite().flatten(1).all(dim=1).tolist()
        if not all(finite):
            raise ValueError(f"--cache-latents: image {numbers[finite.index(False)]} has latents that are not finite; is the "
                             "VAE right?")
        return moments.cpu().numpy()


# Training samples and batches


def split_images(count, val_fraction):
    """(training, validation) image numbers: a fixed random split that depends on the count alone, not on the seed."""
    order = counter_rng("split", count).permutation(count)
    held = round(count * val_fraction)
    return np.sort(order[held:]), np.sort(order[:held])


class Samples(Dataset):
    """Batches of everything that one step needs, each sample drawn from its own counters."""

    def __init__(self, source, tokenize, config, latent_shape, seed=0, random_crop=False, flip=False, validation=0,
                 images=None, latents=None):
        """`tokenize` maps captions to tokens (B, L); `images` are those of the split, ascending, all by default. With
        `validation` = n > 0 these are the n fixed validation samples: no caption is dropped, and timesteps are spread evenly
        over [0, T). `latents`: a LatentCache to use in place of images."""
        self.source, self.tokenize, self.config, self.latent_shape = source, tokenize, config, latent_shape
        self.seed, self.random_crop, self.flip, self.validation = seed, random_crop, flip, validation
        self.draws_posterior, self.latents = config.vae != "none", latents
        self.split = np.arange(len(source)) if images is None else images

    def __getitems__(self, keys):
        """keys: (epoch, position, image number) each. Returns a dict of images uint8 (B, c, H, W) or, from the cache, moments
        float16 (B, 2, C, h, w); tokens int64 (B, L); t int64 (B,); eps and, with a VAE, posterior_eps float32 (B, C, h, w);
        index int64 (B,); unreadable int64 (any number,). An unreadable image is replaced by the next that can be read, with
        that one's captions."""
        images, captions, t, numbers, unreadable, generator = [], [], [], [], [], torch.Generator()
        noise = torch.empty(1 + self.draws_posterior, len(keys), *self.latent_shape)
        side, channels = self.config.resolution, self.config.image_channels
        for k, (epoch, position, index) in enumerate(keys):
            rng = counter_rng("validation", position) if self.validation else counter_rng("sample", self.seed, epoch, position)
            u = rng.random(6)   # one number for each choice, drawn whether used or not, so that no switch shifts another
            empty = u[1] < self.config.caption_dropout and not self.validation
            place = (u[2], u[3]) if self.random_crop else (0.5, 0.5)
            mirror = self.flip and u[4] < 0.5
            t.append(int(((position + 0.5) / self.validation if self.validation else u[5]) * self.config.num_train_timesteps))
            if self.latents:
                number, image, passed = first_readable(self.latents, self.split, index, mirror)
            else:
                number, image, passed = first_readable(self.source, self.split, index, channels, side, place)
                image = np.asarray(image).reshape(side, side, channels).transpose(2, 0, 1)
                image = image[..., ::-1] if mirror else image
            choices = self.source.captions(number)
            images.append(image)
            captions.append("" if empty else choices[int(u[0] * len(choices))])
            numbers.append(number)
            unreadable += passed
            generator.manual_seed(int(rng.integers(2**63)))   # torch draws normals three times as fast as numpy
            for eps in noise[:, k]:
                eps.normal_(generator=generator)
        batch = {"moments" if self.latents else "images": torch.from_numpy(np.stack(images))}
        batch |= dict(tokens=self.tokenize(captions), t=torch.tensor(t), eps=noise[0], index=torch.tensor(numbers),
                      unreadable=torch.tensor(unreadable, dtype=torch.int64))
        if self.draws_posterior:
            batch["posterior_eps"] = noise[1]
        return batch


def to_unit_range(images):
    """uint8 [0, 255] to float32 [-1, 1]."""
    return images.float() / 127.5 - 1


class ShardedBatches(Sampler):
    """This rank's micro-batches of every step of an epoch, as lists of (epoch, position, image number).

    The epoch's order is one permutation, the same on all ranks. Step s takes positions [s B, (s + 1) B), whatever the
    number of ranks and of accumulation steps, so these only decide who computes what. A last, incomplete batch is left
    out; another permutation leaves out others.
    """

    def __init__(self, images, batch_size, ranks, accumulation=1, seed=0):
        """`batch_size` is global. Raises: ValueError where it cannot be shared out evenly or exceeds the images."""
        shares = ranks.world_size * accumulation
        if batch_size < 1 or batch_size % shares:
            raise ValueError(f"--batch-size {batch_size}: must be a multiple of processes x --accumulation = "
                             f"{ranks.world_size} x {accumulation}; try {max(1, round(batch_size / shares)) * shares}")
        if len(images) < batch_size:
            raise ValueError(f"--batch-size {batch_size}: there are only {len(images)} training images; "
                             f"use at most {len(images) // shares * shares}")
        self.images, self.batch_size, self.micro_batch = images, batch_size, batch_size // shares
        self.rank, self.accumulation, self.seed = ranks.rank, accumulation, seed
        self.steps_per_epoch = len(images) // batch_size
        self.start_at(0, 0)

    def start_at(self, epoch, step):
        """The next iteration begins at this step of this epoch."""
        self.epoch, self.first_step = epoch, step

    def __len__(self):
        return (self.steps_per_epoch - self.first_step) * self.accumulation

    def __iter__(self):
        order = counter_rng("order", self.seed, self.epoch).permutation(self.images)
        for step in range(self.first_step, self.steps_per_epoch):
            for micro in range(self.accumulation):
                start = step * self.batch_size + (self.rank * self.accumulation + micro) * self.micro_batch
                yield [(self.epoch, p, int(order[p])) for p in range(start, start + self.micro_batch)]


def validation_batches(images, batch_size, ranks):
    """Every validation image on exactly one rank, unpadded: lists of (0, position, image number)."""
    return [[(0, p, int(images[p])) for p in batch] for batch in shares(len(images), ranks, batch_size)]


def make_loader(samples, batches, device, workers=0, persistent=True):
    """A DataLoader over prepared batches, whose workers leave signals to the main process; `persistent` ones outlive an epoch."""
    return DataLoader(samples, batch_sampler=batches, collate_fn=lambda batch: batch, pin_memory=device.type == "cuda",
                      num_workers=workers, worker_init_fn=_outlive_signals, persistent_workers=persistent and workers > 0,
                      prefetch_factor=4 if workers else None, multiprocessing_context="fork" if workers else None)


def _outlive_signals(_):
    """A job's signals reach every process. Workers go on, so that the main process can finish its step and save, but not
    for ever: Python itself ends leftover workers by a SIGTERM and waits for them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def to_device(batch, device):
    """The batch's tensors on the device, copied without waiting where they are pinned."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


# The data of a run


class TrainingData:
    """The data as this rank sees it. Opened before the networks are loaded, so that a mistake shows at once."""

    def __init__(self, args, config, ranks):
        self.source = open_source(args.data, config, args.caption_template, args.max_bad_images, ranks)
        self.train_images, self.val_images = split_images(len(self.source), args.val_fraction)
        self.batches = ShardedBatches(self.train_images, args.batch_size, ranks, args.accumulation, args.seed)
        shown = (self.val_images if len(self.val_images) else self.train_images)[:16]
        self.max_bad, self.unreadable, self.named = args.max_bad_images, set(), set()   # image numbers: this rank's, all ranks'
        self.prompts = args.sample_prompts or [self.source.captions(i)[0] for i in shown]   # of the sample grids
        self.latents = None
        if args.cache_latents is not None and config.vae == "none":
            raise ValueError("--cache-latents: --vae none has no latents to cache; leave one of the two out")
        if args.cache_latents is not None and args.random_crop:
            raise ValueError("--cache-latents: with --random-crop every visit has other latents; leave one of the two out")

    def cache_latents(self, args, model, ranks, write):
        """Encode all images once, or find them encoded; write(path, fill) lets fill(file) write a file atomically. The folder's
        name is a hash of all that the latents depend on."""
        codec, side = model.codec, model.config.resolution
        # The place of one that is unreadable will say so, and training replaces it.
        pictures = Pictures(len(self.source), lambda i: self.source.image(i, 3, side), self.source.content)
        made_of = dict(images=hash_of(pictures.contents(ranks)), resolution=side, crop="centre", flips=1 + args.flip,
                       vae=hash_of_weights(codec.vae), scale=codec.scale, shift=codec.shift, dtype="float16")
        folder = Path(args.cache_latents or Path(args.data).parent) / f"latents_{hash_of([made_of])[:16]}"
        folder.mkdir(parents=True, exist_ok=True)
        cache = LatentCache(folder, pictures.count, 1 + args.flip, codec.latent_shape)
        self.latents = cache.build(pictures, lambda images: codec.moments(to_unit_range(images)), write, ranks)

    def make_loaders(self, args, model, ranks):
        """The training and validation loaders, given the tokenizer and the latent shape."""
        workers = args.workers
        if workers is None:
            workers = 0 if is_builtin(args.data) else loader_workers(ranks)
        captions, limit = {"": None}, 2**30 // (4 * model.config.token_length * model.text_encoder.width)
        for text in self.source.texts:
            captions[text] = None
            if len(captions) > limit:
                break
        else:   # the features of all different captions fit into 1 GiB
            model.text_encoder.remember(captions)
        common = dict(source=self.source, tokenize=model.text_encoder.tokenize, config=model.config,
                      latent_shape=model.codec.latent_shape, latents=self.latents)
        samples = Samples(**common, seed=args.seed, random_crop=args.random_crop, flip=args.flip, images=self.train_images)
        self.loader = make_loader(samples, self.batches, ranks.device, workers)
        self.val_loader = make_loader(Samples(**common, validation=len(self.val_images), images=self.val_images),
                                      validation_batches(self.val_images, self.batches.micro_batch, ranks), ranks.device, workers,
                                      persistent=False)

    def watched(self, loader):
        """The loader's batches, without the numbers of unreadable images that they carry: those are kept."""
        for batch in loader:
            self.unreadable.update(batch.pop("unreadable").tolist())
            yield batch

    def check_images(self, ranks):
        """Name the unreadable images that any rank has met, each once. Raises: ValueError where they are too many."""
        new = set().union(*ranks.gather(self.unreadable - self.named))
        self.named |= new
        share = f"{len(self.named)} of {len(self.source)} images"
        if len(self.named) > self.max_bad * len(self.source):
            raise ValueError(f"--max-bad-images {self.max_bad}: {share} cannot be read; repair or remove "
                             f"{', '.join(repr(self.source.names[i]) for i in sorted(self.named)[:100])}")
        if new and ranks.is_main:
            tqdm.write(f"warning: {share} replaced so far by the next that can be read, new among them: "
                       f"{', '.join(repr(self.source.names[i]) for i in sorted(new))}", file=sys.stderr)

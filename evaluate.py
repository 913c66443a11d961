"""Evaluation: how good a model's pictures are, in figures that another machine reproduces.

    python evaluate.py --checkpoint runs/run_20250131_120000     # built-in pictures: accuracy
    torchrun --standalone --nproc_per_node=2 evaluate.py --checkpoint RUN --guidance-scales 1 2 3 5
    python evaluate.py --images FOLDER --resolution 256 --data flickr8k   # made by anything
    sbatch slurm/evaluate.sh --checkpoint RUN

    accuracy    built-in pictures only: the share of pictures that show what their prompt says
    fid         Frechet distance of Inception features, Heusel et al. 2017
    kid         unbiased squared MMD of the same features, Binkowski et al. 2018
    clip        CLIP score: the mean of 100 cos(image, prompt), Hessel et al. 2021
    clip-fd     Frechet distance of CLIP's image features, Kynkaanniemi et al. 2023

Picture i is a function of the seed, prompt i and i alone, so neither the batch size nor the number
of processes changes a figure. Every rank adds up float64 sums over its own pictures; after one
all-reduce all ranks compute the same figures.
"""
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPConfig, CLIPModel, CLIPProcessor

import data
from data import BACKGROUNDS, COLOURS, SCENES, SHAPES, SIZES, gather, hash_of, interleave
from models import load_model, load_pretrained, load_whole, require, write_atomically
from sample import (
    DEFAULTS,
    OVERVIEWS,
    add_sampling_flags,
    check_sampling,
    draw_share,
    sampling_settings,
)

METRICS = ("accuracy", "fid", "kid", "clip", "clip-fd")
PLACES = ("checkpoint", "images", "data", "inception_weights", "clip_model", "output", "device",
          "batch_size", "vae", "text_encoder")
LIBRARIES = ("torch", "torchmetrics", "torch-fidelity", "transformers", "diffusers", "numpy",
             "pillow")
KID_IMAGES, KID_SUBSETS, KID_SUBSET_SIZE = 10_000, 100, 1000

# Feature networks. In full float32: TF32's rounding would make figures depend on the kind of GPU.


class Inception:
    """torch-fidelity's Inception v3: images uint8 (B, c, H, W) to features (B, d) float32.

    It resizes as the original FID does, bilinear without antialiasing, like torch-fidelity;
    torchmetrics' default, with antialiasing, gives other figures.
    """

    name, frechet = "inception", "fid"

    def __init__(self, layer, weights, device):
        from torch_fidelity import feature_extractor_inceptionv3 as inception
        try:
            if weights:   # refuses what is not plain tensors
                torch.load(weights, map_location="cpu", weights_only=True)
            network = inception.FeatureExtractorInceptionV3("inception-v3-compat", [layer], weights)
        except Exception as error:  # a missing file, no internet, damaged or other weights
            reason = str(error).strip().splitlines()[0][:100]
            raise FileNotFoundError(f"--inception-weights {weights}: {reason}; download "
                                    f"{inception.URL_INCEPTION_V3} and name the file") from None
        self.network, self.dim = network.to(device), int(layer)
        self.settings = dict(layer=layer, antialias=False, weights=data.hash_of_weights(network))

    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    def __call__(self, images):
        return self.network(images.expand(-1, 3, -1, -1))[0]


class Clip:
    """A CLIP model: images uint8 (B, c, H, W), or prompts, to projected features (B, d) float32."""

    name, frechet = "clip", "clip-fd"

    def __init__(self, name, device):
        network = load_whole(CLIPModel, name, "clip", "--clip-model")
        load = CLIPProcessor.from_pretrained
        self.processor = load_pretrained(load, name, "clip", "--clip-model")
        self.network = network.to(device, torch.float32).requires_grad_(False).eval()
        self.dim = network.config.projection_dim
        self.settings = dict(model=name, weights=data.hash_of_weights(network))

    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    def __call__(self, images):
        pictures = list(images.expand(-1, 3, -1, -1).cpu())
        inputs = self.processor.image_processor(pictures, return_tensors="pt").to(images.device)
        return self.network.visual_projection(self.network.vision_model(**inputs).pooler_output)

    def score(self, features, prompts):
        """100 cos(image, prompt), (B,) float64. A long prompt is cut by the tokenizer, which keeps
        its end token: that is where CLIP reads off the sentence."""
        longest = self.network.config.text_config.max_position_embeddings
        tokens = self.processor.tokenizer(prompts, padding=True, truncation=True,
                                          max_length=longest, return_tensors="pt")
        tokens = tokens.to(features.device)
        hidden = self.network.text_model(tokens.input_ids, tokens.attention_mask).pooler_output
        text = self.network.text_projection(hidden)
        return 100 * F.cosine_similarity(features.double(), text.double())


# Distances between sets of features


class FeatureStatistics:
    """What FID and KID need of many features x (d,), in memory that does not grow with them.

    `moments` is the float64 sum of (1, x) (1, x)^T: count, sum and outer products in one matrix, so
    that ranks add up in one all-reduce. KID needs features: those of the first KID_IMAGES images.
    """

    def __init__(self, dim, device):
        self.moments = torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device=device)
        self.features = torch.empty(0, dim)

    def update(self, numbers, features):
        """Add the features (B, d) of these images, whose numbers ascend on each rank."""
        ones_and_features = F.pad(features.double(), (1, 0), value=1.0)
        self.moments += ones_and_features.T @ ones_and_features
        kept = features[:sum(i < KID_IMAGES for i in numbers)].float().cpu()
        self.features = torch.cat([self.features, kept])

    def reduce(self):
        """Join all ranks' parts, on every rank; image i was on rank i mod world_size."""
        dist.all_reduce(self.moments)
        if not self.moments.isfinite().all():
            raise ValueError("--metrics: features are not finite: broken weights or pictures")
        self.features = torch.stack(interleave(gather(self.features)))
        return self

    def gaussian(self):
        """Mean (d,) and covariance (d, d) of all features."""
        count = self.moments[0, 0]
        mean = self.moments[0, 1:] / count
        return mean, (self.moments[1:, 1:] - count * mean.outer(mean)) / (count - 1)


def frechet_distance(a, b):
    """|mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)): Heusel et al. 2017, Eq. 6.

    The eigenvalues of S_a S_b are those of S_a^(1/2) S_b S_a^(1/2), which is symmetric, so that
    they stay real.
    """
    (mu_a, S_a), (mu_b, S_b) = a.gaussian(), b.gaussian()
    eigenvalues, vectors = torch.linalg.eigh(S_a)
    root = (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T
    trace_of_root = torch.linalg.eigvalsh(root @ S_b @ root).clamp(min=0).sqrt().sum()
    squared = (mu_a - mu_b).square().sum() + S_a.trace() + S_b.trace() - 2 * trace_of_root
    return max(squared.item(), 0.0)   # in this order NaN stays NaN


def kernel_distance(generated, reference, device):
    """Mean and standard deviation of the unbiased MMD^2 with kernel (x . y / d + 1)^3 over random
    subsets (Binkowski et al. 2018, Eq. 4); the subsets are those that torch-fidelity draws."""
    from torchmetrics.image.kid import poly_mmd
    # At most half of a set, so that subsets differ.
    size = min(KID_SUBSET_SIZE, len(generated) // 2, len(reference) // 2)
    if size < 2:
        raise ValueError("--metrics kid: needs at least 4 pictures to judge and 4 to compare with")
    rng = np.random.RandomState(2020)
    sets = [features.to(device, torch.float64) for features in (generated, reference)]
    values = [poly_mmd(*(features[rng.choice(len(features), size, replace=False)]
                         for features in sets)).item() for _ in range(KID_SUBSETS)]
    return np.mean(values).item(), np.std(values).item()


# The built-in pictures' answer key, and prompt accuracy

ATTRIBUTES = ("size", "colour", "shape", "background")
# A shape is read where the overlap with its template is at least this, and this much better than
# any other shape's.
MIN_OVERLAP, MIN_MARGIN = 0.84, 0.06


def sharpen(coverage):
    """Edges twice as steep, so that a faint halo around a thing does not count."""
    return (2 * coverage - 0.5).clip(0, 1)


def template(shape, x, y, radius, resolution):
    """Coverage (resolution, resolution) in [0, 1] of a shape whose centroid is at (x, y), in
    eighths of a pixel."""
    canvas = Image.new("L", (8 * resolution, 8 * resolution))
    # The triangle's centroid lies 0.25 radii below its middle; the other shapes are symmetric.
    corners = data.outline(shape, x, y - (0.25 * radius if shape == "triangle" else 0), radius)
    ImageDraw.Draw(canvas).polygon(corners, fill=255)
    return sharpen(np.asarray(canvas.reduce(8), dtype=np.float32) / 255)


def split_by_columns(mask):
    """The parts of mask (H, W) that empty columns separate, each as a mask of its own."""
    filled = mask.any(axis=0)
    run = np.cumsum(filled & np.diff(filled, prepend=False))   # runs of filled columns so far
    return [mask & (run == k) for k in range(1, run.max() + 1)]


def neighbours(mask):
    """How many of the nine pixels around and at each pixel of mask (H, W) are set."""
    return np.lib.stride_tricks.sliding_window_view(np.pad(mask, 1), (3, 3)).sum(axis=(2, 3))


def read_thing(pixels, ground, region):
    """Size, colour and shape of the thing in region (H, H), a mask; pixels (H, H, 3) in [0, 1]."""
    # A pixel is ground + coverage * (paint - ground): 1 inside, a fraction where an edge passes.
    axis = np.median(pixels[region], axis=0) - ground
    if axis @ axis < 0.04:
        return {}
    coverage = sharpen((pixels - ground) @ axis / (axis @ axis))
    coverage = np.where(neighbours(region) > 0, coverage, 0)
    inside = coverage > 0.5
    palette = np.array(list(COLOURS.values())) / 255
    nearest = np.linalg.norm(pixels[inside][:, None] - palette, axis=-1).argmin(axis=1)
    votes = np.bincount(nearest, minlength=len(palette))

    # Intersection over union with each shape of each size, drawn around the thing's centroid.
    places, side = 8 * (np.arange(len(region)) + 0.5), 8 * len(region)
    y, x = (round(places @ coverage.sum(axis=other) / coverage.sum()) for other in (1, 0))
    ious = {}
    for (size, fraction), shape in product(SIZES.items(), SHAPES):
        drawn = template(shape, x, y, side * fraction, len(region))
        ious[size, shape] = np.minimum(drawn, coverage).sum() / np.maximum(drawn, coverage).sum()
    (size, shape), best = max(ious.items(), key=lambda item: item[1])
    rival = max(iou for (_, other), iou in ious.items() if other != shape)
    is_clear = best >= MIN_OVERLAP and best - rival >= MIN_MARGIN
    # Edges are mixtures and vote for others, but three fifths of the thing must agree.
    has_colour = votes.max() > 0.6 * inside.sum()
    return dict(size=size if best >= 0.6 else None, shape=shape if is_clear else None,
                colour=list(COLOURS)[votes.argmax()] if has_colour else None)


def read_picture(image):
    """{attribute: word} that a picture (H, H, 3) uint8 shows; None where it is not clear."""
    pixels = np.asarray(image, dtype=np.float32) / 255
    border = np.concatenate([pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3),
                             pixels[2:-2, :2].reshape(-1, 3), pixels[2:-2, -2:].reshape(-1, 3)])
    grounds = np.array(list(BACKGROUNDS.values())) / 255
    nearest = np.linalg.norm(grounds - np.median(border, axis=0), axis=1).argmin()
    ground, reading = grounds[nearest], dict.fromkeys(ATTRIBUTES)
    if np.mean(np.linalg.norm(border - ground, axis=1) < 0.35) < 0.8:
        return reading
    reading["background"] = list(BACKGROUNDS)[nearest]

    # The thing is what is far from the background, without pixels that stand alone. Where an empty
    # band of columns, or else of rows, separates two, it is not one thing.
    mask = np.linalg.norm(pixels - ground, axis=-1) > 0.3
    mask &= neighbours(mask) >= 4
    parts = split_by_columns(mask)
    if len(parts) < 2:
        parts = [part.T for part in split_by_columns(mask.T)]
    parts = [part for part in parts if part.sum() >= 0.005 * mask.size]
    return reading | read_thing(pixels, ground, parts[0]) if len(parts) == 1 else reading


def read_answers(images, scenes):
    """Counts, int64 (2, 6): for trained and for held-out scenes the pictures with each attribute
    right, with all right, and the pictures in all."""
    counts = torch.zeros(2, len(ATTRIBUTES) + 2, dtype=torch.int64)
    for image, scene in zip(images.permute(0, 2, 3, 1).cpu().numpy(), scenes):
        found = read_picture(image)
        right = [found[name] == getattr(scene, name) for name in ATTRIBUTES]
        counts[int(data.is_held_out(scene))] += torch.tensor([*right, all(right), True])
    return counts


def accuracy_report(counts):
    """{"trained": {"images": n, "colour": {"share", "interval", "right"}, ..., "all": ...},
    "held_out": ...}."""
    return {group: {"images": n} | {name: dict(share=k / n, interval=wilson_interval(k, n), right=k)
                                    for name, k in zip([*ATTRIBUTES, "all"], right)}
            for group, (*right, n) in zip(("trained", "held_out"), counts.tolist())}


def wilson_interval(k, n):
    """The 95% confidence interval of a share of which k in n were seen: Wilson 1927."""
    z, p = 1.959963984540054, k / n
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return [min(1.0, max(0.0, (middle + sign * half) / (1 + z**2 / n))) for sign in (-1, 1)]


# Prompts, reference pictures and finished pictures


@dataclass
class PictureSet:
    """Pictures by number."""

    count: int
    image: Callable     # image(i): a PIL image
    content: Callable   # content(i): the bytes that decide it

    def batches(self, batch_size):
        """(image numbers, uint8 (B, c, H, W)) of this rank's share."""
        pictures = data.OnDemand(lambda i: np.atleast_3d(np.array(self.image(i))))
        numbers = data.rank_batches(self.count, batch_size)
        loader = data.make_loader(pictures, numbers, workers=data.default_workers())
        for batch, images in zip(numbers, loader):
            yield batch, images.permute(0, 3, 1, 2)

    def hash(self):
        return hash_of(sorted(data.content_hashes(self.content, self.count)))


def finished_pictures(folder, side):
    """Those of --images, cropped and scaled to side x side like the data."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--images {folder}: no such folder")
    paths = [folder / name for name in data.Files(folder).names]
    paths = [path for path in paths if path.suffix.lower() in data.IMAGE_SUFFIXES
             and path.name not in OVERVIEWS]
    if not paths:
        raise ValueError(f"--images {folder}: holds no images ({', '.join(data.IMAGE_SUFFIXES)})")
    return PictureSet(len(paths), lambda i: data.read_image(paths[i], 3, side),
                      lambda i: paths[i].read_bytes())


def builtin_data(args):
    """(prompts, scenes, reference). Pictures 0, 2, ... are of trained combinations and 1, 3, ... of
    held-out ones, each in a fixed random order, over and over; the reference are right drawings."""
    groups = [[scene for scene in SCENES if data.is_held_out(scene) == held_out]
              for held_out in (False, True)]
    orders = [data.counter_rng("evaluation", 0).permutation(group) for group in groups]
    scenes = [orders[i % 2][i // 2 % len(orders[i % 2])] for i in range(args.num_images)]

    def image(i):
        picture = data.draw(scenes[i], args.resolution, data.counter_rng("evaluation", 1, i))
        return picture if args.channels == 3 else picture.convert("L")

    reference = PictureSet(len(scenes), image, lambda i: image(i).tobytes())
    return [scene.caption for scene in scenes], scenes, reference


def captioned_data(args, run):
    """(prompts, None, reference). Prompts are the validation images' captions in a fixed random
    order, their first captions first; without such images, those of the reference. `run` is what
    the training run says of itself, {} for finished pictures."""
    is_the_runs = run.get("data") in (args.data, os.path.abspath(args.data))
    how = [run.get("caption_template"), run.get("max_bad_images", 0.01)]
    if is_the_runs:
        how += [run.get("captions"), run.get("caption_column")]
    source = data.open_source(args.data, None, *how)
    training, validation = data.split_images(source, args.val_fraction)
    if is_the_runs:
        require(len(training) == run["train_images"], args, "data", f"{len(training)} images with "
                f"--val-fraction {args.val_fraction}, not the {run['train_images']} of training, "
                "so some may be validation images now; restore both")
    everything = np.arange(len(source))
    ascending = dict(validation=validation, training=training, all=everything)[args.reference]
    require(len(ascending), args, "reference", f"{args.data} with --val-fraction "
            f"{args.val_fraction} has no such images; choose another")
    prompts, prompted = [], validation if len(validation) else ascending
    order = data.counter_rng("evaluation", 0).permutation(prompted)
    for i in range(args.num_images):
        captions = source.captions(order[i % len(order)])
        prompts.append(captions[i // len(order) % len(captions)])
    numbers = data.counter_rng("evaluation", 1).permutation(ascending)   # the first serve for KID

    def load(number):
        return source.image(number, args.channels, args.resolution)

    return prompts, None, PictureSet(len(numbers),
                                     lambda i: data.first_readable(load, ascending, numbers[i])[1],
                                     lambda i: source.content(numbers[i]))


def progress(batches, total, label, device):
    """The batches on the device, with a bar that shows the time left."""
    with tqdm(total=total, desc=label, unit="image", disable=dist.get_rank() > 0) as bar:
        for numbers, images in batches:
            yield numbers, images.to(device)
            bar.update(min(len(numbers) * dist.get_world_size(), total - bar.n))


# Judging


@dataclass
class Task:
    """What is judged by which metrics, and against what."""

    metrics: list
    count: int                                     # pictures to judge
    prompts: list                                  # of the generated pictures
    scenes: list | None                            # of built-in prompts
    reference: PictureSet
    networks: dict = field(default_factory=dict)   # feature network -> reference statistics


def choose_metrics(args):
    """--metrics, or those that suit the data. Raises: ValueError where one does not apply."""
    allowed = set(METRICS) - ({"accuracy", "clip"} if args.images else set())   # need prompts
    if not data.is_builtin(args.data) or args.channels == 1:
        allowed -= {"accuracy"}
    for name in set(args.metrics or ()) - allowed:
        raise ValueError(f"--metrics {name}: accuracy is for models on the built-in pictures in "
                         f"colour, clip for models; choose from {', '.join(sorted(allowed))}")
    chosen = args.metrics or ({"accuracy"} if "accuracy" in allowed else allowed)
    return [name for name in METRICS if name in chosen]


def leave_out(task, args):
    """Leave out, with a note, a Frechet distance chosen by default that the number of pictures does
    not allow. Raises: ValueError where --metrics asked for it."""
    count = task.reference.count
    for name in [name for name in ("fid", "clip-fd") if name in task.metrics]:
        dim = int(args.inception_layer)
        if name == "clip-fd":
            dim = load_pretrained(CLIPConfig.from_pretrained, args.clip_model, "clip",
                                  "--clip-model").projection_dim
        if min(task.count, count) < dim:   # the covariance would be singular
            reason = (f"--metrics {name}: {task.count} pictures, a reference of {count}: below the "
                      f"{dim} dimensions of the features; use kid, or more images: --num-images, "
                      "--reference all")
            if args.metrics:
                raise ValueError(reason)
            task.metrics.remove(name)
            if dist.get_rank() == 0:
                print(f"left out: {reason}", flush=True)


@torch.no_grad()
def load_networks(task, args, device):
    """Load the feature networks that the metrics need, and the reference's statistics; returns what
    these are made of."""
    made_of, networks, count = {}, [], task.reference.count
    if {"fid", "kid"} & set(task.metrics):
        networks.append(Inception(args.inception_layer, args.inception_weights, device))
    if {"clip", "clip-fd"} & set(task.metrics):
        networks.append(Clip(args.clip_model, device))
    pictures = task.reference.hash() if networks else None
    for network in networks:
        made_of[network.name] = network.settings | dict(pictures=pictures, count=count)
        statistics = FeatureStatistics(network.dim, device)
        batches = task.reference.batches(args.batch_size)
        for numbers, images in progress(batches, count, f"{network.name}, reference", device):
            statistics.update(numbers, network(images))
        task.networks[network] = statistics.reduce()
    return made_of


@torch.no_grad()
def judge(task, batches, label, device):
    """{metric: figure} of the pictures that come in batches of (image numbers, uint8 (B, c, H, W)),
    a share on each rank. Only sums are kept, so that memory does not grow with the pictures."""
    statistics = {network: FeatureStatistics(network.dim, device) for network in task.networks}
    clip_sum = torch.zeros((), dtype=torch.float64, device=device)
    right, values = torch.zeros(2, len(ATTRIBUTES) + 2, dtype=torch.int64), {}
    for numbers, images in progress(batches, task.count, label, device):
        if "accuracy" in task.metrics:
            right += read_answers(images, [task.scenes[i] for i in numbers])
        for network in task.networks:
            features = network(images)
            statistics[network].update(numbers, features)
            if network.name == "clip" and "clip" in task.metrics:
                clip_sum += network.score(features, [task.prompts[i] for i in numbers]).sum()
    if "accuracy" in task.metrics:
        dist.all_reduce(right)
        values["accuracy"] = accuracy_report(right)
    if "clip" in task.metrics:
        dist.all_reduce(clip_sum)
        values["clip"] = max(clip_sum.item() / task.count, 0.0)
    for network, reference in task.networks.items():
        generated = statistics[network].reduce()
        if network.frechet in task.metrics:
            values[network.frechet] = frechet_distance(generated, reference)
        if network.name == "inception" and "kid" in task.metrics:
            values["kid"], values["kid_std"] = kernel_distance(generated.features,
                                                               reference.features, device)
    for name, value in values.items():
        if name != "accuracy" and not math.isfinite(value):
            raise ValueError(f"--metrics {name}: came out as {value}: broken weights or pictures")
    return values


# Results


def print_results(results):
    """A line for each guidance scale, or for each of the two groups of built-in pictures, with 95%
    intervals, from the main rank."""
    for result in results if dist.get_rank() == 0 else ():
        scale, speed = result["guidance_scale"], f"{result['images_per_second']:.2f} images/s"
        what = "pictures" if scale is None else f"guidance scale {scale:g}"
        figures = [f"{name} {result[name]:.3f}" for name in ("fid", "clip", "clip-fd")
                   if name in result]
        if "kid" in result:
            figures.append(f"kid {result['kid']:.5f} +- {result['kid_std']:.5f}")
        if figures:
            print(f"{what}: {', '.join(figures)}; {speed}")
        for group, report in result.get("accuracy", {}).items():
            shares = ["{} {:.1f}% ({:.1f}-{:.1f})".format(
                name, *(100 * x for x in (value["share"], *value["interval"])))
                for name, value in report.items() if name != "images"]
            group = f"{report['images']} pictures of {group.replace('_', ' ')} combinations"
            print(f"{what}, {group}: {', '.join(shares)}; {speed}")


# Command line


def parse_args(argv=None):
    parser = data.Parser("Judge a model's pictures, or those of a folder.")
    group = parser.add_argument_group("judging")
    judged = group.add_mutually_exclusive_group(required=True)
    judged.add_argument("--checkpoint", help="a run folder (its newest checkpoint) or a file")
    judged.add_argument("--images", type=Path, metavar="DIR", help="finished pictures; needs "
                        "--data and --resolution")
    add = group.add_argument
    add("--data", help="source of prompts and reference, see train.py (default: the model's)")
    add("--val-fraction", type=float, help="of --data (default: as in training; "
        "with --images 1)")
    add("--reference", choices=("validation", "training", "all"), default="validation",
        help="which of the data's images to compare with")
    add("--resolution", type=int, help="with --images: side in pixels to which all are scaled")
    add("--num-images", type=int, help="to draw (default: 1000 for accuracy alone, else 5000)")
    add("--guidance-scales", type=float, nargs="+", default=[DEFAULTS["guidance_scale"]],
        metavar="S", help="judge the model at each of these")
    add("--metrics", nargs="+", choices=METRICS, help="(default: what suits the data)")
    add("--inception-weights", metavar="FILE", help="torch-fidelity's weights (default: download)")
    add("--inception-layer", choices=("64", "192", "768", "2048"), default="2048",
        help="width of the features; those below 2048 need fewer images, but give other figures")
    add("--clip-model", default="openai/clip-vit-large-patch14", help="of CLIP score and clip-fd")
    add("--output", type=Path, help="the results' parent folder (default: beside what is judged)")
    add_sampling_flags(parser)
    args = parser.parse_args(argv)
    check_sampling(args, num_images=4, resolution=1, val_fraction=(0, 1))
    require(args.images or not args.resolution, args, "resolution", "goes with --images; omit it")
    require(args.checkpoint or args.data and args.resolution, args, "images", "add --data, to "
            "compare with, and --resolution, the side to compare at")
    return args


def open_model(args, device):
    """(model, what is judged, a stem for its results); flags that were not given become what it was
    trained with."""
    model = load_model(args.checkpoint, device, args.weights, args.compile,
                       vae=args.vae, text_encoder=args.text_encoder)
    args.data = args.data or model.run["data"]
    args.resolution, args.channels = model.config.resolution, model.config.image_channels
    path, judged = Path(model.source["checkpoint"]), {k: model.source[k] for k in ("epoch", "step")}
    judged["sha256"] = hash_of([np.memmap(path, mode="r")])
    return model, judged, path.parent / f"evaluation_step{judged['step']:08d}"


def open_pictures(args):
    """The same for --images: (pictures, what is judged, a stem for the results)."""
    pictures = finished_pictures(args.images, args.resolution)
    args.channels, args.num_images = 3, pictures.count
    stem = args.images.parent / f"{args.images.name}_evaluation"
    return pictures, dict(sha256=pictures.hash()), stem


def open_record(args, stem, **more):
    """(file, record so far). All that the figures depend on names the folder, so that a rerun finds
    the scales that are done."""
    settings = {k: v for k, v in vars(args).items() if k not in (*PLACES, "guidance_scales")}
    code = [Path(__file__).with_name(name).read_bytes()
            for name in ("models.py", "data.py", "sample.py", "evaluate.py")]
    settings |= dict(more, code=hash_of(code))
    folder = (args.output or stem.parent) / f"{stem.name}_{hash_of([settings])[:8]}"
    path, record = folder / "evaluation.json", dict(settings=settings, results=[])
    return path, gather(json.loads(path.read_text()) if path.is_file() else record)[0]


def main():
    args = parse_args()
    device = data.setup_processes(args.device)
    torch.backends.cuda.matmul.allow_tf32 = False     # convolutions: see the feature networks
    if args.checkpoint:
        model, judged, stem = open_model(args, device)
        run, scales, dtype = model.run, set(args.guidance_scales), data.amp_dtype(args.amp, device)
    else:
        pictures, judged, stem = open_pictures(args)
        # The pictures that they are compared with need no captions.
        run, scales, dtype = dict(val_fraction=1.0, caption_template=""), {None}, None
    if args.val_fraction is None:
        args.val_fraction = run["val_fraction"]
    metrics, builtin = choose_metrics(args), data.is_builtin(args.data)
    args.num_images = args.num_images or (1000 if metrics == ["accuracy"] else 5000)
    prompts, scenes, reference = builtin_data(args) if builtin else captioned_data(args, run)
    task = Task(metrics, args.num_images, prompts, scenes, reference)
    leave_out(task, args)
    networks = load_networks(task, args, device)
    args.metrics = task.metrics
    path, record = open_record(args, stem, judged=judged, networks=networks, dtype=str(dtype),
                               prompts=hash_of(prompts))
    where = {name: str(getattr(args, name)) for name in PLACES}
    where |= {name: version(name) for name in LIBRARIES}
    where |= dict(processes=dist.get_world_size(),
                  device=torch.cuda.get_device_name() if device.type == "cuda" else "cpu")
    print_results(record["results"])   # of an earlier, interrupted call
    for scale in sorted(scales - {result["guidance_scale"] for result in record["results"]}):
        start = time.perf_counter()
        label = "pictures" if scale is None else f"guidance scale {scale:g}"
        if scale is None:
            batches = pictures.batches(args.batch_size)
        else:
            batches = draw_share(model, prompts, range(len(prompts)), guidance_scale=scale,
                                 dtype=dtype, **sampling_settings(args))
        values = judge(task, batches, label, device)
        values |= dict(guidance_scale=scale, where=where,
                       images_per_second=task.count / (time.perf_counter() - start))
        record["results"].append(values)
        record["results"].sort(key=lambda result: result["guidance_scale"])   # None: only one
        print_results([values])   # before what may fail on a full disk
        if dist.get_rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: file.write(json.dumps(record, indent=1).encode()))
    if dist.get_rank() == 0:
        print(f"figures and settings: {path}")


if __name__ == "__main__":
    data.run_main(main)

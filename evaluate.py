"""Evaluation: how good a model's pictures are, in figures that another machine reproduces.

    python evaluate.py --checkpoint runs/run_20250131_120000     # built-in pictures: accuracy
    torchrun --standalone --nproc_per_node=2 evaluate.py --checkpoint RUN --guidance-scales 1 2 3 5
    sbatch slurm/run.sh evaluate.py --checkpoint RUN

    accuracy    built-in pictures only: the share of pictures that show what their prompt says
    fid         Frechet distance of Inception features, Heusel et al. 2017
    clip        CLIP score: the mean of 100 cos(image, prompt), Hessel et al. 2021

Picture i is a function of the seed, prompt i and i alone, so neither the batch size nor the number
of processes changes a figure. Every rank adds up float64 sums over its own pictures; after one
all-reduce all ranks compute the same figures.
"""
import json
import math
import os
import time
from functools import lru_cache, partial
from importlib.metadata import version
from itertools import product
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPModel, CLIPProcessor

import data
from data import BACKGROUNDS, COLOURS, SCENES, SHAPES, SIZES, gather, hash_of
from models import load_model, load_pretrained, load_whole, require, write_atomically
from sample import DEFAULTS, add_sampling_flags, check_sampling, draw_share, sampling_settings

METRICS = ("accuracy", "fid", "clip")
PLACES = ("checkpoint", "data", "inception_weights", "clip_model", "output", "device",
          "batch_size", "vae", "text_encoder")
LIBRARIES = ("torch", "torch-fidelity", "transformers", "diffusers", "numpy", "pillow")

# Feature networks. In full float32: TF32's rounding would make figures depend on the kind of GPU.


class Inception:
    """torch-fidelity's Inception v3: images uint8 (B, c, H, W) to features (B, d) float32.

    It resizes as the original FID does, bilinear without antialiasing; torchmetrics' default, with
    antialiasing, gives other figures.
    """

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
    """A CLIP model: 100 cos(image, prompt), (B,) float64, of images uint8 (B, c, H, W). A long
    prompt is cut by the tokenizer, which keeps its end token: there CLIP reads off the sentence."""

    def __init__(self, name, device):
        network = load_whole(CLIPModel, name, "clip", "--clip-model")
        load = CLIPProcessor.from_pretrained
        self.processor = load_pretrained(load, name, "clip", "--clip-model")
        self.network = network.to(device, torch.float32).requires_grad_(False).eval()
        self.settings = dict(model=name, weights=data.hash_of_weights(network))

    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    def __call__(self, images, prompts):
        pictures, network = list(images.expand(-1, 3, -1, -1).cpu()), self.network
        longest = network.config.text_config.max_position_embeddings
        inputs = self.processor(images=pictures, text=prompts, padding=True, truncation=True,
                                max_length=longest, return_tensors="pt").to(images.device)
        seen = network.vision_model(inputs.pixel_values).pooler_output
        read = network.text_model(inputs.input_ids, inputs.attention_mask).pooler_output
        return 100 * F.cosine_similarity(network.visual_projection(seen).double(),
                                         network.text_projection(read).double())


# The distance between two sets of features


class Gaussian:
    """Mean and covariance of many features x (d,), in memory that does not grow with them.

    `moments` is the float64 sum of (1, x) (1, x)^T: count, sum and outer products in one matrix, so
    that ranks add up in one all-reduce.
    """

    def __init__(self, dim, device):
        self.moments = torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device=device)

    def update(self, features):
        """Add features (B, d)."""
        ones_and_features = F.pad(features.double(), (1, 0), value=1.0)
        self.moments += ones_and_features.T @ ones_and_features

    def reduce(self):
        """Mean (d,) and covariance (d, d) of the features of all ranks."""
        dist.all_reduce(self.moments)
        count = self.moments[0, 0]
        mean = self.moments[0, 1:] / count
        return mean, (self.moments[1:, 1:] - count * mean.outer(mean)) / (count - 1)


def frechet_distance(a, b):
    """|mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)) of two (mean, covariance): Heusel et al.
    2017, Eq. 6.

    The eigenvalues of S_a S_b are those of S_a^(1/2) S_b S_a^(1/2), which is symmetric, so that
    they stay real.
    """
    (mu_a, S_a), (mu_b, S_b) = a, b
    eigenvalues, vectors = torch.linalg.eigh(S_a)
    root = (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T
    trace_of_root = torch.linalg.eigvalsh(root @ S_b @ root).clamp(min=0).sqrt().sum()
    squared = (mu_a - mu_b).square().sum() + S_a.trace() + S_b.trace() - 2 * trace_of_root
    return max(squared.item(), 0.0)   # in this order NaN stays NaN


# The built-in pictures' answer key, and prompt accuracy

ATTRIBUTES = ("size", "colour", "shape", "background")
# A drawing is near up to 21 grey levels: a blank picture is 24 from its nearest one, two things in
# one picture are further, and blends of two drawings without a common word begin at 21.2. Large
# bright things may be off by a quarter of what they change, which is what rough edges come to.
MAX_DISTANCE, MAX_SHARE = 21, 0.25
# A picture half way between two drawings is as far from the one as from the other: it is neither.
MAX_RATIO = 0.9


@lru_cache(maxsize=1)
def coverages(side):
    """What share of each pixel a thing covers, (sizes, shapes, places, side * side), and the sums
    of their squares. Places are 1/64 of the side apart, half a pixel of 32, and reach a little
    further than `jitter`'s, but not so far that a thing is cut off."""
    steps = 0.5 + np.arange(-4, 5) / 64
    # The red channel of a yellow thing on black is its coverage.
    drawn = [np.asarray(data.draw(data.Scene(size, "yellow", shape, "black"), side, place))[..., 0]
             for size, shape, *place in product(SIZES, SHAPES, steps, steps)]
    masks = np.reshape(drawn, (len(SIZES), len(SHAPES), -1, side * side)) / np.float32(255)
    return masks, np.square(masks).sum(axis=-1)


def read_picture(image):
    """The nearest of all drawings to a picture (H, H, 3) uint8: (Scene, or None where none is near,
    and its distance: root mean square over pixels, in grey levels of 255)."""
    masks, areas = coverages(len(image))
    grounds = np.array(list(BACKGROUNDS.values()), dtype=np.float32)[:, None, None, None]
    paints = np.array(list(COLOURS.values()), dtype=np.float32) - grounds
    rest = np.reshape(image, (-1, 3)) - grounds
    # A drawing is ground + mask * paint. Its squared distance is |rest - mask * paint|^2, here
    # multiplied out, for all (backgrounds, sizes, shapes, places, colours).
    squares = np.square(rest).sum(axis=(-2, -1), keepdims=True)
    squares = squares - 2 * (masks @ rest @ paints.swapaxes(-2, -1))
    squares += areas[..., None] * np.square(paints).sum(axis=-1)[..., None, :]
    background, size, shape, place, colour = np.unravel_index(squares.argmin(), squares.shape)
    nearest, second = np.sort(squares.min(axis=3), axis=None)[:2]

    thing = masks[size, shape, place][:, None] * paints[background, 0, 0, colour]
    distance = np.sqrt(np.square(rest[background, 0, 0] - thing).mean()).item()
    is_near = distance <= max(MAX_DISTANCE, MAX_SHARE * np.sqrt(np.square(thing).mean()))
    if not is_near or nearest > MAX_RATIO**2 * second:
        return None, distance
    return data.Scene([*SIZES][size], [*COLOURS][colour], SHAPES[shape],
                      [*BACKGROUNDS][background]), distance


def read_answers(images, scenes):
    """Of each picture (is held out, [each attribute is right ..., all are], distance)."""
    answers = []
    for image, scene in zip(images.permute(0, 2, 3, 1).cpu().numpy(), scenes):
        found, distance = read_picture(image)
        right = [getattr(found, name, None) == getattr(scene, name) for name in ATTRIBUTES]
        answers.append((data.is_held_out(scene), [*right, all(right)], distance))
    return answers


def accuracy_report(answers):
    """{"trained": {"images": n, "rms": {"median", "p90"}, "colour": {"share", "interval", "right"},
    ..., "all": ...}, "held_out": ...}."""
    report = {}
    for group, is_held_out in (("trained", False), ("held_out", True)):
        right, distances = zip(*(answer[1:] for answer in answers if answer[0] == is_held_out))
        median, p90 = np.quantile(distances, (0.5, 0.9)).tolist()
        report[group] = dict(images=len(right), rms=dict(median=median, p90=p90))
        for name, column in zip([*ATTRIBUTES, "all"], zip(*right)):
            k, n = sum(column), len(column)
            report[group][name] = dict(share=k / n, interval=wilson_interval(k, n), right=k)
    return report


def wilson_interval(k, n):
    """The 95% confidence interval of a share of which k in n were seen: Wilson 1927."""
    z, p = 1.959963984540054, k / n
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return [min(1.0, max(0.0, (middle + sign * half) / (1 + z**2 / n))) for sign in (-1, 1)]


# Whoever reads for the method may stop here; the rest is prompts, pictures and records.


# Prompts, and the reference: pictures by number


def progress(batches, total, label, device):
    """The batches on the device, with a bar that shows the time left."""
    with tqdm(total=total, desc=label, unit="image", disable=dist.get_rank() > 0) as bar:
        for numbers, images in batches:
            yield numbers, images.to(device)
            bar.update(min(len(numbers) * dist.get_world_size(), total - bar.n))


class Reference:
    """Pictures to compare with: image(i), a PIL image, for i < count."""

    def __init__(self, count, image):
        self.count, self.image = count, image

    def __getitem__(self, i):
        return np.atleast_3d(np.array(self.image(i)))

    @torch.no_grad()
    def statistics(self, network, batch_size, device):
        """Mean and covariance of the features of all pictures, over all ranks."""
        statistics = Gaussian(network.dim, device)
        numbers = data.rank_batches(self.count, batch_size)
        loader = data.make_loader(self, numbers, workers=data.default_workers())
        for _, images in progress(zip(numbers, loader), self.count, "reference", device):
            statistics.update(network(images.permute(0, 3, 1, 2)))
        return statistics.reduce()


def builtin_data(args):
    """(prompts, scenes, reference). Pictures 0, 2, ... are of trained combinations and 1, 3, ... of
    held-out ones, each in a fixed random order, over and over; the reference are right drawings."""
    groups = [[s for s in SCENES if data.is_held_out(s) == held] for held in (False, True)]
    orders = [data.counter_rng("evaluation", 0).permutation(group) for group in groups]
    scenes = [orders[i % 2][i // 2 % len(orders[i % 2])] for i in range(args.num_images)]

    def image(i):
        place = data.jitter(data.counter_rng("evaluation", 1, i))
        return data.draw(scenes[i], args.resolution, place).convert(args.mode)

    return [scene.caption for scene in scenes], scenes, Reference(len(scenes), image)


def captioned_data(args, run):
    """(prompts, None, reference). Prompts are the validation images' captions in a fixed random
    order, their first captions first; without such images, those of the reference. `run` is what
    the training run says of itself."""
    is_the_runs = run["data"] in (args.data, os.path.abspath(args.data))
    names = ("captions", "caption_column") if is_the_runs else ()
    source = data.open_source(args.data, None, run["caption_template"], run["max_bad_images"],
                              *map(run.get, names))
    training, held = data.split_images(source, args.val_fraction)
    require(not is_the_runs or len(training) == run["train_images"], args, "data",
            f"has {len(training)} training images with --val-fraction {args.val_fraction}, and not "
            f"the run's {run['train_images']}: some may be validation images now; restore both")
    ascending = dict(validation=held, training=training, all=np.arange(len(source)))[args.reference]
    require(len(ascending), args, "reference", "the data have none; choose another")
    prompts, prompted = [], held if len(held) else ascending
    order = data.counter_rng("evaluation", 0).permutation(prompted)
    for i in range(args.num_images):
        captions = source.captions(order[i % len(order)])
        prompts.append(captions[i // len(order) % len(captions)])
    load = partial(source.image, channels=len(args.mode), side=args.resolution)
    return prompts, None, Reference(
        len(ascending), lambda i: data.first_readable(load, ascending, ascending[i])[1])


# Judging


def choose_metrics(args, count):
    """--metrics, or those that suit the data. Raises: ValueError where one does not apply."""
    has_key = data.is_builtin(args.data) and args.mode == "RGB"
    chosen = args.metrics or (["accuracy"] if has_key else ["fid", "clip"])
    if "accuracy" in chosen and not has_key:
        raise ValueError("--metrics accuracy: is for models on the built-in pictures in colour")
    if "fid" in chosen and min(args.num_images, count) < int(args.inception_layer):
        why = (f"needs {args.inception_layer} pictures, not {args.num_images} and {count}, as "
               "many as features; add --num-images, --reference all or --inception-layer 64")
        if args.metrics:
            raise ValueError(f"--metrics fid: {why}")
        if dist.get_rank() == 0:
            print(f"fid left out: {why}", flush=True)
        return ["clip"]
    return chosen


@torch.no_grad()
def judge(args, batches, inception, clip, prompts, scenes, label, device):
    """{metric: figure} of the pictures that come in batches of (image numbers, uint8 (B, c, H, W)),
    a share on each rank; inception and clip: the networks, or None."""
    statistics = inception and Gaussian(inception.dim, device)
    clip_sum, values = torch.zeros((), dtype=torch.float64, device=device), {}
    answers = []
    for numbers, images in progress(batches, args.num_images, label, device):
        if "accuracy" in args.metrics:
            answers += read_answers(images, [scenes[i] for i in numbers])
        if clip:
            clip_sum += clip(images, [prompts[i] for i in numbers]).sum()
        if inception:
            statistics.update(inception(images))
    if "accuracy" in args.metrics:
        values["accuracy"] = accuracy_report(sum(gather(answers), []))
    if clip:
        dist.all_reduce(clip_sum)
        values["clip"] = max(clip_sum.item() / args.num_images, 0.0)
    if inception:
        values["fid"] = frechet_distance(statistics.reduce(), inception.reference)
    return values


# Results


def print_results(results):
    """A line for each guidance scale, or for each of the two groups of built-in pictures, with 95%
    intervals, from the main rank."""
    for result in results if dist.get_rank() == 0 else ():
        print(f"guidance scale {result['guidance_scale']:g}:", ", ".join(
            f"{k} {result[k]:.5g}" for k in ("fid", "clip", "images_per_second") if k in result))
        for group, report in result.get("accuracy", {}).items():
            shares = ["{} {:.1f}% ({:.1f}-{:.1f})".format(
                name, *(100 * x for x in (report[name]["share"], *report[name]["interval"])))
                for name in (*ATTRIBUTES, "all")]
            rms = f"{report['rms']['median']:.1f} (90th percentile {report['rms']['p90']:.1f})"
            print(f"  {report['images']} pictures of {group} combinations: {', '.join(shares)}; "
                  f"{rms} grey levels from the nearest drawing")


# Command line


def parse_args(argv=None):
    parser = data.Parser("Judge a model's pictures.")
    add = parser.add_argument_group("judging").add_argument
    add("--checkpoint", required=True, help="a run folder (its newest checkpoint) or a file")
    add("--data", help="source of prompts and reference, see train.py; not given: the model's")
    add("--val-fraction", type=float, help="not given: as in training")
    add("--reference", choices=("validation", "training", "all"), default="validation",
        help="which of the data's images to compare with")
    add("--num-images", type=int, help="to draw; not given: 1000 for accuracy alone, else 5000")
    add("--guidance-scales", type=float, nargs="+", default=[DEFAULTS["guidance_scale"]],
        help="judge the model at each of these")
    add("--metrics", nargs="+", choices=METRICS, help="not given: what suits the data")
    add("--inception-weights", help="torch-fidelity's weights; not given: download")
    add("--inception-layer", choices=("64", "192", "768", "2048"), default="2048",
        help="width of the features; those below 2048 need fewer images, but give other figures")
    add("--clip-model", default="openai/clip-vit-large-patch14", help="of the CLIP score")
    add("--output", type=Path, help="the results' parent folder; not given: the run's")
    add_sampling_flags(parser)
    args = parser.parse_args(argv)
    check_sampling(args, num_images=4, val_fraction=(0, 1))
    return args


def open_record(args, source, **more):
    """(file, record so far). All that the figures depend on names the folder, so that a rerun finds
    the scales that are done."""
    settings = {k: v for k, v in vars(args).items() if k not in (*PLACES, "guidance_scales")}
    checkpoint = Path(source["checkpoint"])
    settings |= dict(more, epoch=source["epoch"], step=source["step"], code=data.hash_of_code(),
                     checkpoint=hash_of([np.memmap(checkpoint, mode="r")]))
    name = f"evaluation_step{source['step']:08d}_{hash_of([settings])[:8]}"
    path = (args.output or checkpoint.parent) / name / "evaluation.json"
    record = json.loads(path.read_text()) if path.is_file() else dict(settings=settings, results=[])
    return path, gather(record)[0]


def main(argv=None):
    args = parse_args(argv)
    device = data.setup_processes(args.device)
    torch.backends.cuda.matmul.allow_tf32 = False     # convolutions: see the feature networks
    model = load_model(args.checkpoint, device, args.weights, vae=args.vae,
                       text_encoder=args.text_encoder)
    # What was not given is as in training.
    args.data = args.data or model.run["data"]
    if args.val_fraction is None:
        args.val_fraction = model.run["val_fraction"]
    args.resolution, args.mode = model.config.resolution, {1: "L", 3: "RGB"}[
        model.config.image_channels]
    builtin, dtype = data.is_builtin(args.data), data.amp_dtype(args.amp, device)
    args.num_images = args.num_images or (1000 if builtin and not args.metrics else 5000)
    prompts, scenes, reference = builtin_data(args) if builtin else captioned_data(args, model.run)
    args.metrics = choose_metrics(args, reference.count)
    inception = clip = None
    if "fid" in args.metrics:
        inception = Inception(args.inception_layer, args.inception_weights, device)
        inception.reference = reference.statistics(inception, args.batch_size, device)
    if "clip" in args.metrics:
        clip = Clip(args.clip_model, device)
    networks = [network.settings for network in (inception, clip) if network]
    path, record = open_record(args, model.source, dtype=str(dtype), prompts=hash_of(prompts),
                               pictures=reference.count, networks=networks)
    print_results(record["results"])   # of an earlier, interrupted call
    for scale in sorted({*args.guidance_scales} - {r["guidance_scale"] for r in record["results"]}):
        start = time.perf_counter()
        batches = draw_share(model, prompts, range(len(prompts)), guidance_scale=scale,
                             dtype=dtype, **sampling_settings(args))
        values = judge(args, batches, inception, clip, prompts, scenes, f"s = {scale:g}", device)
        record["results"].append(values | dict(
            guidance_scale=scale, where={name: version(name) for name in LIBRARIES},
            images_per_second=args.num_images / (time.perf_counter() - start)))
        print_results(record["results"][-1:])   # before what may fail on a full disk
        if dist.get_rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, lambda file: file.write(json.dumps(record, indent=1).encode()))
    if dist.get_rank() == 0:
        print(f"figures and settings: {path}")


if __name__ == "__main__":
    data.run_main(main)

"""Evaluation: how good a model's pictures are, as figures that another machine, or another number of GPUs, reproduces.

    python evaluate.py --checkpoint runs/run_20250131_120000            # built-in pictures: prompt accuracy
    torchrun --standalone --nproc_per_node=2 evaluate.py --checkpoint RUN --num-images 5000 --guidance-scales 1 2 3 5 7.5
    python evaluate.py --images FOLDER --resolution 256 --data flickr8k # finished pictures, made by anything
    sbatch slurm/evaluate.sh --checkpoint RUN

    accuracy    built-in pictures only: the share of pictures that show what their prompt says
    fid         Frechet distance of Inception features, Heusel et al. 2017
    kid         unbiased squared MMD of the same features, good for few images, Binkowski et al. 2018
    clip        CLIP score: the mean of 100 cos(image, prompt), Hessel et al. 2021 in torchmetrics' scale
    clip-fd     Frechet distance of CLIP's image features, Kynkaanniemi et al. 2023

Picture i is a function of the seed, prompt i and i alone, so neither the batch size nor the number of processes changes
a figure. Every rank adds up float64 sums over its own pictures; one all-reduce later all ranks compute the same figures.
"""
import argparse
import json
import math
import os
import time
from dataclasses import dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from torch.nn import functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import data
from data import Pictures, amp_dtype, counter_rng, hash_of, hash_of_weights, in_order, run_main, setup_ranks, shares
from models import load_model, load_pretrained, load_whole, write_atomically
from sample import DEFAULTS, add_sampling_flags, check_at_least, generate, sampling_settings

METRICS = ("accuracy", "fid", "kid", "clip", "clip-fd")
PLACES = ("checkpoint", "images", "data", "inception_weights", "clip_model", "output", "cache_dir", "device", "batch_size")
LIBRARIES = ("torch", "torchmetrics", "torch-fidelity", "transformers", "diffusers", "numpy", "pillow")
KID_IMAGES, KID_SUBSETS, KID_SUBSET_SIZE = 10_000, 100, 1000

# Feature networks, in full float32: TF32's rounding would make the figures depend on the generation of the GPU


def hash_of_file(path):
    with open(path, "rb") as file:
        return hash_of(iter(lambda: file.read(2**24), b""))


class Inception:
    """torch-fidelity's Inception v3: images uint8 (B, c, H, W) to features (B, d) float32.

    It resizes as the original FID does, bilinear without antialiasing, like torch-fidelity, pytorch-fid and torchmetrics
    with antialias=False; torchmetrics' default, with antialiasing, gives other figures.
    """

    name, frechet = "inception", "fid"

    def __init__(self, layer, weights, device):
        from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3, FeatureExtractorInceptionV3
        try:
            if weights:
                torch.load(weights, map_location="cpu", weights_only=True)   # refuses what is not plain tensors
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", [layer], weights).to(device)
        except Exception as error:  # a missing file, no internet, damaged bytes, another network's weights
            raise FileNotFoundError(f"--inception-weights {weights}: {str(error).strip().splitlines()[0][:100]}; download "
                                    f"{URL_INCEPTION_V3} where there is internet and name that file") from None
        self.dim = int(layer)
        self.settings = dict(layer=layer, antialias=False, weights=hash_of_weights(self.network))

    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    def __call__(self, images):
        return self.network(images.expand(-1, 3, -1, -1))[0]


class Clip:
    """A CLIP model: images uint8 (B, c, H, W), or prompts, to projected features (B, d) float32."""

    name, frechet = "clip", "clip-fd"

    def __init__(self, name, device):
        from transformers import CLIPModel, CLIPProcessor
        self.network = load_whole(CLIPModel, name, "clip", "--clip-model")
        self.processor = load_pretrained(CLIPProcessor.from_pretrained, name, "clip", "--clip-model")
        self.network.to(device, torch.float32).requires_grad_(False).eval()
        self.dim = self.network.config.projection_dim
        self.settings = dict(model=name, weights=hash_of_weights(self.network))

    @torch.backends.cudnn.flags(enabled=True, allow_tf32=False)
    def __call__(self, images):
        inputs = self.processor.image_processor(list(images.expand(-1, 3, -1, -1).cpu()), return_tensors="pt").to(images.device)
        return self.network.visual_projection(self.network.vision_model(**inputs).pooler_output)

    def score(self, features, prompts):
        """100 cos(image, prompt), (B,) float64. A long prompt is cut by the tokenizer, which keeps its end token: that is
        where CLIP reads off the sentence."""
        tokens = self.processor.tokenizer(prompts, padding=True, truncation=True, return_tensors="pt",
                                          max_length=self.network.config.text_config.max_position_embeddings).to(features.device)
        hidden = self.network.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        text = self.network.text_projection(hidden.pooler_output)
        return 100 * F.cosine_similarity(features.double(), text.double())


# Distances between sets of features


class FeatureStatistics:
    """What FID and KID need of many features x (d,), in memory that does not grow with their number.

    `moments` is the float64 sum of (1, x) (1, x)^T: count, sum and sum of outer products in one matrix, so that ranks
    add up in one all-reduce. KID needs the features themselves: those of the first KID_IMAGES images are kept.
    """

    def __init__(self, dim, device):
        self.moments = torch.zeros(dim + 1, dim + 1, dtype=torch.float64, device=device)
        self.features = torch.empty(0, dim)

    def update(self, indices, features):
        """Add the features (B, d) of these images, whose numbers ascend on each rank."""
        ones_and_features = F.pad(features.double(), (1, 0), value=1.0)
        self.moments += ones_and_features.T @ ones_and_features
        self.features = torch.cat([self.features, features[:sum(i < KID_IMAGES for i in indices)].float().cpu()])

    def reduce(self, ranks):
        """Join all ranks' parts, on every rank; image i was on rank i mod world_size."""
        ranks.sum(self.moments)
        self.features = torch.stack(in_order(ranks.gather(self.features)))
        return self

    def gaussian(self):
        """Mean (d,) and covariance (d, d) of all features."""
        count = self.moments[0, 0]
        mean = self.moments[0, 1:] / count
        return mean, (self.moments[1:, 1:] - count * mean.outer(mean)) / (count - 1)


def frechet_distance(a, b):
    """|mu_a - mu_b|^2 + Tr(S_a + S_b - 2 (S_a S_b)^(1/2)): Heusel et al. 2017, Eq. 6.

    The eigenvalues of S_a S_b are those of S_a^(1/2) S_b S_a^(1/2), which is symmetric, so that they stay real.
    """
    (mu_a, S_a), (mu_b, S_b) = a.gaussian(), b.gaussian()
    eigenvalues, vectors = torch.linalg.eigh(S_a)
    root = (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T
    trace_of_root = torch.linalg.eigvalsh(root @ S_b @ root).clamp(min=0).sqrt().sum()
    return max(0.0, ((mu_a - mu_b).square().sum() + S_a.trace() + S_b.trace() - 2 * trace_of_root).item())


def kernel_distance(generated, reference, device):
    """Mean and standard deviation of the unbiased MMD^2 with kernel (x . y / d + 1)^3 over random subsets (Binkowski et al.
    2018, Eq. 4); the subsets are those that torch-fidelity draws."""
    from torchmetrics.image.kid import poly_mmd
    size = min(KID_SUBSET_SIZE, len(generated) // 2, len(reference) // 2)   # at most half of a set, so that subsets differ
    if size < 2:
        raise ValueError("--metrics kid: needs at least 4 pictures to judge and 4 to compare with; use more, or other metrics")
    rng = np.random.RandomState(2020)
    sets = [features.to(device, torch.float64) for features in (generated, reference)]
    values = [poly_mmd(*(features[rng.choice(len(features), size, replace=False)] for features in sets)).item()
              for _ in range(KID_SUBSETS)]
    return np.mean(values).item(), np.std(values).item()


# Prompt accuracy


def read_answers(images, scenes, attributes):
    """Counts, int64 (2, attributes + 2): for trained and for held-out scenes the pictures with each attribute right, with
    all right, and the pictures in all. Where two things share a picture, an attribute must be right for both."""
    counts = torch.zeros(2, len(attributes) + 2, dtype=torch.int64)
    for image, scene in zip(images.permute(0, 2, 3, 1).cpu().numpy(), scenes):
        found, expected = data.read_picture(image), data.expected_reading(scene)
        wrong = {name.removeprefix("other_") for name in expected if found.get(name) != expected[name]}
        counts[int(data.is_held_out(scene))] += torch.tensor([*(name not in wrong for name in attributes), not wrong, True])
    return counts


def attributes_of(scene):
    return [name for name in data.expected_reading(scene) if not name.startswith("other_")]


def accuracy_report(counts, attributes):
    """{"trained": {"images": n, "colour": {"share", "interval", "right"}, ..., "all": ...}, "held_out": ...}."""
    return {group: {"images": n} | {name: dict(share=k / n, interval=wilson_interval(k, n), right=k)
                                    for name, k in zip([*attributes, "all"], right)}
            for group, (*right, n) in zip(("trained", "held_out"), counts.tolist())}


def wilson_interval(k, n):
    """The 95% confidence interval of a share of which k in n were seen: Wilson 1927."""
    z, p = 1.959963984540054, k / n
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return [max(0.0, (middle - half) / (1 + z**2 / n)), min(1.0, (middle + half) / (1 + z**2 / n))]


# Prompts, reference pictures and finished pictures


def finished_pictures(folder, side):
    """Those of --images, cropped and scaled to side x side like the data."""
    if not folder.is_dir():
        raise FileNotFoundError(f"--images {folder}: no such folder")
    # sample.py's overviews lie among its pictures.
    paths = [folder / name for name in data.FolderFiles(folder).names() if PurePosixPath(name).suffix.lower() in
             data.IMAGE_SUFFIXES and PurePosixPath(name).name not in ("grid.png", "steps.png")]
    if not paths:
        raise ValueError(f"--images {folder}: holds no images ({', '.join(sorted(data.IMAGE_SUFFIXES))})")
    return Pictures(len(paths), lambda i: data.read_image(paths[i], 3, side), lambda i: paths[i].read_bytes())


def builtin_data(args):
    """(prompts, scenes, reference). Pictures 0, 2, ... are of trained combinations and 1, 3, ... of held-out ones, each in
    a fixed random order, over and over. The reference are right drawings of the same scenes."""
    every = data.all_scenes(hard=args.data == "shapes-hard")
    groups = [[scene for scene in every if data.is_held_out(scene) == held_out] for held_out in (False, True)]
    orders = [counter_rng("evaluation", 0).permutation(len(group)) for group in groups]
    scenes = [groups[i % 2][orders[i % 2][i // 2 % len(orders[i % 2])]] for i in range(args.num_images)]

    def image(i):
        picture = data.draw(scenes[i], args.resolution, counter_rng("evaluation", 1, i))
        return picture if args.channels == 3 else picture.convert("L")

    return [data.caption_of(scene) for scene in scenes], scenes, Pictures(len(scenes), image, lambda i: image(i).tobytes())


def captioned_data(args, run, ranks):
    """(prompts, None, reference). Prompts are the validation images' captions in a fixed random order, their first captions
    first; where there are none, those of the reference. `run` is what the training run says of itself, {} for finished
    pictures."""
    source = data.open_source(args.data, None, run.get("caption_template", "{}"), ranks=ranks)
    training, validation = data.split_images(len(source), args.val_fraction)
    if args.data == run.get("data") and len(training) != run["train_images"]:
        raise ValueError(f"--data {args.data}: has {len(training)} training images with --val-fraction {args.val_fraction}, the "
                         f"model was trained on {run['train_images']}, so some may be validation images now; restore both")
    ascending = {"validation": validation, "training": training, "all": np.arange(len(source))}[args.reference]
    if not len(ascending):
        raise ValueError(f"--reference {args.reference}: {args.data} with --val-fraction {args.val_fraction} has no such images; "
                         "choose another")
    order, prompts = counter_rng("evaluation", 0).permutation(validation if len(validation) else ascending), []
    for i in range(args.num_images):
        captions = source.captions(order[i % len(order)])
        prompts.append(captions[i // len(order) % len(captions)])
    numbers = counter_rng("evaluation", 1).permutation(ascending)     # the first KID_IMAGES of these serve for KID

    def image(i):
        return data.first_readable(source, ascending, numbers[i], args.channels, args.resolution)[1]

    return prompts, None, Pictures(len(numbers), image, lambda i: source.content(numbers[i]))


def progress(batches, total, label, ranks):
    """The batches, with a bar that shows the time left."""
    with tqdm(total=total, desc=label, unit="image", disable=not ranks.is_main) as bar:
        for indices, images in batches:
            yield indices, images.to(ranks.device)
            bar.update(min(len(indices) * ranks.world_size, total - bar.n))


def reference_statistics(network, pictures, made_of, folder, ranks, batch_size):
    """FeatureStatistics of the reference pictures, from the cache if they are there. The file's name carries the hash of
    all that they depend on, `made_of`, so one that is found fits."""
    path = folder / f"reference_{network.name}_{hash_of([made_of])[:16]}.npz"
    statistics = FeatureStatistics(network.dim, ranks.device)
    if ranks.gather(path.is_file())[0]:
        with np.load(path, allow_pickle=False) as file:
            statistics.moments, statistics.features = torch.from_numpy(file["moments"]), torch.from_numpy(file["features"])
        statistics.moments = statistics.moments.to(ranks.device)
        return statistics
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--cache-dir {folder}: cannot be written to; name another folder")
    batches = pictures.batches(shares(pictures.count, ranks, batch_size), ranks)
    for indices, images in progress(batches, pictures.count, f"reference, {network.name}", ranks):
        statistics.update(indices, network(images))
    statistics.reduce(ranks)
    if ranks.is_main:
        arrays = dict(moments=statistics.moments.cpu().numpy(), features=statistics.features.numpy())
        write_atomically(path, lambda file: np.savez(file, **arrays, made_of=json.dumps(made_of)))
    return statistics


# Judging


@dataclass
class Task:
    """What is judged by which metrics, and against what."""

    metrics: list
    count: int                                     # pictures to judge
    prompts: list                                  # of the generated pictures
    scenes: list | None                            # of built-in prompts
    reference: Pictures
    networks: dict = field(default_factory=dict)   # feature network -> FeatureStatistics of the reference


def choose_metrics(args):
    """--metrics, or those that suit the data. Raises: ValueError where one does not apply."""
    allowed = set(METRICS) - ({"accuracy", "clip"} if args.images else set())     # these need prompts
    if not data.is_builtin(args.data) or args.channels == 1:
        allowed -= {"accuracy"}
    for name in set(args.metrics or ()) - allowed:
        raise ValueError(f"--metrics {name}: accuracy is for models on the built-in pictures in colour, clip for models; "
                         f"choose from {', '.join(sorted(allowed))}")
    chosen = args.metrics or ({"accuracy"} if "accuracy" in allowed else allowed)
    return [name for name in METRICS if name in chosen]


def load_networks(task, args, ranks, cache):
    """Load the feature networks that the metrics need, and their reference statistics; returns what these are made of.

    A Frechet distance chosen by default that the number of pictures does not allow is left out with a note.
    Raises: ValueError where it was asked for by --metrics."""
    made_of, networks = {}, []
    if {"fid", "kid"} & set(task.metrics):
        networks.append(Inception(args.inception_layer, args.inception_weights, ranks.device))
    if {"clip", "clip-fd"} & set(task.metrics):
        networks.append(Clip(args.clip_model, ranks.device))
    pictures = hash_of(sorted(task.reference.contents(ranks))) if networks else None
    for network in networks:
        if network.frechet in task.metrics and min(task.count, task.reference.count) < network.dim:
            few = f"--num-images {task.count}" if task.count < network.dim else f"a reference of {task.reference.count}"
            reason = (f"--metrics {network.frechet}: {few} is below the {network.dim} dimensions of the features, so their "
                      "covariance is singular and the distance says more of the count than of pictures; use kid or more images")
            if args.metrics:
                raise ValueError(reason)
            task.metrics.remove(network.frechet)
            if ranks.is_main:
                print(f"left out: {reason}")
        made_of[network.name] = dict(network=network.settings, pictures=pictures, count=task.reference.count, crop="centre",
                                     resolution=args.resolution, channels=args.channels, kid_images=KID_IMAGES)
        task.networks[network] = reference_statistics(network, task.reference, made_of[network.name], cache, ranks,
                                                      args.batch_size)
    return made_of


@torch.no_grad()
def judge(task, batches, label, ranks):
    """{metric: figure} of the pictures that come in batches of (image numbers, uint8 (B, c, H, W)), a share on each rank.

    Nothing is kept of a batch but sums, so memory does not grow with the number of pictures."""
    statistics = {network: FeatureStatistics(network.dim, ranks.device) for network in task.networks}
    clip_sum = torch.zeros((), dtype=torch.float64, device=ranks.device)
    attributes = attributes_of(task.scenes[0]) if "accuracy" in task.metrics else []
    right, values = torch.zeros(2, len(attributes) + 2, dtype=torch.int64), {}
    for indices, images in progress(batches, task.count, label, ranks):
        if "accuracy" in task.metrics:
            right += read_answers(images, [task.scenes[i] for i in indices], attributes)
        for network in task.networks:
            features = network(images)
            statistics[network].update(indices, features)
            if network.name == "clip" and "clip" in task.metrics:
                clip_sum += network.score(features, [task.prompts[i] for i in indices]).sum()
    if "accuracy" in task.metrics:
        values["accuracy"] = accuracy_report(ranks.sum(right), attributes)
    if "clip" in task.metrics:
        values["clip"] = max(0.0, ranks.sum(clip_sum).item() / task.count)
    for network, reference in task.networks.items():
        generated = statistics[network].reduce(ranks)
        if network.frechet in task.metrics:
            values[network.frechet] = frechet_distance(generated, reference)
        if network.name == "inception" and "kid" in task.metrics:
            values["kid"], values["kid_std"] = kernel_distance(generated.features, reference.features, ranks.device)
    for name, value in values.items():
        if name != "accuracy" and not math.isfinite(value):
            raise ValueError(f"--metrics {name}: came out as {value}; the feature network's weights or the pictures are broken")
    return values


def generated_pictures(model, prompts, ranks, batch_size, **settings):
    """This rank's pictures, drawn a batch at a time by sample.py's own `generate`."""
    for indices in shares(len(prompts), ranks, batch_size):
        yield indices, generate(model, [prompts[i] for i in indices], indices=indices, batch_size=batch_size, **settings)


# Results


def save_record(folder, record):
    """Write evaluation.json, and all figures so far as TensorBoard curves over guidance scale, in place of those before."""
    folder.mkdir(parents=True, exist_ok=True)
    outdated = list(folder.glob("events.out.tfevents.*"))
    write_atomically(folder / "evaluation.json", lambda file: file.write(json.dumps(record, indent=1).encode()))
    with SummaryWriter(folder, purge_step=0) as writer:
        for result in record["results"]:
            figures = {name: value for name, value in result.items() if isinstance(value, float)}
            for group, report in result.get("accuracy", {}).items():
                figures |= {f"{name}_{group}": value["share"] for name, value in report.items() if name != "images"}
            step = round(100 * figures.pop("guidance_scale", 0))   # TensorBoard's axis holds whole numbers only
            for name, value in figures.items():
                writer.add_scalar(f"over 100 x guidance scale/{name}", value, step)
    for path in outdated:   # all in the new one; TensorBoard reads them by name, which within a second is not by age
        path.unlink()


def print_table(results):
    """A row for each guidance scale; for prompt accuracy one for each of the two groups, with 95% intervals."""
    rows = []
    for result in results:
        scale = {"guidance scale": "-" if result["guidance_scale"] is None else f"{result['guidance_scale']:g}"}
        figures = {name: f"{result[name]:.3f}" for name in ("fid", "clip", "clip-fd") if name in result}
        figures |= {"kid": f"{result['kid']:.5f} +- {result['kid_std']:.5f}"} if "kid" in result else {}
        groups = [{"combinations": group.replace("_", " "), "images": f"{report['images']}"} | {
            name: "{:.1f} ({:.1f}-{:.1f})".format(*(100 * x for x in (value["share"], *value["interval"])))
            for name, value in report.items() if name != "images"} for group, report in result.get("accuracy", {}).items()]
        rows += [scale | row | {"images/s": f"{result['images_per_second']:.2f}"} for row in [figures, *groups] if row]
    columns = dict.fromkeys(chain(*rows))
    for row in (dict(zip(columns, columns)), *rows):
        print("  ".join(f"{row.get(name, ''):>{max(len(name), *(len(row.get(name, '')) for row in rows))}}" for name in columns))


# Command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description="Judge a model's pictures, or a folder of finished pictures.")
    group = parser.add_argument_group("judging")
    judged = group.add_mutually_exclusive_group(required=True)
    judged.add_argument("--checkpoint", help="a run folder (its newest checkpoint) or a checkpoint file")
    judged.add_argument("--images", type=Path, metavar="DIR", help="judge these pictures; needs --data and --resolution")
    group.add_argument("--data", help="source of prompts and reference, see train.py (default: what the model was trained on)")
    group.add_argument("--val-fraction", type=float, help="validation split's share (default: as in training; with --images 1)")
    group.add_argument("--reference", choices=("validation", "training", "all"), default="validation",
                       help="which of the data's images to compare with (default: %(default)s)")
    group.add_argument("--resolution", type=int, help="with --images: side in pixels to which pictures and data are scaled")
    group.add_argument("--num-images", type=int, help="pictures to draw (default: 1000 for accuracy alone, else 5000)")
    group.add_argument("--guidance-scales", type=float, nargs="+", default=[DEFAULTS["guidance_scale"]], metavar="S",
                       help="judge the model at each of these (default: %(default)s)")
    group.add_argument("--metrics", nargs="+", choices=METRICS, help="default: accuracy for built-in pictures, else the others")
    group.add_argument("--inception-weights", metavar="FILE", help="torch-fidelity's weights (default: download)")
    group.add_argument("--inception-layer", choices=("64", "192", "768", "2048"), default="2048",
                       help="width of the features; those below 2048 need fewer images, but give other figures than the papers'")
    group.add_argument("--clip-model", default="openai/clip-vit-large-patch14", help="hub id or folder (default: %(default)s)")
    group.add_argument("--cache-dir", type=Path, help="folder for the reference statistics (default: beside the data)")
    group.add_argument("--output", type=Path, help="where the results' folder is made (default: beside what is judged)")
    add_sampling_flags(parser)
    args = parser.parse_args(argv)
    check_at_least(args, num_images=4, batch_size=1, seed=0)
    if args.checkpoint and args.resolution:
        raise ValueError(f"--resolution {args.resolution}: goes with --images; a model has its own, so leave it out")
    if args.images and not (args.data and args.resolution):
        raise ValueError(f"--images {args.images}: add --data to compare with, and --resolution, the side to compare at")
    return args


def open_model(args, ranks):
    """The model of --checkpoint; flags that were not given become what it was trained with."""
    model = load_model(args.checkpoint, ranks.device, args.weights, args.compile)
    if not all(p.isfinite().all() for p in model.unet.parameters()):
        raise ValueError(f"--checkpoint {args.checkpoint}: not all weights are finite: training had diverged; name an older one")
    args.data = args.data or model.run["data"]
    args.val_fraction = model.run["val_fraction"] if args.val_fraction is None else args.val_fraction
    args.resolution, args.channels = model.config.resolution, model.config.image_channels
    return model


def main():
    args = parse_args()
    ranks = setup_ranks(args.device)
    torch.backends.cuda.matmul.allow_tf32 = False     # convolutions: see the feature networks
    model, how = None, {}
    if args.checkpoint:
        model = open_model(args, ranks)
        how = dict(sampling_settings(args), dtype=amp_dtype(args.amp, ranks.device))
        path = Path(model.source["checkpoint"])
        judged = {name: model.source[name] for name in ("epoch", "step")}
        judged["sha256"] = ranks.gather(hash_of_file(path) if ranks.is_main else None)[0]
        stem = path.parent / f"evaluation_step{judged['step']:08d}"
    else:
        args.channels, args.val_fraction = 3, 1.0 if args.val_fraction is None else args.val_fraction
        pictures = finished_pictures(args.images, args.resolution)
        args.num_images = pictures.count
        judged = dict(sha256=hash_of(sorted(pictures.contents(ranks))))
        stem = args.images.parent / f"{args.images.name}_evaluation"
    metrics = choose_metrics(args)
    args.num_images = args.num_images or (1000 if metrics == ["accuracy"] else 5000)
    builtin = data.is_builtin(args.data)
    task = Task(metrics, args.num_images, *(builtin_data(args) if builtin else
                                            captioned_data(args, model.run if model else {}, ranks)))
    cache = args.cache_dir or (stem.parent if builtin else Path(args.data).parent)
    networks = load_networks(task, args, ranks, cache)
    args.metrics = task.metrics

    # All that the figures depend on names the folder, so a rerun finds the scales that are done.
    settings = {name: value for name, value in vars(args).items() if name not in (*PLACES, "guidance_scales")}
    code = [Path(__file__).with_name(name).read_bytes() for name in ("models.py", "data.py", "sample.py", "evaluate.py")]
    settings |= dict(judged=judged, networks=networks, prompts=hash_of(task.prompts), dtype=str(how.get("dtype")),
                     code=hash_of(code))
    folder = (args.output or stem.parent) / f"{stem.name}_{hash_of([settings])[:8]}"
    saved = folder / "evaluation.json"
    record = ranks.gather(json.loads(saved.read_text()) if saved.is_file() else dict(settings=settings, results=[]))[0]
    where = {name: str(getattr(args, name)) for name in PLACES} | {name: version(name) for name in LIBRARIES}
    where |= dict(processes=ranks.world_size, device=torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu")
    for scale in sorted(set(args.guidance_scales)) if model else [None]:
        if scale in [result["guidance_scale"] for result in record["results"]]:
            continue
        start = time.perf_counter()
        batches = (generated_pictures(model, task.prompts, ranks, guidance_scale=scale, **how) if model
                   else pictures.batches(shares(pictures.count, ranks, args.batch_size), ranks))
        values = judge(task, batches, f"guidance scale {scale:g}" if model else "pictures", ranks)
        values |= dict(guidance_scale=scale, images_per_second=task.count / (time.perf_counter() - start), where=where)
        record["results"] = sorted([*record["results"], values], key=lambda result: result["guidance_scale"] or 0)
        if ranks.is_main:
            save_record(folder, record)
    if ranks.is_main:
        print_table(record["results"])
        print(f"figures, settings and TensorBoard curves: {folder}")


if __name__ == "__main__":
    run_main(main)

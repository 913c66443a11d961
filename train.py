"""Training: Algorithm 1 of Ho et al. 2020 in the latent space of a frozen VAE, on any GPUs.

    python train.py                                    # built-in pictures, one process
    torchrun --standalone --nproc_per_node=2 train.py  # two processes: GPUs, or CPUs without any
    torchrun --standalone --nproc_per_node=2 train.py --data flickr8k   # captioned images
    torchrun --standalone --nproc_per_node=2 train.py --resume runs/run_20250131_120000
    sbatch slurm/train.sh --data flickr8k

One update: draw images and captions, encode both with the frozen networks, draw t and eps, and move
the UNet's output towards its target at x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps.
`step` counts optimizer updates, and --batch-size is global: the sum over processes and
micro-batches.
"""
import argparse
import copy
import fcntl
import json
import math
import os
import resource
import shlex
import signal
import sys
import tempfile
import textwrap
import threading
import time
import warnings
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams
from tqdm import tqdm

import data
import models
from models import PRESETS, Model, ModelConfig, apply_unet, check_ranges, require, update_ema
from sample import generate_sharded, make_grid, make_strip

# What suits each preset; every value can be overridden by its flag.
TRAINING_DEFAULTS = {
    "tiny": dict(epochs=12, batch_size=32, lr=1e-3, warmup_steps=200, lr_schedule="decay",
                 ema_decay=0.998, snr_floor=1.0, adam_betas=(0.9, 0.99)),   # 0.999: loss may leap
    "standard": dict(epochs=100, batch_size=128, lr=2e-4, warmup_steps=1000, lr_schedule="cosine"),
    "large": dict(epochs=100, batch_size=256, lr=1e-4, warmup_steps=5000, lr_schedule="constant"),
}
MODEL_FLAGS = {option.name: option for option in fields(ModelConfig) if option.metadata}
SWITCH = dict(action=argparse.BooleanOptionalAction, default=False)

# Command line


def number_or_none(text):
    return None if text == "none" else float(text)


def place(text):
    """A path is made absolute, since a run goes on from any folder. A name stays as it is."""
    if not text:
        raise argparse.ArgumentTypeError("is empty; leave it out or name one")
    path = os.path.abspath(os.path.expanduser(text))
    return path if os.path.exists(path) and text not in ("shapes", "builtin", "none") else text


def preset_values():
    """The presets' defaults, for --help."""
    paragraphs = ["defaults of the presets, which their flags override:"]
    for preset, config in PRESETS.items():
        values = {name: getattr(config, name) for name in MODEL_FLAGS}
        values |= TRAINING_DEFAULTS.get(preset, {})
        text = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in values.items())
        paragraphs.append(textwrap.fill(f"{preset}: {text}", 96, break_on_hyphens=False))
    return "\n\n".join(paragraphs)


def make_parser():
    parser = data.Parser("Train a text-to-image latent diffusion model.", epilog=preset_values())
    add = parser.add_argument_group("data").add_argument
    add("--data", type=place, default="shapes",
        help="folder, .zip or .tar files of captioned images; shapes: built in")
    add("--captions", type=place, metavar="FILE",
        help="captions that are not within --data: a file, folder or .zip")
    add("--caption-column", metavar="NAME", help="the column or key with the captions")
    add("--caption-template", metavar="TEXT", help="captions for images without: {} stands for the "
        "folder's name; text without {} is every image's caption, an empty one is no caption")
    add("--max-bad-images", type=float, default=0.01, help="stop if a larger share is unreadable")
    add("--val-fraction", type=float, default=0.05, help="share held out for validation")
    add("--random-crop", **SWITCH, help="crop at random along the long side, not at the centre")
    add("--flip", **SWITCH, help='mirror half of the images; off because captions say "left"')
    add("--cache-latents", nargs="?", const="", metavar="DIR",
        help="encode images once, into DIR or, without one, beside the data")
    add("--workers", type=int, help="loader processes per rank; not given: its cores less one")
    title = "model (kept in the checkpoint; defaults from the preset)"
    group = parser.add_argument_group(title)
    add, start = group.add_argument, group.add_mutually_exclusive_group().add_argument
    add("--preset", choices=PRESETS, help="not given: that of --init-from; else for shapes tiny, "
        "for other data standard")
    start("--init-from", type=place, metavar="RUN", help="a new run that starts with the model and "
          "the averaged weights of this run or checkpoint")
    start("--init-unet", type=place, metavar="NAME", help="a diffusers UNet or pipeline to start "
          "from; give its --text-encoder and --vae")
    for name, option in MODEL_FLAGS.items():
        kind = dict(type=place if name in ("vae", "text_encoder") else option.type)
        kind = SWITCH | dict(default=None) if option.type is bool else kind
        add(f"--{name.replace('_', '-')}", **kind, **option.metadata)
    add_training_flags(parser)
    return parser


def add_training_flags(parser):
    add = parser.add_argument_group("optimization (defaults from the preset)").add_argument
    add("--epochs", type=int, help="how often every image is visited")
    add("--batch-size", type=int, help="images per optimizer update, over all processes")
    add("--accumulation", type=int, default=1, help="micro-batches per update")
    add("--lr", type=float, help="AdamW's peak learning rate")
    add("--warmup-steps", type=int, help="updates over which the learning rate rises linearly")
    add("--lr-schedule", choices=("constant", "cosine", "decay"), help="decay: in the last fifth")
    add("--adam-betas", type=float, nargs=2, default=(0.9, 0.999), metavar=("BETA1", "BETA2"),
        help="AdamW's averages of the gradient and of its square")
    add("--weight-decay", type=float, default=0.01, help="AdamW's")
    add("--max-grad-norm", type=float, default=1.0, help="clip the gradient's norm; inf: never")
    add("--min-snr-gamma", type=number_or_none, default=5.0, help="upper clamp of the SNR, the x_0 "
        "error's weight (Hang et al. 2023); none for both: the simple loss (Ho et al. 2020)")
    add("--snr-floor", type=number_or_none, help="lower clamp of the SNR "
        "(Salimans & Ho 2022)")
    add("--ema-decay", type=float, default=0.9999, help="decay of the averaged weights")
    add("--seed", type=int, default=0, help="of first weights, order, timesteps and noise")
    add = parser.add_argument_group("system").add_argument
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto",
        help="auto: bf16, on older GPUs fp16; off on CPUs")
    add("--compile", **SWITCH, help="torch.compile the UNet")
    add("--gradient-checkpointing", **SWITCH, help="recompute activations to save memory")
    add("--bf16-gradients", **SWITCH, help="average gradients over processes in bfloat16: half the "
        "traffic between nodes")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: GPUs, if any")
    add = parser.add_argument_group("run").add_argument
    add("--resume", type=place, metavar="RUN",
        help="go on from a run folder or checkpoint, with its flags")
    add("--runs", default="runs", help="where run folders are made")
    add("--name", help="appended to the run folder's name")
    add("--folder", type=place, metavar="RUN", help="the run folder; goes on from checkpoints that "
        "it holds, whatever other flags say")
    add("--max-steps", type=int, help="stop and save after this many updates in all")
    add("--time-limit", type=float, metavar="MINUTES",
        help="stop and save after so long; not given: before a Slurm job's end")
    add("--save-every", type=int, default=1, metavar="N", help="epochs between checkpoints")
    add("--save-minutes", type=float, default=30, metavar="N", help="minutes between checkpoints "
        "inside an epoch; inf: none")
    add("--keep-last", type=int, default=3, metavar="K", help="newest checkpoints to keep")
    add("--keep-every", type=int, default=0, metavar="M", help="also keep every M-th epoch's")
    add("--sample-every", type=int, default=1, metavar="N", help="epochs between grids; 0: none")
    add("--sample-prompts", nargs="+", metavar="TEXT", help="not given: validation captions")
    add("--sample-guidance", type=float, default=2.0, help="guidance scale of the grids")
    add("--log-every", type=int, default=20, metavar="N", help="updates between log points")


def parse_args(argv=None):
    """(args, ModelConfig, payload of the checkpoint to start from or None, its path if the run is
    resumed). Flags given by hand win over those of a resumed run, and these over the preset's
    defaults; a resumed run's model and sample order cannot be changed."""
    parser = make_parser()
    first = parser.parse_args(argv)
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not (
            first.folder and os.environ.get("TORCH_DISABLE_SHARE_RDZV_TCP_STORE") == "1"):
        # Else a restart begins anew, or calls at the addresses of the dead (pytorch issue 135712).
        raise ValueError("torchrun --max-restarts: add --folder RUN, and in the environment set "
                         "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1")
    payload = path = None
    has_run = first.folder and models.find_checkpoints(first.folder)
    if resume := first.folder if has_run else first.resume:
        payload, path = models.load_checkpoint(resume)
        newest, *older = models.find_checkpoints(path.parent) or [path]
        require(first.folder or path != Path(resume) or path not in older, first, "resume",
                f"the folder holds {newest.name}; delete what is newer, or add --folder NEW")
        # Older versions had more flags.
        parser.set_defaults(**{k: value for k, value in payload["args"].items() if k in first})
    else:
        if first.init_from:
            payload, _ = models.load_checkpoint(first.init_from)
        suited = "tiny" if data.is_builtin(first.data) else "standard"
        preset = payload["args"]["preset"] if payload else first.preset or suited
        require(first.preset in (None, preset), first, "preset",
                f"the run to start from has {preset}; leave the flag out")
        parser.set_defaults(preset=preset)
        # A preset of your own needs none.
        parser.set_defaults(**TRAINING_DEFAULTS.get(preset, TRAINING_DEFAULTS["standard"]))
    args = parser.parse_args(argv)
    if path:
        # These two are places: that their weights are the same is checked when they are loaded.
        config = models.config_of(payload, vae=first.vae, text_encoder=first.text_encoder)
        stored = payload["args"] | asdict(config)
        for name in ("seed", "batch_size", "val_fraction", "preset", "init_unet", "init_from",
                     *MODEL_FLAGS):
            now, then = getattr(args, name), stored.get(name)
            if isinstance(then, str) and then != now:   # older checkpoints have relative paths
                then = place(then)
            require(now in (None, then), args, name, f"the checkpoint {path} has {then}; leave the "
                    "flag out, or start a new run")
    else:
        config = make_config(args, payload)
        if not payload:
            check_schedule(config)
    check_args(args, config, payload["epoch"] if path else 1)
    return args, config, payload, path


def check_args(args, config, epochs):
    """Raises: ValueError for a value out of its range, or two flags that exclude each other."""
    check_ranges(
        args, epochs=max(1, epochs), accumulation=1, seed=0, workers=0,
        save_every=1, keep_last=1, log_every=1, keep_every=0, sample_every=0, max_steps=1,
        save_minutes=0, time_limit=0, lr=0, warmup_steps=0, weight_decay=0, snr_floor=0,
        min_snr_gamma=args.snr_floor or 0.01, max_grad_norm=1e-6, max_bad_images=(0, 1),
        val_fraction=(0, 0.99), ema_decay=(0, 0.999999), sample_guidance=(0, 100))
    require("/" not in (args.name or ""), args, "name", "is part of a folder's name; no / in it")
    if args.cache_latents is not None:
        require(config.vae != "none", args, "cache_latents", "--vae none has no latents to cache")
        require(not args.random_crop, args, "cache_latents", "with --random-crop "
                "every visit has other latents; leave one of the two out")


def check_schedule(config):
    """Raises: ValueError where sampling cannot start at x_T. Not of runs that began before this was
    checked: they stay what they are."""
    last = models.NoiseSchedule(config).on_cpu[-1].item()
    require(last < 0.05, config, "num_train_timesteps", f"x_T is far from noise, with alpha_bar "
            f"{last:.2g}; use more, or add --beta-schedule cosine")
    # An error in eps is magnified by 1 / sqrt(alpha_bar), and latents are not clipped.
    require(last > 1e-5 or config.vae == "none" or config.prediction_type != "epsilon", config,
            "prediction_type", f"latents explode where alpha_bar ends at {last:.1g}; use "
            "v_prediction or sample, or another --beta-schedule")


def make_config(args, payload=None):
    """The preset with the given model flags, and what --init-unet or --init-from, whose payload it
    is, says of itself."""
    given = {name: getattr(args, name) for name in MODEL_FLAGS if getattr(args, name) is not None}
    config, said = PRESETS[args.preset], {}
    if payload:
        config = models.config_of(payload, vae=args.vae, text_encoder=args.text_encoder)
        said = asdict(config)
    elif args.init_unet:
        said = models.read_pipeline(args.init_unet, replace(config, **given))
    for name, value in said.items():   # a UNet can draw at any size
        require(given.get(name, value) == value or name in ("resolution", "caption_dropout"), args,
                name, f"the model to start from has {value}; leave the flag out")
    config = replace(config, **said | given)
    if payload or config.text_encoder != "builtin":
        return config
    if data.is_builtin(args.data):
        return replace(config, builtin_words=data.VOCABULARY)
    # For other data it has to be asked for. It takes its words from their captions, in main.
    return config if args.text_encoder else replace(config, text_encoder=ModelConfig.text_encoder)


# The loss and the learning rate


def clean_latents(codec, batch):
    """x_0 (B, C, h, w): a draw from the posterior of the batch's images, which are encoded now or
    were encoded once and for all."""
    mean, std = (codec.moments(data.to_unit_range(batch["image"])) if "image" in batch
                 else batch["moments"].float().unbind(dim=1))
    return mean + std * batch["posterior_eps"] if "posterior_eps" in batch else mean


def diffusion_loss(unet, model, batch, min_snr_gamma=None, snr_floor=None):
    """Each sample's weighted squared error, (B,) float32: the inside of Algorithm 1, Ho et al.
    2020. `batch` holds t (B,) and eps (B, C, h, w), which were drawn with the sample."""
    t, eps = batch["t"], batch["eps"]
    x_0 = clean_latents(model.codec, batch)                         # (B, C, h, w)
    text_emb = model.text_encoder(batch["caption"])                 # (B, L, D)
    x_t = model.schedule.add_noise(x_0, eps, t)                     # (B, C, h, w)
    output = apply_unet(unet, model.config, x_t, t, text_emb)       # (B, C, h, w)
    target = model.schedule.target(x_0, eps, t)
    error = (output.float() - target).square().mean(dim=(1, 2, 3))  # (B,)
    return model.schedule.loss_weight(t, min_snr_gamma, snr_floor) * error


def learning_rate(step, total_steps, args):
    """The learning rate of update number `step`, from 0: a pure function, so that there is no
    scheduler state to save."""
    lr = args.lr * min(1, (step + 1) / max(1, args.warmup_steps))
    if args.lr_schedule == "cosine":
        lr *= (1 + math.cos(math.pi * min(1, step / total_steps))) / 2
    elif args.lr_schedule == "decay":
        lr *= max(0, min(1, (total_steps - step) / (0.2 * total_steps)))
    return lr


@torch.no_grad()
def validate(model, loader, unreadable, dtype, parts=5):
    """{TensorBoard tag: value}: the mean unweighted error over the fixed validation samples, and
    over those of each fifth of [0, T). Small t is about detail, large t about composition."""
    T, device = model.schedule.num_train_timesteps, model.device
    sums = torch.zeros(2, parts, dtype=torch.float64, device=device)   # errors and samples
    with data.all_or_none():
        for batch in loader:
            unreadable.note(batch)
            batch = data.to_device(batch, device)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                error = diffusion_loss(model.unet, model, batch).double()
            sums.index_add_(1, batch["t"] * parts // T,
                            torch.stack([error, torch.ones_like(error)]))
    dist.all_reduce(sums)
    error, count = sums.sum(dim=1)
    values = {"epoch/validation_loss": (error / count).item()}
    return values | {f"validation_by_t/{k * T // parts:04d}-{(k + 1) * T // parts:04d}": e / n
                     for k, (e, n) in enumerate(sums.T.tolist()) if n}


# Stopping, and images that cannot be read

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


@contextmanager
def give_signals_back():
    """After the block the signals do again what they did before, for example in a notebook."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        yield
    finally:
        for number in SIGNALS if threading.current_thread() is threading.main_thread() else ():
            signal.signal(number, before[number])


class StopRequest:
    """SIGTERM, SIGUSR1, Ctrl-C, the clock, a file named `stop` or --max-steps ask the run to stop,
    and the clock to save. All ranks agree after the same update. A second Ctrl-C kills."""

    def __init__(self, stop_file, deadline=math.inf, max_steps=None, step=0, save_minutes=math.inf):
        """`deadline`: a Unix time."""
        self.stop_file, self.deadline = stop_file, deadline
        self.max_steps = math.inf if max_steps is None else max_steps
        self.asked, self.agreed = False, step >= self.max_steps
        self.next_look, self.work, self.save_minutes = 0.0, None, save_minutes
        self.note_save()
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self.ask)

    def ask(self, number, _):
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)   # torchrun's word for a second Ctrl-C

    def look(self):
        """Whether this rank was asked."""
        if time.time() >= self.next_look:
            self.asked |= time.time() >= self.deadline or self.stop_file.exists()
            self.next_look = time.time() + 3
        return self.asked

    def note_save(self):
        self.save_is_due, self.next_save = False, time.time() + 60 * self.save_minutes

    def poll(self, step):
        """Tell the other ranks whether this one was asked. Their answer is read after the next
        update, so that nobody waits for it."""
        if self.work:
            self.work.wait()
            self.agreed, self.save_is_due = self.vote.bool().tolist()
            self.asked |= self.agreed
        wants_save = time.time() >= self.next_save and not self.save_is_due
        self.vote = torch.tensor([self.look(), wants_save], dtype=torch.float32)
        self.work = dist.all_reduce(self.vote, async_op=True)   # over gloo, beside the GPU's work
        self.agreed |= step >= self.max_steps


def patiently(loader, stop, save):
    """The loader's batches. Where one cannot come, or not soon and the run is asked to stop, a
    process that is alone saves before it ends with an error."""
    batches, alone = iter(loader), dist.get_world_size() == 1
    for _ in range(len(loader)):
        limit, batch = time.monotonic() + 0.9 * data.RANK_TIMEOUT, None
        while batch is None:
            try:
                batch = next(batches)
            except (RuntimeError, OSError) as error:   # every 20 seconds
                waits = "DataLoader timed out" in str(error) and time.monotonic() < limit
                if not waits or alone and stop.look():
                    if alone:
                        save(tries=7)
                    raise
        yield batch


def stop_time(minutes):
    """The Unix time at which to stop and save: so many minutes from now; by default, in a Slurm
    job, five minutes before its end or after nine tenths of what is left, whichever is later."""
    if minutes is not None:
        return time.time() + 60 * minutes
    left = float(os.environ.get("SLURM_JOB_END_TIME") or math.inf) - time.time()
    return time.time() + max(left - 300, 0.9 * left)


class UnreadableImages:
    """Images that could not be read, so that the next ones took their places; named once each."""

    def __init__(self, source, max_share):
        self.source, self.max_share, self.met, self.named = source, max_share, set(), set()

    def note(self, batch):
        """`batch` is still on the CPU."""
        self.met.update(batch["wanted"][batch["wanted"] != batch["number"]].tolist())

    def check(self):
        """Name those that any rank has met. Raises: ValueError where they are too many."""
        new = sorted(set().union(*data.gather(self.met - self.named)))
        self.named.update(new)
        share = f"{len(self.named)} of {len(self.source)} images cannot be read"
        if len(self.named) > self.max_share * len(self.source):
            bad = ", ".join(repr(self.source.names[i]) for i in sorted(self.named)[:100])
            raise ValueError(f"--max-bad-images {self.max_share}: {share}; repair or remove {bad}")
        if new and dist.get_rank() == 0:
            names = ", ".join(repr(self.source.names[i]) for i in new)
            tqdm.write(f"warning: {share}; the next take their places; new: {names}", sys.stderr)


# Networks and state


def cache_place(args):
    """Where latent caches are made. Raises: ValueError where it cannot be written, before anything
    that takes long."""
    place = Path(args.cache_latents or Path(args.data).resolve().parent)
    try:
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise ValueError(f"--cache-latents: {place} cannot be written ({error}); name a folder: "
                         "--cache-latents DIR") from None
    return place


def latent_loader(args, model, source, workers):
    """image_loader's counterpart, with latents that are encoded once. The cache folder's name is a
    hash of all that they depend on, so that one that is found fits."""
    codec, config, parent = model.codec, model.config, cache_place(args)
    images = data.content_hashes(source.content, len(source))
    made_of = dict(images=data.hash_of(images), vae=data.hash_of_weights(codec.vae), crop="centre",
                   resolution=config.resolution, flips=1 + args.flip, scale=codec.scale,
                   shift=codec.shift, dtype="float16")
    folder = parent / f"latents_{data.hash_of([made_of])[:16]}"
    folder.mkdir(exist_ok=True)

    def encode(images):
        return codec.moments(data.to_unit_range(images.to(model.device)))

    return data.cache_latents(folder, source, config, codec.latent_shape, encode,
                              models.write_atomically, args.flip, workers)


def make_loaders(args, model, source, order, train_images, val_images):
    """The training and the validation loader: captions with pixels or, if cached, latents."""
    suited = 0 if data.is_builtin(args.data) else data.default_workers()
    workers = suited if args.workers is None else args.workers
    load = (data.image_loader(source, model.config) if args.cache_latents is None
            else latent_loader(args, model, source, workers))
    captions, config, shape = source.captions, model.config, model.codec.latent_shape
    samples = data.Samples(load, captions, train_images, config, shape, seed=args.seed,
                           random_crop=args.random_crop, flip=args.flip)
    validation = data.Samples(load, captions, val_images, config, shape, validation=True)
    val_order = []
    loaders = (data.make_loader(samples, order, model.device, workers),
               data.make_loader(validation, val_order, model.device, workers))
    loaders[0].timeout = min(20, loaders[0].timeout)   # see patiently
    # The workers are forked here, where NCCL has no threads yet, and have nothing to load.
    order.start_at(0, order.steps_per_epoch)
    for loader in loaders:
        iter(loader)
    val_order += data.validation_order(val_images, order.micro_batch)
    return loaders


def prepare_network(args, unet, device):
    """The UNet as the loop calls it, with the switches for speed and memory. Several processes wrap
    it in DDP, which averages gradients over them in the backward pass."""
    if args.gradient_checkpointing:   # there is no dropout, so no random state to bring back
        keep_no_state = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
        require(hasattr(unet, "enable_gradient_checkpointing"), args, "gradient_checkpointing",
                "the network has none")
        unet.enable_gradient_checkpointing(keep_no_state)
        torch._dynamo.config.optimize_ddp = False   # PyTorch 2.7 cannot cut such a compiled network
    if args.compile:
        unet.compile()   # in place: the names of the weights stay
    if dist.get_world_size() == 1:
        return unet
    device_ids = [device.index] if device.type == "cuda" else None
    net = torch.nn.parallel.DistributedDataParallel(unet, device_ids, gradient_as_bucket_view=True)
    if args.bf16_gradients:
        net.register_comm_hook(None, bf16_compress_hook)
    return net


class TrainingState:
    """What training changes, and so what a checkpoint holds."""

    COUNTERS = ("epoch", "step", "step_in_epoch", "epoch_losses", "logged_step")

    def __init__(self, unet, args, device, dtype):
        # The average has weights of its own; buffers, such as BatchNorm's statistics, are shared.
        shared = {id(buffer): buffer for buffer in unet.buffers()}
        self.unet, self.ema = unet, copy.deepcopy(unet, shared).requires_grad_(False).eval()
        # Listed once: walking through the modules costs a millisecond.
        self.weights, self.averages = list(unet.parameters()), list(self.ema.parameters())
        self.optimizer = torch.optim.AdamW(self.weights, args.lr, tuple(args.adam_betas),
                                           weight_decay=args.weight_decay, fused=True)
        # Float16 needs its gradients scaled up. Elsewhere the scale stays 1, and the scaler only
        # skips the update where a gradient is not finite.
        self.is_scaled = dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, 2.0**16 if self.is_scaled else 1.0)
        # Finished epochs; updates in all, in this epoch, up to the last log point.
        self.epoch = self.step = self.step_in_epoch = self.logged_step = 0
        self.saved_step = -1
        self.epoch_losses = []
        # This rank's part of the epoch's updates, and of those since the last log point: sums of
        # loss, gradient norm and their number.
        self.totals = torch.zeros(2, 3, dtype=torch.float64, device=device)
        self.sums, self.recent = self.totals

    def count_update(self, loss, norm):
        """Skipped updates count as steps, but not in the means."""
        values = torch.stack([loss, norm.double(), torch.ones_like(loss)])
        self.totals += torch.where(norm.isfinite(), values, 0)
        self.step += 1
        self.step_in_epoch += 1

    def end_epoch(self):
        loss, _, updates = all_reduced(self.sums).tolist()
        self.epoch_losses.append(loss / updates if updates else math.nan)
        self.sums.zero_()
        self.epoch, self.step_in_epoch = self.epoch + 1, 0

    def restore(self, payload, args, source, train_images):
        """Continue from a checkpoint's payload. Raises: ValueError where the data are others."""
        count, ranks = len(train_images), dist.get_world_size()
        require(payload["train_images"] == count, args, "data", f"has {count} training images, the "
                f"run was started with {payload['train_images']}; restore them, or start a new run")
        models.load_weights(self.unet, payload["unet"])
        models.load_weights(self.ema, payload["ema"])
        given = {name: self.optimizer.param_groups[0][name] for name in ("betas", "weight_decay")}
        self.optimizer.load_state_dict(payload["optimizer"])
        self.optimizer.param_groups[0].update(given)
        for p, moments in self.optimizer.state.items():   # in the layout of this device's weights
            for name, value in moments.items():
                moments[name] = torch.empty_like(p if value.ndim else value).copy_(value)
        if self.is_scaled and payload["scaler"]:   # none where the GPU before computed in bfloat16
            self.scaler.load_state_dict(payload["scaler"])
        for name in self.COUNTERS:   # older checkpoints lack the last
            setattr(self, name, payload.get(name, payload["step"]))
        self.saved_step = self.step
        if dist.get_rank() > 0:
            return
        # The main rank carries on the sums of all: a float64 sum of float32 losses is exact, so
        # that a mean does not depend on who added what.
        totals = np.array([payload["sums"], payload.get("recent", [0] * 3)])
        self.totals += torch.from_numpy(totals * ranks / payload["processes"]).to(self.totals)
        if payload.get("fingerprint", source.fingerprint) != source.fingerprint:
            warnings.warn(f"--data {args.data}: its names or captions have changed since the run "
                          "was started, so it goes on with other samples")
        steps = count // args.batch_size
        before, after = (learning_rate(self.step, flags.epochs * steps, flags)
                         for flags in (argparse.Namespace(**payload["args"]), args))
        if before != after:
            print(f"learning rate of update {self.step + 1}: {after:.3g}, and not {before:.3g} as "
                  f"before: --lr-schedule {args.lr_schedule} counts anew with the flags given now")
        if payload["processes"] != ranks:
            print(f"{payload['processes']} processes up to step {self.step}, {ranks} from here: "
                  "the same samples and noise, weights equal up to rounding")

    def check_ranks(self):
        """Raises: ValueError where ranks differ in weights, EMA, moments or step, by one bit."""
        moments = [value for of_p in self.optimizer.state.values() for value in of_p.values()]
        total = sum(tensor.detach().view(torch.int32).sum().to(self.sums.device) for tensor in
                    [*self.weights, *self.averages, *moments])
        totals = data.gather((self.step, total.item()))
        if apart := [rank for rank, theirs in enumerate(totals) if theirs != totals[0]]:
            raise ValueError(f"step {self.step}: rank(s) {apart} hold other weights than rank 0: a "
                             "faulty device, or other files or software; go on with --resume")

    def save(self, folder, keep=(1, 0), tries=1, **more):
        """Write checkpoint_epochEEEE_stepSSSSSSSS.pt from the main rank, unless this step has been
        written, and prune; called by all.

        Where it cannot be written the older ones stay; the last of several tries, ten seconds
        apart, raises OSError.
        """
        if self.saved_step == self.step:
            return
        self.check_ranks()
        (sums, recent), saved = all_reduced(self.totals).tolist(), False
        if dist.get_rank() == 0:
            payload = {name: getattr(self, name) for name in self.COUNTERS} | dict(
                unet=self.unet.state_dict(), ema=self.ema.state_dict(),
                optimizer=self.optimizer.state_dict(), sums=sums, recent=recent,
                scaler=self.scaler.state_dict() if self.is_scaled else {},
                processes=dist.get_world_size(), **more)
            path = folder / f"checkpoint_epoch{self.epoch:04d}_step{self.step:08d}.pt"
            for wait in [10] * (tries - 1) + [0]:
                with tolerate(OSError, f"checkpoint {path} could not be written"):
                    folder.mkdir(exist_ok=True)
                    models.save_checkpoint(payload, path, keep[1])
                    saved = True
                    models.prune_checkpoints(path, *keep)
                if saved:
                    break
                time.sleep(wait)
        # Nobody leaves before the file is there: a process that ends may take the others with it.
        if data.gather(saved)[0]:
            self.saved_step = self.step
        elif tries > 1:
            raise OSError(f"step {self.step}: not saved in {tries} tries; make room for {folder}")


def all_reduced(tensor):
    """The sum over all ranks, as a new tensor."""
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor


# The run folder

FINISHED = "finished"   # in the file `stop`


def make_run_folder(args, checkpoint_path):
    """--folder, or the resumed run's, or a new runs/run_YYYYmmdd_HHMMSS[_name]; for all ranks."""
    folder = args.folder or (checkpoint_path and checkpoint_path.parent)
    if folder:
        Path(folder).mkdir(parents=True, exist_ok=True)
    elif dist.get_rank() == 0:
        stem = time.strftime("run_%Y%m%d_%H%M%S") + (f"_{args.name}" if args.name else "")
        for suffix in ["", *(f"_{k}" for k in range(2, 1000))]:   # jobs that start in one second
            folder = Path(args.runs) / (stem + suffix)
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
                break
    return Path(data.gather(folder)[0])


def take_over(folder):
    """Lock the run folder for as long as the returned file is held, and remove what a killed run
    left half-written.

    A POSIX lock ends with its process, however that ends; loader workers do not inherit it; NFS has
    it.
    """
    lock = open(folder / ".lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"--folder {folder}: another job is training in this folder; stop it, or "
                         "name another") from None
    except OSError as error:
        warnings.warn(f"--folder {folder}: cannot be locked ({error}); let only one job use it")
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    return lock


def open_run_folder(folder, record, step, start, keeps_stop):
    """(SummaryWriter, lock) of the run folder, for the main rank, or (None, None); start: see
    print_start; keeps_stop: whether to obey a file `stop` that a user has made already, as is right
    for jobs that start by themselves. One of a finished run says so, and goes."""
    if dist.get_rank() > 0:
        return None, None
    lock = take_over(folder)
    # A disk fault in TensorBoard's thread reaches its next caller; the thread need not say it.
    threading.excepthook = (lambda died: issubclass(died.exc_type, OSError)
                            or threading.__excepthook__(died))
    with suppress(FileNotFoundError):
        if not keeps_stop or (folder / "stop").read_text() == FINISHED:
            (folder / "stop").unlink()
    writer = SummaryWriter(folder, purge_step=step + 1)
    text = json.dumps(dict(model=record["config"], args=record["args"]), indent=1)
    models.write_atomically(folder / "config.json", lambda file: file.write(text.encode()))
    for title, shown in dict(start=start, config=text).items():
        writer.add_text(title, "    " + shown.replace("\n", "\n    "), step)
    # Runs side by side in a table; flags that are neither text nor number are written as text.
    flags = record["args"] | {name: record["config"][name] for name in MODEL_FLAGS}
    flags = {name: value if isinstance(value, (str, int, float)) else str(value)
             for name, value in flags.items()}
    for summary in hparams(flags, {"epoch/loss": 0.0, "epoch/validation_loss": 0.0}):
        writer.file_writer.add_summary(summary)
    return writer, lock


@contextmanager
def tolerate(fault, what, writer=None):
    """A full or missing disk (OSError), or a lack of memory, costs the run what is made within the
    block, and no more. A SummaryWriter, whose thread does not survive, begins a new file the next
    time."""
    try:
        yield
    except fault as error:
        if dist.get_rank() == 0:
            warnings.warn(f"{what} ({error}); training goes on")
        if writer:
            writer.file_writer = writer.all_writers = None


# What a run reports


def print_start(args, model, source, order, counts, folder, checkpoint, dtype):
    """Print, and return, what runs where and what was understood; `counts`: training and validation
    images; `checkpoint`: that of a resumed run."""
    device, config, is_gpu = model.device, model.config, model.device.type == "cuda"
    name = torch.cuda.get_device_name(device) if is_gpu else f"{torch.get_num_threads()} threads"
    devices = data.gather(f"{device} ({name}) on {os.uname().nodename}")
    trainable, text, vae = (f"{sum(p.numel() for p in net.parameters()) / 1e6:.1f} M parameters"
                            for net in (model.unet, model.text_encoder, model.codec))
    latents = " x ".join(map(str, model.codec.latent_shape))
    rows = {f"rank {rank}": device for rank, device in enumerate(devices)} | {
        "run folder": folder,
        "starts from": checkpoint or args.init_from or args.init_unet or "random weights",
        "data": f"{args.data}: {counts[0]:,} training and {counts[1]:,} validation images",
        **source.report,
        "batch": f"{args.batch_size} = {len(devices)} processes x {args.accumulation} "
                 f"micro-batches x {order.micro_batch}",
        "length": f"{args.epochs} epochs x {order.steps_per_epoch} steps",
        "UNet": f"{trainable}, input {latents}, predicts {config.prediction_type}",
        "text encoder": f"{config.text_encoder}, {text}, frozen",
        "VAE": f"{config.vae}, {vae}, frozen, for images of {config.resolution} px",
        "precision": f"{dtype} autocast, float32 weights" if dtype else "float32"}
    # Below 64 images of 256 px the standard preset's kernels end before the next are launched.
    positions = order.micro_batch * np.prod(model.codec.latent_shape[1:])
    if is_gpu and positions < 2**16 and args.preset != "large" and not args.compile:
        rows["speed"] = "too small a batch to fill a GPU: try --compile, or a larger --batch-size"
    if dist.get_rank() == 0 and (cut := model.text_encoder.count_cut(source.texts)):
        rows["text encoder"] += f"; {cut:,} captions are cut at {config.token_length} tokens"
    text = "\n".join(f"{key:>14}  {value}" for key, value in rows.items())
    if dist.get_rank() == 0:
        print(text, flush=True)
    return text


def end_run(args, state, folder, writer, prompt):
    """Leave the run folder and say, from the main rank, what can be done next."""
    if not writer:
        return
    is_asked = (folder / "stop").exists()
    with tolerate(OSError, "curves could not be written"):
        if state.epoch == args.epochs or state.step >= (args.max_steps or math.inf):
            (folder / "stop").write_text(FINISHED)   # for whoever would start this again
        writer.close()
    if state.epoch < args.epochs:
        by = f" by the file {folder}/stop" if is_asked else ""
        print(f"stopped after {state.step} steps{by}; to go on: train.py --resume {folder}")
        return
    shown = "".join(filter(str.isprintable, prompt))   # a caption may hold a shell command
    print(f"finished: {folder}")
    print(f"draw pictures: python sample.py --checkpoint {folder} --prompts {shlex.quote(shown)}")


def peak_gib(device):
    """The most memory so far: of tensors on a GPU, of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 2**30 if sys.platform == "darwin" else 2**20   # bytes on macOS, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


class StepLog:
    """Means over the updates since the last report; one synchronisation a report."""

    def __init__(self, writer, folder, batch_size, state):
        self.writer, self.folder, self.batch_size, self.bad = writer, folder, batch_size, 0
        self.restart(state)

    def restart(self, state):
        """The clock, which stood still meanwhile, begins anew."""
        self.step, self.data_seconds, self.since = state.step, 0.0, time.perf_counter()

    def report(self, state, lr):
        """Write the means to TensorBoard; returns a short text for the progress bar. Raises:
        ValueError on all ranks after 20 updates, in whole log intervals, without a finite one."""
        steps = state.step - state.logged_step
        loss, norm, made = all_reduced(state.recent).tolist()
        skipped = steps - made / dist.get_world_size()
        self.bad = 0 if made else self.bad + steps
        if self.bad >= 20:
            newest = [*models.find_checkpoints(self.folder), "none"][0]
            raise ValueError(f"no finite gradient in {self.bad} updates up to step {state.step}; "
                             f"the last checkpoint is {newest}; try a lower --lr or --amp off")
        if skipped and not state.is_scaled and dist.get_rank() == 0:
            tqdm.write(f"warning: {skipped:.0f} of {steps} updates up to step {state.step} "
                       "skipped: loss or gradient not finite", file=sys.stderr)
        loss, norm = (loss / made, norm / made) if made else (math.nan, math.nan)
        seconds = time.perf_counter() - self.since
        speed = (state.step - self.step) * self.batch_size / seconds
        values = {"train/loss": loss, "train/grad_norm": norm, "train/learning_rate": lr,
                  "train/skipped": skipped, "speed/images_per_second": speed,
                  "speed/data_wait_share": self.data_seconds / seconds,
                  "memory/peak_gib": peak_gib(state.sums.device)}
        with tolerate(OSError, "curves could not be written"):
            for tag, value in values.items() if self.writer else ():
                self.writer.add_scalar(tag, value, state.step)
        state.logged_step = state.step
        state.recent.zero_()
        self.restart(state)
        return f"loss {loss:.4f}, {speed:.0f} images/s"


def finish_epoch(args, state, model, val_loader, unreadable, prompts, dtype, writer, folder, stop):
    """Validation loss and, every --sample-every epochs, the grid and the way to its first picture:
    all with the EMA weights. A request to stop leaves out what is not done yet."""
    averaged = copy.copy(model)
    averaged.unet = state.ema
    values, images = {"epoch/loss": state.epoch_losses[-1]}, {}
    draws = args.sample_every and (state.epoch % args.sample_every == 0
                                   or state.epoch == args.epochs)
    with tolerate(data.SPARED, "validation or samples left out"):
        if len(val_loader.dataset.images):
            batches = takewhile(lambda _: not stop.look(), val_loader)
            values |= validate(averaged, batches, unreadable, dtype)
        asked = any(data.gather(stop.look()))
        stop.agreed |= asked
        if asked:   # the validation may have ended early
            values = {"epoch/loss": state.epoch_losses[-1]}
        elif draws:
            how = dict(guidance_scale=args.sample_guidance, dtype=dtype,
                       steps=min(30, model.schedule.num_train_timesteps),
                       batch_size=args.batch_size // dist.get_world_size() // args.accumulation)
            images["grid"] = make_grid(generate_sharded(averaged, prompts, **how), prompts)
            if writer:
                images["denoising"] = make_strip(averaged, prompts[0], **how)
    unreadable.check()
    if not writer:
        return
    said = [f"{tag[6:].replace('_', ' ')} {value:.5f}" for tag, value in values.items()
            if tag.startswith("epoch/")]
    tqdm.write(f"epoch {state.epoch}: {', '.join(said)}")
    values["epoch/peak_gib"] = peak_gib(model.device)
    with tolerate(OSError, "curves and samples could not be written", writer):
        for tag, value in values.items():
            writer.add_scalar(tag, value, state.step)
        for name, image in images.items():
            writer.add_image(f"samples/{name}", np.asarray(image), state.step, dataformats="HWC")
        if images:
            images["grid"].save(folder / f"samples_epoch{state.epoch:04d}.png")
        writer.flush()


@give_signals_back()
def main(argv=None):
    """Train as the command line says, or in Python as the list `argv`; returns the run folder."""
    args, config, payload, checkpoint_path = parse_args(argv)
    deadline = stop_time(args.time_limit)
    device = data.setup_processes(args.device)
    dtype = data.amp_dtype(args.amp, device)
    is_main = dist.get_rank() == 0

    # Data first: a mistake there shows before the networks are loaded.
    source = data.open_source(args.data, config.resolution, args.caption_template,
                              args.max_bad_images, args.captions, args.caption_column)
    if not checkpoint_path:
        config = models.with_words(config, source.texts)
    train_images, val_images = data.split_images(source, args.val_fraction)
    order = data.GlobalOrder(train_images, args.batch_size, args.accumulation, args.seed)
    shown = np.array_split(val_images if len(val_images) else train_images, 16)   # of all classes
    prompts = args.sample_prompts or [source.captions(part[0])[0] for part in shown if len(part)]

    # The frozen networks, and the UNet that is trained: the same first weights on every rank.
    torch.manual_seed(args.seed)
    model = Model(config, device, payload and payload.get("frozen"))
    if not checkpoint_path:
        models.load_first_weights(model.unet, payload, args.init_unet)
    model.text_encoder.remember(source.texts)

    # What training changes, and so what a checkpoint holds.
    state = TrainingState(model.unet, args, device, dtype)
    if checkpoint_path:
        state.restore(payload, args, source, train_images)
    payload = None   # as large as weights, moments and averages together
    state.check_ranks()

    # Samples: captions as text with pixels or, from the cache, latents.
    loader, val_loader = make_loaders(args, model, source, order, train_images, val_images)
    unreadable = UnreadableImages(source, args.max_bad_images)
    net = prepare_network(args, model.unet, device)

    # The run folder. A checkpoint does not say where it lies or when to pause.
    folder = make_run_folder(args, checkpoint_path)
    record = dict(config=asdict(config), train_images=len(train_images), frozen=model.frozen,
                  fingerprint=source.fingerprint, args={
                      name: value for name, value in vars(args).items()
                      if name not in ("resume", "folder", "max_steps", "time_limit")})
    counts = len(train_images), len(val_images)
    said = print_start(args, model, source, order, counts, folder, checkpoint_path, dtype)
    # Held as long as main runs, the lock keeps other jobs out.
    writer, _lock = open_run_folder(folder, record, state.step, said, args.folder)

    max_norm = min(args.max_grad_norm, 1e38)   # inf by an infinite norm would be NaN
    log = StepLog(writer, folder, args.batch_size, state)
    stop = StopRequest(folder / "stop", deadline, args.max_steps, state.step, args.save_minutes)
    save = partial(state.save, folder, (args.keep_last, args.keep_every), **record)
    while state.epoch < args.epochs and not stop.agreed:
        order.start_at(state.epoch, state.step_in_epoch)
        batches = patiently(loader, stop, save)
        bar = tqdm(total=order.steps_per_epoch, initial=state.step_in_epoch, unit="step",
                   desc=f"epoch {state.epoch + 1}/{args.epochs}", disable=not is_main,
                   mininterval=1 if sys.stderr.isatty() else 30, dynamic_ncols=True)
        while state.step_in_epoch < order.steps_per_epoch and not stop.agreed:
            # One update: Ho et al. 2020, Algorithm 1, over a global batch in micro-batches.
            lr = learning_rate(state.step, args.epochs * order.steps_per_epoch, args)
            state.optimizer.param_groups[0]["lr"] = lr
            step_loss = torch.zeros((), dtype=torch.float64, device=device)
            for micro in range(args.accumulation):
                waiting = time.perf_counter()
                batch = next(batches)
                log.data_seconds += time.perf_counter() - waiting
                unreadable.note(batch)
                batch = data.to_device(batch, device)
                # DDP averages gradients over ranks in the last backward pass of an update.
                net.require_backward_grad_sync = micro == args.accumulation - 1
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    errors = diffusion_loss(net, model, batch, args.min_snr_gamma, args.snr_floor)
                # Micro-batches are of equal size: the mean of their means is the batch's mean.
                loss = errors.mean() / args.accumulation
                # An infinite loss may have finite gradients: make them NaN.
                loss = loss * torch.where(loss.isfinite(), 1.0, torch.nan)
                state.scaler.scale(loss).backward()
                step_loss += loss.detach()
            # The scaler skips the update where a gradient is not finite. DDP's average has brought
            # a NaN to all ranks, so all of them skip it.
            state.scaler.unscale_(state.optimizer)
            norm = torch.nn.utils.clip_grad_norm_(state.weights, max_norm)
            state.scaler.step(state.optimizer)
            state.scaler.update(None if state.is_scaled else 1.0)
            state.optimizer.zero_grad(set_to_none=True)
            state.count_update(step_loss, norm)
            update_ema(state.averages, state.weights, state.step, args.ema_decay)
            bar.update()
            if state.step % args.log_every == 0 or state.step_in_epoch == order.steps_per_epoch:
                unreadable.check()
                bar.set_postfix_str(log.report(state, lr))
            stop.poll(state.step)
            if stop.save_is_due and state.step_in_epoch < order.steps_per_epoch:
                save()
                stop.note_save()
        bar.close()

        # Saving comes before what may fail: drawing, validation, TensorBoard.
        if is_whole := state.step_in_epoch == order.steps_per_epoch:
            state.end_epoch()
        if stop.agreed or state.epoch % args.save_every == 0 or state.epoch == args.epochs:
            save()
            stop.note_save()
        if is_whole:
            finish_epoch(args, state, model, val_loader, unreadable, prompts, dtype, writer, folder,
                         stop)
            log.restart(state)
    save(tries=7)
    end_run(args, state, folder, writer, prompts[0])
    return folder


if __name__ == "__main__":
    data.run_main(main)

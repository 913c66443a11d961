"""Training: Algorithm 1 of Ho et al. 2020 in the latent space of a frozen VAE, on any number of GPUs.

    python train.py                                                     # built-in pictures, one process
    torchrun --standalone --nproc_per_node=2 train.py                   # two processes (GPUs, or CPUs where there is none)
    torchrun --standalone --nproc_per_node=2 train.py --data flickr8k   # a folder or .zip of captioned images
    torchrun --standalone --nproc_per_node=2 train.py --resume runs/run_20250131_120000
    sbatch slurm/train.sh --data flickr8k

One step: draw images and captions, encode both with the frozen networks, draw t and eps, and move the UNet's output
towards its target at x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps. `step` counts optimizer updates, and
--batch-size is global: the sum over processes and accumulation steps.
"""
import argparse
import fcntl
import json
import math
import os
import resource
import shlex
import sys
import threading
import time
import warnings
from contextlib import closing, contextmanager, nullcontext, suppress
from dataclasses import fields, replace
from functools import partial
from itertools import chain
from pathlib import Path
from weakref import WeakSet

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import models
from data import StopRequest, TrainingData, amp_dtype, is_builtin, run_main, setup_ranks, to_device, to_unit_range, vocabulary
from models import EMA, PRESETS, ModelConfig, apply_unet, load_parameters
from sample import check_at_least, generate_sharded, make_grid, make_strip

# What suits each preset; every value can be overridden by its flag.
TRAINING_DEFAULTS = {
    "tiny": dict(epochs=12, batch_size=32, lr=1e-3, warmup_steps=200, lr_schedule="decay", ema_decay=0.998,
                 adam_betas=(0.9, 0.99), snr_floor=1.0),   # with 0.999 the loss may leap at this lr
    "standard": dict(epochs=100, batch_size=128, lr=2e-4, warmup_steps=1000, lr_schedule="cosine"),
    "large": dict(epochs=100, batch_size=256, lr=1e-4, warmup_steps=5000, lr_schedule="constant"),
}
MODEL_FLAGS = {option.name: option for option in fields(ModelConfig) if option.metadata}


def number_or_none(text):
    return None if text == "none" else float(text)


def make_parser():
    parser = argparse.ArgumentParser(description="Train a text-to-image latent diffusion model.")
    switch = dict(action=argparse.BooleanOptionalAction, default=False)
    add = parser.add_argument_group("data").add_argument
    add("--data", default="shapes", help='folder or .zip of captioned images, or built-in "shapes" (default) or "shapes-hard"')
    add("--caption-template", default="a photo of a {}", help="caption for data with one sub-folder per class")
    add("--max-bad-images", type=float, default=0.01, help="stop above this share of unreadable ones (default: %(default)s)")
    add("--val-fraction", type=float, default=0.05, help="share of images held out for validation")
    add("--random-crop", **switch, help="crop at random along the long side (default: centre)")
    add("--flip", **switch, help='mirror half of the images; off because captions say "left"')
    add("--cache-latents", nargs="?", const="", metavar="DIR", help="encode images once, into DIR (default: beside the data)")
    add("--workers", type=int, help="loader processes per rank (default: all cores but one per rank; 0 for built-in pictures)")

    add = parser.add_argument_group("model (kept in the checkpoint; defaults from the preset)").add_argument
    add("--preset", choices=PRESETS, help="tiny for built-in pictures, else standard, unless given")
    add("--init-unet", help="start from the architecture and weights of a diffusers UNet or pipeline, hub id or folder; give "
                            "its own --text-encoder, --vae, --beta-schedule and --prediction-type too")
    for name, option in MODEL_FLAGS.items():
        kind = dict(action=argparse.BooleanOptionalAction) if option.type is bool else dict(type=option.type)
        add(f"--{name.replace('_', '-')}", **kind, **option.metadata)

    add = parser.add_argument_group("optimization (defaults from the preset)").add_argument
    add("--epochs", type=int)
    add("--batch-size", type=int, help="images per optimizer update, over all processes")
    add("--accumulation", type=int, default=1, help="micro-batches per update (default: %(default)s)")
    add("--lr", type=float, help="AdamW's peak learning rate")
    add("--warmup-steps", type=int, help="updates over which the learning rate rises linearly")
    add("--lr-schedule", choices=("constant", "cosine", "decay"), help="decay: linear to 0 over the last fifth")
    add("--adam-betas", type=float, nargs=2, default=(0.9, 0.999), metavar=("BETA1", "BETA2"))
    add("--weight-decay", type=float, default=0.01)
    add("--max-grad-norm", type=float, default=1.0, help="clip the global gradient norm, inf: never (default: %(default)s)")
    add("--min-snr-gamma", type=number_or_none, default=5.0, help="upper clamp of the SNR, the x_0 error's weight (Hang et al. "
                                                                  "2023); none for both: the simple loss (Ho et al. 2020)")
    add("--snr-floor", type=number_or_none, help="lower clamp of the same (Salimans & Ho 2022)")
    add("--ema-decay", type=float, default=0.9999)
    add("--max-bad-steps", type=int, default=20, help="stop after so many not finite updates in a row (default: %(default)s)")
    add("--seed", type=int, default=0)

    add = parser.add_argument_group("system").add_argument
    add("--amp", choices=("auto", "bf16", "fp16", "off"), default="auto", help="auto: bf16, on older GPUs fp16; off on CPUs")
    add("--compile", **switch, help="torch.compile the UNet")
    add("--gradient-checkpointing", **switch, help="recompute activations to save memory")
    add("--device", choices=("auto", "cuda", "cpu"), default="auto")

    add = parser.add_argument_group("run").add_argument
    add("--resume", metavar="RUN", help="go on from a run folder or checkpoint file, with its flags where none are given")
    add("--runs", default="runs", help="where run folders are made (default: %(default)s)")
    add("--name", help="appended to the run folder's name")
    add("--folder", metavar="RUN", help="the run folder itself; where it holds checkpoints already, go on from the newest")
    add("--max-steps", type=int, help="stop and save after this many updates in all; --resume goes on")
    add("--time-limit", type=float, metavar="MINUTES", help="stop and save after so long (default: before a Slurm job's end)")
    add("--preflight", action="store_true", help="check all that the run needs, in a few minutes, and exit")
    add("--save-every", type=int, default=1, metavar="N", help="epochs between checkpoints (default: %(default)s)")
    add("--keep-last", type=int, default=3, metavar="K", help="newest checkpoints to keep (default: %(default)s)")
    add("--keep-every", type=int, default=0, metavar="M", help="also keep every M-th epoch's checkpoint, 0 for none")
    add("--sample-every", type=int, default=1, metavar="N", help="epochs between sample grids, 0 for none")
    add("--sample-prompts", nargs="+", metavar="TEXT", help="prompts of the grids (default: validation captions)")
    add("--sample-guidance", type=float, default=2.0, help="guidance scale of the grids (default: %(default)s)")
    add("--log-every", type=int, default=20, metavar="N", help="updates between log points (default: %(default)s)")
    return parser


def parse_args(argv=None):
    """(args, ModelConfig, checkpoint payload or None, its path or None). Flags given by hand win over those of a resumed
    run, and these over the preset's defaults; a resumed run's model and sample order cannot be changed."""
    parser = make_parser()
    first = parser.parse_args(argv)
    if int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", 0)) and not (first.folder or first.resume):
        raise ValueError("torchrun --max-restarts: restarted processes find their run by its name; add --folder RUN")
    payload = path = None
    resume = first.folder if first.folder and models.find_checkpoints(first.folder) else first.resume
    if resume:
        payload, path = models.load_checkpoint(resume)
        if Path(resume) == path and not first.folder and path in (found := models.find_checkpoints(path.parent))[1:]:
            raise ValueError(f"--resume {path}: the same folder holds {found[0].name}, from which a run there goes on; "
                             "delete what is newer, or add --folder NEW")
        parser.set_defaults(**payload["args"])
    else:
        preset = first.preset or ("tiny" if is_builtin(first.data) else "standard")
        parser.set_defaults(preset=preset, **TRAINING_DEFAULTS[preset])
    args = parser.parse_args(argv)
    config = make_config(args)
    if args.init_unet and not payload:
        config = replace(config, unet=models.read_unet_config(args.init_unet))
    if payload:
        given, config = vars(args) | config.to_dict(), ModelConfig.from_dict(payload["config"])
        stored = payload["args"] | config.to_dict()
        for name in ("seed", "batch_size", "val_fraction", "preset", "init_unet", *MODEL_FLAGS):
            if given[name] != stored.get(name):
                raise ValueError(f"--{name.replace('_', '-')} {given[name]}: the checkpoint {path} has {stored.get(name)}; "
                                 "leave the flag out, or start a new run without --resume")
    check_at_least(args, epochs=max(1, payload["epoch"]) if payload else 1, accumulation=1, save_every=1, keep_last=1,
                   log_every=1, max_bad_steps=1, seed=0, workers=0, keep_every=0, sample_every=0,
                   min_snr_gamma=args.snr_floor or 0)
    for name in ("val_fraction", "ema_decay"):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(args, name)}: must be at least 0 and below 1")
    if not args.max_grad_norm > 0:
        raise ValueError(f"--max-grad-norm {args.max_grad_norm}: must be above 0; inf for no clipping")
    return args, config, payload, path


def make_config(args):
    """The preset with the given model flags. The built-in text encoder knows the built-in captions' words and no others."""
    given = {name: getattr(args, name) for name in MODEL_FLAGS if getattr(args, name) is not None}
    if args.data == "shapes-hard":
        given.setdefault("resolution", 64)   # two things a picture need the room
    config = replace(PRESETS[args.preset], **given)
    if config.text_encoder != "builtin":
        return config
    if is_builtin(args.data):
        return replace(config, builtin_words=vocabulary())
    if args.text_encoder == "builtin":
        raise ValueError("--text-encoder builtin: it only knows the words of the built-in pictures; "
                         "name a CLIP text model for your own data")
    return replace(config, text_encoder=ModelConfig.text_encoder)


def autocast(device, dtype):
    """torch.autocast, or nothing where dtype is None (float32)."""
    return torch.autocast(device.type, dtype=dtype) if dtype else nullcontext()


def clean_latents(codec, batch):
    """x_0 (B, C, h, w): a draw from the posterior of the batch's images, which are encoded now or were long ago."""
    if "images" in batch:
        return codec.encode(to_unit_range(batch["images"]), batch.get("posterior_eps"))
    mean, std = batch["moments"].float().unbind(dim=1)
    return mean + std * batch["posterior_eps"]


def diffusion_loss(unet, model, batch, min_snr_gamma=None, snr_floor=None):
    """Each sample's weighted squared error, (B,) float32: the inside of Algorithm 1, Ho et al. 2020."""
    x_0 = clean_latents(model.codec, batch)                                                         # (B, C, h, w)
    text_emb = model.text_encoder(batch["tokens"])                                                  # (B, L, D)
    t, eps = batch["t"], batch["eps"]
    x_t = model.schedule.add_noise(x_0, eps, t)
    output = apply_unet(unet, model.config, x_t, t, text_emb)
    error = (output.float() - model.schedule.target(x_0, eps, t)).square().mean(dim=(1, 2, 3))
    return model.schedule.loss_weight(t, min_snr_gamma, snr_floor) * error


def learning_rate(step, total_steps, args):
    """The learning rate of update number `step`, from 0: a pure function, so there is no scheduler state to save."""
    lr = args.lr * min(1, (step + 1) / max(1, args.warmup_steps))
    if args.lr_schedule == "cosine":
        lr *= (1 + math.cos(math.pi * min(1, step / total_steps))) / 2
    elif args.lr_schedule == "decay":
        lr *= max(0, min(1, (total_steps - step) / (0.2 * total_steps)))
    return lr


def clip_gradients(parameters, max_norm):
    """Scale the gradients down to the global norm max_norm where it is larger; returns their norm before.

    On a GPU the factor is always applied, as looking would synchronise; on a CPU looking is free and mostly saves the work.
    """
    norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
    if norm.is_cuda or norm > max_norm:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


@torch.no_grad()
def validate(model, loader, ranks, dtype, parts=5):
    """Mean unweighted error over the fixed validation samples, each with its own fixed t and eps, and the means over those
    of each fifth of [0, T): early ones (small t) are about detail, late ones about composition. {TensorBoard tag: value}."""
    T = model.schedule.num_train_timesteps
    sums = torch.zeros(2, parts, dtype=torch.float64, device=ranks.device)   # errors and samples
    for batch in loader:
        batch = to_device(batch, ranks.device)
        with autocast(ranks.device, dtype):
            error = diffusion_loss(model.unet, model, batch).double()
        sums.index_add_(1, batch["t"] * parts // T, torch.stack([error, torch.ones_like(error)]))
    ranks.sum(sums)
    total, count = sums.sum(dim=1).tolist()
    return {"epoch/validation_loss": total / count} | {
        f"validation_by_t/{k * T // parts:04d}-{(k + 1) * T // parts:04d}": total / count
        for k, (total, count) in enumerate(sums.T.tolist()) if count}


def prepare_network(args, unet, ranks):
    """The UNet as the loop calls it: with the switches for speed and memory and, with several processes, wrapped in DDP."""
    models.speed_up(unet, ranks.device, args.compile)
    if args.gradient_checkpointing:   # there is no dropout, so no random state to bring back
        unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False, preserve_rng_state=False))
        torch._dynamo.config.optimize_ddp = False   # PyTorch 2.7 cannot cut a compiled network with checkpoints into buckets
    if ranks.world_size == 1:
        return unet
    return DistributedDataParallel(unet, device_ids=[ranks.local_rank] if ranks.device.type == "cuda" else None,
                                   gradient_as_bucket_view=True)


def make_run_folder(args, checkpoint_path, ranks):
    """--folder, or the folder of the resumed run, or a new runs/run_YYYYmmdd_HHMMSS[_name]; the same on every rank."""
    if args.folder or checkpoint_path:
        folder = Path(args.folder or checkpoint_path.parent)
        folder.mkdir(parents=True, exist_ok=True)
        return folder
    folder = None
    if ranks.is_main:
        stem = time.strftime("run_%Y%m%d_%H%M%S") + (f"_{args.name}" if args.name else "")
        for suffix in ["", *(f"_{k}" for k in range(2, 1000))]:   # jobs of one array start in the same second
            folder = Path(args.runs) / (stem + suffix)
            with suppress(FileExistsError):
                folder.mkdir(parents=True)
                break
    return ranks.gather(folder)[0]


def take_over(folder):
    """Lock the run folder for as long as this process lives and the returned file is held, and remove what a killed run left
    half-written. A POSIX lock ends with its process, however that ends; loader workers do not inherit it; NFS has it."""
    lock = open(folder / ".lock", "w")
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"--folder {folder}: another job is training in this folder; stop it, or name another") from None
    except OSError as error:
        warnings.warn(f"--folder {folder}: this file system has no locks ({error}), so see to it that only one job uses it",
                      stacklevel=2)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink()
    return lock


@contextmanager
def tolerate_disk_faults(what, writer=None):
    """A disk that is full or gone costs the run what is written within the block, and no more. It is said, once for each
    text; a SummaryWriter, whose thread does not survive, begins a new file the next time."""
    try:
        yield
    except OSError as error:
        warnings.warn(f"{what} could not be written ({error}); training goes on", stacklevel=1)
        if writer:
            writer.file_writer = writer.all_writers = None


def stop_time(minutes):
    """The Unix time at which to stop and save: so many minutes from now; by default, in a Slurm job, five minutes before
    its end or after nine tenths of what is left of it, whichever is later."""
    if minutes is not None:
        return time.time() + 60 * minutes
    left = float(os.environ.get("SLURM_JOB_END_TIME") or math.inf) - time.time()
    return time.time() + max(left - 300, 0.9 * left)


class LiveBytes(TorchDispatchMode):
    """Within the block, `peak` grows to the most that the tensors made there hold at any moment."""

    def __init__(self):
        super().__init__()
        self.peak, self.storages = 0, WeakSet()   # a storage leaves the set when its memory is freed

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        outputs = operation(*args, **(kwargs or {}))
        if not operation.is_view:
            self.storages.update(leaf.untyped_storage() for leaf in tree_leaves(outputs) if isinstance(leaf, torch.Tensor))
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.storages))
        return outputs


def training_bytes(args, model, data, ranks, dtype):
    """(all, weights): what training takes on this rank's device at its peak, and of that what stays between steps.

    A step is run on fake tensors, which have shapes but no numbers, to add up what lives at each moment of it.
    """
    unet = sum(p.nbytes for p in model.unet.parameters())
    frozen = [*model.text_encoder.parameters(), model.text_encoder.remembered, *model.codec.parameters()]
    stay = 4 * unet + sum(p.nbytes for p in frozen)   # the UNet's weights, Adam's two moments and EMA
    sample = data.loader.dataset.__getitems__([(0, 0, int(data.train_images[0]))])
    with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as step:
        batch = {name: torch.empty(data.batches.micro_batch, *tensor.shape[1:], dtype=tensor.dtype, device=ranks.device)
                 for name, tensor in sample.items()}
        with autocast(ranks.device, dtype):
            loss = diffusion_loss(model.unet.forward, model, batch, args.min_snr_gamma, args.snr_floor).mean()   # never compiled
        forward_peak = step.peak
        torch.autograd.grad(loss, list(model.unet.parameters()))
    # With several processes gradients lie in DDP's buckets all the time; with several micro-batches their sum so far beside them.
    copies = (ranks.world_size > 1) + (args.accumulation > 1)
    return stay + (copies * unet + max(forward_peak, step.peak - unet) if copies else step.peak), stay


def print_startup_table(args, model, data, ranks, folder, dtype):
    """What runs where, and what it takes."""
    name = torch.cuda.get_device_name(ranks.device) if ranks.device.type == "cuda" else f"{torch.get_num_threads()} threads"
    devices = ranks.gather(f"{ranks.device} ({name}) on {os.uname().nodename}")
    if not ranks.is_main:
        return
    trainable = sum(p.numel() for p in model.unet.parameters())
    frozen = sum(p.numel() for net in (model.text_encoder, model.codec) for p in net.parameters())
    try:
        memory, weights = (size / 2**30 for size in training_bytes(args, model, data, ranks, dtype))
        memory = (f"{memory:.2f} GiB of tensors at the peak of a step, computed; {weights:.2f} GiB between steps: weights, "
                  "Adam's two moments, EMA, frozen networks")
    except Exception as error:   # fake tensors are young, and the run does not need to know
        memory = f"could not be computed ({type(error).__name__}: {error})".splitlines()[0]
    rows = [(f"rank {rank}", device) for rank, device in enumerate(devices)] + [
        ("run folder", folder),
        ("data", f"{args.data}: {len(data.train_images):,} training and {len(data.val_images):,} validation images, "
                 f"{model.config.resolution} px"),
        ("batch", f"{args.batch_size} = {ranks.world_size} processes x {args.accumulation} micro-batches x "
                  f"{data.batches.micro_batch}"),
        ("length", f"{args.epochs} epochs x {data.batches.steps_per_epoch} steps"),
        ("UNet", f"{trainable / 1e6:.1f} M parameters, input {' x '.join(map(str, model.codec.latent_shape))}, "
                 f"predicts {model.config.prediction_type}"),
        ("frozen", f"{frozen / 1e6:.1f} M parameters: text encoder {model.config.text_encoder}, VAE {model.config.vae}"),
        ("precision", "float32" if dtype is None else f"{str(dtype).removeprefix('torch.')} autocast, float32 weights"),
        ("memory per process", memory)]
    print("\n".join(f"{key:>18}  {value}" for key, value in rows), flush=True)


class TrainingState:
    """What training changes, and so what a checkpoint holds."""

    def __init__(self, unet, args, device, dtype):
        self.unet, self.ema = unet, EMA(unet, args.ema_decay)
        self.optimizer = torch.optim.AdamW(unet.parameters(), lr=args.lr, betas=tuple(args.adam_betas),
                                           weight_decay=args.weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
        self.epoch = self.step = self.step_in_epoch = 0   # finished epochs; optimizer updates in all, and in this epoch
        self.epoch_losses = []
        # Of the epoch's updates so far, this rank's part: loss, gradient norm, their number.
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)

    def restore(self, payload, is_main):
        """Continue from a checkpoint's payload. The main rank carries on the sums of all: a float64 sum of float32 losses
        is exact, so the epoch's mean does not depend on who added what."""
        load_parameters(self.unet, payload["unet"])
        for name, average in self.ema.parameters.items():
            average.copy_(payload["ema"][name])
        flags = {name: self.optimizer.param_groups[0][name] for name in ("betas", "weight_decay")}   # may be given anew
        self.optimizer.load_state_dict(payload["optimizer"])
        self.optimizer.param_groups[0].update(flags)
        for p, moments in self.optimizer.state.items():   # laid out in memory like the weights, which differs by device
            moments |= {name: torch.empty_like(p).copy_(value) if value.shape == p.shape else value.clone()
                        for name, value in moments.items()}
        if payload["scaler"]:   # none where the GPU before computed in bfloat16
            self.scaler.load_state_dict(payload["scaler"])
        self.epoch, self.step, self.step_in_epoch = payload["epoch"], payload["step"], payload["step_in_epoch"]
        self.epoch_losses = payload["epoch_losses"]
        self.sums += torch.tensor(payload["sums"], dtype=torch.float64).to(self.sums) if is_main else 0

    def check_ranks(self, ranks):
        """Raises: ValueError where ranks have come apart in weights, EMA, optimizer or step, down to the last bit."""
        moments = chain.from_iterable(state.values() for state in self.optimizer.state.values())
        total = sum(tensor.detach().view(torch.int32).sum().to(self.sums.device)
                    for tensor in chain(self.unet.parameters(), self.ema.parameters.values(), moments))
        totals = ranks.gather((self.step, total.item()))
        if apart := [rank for rank, theirs in enumerate(totals) if theirs != totals[0]]:
            raise ValueError(f"step {self.step}: rank(s) {apart} hold other weights than rank 0, by a faulty device or different "
                             "files or software on the nodes; go on from the last checkpoint with --resume")

    def save(self, folder, ranks, keep=(1, 0), tries=1, **more):
        """Write checkpoint_epochEEEE_stepSSSSSSSS.pt from the main rank and prune the ones before; called by all.

        Where it cannot be written the older ones stay; the last of several tries, ten seconds apart, raises OSError.
        """
        self.check_ranks(ranks)
        sums, saved = ranks.sum(self.sums.clone()).tolist(), False
        if ranks.is_main:
            payload = dict(unet=self.unet.state_dict(), ema=self.ema.parameters, optimizer=self.optimizer.state_dict(),
                           scaler=self.scaler.state_dict(), epoch=self.epoch, step=self.step, sums=sums,
                           step_in_epoch=self.step_in_epoch, epoch_losses=self.epoch_losses, processes=ranks.world_size, **more)
            path = folder / f"checkpoint_epoch{self.epoch:04d}_step{self.step:08d}.pt"
            for wait in [10] * (tries - 1) + [0]:
                with tolerate_disk_faults(f"checkpoint {path}"):
                    folder.mkdir(exist_ok=True)
                    models.save_checkpoint(payload, path)
                    saved = True
                    models.prune_checkpoints(path, *keep)
                if saved:
                    break
                time.sleep(wait)
        # Nobody leaves before the file is there: one process that ends may take the others with it.
        if not ranks.gather(saved)[0] and tries > 1:
            raise OSError(f"step {self.step}: not saved in {tries} tries; make room for {folder} and go on with --resume")


class StepLog:
    """Sums on the device over the steps since the last report; one all-reduce and one synchronisation a report."""

    def __init__(self, writer, ranks, batch_size):
        self.writer, self.ranks, self.batch_size = writer, ranks, batch_size
        self.sums = torch.zeros(3, dtype=torch.float64, device=ranks.device)   # loss, gradient norm, updates
        self.bad_in_a_row = 0
        self.restart()

    def restart(self):
        self.sums.zero_()
        self.bad = []   # for each step, on the device, whether its update was skipped
        self.steps, self.data_seconds, self.since = 0, 0.0, time.perf_counter()

    def report(self, step, lr, max_bad_steps, quiet):
        """Write the means since the last report to TensorBoard; returns a short text for the progress bar.

        Names the skipped updates unless `quiet`. Raises: ValueError after max_bad_steps in a row, on all ranks."""
        loss, grad_norm = (self.ranks.sum(self.sums)[:2] / self.sums[2]).tolist()
        seconds = time.perf_counter() - self.since
        skipped = [step + 1 - self.steps + k for k, bad in enumerate(torch.stack(self.bad).tolist()) if bad]
        for number in range(step + 1 - self.steps, step + 1):
            self.bad_in_a_row = self.bad_in_a_row + 1 if number in skipped else 0
            if self.bad_in_a_row >= max_bad_steps:
                newest = models.find_checkpoints(self.writer.log_dir)[:1] if self.writer else []
                raise ValueError(f"--max-bad-steps {max_bad_steps}: the loss or gradient was not finite in so many updates in a "
                                 f"row, up to step {number}; the last good checkpoint is {newest[0] if newest else 'none'}; "
                                 "try a lower --lr or --amp off")
        if skipped and not quiet and self.ranks.is_main:
            tqdm.write(f"warning: update skipped at step {', '.join(map(str, skipped))}: loss or gradient norm not finite",
                       file=sys.stderr)
        peak = (torch.cuda.max_memory_allocated() if self.ranks.device.type == "cuda"
                else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
        values = {"train/loss": loss, "train/grad_norm": grad_norm, "train/learning_rate": lr, "train/skipped": len(skipped),
                  "speed/images_per_second": self.steps * self.batch_size / seconds,
                  "speed/data_wait_share": self.data_seconds / seconds, "memory/peak_gib": peak / 2**30}
        with tolerate_disk_faults("curves"):
            for tag, value in values.items() if self.writer else ():
                self.writer.add_scalar(tag, value, step)
        self.restart()
        return f"loss {loss:.4f}, {values['speed/images_per_second']:.0f} images/s"


def train_epoch(args, model, net, state, data, ranks, dtype, log, stop):
    """Algorithm 1 of Ho et al. 2020 from state.step_in_epoch to the end of the epoch. Returns True where the run was
    asked to stop on the way, always between two updates and on all ranks at the same one."""
    device, steps_per_epoch = ranks.device, data.batches.steps_per_epoch
    data.batches.start_at(state.epoch, state.step_in_epoch)
    batches = data.watched(data.loader)
    with tqdm(total=steps_per_epoch, initial=state.step_in_epoch, unit="step", desc=f"epoch {state.epoch + 1}/{args.epochs}",
              disable=not ranks.is_main, mininterval=1 if sys.stderr.isatty() else 30, dynamic_ncols=True) as bar:
        while state.step_in_epoch < steps_per_epoch:
            lr = learning_rate(state.step, args.epochs * steps_per_epoch, args)
            for group in state.optimizer.param_groups:
                group["lr"] = lr
            step_loss = 0
            for micro in range(args.accumulation):
                waiting = time.perf_counter()
                batch = to_device(next(batches), device)
                log.data_seconds += time.perf_counter() - waiting
                # Gradients are averaged over ranks in the last backward pass of an update.
                with nullcontext() if net is model.unet or micro == args.accumulation - 1 else net.no_sync():
                    with autocast(device, dtype):
                        loss = diffusion_loss(net, model, batch, args.min_snr_gamma, args.snr_floor).mean()
                    # Micro-batches are of equal size, so the mean of their means is the mean over the global batch.
                    # An infinite loss is made NaN, which the averaged gradients then tell every rank.
                    loss = loss / args.accumulation * (1 + 0 * loss.detach())
                    state.scaler.scale(loss).backward()
                step_loss += loss.detach().double()
            state.scaler.unscale_(state.optimizer)
            norm = clip_gradients(state.optimizer.param_groups[0]["params"], args.max_grad_norm)
            # With found_inf at 1 AdamW leaves weights and moments alone; nobody has to wait for the answer to know.
            bad = ~norm.isfinite()
            state.optimizer.found_inf = bad.float()
            update = torch.where(bad, 0, torch.stack([step_loss, norm.double(), torch.ones_like(step_loss)]))
            state.sums += update
            log.sums += update
            log.bad.append(bad)
            state.scaler.step(state.optimizer)
            state.scaler.update()
            state.optimizer.zero_grad(set_to_none=True)
            state.step += 1
            state.step_in_epoch += 1
            log.steps += 1
            state.ema.update(state.step)
            bar.update()
            if state.step % args.log_every == 0 or state.step_in_epoch == steps_per_epoch:
                data.check_images(ranks)
                bar.set_postfix_str(log.report(state.step, lr, args.max_bad_steps, quiet=state.scaler.is_enabled()))
            if stop.poll() or state.step == args.max_steps:
                return True
    return False


def finish_epoch(args, model, state, data, ranks, dtype, writer, folder):
    """The epoch's mean loss, the validation loss and, every --sample-every epochs, the grid and the way to its first
    picture, all but the first with the EMA weights."""
    loss_sum, _, updates = ranks.sum(state.sums).tolist()
    state.epoch_losses.append(loss_sum / updates if updates else math.nan)
    state.sums.zero_()
    state.epoch, state.step_in_epoch = state.epoch + 1, 0
    values, images = {"epoch/loss": state.epoch_losses[-1]}, {}
    model.unet.eval()
    with state.ema.applied_to(model.unet):
        if len(data.val_images):
            values |= validate(model, data.watched(data.val_loader), ranks, dtype)
        if args.sample_every and (state.epoch % args.sample_every == 0 or state.epoch == args.epochs):
            steps = min(30, model.schedule.num_train_timesteps)
            how = dict(guidance_scale=args.sample_guidance, steps=steps, dtype=dtype)
            images["grid"] = make_grid(generate_sharded(model, data.prompts, ranks, **how), data.prompts)
            if ranks.is_main:
                images["denoising"] = make_strip(model, data.prompts[0], **how)
    model.unet.train()
    data.check_images(ranks)
    if writer:
        with tolerate_disk_faults("curves and samples", writer):
            for tag, value in values.items():
                writer.add_scalar(tag, value, state.epoch)
            for name, image in images.items():
                writer.add_image(f"samples/{name}", np.asarray(image), state.epoch, dataformats="HWC")
            if images:
                images["grid"].save(folder / f"samples_epoch{state.epoch:04d}.png")
            writer.flush()
        text = ", ".join(f"{tag[6:].replace('_', ' ')} {value:.5f}" for tag, value in values.items() if tag.startswith("epoch/"))
        tqdm.write(f"epoch {state.epoch}: {text}")


def main(argv=None):
    """Train as the command line says, or in Python as the list `argv` does; returns the run folder."""
    args, config, payload, checkpoint_path = parse_args(argv)
    deadline = stop_time(args.time_limit)
    ranks = setup_ranks(args.device)
    dtype = amp_dtype(args.amp, ranks.device)
    if len(set(ranks.gather(str(dtype)))) > 1:
        raise ValueError(f"--amp {args.amp}: means bfloat16 on some of these GPUs and float16 on others; add --amp fp16, or ask "
                         "for GPUs of one kind")
    data = TrainingData(args, config, ranks)
    torch.manual_seed(args.seed)
    model = models.Model(config, ranks.device)
    if args.init_unet and not payload:
        models.load_unet_weights(model.unet, args.init_unet)
    if args.cache_latents is not None and not args.preflight:
        data.cache_latents(args, model, ranks, models.write_atomically)
    data.make_loaders(args, model, ranks)
    net = prepare_network(args, model.unet, ranks)
    state = TrainingState(model.unet, args, ranks.device, dtype)
    if payload:
        if payload["train_images"] != len(data.train_images):
            raise ValueError(f"--data {args.data}: has {len(data.train_images)} training images, the run was started with "
                             f"{payload['train_images']}; restore the data, or start a new run without --resume")
        if ranks.is_main and payload.get("data", data.source.fingerprint) != data.source.fingerprint:
            warnings.warn(f"--data {args.data}: its names or captions have changed since the run was started, so what follows is "
                          "not the run that it would have been", stacklevel=1)
        state.restore(payload, ranks.is_main)
        if ranks.is_main and payload["processes"] != ranks.world_size:
            print(f"{payload['processes']} processes up to step {state.step}, {ranks.world_size} from here: the same samples and "
                  "noise, weights equal up to rounding; bit for bit only with the same number")
        payload = None   # as large as the model, Adam's moments and EMA together
    state.check_ranks(ranks)

    if args.preflight:
        from slurm.preflight import preflight  # of use on clusters alone, and so kept with what is
        return preflight(args, ranks, model, net, state, data, dtype, deadline)

    folder = make_run_folder(args, checkpoint_path, ranks)
    # What the checkpoint says of the run; where it is, how it was started and when to pause are not part of that.
    record = {name: value for name, value in vars(args).items()
              if name not in ("resume", "folder", "max_steps", "time_limit", "preflight")}
    writer, stop_file = None, folder / "stop"
    if ranks.is_main:
        lock = take_over(folder)   # noqa: F841, held until the process ends
        # A disk fault in TensorBoard's thread reaches its next caller, so the thread itself need not say it.
        threading.excepthook = lambda died: issubclass(died.exc_type, OSError) or threading.__excepthook__(died)
        stop_file.unlink(missing_ok=True)
        writer = SummaryWriter(folder, purge_step=state.step + 1 if checkpoint_path else None)
        text = json.dumps(dict(model=config.to_dict(), args=record), indent=1)
        models.write_atomically(folder / "config.json", lambda file: file.write(text.encode()))
        writer.add_text("config", "    " + text.replace("\n", "\n    "), state.step)
    print_startup_table(args, model, data, ranks, folder, dtype)

    log, stopped = StepLog(writer, ranks, args.batch_size), args.max_steps is not None and state.step >= args.max_steps
    with closing(StopRequest(ranks, stop_file, deadline)) as stop:
        while state.epoch < args.epochs and not stopped:
            stopped = train_epoch(args, model, net, state, data, ranks, dtype, log, stop)
            if state.step_in_epoch == data.batches.steps_per_epoch:
                finish_epoch(args, model, state, data, ranks, dtype, writer, folder)
                log.restart()
            ends = stopped or state.epoch == args.epochs
            if ends or state.epoch % args.save_every == 0:
                state.save(folder, ranks, (args.keep_last, args.keep_every), tries=7 if ends else 1, config=config.to_dict(),
                           args=record, train_images=len(data.train_images), data=data.source.fingerprint)
    if writer:
        with tolerate_disk_faults("curves"):
            writer.close()
        if state.epoch == args.epochs or state.step == args.max_steps:
            stop_file.touch()   # tells whoever started this that there is nothing left to go on with
        if state.epoch == args.epochs:
            shown = "".join(filter(str.isprintable, data.prompts[0]))   # a caption may hold anything, a shell command too
            print(f"finished: {folder}")
            print(f"draw pictures: python sample.py --checkpoint {folder} --prompts {shlex.quote(shown)}")
        else:
            print(f"stopped after {state.step} steps; to go on: train.py --resume {folder}")
    return folder


if __name__ == "__main__":
    run_main(main)

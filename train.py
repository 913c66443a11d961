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
import shlex
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

import data
import models
from data import AMP, DEVICES
from models import PRESETS, Model, ModelConfig, apply_unet, flag, place, require, update_ema
from sample import generate_sharded, make_grid, make_strip

# The loss and the learning rate


def clean_latents(codec, batch):
    """x_0 (B, C, h, w): a draw from the posterior of the batch's images."""
    if "moments" in batch:   # encoded once and for all: data.cache_latents
        mean, std = batch["moments"].float().unbind(dim=1)
    else:
        mean, std = codec.moments(data.to_unit_range(batch["image"]))
    if codec.is_pixel_space:
        return mean
    return mean + std * batch["posterior_eps"]


def predict(unet, model, batch):
    """The network's output at x_t and its target, both (B, C, h, w) float32: the inside of
    Algorithm 1, Ho et al. 2020."""
    t, eps = batch["t"], batch["eps"]                            # t ~ U[0, T), eps ~ N(0, 1)
    x_0 = clean_latents(model.codec, batch)                      # (B, C, h, w)
    text_emb = model.text_encoder(batch["caption"])              # (B, L, D)
    x_t = model.schedule.add_noise(x_0, eps, t)                  # (B, C, h, w)
    output = apply_unet(unet, model.config, x_t, t, text_emb)    # (B, C, h, w)
    return output.float(), model.schedule.target(x_0, eps, t)


def diffusion_loss(unet, model, batch, min_snr_gamma=None, snr_floor=None):
    """Each sample's weighted squared error, (B,) float32. A loss of your own goes here."""
    output, target = predict(unet, model, batch)
    error = (output - target).square().mean(dim=(1, 2, 3))
    return model.schedule.loss_weight(batch["t"], min_snr_gamma, snr_floor) * error


def learning_rate(step, total_steps, args):
    """The learning rate of update number `step`, from 0: a pure function, so that there is no
    scheduler state to save."""
    warmup_steps = min(args.warmup_steps, total_steps / 20)   # short runs reach their peak too
    lr = args.lr * min(1, (step + 1) / max(1, warmup_steps))
    if args.lr_schedule == "cosine":
        lr *= (1 + math.cos(math.pi * min(1, step / total_steps))) / 2
    elif args.lr_schedule == "decay":
        lr *= max(0, min(1, (total_steps - step) / (0.2 * total_steps)))
    return lr


# Whoever reads for the method may go to `main`, at the end. What is between makes it reliable.


# Validation, with the averaged weights


@torch.no_grad()
def validate(model, loader, dtype, parts=5):
    """{TensorBoard tag: value}: the mean squared error, whatever the loss, over the fixed
    validation samples, and over those of each fifth of [0, T). Small t is about detail, large t
    about composition."""
    T, device = model.schedule.num_train_timesteps, model.device
    sums = torch.zeros(2, parts, dtype=torch.float64, device=device)   # errors and samples
    with data.all_or_none():
        for batch in loader:
            batch = data.to_device(batch, device)
            with torch.autocast(device.type, dtype, enabled=dtype is not None):
                output, target = predict(model.unet, model, batch)
            error = (output - target).square().mean(dim=(1, 2, 3)).double()
            sums.index_add_(1, batch["t"] * parts // T,
                            torch.stack([error, torch.ones_like(error)]))
    dist.all_reduce(sums)
    tags = ["loss/validation"] + [
        f"validation_by_t/{k * T // parts:04d}-{(k + 1) * T // parts:04d}" for k in range(parts)]
    sums = torch.cat([sums.sum(dim=1, keepdim=True), sums], dim=1)
    return {tag: error / count for tag, (error, count) in zip(tags, sums.T.tolist()) if count}


def finish_epoch(args, state, model, val_loader, prompts, dtype, writer, folder, stop):
    """Validation loss and, every --sample-every epochs, the grid and the way to its first picture.
    A request to stop leaves out what is not done yet."""
    averaged = copy.copy(model)
    averaged.unet = state.ema
    values, images = {"loss/epoch": state.epoch_losses[-1]}, {}
    draws = args.sample_every and state.epoch % args.sample_every == 0
    with tolerate(data.SPARED, "validation or samples left out"):
        found = validate(averaged, takewhile(lambda _: not stop.look(), val_loader), dtype)
        asked = any(data.gather(stop.look()))
        stop.agreed |= asked
        values |= found if not asked else {}   # else the validation may have ended early
        if not asked and (draws or args.sample_every and state.epoch == args.epochs):
            how = dict(dtype=dtype, steps=min(30, model.schedule.num_train_timesteps),
                       batch_size=args.batch_size // dist.get_world_size() // args.accumulation)
            images["grid"] = make_grid(generate_sharded(averaged, prompts, **how), prompts)
            if writer:
                images["denoising"] = make_strip(averaged, prompts[0], **how)
    if not writer:
        return
    names = {"loss/epoch": "loss", "loss/validation": "validation loss"}
    said = [f"{names[tag]} {values[tag]:.5f}" for tag in names if tag in values]
    tqdm.write(f"epoch {state.epoch}: {', '.join(said)}")
    with tolerate(OSError, "curves and samples could not be written", writer):
        for tag, value in values.items():
            writer.add_scalar(tag, value, state.step)
        for name, image in images.items():
            writer.add_image(f"samples/{name}", np.asarray(image), state.step, dataformats="HWC")
        if images:
            images["grid"].save(folder / f"samples_epoch{state.epoch:04d}.png")
        writer.flush()


# What training changes


def all_reduced(tensor):
    """The sum over all ranks, as a new tensor."""
    tensor = tensor.clone()
    dist.all_reduce(tensor)
    return tensor


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
        self.max_norm = min(args.max_grad_norm, 1e38)   # inf by an infinite norm would be NaN
        # Float16 needs its gradients scaled up. Elsewhere the scale stays 1, and the scaler only
        # skips the update where a gradient is not finite.
        self.is_scaled = dtype == torch.float16
        self.scaler = torch.amp.GradScaler(device.type, 2.0**16 if self.is_scaled else 1.0)
        # Finished epochs; updates in all, in this epoch, up to the last log point.
        self.epoch = self.step = self.step_in_epoch = self.logged_step = 0
        self.saved_step, self.epoch_losses = -1, []
        # This rank's part of the epoch's updates, and of those since the last log point: sums of
        # loss, gradient norm and their number.
        self.totals = torch.zeros(2, 3, dtype=torch.float64, device=device)
        self.sums, self.recent = self.totals

    def backward(self, loss):
        """Add a loss's gradients. An infinite loss may have finite ones: it is made NaN before."""
        self.scaler.scale(loss * torch.where(loss.isfinite(), 1.0, torch.nan)).backward()

    def step_optimizer(self):
        """Clip the gradients and let AdamW take a step; returns their norm before. The step is left
        out where one is not finite: DDP's mean has brought the NaN to all ranks, so by all."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.weights, self.max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update(None if self.is_scaled else 1.0)
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def count_update(self, loss, norm):
        """Updates that were left out count as steps, but not in the means."""
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
        given = self.optimizer.state_dict()["param_groups"]   # the flags of now
        self.optimizer.load_state_dict(payload["optimizer"] | dict(param_groups=given))
        for p, moments in self.optimizer.state.items():   # in the layout of this device's weights
            for name, value in moments.items():
                moments[name] = torch.empty_like(p if value.ndim else value).copy_(value)
        if self.is_scaled and payload["scaler"]:   # none where the GPU before computed in bfloat16
            self.scaler.load_state_dict(payload["scaler"])
        for name in self.COUNTERS:
            setattr(self, name, payload[name])
        self.saved_step = self.step
        if dist.get_rank() > 0:
            return
        # The main rank carries on the sums of all: a float64 sum of float32 losses is exact, so
        # that a mean does not depend on who added what.
        totals = np.array([payload["sums"], payload["recent"]])
        self.totals += torch.from_numpy(totals * ranks / payload["processes"]).to(self.totals)
        if payload["fingerprint"] != source.fingerprint:
            warnings.warn(f"--data {args.data}: its names or captions have changed since the run "
                          "was started, so it goes on with other samples")
        before, after = (learning_rate(self.step, flags.epochs * (count // args.batch_size), flags)
                         for flags in (stored_args(payload), args))
        if before != after:
            print(f"learning rate of update {self.step + 1}: {after:.3g}, and not {before:.3g} as "
                  f"before: --lr-schedule {args.lr_schedule} counts anew with the flags given now")

    def check_ranks(self):
        """Raises: ValueError where ranks differ in weights, EMA, moments or step, by one bit."""
        moments = [value for of_p in self.optimizer.state.values() for value in of_p.values()]
        total = sum(tensor.detach().view(torch.int32).sum().to(self.sums.device) for tensor in
                    [*self.weights, *self.averages, *moments])
        totals = data.gather((self.step, total.item()))
        if apart := [rank for rank, theirs in enumerate(totals) if theirs != totals[0]]:
            raise ValueError(f"step {self.step}: rank(s) {apart} hold other weights than rank 0: a "
                             "faulty device, or other files or software; go on with --resume")

    def save(self, folder, keep_last, is_last=False, **more):
        """Write checkpoint_epochEEEE_stepSSSSSSSS.pt from the main rank, unless this step has been
        written, and prune; called by all. Where it cannot be written the older ones stay, and the
        run goes on; for the last one that is an OSError."""
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
            with tolerate(OSError, f"checkpoint {path} could not be written"):
                folder.mkdir(exist_ok=True)
                models.save_checkpoint(payload, path)
                saved = True
                models.prune_checkpoints(path, keep_last)
        # Nobody leaves before the file is there: a process that ends may take the others with it.
        if data.gather(saved)[0]:
            self.saved_step = self.step
        elif is_last:
            raise OSError(f"step {self.step}: not saved; make room for {folder}")


# Stopping


class StopRequest:
    """Signals (data.SIGNALS), the clock, a file named `stop` or --max-steps ask the run to stop,
    and the clock to save. All ranks agree after the same update. A second Ctrl-C kills."""

    def __init__(self, stop_file, deadline, max_steps, step, save_minutes):
        """`deadline`: a Unix time."""
        self.stop_file, self.deadline, self.save_minutes = stop_file, deadline, save_minutes
        self.max_steps, self.asked = max_steps or math.inf, False
        self.agreed = step >= self.max_steps
        self.note_save()
        if threading.current_thread() is threading.main_thread():
            for number in data.SIGNALS:
                signal.signal(number, self.ask)

    def ask(self, number, _):
        self.asked = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)   # torchrun's word for a second Ctrl-C

    def look(self):
        """Whether this rank was asked."""
        return self.asked or time.time() >= self.deadline or self.stop_file.exists()

    def note_save(self):
        self.save_is_due, self.next_save = False, time.time() + 60 * self.save_minutes

    def poll(self, step):
        """Ask all ranks; called by all of them. Over gloo, beside the GPU's work."""
        votes = torch.tensor([self.look() or step >= self.max_steps, time.time() >= self.next_save])
        votes = all_reduced(votes.int())
        self.agreed, self.save_is_due = votes.bool().tolist()


@contextmanager
def give_signals_back():
    """After the block the signals do again what they did before, for example in a notebook."""
    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in data.SIGNALS if is_main}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def stop_time(minutes):
    """The Unix time at which to stop and save: so many minutes from now; by default, in a Slurm
    job, five minutes before its end or after nine tenths of what is left, whichever is later."""
    if minutes is not None:
        return time.time() + 60 * minutes
    left = float(os.environ.get("SLURM_JOB_END_TIME") or math.inf) - time.time()
    return time.time() + max(left - 300, 0.9 * left)


# Loaders and the network as the loop takes them


def cache_place(args):
    """Where latent caches are made. Raises: OSError where it cannot be written, before anything
    that takes long."""
    place = Path(args.cache_latents or Path(args.data).resolve().parent)
    place.mkdir(parents=True, exist_ok=True)
    tempfile.TemporaryFile(dir=place).close()
    return place


def latent_loader(args, model, source, workers):
    """image_loader's counterpart, with latents that are encoded once. The cache folder's name is a
    hash of all that they depend on, so that one that is found fits."""
    codec, config, parent = model.codec, model.config, cache_place(args)
    pictures = data.gather(source.identity() if dist.get_rank() == 0 else None)[0]
    made_of = dict(pictures=pictures, vae=data.hash_of_weights(codec.vae), crop="centre",
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
    samples = data.Samples(load, captions, train_images, config, shape, args.seed, args.flip)
    validation = data.Samples(load, captions, val_images, config, shape, validation=True)
    val_order = []
    loaders = (data.make_loader(samples, order, model.device, workers),
               data.make_loader(validation, val_order, model.device, workers))
    # The workers are forked here, where NCCL has no threads yet, and have nothing to load.
    order.start_at(0, order.steps_per_epoch)
    for loader in loaders:
        iter(loader)
    val_order += data.validation_order(val_images, order.micro_batch)
    return loaders


def prepare_network(args, unet, device):
    """The UNet as the loop calls it, with the switches for speed and memory. Several processes wrap
    it in DDP, which averages gradients over them in the backward pass."""
    if args.gradient_checkpointing:
        require(hasattr(unet, "enable_gradient_checkpointing"), args, "gradient_checkpointing",
                "the network has none")
        # To bring the random state back costs a synchronisation, and only dropout needs it.
        has_dropout = any(isinstance(module, torch.nn.modules.dropout._DropoutNd) and module.p
                          for module in unet.modules())
        unet.enable_gradient_checkpointing(partial(checkpoint, use_reentrant=False,
                                                   preserve_rng_state=has_dropout))
        torch._dynamo.config.optimize_ddp = False   # PyTorch 2.7 cannot cut such a compiled network
    if args.compile:
        unet.compile()   # in place: the names of the weights stay
    if dist.get_world_size() == 1:
        return unet
    device_ids = [device.index] if device.type == "cuda" else None
    return torch.nn.parallel.DistributedDataParallel(unet, device_ids, gradient_as_bucket_view=True)


# The run folder

def known_folder(given):
    """The folder of --folder, or of the run to resume, or None for a run that makes its own."""
    if given.get("folder") or not given.get("resume"):
        return given.get("folder") and Path(given["folder"])
    path = Path(given["resume"])
    return path if path.is_dir() else path.parent if path.exists() else None


def take_over(folder):
    """Lock the run folder for as long as the returned file is held, and remove what a killed run
    left half-written; called by all ranks. What trains there still, such as a requeued job's last
    turn, has some minutes to end. A POSIX lock ends with its process, however that ends; loader
    workers do not inherit it; NFS has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock, patience = open(folder / ".lock", "a"), int(data.RANK_TIMEOUT / 2)
    for second in range(patience + 1) if dist.get_rank() == 0 else ():
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except (BlockingIOError, PermissionError):
            if second == patience:
                raise ValueError(f"--folder {folder}: another job trains there; stop it") from None
        except OSError as error:
            warnings.warn(f"{folder} cannot be locked ({error}); let only one job use it")
            break
        if second == 0:
            print(f"waiting for the job that trains in {folder}", flush=True)
        time.sleep(1)
    for leftover in folder.glob(".*.tmp") if dist.get_rank() == 0 else ():
        leftover.unlink()
    data.gather(None)
    return lock


def make_run_folder(args):
    """A new runs/run_YYYYmmdd_HHMMSS; for all ranks."""
    folder, stem = None, time.strftime("run_%Y%m%d_%H%M%S")
    for suffix in ("", *(f"_{k}" for k in range(2, 100))) if dist.get_rank() == 0 else ():
        with suppress(FileExistsError):   # of another job that started in the same second
            folder = Path(args.runs, stem + suffix)
            folder.mkdir(parents=True)
            break
    return data.gather(folder)[0]


def open_run_folder(folder, record, step, said, keeps_stop):
    """The main rank's SummaryWriter; said: see print_start; keeps_stop: whether to obey a file
    `stop` that a user has made already, as is right for jobs that start by themselves. One of a
    finished run goes."""
    # A disk fault in TensorBoard's thread reaches its next caller; the thread need not say it.
    threading.excepthook = (lambda died: issubclass(died.exc_type, OSError)
                            or threading.__excepthook__(died))
    with suppress(FileNotFoundError):
        if not keeps_stop or (folder / "stop").read_text() == "finished":
            (folder / "stop").unlink()
    writer = SummaryWriter(folder, purge_step=step + 1)
    text = json.dumps(dict(model=record["config"], args=record["args"]), indent=1)
    models.write_atomically(folder / "config.json", lambda file: file.write(text.encode()))
    writer.add_text("start", "    " + said.replace("\n", "\n    "), step)
    return writer


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
    device, config, steps = model.device, model.config, args.epochs * order.steps_per_epoch
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    devices = Counter(data.gather(f"{name} on {os.uname().nodename}"))
    cut = model.text_encoder.count_cut(source.texts)
    peak = max(learning_rate(step, steps, args) for step in range(0, steps, 1 + steps // 10_000))
    rows = {
        "run folder": folder, "processes": ", ".join(f"{n} x {d}" for d, n in devices.items()),
        "resumed" if checkpoint else "weights": checkpoint or args.init_from or "random",
        "data": f"{args.data}: {counts[0]:,} training and {counts[1]:,} validation images, "
                f"{config.resolution} px",
        **source.report,
        "batch": f"{args.batch_size} = {dist.get_world_size()} processes x {args.accumulation} "
                 f"micro-batches x {order.micro_batch}",
        "length": f"{args.epochs} epochs x {order.steps_per_epoch} steps",
        "learning rate": f"{args.lr_schedule}, at most {peak:.3g}",
        "UNet": f"{sum(p.numel() for p in model.unet.parameters()) / 1e6:.1f} M parameters, input "
                f"{model.codec.latent_shape}, predicts {config.prediction_type}",
        "networks": f"text encoder {config.text_encoder}, VAE {config.vae}",
        "tokens": f"{config.token_length} a caption; {cut:,} captions are cut",
        "precision": f"{dtype} autocast, float32 weights" if dtype else "float32"}
    text = "\n".join(f"{key:>14}  {value}" for key, value in rows.items() if value)
    if dist.get_rank() == 0:
        print(text, flush=True)
    return text


def end_run(args, state, folder, writer, prompt):
    """Leave the run folder and say, from the main rank, what can be done next."""
    with tolerate(OSError, "curves could not be written"):
        by = f", by {folder}/stop" if (folder / "stop").exists() else ""
        if state.epoch == args.epochs or state.step >= (args.max_steps or math.inf):
            (folder / "stop").write_text("finished")   # for whoever would start this again
        writer.close()
    if state.epoch < args.epochs:
        print(f"stopped after {state.step} steps{by}; go on with --resume {folder}")
    else:
        shown = shlex.quote("".join(filter(str.isprintable, prompt)))   # it may hold a command
        print(f"finished; draw: python sample.py --checkpoint {folder} --prompts {shown}")


class StepLog:
    """Means over the updates since the last report; one synchronisation a report."""

    def __init__(self, writer, folder, batch_size, state):
        self.writer, self.folder, self.batch_size, self.bad = writer, folder, batch_size, 0
        self.restart(state)

    def restart(self, state):
        """The clock, which stood still meanwhile, begins anew."""
        self.step, self.since = state.step, time.perf_counter()

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
        if skipped and not state.is_scaled and self.writer:
            tqdm.write(f"warning: {skipped:.0f} of {steps} updates up to step {state.step} "
                       "skipped: loss or gradient not finite", file=sys.stderr)
        loss, norm = (loss / made, norm / made) if made else (math.nan, math.nan)
        speed = (state.step - self.step) * self.batch_size / (time.perf_counter() - self.since)
        values = {"loss/train": loss, "train/grad_norm": norm, "train/learning_rate": lr,
                  "train/skipped": skipped, "speed/images_per_second": speed}
        if torch.cuda.is_initialized():
            values["speed/peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
        with tolerate(OSError, "curves could not be written"):
            for tag, value in values.items() if self.writer else ():
                self.writer.add_scalar(tag, value, state.step)
        state.logged_step = state.step
        state.recent.zero_()
        self.restart(state)
        return f"loss {loss:.4f}, {speed:.0f} images/s"


# Flags, each with its default; the presets' own are below

LR_SCHEDULES = ("constant", "cosine", "decay")


def or_none(text):
    return None if text == "none" else float(text)


@dataclass
class TrainingConfig:
    """What a run does. It travels in the checkpoint, so that --resume needs no other flags."""

    data: str = flag("shapes", "captioned images: a folder, .zip or .tar files; or built-in shapes",
                     title="data", type=place)
    captions: str = flag(None, "a file, folder or archive with captions, if elsewhere", type=place)
    caption_column: str = flag(None, "the column or key with the captions")
    caption_template: str = flag(None, "the caption of all images; {} stands for a folder's name")
    max_bad_images: float = flag(0.01, "stop if a larger share of captions is of missing images")
    val_fraction: float = flag(0.05, "share held out for validation")
    flip: bool = flag(False, 'mirror half of the images; off because captions say "left"')
    cache_latents: str = flag(None, "encode once, here or beside the data", nargs="?", const="")
    workers: int = flag(None, "loader processes per rank; not given: its cores less one")

    preset: str = flag(None, "not given: for shapes tiny, for other data standard", choices=PRESETS,
                       title="optimization")
    init_from: str = flag(None, "a run whose model and average start a new one", type=place)
    epochs: int = flag(100, "how often every image is visited")
    batch_size: int = flag(128, "images per optimizer update, over all processes")
    accumulation: int = flag(1, "micro-batches per update")
    lr: float = flag(2e-4, "AdamW's peak learning rate")
    warmup_steps: int = flag(1000, "updates of linear rise; at most a twentieth of the run's")
    lr_schedule: str = flag("cosine", "decay: in the last fifth", choices=LR_SCHEDULES)
    adam_betas: tuple = flag((0.9, 0.999), "AdamW's averages", type=float, nargs=2)
    weight_decay: float = flag(0.01, "AdamW's")
    max_grad_norm: float = flag(1.0, "clip the gradient's norm; inf: never")
    min_snr_gamma: float = flag(5.0, "x_0 error's weight: SNR up to this, or none", type=or_none)
    snr_floor: float = flag(None, "and down to this; not given: 1, for epsilon none", type=or_none)
    ema_decay: float = flag(0.9999, "decay of the averaged weights")
    seed: int = flag(0, "of first weights, order, timesteps and noise")

    amp: str = flag("auto", "auto: bf16, older GPUs fp16, CPUs off", choices=AMP, title="system")
    compile: bool = flag(False, "torch.compile the UNet")
    gradient_checkpointing: bool = flag(False, "recompute activations to save memory")
    device: str = flag("auto", "auto: GPUs, if any", choices=DEVICES)

    resume: str = flag(None, "continue a run or checkpoint with its flags", type=place, title="run")
    runs: str = flag("runs", "where run folders are made")
    folder: str = flag(None, "the run folder, and where it goes on from if begun", type=place)
    max_steps: int = flag(None, "stop and save after this many updates in all")
    time_limit: float = flag(None, "stop and save after so many minutes; or before a job's end")
    save_every: int = flag(1, "epochs between checkpoints")
    save_minutes: float = flag(30.0, "minutes between checkpoints inside an epoch; inf: none")
    keep_last: int = flag(3, "newest checkpoints to keep")
    sample_every: int = flag(1, "epochs between grids; 0: none")
    sample_prompts: list = flag(None, "not given: validation captions", type=str, nargs="+")
    log_every: int = flag(20, "updates between log points")

    def __post_init__(self):
        models.check_ranges(
            self, epochs=1, accumulation=1, seed=0, workers=0, save_every=1, keep_last=1,
            log_every=1, sample_every=0, max_steps=1, save_minutes=0, time_limit=0, lr=0,
            warmup_steps=0, weight_decay=0, snr_floor=0, min_snr_gamma=self.snr_floor or 0.01,
            max_grad_norm=1e-6, max_bad_images=(0, 1), val_fraction=(0, 0.99),
            ema_decay=(0, 0.999999), adam_betas=(0, 0.999999))


# What suits a preset better than the defaults above, which are the standard preset's.
TRAINING_PRESETS = {
    "tiny": dict(epochs=9, batch_size=16, lr=1e-3, warmup_steps=200, lr_schedule="decay",
                 ema_decay=0.998, adam_betas=(0.9, 0.99)),   # with 0.999 the loss may leap
    "large": dict(batch_size=256, lr=1e-4, warmup_steps=5000, lr_schedule="constant")}


def parse_flags(argv=None):
    """{name: value} of the flags that were given."""
    parser = data.Parser("Train a text-to-image latent diffusion model.", epilog="; ".join(
        f"{name}: {TRAINING_PRESETS.get(name, {})}, {model}" for name, model in PRESETS.items()))
    parser.add_options(fields(TrainingConfig))
    parser.add_options(fields(ModelConfig), "model (kept in the checkpoint; see the presets below)")
    return vars(parser.parse_args(None if argv is None else list(map(str, argv))))


def stored_args(payload):
    """The TrainingConfig in a checkpoint. Older versions had more flags."""
    known = TrainingConfig.__dataclass_fields__
    return TrainingConfig(**{k: v for k, v in payload["args"].items() if k in known})


def settle(given):
    """(args, ModelConfig, payload of the checkpoint to start from or None, its path if the run is
    resumed). Flags that are given win over those of a resumed run, and these over the preset's; a
    resumed run's model and sample order cannot be changed."""
    asked, payload, path = argparse.Namespace(**given), None, None
    of_model = {k: v for k, v in given.items() if k in ModelConfig.__dataclass_fields__}
    flags = {k: v for k, v in given.items() if k not in of_model}
    folder, resume, start = (given.get(name) for name in ("folder", "resume", "init_from"))
    resume = folder if folder and models.find_checkpoints(folder) else resume
    if resume:
        payload, path = models.load_checkpoint(resume)
        newest, *older = models.find_checkpoints(path.parent) or [path]
        require(folder or path != Path(resume) or path not in older, asked, "resume",
                f"the folder holds {newest.name}; delete what is newer, or add --folder NEW")
        args, kept = replace(stored_args(payload), **flags), {"seed", "batch_size", "val_fraction"}
        if gone := [k for k in ("random_crop", "bf16_gradients") if payload["args"].get(k)]:
            raise ValueError(f"--resume {resume}: {gone[0]} is gone; go on with the older version")
        require(args.epochs >= payload["epoch"], args, "epochs", f"{payload['epoch']} are done")
    else:
        payload = models.load_checkpoint(start)[0] if start else None
        suited = "tiny" if data.is_builtin(given.get("data", "shapes")) else "standard"
        preset = payload["args"]["preset"] if payload else given.get("preset", suited)
        args = TrainingConfig(**{**TRAINING_PRESETS.get(preset, {}), **flags, "preset": preset})
        kept = set()
    # A new run may draw at another size. Networks' weights are compared when they are loaded.
    free = {"vae", "text_encoder"} | (set() if resume else {"resolution", "caption_dropout"})
    for name in (kept | {"preset", *of_model} - free).intersection(given) if payload else ():
        then = (payload["args"] | payload["config"])[name]
        require(given[name] == then, asked, name, f"{path or start} has {then}; leave it out")
    config = ModelConfig(**(payload["config"] if payload else vars(PRESETS[preset])) | of_model)
    if not resume and "snr_floor" not in given and config.prediction_type != "epsilon":
        args = replace(args, snr_floor=1.0)   # else the weight vanishes where sampling starts
    if not payload:
        check_schedule(args, config)
        if config.text_encoder == "builtin" and data.is_builtin(args.data):
            config = replace(config, builtin_words=data.VOCABULARY)   # of other data: main
    require(args.cache_latents is None or config.vae != "none", args, "cache_latents",
            "--vae none has no latents to cache")
    return args, config, payload, path


def check_schedule(args, config):
    """Raises: ValueError where sampling cannot start at x_T. Not of runs that began before this was
    checked: they stay what they are."""
    schedule = models.NoiseSchedule(config)
    weights = schedule.loss_weight(torch.arange(config.num_train_timesteps), args.min_snr_gamma,
                                   args.snr_floor)
    share, last = (weights[-1] / weights.mean()).item(), schedule.alphas_cumprod[-1].item()
    require(0.01 <= share <= 100, args, "snr_floor", f"the loss weight at x_T, where sampling "
            f"starts, is {share:.2g} of the mean; leave the flag out")
    require(last < 0.05, config, "num_train_timesteps", f"x_T is far from noise, with alpha_bar "
            f"{last:.2g}; use more, or add --beta-schedule cosine")
    # An error in eps is magnified by 1 / sqrt(alpha_bar), and latents are not clipped.
    require(last > 1e-5 or config.vae == "none" or config.prediction_type != "epsilon", config,
            "prediction_type", f"latents explode where alpha_bar ends at {last:.1g}; use "
            "v_prediction or sample, or another --beta-schedule")


@give_signals_back()
def main(argv=None):
    """Train as the command line says, or in Python as the list `argv`; returns the run folder."""
    given = parse_flags(argv)
    deadline = stop_time(given.get("time_limit"))
    device = data.setup_processes(given.get("device", "auto"))
    folder = known_folder(given)
    # Held as long as main runs, the lock keeps other jobs out: the newest checkpoint stays that.
    _lock = take_over(folder) if folder else None
    args, config, payload, checkpoint_path = settle(given)
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
    if args.init_from and not checkpoint_path:
        models.load_weights(model.unet, payload["ema"])
    model.text_encoder.remember(source.texts)

    # What training changes, and so what a checkpoint holds.
    state = TrainingState(model.unet, args, device, dtype)
    if checkpoint_path:
        state.restore(payload, args, source, train_images)
    payload = None   # as large as weights, moments and averages together
    state.check_ranks()

    # Samples: captions as text with pixels or, from the cache, latents.
    loader, val_loader = make_loaders(args, model, source, order, train_images, val_images)
    net = prepare_network(args, model.unet, device)

    # The run folder. A checkpoint does not say where it lies or when to pause.
    if not folder:
        folder = make_run_folder(args)
        _lock = take_over(folder)
    record = dict(config=asdict(config), train_images=len(train_images), frozen=model.frozen,
                  fingerprint=source.fingerprint, args={
                      name: value for name, value in vars(args).items()
                      if name not in ("resume", "folder", "max_steps", "time_limit")})
    counts = len(train_images), len(val_images)
    said = print_start(args, model, source, order, counts, folder, checkpoint_path, dtype)
    writer = open_run_folder(folder, record, state.step, said, args.folder) if is_main else None

    log = StepLog(writer, folder, args.batch_size, state)
    stop = StopRequest(folder / "stop", deadline, args.max_steps, state.step, args.save_minutes)
    save = partial(state.save, folder, args.keep_last, **record)
    while state.epoch < args.epochs and not stop.agreed:
        order.start_at(state.epoch, state.step_in_epoch)
        batches = iter(loader)
        bar = tqdm(total=order.steps_per_epoch, initial=state.step_in_epoch, unit="step",
                   desc=f"epoch {state.epoch + 1}/{args.epochs}", disable=not is_main,
                   mininterval=1 if sys.stderr.isatty() else 30, dynamic_ncols=True)
        while state.step_in_epoch < order.steps_per_epoch and not stop.agreed:
            # One update: Ho et al. 2020, Algorithm 1, over a global batch in micro-batches.
            lr = learning_rate(state.step, args.epochs * order.steps_per_epoch, args)
            state.optimizer.param_groups[0]["lr"] = lr
            step_loss = torch.zeros((), dtype=torch.float64, device=device)
            for micro in range(args.accumulation):
                batch = data.to_device(next(batches), device)
                # Of dropout, where the network has any.
                torch.manual_seed(order.dropout_seed(state.step, micro))
                # DDP averages gradients over ranks in the last backward pass of an update.
                net.require_backward_grad_sync = micro == args.accumulation - 1
                with torch.autocast(device.type, dtype, enabled=dtype is not None):
                    errors = diffusion_loss(net, model, batch, args.min_snr_gamma, args.snr_floor)
                # Micro-batches are of equal size: the mean of their means is the batch's mean.
                loss = errors.mean() / args.accumulation
                state.backward(loss)
                step_loss += loss.detach()
            norm = state.step_optimizer()
            state.count_update(step_loss, norm)
            update_ema(state.averages, state.weights, state.step, args.ema_decay)
            bar.update()
            if state.step % args.log_every == 0 or state.step_in_epoch == order.steps_per_epoch:
                bar.set_postfix_str(log.report(state, lr))
            stop.poll(state.step)
            if stop.save_is_due and state.step_in_epoch < order.steps_per_epoch:
                save()
                stop.note_save()
        bar.close()
        if state.step_in_epoch < order.steps_per_epoch:
            break   # asked to stop

        # Saving comes before what may fail: drawing, validation, TensorBoard.
        state.end_epoch()
        if stop.agreed or state.epoch % args.save_every == 0 or state.epoch == args.epochs:
            save()
            stop.note_save()
        finish_epoch(args, state, model, val_loader, prompts, dtype, writer, folder, stop)
        log.restart(state)
    save(is_last=True)
    if is_main:
        end_run(args, state, folder, writer, prompts[0])
    return folder


if __name__ == "__main__":
    data.run_main(main)

"""Preflight: everything that could go wrong in a week, tried in two minutes; what `train.py --preflight` does.

    torchrun --standalone --nproc_per_node=2 train.py --preflight --data flickr8k    # with the flags of the run to come
    sbatch slurm/preflight.sh --data flickr8k

It runs the loop of train.py itself, a few steps of it, and prints a pass or FAIL line for each check.
"""
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from itertools import chain, islice
from pathlib import Path

import numpy as np
import torch

from data import to_unit_range
from models import load_checkpoint
from train import StepLog, print_startup_table, train_epoch


class StepClock:
    """Takes a StopRequest's place: notes when each update ends, and stops after a few."""

    def __init__(self, device, steps=4):
        self.device, self.steps, self.ends = device, steps, []

    def poll(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        return len(self.ends) == self.steps

    def seconds_per_step(self):
        """The median, without the first step, which is slower."""
        return float(np.median(np.diff(self.ends))) if len(self.ends) > 1 else math.nan


class LatentsToCome:
    """Takes a LatentCache's place, so that steps are measured as they will be once all images are encoded."""

    def __init__(self, latent_shape):
        self.moments = np.zeros((2, *latent_shape), np.float16)

    def image(self, i, mirror):
        return self.moments


def check_machine(args, ranks):
    """Versions, devices, and how fast the ranks talk to each other."""
    cuda, smi = ranks.device.type == "cuda", shutil.which("nvidia-smi")
    driver = subprocess.run([smi, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True,
                            text=True).stdout.split() if smi else []
    yield "versions", True, (f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA build {torch.version.cuda}, "
                             f"driver {driver[0] if driver else 'none'}, diffusers {version('diffusers')}, "
                             f"transformers {version('transformers')}")
    yield "GPU", cuda or not driver or args.device == "cpu", (
        torch.cuda.get_device_name(ranks.device) if cuda else
        "there is one, but torch cannot use it: a CPU build, or one for a newer driver" if driver else "none, so the CPU")
    mine = f"{os.uname().nodename} {torch.cuda.get_device_properties(ranks.device).uuid}" if cuda else ranks.rank
    yield "one device per rank", len(set(ranks.gather(mine))) == ranks.world_size, f"{ranks.world_size} ranks"
    tensor, seconds = torch.ones(2**24, device=ranks.device), math.inf   # 64 MiB
    for _ in range(3):
        tensor.fill_(1)
        start = time.perf_counter()
        correct = ranks.sum(tensor)[-1].item() == ranks.world_size
        seconds = min(seconds, time.perf_counter() - start)
    moved = 2 * (ranks.world_size - 1) / ranks.world_size * tensor.nbytes
    yield "all-reduce", correct, f"{moved / seconds / 1e9:.2f} GB/s" if moved else "nothing to do with one rank"


def check_latents(args, model, data, ranks, images):
    """What encoding all images will take, told from some of them, uint8 (B, 3, H, W)."""
    for _ in range(2):   # the first is slower
        start = time.perf_counter()
        finite = all(moments.isfinite().all().item() for moments in model.codec.moments(to_unit_range(images)))
        seconds = (time.perf_counter() - start) / len(images)
    views = len(data.source) * (1 + args.flip)
    size, hours = views * data.loader.dataset.latents.moments.nbytes, views * seconds / ranks.world_size / 3600
    folder = Path(args.cache_latents or Path(args.data).parent).absolute()
    free = shutil.disk_usage(next(place for place in (folder, *folder.parents) if place.exists())).free
    yield "latent cache", finite and free > size, (f"{size / 2**30:.3g} GiB, {free / 2**30:.1f} GiB are free; made once, in "
                                                   f"{hours:.2f} h, unless it is there already")


def check_training(args, model, net, state, data, ranks, dtype, deadline):
    """A few real steps, a checkpoint, and what the whole run will take of time and disk."""
    start, batches = time.perf_counter(), 0
    for batches, _ in enumerate(islice(data.loader, 4), start=1):
        pass
    loading = batches / args.accumulation * args.batch_size / (time.perf_counter() - start)
    yield "data", True, f"loads {loading:.0f} images/s"

    clock = StepClock(ranks.device)
    if ranks.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    train_epoch(args, model, net, state, data, ranks, dtype, StepLog(None, ranks, args.batch_size), clock)
    seconds = clock.seconds_per_step()
    memory = ""
    if ranks.device.type == "cuda":
        memory = (f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} of "
                  f"{torch.cuda.get_device_properties(ranks.device).total_memory / 2**30:.1f} GiB")
    finite = all(p.isfinite().all() for p in model.unet.parameters())
    yield "steps", finite, f"{seconds:.3f} s at batch {args.batch_size}, {args.batch_size / seconds:.0f} images/s{memory}"

    Path(args.runs).mkdir(parents=True, exist_ok=True)
    folder = Path(ranks.gather(tempfile.mkdtemp(prefix=".preflight_", dir=args.runs) if ranks.is_main else None)[0])
    start = time.perf_counter()
    state.save(folder, ranks, config=model.config.to_dict())
    saving, start = time.perf_counter() - start, time.perf_counter()
    payload, path = load_checkpoint(folder)
    loading, size = time.perf_counter() - start, path.stat().st_size
    same = all(torch.equal(value, payload["unet"][name].to(value.device)) for name, value in model.unet.state_dict().items())
    free = shutil.disk_usage(folder).free
    ranks.gather(None)
    if ranks.is_main:
        shutil.rmtree(folder)
    yield "checkpoint", same, f"{size / 2**30:.3f} GiB, written in {saving:.1f} s, read again in {loading:.1f} s"

    saves, marked = args.epochs // args.save_every, args.epochs // args.keep_every if args.keep_every else 0
    kept = min(saves, args.keep_last + 1 + marked)
    yield "disk", free > kept * size, f"{kept} checkpoints take {kept * size / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"
    steps = args.epochs * data.batches.steps_per_epoch - state.step
    total, left = (steps * seconds + saves * saving) / 3600, (deadline - time.time()) / 3600
    limit = "no time limit is known" if left == math.inf else f"{math.ceil(total / left)} x the time limit of {left:.1f} h"
    yield "time", saving < 150, f"{steps} steps take {total:.2f} h beside validation and samples: {limit}"


def preflight(args, ranks, model, net, state, data, dtype, deadline):
    """Print a pass or FAIL line for each check. Raises: ValueError where one failed."""
    failed, checks = [], [check_machine(args, ranks)]
    if args.cache_latents is not None:
        samples = data.loader.dataset
        images = samples.__getitems__([(0, k, int(i)) for k, i in enumerate(data.train_images[:16])])["images"]
        checks.append(check_latents(args, model, data, ranks, images.to(ranks.device)))
        samples.latents = LatentsToCome(model.codec.latent_shape)
    checks.append(check_training(args, model, net, state, data, ranks, dtype, deadline))
    print_startup_table(args, model, data, ranks, "none yet", dtype)
    for name, passed, text in chain(*checks):
        passed = all(ranks.gather(passed))
        if ranks.is_main:
            print(f"{'pass' if passed else 'FAIL'}  {name}: {text}", flush=True)
        if not passed:
            failed.append(name)
    if failed:
        raise ValueError(f"--preflight: {', '.join(failed)} failed")

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

from models import load_checkpoint
from train import StepLog, train_epoch


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


def check_training(args, model, net, state, data, ranks, dtype, deadline):
    """A few real steps, a checkpoint, and what the whole run will take of time and disk."""
    start, batches = time.perf_counter(), 0
    for batches, _ in enumerate(islice(data.loader, 4), start=1):
        pass
    loading = batches / args.accumulation * args.batch_size / (time.perf_counter() - start)
    yield "data", True, f"loads {loading:.0f} images/s"

    clock = StepClock(ranks.device)
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


def preflight(args, ranks, *training):
    """Print a pass or FAIL line for each check. Raises: ValueError where one failed."""
    failed = []
    for name, passed, text in chain(check_machine(args, ranks), check_training(args, *training)):
        passed = all(ranks.gather(passed))
        if ranks.is_main:
            print(f"{'pass' if passed else 'FAIL'}  {name}: {text}", flush=True)
        if not passed:
            failed.append(name)
    if failed:
        raise ValueError(f"--preflight: {', '.join(failed)} failed")

"""Preflight: everything that could go wrong in a week, tried in two minutes.

    python slurm/preflight.py --data flickr8k          # with the flags of the train.py run to come
    torchrun --standalone --nproc_per_node=2 slurm/preflight.py --data flickr8k
    sbatch slurm/preflight.sh --data flickr8k

It calls train.main for one short epoch in a temporary folder and prints a line with pass or FAIL
for each check. The folder is removed in the end.
"""
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import models  # noqa: E402
import train  # noqa: E402

STEPS = 6   # of the short epoch, logged two by two; the first two are slower and do not count
FAILED = []


def report(name, passed, text):
    """Print a check's line; called by all ranks. The check fails where it fails on any of them."""
    passed = all(data.gather(bool(passed)))
    if dist.get_rank() == 0:
        print(f"{'pass' if passed else 'FAIL'}  {name}: {text}", flush=True)
    if not passed:
        FAILED.append(name)


def check_machine(args, device):
    """Versions, devices, and how fast the ranks talk to each other."""
    is_cuda, smi = device.type == "cuda", shutil.which("nvidia-smi")
    driver = subprocess.run([smi, "--query-gpu=driver_version", "--format=csv,noheader"], text=True,
                            capture_output=True).stdout.split() if smi else []
    report("versions", True,
           f"Python {sys.version.split()[0]}, torch {torch.__version__}, CUDA build "
           f"{torch.version.cuda}, driver {driver[0] if driver else 'none'}, diffusers "
           f"{version('diffusers')}, transformers {version('transformers')}")
    if is_cuda:
        found = torch.cuda.get_device_name(device)
    elif driver:
        found = "there is one, but torch cannot use it: a CPU build, or one for a newer driver"
    else:
        found = "none, so the CPU"
    report("GPU", is_cuda or not driver or args.device == "cpu", found)

    ranks, mine = dist.get_world_size(), dist.get_rank()
    if is_cuda:
        mine = f"{os.uname().nodename} {torch.cuda.get_device_properties(device).uuid}"
    report("one device per rank", len(set(data.gather(mine))) == ranks, f"{ranks} ranks")

    tensor, seconds = torch.ones(2**24, device=device), math.inf   # 64 MiB
    for _ in range(3):
        tensor.fill_(1)
        start = time.perf_counter()
        dist.all_reduce(tensor)
        correct = tensor[-1].item() == ranks
        seconds = min(seconds, time.perf_counter() - start)
    moved = 2 * (ranks - 1) / ranks * tensor.nbytes
    report("all-reduce", correct, f"{moved / seconds / 1e9:.2f} GB/s" if moved
           else "nothing to do with one rank")


# What takes the place of the real functions during the short epoch


class ShortOrder(data.GlobalOrder):
    """Epochs of a few steps, whatever the data."""

    def __init__(self, *args):
        super().__init__(*args)
        self.steps_per_epoch = min(self.steps_per_epoch, STEPS)


class TriedState(train.TrainingState):
    """Begins at step 0, whatever it resumes, and notes how long saving takes."""

    def restore(self, payload, *args):
        none = dict(epoch=0, step=0, step_in_epoch=0, logged_step=0, recent=[0.0] * 3)
        super().restore(payload | none, *args)

    def save(self, *args, **kwargs):
        start, is_new = time.perf_counter(), self.saved_step < self.step
        super().save(*args, **kwargs)
        if is_new:
            TriedState.seconds = time.perf_counter() - start


def blank_latents(args, model, source, workers):
    """Says what encoding all images will take, told from 16 of them, and gives blank latents, so
    that steps are measured as they will be with the cache."""
    folder = train.cache_place(args)
    load, numbers = data.image_loader(source, model.config), np.arange(len(source))
    images = torch.from_numpy(np.stack(
        [data.first_readable(load, numbers, i)[1]["image"] for i in numbers[:16]]))
    for _ in range(2):   # the first is slower
        start = time.perf_counter()
        moments = model.codec.moments(data.to_unit_range(images.to(model.device)))
        is_finite = all(part.isfinite().all().item() for part in moments)
        seconds = (time.perf_counter() - start) / len(images)
    blank = np.zeros((2, *model.codec.latent_shape), np.float16)
    views = len(source) * (1 + args.flip)
    size, hours = views * blank.nbytes, views * seconds / dist.get_world_size() / 3600
    free = shutil.disk_usage(folder).free
    report("latent cache", is_finite and free > size,
           f"{size / 2**30:.3g} GiB, {free / 2**30:.1f} GiB are free; made once, in {hours:.2f} h, "
           "unless it is there already")
    return lambda i, mirror=False: dict(moments=blank)


def timed_loader(samples, order, device, workers, make_loader=data.make_loader):
    """Says how many images the loader processes of all ranks can load, told from 16 of them."""
    if not samples.validation:
        keys = [(0, position, int(i)) for position, i in enumerate(samples.images[:16])]
        samples[keys[0]]   # the first is slower
        start = time.perf_counter()
        for key in keys:
            samples[key]
        seconds = (time.perf_counter() - start) / len(keys)
        processes = dist.get_world_size() * max(1, workers)
        report("data", True, f"about {processes / seconds:.0f} images/s can be loaded by "
                             f"{processes} processes")
    return make_loader(samples, order, device, workers)


def check_training(args, argv, device, steps_before):
    """A short epoch of the real loop, and what the whole run will take of memory, disk and time."""
    # Everything is train.py's own, but for these.
    validation_order = data.validation_order
    data.validation_order = lambda *args: validation_order(*args)[:2]
    data.GlobalOrder, data.make_loader = ShortOrder, timed_loader
    train.TrainingState, train.latent_loader = TriedState, blank_latents
    train.take_over = lambda folder: None   # NFS cannot remove a folder with an open file
    train.tolerate = lambda *_: nullcontext()   # what a run would survive fails here
    train.end_run = lambda args, state, folder, writer, prompt: writer.close()
    is_main, folder = dist.get_rank() == 0, None
    if is_main:
        Path(args.runs).mkdir(parents=True, exist_ok=True)
        folder = tempfile.mkdtemp(prefix=".preflight_", dir=args.runs)
    folder = Path(data.gather(folder)[0])
    try:   # of flags that are given twice, the last counts
        train.main([*argv, "--folder", str(folder), "--max-steps", str(STEPS), "--log-every", "2",
                    "--time-limit", "inf", "--sample-every", str(min(1, args.sample_every))])
        checks = list(what_it_left(args, folder, device, steps_before)) if is_main else None
        for check in data.gather(checks)[0]:
            report(*check)
    finally:
        if is_main:
            shutil.rmtree(folder)


def what_it_left(args, folder, device, steps_before):
    """(name, passed, text) of what the short epoch's curves and checkpoint tell."""
    start = time.perf_counter()
    payload, path = models.load_checkpoint(folder)
    reading, saving = time.perf_counter() - start, TriedState.seconds
    steps_per_epoch = payload["train_images"] // args.batch_size
    events = EventAccumulator(str(folder)).Reload()
    if "loss/epoch" not in events.Tags()["scalars"]:
        raise ValueError("preflight: stopped before the end of the short epoch")

    def logged(tag):   # the first epoch's values, also where it has fewer steps
        return [event.value for event in events.Scalars(tag)
                if event.step <= min(STEPS, steps_per_epoch)]

    speed = np.median(logged("speed/images_per_second")[-2:])
    seconds = args.batch_size / speed
    # The last alone: in float16 the first updates may be skipped, until the scale fits.
    yield "steps", math.isfinite(logged("loss/train")[-1]), (
        f"{seconds:.3f} s at batch {args.batch_size}, {speed:.0f} images/s")

    if device.type == "cuda":
        in_step, at_end = logged("speed/peak_gib")[-1], torch.cuda.max_memory_allocated() / 2**30
        total = torch.cuda.get_device_properties(device).total_memory / 2**30
        yield "memory", at_end < 0.95 * total, (
            f"peak {in_step:.1f} GiB in a step, {at_end:.1f} at an epoch's end, of {total:.1f}")

    # At its time limit a run has five minutes to save.
    is_finite = all(weight.isfinite().all() for weight in payload["unet"].values())
    size = path.stat().st_size
    yield "checkpoint", is_finite and saving < 150, (
        f"{size / 2**30:.3f} GiB, written in {saving:.1f} s, read again in {reading:.1f} s")

    saves = math.ceil(args.epochs / args.save_every)
    kept, free = args.keep_last + 1, shutil.disk_usage(folder).free
    yield "disk", free > kept * size, (f"{kept} checkpoints take {kept * size / 2**30:.1f} GiB, "
                                       f"{free / 2**30:.1f} GiB are free")

    steps = args.epochs * steps_per_epoch - steps_before
    hours = (steps * seconds + saves * saving) / 3600
    left = (train.stop_time(args.time_limit) - time.time()) / 3600
    limit = ("no time limit is known" if left == math.inf
             else f"{math.ceil(hours / left)} x the time limit of {left:.1f} h")
    yield "time", True, f"{steps} steps take {hours:.2f} h beside validation and samples: {limit}"


def main():
    """Raises: ValueError where a check failed."""
    argv = sys.argv[1:]
    args, _, payload, checkpoint = train.settle(train.parse_flags(argv))
    device = data.setup_processes(args.device)
    check_machine(args, device)
    resume = ["--resume", str(checkpoint)] if checkpoint else []
    check_training(args, argv + resume, device, payload["step"] if checkpoint else 0)
    if FAILED:
        raise ValueError(f"preflight: {', '.join(FAILED)} failed")


if __name__ == "__main__":
    data.run_main(main)

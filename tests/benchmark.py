"""Speed and memory of the real code, as ratios measured A B A B within one run; prints a table and writes JSON.

    python tests/benchmark.py [--json benchmark.json] [--only loop switches cache processes sampling evaluation]

Not a test: a shared or throttled machine changes times, and a ratio below its aim is printed, not asserted. On a GPU the
networks are those of a real run; on a CPU they are smaller, and the sections take about a quarter of an hour together.
"""
import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import unittest.mock
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import evaluate  # noqa: E402
import sample  # noqa: E402
import train  # noqa: E402
from data import StopRequest, TrainingData, amp_dtype, setup_ranks, vocabulary  # noqa: E402
from models import PRESETS, Model, apply_unet, speed_up, write_atomically  # noqa: E402
from tiny_networks import make_clip, make_vae  # noqa: E402

CUDA = torch.cuda.is_available()


def seconds(function):
    """How long a call takes, the GPU's work included."""
    start = time.perf_counter()
    function()
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternate(a, b, repeats=4):
    """Median seconds of a() and of b(), called in turn after one warm-up of each."""
    a(), b()
    times = [(seconds(a), seconds(b)) for _ in range(repeats)]
    return tuple(statistics.median(column) for column in zip(*times))


def matmul_peak(dtype):
    """TFLOP/s of a large matrix product, the yardstick for everything else."""
    n = 8192 if CUDA else 2048
    a, b = (torch.randn(n, n, device="cuda" if CUDA else "cpu", dtype=dtype) for _ in range(2))
    torch.mm(a, b)
    return 2e-12 * n**3 / min(seconds(lambda: torch.mm(a, b)) for _ in range(10))


class Networks:
    """Random networks of the real shapes (on a CPU with a smaller text encoder) and 64 captioned pictures to train on."""

    def __init__(self, folder, resolution):
        self.folder, rng = Path(folder), np.random.default_rng(0)
        captions = [f"picture number {i} of a set" for i in range(64)]
        (self.folder / "pictures").mkdir()
        for i in range(64):
            pixels = rng.integers(0, 256, (resolution // 8, resolution // 8, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((resolution, resolution)).save(self.folder / "pictures" / f"{i}.png")
        lines = [f"{i}.png,{caption}" for i, caption in enumerate(captions)]
        (self.folder / "pictures" / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
        clip = make_clip(self.folder / "clip", captions, width=512, layers=12 if CUDA else 2)
        vae = make_vae(self.folder / "vae", 0.18215, blocks=(128, 256, 512, 512), layers=2, groups=32)
        self.flags = ["--data", str(self.folder / "pictures"), "--text-encoder", clip, "--vae", vae, "--resolution",
                      str(resolution), "--val-fraction", "0", "--workers", "0"]
        self.cached = [*self.flags, "--cache-latents", str(self.folder)]


class Loop:
    """train.py's own loop, in pieces of `steps` updates, beside the bare loop on the same network and batch size."""

    def __init__(self, flags=(), steps=20):
        flags = ["--sample-every", "0", "--epochs", "100000", "--log-every", str(steps), *flags]
        self.args, config, _, _ = train.parse_args(flags)
        self.ranks, self.steps = setup_ranks(), steps
        self.dtype = amp_dtype(self.args.amp, self.ranks.device)
        torch.manual_seed(0)
        self.data = TrainingData(self.args, config, self.ranks)
        self.model = Model(config, self.ranks.device)
        if self.args.cache_latents is not None:
            self.data.cache_latents(self.args, self.model, self.ranks, write_atomically)
        self.data.make_loaders(self.args, self.model, self.ranks)
        self.unet = train.prepare_network(self.args, self.model.unet, self.ranks)
        self.state = train.TrainingState(self.unet, self.args, self.ranks.device, self.dtype)
        self.log = train.StepLog(None, self.ranks, self.args.batch_size)
        self.stop = StopRequest(self.ranks, Path("no such file"))
        self.waits, report = [], self.log.report

        def report_and_keep(*args, **kwargs):
            self.waits.append(self.log.data_seconds / (time.perf_counter() - self.log.since))
            return report(*args, **kwargs)

        self.log.report = report_and_keep
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), lr=1e-5, fused=True)
        size, shape = self.args.batch_size, self.model.codec.latent_shape
        self.images = size * steps
        self.x = torch.randn(size, *shape, device=self.ranks.device)
        self.t = torch.randint(0, 1000, (size,), device=self.ranks.device)
        self.text_emb = torch.randn(size, config.token_length, self.model.text_encoder.width, device=self.ranks.device)

    def loop(self):
        """`steps` updates by train.train_epoch: data, encoders, noise, loss, clipping, optimizer, EMA, logging."""
        self.args.max_steps = self.state.step + self.steps
        self.log.restart()
        while self.state.step < self.args.max_steps:   # epochs may be shorter
            self.state.step_in_epoch = 0
            train.train_epoch(self.args, self.model, self.unet, self.state, self.data, self.ranks, self.dtype, self.log,
                              self.stop)

    def forward_backward(self):
        with train.autocast(self.ranks.device, self.dtype):
            output = apply_unet(self.unet, self.model.config, self.x, self.t, self.text_emb)
            loss = F.mse_loss(output.float(), self.x)
        loss.backward()

    def bare(self):
        """`steps` times forward, backward and optimizer on one fixed batch."""
        for _ in range(self.steps):
            self.forward_backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

    def flops(self):
        """Of the network's forward and backward pass, for one image."""
        with FlopCounterMode(display=False) as counter:
            self.forward_backward()
        self.optimizer.zero_grad(set_to_none=True)
        return counter.get_total_flops() / len(self.x)


def loop_against_bare():
    """The default run, and the standard preset as it is meant to be used: from cached latents."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        standard = [*Networks(folder, 256).cached, "--batch-size", "64" if CUDA else "8"]
        for name, flags, steps, repeats in (("default run", [], 20, 8), ("standard preset", standard, 20 if CUDA else 2, 4)):
            test = Loop(flags, steps)
            loop, bare = alternate(test.loop, test.bare, repeats)
            rows += [(f"{name}: train.py's loop, images/s", test.images / loop, None),
                     (f"{name}: bare loop, images/s", test.images / bare, None), (f"{name}: loop / bare", bare / loop, ">= 0.97"),
                     (f"{name}: share waiting for data", statistics.median(test.waits), "< 0.03")]
    return rows


def switches():
    """Each switch off and on, the rest as it is by default."""
    peaks = {name: matmul_peak(dtype) for name, dtype in (("off", torch.float32), ("bf16", torch.bfloat16))}
    rows = [(f"matmul, {'float32' if name == 'off' else name}, TFLOP/s", peak, None) for name, peak in peaks.items()]
    with tempfile.TemporaryDirectory() as folder:
        networks = Networks(folder, 256 if CUDA else 64)
        amp = ["--amp", "bf16" if CUDA else "off"]
        pairs = [("bf16", ["--amp", "off"], ["--amp", "bf16"]), ("compile", amp, [*amp, "--compile"]),
                 ("gradient checkpointing", amp, [*amp, "--gradient-checkpointing"])]
        for preset, batch in (("standard", 64 if CUDA else 8), *([("large", 64)] if CUDA else [])):
            pairs += [("all: bf16, channels_last, compile", ["--amp", "off", "--batch-size", str(batch)],
                       ["--amp", "bf16", "--compile"])] if CUDA and preset == "standard" else []
            for name, *flags in pairs:
                tests = [Loop([*networks.cached, "--preset", preset, "--batch-size", str(batch), *more], 10) for more in flags]
                flops, memory = tests[0].flops(), []
                for test, more in zip(tests, flags):
                    if CUDA:
                        test.loop()
                        torch.cuda.reset_peak_memory_stats()
                        test.loop()
                        memory.append(torch.cuda.max_memory_allocated() / 2**30)
                times = alternate(tests[0].loop, tests[1].loop, 3)
                for state, test, more, time_ in zip(("off", "on"), tests, flags, times):
                    speed = test.images / time_
                    rows += [(f"{preset}, {name} {state}: images/s", speed, None),
                             (f"{preset}, {name} {state}: TFLOP/s", speed * flops * 1e-12, None),
                             (f"{preset}, {name} {state}: share of matmul", speed * flops * 1e-12 / peaks[more[1]], None)]
                rows += [(f"{preset}, {name}: on / off", times[0] / times[1], None)]
                rows += [(f"{preset}, {name} {s}: peak GiB", gib, None) for s, gib in zip(("off", "on"), memory)]
                del tests, test
    return rows


def cache():
    """An epoch with the standard preset and a VAE of Stable Diffusion's size, from images and from cached latents."""
    with tempfile.TemporaryDirectory() as folder:
        networks, steps = Networks(folder, 256), 8 if CUDA else 1
        rows = []
        for amp in ("off", "bf16"):   # of the UNet; the VAE stays in float32
            more = ["--amp", amp, "--batch-size", "32" if CUDA else "8"]
            start = time.perf_counter()
            cached = Loop([*networks.cached, *more], 4 * steps)   # its steps are shorter
            starting = time.perf_counter() - start
            plain = Loop([*networks.flags, *more], steps)
            without, with_ = alternate(plain.loop, cached.loop, 2)
            slow, fast = plain.images / without, cached.images / with_
            rows += [(f"--amp {amp}: images/s, encoding every image", slow, None),
                     (f"--amp {amp}: images/s, cached latents", fast, None),
                     (f"--amp {amp}: cached / uncached", fast / slow, ">= 4"),
                     ("start, building the cache of 64 images, s" if amp == "off" else "start, cache there, s", starting, None)]
        return rows


def processes(steps=20):
    """Images/s of the default run with one process of one thread and with two, from the script's own log; and what the machine
    allows: a step of half the batch on one thread, and the all-reduce of the gradients alone."""
    speeds = {1: [], 2: []}
    for _ in range(2):
        for count in speeds:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}",
                           str(ROOT / "train.py"), "--runs", folder, "--max-steps", str(3 * steps), "--log-every", str(steps),
                           "--sample-every", "0"]
                if count == 1:
                    command = ["taskset", "-c", "0", *command]
                subprocess.run(command, check=True, capture_output=True, timeout=600)
                from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
                events = EventAccumulator(str(next(Path(folder).glob("run_*"))))
                events.Reload()
                speeds[count].append(events.Scalars("speed/images_per_second")[-1].value)
    one, two = (statistics.median(speeds[count]) for count in speeds)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    whole, half = Loop([], steps), Loop(["--batch-size", "16"], steps)
    torch.set_num_threads(1)   # setup_ranks sets them
    half_seconds, whole_seconds = alternate(half.bare, whole.bare, 2)
    ratio = whole_seconds / half_seconds
    torch.set_num_threads(threads)
    return [("1 process, 1 thread, images/s", one, None), ("2 processes, images/s", two, None), ("2 / 1", two / one, ">= 1.6"),
            ("the same, were all-reduce free: a step of the whole batch / of half of it, bare", ratio, None),
            ("all-reduce of the gradients between 2 processes, s", all_reduce_seconds(), None)]


def all_reduce_seconds(elements=3_225_264):
    """Of so many float32 numbers, between two processes of one thread over gloo."""
    code = f"""
import os, statistics, time, torch, torch.distributed as dist
torch.set_num_threads(1)
dist.init_process_group("gloo")
x, times = torch.ones({elements}), []
for _ in range(30):
    start = time.perf_counter()
    dist.all_reduce(x)
    times.append(time.perf_counter() - start)
if dist.get_rank() == 0:
    print(statistics.median(times), flush=True)
os._exit(0)
"""
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(code)
        file.flush()
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", file.name]
        return float(subprocess.run(command, check=True, capture_output=True, text=True, timeout=120).stdout)


def sampling():
    """The same pictures from the same weights, sampler and steps, by sample.generate and by diffusers' pipeline."""
    from diffusers import StableDiffusionPipeline
    rows, device = [], "cuda" if CUDA else "cpu"
    with tempfile.TemporaryDirectory() as folder:
        networks = Networks(folder, 256 if CUDA else 64)
        args, config, _, _ = train.parse_args(networks.flags)
        model = Model(config, setup_ranks().device)
        model.unet.requires_grad_(False).eval()
        sample.export_pipeline(model, Path(folder) / "export")
        speed_up(model.unet, model.device)
        pipeline = StableDiffusionPipeline.from_pretrained(Path(folder) / "export").to(device)
        pipeline.set_progress_bar_config(disable=True)
        side, steps = config.resolution, 20 if CUDA else 5
        for batch in (1, 2, 4, 8, 16):
            prompts = [f"picture number {i} of a set" for i in range(batch)]
            ours, theirs = alternate(
                lambda: sample.generate(model, prompts, steps=steps, guidance_scale=3.0, batch_size=batch),
                lambda: pipeline(prompts, num_inference_steps=steps, guidance_scale=3.0, height=side, width=side), 5)
            rows += [(f"sampling, batch {batch}, images/s", batch / ours, None),
                     (f"sampling, batch {batch}: ours / diffusers' pipeline", theirs / ours, ">= 1")]
    return rows


def evaluation(num_images=128):
    """evaluate.py's loop with prompt accuracy alone: how much of its time is not the UNet's. The tiny network is untrained;
    what is judged are right drawings, which take longer to read than noise."""
    args = evaluate.parse_args(["--checkpoint", "none", "--num-images", str(num_images)])
    args.data, args.resolution, args.channels = "shapes", 32, 3
    prompts, scenes, drawings = evaluate.builtin_data(args)
    task, ranks = evaluate.Task(["accuracy"], num_images, prompts, scenes, drawings), setup_ranks()
    model = Model(replace(PRESETS["tiny"], builtin_words=vocabulary()), ranks.device)
    right = drawings.__getitems__(range(num_images))[1]
    unet_seconds = 0.0

    def timed(*inputs):
        nonlocal unet_seconds
        start = time.perf_counter()
        output = apply_unet(*inputs)
        if CUDA:
            torch.cuda.synchronize()
        unet_seconds += time.perf_counter() - start
        return output

    with unittest.mock.patch.object(sample, "apply_unet", timed):
        pictures = evaluate.generated_pictures(model, prompts, ranks, **evaluate.sampling_settings(args))
        total = seconds(lambda: evaluate.judge(task, ((indices, right[indices]) for indices, _ in pictures), "evaluation", ranks))
    return [("evaluation, images/s", num_images / total, None),
            ("share of evaluation that is not the UNet", 1 - unet_seconds / total, "< 0.10")]


SECTIONS = dict(loop=loop_against_bare, switches=switches, cache=cache, processes=processes, sampling=sampling,
                evaluation=evaluation)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=SECTIONS)
    args = parser.parse_args()
    machine = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} threads, {platform.machine()}"
    where = f"{machine}, torch {torch.__version__}, transformers {transformers.__version__}, {date.today()}"
    print(where)
    rows = []
    for name in args.only or [name for name in SECTIONS if not (CUDA and name == "processes")]:
        for row in SECTIONS[name]():
            rows.append(row)
            print(f"{row[0]:70} {row[1]:12.4g}  {row[2] or ''}", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"where": where, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

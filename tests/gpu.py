"""All that only a GPU can tell, in steps of a few minutes; tables as JSON and text.

    python tests/gpu.py all [--out runs/gpu]       # or some of the steps, by name
    python tests/gpu.py all --small                # rehearsal: tiny networks, on a CPU if need be

Each step has a process and a time limit of its own, so that one that fails or hangs costs no other;
each row of its table is on disk as soon as it is measured. Networks are made here, of the real
shapes with random weights, and nothing is downloaded.
"""
import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import redirect_stderr, redirect_stdout, suppress
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import benchmark
import data
import evaluate
import train
from benchmark import CUDA, SPAWN, alternate, bare_update, networks, now, seconds
from conftest import newest, scalars
from models import Model, build_unet
from tiny_networks import make_clip

ROOT = Path(__file__).resolve().parent.parent
BF16 = torch.bfloat16 if CUDA else None   # slow on many CPUs
LAYOUTS = torch.contiguous_format, torch.channels_last


def script(name, *flags):
    """A script of the project, run to its end, its output as text."""
    command = [sys.executable, str(ROOT / name), *map(str, flags)]
    return subprocess.run(command, text=True, capture_output=True)


def peak_gib():
    """The most memory of tensors on the GPU since the last call."""
    peak = torch.cuda.max_memory_allocated() / 2**30 if CUDA else 0.0
    if CUDA:
        torch.cuda.reset_peak_memory_stats()
    return peak


# Steps: each yields rows of (name, value, aim)


def tests(folder, args):
    """tests/test_gpu.py, several tests at a time."""
    command = [sys.executable, "-m", "pytest", "tests/test_gpu.py", "-v", "-o", "addopts=", "-n",
               "8" if CUDA else "2", "--durations", "0", "-k", args.only]
    outcome = re.compile(r"\] (PASSED|FAILED|ERROR|SKIPPED) tests/test_gpu.py::(\S+)")
    with open(args.out / "tests.log", "w", buffering=1) as log:
        run = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=log, text=True)
        for line in run.stdout:
            log.write(line)
            if found := outcome.search(line):
                yield found[2], found[1], ""


def peaks(flags):
    """GiB in a step and at the end of an epoch of train.main, which saves nothing; or the error."""
    def blank_latents(args, model, source, workers):   # building the cache takes memory of its own
        latents = np.zeros((2, *model.codec.latent_shape), np.float16)
        return lambda i, place=None, mirror=False: dict(moments=latents)

    validation_order = data.validation_order
    data.validation_order = lambda *args: validation_order(*args)[:1]
    train.latent_loader, train.TrainingState.save = blank_latents, lambda *args, **more: None
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
            run = train.main([*flags, "--epochs", "1", "--log-every", "1"])
    except Exception as error:   # out of memory, above all
        return [str(error)[:60]]
    return [max(scalars(run, tag).values()) for tag in ("memory/peak_gib", "epoch/peak_gib")]


def memory(folder, args):
    """Peak memory on one GPU, and what README.md says of it; last, how running out of it ends."""
    cached, saving = ["--cache-latents"], ["--gradient-checkpointing"]
    small = [   # preset, resolution, images a GPU, flags, README's GiB
        ("standard", 256, 64, cached, 6.3), ("standard", 128, 128, cached, 3.7),
        ("standard", 256, 64, [], ""), ("standard", 512, 32, cached, ""),
        ("standard", 1024, 8, cached, ""), ("tiny", 32, 16, [], 0.1)]
    big = [
        ("large", 256, 32, cached, ""), ("large", 256, 32, [*cached, *saving], ""),
        ("standard", 512, 32, [], ""), ("standard", 1024, 8, [], ""),
        ("large", 512, 16, [*cached, *saving], ""), ("large", 512, 16, cached, "")]
    flags, jobs = networks(folder, 256 if CUDA else 64, 290 if CUDA else 40), []
    # Four of the small and two of the big ones fit into 80 GB together; the largest comes last.
    for runs, workers in ((small, 4), (big, 2)) if CUDA else ((small[:1], 1), (big[1:2], 1)):
        pool = ProcessPoolExecutor(workers, mp_context=SPAWN, max_tasks_per_child=1)
        for preset, side, images, more, said in runs:
            own = [*([] if preset == "tiny" else flags), "--preset", preset, *more, "--resolution",
                   side if CUDA else 64, "--batch-size", images if CUDA else 4, "--runs", folder,
                   "--name", len(jobs)]   # of flags given twice the last counts
            job = pool.submit(peaks, list(map(str, own)))
            jobs.append((f"{preset}, {side} px, {images} images {' '.join(more)}", job, said))
    said_of = {job: (name, said) for name, job, said in jobs}
    for job in as_completed(said_of):
        name, said = said_of[job]
        for when, value in zip(("in a step", "at an epoch's end"), job.result()):
            yield f"{name}: GiB {when}", value, f"README: {said}" if said else ""
    if CUDA:
        done = script("train.py", *flags, "--resolution", 1024, "--batch-size", 256,
                      "--val-fraction", 0, "--runs", folder)
        (args.out / "out_of_memory.log").write_text(done.stderr)
        yield f"too large a batch: exit code {done.returncode}", done.stderr.splitlines()[-1], ""


def matmul_peak(side=8192 if CUDA else 512):
    """TFLOP/s of a large product of random matrices in bfloat16."""
    a, b = torch.randn(2, side, side, device="cuda" if CUDA else "cpu").to(torch.bfloat16)
    times = [seconds(lambda: [a @ b for _ in range(10)]) / 10 for _ in range(5)]
    return 2 * side**3 / np.median(times) / 1e12


class Variant:
    """One way to run the bare update of a preset's UNet on `images` images a step."""

    def __init__(self, unet, state, config, images, dtype=BF16, layout=LAYOUTS[0], tf32=True,
                 benchmark=False, compiled=False):
        self.unet, self.layout, self.tf32, self.benchmark = unet, layout, tf32, benchmark
        self.moments = state.optimizer.state
        net = torch.compile(unet) if compiled else unet
        self.update = bare_update(net, config, state.optimizer, images, dtype)

    def seconds(self, steps):
        """(of a step, of one step's launches), told from so many after one that does not count.
        CUDA's queue takes a thousand kernels; beyond, to launch is to wait for the GPU."""
        self.unet.to(memory_format=self.layout)
        self.moments.clear()   # AdamW wants them in the layout of the weights
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        with torch.backends.cudnn.flags(enabled=True, benchmark=self.benchmark, allow_tf32=True):
            start = now()
            self.update()
            launched, start = time.perf_counter() - start, now()
            for _ in range(steps):
                self.update()
            return (now() - start) / steps, launched


def speed_rows(preset, images, variants, peak, budget=1.0 if CUDA else 0.05):
    """Variants of a preset's update, measured in turn."""
    device = data.setup_processes()
    args, config = train.parse_args(["--data", "photos", "--preset", preset])[:2]
    unet = build_unet(config, (4, 32, 32), 768 if preset == "large" else 512).to(device)
    state = train.TrainingState(unet, args, device, BF16)
    with FlopCounterMode(display=False) as counter:
        Variant(unet, state, config, 2).update()
    tflop = counter.get_total_flops() / 2e12
    aims = {"images/s": ">= 340", "share of the matmul peak": ">= 0.4"} if preset == "large" else {}
    yield f"{preset}: GFLOP of an image's update", 1e3 * tflop, ""
    for count, names in images.items():
        tried, rounds = [], []
        for name in names:
            variant = Variant(unet, state, config, count, **variants[name])
            try:
                first = seconds(lambda: variant.seconds(1))   # compiles, chooses kernels
                tried.append((name, variant, max(1, int(budget / variant.seconds(1)[0]))))
                yield f"{preset} {count}, {name}: s of the first steps", first, ""
            except torch.cuda.OutOfMemoryError as error:
                yield f"{preset} {count}, {name}", str(error)[:60], ""
        for _ in range(3):
            rounds.append([variant.seconds(steps) for _, variant, steps in tried])
        medians = np.median(rounds, axis=0)
        for (name, *_), (time_, launch) in zip(tried, medians):
            rate = count * tflop / time_
            values = {"images/s": count / time_, "ms a step": 1e3 * time_, "TFLOP/s": rate,
                      "ms until launched": 1e3 * launch, "share of the matmul peak": rate / peak}
            for what, value in values.items():
                yield f"{preset} {count}, {name}: {what}", value, aims.get(what, "")
            if name != tried[0][0]:
                aim = ">= 4" if "compiled" in name and "float32" in tried[0][0] else ""
                yield f"{preset} {count}: {name} / {tried[0][0]}", medians[0][0] / time_, aim


VARIANTS = {"bf16": {}, "bf16, channels_last": dict(layout=LAYOUTS[1]),
            "bf16, cudnn.benchmark": dict(benchmark=True), "bf16, compiled": dict(compiled=True),
            "float32, no TF32": dict(dtype=None, tf32=False)}


def speed(folder, args):
    """Bare updates from latents of 256 px, eager. With one image a step only launches take time."""
    peak, most = matmul_peak(), list(VARIANTS)[:3]
    yield "matmul of 8192 x 8192 in bf16: TFLOP/s", peak, ""
    for preset, batches in (("standard", (64, 256, 512)), ("large", (64, 32))):
        images = {count: most if count == batches[0] else most[:2] for count in batches}
        images |= {1: most[:1]}
        yield from speed_rows(preset, images if CUDA else {2: most, 1: most[:1]}, VARIANTS, peak)
    yield from text_rows(folder)


def compiled(folder, args):
    """The same with --compile, beside eager and beside plain float32."""
    peak, (eager, _, _, compiled, plain) = matmul_peak(), VARIANTS
    yield "matmul of 8192 x 8192 in bf16: TFLOP/s", peak, ""
    plans = [("standard", 64, [plain, eager, compiled]), ("large", 64, [eager, compiled]),
             ("standard", 256, [plain, eager, compiled])]
    for preset, count, names in plans if CUDA else plans[:1]:
        torch._dynamo.reset()   # else another batch size compiles for any
        yield from speed_rows(preset, {count if CUDA else 2: names}, VARIANTS, peak)


def text_rows(folder):
    """Captions encoded in each step, and looked up."""
    for width in (512, 768) if CUDA else (64,):
        flags = networks(folder / str(width), 64, 4, width)
        model = Model(train.parse_args(flags)[1], data.setup_processes())
        captions = [f"a dog, number {i}" for i in range(64)]
        live = alternate(5, (seconds, lambda: model.text_encoder(captions)))[0]
        model.text_encoder.remember(captions)
        found = alternate(5, (seconds, lambda: model.text_encoder(captions)))[0]
        yield f"text encoder of width {width}, 64 captions: ms live, remembered", (
            f"{1e3 * live:.2f}, {1e3 * found:.2f}"), ""


def encoding(folder, args):
    """The VAE's encoder, by precision and images at a time, and building the cache."""
    device, count = data.setup_processes(), 512 if CUDA else 32
    flags = [*networks(folder, 256 if CUDA else 64, count), "--cache-latents", str(folder)]
    run, config = train.parse_args(flags)[:2]
    model = Model(config, device)
    peak_gib()
    for side, count in ((256, 64), (512, 64), (1024, 16)) if CUDA else ((64, 4),):
        images = torch.randn(count, 3, side, side, device=device)
        for name, tf32, dtype in (("float32", False, None), ("TF32", True, None),
                                  ("bfloat16", True, BF16)):
            for part in sorted({8, 16, count}):
                def encode():
                    with (torch.no_grad(), torch.autocast(device.type, dtype, enabled=bool(dtype)),
                          torch.backends.cudnn.flags(enabled=True, allow_tf32=tf32)):
                        return [model.codec.vae.encode(x) for x in images.split(part)]
                what = f"{side} px, {name}, {part} of {count} at a time"
                time_ = alternate(1, (seconds, encode))[0]
                yield f"{what}: images/s, GiB", f"{count / time_:.0f}, {peak_gib():.1f}", ""
    source = data.open_source(run.data, config.resolution)
    time_ = seconds(lambda: train.latent_loader(run, model, source, data.default_workers()))
    yield "building the cache: images/s", len(source) / time_, ""
    yield "building the cache: GiB", peak_gib(), ""


def evaluation(folder, args):
    """evaluate.py's loop, and its feature networks with TF32 off, as there, and on."""
    yield from benchmark.evaluation(folder, args, 128 if CUDA else 8)
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3 as Network
    Network.load_state_dict, weights = lambda self, state: None, folder / "weights.pth"
    torch.save({}, weights)
    inception = evaluate.Inception("2048", str(weights), data.setup_processes())
    images = torch.randint(0, 256, (64, 3, 256, 256) if CUDA else (2, 3, 64, 64),
                           dtype=torch.uint8, device=next(inception.network.parameters()).device)
    off, on = alternate(3, (seconds, partial(inception, images)),
                        (seconds, lambda: inception.network(images)))
    yield "Inception: images/s without TF32, with", (
        f"{len(images) / off:.0f}, {len(images) / on:.0f}"), ""


def whole_run(folder, name, flags):
    """train.py to the end: its time and losses."""
    start = now()
    done = script("train.py", *flags, "--folder", folder / "run",
                  *([] if CUDA else ["--max-steps", 40, "--sample-every", 0]))
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    yield f"{name}: seconds from start to end", now() - start, ""
    yield f"{name}: steps", newest(folder / "run")["step"], ""
    for tag in ("speed/images_per_second", "memory/peak_gib", "epoch/validation_loss"):
        values = list(scalars(folder / "run", tag).values())
        if values:
            both = f"{np.median(values):.4g}, {values[-1]:.4g}"
            yield f"{name}: {tag}, median and last", both, ""


def default(folder, args):
    """The default run and what it has learned, beside README.md's figures from CPUs."""
    yield from whole_run(folder, "default run", [])
    start = now()
    script("evaluate.py", "--checkpoint", folder / "run", "--guidance-scales", 2, "--num-images",
           1152 if CUDA else 8)
    yield "evaluate.py: seconds", now() - start, ""
    for path in (folder / "run").glob("evaluation_*/evaluation.json"):
        result, = json.loads(path.read_text())["results"]
        for group, said in (("trained", 96.9), ("held_out", 96.2)):
            share = 100 * result["accuracy"][group]["all"]["share"]
            yield f"{group}: % with all four right", share, f"CPU: {said}"


def emoji(folder, args):
    """The tiny preset on real pictures, with a random text encoder for their captions."""
    table = args.emoji / "metadata.csv"
    if not table.is_file():
        yield "left out", f"no {table}", ""
        return
    rows = table.read_text().splitlines()[1:]
    clip = make_clip(folder / "clip", [row.partition(",")[2] for row in rows], width=64)
    yield from whole_run(folder, "emoji", ["--data", args.emoji, "--preset", "tiny",
                                           "--text-encoder", clip])


STEPS = dict(   # in order of importance: seconds that a step may take, and what it does
    tests=(240, tests), speed=(180, speed), memory=(200, memory), compiled=(280, compiled),
    loop=(240, benchmark.loop), default=(150, default), sampling=(150, benchmark.sampling),
    encoding=(100, encoding), evaluation=(90, evaluation), emoji=(120, emoji),
    cache=(200, benchmark.cache))


def measure(name, args):
    """Run one step in this process; its table grows in args.out and on the screen."""
    machine = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} threads, tiny"
    versions = f"torch {torch.__version__}, CUDA {torch.version.cuda}"
    table, start = dict(where=machine, versions=versions, date=time.strftime("%Y-%m-%d"),
                        rows=[]), now()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        for row in STEPS[name][1](Path(folder), args):
            table["rows"].append((name, *row))
            print(line := benchmark.line_of(name, *row), flush=True)
            table["seconds"] = now() - start
            (args.out / f"{name}.json").write_text(json.dumps(table, indent=1))
            with open(args.out / f"{name}.txt", "a") as text:
                text.write(line + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("steps", nargs="+", choices=["all", *STEPS], metavar="STEP",
                        help=f"all, or of: {', '.join(STEPS)}")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu")
    parser.add_argument("--small", action="store_true", help="rehearse with tiny networks")
    parser.add_argument("--limit", type=float, help="seconds a step may take (default: its own)")
    parser.add_argument("--emoji", type=Path, default=Path("emoji"), help="a folder of pictures")
    parser.add_argument("--here", action="store_true", help="in this process, without a limit")
    parser.add_argument("--only", default="", help="the tests that pytest's -k chooses")
    parser.add_argument("--repeats", type=int, default=2, help="pieces of each kind")
    args = parser.parse_args()
    args.out, args.emoji = args.out.resolve(), args.emoji.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.here:
        return measure(args.steps[0], args)
    small = args.small or not torch.cuda.is_available()
    env = os.environ | dict(PYTHONWARNINGS="ignore", TQDM_DISABLE="1")
    ends, env = {}, env | dict(REHEARSAL="1") if small else env
    for name in STEPS if "all" in args.steps else args.steps:
        start, limit = time.monotonic(), args.limit or STEPS[name][0] * (4 if small else 1)
        (args.out / f"{name}.txt").unlink(missing_ok=True)
        own = ["--out", str(args.out), "--emoji", str(args.emoji), "--repeats", str(args.repeats),
               "--only", args.only]
        step = subprocess.Popen([sys.executable, __file__, name, "--here", *own], env=env,
                                start_new_session=True)
        try:
            ends[name] = "done" if step.wait(limit) == 0 else f"FAILED, exit code {step.returncode}"
        except subprocess.TimeoutExpired:
            ends[name] = "FAILED: over its time limit"
            for number in (signal.SIGINT, signal.SIGKILL):   # pytest ends what it has started
                with suppress(ProcessLookupError):
                    os.killpg(step.pid, number)
                    time.sleep(5)
        ends[name] += f", {time.monotonic() - start:.0f} s"
        print(f"== {name}: {ends[name]}", flush=True)
    sys.exit(any("FAILED" in end for end in ends.values()))


if __name__ == "__main__":
    main()

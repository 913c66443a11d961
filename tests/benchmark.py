"""Speed and memory of the real code, as ratios measured A B A B within one run; prints a table.

    python tests/benchmark.py [loop switches ...]   # all sections, or some: half an hour on a CPU
    python tests/benchmark.py gpu [--small]         # a quarter hour of what only a GPU can tell

Not a test: a shared or throttled machine changes times, and a figure below its aim is printed, not
asserted. Each part has a process and a time limit of its own, so that one that fails or hangs costs
no other, and each row is on disk as soon as it is measured. Networks are made here, of the real
shapes (smaller on a CPU) with random weights; nothing is downloaded. --small rehearses on a CPU,
with tiny networks, in a few minutes.
"""
import argparse
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import replace
from functools import partial
from itertools import chain, product
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from torch.distributed.elastic.utils.distributed import get_free_port
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import train
from conftest import ROOT, make_pictures
from models import PRESETS, Model, apply_unet, load_model
from sample import generate
from tiny_networks import make_clip, make_vae

CUDA, SMALL = torch.cuda.is_available(), "REHEARSAL" in os.environ
DEVICE, BF16 = ("cuda", torch.bfloat16) if CUDA else ("cpu", None)   # slow on many CPUs
COMPILER = "eager" if SMALL else "inductor"
SPAWN = multiprocessing.get_context("spawn")
torch.backends.cudnn.deterministic = False   # the tests want it, a real run does not
torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True   # as it has it
for preset in ("standard", "large") if SMALL else ():
    unet = PRESETS[preset].unet
    unet |= dict(block_out_channels=[32] * len(unet["block_out_channels"]), layers_per_block=1)


def now():
    """Seconds on a clock that is read when the GPU has done its work."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def gib():
    """The most memory of tensors on the GPU since the last call; on a CPU, all that this process
    and its loader workers hold, each page once."""
    if CUDA:
        peak = torch.cuda.max_memory_allocated() / 2**30
        torch.cuda.reset_peak_memory_stats()
        return peak
    pids = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
    text = "".join(p.read_text() for pid in pids for p in Path("/proc").glob(f"{pid}/smaps_rollup"))
    return sum(map(int, re.findall(r"\nPss: +(\d+)", text))) / 2**20


def measured(function):
    """(seconds, GiB) of a call."""
    gib()
    start = now()
    function()
    return now() - start, gib()


def alternate(*pieces, repeats=1 if SMALL else 3):
    """The median (seconds, GiB) of each piece, called in turn, after one call each as warm-up."""
    rounds = [[piece() for piece in pieces] for _ in range(1 + repeats)]
    return np.median(rounds[1:], axis=0)


# What is measured: train.main in pieces, the UNet's bare updates, scripts


def obey(pipe, steps, flags):
    """What a run's process does: train.main, which after every `steps` updates says what they took
    and waits."""
    loss, calls, since = train.diffusion_loss, 0, now()

    def diffusion_loss(*args):   # begins an update
        nonlocal calls, since
        if calls % steps == 0:
            pipe.send((now() - since, gib()))
            pipe.recv()
            since = now()
        calls += 1
        return loss(*args)

    train.diffusion_loss = diffusion_loss
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        train.main(flags)


@contextmanager
def real_run(folder, steps, *flags, ranks=1, **env):
    """run() lets train.main, in processes of its own, go on by `steps` updates, and returns rank
    0's (seconds, GiB); run.start: those of the start."""
    flags = [*"--epochs 100000 --save-every 100000 --sample-every 0 --val-fraction 0".split(),
             "--log-every", str(steps), "--folder", str(folder), *map(str, flags)]
    env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(get_free_port()),
                WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    pipes, processes = zip(*(SPAWN.Pipe() for _ in range(ranks))), []
    ours, theirs = pipes
    for rank, pipe in enumerate(theirs):
        with pipe, mock.patch.dict(os.environ, env, RANK=str(rank), LOCAL_RANK=str(rank)):
            processes.append(SPAWN.Process(target=obey, args=(pipe, steps, flags)))
            processes[-1].start()

    def run():
        for pipe in ours:
            pipe.send(None)
        return [pipe.recv() for pipe in ours][0]

    try:
        run.start = [pipe.recv() for pipe in ours][0]
        yield run
    finally:
        for process in processes:
            process.kill()


def script(name, *flags):
    """Run a script of the project to its end; returns what it printed."""
    return subprocess.run([sys.executable, str(ROOT / name), *map(str, flags)], check=True,
                          stdout=subprocess.PIPE, text=True).stdout


def float32_norms(unet):
    """Hooks that give the UNet's norms float32 inputs, as CUDA's autocast would: only here."""
    return [module.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),))
            for module in unet.modules()
            if isinstance(module, (torch.nn.GroupNorm, torch.nn.LayerNorm))]


class Bare:
    """A UNet by itself: forward, backward and optimizer step on one fixed batch."""

    def __init__(self, config):
        self.config, self.unet, self.hooks = config, Model(config, DEVICE).unet, []
        self.compiled = torch.compile(self.unet, backend=COMPILER)
        self.optimizer = torch.optim.AdamW(self.unet.parameters(), 1e-4, fused=True)

    def measure(self, images, how="eager", budget=0.05 if SMALL else 0.5):
        """(seconds, GiB) of an update, from as many as fit into the budget, in seconds, after two
        that do not count."""
        self.unet.to(memory_format=torch.channels_last if "channels_last" in how
                     else torch.contiguous_format)
        self.optimizer.state.clear()   # AdamW wants its moments in the layout of the weights
        for hook in self.hooks:
            hook.remove()
        self.hooks = float32_norms(self.unet) if "float32 norms" in how else []
        net, sizes = self.compiled if "compiled" in how else self.unet, self.unet.config
        x = torch.randn(images, sizes.in_channels, *[sizes.sample_size] * 2, device=DEVICE)
        t = torch.randint(0, 1000, (images,), device=DEVICE)
        text_emb = torch.randn(images, self.config.token_length, sizes.cross_attention_dim,
                               device=DEVICE)

        def update():
            with torch.autocast(DEVICE, BF16, enabled=CUDA):
                output = apply_unet(net, self.config, x, t, text_emb)
            (output.float() - x).square().mean().backward()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)

        update()
        count = max(1, int(budget / measured(update)[0]))
        seconds, memory = measured(lambda: [update() for _ in range(count)])
        return seconds / count, memory


def networks(folder, resolution=256 if CUDA else 64, count=64, width=512):
    """Fields of ModelConfig for networks with random weights, of the real shapes: CLIP ViT-B/32's
    text encoder (ViT-L/14's: width 768), Stable Diffusion's VAE; and the flags for them and for
    captioned pictures. On a CPU the text encoder is smaller, and no core is left for workers."""
    data = make_pictures(folder / "data", count, 1, (resolution, resolution), vary=False)
    clip = make_clip(folder / "clip", width=width, layers=12 if CUDA else 2, heads=width // 64,
                     mlp_ratio=4)
    channels, layers, groups = (8, 1, 8) if SMALL else (128, 2, 32)
    vae = make_vae(folder / "vae", 0.18215, blocks=[channels * k for k in (1, 2, 4, 4)],
                   layers=layers, groups=groups)
    flags = ["--data", data, "--text-encoder", clip, "--vae", vae, "--resolution", resolution]
    return (dict(text_encoder=clip, vae=vae, resolution=resolution),
            [*flags, *([] if CUDA else ["--workers", 0])])


# Sections: each yields rows of (name, value, aim)


def loop(folder):
    """The default run, and the standard preset as it is meant to be used: from cached latents."""
    fields, flags = networks(folder, count=1280 if CUDA else 64)
    runs = [("tiny", 32, 20, []), ("standard", 8, 2, [])]
    if CUDA:
        runs = [("standard", 64, 20, ["--compile"]), ("standard", 256, 5, []),
                ("tiny", 32, 100, []), ("large", 32, 8, [])]
    for preset, images, steps, more in runs:
        name, is_tiny = " ".join([preset, str(images), *more]), preset == "tiny"
        bare = Bare(replace(PRESETS[preset], **({} if is_tiny else fields)))
        more += ["--preset", preset, "--batch-size", images]
        more += [] if is_tiny else [*flags, "--cache-latents", folder]
        with real_run(folder / name, steps, *more) as run:
            (ours, _), (theirs, _) = alternate(run, partial(
                bare.measure, images, "compiled" if "--compile" in more else "eager"))
        yield f"{name}: images/s", images * steps / ours, ""
        yield f"{name}: images/s / the bare loop's", theirs * steps / ours, ">= 0.97"


def switches(folder):
    """The standard and large presets with each switch off and on, the rest as it is by default. Of
    --amp only the UNet knows: the VAE stays in float32. The cache of latents is made once."""
    flags, side = networks(folder, 256)[1], 256 if CUDA else 64
    off, bf16, cached = ["--amp", "off"], ["--amp", "bf16"], ["--cache-latents", folder]
    usual = [*cached, "--resolution", side, *(bf16 if CUDA else off)]
    pairs = {"bf16": ([*usual, *off], [*usual, *bf16]), "compile": (usual, [*usual, "--compile"]),
             "gradient checkpointing": (usual, [*usual, "--gradient-checkpointing"]),
             "cached latents": (off, [*off, *cached]),
             "cached latents, bf16": (bf16, [*bf16, *cached])}
    for preset, images, steps in (("standard", 64, 8), ("large", 32, 8)) if CUDA else (
            ("standard", 8, 2),):
        flags += ["--preset", preset, "--batch-size", images]   # of two the last counts
        for name, pair in pairs.items():
            with (real_run(folder / "off", steps, *flags, *pair[0]) as before,
                  real_run(folder / "on", steps, *flags, *pair[1]) as after):
                (off, on), memory = (alternate(before, after) / [images * steps, 1]).T
            name = f"{preset}, {name}"
            yield f"{name}: images/s off, on", f"{1 / off:.4g}, {1 / on:.4g}", ""
            yield f"{name}: GiB off, on", "{:.3g}, {:.3g}".format(*memory), ""
            yield f"{name}: on / off", off / on, ">= 4" if "cached" in name else ""


def processes(folder, steps=20):
    """The default run in one process of one thread and in two. A step of half the batch is what the
    machine allows if gradients are exchanged in no time."""
    torch.set_num_threads(1)
    bare, thread = Bare(PRESETS["tiny"]), dict(OMP_NUM_THREADS="1")
    with (real_run(folder / "one", steps, **thread) as one,
          real_run(folder / "two", steps, ranks=2, **thread) as two):
        alone, shared, whole, half = alternate(one, two, *(
            partial(bare.measure, images) for images in (16, 8)))[:, 0]
    yield "images/s of 1, 2", "{:.4g}, {:.4g}".format(16 * steps / alone, 16 * steps / shared), ""
    yield "2 / 1", alone / shared, ">= 1.6"
    yield "bare step of the whole batch / of half of it", whole / half, ""


def sampling(folder):
    """The same pictures from the same weights and steps, by sample.generate, eager and compiled,
    and by diffusers, whose VAE is in float32 and whose UNet in autocast, as here."""
    flags, run = networks(folder)[1], folder / "run"
    script("train.py", *flags, "--preset", "standard", "--batch-size", 8, "--max-steps", 1,
           "--folder", run)
    script("sample.py", "--checkpoint", run, "--export", folder / "pipeline")
    ours = {how: load_model(run, DEVICE) for how in ("eager", "compiled")}
    ours["compiled"].unet.compile(backend=COMPILER)
    pipeline = StableDiffusionPipeline.from_pretrained(folder / "pipeline").to(DEVICE)
    pipeline.set_progress_bar_config(disable=True)
    unet, side = pipeline.unet, ours["eager"].config.resolution
    unet.forward = torch.autocast(DEVICE, BF16, enabled=CUDA)(unet.forward)
    unet.register_forward_hook(lambda unet, inputs, output: (output[0].float(),))
    steps, batches = (20, (64, 16, 1)) if CUDA else (5, (2,) if SMALL else (1, 2, 4, 8, 16))
    for batch in batches:
        torch._dynamo.reset()   # else another batch size compiles for any
        prompts = [f"picture number {i} of a set" for i in range(batch)]
        ways = {"diffusers": partial(pipeline, prompts, side, side, num_inference_steps=steps)} | {
            how: partial(generate, model, prompts, steps=steps, dtype=BF16)
            for how, model in [*ours.items()][:2 if CUDA or SMALL else 1]}
        times = alternate(*(partial(measured, partial(way, guidance_scale=3.0))
                            for way in ways.values()))[:, 0]
        for how, time_ in zip(ways, times):
            yield f"batch {batch}, {how}: images/s", batch / time_, ""
            yield f"batch {batch}, {how} / diffusers", times[0] / time_, ">= 1"


def evaluation(folder, count=8 if SMALL else 128):
    """evaluate.py with prompt accuracy alone, from the first call of the (untrained) UNet on."""
    calls = []   # each one's start, negative, and its end

    def mark(sign, module, *_):
        if isinstance(module, UNet2DConditionModel):
            calls.append(sign * now())

    script("train.py", "--max-steps", 1, "--folder", folder / "run")
    register_module_forward_pre_hook(partial(mark, -1))
    register_module_forward_hook(partial(mark, 1))
    sys.argv[1:] = ["--checkpoint", str(folder / "run"), "--num-images", str(count)]
    evaluate.main()
    total = now() + calls[0]
    yield "images/s", count / total, ""
    yield "share of the time that is not the UNet's", 1 - sum(calls) / total, "< 0.10"


def index(folder, most=20_000 if SMALL else 1_000_000, few=5000):
    """What many captions, five a picture of a .zip, add to a run's start and memory."""
    picture, figures = make_pictures(folder, 1, 1, (16, 16), vary=False) / "Images/000.jpg", []
    for captions in (few, most):
        rows = (f"{k // 5:09d}.jpg,caption {k % 999} of {k // 999}: a dog runs over the wet grass"
                for k in range(captions))
        with zipfile.ZipFile(data := folder / f"{captions}.zip", "w") as archive:
            archive.writestr("captions.csv", "\n".join(["image,caption", *rows]))
            for i in range(captions // 5):
                archive.write(picture, f"{i:09d}.jpg")
        with real_run(folder / f"{captions}", 100, "--data", data, "--preset", "tiny",
                      "--text-encoder", "builtin", "--resolution", 16, "--workers", 1) as run:
            figures.append([*run.start, run()[1]])
    seconds, size, grown = np.subtract(*figures[::-1])
    yield "seconds more until the first update", seconds, "< 60"
    yield "bytes a caption in the process", size * 2**30 / (most - few), ""
    yield "MB more after 3,200 pictures", (grown - size) * 2**30 / 1e6, "< 20"


# The GPU's quarter hour

WAYS = ("eager, float32 norms", "eager", "compiled", "eager, channels_last",
        "compiled, channels_last")


def updates(preset, images, ways, folder):
    """Bare updates from latents of 256 px, each way beside the first. Without a number of images:
    the most that fit into the GPU's memory, told from what 32 take, and an eighth less.
    Goals on an H100: standard at 256 2,500 images/s eager and 3,500 compiled, large at 64 420 and
    590, which is 40% of the matrix product's."""
    fields, _ = networks(folder, count=2, width=768 if preset == "large" else 512)
    bare, side = Bare(replace(PRESETS[preset], **fields)), 8192 if CUDA else 512
    with FlopCounterMode(display=False) as counter:
        bare.measure(2, budget=0)   # three updates
    tflop = counter.get_total_flops() / 6e12
    a, b = torch.randn(2, side, side, device=DEVICE).to(torch.bfloat16)
    peak = 2 * side**3 / alternate(partial(measured, lambda: a @ b), repeats=20)[0, 0] / 1e12
    yield "GFLOP of an image, TFLOP/s of a matmul", f"{1e3 * tflop:.4g}, {peak:.4g}", ""
    counts = [images] if CUDA else [2]
    if CUDA and not images:
        fixed = 12 * sum(p.numel() for p in bare.unet.parameters()) / 2**30   # and two moments
        each = (bare.measure(32, *ways)[1] - fixed) / 32
        most = (0.95 * torch.cuda.mem_get_info()[1] / 2**30 - fixed) / each
        counts = [int(share * most) // 8 * 8 for share in (1, 7 / 8)]
    for images, how in product(counts, ways):
        torch._dynamo.reset()   # else another batch size compiles for any
        try:
            (first, _), (seconds, memory) = alternate(*(
                partial(bare.measure, images, way) for way in (ways[0], how)))
        except torch.OutOfMemoryError as error:
            yield f"{images} images, {how}", str(error)[:60], ""
            continue
        for what, value in {"images/s": images / seconds, "peak GiB": memory,
                            "share of the matmul": images * tflop / seconds / peak,
                            f"speed / {ways[0]}": first / seconds}.items():
            yield f"{images} images, {how}: {what}", value, ""


def tests(folder):
    """tests/test_gpu.py, several at a time: DDP over NCCL, SIGTERM, a killed rank and more."""
    run = subprocess.Popen([sys.executable, "-m", "pytest", "tests/test_gpu.py", "-v", "-oaddopts=",
                            "-n8" if CUDA else "-n2"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    for line in run.stdout:
        print(line, end="")
        if found := re.search(r"\] (\w+) tests/test_gpu.py::(\S+)", line):
            yield found[2], found[1], ""
    sys.exit(run.wait())


def default(folder):
    """The default run and what it has learned."""
    run, short = folder / "run", [] if CUDA else ["--max-steps", 40]
    for name, *flags in (("train.py", "--folder", run, *short),
                         ("evaluate.py", "--checkpoint", run, "--num-images", 1152 if CUDA else 8)):
        start = now()
        lines = script(name, *flags).splitlines()
        yield f"{name}: seconds", now() - start, ""
        yield from ((name, line, "") for line in lines if re.match(r"epoch|guidance|  \d", line))


SECTIONS = {f.__name__: f for f in (loop, switches, processes, sampling, evaluation, index)}
# In order of worth: seconds that a part may take, and what it does. Compiling takes most of them.
GPU = {f"{preset}_{images}": (limit, partial(updates, preset, images, ways))
       for preset, images, limit, ways in (
           ("standard", 256, 150, WAYS), ("large", 64, 180, WAYS), ("standard", 64, 100, WAYS[:4]),
           ("standard", 512, 120, WAYS[:4]), ("large", 32, 120, WAYS[:4]))}
GPU |= dict(tests=(180, tests), large_most=(130, partial(updates, "large", None, WAYS[2:3])),
            sampling=(100, sampling), default=(150, default))
PARTS = {name: (3600, section) for name, section in SECTIONS.items()} | GPU


def measure(name, out):
    """What a part's process does: its rows go to the screen and into the file."""
    os.setsid()
    machine = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} threads"
    title = f"{machine}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}", "", ""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, open(out, "a") as file:
        for what, value, aim in chain([title], PARTS[name][1](Path(folder))):
            value = value if isinstance(value, str) else f"{value:.4g}"
            for place in (sys.stdout, file):
                print(f"{name:12}  {what:60} {value:>10}  {aim}", file=place, flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", choices=["gpu", *PARTS])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "benchmark.txt")
    parser.add_argument("--small", action="store_true", help="rehearse on a CPU with tiny networks")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    is_gpu = "gpu" in args.parts
    names = [*GPU] if is_gpu else args.parts or [*SECTIONS]
    os.environ |= dict(PYTHONWARNINGS="ignore", TQDM_DISABLE="1")
    if args.small or is_gpu and not CUDA:
        os.environ |= dict(REHEARSAL="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    slow, ends = 4 if "REHEARSAL" in os.environ else 1, {}
    deadline = time.monotonic() + (900 * slow if is_gpu else 10**6)
    for name in names:
        start = time.monotonic()
        part = SPAWN.Process(target=measure, args=(name, args.out.resolve()))
        part.start()
        try:
            part.join(min(PARTS[name][0] * slow, deadline - start))
            ends[name] = "out of time" if part.is_alive() else f"exit code {part.exitcode}"
        finally:
            for number in (signal.SIGINT, signal.SIGKILL):   # pytest ends what it has started
                with suppress(ProcessLookupError):
                    os.killpg(part.pid, number)
                    part.join(5)
        print(f"== {name}: {ends[name]}, {time.monotonic() - start:.0f} s", flush=True)
    sys.exit(any(end != "exit code 0" for end in ends.values()))


if __name__ == "__main__":
    main()

"""Speed and memory of the real code, as ratios measured A B A B within one run; prints a table.

    python tests/benchmark.py [--json benchmark.json] [--only loop switches ...] [--repeats 4]

Not a test: a shared or throttled machine changes times, and a ratio below its aim is printed, not
asserted. On a GPU the networks are those of a real run; on a CPU they are smaller, and the sections
take about half an hour together. tests/gpu.py adds what only a GPU can show.
"""
import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
import zipfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from torch.distributed.elastic.utils.distributed import get_free_port

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import evaluate
import sample
import train
from conftest import make_pictures, scalars
from data import CaptionedImages, OnDemand, make_loader, setup_processes
from models import PRESETS, Model, apply_unet
from tiny_networks import make_clip, make_vae

SMALL = "REHEARSAL" in os.environ   # tests/gpu.py --small: everything with tiny networks
CUDA = torch.cuda.is_available() and not SMALL
if SMALL:   # in the processes that are started, too
    for preset in ("standard", "large"):
        channels = PRESETS[preset].unet["block_out_channels"]
        PRESETS[preset].unet.update(block_out_channels=[32] * len(channels))
SPAWN = multiprocessing.get_context("spawn")
torch.backends.cudnn.deterministic = False   # the tests want it, a real run does not


def now():
    """Seconds on a clock that is read when the GPU has done its work."""
    if CUDA:
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds(function):
    start = now()
    function()
    return now() - start


def alternate(repeats, *pairs):
    """The median of measure(what) for each pair, called in turn, after one call each as warm-up."""
    rounds = [[measure(what) for measure, what in pairs] for _ in range(1 + repeats)]
    return np.median(rounds[1:], axis=0).tolist()


# A real run, piece by piece


def bare_update(unet, config, optimizer, count, dtype):
    """update(): forward, backward and optimizer step on one fixed batch of `count`."""
    net, device = unet.config, unet.device
    x = torch.randn(count, net.in_channels, net.sample_size, net.sample_size, device=device)
    t = torch.randint(0, 1000, (count,), device=device)
    text_emb = torch.randn(count, config.token_length, net.cross_attention_dim, device=device)

    def update():
        with torch.autocast(device.type, dtype, enabled=dtype is not None):
            output = apply_unet(unet, config, x, t, text_emb)
        (output.float() - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return update


class State(train.TrainingState):
    """Brings the bare loop."""

    def __init__(self, unet, args, device, dtype):
        super().__init__(unet, args, device, dtype)
        config = train.make_config(args)
        Orders.update = staticmethod(
            bare_update(unet, config, self.optimizer, args.batch_size, dtype))


class Orders(train.StopRequest):
    """Makes train.main wait for orders after every `steps` updates."""

    since = now()

    def poll(self, step):
        """Answer how many seconds this piece took, then do other things until told "loop", to make
        the next piece, or "end", to end the run as it does by itself."""
        super().poll(step)
        if step % self.steps == 0:
            self.pipe.send(now() - self.since)
            while (order := self.pipe.recv()) not in ("loop", "end"):
                self.pipe.send(getattr(self, order)())
            self.agreed = order == "end"
            if CUDA:
                torch.cuda.reset_peak_memory_stats()
            self.since = now()

    def bare(self):
        """Seconds of a piece of the bare loop."""
        return seconds(lambda: [self.update() for _ in range(self.steps)])

    def peak(self):
        """GiB in the last piece."""
        return torch.cuda.max_memory_allocated() / 2**30


def obey(pipe, steps, flags):
    """What a run's process does: train.main, in pieces, until nobody gives orders any more."""
    Orders.pipe, Orders.steps = pipe, steps
    train.TrainingState, train.StopRequest = State, Orders
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        with suppress(EOFError, BrokenPipeError):
            train.main(flags)
            pipe.send(None)


@contextmanager
def real_run(folder, steps, *flags, ranks=1, **env):
    """run(order) gives a run of train.main, which has processes of its own and has warmed up, an
    order, and returns rank 0's answer."""
    flags = [*"--epochs 100000 --save-every 100000 --sample-every 0 --val-fraction 0".split(),
             "--save-minutes", "inf", "--log-every", str(steps), "--folder", str(folder),
             *map(str, flags)]
    env |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(get_free_port()),
                WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    with ExitStack() as pipes_to_close:
        pipes = []
        for rank in map(str, range(ranks)):
            ours, theirs = SPAWN.Pipe()
            pipes.append(pipes_to_close.enter_context(ours))
            with theirs, mock.patch.dict(os.environ, env, RANK=rank, LOCAL_RANK=rank):
                SPAWN.Process(target=obey, args=(theirs, steps, flags)).start()

        def run(order=None):
            for pipe in pipes if order else ():
                pipe.send(order)
            if not all(pipe.poll(1800) for pipe in pipes):
                raise TimeoutError(f"{folder}: no answer for half an hour")
            return [pipe.recv() for pipe in pipes][0]

        run()   # the answer to the first piece, which took longer
        yield run


def networks(folder, resolution, count=64, width=512):
    """Flags for captioned pictures and for networks with random weights, of the real shapes: CLIP
    ViT-B/32's text encoder (ViT-L/14's: width 768), Stable Diffusion's VAE. On a CPU the text
    encoder is smaller, and no core is left for loader workers."""
    data = make_pictures(folder / "data", count, 1, (resolution, resolution), vary=False)
    clip = make_clip(folder / "clip", width=width, layers=12 if CUDA else 2, heads=width // 64,
                     mlp_ratio=4)
    channels, layers, groups = (8, 1, 8) if SMALL else (128, 2, 32)
    vae = make_vae(folder / "vae", 0.18215, blocks=[channels * k for k in (1, 2, 4, 4)],
                   layers=layers, groups=groups)
    return ["--data", str(data), "--text-encoder", clip, "--vae", vae, "--resolution",
            str(resolution), *([] if CUDA else ["--workers", "0"])]


def compare(folder, args, name, images, steps, flags, off, on, aim=""):
    """Rows of two runs, which differ in some flags: pieces of `steps` updates of `images` each."""
    flags = [*flags, "--batch-size", images]
    with (real_run(folder / "off", steps, *flags, *off) as before,
          real_run(folder / "on", steps, *flags, *on) as after):
        times = alternate(args.repeats, (before, "loop"), (after, "loop"))
        for state, run, time_ in zip(("off", "on"), (before, after), times):
            yield f"{name} {state}: images/s", images * steps / time_, ""
            if CUDA:
                yield f"{name} {state}: peak GiB", run("peak"), ""
    yield f"{name}: on / off", times[0] / times[1], aim


# Sections: each yields rows of (name, value, aim)


def loop(folder, args):
    """The default run, and the standard preset as it is meant to be used: from cached latents."""
    cached = [*networks(folder, 256 if CUDA else 64, 1280 if CUDA else 64), "--cache-latents",
              folder]
    runs = [("default run", [], 32, 20), ("standard preset", cached, 8, 2)]
    if CUDA:
        runs = [("standard preset, compiled", [*cached, "--compile"], 64, 20),
                ("standard preset", cached, 256, 5), ("default run", [], 32, 100),
                ("large preset", [*cached, "--preset", "large"], 32, 8)]
    for name, flags, images, steps in runs:
        with real_run(folder / name, steps, *flags, "--batch-size", images) as run:
            ours, bare = alternate(args.repeats, (run, "loop"), (run, "bare"))
            for order in ("loop", "loop", "loop", "loop", "end"):   # without pauses: for the share
                run(order)
        waits = list(scalars(folder / name, "speed/data_wait_share").values())[-3:]
        yield f"{name}: train.py's loop, images/s", images * steps / ours, ""
        yield f"{name}: bare loop, images/s", images * steps / bare, ""
        yield f"{name}: loop / bare", bare / ours, ">= 0.97"
        yield f"{name}: share waiting for data", np.median(waits).item(), "< 0.03"


def switches(folder, args):
    """Each switch off and on, the rest as it is by default."""
    flags = [*networks(folder, 256 if CUDA else 64), "--cache-latents", folder]
    off, bf16 = ["--amp", "off"], ["--amp", "bf16"]
    usual = bf16 if CUDA else off
    pairs = {"bf16": (off, bf16), "compile": (usual, [*usual, "--compile"]),
             "bf16 and compile": (off, [*bf16, "--compile"]),
             "gradient checkpointing": (usual, [*usual, "--gradient-checkpointing"])}
    for preset, batch in (("standard", 64), ("large", 32)) if CUDA else (("standard", 8),):
        for name, pair in pairs.items():
            yield from compare(folder, args, f"{preset}, {name}", batch, 10,
                               [*flags, "--preset", preset], *pair)


def cache(folder, args):
    """The standard preset with a VAE of Stable Diffusion's size; the cache is made once."""
    flags, batch, steps = networks(folder, 256, 256 if CUDA else 64), *((32, 8) if CUDA else (8, 1))
    for amp in ("off", "bf16"):   # of the UNet; the VAE stays in float32
        yield from compare(folder, args, f"--amp {amp}, cached latents", batch, steps,
                           [*flags, "--amp", amp], [], ["--cache-latents", folder], ">= 4")


def processes(folder, args, steps=20):
    """The default run in one process of one thread and in two. A step of half the batch is what the
    machine allows if gradients are exchanged in no time."""
    thread = dict(OMP_NUM_THREADS="1")
    with (real_run(folder / "one", steps, **thread) as one,
          real_run(folder / "half", steps, "--batch-size", 16, **thread) as half,
          real_run(folder / "two", steps, ranks=2, **thread) as two):
        alone, shared, whole_bare, half_bare = alternate(
            args.repeats, (one, "loop"), (two, "loop"), (one, "bare"), (half, "bare"))
    yield "1 process, images/s", 32 * steps / alone, ""
    yield "2 processes, images/s", 32 * steps / shared, ""
    yield "2 / 1", alone / shared, ">= 1.6"
    yield "bare step of the whole batch / of half of it", whole_bare / half_bare, ""


def sampling(folder, args):
    """The same pictures from the same weights and steps, by sample.generate and by diffusers."""
    from diffusers import StableDiffusionPipeline
    device, steps, scale = setup_processes(), 20 if CUDA else 5, dict(guidance_scale=3.0)
    flags = networks(folder, 256 if CUDA else 64)
    cases = [("standard", batch, None) for batch in (1, 2, 4, 8, 16)]
    if CUDA:
        cases = [(preset, batch, dtype) for preset, dtype in (
            ("standard", None), ("large", torch.bfloat16), ("standard", torch.bfloat16))
            for batch in (1, 64, 16)]
    loaded = None
    for preset, batch, dtype in cases:
        if loaded != (preset, dtype):
            loaded = preset, dtype
            model = Model(train.parse_args([*flags, "--preset", preset])[1], device)
            sample.export_pipeline(model, folder / preset)
            pipeline = StableDiffusionPipeline.from_pretrained(folder / preset).to(device)
            pipeline.set_progress_bar_config(disable=True)
            # Its UNet in the same precision, and the VAE in float32, as here.
            unet, side = pipeline.unet, model.config.resolution
            unet.forward = torch.autocast(device.type, dtype, enabled=bool(dtype))(unet.forward)
            unet.register_forward_hook(lambda unet, inputs, output: (output[0].float(),))
        prompts = [f"picture number {i} of a set" for i in range(batch)]
        name = f"{preset}, {dtype or 'float32'}, batch {batch}"
        ours, theirs = alternate(
            args.repeats,
            (seconds, lambda: sample.generate(model, prompts, steps=steps, dtype=dtype, **scale)),
            (seconds, lambda: pipeline(prompts, side, side, num_inference_steps=steps, **scale)))
        yield f"{name}: images/s", batch / ours, ""
        yield f"{name}: ours / diffusers' pipeline", theirs / ours, ">= 1"
    if CUDA:
        model.unet.compile()
        fast, = alternate(args.repeats, (seconds, lambda: sample.generate(
            model, prompts, steps=steps, dtype=dtype, **scale)))
        yield f"{name}: compiled / eager", ours / fast, ""


def evaluation(folder, args, count=128):
    """evaluate.py's loop with prompt accuracy alone. The network is untrained; what is judged are
    right drawings, which take longer to read than noise."""
    device, config = setup_processes(), train.parse_args([])[1]
    model, marks = Model(config, device), []   # each call's start, negative, and its end
    model.unet.register_forward_pre_hook(lambda *_: marks.append(-now()))
    model.unet.register_forward_hook(lambda *_: marks.append(now()))
    prompts, scenes, drawings = evaluate.builtin_data(SimpleNamespace(
        num_images=count, resolution=config.resolution, channels=config.image_channels))
    right = torch.cat([images for _, images in drawings.batches(64)])
    drawn = sample.draw_share(model, prompts, range(count), batch_size=64)
    task = evaluate.Task(["accuracy"], count, prompts, scenes, drawings)
    total = seconds(lambda: evaluate.judge(
        task, ((numbers, right[numbers]) for numbers, _ in drawn), "evaluation", device))
    yield "images/s", count / total, ""
    yield "share of the time that is not the UNet's", 1 - sum(marks) / total, "< 0.10"


def private_bytes():
    """Memory that this process shares with no other."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))


def worker_growth(use, count):
    """MB that a loader's worker has for itself alone after use(0), use(1), ..."""
    def get(i):
        memory = private_bytes() if i in (0, count - 1) else 0
        use(i)
        return memory

    (before,), (*_, after) = make_loader(OnDemand(get), [[0], range(1, count)], workers=1)
    return 1e-6 * (after - before).item()


def index_figures(path, captions):
    """Rows, from a process that has done nothing else."""
    before, start = private_bytes(), now()
    source = CaptionedImages(path)
    return [("time, s", now() - start, "< 60"),
            ("bytes a caption in the process", (private_bytes() - before) / captions, ""),
            ("MB more in a worker that has read all captions",
             worker_growth(source.captions, len(source)), "< 20"),
            ("MB more in a worker that has opened the .zip",
             worker_growth(source.content, 100), "")]


def index(folder, args):
    """The index of many captions, five a picture, whose pictures are in a .zip."""
    with zipfile.ZipFile(folder / "data.zip", "w") as archive:
        rows = (f"{k // 5:09d}.jpg,caption {k}: a dog runs over the wet grass near a lake"
                for k in range(args.captions))
        archive.writestr("captions.csv", "\n".join(["image,caption", *rows]))
        for i in range(args.captions // 5):
            archive.writestr(f"{i:09d}.jpg", b"a picture")
    with ProcessPoolExecutor(1, mp_context=SPAWN) as pool:
        yield from pool.submit(index_figures, folder / "data.zip", args.captions).result(1800)


SECTIONS = dict(loop=loop, switches=switches, cache=cache, processes=processes, sampling=sampling,
                evaluation=evaluation, index=index)


def line_of(section, name, value, aim):
    """A row as text."""
    value = value if isinstance(value, str) else f"{value:.4g}"
    return f"{section:10}  {name:60} {value:>10}  {aim}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="+", choices=SECTIONS)
    parser.add_argument("--repeats", type=int, default=4, help="pieces of each kind")
    parser.add_argument("--captions", type=int, default=1_000_000, help="of the section index")
    args, rows = parser.parse_args(), []
    machine = torch.cuda.get_device_name() if CUDA else f"{torch.get_num_threads()} threads"
    where = f"{machine}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}"
    print(where)
    for name in args.only or [name for name in SECTIONS if name != "processes" or not CUDA]:
        with tempfile.TemporaryDirectory() as folder:
            for row in SECTIONS[name](Path(folder), args):
                rows.append((name, *row))
                print(line_of(*rows[-1]), flush=True)
    if args.json:
        args.json.write_text(json.dumps({"where": where, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()

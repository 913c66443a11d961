"""Shared by the tests: launching the real scripts with a time limit, small data and small networks."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"   # else importing diffusers leaves forked processes no use of the GPU
if "PYTEST_XDIST_WORKER" in os.environ:   # two that compute with all cores at once are slower than one after the other
    number, count = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[number % len(cores)::count])

import preloaded  # noqa: E402
from tiny_networks import make_clip, make_vae  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent

# A network of a few thousand parameters: the built-in pictures at 16 x 16 pixels on an 8 x 8 grid.
TINY = ["--resolution", "16", "--log-every", "1", "--sample-every", "0", "--device", "cpu"]


def pytest_collection_modifyitems(items):
    """The Slurm jobs first: they mostly wait, and would wait alone at the end."""
    items.sort(key=lambda item: "test_slurm" not in item.nodeid)


def launch(script, *args, processes=1, cwd=None, timeout=300, env=None):
    """Run a script of the project to its end; returns the finished process, its output as text."""
    command, env = [str(ROOT / script), *map(str, args)], {**os.environ, **(env or {})}
    if processes == 1:
        return preloaded.run(command, cwd, env, timeout)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return subprocess.run([*torchrun, *command], cwd=cwd, timeout=timeout, capture_output=True, text=True, env=env)


def run_ok(*args, **kwargs):
    """`launch`, and the run must succeed."""
    done = launch(*args, **kwargs)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def train_run(folder, *args, processes=1, **kwargs):
    """One training run below `folder`; returns its run folder."""
    run_ok("train.py", "--runs", folder, *args, processes=processes, cwd=folder, **kwargs)
    return max(Path(folder).glob("run_*"), key=lambda path: path.stat().st_mtime_ns)


def scalars(run, tag):
    """{step: value} of a TensorBoard scalar."""
    events = EventAccumulator(str(run))
    events.Reload()
    return {event.step: event.value for event in events.Scalars(tag)}


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A Flickr8k-like folder: 24 small pictures of different shapes, two captions each."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "Images").mkdir()
    rng, lines = np.random.default_rng(0), ["image,caption"]
    for i in range(24):
        pixels = rng.integers(0, 256, (20 + i % 5, 18 + i % 7, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "Images" / f"{i:03d}.jpg")
        lines += [f'{i:03d}.jpg,"a dog, number {i}"', f"{i:03d}.jpg,the cat {i}"]
    (folder / "captions.txt").write_text("\n".join(lines) + "\n")
    return folder

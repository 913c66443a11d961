"""Shared by the tests: launching the real scripts with a time limit, small data and small networks."""
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tiny_networks import make_clip, make_vae

ROOT = Path(__file__).resolve().parent.parent
os.environ["HF_HUB_OFFLINE"] = "1"

# A network of a few thousand parameters: the built-in pictures at 16 x 16 pixels on an 8 x 8 grid.
TINY = ["--resolution", "16", "--log-every", "1", "--sample-every", "0", "--device", "cpu"]


def launch(script, *args, processes=1, cwd=None, timeout=300, env=None):
    """Run a script of the project to its end; returns the finished process, its output as text."""
    command = [sys.executable, str(ROOT / script)]
    if processes > 1:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *command[1:]]
    return subprocess.run([*command, *map(str, args)], cwd=cwd, timeout=timeout, capture_output=True, text=True,
                          env={**os.environ, **(env or {})})


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

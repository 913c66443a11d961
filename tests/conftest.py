"""Shared by the tests: starting the real scripts with a time limit, small data, small networks."""
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"   # else forked processes cannot use a GPU
if "PYTEST_XDIST_WORKER" in os.environ:   # two that compute on all cores slow each other down
    number = int(os.environ["PYTEST_XDIST_WORKER"][2:])
    count = int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[number % len(cores)::count])

import preloaded  # noqa: E402
from data import setup_processes  # noqa: E402
from models import load_checkpoint  # noqa: E402
from tiny_networks import make_clip, make_vae  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CPU = torch.device("cpu")
# A network of a few thousand parameters: the built-in pictures at 16 x 16 on an 8 x 8 grid.
TINY = ["--resolution", "16", "--log-every", "1", "--sample-every", "0", "--device", "cpu"]


def pytest_collection_modifyitems(items):
    """The Slurm jobs first: they mostly wait, and would wait alone at the end."""
    items.sort(key=lambda item: "test_slurm" not in item.nodeid)


@pytest.fixture(scope="session", autouse=True)
def process_group():
    """The code under test always has one: here of this process alone."""
    setup_processes("cpu")


@pytest.fixture
def as_rank(monkeypatch):
    """as_rank(r, n): for functions that only ask, this process is rank r of n."""
    def pretend(rank, world_size):
        monkeypatch.setattr(dist, "get_rank", lambda: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda: world_size)
    return pretend


# Starting scripts


def command_line(script, *args, processes=1, torchrun=()):
    """The command of a script of the project, or of any other file."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
             *torchrun] if processes > 1 or torchrun else []
    return [sys.executable, *start, str(ROOT / script), *map(str, args)]


def launch(script, *args, processes=1, cwd=None, timeout=300, env=None):
    """Run a script to its end; returns the finished process, its output as text."""
    command, env = command_line(script, *args, processes=processes), {**os.environ, **(env or {})}
    if processes == 1:
        return preloaded.run(command[1:], cwd, env, timeout)
    return subprocess.run(command, cwd=cwd, env=env, timeout=timeout, text=True,
                          capture_output=True)


def run_ok(*args, **kwargs):
    """`launch`, and the run must succeed."""
    done = launch(*args, **kwargs)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done


def train_run(folder, *args, **kwargs):
    """One training run below `folder`; returns its run folder."""
    run_ok("train.py", "--runs", folder, *args, cwd=folder, **kwargs)
    return max(Path(folder).glob("run_*"), key=lambda path: path.stat().st_mtime_ns)


class Job:
    """train.py, or another script, in the background, its output in a file."""

    def __init__(self, folder, *args, script="train.py", processes=2, torchrun=(), env=None):
        self.log = Path(folder) / "log"
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(
                command_line(script, *args, processes=processes, torchrun=torchrun), cwd=folder,
                stdout=log, stderr=log, start_new_session=True,
                env={**os.environ, **(env or {}), "PYTHONPATH":
                     f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in [self.process.pid, *self.ranks()]:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait(20)

    def text(self):
        return self.log.read_text(errors="replace")

    def until(self, happened, seconds=120):
        """Wait until happened() is true, while the job runs."""
        deadline = time.monotonic() + seconds
        while not happened():
            alive = time.monotonic() < deadline and self.process.poll() is None
            assert alive, self.text()[-6000:]
            time.sleep(0.05)

    def ranks(self):
        """Process ids of torchrun's ranks, rank 0 first."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError, ValueError):
                environ = (entry / "environ").read_bytes().decode().split("\0")
                environ = dict(line.partition("=")[::2] for line in environ)
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == self.process.pid and "RANK" in environ:
                    found[int(environ["RANK"])] = int(entry.name)
        return [found[rank] for rank in sorted(found)]


# Looking at what a run left


def newest(run):
    """The payload of a run's newest checkpoint."""
    return load_checkpoint(run)[0]


def checkpoints(folder):
    return sorted(Path(folder).glob("checkpoint_*.pt"))


def errors(text):
    """The lines that tell the user what is wrong."""
    return [line for line in text.splitlines() if line.startswith("error: ")]


def scalars(run, tag):
    """{step: value} of a TensorBoard scalar; none where it is not there."""
    events = EventAccumulator(str(run)).Reload()
    if tag not in events.Tags()["scalars"]:
        return {}
    return {event.step: event.value for event in events.Scalars(tag)}


def assert_same(a, b):
    """Nested dicts, lists and tensors equal bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# Data and networks


def make_pictures(folder, count=24, captions=2, sides=(20, 18), vary=True, suffix="jpg",
                  prefix="Images/", table="captions.txt", seed=0):
    """A Flickr8k-like folder of `count` noisy pictures, 000.jpg and so on below `prefix`, with
    `captions` captions each in `table`; with `vary` of different sides. Returns the folder."""
    folder, rng = Path(folder), np.random.default_rng(seed)
    (folder / prefix).mkdir(parents=True, exist_ok=True)
    lines = ["file_name,text" if table.startswith("metadata") else "image,caption"]
    for i in range(count):
        side = (sides[0] + vary * (i % 5), sides[1] + vary * (i % 7), 3)
        pixels = rng.integers(0, 256, side, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / prefix / f"{i:03d}.{suffix}")
        texts = [f'"a dog, number {i}"', f"the cat {i}", *(f"picture {i}, {k}" for k in range(9))]
        lines += [f"{i:03d}.{suffix},{text}" for text in texts[:captions]]
    (folder / table).write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="session")
def clip(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="session")
def vae(tmp_path_factory):
    return make_vae(tmp_path_factory.mktemp("vae"))


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """24 small pictures of different shapes, two captions each."""
    return make_pictures(tmp_path_factory.mktemp("photos"))

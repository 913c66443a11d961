"""Shared by the tests: starting the real scripts with a time limit, small data, small networks."""
import os
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils._pytree import tree_flatten

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"   # else forked processes cannot use a GPU
if "PYTEST_XDIST_WORKER" in os.environ:   # two that compute on all cores slow each other down
    cores, k = sorted(os.sched_getaffinity(0)), int(os.environ["PYTEST_XDIST_WORKER"][2:])
    os.sched_setaffinity(0, cores[k % len(cores)::int(os.environ["PYTEST_XDIST_WORKER_COUNT"])])

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


def command_of(script, args, patch, folder):
    """The script, of the project or any other file, and its flags; where there are lines of Python
    to run before, `train.py` is a file in this folder that runs them and train.main."""
    if patch:
        script = Path(folder) / "patched.py"
        script.write_text(f"import os, time, torch, data, train\n{patch}\n"
                          "data.run_main(train.main)")
    return [str(ROOT / script), *map(str, args)]


def launch(script, *args, processes=1, cwd=None, timeout=600, env=None, patch=""):
    """Run a script to its end; returns the finished process, its output as text. Where one of
    several processes fails the others are ended, as by torchrun. `patch`: see command_of."""
    deadline, env = time.monotonic() + timeout, {**os.environ, **(env or {})}
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        command = command_of(script, args, patch, folder)
        ranks = preloaded.start(command, processes, cwd, env, outputs)
        while alive := [rank for rank in ranks if rank.exitcode is None]:
            is_late = time.monotonic() > deadline
            for rank in alive if is_late or any(rank.exitcode for rank in ranks) else ():
                rank.kill()
            wait([rank.sentinel for rank in alive], 1)
        texts = [path.read_text() for path in outputs]
    assert not is_late, texts
    code = next((rank.exitcode for rank in ranks if rank.exitcode), 0)
    return subprocess.CompletedProcess(command, code, *texts)


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
    """train.py, or another script, in the background, its output in a file; by torchrun, unless it
    is one process. `patch`: see command_of."""

    def __init__(self, folder, *args, script="train.py", processes=2, torchrun=(), env=None,
                 patch=""):
        self.log, command = Path(folder) / "log", command_of(script, args, patch, folder)
        env = {**os.environ, "PYTHONPATH": str(ROOT), **(env or {})}
        self.log.touch()
        if processes == 1 and not torchrun:
            self.process = preloaded.Process(command, folder, env, [self.log] * 2)
            return
        start = ["torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen([sys.executable, "-m", *start, *torchrun, *command],
                                            cwd=folder, stdout=log, stderr=log, env=env,
                                            start_new_session=True)

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
        children = Path(f"/proc/{self.process.pid}/task").glob("*/children")
        return sorted(int(pid) for file in children for pid in file.read_text().split())


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
    points = events.Scalars(tag) if tag in events.Tags()["scalars"] else []
    return {point.step: point.value for point in points}


def assert_same(a, b):
    """Nested dicts, lists and tensors equal bit for bit."""
    (ours, kinds), (theirs, others) = tree_flatten(a), tree_flatten(b)
    assert kinds == others
    for x, y in zip(ours, theirs):
        assert torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y


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
def run(tmp_path_factory):
    """A run of three updates on the built-in pictures."""
    return train_run(tmp_path_factory.mktemp("run"), *TINY, "--batch-size", 24, "--max-steps", 3)


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


@pytest.fixture(scope="session")
def flags(photos):
    """A run on them, two steps an epoch, with the built-in text encoder."""
    return [*TINY, "--data", photos, "--preset", "tiny", "--workers", 0, "--batch-size", 8,
            "--val-fraction", 0.1]

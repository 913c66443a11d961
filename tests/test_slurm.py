"""The jobs of slurm/ on a real Slurm: two nodes on this machine with made-up GPUs (see slurm_cluster.py)."""
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image

from conftest import ROOT, TINY, run_ok
from models import load_checkpoint
from slurm_cluster import SlurmCluster, environment, poll, why_not

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def flags(photos, clip):
    """8 epochs of 12 small steps, with a loader process."""
    return [*TINY, "--preset", "tiny", "--data", photos, "--text-encoder", clip, "--batch-size", "2", "--epochs", "8",
            "--val-fraction", "0", "--workers", "1"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A copy of the project, from which jobs are submitted."""
    folder = tmp_path_factory.mktemp("project")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("*.log"))
    return folder


@pytest.fixture(scope="module")
def cluster(work, tmp_path_factory):
    if why_not():
        pytest.skip(why_not())
    with SlurmCluster(tmp_path_factory.mktemp("cluster") / "slurm", cwd=work) as cluster:
        yield cluster
    assert cluster.processes() == []   # nothing is left running


@pytest.fixture
def slurm(cluster):
    """The cluster, whose jobs end with the test."""
    yield cluster
    cluster.cancel_all()


@pytest.fixture(scope="module")
def plain(cluster, work, flags):
    """The same training by torchrun alone, two processes; its run folder is work/plain."""
    run_ok("train.py", *flags, "--folder", work / "plain", processes=2, cwd=work)
    return load_checkpoint(work / "plain")[0]


def log_of(work, job):
    path = next(iter((work / "slurm").glob(f"*-{job}.log")), None)
    return path.read_text() if path else ""


def turns(work, job):
    """What the log tells of each turn of the job, from its start-up table on."""
    return log_of(work, job).split("run folder")[1:]


def first_step(text):
    """How many updates had been made where a turn began."""
    epoch, step = re.search(r"epoch (\d+)/8: .*?(\d+)/12 \[", text).groups()
    return 12 * (int(epoch) - 1) + int(step)


def wait_for_steps(slurm, work, job, turn, count=2):
    """Wait until the job's given turn (1, 2, ...) has made some steps of its own."""
    def going():
        texts = turns(work, job)
        return len(texts) >= turn and len(re.findall(r"\d+/12 \[", texts[turn - 1])) > count
    poll(going, 180, f"turn {turn} of job {job} to train")


def rank_processes(slurm, job):
    """Process ids of the training ranks of a job (not of torchrun), rank 0 first."""
    ranks = {}
    for pid in slurm.processes():
        env = dict(part.partition("=")[::2] for part in environment(pid))
        if env.get("SLURM_JOB_ID") == job and "RANK" in env and "train.py" in Path(f"/proc/{pid}/cmdline").read_text():
            ranks.setdefault(int(env["RANK"]), pid)
    return [ranks[rank] for rank in sorted(ranks)]


@contextmanager
def held(slurm, job):
    """Within the block the ranks of the job stand still, so that what is done to the job meets them at this step."""
    pids = rank_processes(slurm, job)
    assert pids
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    yield
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def final_state(work, job):
    return load_checkpoint(work / "runs" / f"job_{job}")[0]


def assert_same_bits(payload, other):
    """Step, losses of the epochs, weights and EMA are the same to the last bit."""
    assert (payload["step"], payload["epoch_losses"]) == (other["step"], other["epoch_losses"])
    for part in ("unet", "ema"):
        assert all(torch.equal(payload[part][name], other[part][name]) for name in other[part])


def test_one_node_trains_as_torchrun_does(slurm, work, plain, flags):
    """sbatch train.sh on one node with two GPUs gives torchrun's weights bit for bit, and the finished job stays finished."""
    job = slurm.submit("slurm/train.sh", *flags)
    fields = slurm.wait(job, "COMPLETED", "FAILED", seconds=240)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "0"), log_of(work, job)
    assert_same_bits(final_state(work, job), plain)


def test_two_nodes_train_as_torchrun_does(slurm, work, plain, flags):
    """The same file on two nodes with one GPU each gives torchrun's losses over two epochs."""
    job = slurm.submit("slurm/train.sh", *flags, "--max-steps", "24", options=["--nodes=2", "--gres=gpu:1"])
    fields = slurm.wait(job, "COMPLETED", "FAILED", seconds=240)
    assert fields["JobState"] == "COMPLETED", log_of(work, job)
    assert "NodeList=node[1-2]" in slurm.run("scontrol", "show", "job", job)
    assert final_state(work, job)["epoch_losses"] == pytest.approx(plain["epoch_losses"][:2], rel=1e-4)


def test_orderly_stops_lose_nothing(slurm, work, plain, flags):
    """After a SIGTERM, a requeue, a preemption and the time limit the job has gone on by itself to the same weights."""
    job = slurm.submit("slurm/train.sh", *flags, options=["--time=1"])

    def preempt():
        slurm.submit(options=["--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"])
        poll(lambda: "DUE TO PREEMPTION" in log_of(work, job), 30, "the preemption")

    stops = [lambda: slurm.run("scancel", "--signal=TERM", job), lambda: slurm.run("scontrol", "requeue", job), preempt,
             lambda: time.sleep(max(0, 55 - slurm.seconds_running(job)))]   # train.py stops after 54 of the 60 seconds
    for turn, stop in enumerate(stops, start=1):
        wait_for_steps(slurm, work, job, turn)
        with held(slurm, job):
            stop()
    fields = slurm.wait(job, "COMPLETED", "FAILED", "TIMEOUT", seconds=240, restarts=4)
    assert fields["JobState"] == "COMPLETED", log_of(work, job)
    stopped_at = [int(step) for step in re.findall(r"stopped after (\d+) steps", log_of(work, job))]
    assert len(stopped_at) == 4 and "DUE TO TIME LIMIT" not in log_of(work, job)
    assert [first_step(text) for text in turns(work, job)] == [0, *stopped_at]
    assert_same_bits(final_state(work, job), plain)


def test_violent_ends_cost_at_most_an_epoch(slurm, work, plain, flags):
    """After a killed rank and after a dead node the job goes on from its last checkpoint, and ends with the same weights."""
    job = slurm.submit("slurm/train.sh", *flags)
    run = work / "runs" / f"job_{job}"
    poll(lambda: list(run.glob("checkpoint_epoch0001*")), 180, "the first epoch's checkpoint")
    os.kill(rank_processes(slurm, job)[1], signal.SIGKILL)
    wait_for_steps(slurm, work, job, turn=2)
    assert first_step(turns(work, job)[1]) in range(12, 97, 12)   # it did not begin again, but after a whole epoch
    node = slurm.job(job)["NodeList"]
    slurm.kill_node(node)
    fields = slurm.wait(job, "COMPLETED", "FAILED", seconds=240, restarts=2)
    slurm.start_node(node)
    assert fields["JobState"] == "COMPLETED", log_of(work, job)
    assert_same_bits(final_state(work, job), plain)


def test_an_error_is_not_repeated(slurm, work, flags):
    """A job that fails before it got any further is not put back in the queue."""
    job = slurm.submit("slurm/train.sh", *flags, "--data", "no such folder", options=["--gres=gpu:1"])
    fields = slurm.wait(job, "FAILED", "COMPLETED", seconds=180)
    assert (fields["JobState"], fields["Restarts"]) == ("FAILED", "0")
    assert "error: --data no such folder: no such folder or .zip file" in log_of(work, job)


def test_stop_file_ends_the_job(slurm, work, flags):
    """A file named stop in the run folder stops the run with a checkpoint, and the job is not put back in the queue."""
    job = slurm.submit("slurm/train.sh", *flags, "--epochs", "100000", options=["--gres=gpu:1"])
    wait_for_steps(slurm, work, job, turn=1)
    (work / "runs" / f"job_{job}" / "stop").touch()
    fields = slurm.wait(job, "COMPLETED", "FAILED", seconds=180)
    assert (fields["JobState"], fields["Restarts"]) == ("COMPLETED", "0"), log_of(work, job)
    assert final_state(work, job)["step"] > 0


PROMPTS = ['a "dog", it\'s 50 % bigger; $HOME `date` *', "größer – naïve café, 犬", "-"]


def test_sample_takes_any_prompt(slurm, work, plain):
    """sample.sh hands prompts with quotes, commas and other scripts' letters to sample.py as they are, on two GPUs."""
    job = slurm.submit("slurm/sample.sh", "--checkpoint", "plain", "--steps", "2", "--device", "cpu", "--output", "pictures",
                       "--prompts", *PROMPTS, options=["--gres=gpu:2"])
    assert slurm.wait(job, "COMPLETED", "FAILED", seconds=180)["JobState"] == "COMPLETED", log_of(work, job)
    assert [Image.open(work / "pictures" / f"{i:05d}.png").text["prompt"] for i in range(3)] == PROMPTS


@pytest.mark.skipif(not (ROOT / "evaluate.py").exists(), reason="there is no evaluate.py")
def test_evaluate_judges(slurm, work, plain):
    """evaluate.sh judges a checkpoint."""
    job = slurm.submit("slurm/evaluate.sh", "--checkpoint", "plain", "--data", "shapes", "--num-images", "4", "--steps", "2",
                       "--device", "cpu", options=["--gres=gpu:1"])
    assert slurm.wait(job, "COMPLETED", "FAILED", seconds=180)["JobState"] == "COMPLETED", log_of(work, job)
    assert "held out" in log_of(work, job)


def test_preflight_passes_and_fails(slurm, work, flags):
    """preflight.sh says pass for everything that a run needs; where the disk is too small the job fails."""
    good = slurm.submit("slurm/preflight.sh", *flags)
    bad = slurm.submit("slurm/preflight.sh", *flags, "--epochs", 10**9, "--keep-every", 1, options=["--gres=gpu:1"])
    assert slurm.wait(good, "COMPLETED", "FAILED", seconds=240)["JobState"] == "COMPLETED", log_of(work, good)
    lines = dict(re.findall(r"(?:pass|FAIL)  ([\w -]+): (.*)", log_of(work, good)))
    assert list(lines) == ["versions", "GPU", "one device per rank", "all-reduce", "data", "steps", "checkpoint", "disk", "time"]
    assert "FAIL" not in log_of(work, good) and "1 x the time limit of 23.9 h" in lines["time"]
    assert slurm.wait(bad, "COMPLETED", "FAILED", seconds=240)["JobState"] == "FAILED"
    assert re.findall(r"FAIL  (\w+)", log_of(work, bad)) == ["disk"]


@pytest.mark.skipif(not shutil.which("jupyter-server"), reason="no jupyter-server here: pip install jupyter-server")
def test_jupyter_lets_its_owner_in_alone(slurm, work, tmp_path):
    """jupyter.sh answers at the printed port with the token only, and leaves neither token nor files to others."""
    job = slurm.submit("slurm/jupyter.sh", "server", "--allow-root", f"--notebook-dir={tmp_path}")
    command, links = poll(lambda: connect(slurm, job).stdout.splitlines(), 120, "Jupyter")
    port, tensorboard = (re.search(rf"-L {local}:127.0.0.1:(\d+) ", command)[1] for local in (8888, 6006))
    assert command.endswith(f"@{slurm.job(job)['NodeList']}")
    token = re.search(r"token=(\w+)", links)[1]
    assert answer(f"http://127.0.0.1:{port}/api/status", token) == 200
    assert answer(f"http://127.0.0.1:{port}/api/status", "") == answer(f"http://127.0.0.1:{port}/api/status", "guess") == 403
    assert poll(lambda: answer(f"http://127.0.0.1:{tensorboard}/data/environment"), 60, "TensorBoard") == 200
    folder = work / "slurm" / f"jupyter-{job}"
    assert folder.stat().st_mode & 0o077 == 0 and all(path.stat().st_mode & 0o077 == 0 for path in folder.iterdir())
    assert token not in log_of(work, job)
    assert listening_addresses(int(port)) == {"127.0.0.1"}

    # From the laptop: the same questions through ssh, then the tunnel. This ssh runs what it is asked here.
    (tmp_path / "ssh").write_text('#!/bin/bash\nif [[ $1 == -N ]]; then echo "tunnel: $*"; else bash -c "${*:2}"; fi\n')
    (tmp_path / "ssh").chmod(0o755)
    text = connect(slurm, job, "--login", "me@login", "--run", path=tmp_path).stdout
    assert f"tunnel: -N -o ExitOnForwardFailure=yes -J me@login -L 8888:127.0.0.1:{port}" in text and " me@node" in text

    slurm.run("scancel", job)
    poll(lambda: not folder.exists(), 60, "the connection files to be removed")
    poll(lambda: "is gone" in connect(slurm, job).stderr, 60, "the job to be gone")
    pending = slurm.submit("slurm/jupyter.sh", options=["--begin=now+1hour"])
    assert f"job {pending} is still pending" in connect(slurm, pending).stderr
    slurm.run("scancel", pending)


def connect(slurm, job, *flags, path=None):
    env = slurm.env | ({"PATH": f"{path}:{slurm.env['PATH']}"} if path else {}) | {"USER": "me"}
    return subprocess.run(["slurm/connect_jupyter.sh", *flags, job], cwd=slurm.cwd, env=env, capture_output=True, text=True,
                          timeout=30)


def answer(url, token=None):
    """The HTTP status, or None where nobody listens."""
    request = urllib.request.Request(url, headers={} if token is None else {"Authorization": f"token {token}"})
    try:
        return urllib.request.urlopen(request, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return None


def listening_addresses(port):
    """The addresses at which somebody listens to a TCP port, from the kernel's table."""
    found = set()
    for table, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            address, state = line.split()[1], line.split()[3]
            if state == "0A" and int(address.rpartition(":")[2], 16) == port:
                words = bytes.fromhex(address.rpartition(":")[0])
                found.add(socket.inet_ntop(family, b"".join(words[i:i + 4][::-1] for i in range(0, len(words), 4))))
    return found


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="no shellcheck here: apt-get install shellcheck")
def test_scripts_are_clean_and_short():
    """shellcheck has nothing to say about the scripts, and each fits on a screen."""
    scripts = sorted((ROOT / "slurm").glob("*.sh"))
    done = subprocess.run(["shellcheck", "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout
    assert all(len(script.read_text().splitlines()) <= 45 for script in scripts)

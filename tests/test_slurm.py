"""The jobs of slurm/ on a real Slurm: two nodes on this machine with made-up GPUs (see
slurm_cluster.py). And preflight.py, with and without it."""
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from datetime import datetime
from functools import partial
from http.client import HTTPConnection

import pytest
from PIL import Image

from conftest import ROOT, TINY, assert_same, checkpoints, errors, launch, newest, run_ok
from slurm_cluster import PATH, SlurmCluster, environment, poll, why_not

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def flags(photos, clip):
    """8 epochs of 12 small steps, with a loader process."""
    return [*TINY, "--preset", "tiny", "--data", photos, "--text-encoder", clip, "--epochs", "8",
            "--batch-size", "2", "--val-fraction", "0", "--workers", "1"]


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
    cluster.run("scancel", "--me")


@pytest.fixture(scope="module")
def plain(cluster, work, flags):
    """The same training by torchrun alone, two processes; its run folder is work/plain."""
    run_ok("train.py", *flags, "--folder", work / "plain", processes=2, cwd=work)
    return outcome(work / "plain")


def outcome(run):
    """What runs must agree in, to the last bit."""
    return {name: newest(run)[name] for name in ("step", "epoch_losses", "unet", "ema")}


def run_of(slurm, job):
    return slurm.cwd / "runs" / f"job_{job}"


def turns(slurm, job):
    """Of each turn of the job, how many updates had been made when its progress bar was drawn."""
    return [[12 * int(epoch) + int(step) - 12
             for epoch, step in re.findall(r"epoch (\d+)/\d+: .*?(\d+)/12 \[", text)]
            for text in slurm.log(job).split("run folder")[1:]]


def wait_for_steps(slurm, job, turn):
    """Wait until the job's given turn (1, 2, ...) has made some steps of its own."""
    poll(lambda: [turn for turn in turns(slurm, job)[turn - 1:] if len(turn) > 2], 180,
         f"turn {turn} of job {job} to train")


def ranks_of(slurm, job):
    """Process ids of a job's training ranks, the parents of loader processes; rank 0 first."""
    found = {}
    for pid in sorted(slurm.processes(), reverse=True):
        env = environment(pid)
        if env.get("SLURM_JOB_ID") == job and "RANK" in env:
            found[int(env["RANK"])] = pid
    return [found[rank] for rank in sorted(found)]


def send(pids, number):
    for pid in pids:
        os.kill(pid, number)


def in_path(folder, **programs):
    """The option with which sbatch puts these shell scripts before the programs of their names."""
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return f"--export=ALL,PATH={folder}:{PATH}"


def test_jobs_train_as_torchrun_does(slurm, plain, flags):
    """sbatch train.sh gives torchrun's weights bit for bit on one node with two GPUs, and its
    losses on two nodes with one each; finished jobs are not put back in the queue."""
    one = slurm.submit("slurm/train.sh", *flags)
    two = slurm.submit("slurm/train.sh", *flags, "--max-steps", "24",
                       options=["--nodes=2", "--gres=gpu:1"])
    slurm.finish(one, "COMPLETED")
    assert_same(outcome(run_of(slurm, one)), plain)
    slurm.finish(two, "COMPLETED")
    assert slurm.job(two)["NodeList"] == "node[1-2]"
    losses = newest(run_of(slurm, two))["epoch_losses"]
    assert losses == pytest.approx(plain["epoch_losses"][:2], rel=1e-4)


def test_orderly_stops_lose_nothing(slurm, plain, flags):
    """After SIGTERM, a requeue, a preemption and the time limit the job goes on by itself to the
    same weights."""
    job = slurm.submit("slurm/train.sh", *flags, options=["--time=1"])

    def preempt():
        slurm.preempt_all()
        poll(lambda: slurm.job(job)["PreemptTime"] != "None", 30, "the preemption")

    def let_time_pass():   # train.py stops after 54 of the 60 seconds
        minutes, seconds = slurm.job(job)["RunTime"].split(":")[-2:]
        time.sleep(max(0, 55 - 60 * int(minutes) - int(seconds)))
        slurm.run("scontrol", "update", f"JobId={job}", "TimeLimit=10")   # of the turn to come

    for turn, stop in enumerate([lambda: slurm.run("scancel", "--signal=TERM", job),
                                 lambda: slurm.run("scontrol", "requeue", job),
                                 preempt, let_time_pass], start=1):
        wait_for_steps(slurm, job, turn)
        ranks = ranks_of(slurm, job)
        send(ranks, signal.SIGSTOP)   # so that what is done to the job meets them at this step
        stop()
        send(ranks, signal.SIGCONT)
    slurm.finish(job, "COMPLETED", restarts=4)
    stopped_at = [int(step) for step in re.findall(r"stopped after (\d+) steps", slurm.log(job))]
    assert len(stopped_at) == 4
    assert [steps[0] for steps in turns(slurm, job)] == [0, *stopped_at]
    assert_same(outcome(run_of(slurm, job)), plain)


def test_violent_ends_cost_at_most_an_epoch(slurm, plain, flags):
    """After a killed rank and after a dead node the job goes on from its last checkpoint to the
    same weights."""
    job = slurm.submit("slurm/train.sh", *flags)
    poll(lambda: checkpoints(run_of(slurm, job)), 180, "the first epoch's checkpoint")
    os.kill(ranks_of(slurm, job)[1], signal.SIGKILL)
    wait_for_steps(slurm, job, turn=2)
    assert turns(slurm, job)[1][0] in range(12, 97, 12)   # after a whole epoch
    node = slurm.job(job)["NodeList"]
    slurm.kill_node(node)
    slurm.finish(job, "COMPLETED", restarts=2)
    slurm.start_node(node)
    assert_same(outcome(run_of(slurm, job)), plain)


def test_what_is_not_put_back_in_the_queue(slurm, flags):
    """Not a job that fails before it got any further, and not one that a file `stop` in the run
    folder has stopped, with a checkpoint."""
    fails, stops = (slurm.submit("slurm/train.sh", *flags, *more, options=["--gres=gpu:1"])
                    for more in (["--data", "nowhere"], ["--epochs", 10**5]))
    wait_for_steps(slurm, stops, turn=1)
    (run_of(slurm, stops) / "stop").touch()
    slurm.finish(stops, "COMPLETED")
    assert newest(run_of(slurm, stops))["step"] > 0
    slurm.finish(fails, "FAILED")
    assert "error: --data nowhere: no such folder, .zip or .tar" in slurm.log(fails)


def test_preempted_while_starting(slurm, plain, flags):
    """Jobs that are preempted before they can save anything end within the grace time, and are put
    back in the queue; an error in the turn that follows still ends a job."""
    judge = ["slurm/evaluate.sh", "--checkpoint", "plain", "--device", "cpu", "--data", "shapes"]
    jobs = [slurm.submit(*command, options=["--gres=gpu:1"]) for command in (
        ["slurm/train.sh", *flags, "--max-steps", "2"], [*judge, "--steps", "2", "--num-images", 4],
        ["slurm/sample.sh", "--checkpoint", "nowhere", "--prompts", "a dog"])]
    poll(lambda: all(map(partial(ranks_of, slurm), jobs)), 60, "all to start")
    slurm.preempt_all()
    for job, state in zip(jobs, ["COMPLETED", "COMPLETED", "FAILED"]):
        slurm.finish(job, state, restarts=1)


# What these jobs start as torchrun is a shell script.


def test_one_torchrun_a_node(slurm, tmp_path):
    """However tasks and GPUs were asked for, a node gets one torchrun with one process per GPU. It
    needs no host name where there is no other node."""
    path = in_path(tmp_path, torchrun='echo "started with $*"')
    asked = {"--ntasks-per-node=2": [2], "--ntasks=2": [2], "--ntasks=2 --gpus-per-task=1": [2],
             "--nodes=2 --gres=none --gpus=3": [1, 2],
             "--nodes=2 --gres=none --ntasks=3 --gpus-per-task=1": [1, 2]}
    jobs = [slurm.submit("slurm/train.sh", options=[path, *how.split()]) for how in asked]
    for job, expected in zip(jobs, asked.values()):
        slurm.finish(job, "COMPLETED")
        found = re.findall(r"started with .*--nproc-per-node=(\d) --local-addr=(\S+) "
                           r".*--rdzv-endpoint=([^:]+):", slurm.log(job))
        address = "127.0.0.1" if len(expected) == 1 else socket.gethostname()
        assert sorted(found) == [(str(count), address, address) for count in expected]


def test_user_signals_end_neither_script_nor_torchrun(slurm, tmp_path):
    """USR1 to the script, as from --signal=B:USR1@60, and to the processes of the run, as without
    B:, which train.py takes for a wish to stop."""
    path = in_path(tmp_path, torchrun=f"echo begun; until [[ -e {tmp_path}/go ]]; do :; done")
    job = slurm.submit("slurm/train.sh", options=[path])
    poll(lambda: "begun" in slurm.log(job), 30, "the run")
    slurm.run("scancel", "--batch", "--signal=USR1", job)
    slurm.run("scancel", "--signal=USR1", job)
    time.sleep(1)
    (tmp_path / "go").touch()
    slurm.finish(job, "COMPLETED")


def test_array_tasks_with_a_controller_that_fails(slurm, tmp_path):
    """A task of an array is put back in the queue alone, also the last, which has the array's job
    id; and one that fails to reach Slurm tries again."""
    fails = '''mkdir "$0-$1-$SLURM_JOB_ID-$SLURM_RESTART_COUNT" 2> /dev/null && exit 1
        exec {} "$@"'''   # the first call of a kind in each turn
    path = in_path(tmp_path, torchrun='''echo "ends at $SLURM_JOB_END_TIME"
        run=runs/job_$SLURM_JOB_ID
        touch "$run/checkpoint_${SLURM_RESTART_COUNT:-0}.pt"
        if ((SLURM_ARRAY_TASK_ID == 0 || SLURM_RESTART_COUNT)); then touch "$run/stop"; fi''', **{
            name: fails.format(shutil.which(name, path=PATH)) for name in ("squeue", "scontrol")})
    array = slurm.submit("slurm/train.sh", options=[path, "--array=0-1%1", "--gres=gpu:1"])
    slurm.finish(f"{array}_1", "COMPLETED", restarts=1)
    slurm.finish(f"{array}_0", "COMPLETED")
    assert slurm.job(f"{array}_1")["JobId"] == array
    for task in (0, 1):
        job = slurm.job(f"{array}_{task}")
        end = int(datetime.fromisoformat(job["StartTime"]).timestamp()) + 24 * 3600
        assert re.findall(r"ends at (.*)", slurm.log(job["JobId"]))[-1] == str(end)


def test_stop_before_the_start_and_other_folders(slurm, tmp_path):
    """A file `stop` that is made while the job waits keeps it from starting; a --folder, in which
    train.sh would not look for checkpoints, is refused."""
    path = in_path(tmp_path, torchrun="echo begun")
    waits = slurm.submit("slurm/train.sh", options=[path, "--hold"])
    run_of(slurm, waits).mkdir(parents=True)
    (run_of(slurm, waits) / "stop").touch()
    slurm.run("scontrol", "release", waits)
    refused = slurm.submit("slurm/train.sh", "--folder", "mine", options=[path])
    slurm.finish(waits, "COMPLETED")
    assert slurm.log(waits) == f"stopped by runs/job_{waits}/stop: remove it to go on\n"
    slurm.finish(refused, "FAILED")
    assert slurm.log(refused) == (f"error: --folder: the run lives in runs/job_{refused}; to go on "
                                  "from another: --resume RUN\n")


def test_without_the_environment():
    """Where common.sh has not activated the environment, one line says so."""
    done = subprocess.run(["bash", "slurm/sample.sh"], env=dict(PATH="/usr/bin:/bin", HOME="/"),
                          cwd=ROOT, timeout=30, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "error: no torchrun: activate your environment in slurm/common.sh\n"


def test_sample_and_evaluate(slurm, plain):
    """sample.sh hands prompts with quotes, commas and other scripts' letters to sample.py as they
    are, on two GPUs; evaluate.sh judges a checkpoint."""
    prompts = ['a "dog", it\'s 50 % bigger; $HOME `date` *', "größer – naïve café, 犬", "-"]
    how = ["--checkpoint", "plain", "--steps", "2", "--device", "cpu"]
    draws = slurm.submit("slurm/sample.sh", *how, "--output", "drawn", "--prompts", *prompts,
                         options=["--gres=gpu:2"])
    judges = slurm.submit("slurm/evaluate.sh", *how, "--data", "shapes", "--num-images", "4")
    slurm.finish(draws, "COMPLETED")
    pictures = sorted((slurm.cwd / "drawn").glob("0*.png"))
    assert [Image.open(picture).text["prompt"] for picture in pictures] == prompts
    slurm.finish(judges, "COMPLETED")
    assert "held out" in slurm.log(judges)


def test_jupyter_lets_its_owner_in_alone(slurm, tmp_path):
    """jupyter.sh answers on this node alone, at the printed port, with the token only, and leaves
    neither token nor files to others; connect_jupyter.sh says what state the job is in, and takes
    other ports of the laptop."""
    if not shutil.which("jupyter-server"):
        pytest.skip("no jupyter-server here: pip install jupyter-server")

    def connect(job, *flags):
        env = slurm.env | dict(PATH=f"{tmp_path}:{slurm.env['PATH']}")
        env.pop("USER", None)
        return subprocess.run(["slurm/connect_jupyter.sh", *flags, job], cwd=slurm.cwd, env=env,
                              capture_output=True, text=True, timeout=30)

    job = slurm.submit("slurm/jupyter.sh", "server", "--allow-root", f"--notebook-dir={tmp_path}")
    command, link = poll(lambda: connect(job).stdout.splitlines(), 120, "Jupyter")
    port, tensorboard = re.findall(r"-L (?:8888|6006):127.0.0.1:(\d+) ", command)
    assert command.endswith(f"@{slurm.job(job)['NodeList']}")
    token = re.search(r"token=(\w+)", link)[1]
    assert [answer(port, "/api/status", word) for word in (token, None, "no")] == [200, 403, 403]
    assert poll(lambda: answer(tensorboard, "/data/environment"), 60, "TensorBoard") == 200
    folder = slurm.cwd / "slurm" / f"jupyter-{job}"
    assert not any(path.stat().st_mode & 0o077 for path in (folder, *folder.iterdir()))
    assert token not in slurm.log(job)
    with open("/proc/net/tcp") as ipv4, open("/proc/net/tcp6") as ipv6:   # 0A: listens
        listening = re.findall(rf"\d: (\w+):{int(port):04X} \S+ 0A ", ipv4.read() + ipv6.read())
    assert listening == ["0100007F"]   # 127.0.0.1

    # From the laptop: the same questions through ssh, then the tunnel. This ssh asks here.
    (tmp_path / "ssh").write_text('#!/bin/bash\n[[ $1 == -N ]] && echo "$*" || bash -c "${*:2}"')
    (tmp_path / "ssh").chmod(0o755)
    assert re.fullmatch(
        rf"-N -o ExitOnForwardFailure=yes -J me@login -L 1234:127.0.0.1:{port} "
        rf"-L 5678:127.0.0.1:{tensorboard} me@node\d",
        connect(job, "--login", "me@login", "--run", "--port", "1234", "--tensorboard-port", "5678"
                ).stdout.splitlines()[-1])

    slurm.run("scancel", job)
    poll(lambda: not folder.exists(), 60, "the connection files to be removed")
    poll(lambda: "is gone" in connect(job).stderr, 60, "the job to be gone")
    pending = slurm.submit("slurm/jupyter.sh", options=["--begin=now+1hour"])
    assert f"job {pending} is still pending" in connect(pending).stderr


def test_jupyter_leaves_nothing(slurm, tmp_path):
    """Neither the folder, where Jupyter still writes as it ends, nor TensorBoard after a Jupyter
    that failed."""
    path = in_path(tmp_path, tensorboard="exec sleep 300", jupyter='''
        [[ $1 != bad ]] || exit 3
        trap 'end=$((SECONDS + 1))' TERM
        echo "$1 begun"
        while ((SECONDS <= ${end:-9999})); do : > "$JUPYTER_RUNTIME_DIR/$RANDOM"; done 2> /dev/null
        ''')
    good, bad = (slurm.submit("slurm/jupyter.sh", how, options=[path]) for how in ("good", "bad"))
    slurm.finish(bad, "FAILED")
    poll(lambda: "good begun" in slurm.log(good), 30, "the other")
    slurm.run("scancel", good)
    poll(lambda: slurm.job(good)["JobState"] == "CANCELLED", 30, "its end")
    time.sleep(2)
    assert not list(slurm.cwd.glob("slurm/jupyter-*/"))
    assert not [pid for pid in slurm.processes() if environment(pid).get("SLURM_JOB_ID") == bad]


def answer(port, page, token=None):
    """The HTTP status, or None where nobody listens."""
    with suppress(OSError):
        server = HTTPConnection("127.0.0.1", port, timeout=10)
        server.request("GET", page, headers={"Authorization": f"token {token}"} if token else {})
        return server.getresponse().status


CHECKS = ["versions", "GPU", "one device per rank", "all-reduce", "data", "steps", "memory",
          "checkpoint", "disk", "time"]


def checks(output):
    """{name: what it says} of preflight's checks, and the names of those that failed."""
    lines = re.findall(r"^(?:pass|FAIL)  ([\w -]+): (.*)", output, re.MULTILINE)
    return dict(lines), re.findall(r"^FAIL  ([\w -]+): ", output, re.MULTILINE)


def test_preflight_on_slurm(slurm, flags):
    """preflight.sh passes with the time limit of train.sh; where the disk is too small the job
    fails."""
    bad = slurm.submit("slurm/preflight.sh", *flags, "--epochs", 10**9, "--keep-every", 1,
                       options=["--gres=gpu:1"])
    good = slurm.submit("slurm/preflight.sh", *flags)
    slurm.finish(good, "COMPLETED")
    said, failed = checks(slurm.log(good))
    assert (list(said), failed) == (CHECKS, [])
    assert said["time"].endswith("1 x the time limit of 23.9 h")
    slurm.finish(bad, "FAILED")
    assert checks(slurm.log(bad))[1] == ["disk"]


@pytest.mark.parametrize("form", ["08:00:00", "2-00:00:00", "120", "1-12", "00:30:00", "90:00",
                                  "1-12:30"])
def test_preflight_reads_time_as_slurm_does(slurm, tmp_path, form):
    """preflight.sh counts with the --time of train.sh in all of Slurm's forms."""
    job = slurm.submit(options=["--hold", f"--time={form}", "--wrap=true"])
    days, hours, minutes = re.fullmatch(r"(?:(\d+)-)?(\d+):(\d+):00",
                                        slurm.job(job)["TimeLimit"]).groups()
    limit = 1440 * int(days or 0) + 60 * int(hours) + int(minutes)
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    script = tmp_path / "slurm" / "train.sh"
    script.write_text(re.sub(r"(?<=--time=)\S+", form, script.read_text()))
    in_path(tmp_path, srun='echo "$*"', squeue="echo 1")
    env = os.environ | dict(SLURM_JOB_ID="1", SLURM_JOB_NUM_NODES="1", PATH=f"{tmp_path}:{PATH}")
    done = subprocess.run(["bash", "slurm/preflight.sh"], cwd=tmp_path, env=env, timeout=30,
                          capture_output=True, text=True)
    given = float(re.search(r"--time-limit (\S+)", done.stdout)[1])
    assert given == max(limit - 5, 0.9 * limit), done.stderr


def test_preflight_says_what_a_cached_run_will_take(vae, flags, tmp_path):
    """Preflight of one process tells the size of the cache, and leaves neither it nor a run, but
    the empty folders where they will lie, as it has tried to write there."""
    done = run_ok("slurm/preflight.py", *flags, "--vae", vae, "--pixel-unshuffle", 1,
                  "--flip", "--cache-latents", tmp_path / "latents", cwd=tmp_path)
    said, failed = checks(done.stdout)
    assert (list(said), failed) == (CHECKS[:4] + ["latent cache"] + CHECKS[4:], [])
    size = float(re.match(r"(\S+) GiB", said["latent cache"])[1])
    assert size * 2**30 == pytest.approx(24 * 2 * 2 * 4 * 8 * 8 * 2, rel=0.01)
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "latents", tmp_path / "runs"]


def test_preflight_of_two_processes(flags, tmp_path):
    """Preflight under torchrun begins where a run stopped, whose folder stays as it is, counts the
    steps that are left, and names what failed: here weights that are not finite."""
    run_ok("train.py", *flags, "--folder", tmp_path / "run", "--max-steps", 13)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    done = launch("slurm/preflight.py", "--resume", tmp_path / "run", "--lr", "inf", processes=2,
                  cwd=tmp_path)
    said, failed = checks(done.stdout)
    assert (list(said), failed) == (CHECKS, ["steps", "checkpoint"]), done.stderr[-3000:]
    assert errors(done.stderr)[:1] == ["error: preflight: steps, checkpoint failed"]
    assert said["one device per rank"] == "2 ranks" and "GB/s" in said["all-reduce"]
    assert said["time"].startswith(f"{8 * 12 - 13} steps take ")
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_scripts_are_clean_and_short():
    """shellcheck has nothing to say about the scripts, and each fits on a screen."""
    if not shutil.which("shellcheck"):
        pytest.skip("no shellcheck here: apt-get install shellcheck")
    scripts = sorted((ROOT / "slurm").glob("*.sh"))
    done = subprocess.run(["shellcheck", "--external-sources", *scripts], cwd=ROOT, timeout=120,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert all(len(script.read_text().splitlines()) <= 55 for script in scripts)

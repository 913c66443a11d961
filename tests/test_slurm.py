"""The jobs of slurm/ on a real Slurm: two nodes on this machine with made-up GPUs (see
slurm_cluster.py)."""
import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from http.client import HTTPConnection

import pytest

from conftest import ROOT, TINY, assert_same, checkpoints, newest, run_ok
from slurm_cluster import PATH, URGENT, SlurmCluster, environment, poll, why_not

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def flags(photos, clip):
    """8 epochs of 12 small steps, with a loader process."""
    return [*TINY, "--preset", "tiny", "--data", photos, "--text-encoder", clip, "--epochs", "8",
            "--batch-size", "2", "--val-fraction", "0", "--workers", "1"]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A copy of the project, from which jobs are submitted. The site's lines find the environment,
    have an unknown name and fail; Slurm has not said when the job will end, unless $END does."""
    folder = tmp_path_factory.mktemp("project")
    for path in ROOT.glob("*.py"):
        shutil.copy(path, folder)
    shutil.copytree(ROOT / "slurm", folder / "slurm", ignore=shutil.ignore_patterns("*.log"))
    common = folder / "slurm" / "common.sh"
    site = f"PATH+=:{PATH}\nexport SLURM_JOB_END_TIME=$END\nfalse\n# <<<\n"
    common.write_text(common.read_text().replace("# <<<\n", site))
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
    poll(lambda: [turn for turn in turns(slurm, job)[turn - 1:] if len(turn) > 2], 300,
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
    """sbatch train.sh gives torchrun's weights bit for bit on one node with two GPUs, also with
    nothing of sbatch's environment, and its losses on two nodes with one each; finished jobs are
    not put back in the queue."""
    one = slurm.submit("slurm/train.sh", *flags, options=["--export=NONE"])
    two = slurm.submit("slurm/train.sh", *flags, "--max-steps", "24",
                       options=["--nodes=2", "--gres=gpu:1"])
    slurm.finish(one, "COMPLETED")
    assert_same(outcome(run_of(slurm, one)), plain)
    slurm.finish(two, "COMPLETED")
    losses = newest(run_of(slurm, two))["epoch_losses"]
    assert losses == pytest.approx(plain["epoch_losses"][:2], rel=1e-4)


def test_orderly_stops_lose_nothing(slurm, plain, flags):
    """Shortly before the time limit, after SIGUSR2, a requeue, a preemption, and where the limit is
    reached, as with a clock that is behind, the job goes on by itself to the same weights."""
    job = slurm.submit("slurm/train.sh", *flags, options=["--time=1"])
    update = "scontrol", "update", f"JobId={job}"
    stops = [   # a command, and what Slurm says of the job when it has taken effect
        ([*update, "TimeLimit=10"], lambda now: now["RunTime"] > "00:00:54"),   # for the next turns
        (["scancel", "--signal=USR2", job], bool), (["scontrol", "requeue", job], bool),
        (URGENT, lambda now: now["PreemptTime"] != "None"),
        ([*update, "EndTime=now"], lambda now: now["Reason"] == "TimeLimit")]
    for turn, (command, is_done) in enumerate(stops, start=1):
        wait_for_steps(slurm, job, turn)
        ranks = ranks_of(slurm, job)
        send(ranks, signal.SIGSTOP)   # so that what is done to the job meets them at this step
        slurm.run(*command)
        poll(lambda: is_done(slurm.job(job)), 90, f"{command}")
        send(ranks, signal.SIGCONT)
    slurm.finish(job, "COMPLETED", restarts=5)
    stopped_at = [int(step) for step in re.findall(r"stopped after (\d+) steps", slurm.log(job))]
    assert len(stopped_at) == 5 and "User defined signal" not in slurm.log(job)   # of torchrun
    assert [steps[0] for steps in turns(slurm, job)] == [0, *stopped_at]
    assert_same(outcome(run_of(slurm, job)), plain)


def test_violent_ends_cost_at_most_an_epoch(slurm, plain, flags):
    """After a killed rank the job goes on from its last checkpoint. A node that is cut off trains
    on: the next turn waits until it has ended, goes on from what it saved last, is not taken out by
    it, and comes to the same weights."""
    job = slurm.submit("slurm/train.sh", *flags)
    poll(lambda: checkpoints(run_of(slurm, job)), 300, "the first epoch's checkpoint")
    os.kill(ranks_of(slurm, job)[1], signal.SIGKILL)
    wait_for_steps(slurm, job, turn=2)
    assert turns(slurm, job)[1][0] in range(12, 97, 12)   # after a whole epoch
    ranks, node = ranks_of(slurm, job), slurm.job(job)["NodeList"]
    send(ranks, signal.SIGSTOP)   # as it would be done too soon
    saved = newest(run_of(slurm, job))["step"]
    slurm.cut_off(node)
    poll(lambda: re.search(rf"\bwait.*job_{job}\b", slurm.log(job)), 120, "the next turn to wait")
    send(ranks, signal.SIGTERM)
    send(ranks, signal.SIGCONT)
    slurm.finish(job, "COMPLETED", restarts=2)
    slurm.start_node(node)
    assert saved < turns(slurm, job)[-1][0] < 96
    assert_same(outcome(run_of(slurm, job)), plain)


def test_preempted_while_starting(slurm, plain, flags):
    """Jobs that are preempted before they can save anything end within the grace time, and are put
    back in the queue; an error in the turn that follows still ends a job."""
    judge = "slurm/run.sh evaluate.py --data shapes --num-images 4 --steps 2 --device cpu"
    fails = "slurm/run.sh sample.py --checkpoint nowhere --prompts dog"
    jobs = [slurm.submit(*command, options=["--gres=gpu:1"]) for command in (
        ["slurm/train.sh", *flags, "--max-steps", "2"], [*judge.split(), "--checkpoint", "plain"],
        fails.split())]
    poll(lambda: all(ranks_of(slurm, job) for job in jobs), 120, "all to start")
    slurm.run(*URGENT)
    for job, state in zip(jobs, ["COMPLETED", "COMPLETED", "FAILED"]):
        slurm.finish(job, state, restarts=1)


# What these jobs start as torchrun is a shell script.


def test_what_a_turn_begins_with(slurm, tmp_path):
    """One torchrun a node with one process per GPU, however tasks and GPUs were asked for, and with
    no host name where there is no other node. Flags arrive as they are. Slurm is asked when the job
    will end where that is not known or past. A --folder, in which train.sh would not look for
    checkpoints, is refused, but not a prompt with such words. A file `stop` that was made while the
    job waited, and an error before the run got any further, end the job."""
    path = in_path(tmp_path, squeue="echo 4000000001", torchrun='''
        echo "$2 $3 until $SLURM_JOB_END_TIME $(printf "<%s>" "${@:10}")"
        [[ ${10} != --wrong ]]''')
    two, asked = "--nproc-per-node=2 --local-addr=127.0.0.1", " until 4000000001"
    both = [f"--nproc-per-node={n} --local-addr={os.uname().nodename}{asked} <>" for n in (1, 2)]
    prompts = ["a --folder", '"dog", it\'s 50 % more; $HOME `date` *', "größer – café, 犬", "-"]
    given = "".join(f"<{prompt}>" for prompt in prompts)
    cases = [   # further options, arguments, the job's end, its log
        (" --ntasks-per-node=2", [], "COMPLETED", [f"{two}{asked} <>"]),
        (" --ntasks=2 --gpus-per-task=1", [], "COMPLETED", [f"{two}{asked} <>"]),
        (" --ntasks-per-gpu=1", [], "COMPLETED", [f"{two}{asked} <>"]),
        (" --nodes=2 --gres=none --gpus=3", [], "COMPLETED", both),
        (" --nodes=2 --gres=none --ntasks=3 --gpus-per-task=1", [], "COMPLETED", both),
        (",END=1", prompts, "COMPLETED", [f"{two}{asked} {given}"]),
        (",END=4000000002", [], "COMPLETED", [f"{two} until 4000000002 <>"]),
        ("", ["--wrong"], "FAILED", [f"{two}{asked} <--wrong>"]),
        ("", ["--fold", "mine"], "FAILED", ["error: --folder: the run lives in runs/job_{job}; to "
                                            "go on from another: --resume RUN"]),
        ("", [], "COMPLETED", ["stopped by runs/job_{job}/stop: remove it to go on"])]
    jobs = [slurm.submit("slurm/train.sh", *args, options=["--hold", *(path + more).split()])
            for more, args, *_ in cases]
    run_of(slurm, jobs[-1]).mkdir(parents=True)
    (run_of(slurm, jobs[-1]) / "stop").touch()
    slurm.run("scontrol", "release", *jobs)
    for job, (*_, state, said) in zip(jobs, cases):
        slurm.finish(job, state)
        lines = [line for line in slurm.log(job).splitlines() if line[:5] != "srun:"]
        assert sorted(lines) == [line.format(job=job) for line in said]


def test_what_comes_back(slurm, tmp_path):
    """Tasks of an array, each alone, also the last, which has the array's job id, and though Slurm
    does not answer at first. A job that is preempted where that cancels it without a time of grace,
    after signals to the script alone, as from --signal=B:USR1@60. Not one that a user has
    cancelled, though it saves too."""
    path = in_path(tmp_path, scontrol=f'''mkdir "$0-$1-$SLURM_JOB_ID-$SLURM_RESTART_COUNT" && exit 1
        exec {shutil.which("scontrol", path=PATH)} "$@"''', torchrun='''cd "runs/job_$SLURM_JOB_ID"
        if ((SLURM_RESTART_COUNT)); then touch stop; exit; fi
        trap 'touch checkpoint_1.pt; exit 1' TERM
        until [[ $SLURM_ARRAY_TASK_ID ]]; do echo begun; sleep 0.1; done
        touch checkpoint_1.pt''')
    array = slurm.submit("slurm/train.sh", options=[path, "--array=0-1", "--gres=gpu:1"])
    for task in (0, 1):
        slurm.finish(f"{array}_{task}", "COMPLETED", restarts=1)
    jobs = [slurm.submit("slurm/train.sh", options=[path]) for _ in range(2)]
    poll(lambda: all("begun" in slurm.log(job) for job in jobs), 60, "both to run")
    slurm.run("scancel", jobs[0])
    for name in ("USR1", "USR2", "TERM"):
        slurm.run("scancel", "--batch", "--signal", name, jobs[1])
    slurm.run("scontrol", "update", "PartitionName=gpu", "PreemptMode=CANCEL", "GraceTime=0")
    slurm.run(*URGENT)
    slurm.finish(jobs[1], "COMPLETED", restarts=1)
    slurm.run("scontrol", "update", "PartitionName=gpu", "PreemptMode=REQUEUE", "GraceTime=30")
    slurm.finish(jobs[0], "CANCELLED")
    assert all(checkpoints(run_of(slurm, job)) for job in jobs)


def test_without_the_environment():
    """Where common.sh has not activated the environment, one line says so."""
    done = subprocess.run(["bash", "slurm/run.sh"], env={"HOME": "/"}, cwd=ROOT, timeout=30,
                          capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (
        1, "error: no torchrun: activate your environment in slurm/common.sh\n")


def test_jupyter_lets_its_owner_in_alone(slurm, tmp_path):
    """jupyter.sh, also after a turn that was cut off, answers on this node alone, at the printed
    port, with the token only, and leaves neither token nor files to others; connect_jupyter.sh says
    what state the job is in, asks through ssh, and takes other ports of the laptop. Nothing is left
    when Jupyter ends, also by an error."""
    if not shutil.which("jupyter-server"):
        pytest.skip("no jupyter-server here: pip install jupyter-server")
    in_path(tmp_path, ssh='[[ $1 == -N ]] && echo "$*" || bash -c "${*:2}"')   # asks here

    def connect(*args):
        return subprocess.run(["slurm/connect_jupyter.sh", *args], cwd=slurm.cwd, timeout=30,
                              env=slurm.env | {"PATH": f"{tmp_path}:{PATH}"},
                              capture_output=True, text=True)

    job = slurm.submit("slurm/jupyter.sh", "server", "--allow-root", f"--notebook-dir={tmp_path}",
                       options=["--hold"])
    assert f"job {job} is still pending" in connect(job).stderr
    folder = slurm.cwd / "slurm" / f"jupyter-{job}"
    folder.mkdir(0o700)
    (folder / "jpserver-1.json").write_text('"port": 1,\n"token": "old"\n')
    slurm.run("scontrol", "release", job)
    command, link = poll(lambda: connect(job).stdout.splitlines(), 120, "Jupyter")
    port, board = re.findall(r":127.0.0.1:(\d+) ", command)
    token = re.search(r"token=(\w+)", link)[1]
    assert [answer(port, "/api/status", word) for word in (token, "", "no")] == [200, 403, 403]
    assert poll(lambda: answer(board, "/data/environment"), 60, "TensorBoard") == 200
    # This node's other address: nobody listens to the network.
    assert [answer(of, "/", token, "127.0.0.2") for of in (port, board)] == [None, None]
    assert not any(path.stat().st_mode & 0o077 for path in (folder, *folder.iterdir()))
    assert token not in slurm.log(job)
    flags = f"--login me@login --run --port 1234 --tensorboard-port 5678 {job}"
    assert connect(*flags.split()).stdout.endswith(
        f" -J me@login -L 1234:127.0.0.1:{port} -L 5678:127.0.0.1:{board} "
        f"me@{slurm.job(job)['NodeList']}\n")
    slurm.run("scancel", job)
    fails = slurm.submit("slurm/jupyter.sh", "nonsense")
    slurm.finish(fails, "FAILED")
    poll(lambda: "is gone" in connect(job).stderr, 60, "its end")
    assert not list(slurm.cwd.glob("slurm/jupyter-*/"))
    assert not [pid for pid in slurm.processes() if environment(pid).get("SLURM_JOB_ID") == fails]


def answer(port, page, token="", address="127.0.0.1"):
    """The HTTP status, or None where nobody listens."""
    with suppress(OSError):
        server = HTTPConnection(address, port, timeout=60)
        server.request("GET", page, headers={"Authorization": f"token {token}"})
        return server.getresponse().status


CHECKS = ["versions", "GPU", "one device per rank", "all-reduce", "latent cache", "data", "steps",
          "checkpoint", "disk", "time"]   # and "memory", of a GPU


def checks(output):
    """{name: what it says} of preflight's checks."""
    return dict(re.findall(r"^(?:pass|FAIL)  ([\w -]+): (.*)", output, re.MULTILINE))


def test_preflight(slurm, plain, flags, vae):
    """preflight.sh passes with the time limit of train.sh, and tells the size of the cache, which
    it does not make. Where a run goes on it counts the steps that are left, and names what failed:
    weights that are not finite and a full disk; the run's folder stays as it is."""
    before = {path: path.read_bytes() for path in (slurm.cwd / "plain").glob("*.*")}
    good = slurm.submit("slurm/preflight.sh", *flags, "--vae", vae, "--pixel-unshuffle", "1",
                        "--flip", "--cache-latents", "latents")
    bad = slurm.submit("slurm/preflight.sh", "--resume", "plain", "--lr", "inf", "--epochs", 10**9,
                       "--keep-last", 10**9)
    slurm.finish(good, "COMPLETED")
    said = checks(slurm.log(good))
    assert list(said) == CHECKS
    size = float(said["latent cache"].split()[0])
    assert size * 2**30 == pytest.approx(24 * 2 * 2 * 4 * 8 * 8 * 2, rel=0.01)
    assert said["time"].endswith("1 x the time limit of 23.9 h")
    slurm.finish(bad, "FAILED")
    said = checks(slurm.log(bad))
    assert said["time"].startswith(f"{(10**9 - 8) * 12} steps take ")
    failed = [name for name in said if f"FAIL  {name}" in slurm.log(bad)]
    assert failed == ["steps", "checkpoint", "disk"]
    assert {path: path.read_bytes() for path in (slurm.cwd / "plain").glob("*.*")} == before
    assert not [*slurm.cwd.glob("latents/*"), *slurm.cwd.glob("runs/.pre*")]


def test_preflight_reads_time_as_slurm_does(tmp_path):
    """preflight.sh counts with the --time of train.sh, less five minutes or a tenth, in all of
    Slurm's forms."""
    shutil.copytree(ROOT / "slurm", tmp_path / "slurm")
    in_path(tmp_path, srun='echo "${*: -3}"', squeue="echo 1", torchrun="")
    script = tmp_path / "slurm" / "train.sh"
    env = os.environ | dict(SLURM_JOB_ID="1", SLURM_JOB_NUM_NODES="1", PATH=f"{tmp_path}:{PATH}")
    for form, minutes in {"08:00:00": 475, "2-00:00:00": 2875, "120": 115, "1-12": 2155,
                          "00:30:00": 27, "90:00": 85, "1-12:30": 2185}.items():
        script.write_text(re.sub(r"(?<=--time=)\S+", form, script.read_text()))
        done = subprocess.run(["bash", "slurm/preflight.sh"], cwd=tmp_path, env=env, timeout=30,
                              capture_output=True, text=True)
        assert done.stdout == f"slurm/preflight.py --time-limit {minutes}\n", form



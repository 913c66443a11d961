"""What only a GPU can show; skipped where there is none. `python tests/gpu.py tests` runs these on
a GPU, and with --small on a CPU those that can be rehearsed there."""
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import (
    TINY,
    Job,
    assert_same,
    checkpoints,
    errors,
    launch,
    newest,
    run_ok,
    scalars,
    train_run,
)

IS_GPU, IS_REHEARSAL = torch.cuda.is_available(), "REHEARSAL" in os.environ
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (IS_GPU or IS_REHEARSAL), reason="no GPU")]
gpu_alone = pytest.mark.skipif(not IS_GPU, reason="no GPU to rehearse on")
SMALL = [*TINY, "--device", "cuda" if IS_GPU else "cpu"]   # the last of two counts
NEVER_WAITS = """
import torch
from data import run_main
from train import StopRequest, main

def poll(self, step, poll=StopRequest.poll):
    # The first updates choose kernels and take memory; after the last the run is saved.
    torch.cuda.set_sync_debug_mode("error" if 3 <= step < 9 else "default")
    poll(self, step)

StopRequest.poll = poll
run_main(main)
"""


# Two processes on one GPU, which NCCL refuses; gloo takes GPU tensors too.
ON_ONE_GPU = """
import os
import torch.distributed as dist
os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
join = dist.init_process_group
dist.init_process_group = lambda backend, **how: join("gloo", **how)
from data import run_main
from train import main
run_main(main)
"""
# One process in DDP over NCCL, as several would be.
DDP_ALONE = """
import torch
import train
from data import run_main

def prepare(args, unet, device, prepare_network=train.prepare_network):
    return torch.nn.parallel.DistributedDataParallel(
        prepare_network(args, unet, device), [device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True)

train.prepare_network = prepare
run_main(train.main)
"""
LITTLE_MEMORY = """
import torch
from data import run_main
from train import main
torch.cuda.set_per_process_memory_fraction(0.001)
run_main(main)
"""


@gpu_alone
@pytest.mark.parametrize("amp", ["off", "fp16", "bf16"])
def test_a_step_never_waits_for_the_gpu(tmp_path, amp):
    """Between two log points nothing in the loop synchronises, or PyTorch would raise an error."""
    (tmp_path / "script.py").write_text(NEVER_WAITS)
    run_ok(tmp_path / "script.py", *SMALL, "--log-every", 1000, "--amp", amp, "--max-steps", 10,
           "--folder", tmp_path / "run")
    assert newest(tmp_path / "run")["step"] == 10


@pytest.mark.parametrize("flags", [["off"], ["fp16"], ["bf16", "--compile"]])
def test_resume_is_exact(tmp_path, flags):
    """Stopped and resumed, a run ends in the same state, bit for bit, in each precision."""
    env = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    whole = train_run(tmp_path, *SMALL, "--max-steps", 12, "--amp", *flags, env=env)
    stopped = train_run(tmp_path, *SMALL, "--max-steps", 5, "--amp", *flags, env=env)
    run_ok("train.py", "--resume", stopped, "--max-steps", 12, env=env)
    for key in ("unet", "ema", "optimizer", "scaler"):
        assert_same(newest(whole)[key], newest(stopped)[key])


def test_gpu_and_cpu_agree(tmp_path):
    """Ten updates in float32 have the losses of the CPU to 1%."""
    cpu, gpu = (scalars(train_run(tmp_path, *flags, "--max-steps", 10), "train/loss")
                for flags in (TINY, [*SMALL, "--amp", "off"]))
    assert len(gpu) == 10 and gpu == pytest.approx(cpu, rel=0.01)


@gpu_alone
def test_preflight_on_the_gpu():
    """The preflight passes and names the GPU."""
    done = run_ok("slurm/preflight.py", *SMALL)
    assert f"pass  GPU: {torch.cuda.get_device_name()}" in done.stdout


@pytest.mark.parametrize("flags", [["off"], ["fp16"], ["bf16", "--compile"]])
def test_ddp_over_nccl_with_one_process(tmp_path, flags):
    """The losses of plain `python train.py`: nothing that DDP and NCCL add changes a run."""
    if not IS_GPU and flags[0] == "fp16":
        pytest.skip("float16 is for GPUs")
    (tmp_path / "script.py").write_text(DDP_ALONE)
    how = [*SMALL, "--max-steps", 10, "--amp", *flags]
    with Job(tmp_path, *how, "--folder", tmp_path / "ddp", script=tmp_path / "script.py",
             processes=1, torchrun=["--max-restarts=0"]) as job:
        assert job.process.wait(200) == 0, job.text()[-4000:]
    plain = scalars(train_run(tmp_path, *how), "train/loss")
    assert len(plain) == 10
    assert scalars(tmp_path / "ddp", "train/loss") == pytest.approx(plain, rel=0.01)


@pytest.fixture
def pair(tmp_path):
    """pair(*flags): a Job of two processes on one GPU, its run folder `run`."""
    (tmp_path / "script.py").write_text(ON_ONE_GPU)
    return lambda *flags: Job(tmp_path, *SMALL, "--folder", tmp_path / "run", *flags,
                              script=tmp_path / "script.py")


@pytest.mark.parametrize("flags", [[], ["--accumulation", 2]])
def test_two_processes_are_one(tmp_path, pair, flags):
    """Two processes, with and without accumulation, have the losses of one; the check of ranks
    finds their weights equal."""
    with pair("--max-steps", 10, "--amp", "off", *flags) as job:
        assert job.process.wait(200) == 0, job.text()[-4000:]
    one = scalars(train_run(tmp_path, *SMALL, "--max-steps", 10, "--amp", "off"), "train/loss")
    assert len(one) == 10
    assert scalars(tmp_path / "run", "train/loss") == pytest.approx(one, rel=0.01)


def test_a_killed_process_ends_the_others(tmp_path, pair):
    """One of two is killed: the other ends with one line, and the run can be resumed."""
    with pair("--epochs", 1000, "--batch-size", 2048) as job:
        job.until(lambda: len(checkpoints(tmp_path / "run")) > 1)
        os.kill(job.ranks()[1], signal.SIGKILL)
        assert job.process.wait(120) != 0
    assert all("lost another process" in line for line in errors(job.text()))
    before = newest(tmp_path / "run")["step"]
    run_ok("train.py", "--resume", tmp_path / "run", "--max-steps", before + 1)
    assert newest(tmp_path / "run")["step"] == before + 1


def test_sigterm_through_torchrun_saves(tmp_path, pair):
    """SIGTERM to torchrun reaches both processes, which save and stop."""
    with pair("--epochs", 1000, "--save-every", 1000) as job:
        job.until(lambda: "images/s" in job.text())
        os.kill(job.process.pid, signal.SIGTERM)
        job.process.wait(120)
    path, = checkpoints(tmp_path / "run")
    assert newest(path)["step"] > 0 and "stopped after" in job.text()


@pytest.mark.parametrize("flags", [
    ["--amp", "off", "--random-crop"], ["--amp", "fp16", "--accumulation", 2, "--flip"],
    ["--amp", "bf16", "--compile", "--cache-latents", "cache"],
    ["--amp", "bf16", "--compile", "--gradient-checkpointing", "--cache-latents", "cache"]])
def test_captioned_pictures(tmp_path, photos, clip, vae, flags):
    """From loader workers, through CLIP and VAE on the GPU: the losses of the CPU in float32."""
    if not IS_GPU and "fp16" in flags:
        pytest.skip("float16 is for GPUs")
    common = [*TINY, "--data", photos, "--text-encoder", clip, "--vae", vae, "--preset", "tiny",
              "--pixel-unshuffle", 1, "--batch-size", 8, "--val-fraction", 0, "--epochs", 3,
              "--lr", 1e-4]
    data = [flag for flag in flags if flag in ("--random-crop", "--flip")]
    cpu = scalars(train_run(tmp_path, *common, *data, "--workers", 0), "train/loss")
    gpu = scalars(train_run(tmp_path, *common, *SMALL[-2:], "--workers", 2, *flags), "train/loss")
    finite = {step: loss for step, loss in gpu.items() if loss == loss}   # float16 may skip a few
    assert len(cpu) == len(gpu) == 9 and len(finite) > 5
    assert finite == pytest.approx({step: cpu[step] for step in finite}, rel=0.03)


def test_pictures_of_gpu_and_cpu_agree(tmp_path):
    """Drawn from the same noise by a compiled network in bfloat16, and by the CPU in float32."""
    run = train_run(tmp_path, *SMALL, "--max-steps", 60)
    how = ["sample.py", "--checkpoint", run, "--prompts", "a large red circle on a gray background"]
    for name, more in (("cpu", ["--device", "cpu"]), ("gpu", ["--compile", "--amp", "bf16"])):
        run_ok(*how, *more, "--output", tmp_path / name)
    ours, theirs = (np.asarray(Image.open(tmp_path / name / "00000.png"), dtype=float)
                    for name in ("gpu", "cpu"))
    assert abs(ours - theirs).mean() < 4


@gpu_alone
def test_out_of_memory(tmp_path):
    """It ends the run at once, with an exit code and PyTorch's own words."""
    (tmp_path / "script.py").write_text(LITTLE_MEMORY)
    done = launch(tmp_path / "script.py", *SMALL, "--batch-size", 2048, cwd=tmp_path)
    assert done.returncode != 0 and "out of memory" in done.stderr

"""What only a GPU can show; skipped where there is none. `python tests/benchmark.py tests` runs
these, on a CPU with --small those that can be rehearsed there."""
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import TINY, Job, assert_same, checkpoints, launch, newest, run_ok, scalars, train_run

IS_GPU, IS_REHEARSAL = torch.cuda.is_available(), "REHEARSAL" in os.environ
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not (IS_GPU or IS_REHEARSAL), reason="no GPU")]
gpu_alone = pytest.mark.skipif(not IS_GPU, reason="no GPU to rehearse on")
SMALL = [*TINY, "--device", "cuda" if IS_GPU else "cpu"]   # the last of two counts
COMPILE = ["--compile"] if IS_GPU else []   # takes minutes on a CPU, and other tests have it
PRECISIONS = [["off"], pytest.param(["fp16"], marks=gpu_alone), ["bf16", *COMPILE]]

# The first updates choose kernels and take memory; after the last the run is saved.
NEVER_WAITS = """
def diffusion_loss(*args, loss=train.diffusion_loss, updates=[]):
    updates.append(None)
    torch.cuda.set_sync_debug_mode("error" if 4 <= len(updates) < 10 else "default")
    return loss(*args)
train.diffusion_loss = diffusion_loss
"""
# One process in DDP, over NCCL, as several would be.
DDP_ALONE = """
wrap = functools.cache(torch.nn.parallel.DistributedDataParallel)
def diffusion_loss(net, *args, loss=train.diffusion_loss):
    return loss(wrap(net, gradient_as_bucket_view=True), *args)
train.diffusion_loss = diffusion_loss
"""
# Two processes on one GPU, which NCCL refuses; gloo takes GPU tensors too.
ON_ONE_GPU = """
os.environ.update(LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
join = torch.distributed.init_process_group
torch.distributed.init_process_group = lambda backend, **how: join("gloo", **how)
"""
LITTLE_MEMORY = "torch.cuda.set_per_process_memory_fraction(0.001)"


def patched(folder, patch):
    """A script that is train.py after the patch. Python's own end with gloo up may abort."""
    (folder / "script.py").write_text(f"import functools, os, torch, train\n{patch}\ntrain.main()\n"
                                      "print(flush=True)\nos._exit(0)")
    return folder / "script.py"


def losses(run, count=10):
    assert len(found := scalars(run, "loss/train")) == count
    return found


@gpu_alone
@pytest.mark.parametrize("amp", ["off", "fp16", "bf16"])
def test_a_step_never_waits_for_the_gpu(tmp_path, amp):
    """Between two log points nothing in the loop synchronises, or PyTorch would raise an error."""
    run_ok(patched(tmp_path, NEVER_WAITS), *SMALL, "--log-every", 1000, "--amp", amp,
           "--max-steps", 10, "--folder", tmp_path / "run")
    assert newest(tmp_path / "run")["step"] == 10


@pytest.mark.parametrize("flags", PRECISIONS)
def test_resume_is_exact(tmp_path, flags):
    """Stopped and resumed, a run ends in the same state, bit for bit, in each precision."""
    env = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    whole, stopped = (train_run(tmp_path, *SMALL, "--max-steps", steps, "--amp", *flags, env=env)
                      for steps in (12, 5))
    run_ok("train.py", "--resume", stopped, "--max-steps", 12, env=env)
    for key in ("unet", "ema", "optimizer", "scaler"):
        assert_same(newest(whole)[key], newest(stopped)[key])


def test_gpu_and_cpu_agree(tmp_path):
    """Ten updates in float32 have the losses of the CPU to 1%."""
    cpu, gpu = (losses(train_run(tmp_path, *flags, "--max-steps", 10))
                for flags in (TINY, [*SMALL, "--amp", "off"]))
    assert gpu == pytest.approx(cpu, rel=0.01)


@gpu_alone
def test_preflight_on_the_gpu():
    """The preflight passes and names the GPU."""
    done = run_ok("slurm/preflight.py", *SMALL)
    assert f"pass  GPU: {torch.cuda.get_device_name()}" in done.stdout


@pytest.mark.parametrize("flags", PRECISIONS)
def test_ddp_over_nccl_with_one_process(tmp_path, flags):
    """The losses of plain `python train.py`: nothing that DDP and NCCL add changes a run."""
    how = [*SMALL, "--max-steps", 10, "--amp", *flags]
    with Job(tmp_path, *how, "--folder", tmp_path / "ddp", script=patched(tmp_path, DDP_ALONE),
             processes=1, torchrun=["--max-restarts=0"]) as job:
        assert job.process.wait(200) == 0, job.text()[-4000:]
    assert losses(tmp_path / "ddp") == pytest.approx(losses(train_run(tmp_path, *how)), rel=0.01)


@pytest.fixture
def pair(tmp_path):
    """pair(*flags): a Job of two processes on one GPU, its run folder `run`."""
    return lambda *flags: Job(tmp_path, *SMALL, "--folder", tmp_path / "run", *flags,
                              script=patched(tmp_path, ON_ONE_GPU))


@pytest.mark.parametrize("flags", [[], ["--accumulation", 2]])
def test_two_processes_are_one(tmp_path, pair, flags):
    """Two processes, with and without accumulation, have the losses of one."""
    with pair("--max-steps", 10, "--amp", "off", *flags) as job:
        assert job.process.wait(200) == 0, job.text()[-4000:]
    one = losses(train_run(tmp_path, *SMALL, "--max-steps", 10, "--amp", "off"))
    assert losses(tmp_path / "run") == pytest.approx(one, rel=0.01)


def test_a_killed_process_ends_the_others(tmp_path, pair):
    """One of two is killed: the other ends within two minutes, and the run can be resumed."""
    with pair("--epochs", 1000, "--batch-size", 512) as job:
        job.until(lambda: checkpoints(tmp_path / "run"))
        os.kill(job.ranks()[1], signal.SIGKILL)
        assert job.process.wait(120) != 0
    steps = newest(tmp_path / "run")["step"] + 1
    run_ok("train.py", "--resume", tmp_path / "run", "--max-steps", steps)
    assert newest(tmp_path / "run")["step"] == steps


def test_sigterm_through_torchrun_saves(tmp_path, pair):
    """SIGTERM to torchrun reaches both processes, which save and stop."""
    with pair("--epochs", 1000, "--save-every", 1000) as job:
        job.until(lambda: "images/s" in job.text())
        os.kill(job.process.pid, signal.SIGTERM)
        job.process.wait(120)
    path, = checkpoints(tmp_path / "run")
    assert newest(path)["step"] > 0 and "stopped after" in job.text()


@pytest.mark.parametrize("flags", [
    ["--amp", "off"],
    pytest.param(["--amp", "fp16", "--accumulation", 2, "--flip"], marks=gpu_alone),
    ["--amp", "bf16", *COMPILE, "--cache-latents", "cache"],
    ["--amp", "bf16", *COMPILE, "--gradient-checkpointing", "--cache-latents", "cache"]])
def test_captioned_pictures(tmp_path, photos, clip, vae, flags):
    """From loader workers, through CLIP and VAE on the GPU: the losses of the CPU in float32."""
    common = [*TINY, "--data", photos, "--text-encoder", clip, "--vae", vae, "--preset", "tiny",
              "--pixel-unshuffle", 1, "--batch-size", 8, "--val-fraction", 0, "--epochs", 3,
              "--lr", 1e-4]
    cpu = losses(train_run(tmp_path, *common, *["--flip"] * ("--flip" in flags), "--workers", 0), 9)
    gpu = losses(train_run(tmp_path, *common, *SMALL[-2:], "--workers", 2, *flags), 9)
    finite = {step: loss for step, loss in gpu.items() if loss == loss}   # float16 may skip a few
    assert len(finite) > 5
    assert finite == pytest.approx({step: cpu[step] for step in finite}, rel=0.03)


def test_pictures_of_gpu_and_cpu_agree(tmp_path):
    """Drawn from the same noise by a network in bfloat16, and by the CPU in float32."""
    run = train_run(tmp_path, *SMALL, "--max-steps", 60)
    how = ["sample.py", "--checkpoint", run, "--prompts", "a large red circle on a gray background"]
    for name, more in (("cpu", ["--device", "cpu"]), ("gpu", ["--amp", "bf16"])):
        run_ok(*how, *more, "--output", tmp_path / name)
    ours, theirs = (np.asarray(Image.open(tmp_path / name / "00000.png"), dtype=float)
                    for name in ("gpu", "cpu"))
    assert abs(ours - theirs).mean() < 4


@gpu_alone
def test_out_of_memory(tmp_path):
    """It ends the run at once, with an exit code and PyTorch's own words."""
    done = launch(patched(tmp_path, LITTLE_MEMORY), *SMALL, "--batch-size", 2048, cwd=tmp_path)
    assert done.returncode != 0 and "out of memory" in done.stderr

"""What only a GPU can show; skipped where there is none."""
import pytest
import torch

from conftest import TINY, assert_same, newest, run_ok, scalars, train_run

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
SMALL = [*TINY, "--device", "cuda"]   # the last of two counts
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


def test_preflight_on_the_gpu():
    """The preflight passes and names the GPU."""
    done = run_ok("slurm/preflight.py", *SMALL)
    assert f"pass  GPU: {torch.cuda.get_device_name()}" in done.stdout

"""What only a GPU can show; skipped where there is none."""
import pytest
import torch

from conftest import launch, run_ok, train_run
from data import StopRequest, TrainingData, setup_ranks
from models import Model, load_checkpoint
from train import StepLog, TrainingState, parse_args, prepare_network, train_epoch

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]
SMALL = ["--resolution", "16", "--log-every", "1", "--sample-every", "0"]


@pytest.mark.parametrize("amp", ["off", "fp16", "bf16"])
def test_a_step_never_waits_for_the_gpu(tmp_path, amp):
    """Between two log points no operation of the training loop synchronises, with each kind of precision."""
    args, config, _, _ = parse_args(["--resolution", "16", "--log-every", "1000", "--amp", amp, "--max-steps", "3"])
    ranks = setup_ranks()
    dtype = {"off": None, "fp16": torch.float16, "bf16": torch.bfloat16}[amp]
    data = TrainingData(args, config, ranks)
    model = Model(config, ranks.device)
    data.make_loaders(args, model, ranks)
    net = prepare_network(args, model.unet, ranks)
    state = TrainingState(model.unet, args, ranks.device, dtype)
    before = {name: average.clone() for name, average in state.ema.parameters.items()}
    log, stop = StepLog(None, ranks, args.batch_size), StopRequest(ranks, tmp_path / "stop")
    train_epoch(args, model, net, state, data, ranks, dtype, log, stop)
    args.max_steps = 10
    torch.cuda.set_sync_debug_mode("error")
    try:
        train_epoch(args, model, net, state, data, ranks, dtype, log, stop)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert state.step == 10 and any(not torch.equal(before[name], average) for name, average in state.ema.parameters.items())


@pytest.mark.parametrize("flags", [["--amp", "off"], ["--amp", "fp16"], ["--amp", "bf16", "--compile"]])
def test_resume_is_exact(tmp_path, flags):
    """Stopping and resuming ends in the same weights and averages, bit for bit, with each kind of precision."""
    env = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    whole = train_run(tmp_path, *SMALL, *flags, "--max-steps", 12, env=env)
    stopped = train_run(tmp_path, *SMALL, *flags, "--max-steps", 5, "--name", "stopped", env=env)
    run_ok("train.py", "--resume", stopped, "--max-steps", 12, env=env)
    (a, _), (b, _) = load_checkpoint(whole), load_checkpoint(stopped)
    for key in ("unet", "ema"):
        for name in a[key]:
            torch.testing.assert_close(a[key][name], b[key][name], rtol=0, atol=0)


def test_gpu_and_cpu_agree(tmp_path):
    """Ten steps in float32 give the losses of the CPU to 1%."""
    losses = [load_checkpoint(train_run(tmp_path, *SMALL, "--amp", "off", "--device", device, "--max-steps", 10, "--name",
                                        device))[0]["sums"][0] for device in ("cpu", "cuda")]
    assert losses[1] == pytest.approx(losses[0], rel=0.01)


def test_preflight_on_the_gpu():
    """The preflight passes and names the GPU."""
    done = launch("train.py", *SMALL, "--preflight")
    assert done.returncode == 0 and torch.cuda.get_device_name() in done.stdout, done.stdout + done.stderr

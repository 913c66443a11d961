"""Training by the real script: the same result on any number of processes, exact resume, and clear errors."""
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from conftest import ROOT, TINY, launch, run_ok, scalars, train_run
from data import BuiltinShapes, Ranks, Samples, ShardedBatches, StopRequest, TrainingData, vocabulary
from models import EMA, PRESETS, Model, ModelConfig, TextEncoder, find_checkpoints, load_checkpoint
from train import (
    StepLog,
    TrainingState,
    diffusion_loss,
    learning_rate,
    make_parser,
    parse_args,
    prepare_network,
    train_epoch,
    training_bytes,
    validate,
)

CPU = torch.device("cpu")


def newest(run):
    return load_checkpoint(run)[0]


def assert_equal_trees(a, b):
    """Nested dicts, lists and tensors equal bit for bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal_trees(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_equal_trees(x, y)
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


# The order of samples


@pytest.fixture(scope="module")
def shapes():
    return BuiltinShapes(16, count=100)


def global_batches(source, world_size, accumulation, epoch=1):
    """The samples of each step of an epoch, put together from every rank's micro-batches, in the global order."""
    config = ModelConfig(**{**PRESETS["tiny"].to_dict(), "resolution": 16, "builtin_words": vocabulary()})
    text_encoder = TextEncoder(config)
    samples = Samples(source, text_encoder.tokenize, config, (48, 4, 4), seed=3, random_crop=True, flip=True)
    by_rank = []
    for rank in range(world_size):
        batches = ShardedBatches(np.arange(len(source)), 12, Ranks(rank, rank, world_size, world_size, CPU), accumulation, seed=3)
        batches.start_at(epoch, 0)
        by_rank.append([samples.__getitems__(keys) for keys in batches])
    steps = []
    for start in range(0, len(by_rank[0]), accumulation):
        parts = [batch for rank in by_rank for batch in rank[start:start + accumulation]]
        steps.append({name: torch.cat([part[name] for part in parts]) for name in parts[0]})
    return steps


@pytest.mark.parametrize("world_size, accumulation", [(2, 1), (3, 2), (1, 4), (4, 3)])
def test_ranks_and_accumulation_only_share_out_the_same_samples(shapes, world_size, accumulation):
    """Images, captions, dropped captions, timesteps and noise of every step are exactly those of one process."""
    one, many = global_batches(shapes, 1, 1), global_batches(shapes, world_size, accumulation)
    assert len(one) == len(many) == 8
    for a, b in zip(one, many):
        assert_equal_trees(a, b)


def test_samples_differ_where_they_should(shapes):
    """Within an epoch no image comes twice and no two samples share noise; another epoch brings another order and noise."""
    first, second = global_batches(shapes, 1, 1, epoch=0), global_batches(shapes, 1, 1, epoch=1)
    indices = torch.cat([batch["index"] for batch in first])
    assert len(indices.unique()) == len(indices) == 96
    noise = torch.cat([batch["eps"] for batch in first + second])
    assert len(noise.flatten(1).unique(dim=0)) == len(noise)
    assert not torch.equal(indices, torch.cat([batch["index"] for batch in second]))
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01


def test_caption_dropout_and_timesteps_have_the_right_rates():
    """Over many samples one caption in ten is empty, each decided alone, and timesteps are uniform over [0, T)."""
    source = BuiltinShapes(16, count=4000)
    config = ModelConfig(**{**PRESETS["tiny"].to_dict(), "resolution": 16, "builtin_words": vocabulary()})
    samples = Samples(source, TextEncoder(config).tokenize, config, (1, 1, 1))
    batch = samples.__getitems__([(0, i, i) for i in range(4000)])
    empty = batch["tokens"][:, 1] == 1   # the end token straight after the start token
    assert 0.08 < empty.float().mean() < 0.12
    assert 0 < empty[:64].sum() < 64
    counts = torch.histc(batch["t"].float(), bins=10, min=0, max=1000)
    assert counts.min() > 330 and counts.max() < 470 and batch["t"].min() >= 0 and batch["t"].max() < 1000


# The loss and the averages


def test_loss_equals_algorithm_1_written_out(shapes):
    """diffusion_loss equals Algorithm 1 of Ho et al. 2020 written as a plain loop over samples, with diffusers' add_noise."""
    import diffusers
    torch.manual_seed(0)
    config = ModelConfig(**{**PRESETS["tiny"].to_dict(), "resolution": 16, "prediction_type": "epsilon",
                            "builtin_words": vocabulary()})
    model = Model(config)
    samples = Samples(shapes, model.text_encoder.tokenize, config, model.codec.latent_shape)
    batch = samples.__getitems__([(0, i, i) for i in range(4)])
    losses = diffusion_loss(model.unet, model, batch)
    scheduler = diffusers.DDPMScheduler(beta_schedule="linear", beta_start=1e-4, beta_end=0.02)
    for i in range(4):
        image = torch.from_numpy(shapes.pictures[i]).permute(2, 0, 1)[None] / 127.5 - 1
        x_0 = torch.nn.functional.pixel_unshuffle(image, 4)
        text_emb = model.text_encoder.clip(batch["tokens"][i:i + 1]).last_hidden_state
        x_t = scheduler.add_noise(x_0, batch["eps"][i:i + 1], batch["t"][i:i + 1])
        eps_pred = model.unet(x_t, batch["t"][i], text_emb, class_labels=text_emb.mean(1)).sample
        torch.testing.assert_close(losses[i], (eps_pred - batch["eps"][i:i + 1]).square().mean(), rtol=1e-4, atol=1e-5)


def test_ema_equals_a_plain_loop():
    """The fused update equals ema = d ema + (1 - d) p with d = min(decay, (1 + step) / (10 + step)), and swapping restores."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    ema, plain = EMA(layer, 0.9), {name: p.detach().clone() for name, p in layer.named_parameters()}
    for step in range(1, 200):
        with torch.no_grad():
            for p in layer.parameters():
                p += torch.randn_like(p)
        ema.update(step)
        d = min(0.9, (1 + step) / (10 + step))
        plain = {name: d * plain[name] + (1 - d) * p.detach() for name, p in layer.named_parameters()}
    for name in plain:
        torch.testing.assert_close(ema.parameters[name], plain[name])
    own = {name: p.detach().clone() for name, p in layer.named_parameters()}
    with ema.applied_to(layer):
        assert_equal_trees(dict(layer.state_dict()), ema.parameters)
    assert_equal_trees(dict(layer.state_dict()), own)


@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], ["--accumulation", "2"], ["--gradient-checkpointing", "--amp", "bf16"], ["vae"]])
def test_memory_said_at_the_start(flags, photos, clip, vae, tmp_path):
    """What training_bytes computes without running anything is within 5% of what the allocator records over two real updates."""
    if flags == ["vae"]:
        flags = ["--data", photos, "--vae", vae, "--text-encoder", clip, "--resolution", "64", "--batch-size", "4"]
    args, config, _, _ = parse_args([*map(str, flags), "--max-steps", "2"])
    ranks, dtype = Ranks(0, 0, 1, 1, CPU), torch.bfloat16 if "bf16" in flags else None
    data, model = TrainingData(args, config, ranks), Model(config)
    data.make_loaders(args, model, ranks)
    unet = prepare_network(args, model.unet, ranks)
    state = TrainingState(unet, args, CPU, dtype)
    there = [*unet.parameters(), *state.ema.parameters.values(), *model.text_encoder.parameters(), *model.codec.parameters()]
    there += [model.text_encoder.remembered]
    computed, between_steps = training_bytes(args, model, data, ranks, dtype)
    log, stop = StepLog(None, ranks, args.batch_size), StopRequest(ranks, tmp_path / "stop")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        train_epoch(args, model, unet, state, data, ranks, dtype, log, stop)
    stop.close()
    changes = sorted((event.start_ns(), event.nbytes()) for event in profile.profiler.kineto_results.events()
                     if event.name() == "[memory]")
    live = sum(tensor.nbytes for tensor in there) + np.cumsum([size for _, size in changes])
    assert computed == pytest.approx(live.max(), rel=0.05)
    assert between_steps == pytest.approx(live[-1], rel=0.05)


def test_learning_rate_schedules():
    """Linear warm-up, then constant, half a cosine, or constant with a linear decay over the last fifth."""
    args = make_parser().parse_args(["--lr", "1.0", "--warmup-steps", "10", "--lr-schedule", "constant"])
    assert [learning_rate(s, 100, args) for s in (0, 4, 9, 50, 99)] == pytest.approx([0.1, 0.5, 1, 1, 1])
    args.lr_schedule = "cosine"
    assert [learning_rate(s, 100, args) for s in (50, 75, 100)] == pytest.approx([0.5, (1 + np.cos(0.75 * np.pi)) / 2, 0])
    args.lr_schedule = "decay"
    assert [learning_rate(s, 100, args) for s in (50, 80, 90, 99)] == pytest.approx([1, 1, 0.5, 0.05])


def test_validation_by_timestep(shapes):
    """The parts of [0, T) have the means of their own samples' errors, one call each, and together the validation
    loss, whatever the batches."""
    torch.manual_seed(0)
    config = ModelConfig(**{**PRESETS["tiny"].to_dict(), "resolution": 16, "builtin_words": vocabulary()})
    model = Model(config)
    samples = Samples(shapes, model.text_encoder.tokenize, config, model.codec.latent_shape, validation=12)
    batches = [samples.__getitems__([(0, i, i) for i in part]) for part in (range(0, 12, 2), range(1, 12, 2))]
    values = validate(model, batches, Ranks(0, 0, 1, 1, CPU), None)
    one_by_one = {t: loss for i in range(12) for sample in [samples.__getitems__([(0, i, i)])]
                  for t, loss in zip(sample["t"].tolist(), diffusion_loss(model.unet, model, sample).tolist())}
    assert values.pop("epoch/validation_loss") == pytest.approx(np.mean(list(one_by_one.values())), rel=1e-4)
    for tag, value in values.items():
        low, high = map(int, tag.removeprefix("validation_by_t/").split("-"))
        assert value == pytest.approx(np.mean([loss for t, loss in one_by_one.items() if low <= t < high]), rel=1e-4)
    assert list(values)[0].endswith("0000-0200") and list(values)[-1].endswith("0800-1000") and len(values) == 5


# Whole runs


@pytest.fixture(scope="module")
def one_process_run(tmp_path_factory):
    return train_run(tmp_path_factory.mktemp("one"), *TINY, "--batch-size", 24, "--max-steps", 10)


@pytest.mark.slow
@pytest.mark.parametrize("processes, accumulation", [(2, 1), (1, 2), (1, 4), (2, 2)])
def test_processes_and_accumulation_agree(one_process_run, tmp_path, processes, accumulation):
    """Ten steps with two processes or accumulated micro-batches give the losses and weights of one process at float
    tolerance."""
    run = train_run(tmp_path, *TINY, "--batch-size", 24, "--max-steps", 10, "--accumulation", accumulation, processes=processes)
    for tag, tolerance in (("train/loss", 1e-4), ("train/grad_norm", 1e-3)):
        ours, theirs = scalars(run, tag), scalars(one_process_run, tag)
        assert ours.keys() == theirs.keys() and len(ours) == 10
        assert list(ours.values()) == pytest.approx(list(theirs.values()), rel=tolerance)
    start = Model(ModelConfig.from_dict(newest(run)["config"]))
    for key in ("unet", "ema"):
        ours, theirs = newest(run)[key], newest(one_process_run)[key]
        moved = torch.cat([(theirs[name] - p.detach()).flatten() for name, p in start.unet.named_parameters()]).norm()
        apart = torch.cat([(ours[name] - theirs[name]).flatten() for name in theirs]).norm()
        assert apart < 0.01 * moved, (key, apart / moved)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_resume_is_exact(tmp_path, photos, clip, vae, processes):
    """Stopping in the middle of an epoch and resuming ends in the same weights, EMA, optimizer state and logged losses,
    bit for bit, with random crops, flips, posterior draws and caption choices."""
    flags = ["--data", photos, "--text-encoder", clip, "--vae", vae, "--preset", "tiny", "--pixel-unshuffle", 1,
             "--resolution", 16, "--batch-size", 4, "--epochs", 4, "--warmup-steps", 3, "--random-crop", "--flip",
             "--workers", 1, "--log-every", 1, "--val-fraction", 0.1, "--lr-schedule", "cosine"]   # 5 steps an epoch
    whole = train_run(tmp_path, *flags, processes=processes)
    stopped = train_run(tmp_path, *flags, "--max-steps", 8, "--name", "stopped", processes=processes)
    assert newest(stopped)["step"] == 8 and newest(stopped)["step_in_epoch"] == 3 and newest(stopped)["epoch"] == 1
    run_ok("train.py", "--resume", stopped, processes=processes, cwd=tmp_path)
    a, b = newest(whole), newest(stopped)
    assert a["step"] == b["step"] == 20 and len(a["epoch_losses"]) == 4
    for key in ("unet", "ema", "optimizer", "scaler", "epoch_losses"):
        assert_equal_trees(a[key], b[key])
    for tag in ("train/loss", "train/grad_norm", "epoch/loss", "epoch/validation_loss"):
        assert scalars(whole, tag) == scalars(stopped, tag)


def test_a_state_moves_between_kinds_of_devices(tmp_path):
    """What a GPU saved in bfloat16 goes on elsewhere: Adam's moments take the layout of the weights, with which the next update
    is a contiguous run's bit for bit; float16 begins with a scaler of its own; and a weight decay given anew is used."""

    def state(*flags, layout=torch.contiguous_format, dtype=torch.bfloat16):
        torch.manual_seed(0)
        unet = torch.nn.Conv2d(8, 4, 3).to(memory_format=layout)
        return TrainingState(unet, make_parser().parse_args(["--lr", "0.1", "--ema-decay", "0.9", *flags]), CPU, dtype)

    def update(state, seed):
        state.unet.weight.grad = torch.empty_like(state.unet.weight).copy_(
            torch.randn(4, 8, 3, 3, generator=torch.Generator().manual_seed(seed)))
        state.unet.bias.grad = torch.zeros(4)
        state.optimizer.step()

    gpu, cpu = state(layout=torch.channels_last), state()
    for one in (gpu, cpu):
        update(one, 1)
    gpu.save(tmp_path, Ranks(0, 0, 1, 1, CPU), config=PRESETS["tiny"].to_dict())
    moved = state("--weight-decay", "0.5", dtype=torch.float16)
    moved.restore(load_checkpoint(tmp_path)[0], True)
    assert moved.optimizer.param_groups[0]["weight_decay"] == 0.5 and moved.scaler.get_scale() == 65536
    moved.optimizer.param_groups[0]["weight_decay"] = 0.01
    for one in (moved, cpu):
        update(one, 2)
    assert_equal_trees(moved.unet.state_dict(), cpu.unet.state_dict())


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_signal_saves_and_stops(tmp_path, processes):
    """SIGTERM ends the run between two steps with a checkpoint from which it resumes."""
    command = [sys.executable, str(ROOT / "train.py"), "--runs", str(tmp_path), *TINY, "--batch-size", "16"]
    if processes > 1:
        command[1:1] = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + 120
            while not any(scalars(run, "train/loss") for run in tmp_path.glob("run_*") if list(run.glob("events*"))
                          and "train/loss" in EventAccumulator(str(run)).Reload().Tags()["scalars"]):
                assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(1)
            process.send_signal(signal.SIGTERM)
            process.wait(60)
        finally:
            process.kill()
    run, = tmp_path.glob("run_*")
    step = newest(run)["step"]
    assert step > 0, (tmp_path / "log").read_text()
    run_ok("train.py", "--resume", run, "--max-steps", step + 2, cwd=tmp_path)
    assert newest(run)["step"] == step + 2


@pytest.mark.slow
@pytest.mark.parametrize("space", ["pixels", "grey", "latents"])
def test_own_pictures(tmp_path, photos, clip, vae, space):
    """A captioned folder trains in pixel space, in greyscale and in a VAE's latent space with loader workers; the loss
    falls, and the sample grid and the configuration are written."""
    flags = {"pixels": ["--vae", "none"], "grey": ["--vae", "none", "--image-channels", 1],
             "latents": ["--vae", vae, "--pixel-unshuffle", 1]}[space]
    run = train_run(tmp_path, "--data", photos, "--preset", "tiny", "--resolution", 16, "--text-encoder", clip, *flags,
                    "--batch-size", 8, "--epochs", 12, "--warmup-steps", 2, "--sample-every", 12, "--save-every", 12,
                    "--val-fraction", 0.1, "--workers", 1, "--random-crop", "--flip", "--log-every", 1, "--amp", "off",
                    "--num-train-timesteps", 20 if space == "grey" else 1000)   # fewer than a grid's sampler takes steps
    losses = newest(run)["epoch_losses"]
    assert len(losses) == 12 and np.mean(losses[-4:]) < 0.8 * np.mean(losses[:2])
    assert Image.open(run / "samples_epoch0012.png").width > 16
    assert json.loads((run / "config.json").read_text())["model"]["image_channels"] == (1 if space == "grey" else 3)
    for tag in ("epoch/validation_loss", "validation_by_t/0004-0008" if space == "grey" else "validation_by_t/0200-0400"):
        assert len(scalars(run, tag)) == 12 and all(np.isfinite(list(scalars(run, tag).values())))


@pytest.mark.slow
def test_captions_that_changed_are_noticed(tmp_path, photos, clip):
    """A run goes on with the same data without a word, and with one caption changed after a warning."""
    data = shutil.copytree(photos, tmp_path / "data")
    run = train_run(tmp_path, "--data", data, "--vae", "none", "--preset", "tiny", "--resolution", 16, "--text-encoder", clip,
                    "--batch-size", 8, "--sample-every", 0, "--max-steps", 1)
    assert "have changed" not in run_ok("train.py", "--resume", run, "--max-steps", 2).stderr
    text = (data / "captions.txt").read_text()
    (data / "captions.txt").write_text(text.replace("dog", "cat", 1))
    assert "its names or captions have changed" in run_ok("train.py", "--resume", run, "--max-steps", 3).stderr


@pytest.mark.slow
@pytest.mark.parametrize("extra", [["--amp", "bf16"], ["--gradient-checkpointing"], ["--compile"]])
def test_switches_change_speed_not_the_result(one_process_run, tmp_path, extra):
    """bf16 autocast, gradient checkpointing and torch.compile follow the plain run's losses, and keep state-dict names."""
    run = train_run(tmp_path, *TINY, "--batch-size", 24, "--max-steps", 3, *extra)
    assert newest(run)["unet"].keys() == newest(one_process_run)["unet"].keys()
    ours, theirs = scalars(run, "train/loss"), scalars(one_process_run, "train/loss")
    assert list(ours.values()) == pytest.approx(list(theirs.values())[:3], rel=0.03 if "bf16" in extra else 1e-3)
    if "bf16" not in extra:   # a node may lack a compiler
        run_ok("train.py", "--resume", run, f"--no-{extra[0].removeprefix('--')}", "--max-steps", 4)
        assert newest(run)["args"][extra[0].removeprefix("--").replace("-", "_")] is False


# Mistakes


@pytest.fixture(scope="module")
def bad_data(tmp_path_factory, photos, one_process_run):
    """Folders that cannot be trained on."""
    root = tmp_path_factory.mktemp("bad")
    (root / "empty").mkdir()
    shutil.copytree(photos, root / "no_captions")
    (root / "no_captions" / "captions.txt").unlink()
    shutil.copytree(photos, root / "no_image")
    (root / "no_image" / "Images" / "003.jpg").unlink()
    shutil.copytree(photos, root / "bad_header")
    (root / "bad_header" / "captions.txt").write_text("a,b\n1,2\n")
    (root / "not.zip").write_bytes(b"no zip at all")
    (root / "junk").mkdir()
    (root / "junk" / "checkpoint_epoch0001_step00000001.pt").write_bytes(b"no checkpoint at all")
    (root / "two").mkdir()
    for name in ("checkpoint_epoch0001_step00000001.pt", "checkpoint_epoch0002_step00000002.pt"):
        shutil.copy(find_checkpoints(one_process_run)[0], root / "two" / name)
    return root


PHOTOS = ["--batch-size", "8", "--data", "{photos}"]
MISTAKES = [
    (["--data", "{bad}/igloo"], "^error: --data .*/igloo: no such folder"),   # no fault of gloo's
    (["--data", "{bad}/empty"], "--data .*/empty: holds no images"),
    (["--data", "{bad}/no_captions"], "--data .*/no_captions: no captions file .*add one"),
    (["--data", "{bad}/no_image"], "--data .*/no_image: 1 image.s. named in captions.txt .*'003.jpg'; add the files or remove"),
    (["--data", "{bad}/bad_header"], "captions.txt is not as expected: .*header"),
    (["--data", "{bad}/not.zip"], "--data .*not.zip: not a zip archive"),
    ([*PHOTOS, "--text-encoder", "builtin", "--preset", "tiny"], "--text-encoder builtin: it only knows"),
    ([*PHOTOS], "--text-encoder openai/clip-vit-base-patch32: .*hf download openai/clip-vit-base-patch32"),
    ([*PHOTOS, "--text-encoder", "{clip}"], "--vae stabilityai/sdxl-vae: .*hf download stabilityai/sdxl-vae"),
    ([*PHOTOS, "--text-encoder", "{vae}", "--vae", "none"], "--text-encoder"),
    (["--min-snr-gamma", "0.5"], "--min-snr-gamma 0.5: must be at least 1.0"),
    (["--pixel-unshuffle", "0"], "--pixel-unshuffle 0: must be 1"),
    ([*PHOTOS, "--text-encoder", "{clip}", "--vae", "{clip}"], "--vae .*is a None"),
    ([*PHOTOS, "--text-encoder", "{clip}", "--vae", "{vae}", "--resolution", "31"], "--resolution 31"),
    (["--batch-size", "33", "--accumulation", "2"], "--batch-size 33: must be a multiple .*; try"),
    (["--batch-size", "100000"], "--batch-size 100000: there are only"),
    (["--resume", "{bad}/nowhere"], "checkpoint .*/nowhere: no such file or run folder"),
    (["--resume", "{bad}/empty"], "checkpoint .*/empty: the folder holds no checkpoint"),
    (["--resume", "{bad}/junk"], "checkpoint .*/junk: none of the 1 files can be read"),
    (["--resume", "{bad}/two/checkpoint_epoch0001_step00000001.pt"], "0001_step00000001.pt: .* holds .*epoch0002.*add --folder"),
    (["--resume", "{run}", "--prediction-type", "epsilon"], "--prediction-type epsilon: the checkpoint .* has sample"),
    (["--resume", "{run}", "--seed", "5"], "--seed 5: the checkpoint .* has 0"),
    (["--token-length", "80"], "--token-length 80: must be from 16 to 77"),
    (["--resolution", "30"], "--resolution 30: must be a positive multiple of --pixel-unshuffle 4"),
    (["--zero-terminal-snr", "--prediction-type", "epsilon"], "--zero-terminal-snr"),
    (["--resolution", "36"], "--resolution 36: the UNet halves"),
    (["--max-grad-norm", "0"], "--max-grad-norm 0.0: must be above 0"),
    (["--ema-decay", "1"], "--ema-decay 1.0: must be at least 0 and below 1"),
    (["--image-channels", "1", "--vae", "somewhere"], "--image-channels 1: greyscale is for pixel space"),
]


@pytest.mark.slow
def test_mistakes_get_one_line(bad_data, photos, clip, vae, one_process_run):
    """Each wrong input ends in one line that names the flag, the value and the fix, with exit code 2 and no traceback."""
    places = dict(bad=bad_data, photos=photos, clip=clip, vae=vae, run=one_process_run)
    cases = [([flag.format(**places) for flag in flags], message) for flags, message in MISTAKES]
    with ThreadPoolExecutor(2) as pool:
        finished = pool.map(lambda case: launch("train.py", "--runs", bad_data / "runs", *case[0], cwd=bad_data), cases)
    for (flags, message), done in zip(cases, finished):
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 2 and "Traceback" not in done.stderr, (flags, done.stderr)
        assert len(lines) == 1 and re.search(message, lines[0]), (flags, done.stderr)
    assert not (bad_data / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("flags, message", [
    (["--batch-size", "33"], "--batch-size 33: must be a multiple .* 2 x 1; try"),
    (["--data", "nowhere"], "--data nowhere: no such folder")])
def test_mistakes_end_every_process(tmp_path, flags, message):
    """With two processes a mistake is said once, by rank 0, and nobody hangs."""
    done = launch("train.py", "--runs", tmp_path, *flags, processes=2, cwd=tmp_path, timeout=60)
    assert done.returncode != 0
    assert len(re.findall(f"^error: {message}", done.stderr, re.MULTILINE)) == 1, done.stderr


def test_more_processes_than_gpus_is_refused(monkeypatch):
    """Two processes on a node with one GPU are refused before the process group is made."""
    from data import setup_ranks
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("LOCAL_WORLD_SIZE", "2"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="--nproc_per_node=2: only 1 GPU"):
        setup_ranks()

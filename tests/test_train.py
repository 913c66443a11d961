"""Training by the real script: the same result on any number of processes, exact resume, orderly
stops and clear errors."""
import argparse
import json
import os
import re
import shutil
import signal
from dataclasses import asdict, replace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.utils.data import default_collate

import data
import train
from conftest import (
    TINY,
    Job,
    assert_same,
    checkpoints,
    errors,
    launch,
    make_pictures,
    newest,
    run_ok,
    scalars,
    train_run,
)
from data import VOCABULARY, BuiltinShapes, GlobalOrder, Samples, image_loader
from models import PRESETS, Model, load_checkpoint, load_model, update_ema
from tiny_networks import make_vae

CONFIG = replace(PRESETS["tiny"], resolution=16, builtin_words=VOCABULARY)


def make_samples(source, **more):
    return Samples(image_loader(source, CONFIG), source.captions, np.arange(len(source)), CONFIG,
                   (48, 4, 4), **more)


# Samples and their order


def keys_of_steps(as_rank, ranks=1, accumulation=1, epoch=1):
    """The keys of each step of an epoch over 100 images, from all ranks, in the global order."""
    by_rank = []
    for rank in range(ranks):
        as_rank(rank, ranks)
        order = GlobalOrder(np.arange(100), 12, accumulation, seed=3)
        order.start_at(epoch, 0)
        by_rank.append(list(order))
    return [[key for part in by_rank for batch in part[start:start + accumulation] for key in batch]
            for start in range(0, len(by_rank[0]), accumulation)]


@pytest.mark.parametrize("ranks, accumulation", [(2, 1), (3, 2), (1, 4), (4, 3)])
def test_ranks_and_accumulation_only_share_out_the_same_samples(as_rank, ranks, accumulation):
    """Every step has the samples of one process's, no image comes twice, and another epoch has
    another order."""
    one = keys_of_steps(as_rank)
    assert len(one) == 8 and one == keys_of_steps(as_rank, ranks, accumulation)
    first, second = ([number for step in keys_of_steps(as_rank, epoch=epoch)
                      for _, _, number in step] for epoch in (1, 2))
    assert len(set(first)) == 96 and first != second


def test_what_is_drawn_with_a_sample():
    """Noise is a unit Gaussian and never the same, one caption in ten is empty, each decided
    alone, and timesteps are uniform over [0, T)."""
    samples = make_samples(BuiltinShapes(16, count=2000))
    batch = default_collate([samples[epoch, i, i] for epoch in (0, 1) for i in range(2000)])
    noise, empty = batch["eps"], np.array([caption == "" for caption in batch["caption"]])
    assert len(noise.flatten(1).unique(dim=0)) == 4000
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert 0.08 < empty.mean() < 0.12 and 0 < empty[:64].sum() < 64
    counts = torch.histc(batch["t"].float(), bins=10, min=0, max=1000)
    assert counts.sum() == 4000 and counts.min() > 330 and counts.max() < 470


# The learning rate, validation, the loop


def test_learning_rate_schedules():
    """Linear warm-up, then constant, half a cosine, or constant with a linear end."""
    args = train.make_parser().parse_args(["--lr", "1", "--warmup-steps", "10"])
    for args.lr_schedule, steps, expected in (
            ("constant", (0, 4, 9, 50, 99), [0.1, 0.5, 1, 1, 1]),
            ("cosine", (50, 75, 100), [0.5, (1 - 0.5**0.5) / 2, 0]),
            ("decay", (50, 80, 90, 99), [1, 1, 0.5, 0.05])):
        assert [train.learning_rate(step, 100, args) for step in steps] == pytest.approx(expected)


def test_validation_by_timestep():
    """Each fifth of [0, T) has the mean of its own samples' errors, found one by one."""
    model, source = Model(CONFIG), BuiltinShapes(16, count=12)
    samples = make_samples(source, validation=True)
    one_by_one = [default_collate([samples[0, i, i]]) for i in range(12)]
    batches = [default_collate([samples[0, i, i] for i in range(k, 12, 2)]) for k in range(2)]
    values = train.validate(model, batches, train.UnreadableImages(source, 0), None)
    t = np.array([batch["t"].item() for batch in one_by_one])
    errors = np.array([train.diffusion_loss(model.unet, model, batch).item()
                       for batch in one_by_one])
    expected = {f"validation_by_t/{low:04d}-{low + 200:04d}": errors[t // 200 == low / 200].mean()
                for low in range(0, 1000, 200)}
    assert values == pytest.approx(expected | {"epoch/validation_loss": errors.mean()}, rel=1e-4)


@pytest.fixture(scope="module")
def plain_loop():
    """Ten updates written out, one network at a time: (curves and weights, the first weights)."""
    torch.manual_seed(0)
    model, source, scheduler = Model(CONFIG), BuiltinShapes(16), diffusers.DDPMScheduler()
    alpha_bar = scheduler.alphas_cumprod
    start = {name: p.detach().clone() for name, p in model.unet.named_parameters()}
    ema, losses, norms = {name: p.clone() for name, p in start.items()}, {}, {}
    optimizer = torch.optim.AdamW(model.unet.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    samples, (images, _) = make_samples(source), data.split_images(source, 0.05)
    for step, keys in zip(range(1, 11), GlobalOrder(images, 24)):
        batch = default_collate([samples[key] for key in keys])
        pictures = torch.from_numpy(source.pictures[[number for _, _, number in keys]])
        x_0 = torch.pixel_unshuffle(pictures.permute(0, 3, 1, 2) / 127.5 - 1, 4)
        x_t = scheduler.add_noise(x_0, batch["eps"], batch["t"])
        tokens = model.text_encoder.tokenizer(batch["caption"], padding="max_length", max_length=16)
        text_emb = model.text_encoder.clip(torch.tensor(tokens.input_ids)).last_hidden_state
        output = model.unet(x_t, batch["t"], text_emb, class_labels=text_emb.mean(1)).sample
        snr = alpha_bar[batch["t"]] / (1 - alpha_bar[batch["t"]])
        loss = (snr.clamp(1, 5) * (output - x_0).square().mean((1, 2, 3))).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.unet.parameters()]).norm()
        for p in model.unet.parameters():
            p.grad *= min(1, 1 / norm)
        optimizer.param_groups[0]["lr"] = 1e-3 * step / 200
        optimizer.step()
        for name, p in model.unet.named_parameters():
            ema[name] += (1 - min(0.3, (1 + step) / (10 + step))) * (p.detach() - ema[name])
        losses[step], norms[step] = loss.item(), norm.item()
    return {"train/loss": losses, "train/grad_norm": norms, "unet": model.unet.state_dict(),
            "ema": ema}, start


@pytest.mark.slow
@pytest.mark.parametrize("processes, flags, tolerance", [
    (1, [], 1e-4), (2, [], 1e-4), (1, ["--accumulation", 4], 1e-4),
    (2, ["--accumulation", 2], 1e-4), (1, ["--gradient-checkpointing"], 1e-4),
    (1, ["--compile"], 1e-4), (1, ["--amp", "bf16"], 0.01), (2, ["--bf16-gradients"], 1e-3)])
def test_a_run_is_a_plain_loop(plain_loop, tmp_path, processes, flags, tolerance):
    """Losses, gradients and weights are those of Ho et al. 2020 with diffusers' schedule, for any
    number of processes and micro-batches, and with switches, which a resumed run may turn off."""
    run = train_run(tmp_path, *TINY, "--batch-size", 24, "--max-steps", 10, "--ema-decay", 0.3,
                    *flags, processes=processes)
    expected, start = plain_loop
    for tag, factor in (("train/loss", 1), ("train/grad_norm", 10)):
        assert scalars(run, tag) == pytest.approx(expected[tag], rel=factor * tolerance)
    for key in ("unet", "ema"):
        assert newest(run)[key].keys() == start.keys()
        ours, theirs, first = (torch.cat([weights[name].flatten() for name in start])
                               for weights in (newest(run)[key], expected[key], start))
        apart = (ours - theirs).norm() / (theirs - first).norm()
        assert apart < 100 * tolerance
        assert (apart > 3e-4) == (tolerance > 1e-4), "bfloat16 rounds, nothing else does"
    if len(flags) == 1:
        run_ok("train.py", "--resume", run, flags[0].replace("--", "--no-"), "--max-steps", 11)
        assert newest(run)["args"][flags[0][2:].replace("-", "_")] is False


# Stopping and going on


def write_old_format(run):
    """The newest checkpoint again, as older versions wrote it, with paths as they were given."""
    payload, path = load_checkpoint(run)
    for name in ("fingerprint", "logged_step", "recent"):
        del payload[name]
    payload |= dict(ema=dict(payload["ema"]), scaler={}, data="a hash made in another way")
    payload["args"] |= dict(max_bad_steps=20)
    for place in ("vae", "text_encoder"):
        payload["args"][place] = payload["config"][place] = os.path.relpath(payload["args"][place])
    torch.save(payload, path.with_suffix(".new"))   # the old one is mapped into memory
    path.with_suffix(".new").rename(path)


@pytest.mark.slow
@pytest.mark.parametrize("processes, is_old", [(1, False), (2, False), (1, True)])
def test_resume_is_exact(tmp_path, photos, clip, vae, processes, is_old):
    """Stopped in mid-epoch and resumed, a run ends in the same state and curves, bit for bit; its
    checkpoint may be an old version's. Captions that have changed are noticed."""
    folder = shutil.copytree(photos, tmp_path / "data")
    flags = [*TINY, "--data", folder, "--text-encoder", clip, "--vae", vae, "--preset", "tiny",
             "--pixel-unshuffle", 1, "--batch-size", 4, "--epochs", 4, "--warmup-steps", 3,
             "--random-crop", "--flip", "--workers", 1, "--val-fraction", 0.1, "--log-every", 3]
    whole = train_run(tmp_path, *flags, processes=processes)
    stopped = train_run(tmp_path, *flags, "--max-steps", 8, processes=processes)
    state = newest(stopped)
    assert (state["step"], state["epoch"], state["step_in_epoch"]) == (8, 1, 3)
    if is_old:
        write_old_format(stopped)
        assert_same(load_model(stopped).unet.state_dict(), state["ema"])
        run_ok("sample.py", "--checkpoint", stopped, "--prompts", "a dog", "--steps", 2)
    done = run_ok("train.py", "--resume", stopped, processes=processes)
    assert "warning: --data" not in done.stderr and "learning rate" not in done.stdout
    a, b = newest(whole), newest(stopped)
    assert a["step"] == 20 and len(a["epoch_losses"]) == 4
    for key in ("step", "unet", "ema", "optimizer", "scaler", "epoch_losses"):
        assert_same(a[key], b[key])
    for tag in ("train/loss", "train/grad_norm", "epoch/loss", "epoch/validation_loss"):
        if not is_old or tag[:5] == "epoch":   # it had no sums since the last log point
            assert scalars(whole, tag) == scalars(stopped, tag)
    captions = folder / "captions.txt"
    captions.write_text(captions.read_text().replace("dog", "cat", 1))
    assert re.search(f"^warning: --data {folder}: its names or captions have changed since .*$",
                     run_ok("train.py", "--resume", stopped).stderr, re.MULTILINE)


@pytest.mark.slow
def test_frozen_networks_that_have_moved(tmp_path, photos, clip, vae):
    """A run whose VAE and text encoder are elsewhere now goes on, is sampled and judged when told
    where; other weights at that place are refused by all three."""
    old, new, run = tmp_path / "old", tmp_path / "new", tmp_path / "run"
    old.mkdir()
    for name, place in dict(clip=clip, vae=vae).items():
        shutil.copytree(place, old / name)
    run_ok("train.py", *TINY, "--data", photos, "--text-encoder", old / "clip", "--vae",
           old / "vae", "--preset", "tiny", "--pixel-unshuffle", 1, "--batch-size", 4, "--workers",
           0, "--max-steps", 1, "--val-fraction", 0, "--folder", run)
    old.rename(new)
    moved = ["--text-encoder", new / "clip", "--vae", new / "vae"]
    ways = [["train.py", "--resume", run, "--max-steps", 2],
            ["sample.py", "--checkpoint", run, "--prompts", "a", "--steps", 1],
            ["evaluate.py", "--checkpoint", run, "--num-images", 4, "--steps", 1, "--metrics",
             "accuracy"]]
    error, = errors(launch(*ways[0]).stderr)
    assert error.startswith(f"error: --text-encoder {old}/clip: no such folder")
    for way in ways[:2]:
        run_ok(*way, *moved)
    run_ok("train.py", "--resume", run, "--max-steps", 3)
    assert newest(run)["step"] == 3
    make_vae(new / "vae", layers=2)
    for way in ways:
        error, = errors(launch(*way, *moved).stderr)
        assert re.fullmatch(f"error: --vae {new}/vae: holds other weights than .+", error)


def test_a_state_moves_between_kinds_of_devices(tmp_path):
    """What a GPU saved goes on elsewhere: Adam's moments take the weights' layout, so that the next
    update is bit for bit; float16 begins with its own scale; a new weight decay counts."""
    flags = {}

    def make_state(layout, dtype=torch.bfloat16, decay="0.01"):
        torch.manual_seed(0)
        unet = torch.nn.Conv2d(8, 4, 3).to(memory_format=layout)
        args = train.make_parser().parse_args(["--lr", "0.1", "--weight-decay", decay])
        flags.update(vars(args), epochs=1, batch_size=1, warmup_steps=1)
        return train.TrainingState(unet, args, torch.device("cpu"), dtype)

    def update(*states):
        for state in states:
            torch.manual_seed(state.step)
            for p in state.unet.parameters():
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape))
            state.optimizer.step()
            state.step += 1

    gpu, cpu = make_state(torch.channels_last), make_state(torch.contiguous_format)
    update(gpu, cpu)
    gpu.save(tmp_path, config=asdict(CONFIG), train_images=1, args=flags)
    moved = make_state(torch.contiguous_format, torch.float16, decay="0.5")
    moved.restore(newest(tmp_path), argparse.Namespace(**flags), BuiltinShapes, [0])
    assert moved.scaler.get_scale() == 65536
    assert moved.optimizer.param_groups[0]["weight_decay"] == 0.5
    moved.optimizer.param_groups[0]["weight_decay"] = 0.01
    update(moved, cpu)
    assert_same(moved.unet.state_dict(), cpu.unet.state_dict())


@pytest.mark.slow
def test_a_resumed_run_leaves_no_old_points(tmp_path, photos, clip):
    """Where a run goes on from an older checkpoint, TensorBoard shows each epoch once."""
    run = train_run(tmp_path, *TINY, "--data", photos, "--text-encoder", clip, "--vae", "none",
                    "--preset", "tiny", "--batch-size", 8, "--epochs", 3, "--val-fraction", 0.2,
                    "--workers", 0, "--sample-every", 1)
    checkpoints(run)[-1].unlink()
    run_ok("train.py", "--resume", run)
    events = EventAccumulator(str(run)).Reload()
    for found in (events.Scalars("epoch/loss"), events.Scalars("epoch/validation_loss"),
                  events.Images("samples/grid")):
        assert [event.step for event in found] == [2, 4, 6]


COUNTS_WORKERS = """
import multiprocessing, data, train

def report(name):
    function = getattr(train, name)
    def wrapped(*args, **kwargs):
        print(name, sorted(worker.pid for worker in multiprocessing.active_children()))
        return function(*args, **kwargs)
    setattr(train, name, wrapped)

for name in ("prepare_network", "validate"):
    report(name)
data.run_main(train.main)
"""


@pytest.mark.slow
def test_workers_start_once(tmp_path, photos, clip):
    """The workers of both loaders are there before DDP's first collective, and stay."""
    (tmp_path / "script.py").write_text(COUNTS_WORKERS)
    said = run_ok(tmp_path / "script.py", *TINY, "--data", photos, "--text-encoder", clip, "--vae",
                  "none", "--preset", "tiny", "--batch-size", 8, "--epochs", 2, "--val-fraction",
                  0.2, "--workers", 2, cwd=tmp_path).stdout
    found = re.findall(r"^(prepare_network|validate) \[(\d+, \d+, \d+, \d+)\]$", said, re.M)
    assert len(found) == 3 and len({pids for _, pids in found}) == 1, said


def test_buffers_are_saved_and_come_back(tmp_path):
    """A network with BatchNorm and a table: parameters are averaged, while its buffers are in the
    average the trained network's own, and so they are saved and come back."""
    def make_state():
        unet = torch.nn.Sequential(torch.nn.Conv2d(2, 2, 1), torch.nn.BatchNorm2d(2))
        unet.register_buffer("table", torch.randn(3))
        return train.TrainingState(unet, args, torch.device("cpu"), None)

    args = train.make_parser().parse_args([
        "--lr", "0.1", "--epochs", "1", "--batch-size", "1", "--warmup-steps", "1"])
    state = make_state()
    state.unet(torch.randn(4, 2, 3, 3) + 5).square().mean().backward()
    state.optimizer.step()
    update_ema(state.averages, state.weights, 1, 0.5)
    assert not torch.equal(state.ema[0].weight, state.unet[0].weight)
    state.save(tmp_path, config=asdict(CONFIG), train_images=1, args=vars(args))
    resumed = make_state()
    resumed.restore(newest(tmp_path), args, BuiltinShapes, [0])
    for of in (state, resumed):
        assert_same(dict(of.ema.named_buffers()), dict(state.unet.named_buffers()))
        assert of.ema[1].num_batches_tracked == 1 and of.ema[1].running_mean.abs().min() > 0.1
    assert_same(resumed.unet.state_dict(), state.unet.state_dict())
    assert_same(resumed.ema.state_dict(), state.ema.state_dict())


SLOW_VALIDATION = """
import os, time, data, train

def slow(*args, validate=train.validate):
    values = validate(*args)
    print("validated", flush=True)
    time.sleep(int(os.environ["SECONDS"]))
    return values

train.validate = slow
data.run_main(train.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes, seconds", [(1, 1), (2, 35)])
def test_a_signal_saves_and_stops(tmp_path, photos, clip, processes, seconds):
    """SIGTERM during a validation of any length ends the run and its loader workers in order, with
    a checkpoint from which it goes on."""
    run, script = tmp_path / "run", tmp_path / "slow.py"
    script.write_text(SLOW_VALIDATION)
    flags = [*TINY, "--data", photos, "--text-encoder", clip, "--vae", "none", "--preset", "tiny",
             "--batch-size", 4, "--val-fraction", 0.2, "--workers", 1, "--folder", run]
    env = {"SECONDS": str(seconds), "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "300"}
    with Job(tmp_path, *flags, script=script, processes=processes, env=env) as job:
        job.until(lambda: job.text().count("validated") == processes)
        assert newest(run)["epoch"] == 1
        job.process.send_signal(signal.SIGTERM)
        job.process.wait(seconds + 120)
        text = job.text()
    step = newest(run)["step"]
    assert f"\nstopped after {step} steps; to go on: train.py --resume {run}\n" in text
    # torchrun ends with a traceback of its own, the ranks with none.
    assert "error: " not in text and text.count("Traceback") == processes - 1, text
    run_ok("train.py", "--resume", run, "--max-steps", step + 2)
    assert newest(run)["step"] == step + 2


LONG_VALIDATION = """
import time, data, train

def slow(unet, *args, loss=train.diffusion_loss):
    if not unet.training:
        print("validates", flush=True)
        time.sleep(1)
    return loss(unet, *args)

train.diffusion_loss = slow
data.run_main(train.main)
"""


@pytest.mark.slow
def test_a_stop_made_while_the_run_starts(tmp_path):
    """A file `stop` that is there before the loop stops the run after an update or two, and stays.
    --resume goes on all the same; and --folder does where the file is that of a finished run."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "stop").touch()
    run_ok("train.py", *TINY, "--folder", run)
    assert newest(run)["step"] <= 2 and (run / "stop").exists()
    for flag, step in (("--resume", 5), ("--folder", 6)):
        run_ok("train.py", flag, run, "--max-steps", step)
        assert newest(run)["step"] == step


@pytest.mark.slow
def test_a_stop_leaves_out_validation_and_grid(tmp_path, photos, clip):
    """A file `stop` seen in a validation of a minute, after an epoch that is not saved: two
    processes leave out the rest and the grid, save and end at once."""
    run, script = tmp_path / "run", tmp_path / "slow.py"
    script.write_text(LONG_VALIDATION)
    data = make_pictures(tmp_path / "data", 150)
    with Job(tmp_path, *TINY, "--data", data, "--text-encoder", clip, "--vae", "none", "--preset",
             "tiny", "--batch-size", 2, "--val-fraction", 0.9, "--workers", 0, "--folder", run,
             "--sample-every", 1, "--save-every", 10, script=script) as job:
        job.until(lambda: "validates" in job.text())
        assert not checkpoints(run)
        (run / "stop").touch()
        assert job.process.wait(20) == 0
    assert newest(run)["epoch"] == 1 and newest(run)["step_in_epoch"] == 0
    assert not list(run.glob("samples*")) and len(scalars(run, "epoch/loss")) == 1
    assert not scalars(run, "epoch/validation_loss")


@pytest.mark.slow
@pytest.mark.parametrize("in_pixels, channels, T", [(1, 3, 1000), (1, 1, 20), (0, 3, 1000)])
def test_own_pictures(tmp_path, photos, clip, vae, in_pixels, channels, T):
    """A captioned folder trains in pixel space, in greyscale and in a VAE's latent space: the loss
    falls; curves, sample grid and configuration are written."""
    run = train_run(
        tmp_path, *TINY, "--data", photos, "--text-encoder", clip, "--vae",
        "none" if in_pixels else vae, "--pixel-unshuffle", 4 if in_pixels else 1,
        "--image-channels", channels, "--num-train-timesteps", T, "--preset", "tiny",
        "--beta-schedule", "cosine" if T == 20 else "linear",
        "--batch-size", 8, "--epochs", 12, "--warmup-steps", 2, "--sample-every", 12,
        "--val-fraction", 0.1, "--workers", 1)
    losses = newest(run)["epoch_losses"]
    assert len(losses) == 12 and np.mean(losses[-4:]) < 0.8 * np.mean(losses[:2])
    assert Image.open(run / "samples_epoch0012.png").width > 16
    assert json.loads((run / "config.json").read_text())["model"]["image_channels"] == channels
    for tag in ("epoch/validation_loss", f"validation_by_t/{T // 5:04d}-{2 * T // 5:04d}"):
        values = list(scalars(run, tag).values())
        assert len(values) == 12 and np.isfinite(values).all()


@pytest.mark.slow
def test_training_goes_on_from_another_run(tmp_path, photos):
    """--init-from takes a greyscale run's configuration and averaged weights to other pictures: the
    first loss is that model's, the optimizer is new, and the run resumes without the first. A flag
    that contradicts, another preset and words that the vocabulary lacks are refused by name."""
    start = train_run(tmp_path, *TINY, "--data", photos, "--text-encoder", "builtin", "--preset",
                      "tiny", "--image-channels", 1, "--batch-size", 4, "--max-steps", 6,
                      "--workers", 0, "--ema-decay", 0.5, "--pixel-unshuffle", 2)
    flags = ["--data", make_pictures(tmp_path / "other", count=12, seed=1), "--batch-size", 4,
             "--image-channels", 1, "--val-fraction", 0, "--workers", 0, "--log-every", 1,
             "--device", "cpu"]
    tuned = train_run(tmp_path, *flags, "--init-from", start, "--max-steps", 2, "--lr", 1e-3)
    model, source = load_model(start), data.CaptionedImages(tmp_path / "other")
    images = np.arange(12)
    samples = Samples(image_loader(source, model.config), source.captions, images, model.config,
                      model.codec.latent_shape)
    batch = next(iter(data.make_loader(samples, GlobalOrder(images, 4))))
    expected = train.diffusion_loss(model.unet, model, batch, 5.0, 1.0).mean().item()
    assert scalars(tuned, "train/loss")[1] == pytest.approx(expected, rel=1e-4)
    assert newest(tuned)["config"] == newest(start)["config"]
    assert all(moments["step"] == 2 for moments in newest(tuned)["optimizer"]["state"].values())
    other = train.parse_args(["--init-from", str(start), "--resolution", "18"])[1]
    assert other == replace(load_model(start).config, resolution=18)   # no multiple of tiny's 4
    for more, said in (
            (["--token-length", "20"], "--token-length 20: the model to start from has 16; "),
            (["--preset", "standard"], "--preset standard: the run to start from has tiny; "),
            (["--init-unet", "x"], "argument --init-unet: not allowed with argument --init-from"),
            (["--resume", ""], "argument --resume: is empty"),
            (["--data", "shapes"], "--init-from: its text encoder lacks .* words .*background.*")):
        with pytest.raises(ValueError, match=f"^{said}"):
            train.main([*map(str, flags), "--init-from", str(start), *more])
    again = ["--init-from", f"{start}/", "--folder", tuned, "--max-steps", 3]   # a restart
    assert re.search(f"starts from  {tuned}/.*step00000002.pt", run_ok(
        "train.py", *flags, *again).stdout)
    shutil.rmtree(start)
    run_ok("train.py", "--resume", tuned, "--max-steps", 4)
    assert newest(tuned)["step"] == 4


def test_runs_are_compared_in_tensorboard(tmp_path):
    """A run's flags are hyperparameters beside its losses; what it printed at its start is text."""
    run = train_run(tmp_path, *TINY, "--max-steps", 1, "--lr", 0.5, "--adam-betas", 0.8, 0.9)
    events = EventAccumulator(str(run)).Reload()
    start, = events.Tensors("start/text_summary")
    assert "7,782 training and 410 validation images" in start.tensor_proto.string_val[0].decode()
    plugin = events.SummaryMetadata("_hparams_/session_start_info").plugin_data
    flags = HParamsPluginData.FromString(plugin.content).session_start_info.hparams
    assert flags["lr"].number_value == 0.5 and flags["adam_betas"].string_value == "[0.8, 0.9]"
    assert flags["beta_schedule"].string_value == "linear"   # the preset's
    plugin = events.SummaryMetadata("_hparams_/experiment").plugin_data
    metrics = HParamsPluginData.FromString(plugin.content).experiment.metric_infos
    assert {metric.name.tag for metric in metrics} == {"epoch/loss", "epoch/validation_loss"}


# Mistakes

NO_VAE = "--data {photos} --text-encoder {clip}"
MISTAKES = {   # what is given, and all that is said
    "--data {bad}/empty": "--data {bad}/empty: no images among 0 file.s., .*",
    "--data {bad}/not.zip": "--data {bad}/not.zip: no folder, whole .zip or .tar .*",
    "--data {photos}": r"--text-encoder (openai/[\w-]+): .*hf download \1.*",
    NO_VAE: "--vae stabilityai/sdxl-vae: .*hf download stabilityai/sdxl-vae.*",
    NO_VAE + " --vae {clip}": "--vae {clip}: is a None, not .*AutoencoderKL.*",
    NO_VAE + " --vae {vae} --resolution 31": "--resolution 31: .*multiple of 2",
    "--data {photos} --text-encoder {vae} --vae none": "--text-encoder {vae}: .*",
    "--token-length 80": "--token-length 80: must be from 16 to 77",
    "--resolution 30": "--resolution 30: must be a positive multiple of --pixel-unshuffle 4",
    "--resolution 36": "--resolution 36: the UNet halves its 9 x 9 .*multiple of 2",
    "--pixel-unshuffle 0": "--pixel-unshuffle 0: must be .*",
    "--image-channels 1 --vae a": "--image-channels 1: must be 3.* add --vae none",
    "--zero-terminal-snr --prediction-type epsilon": "--zero-terminal-snr True: .*add .*",
    "--min-snr-gamma 0.5": "--min-snr-gamma 0.5: must be at least 1.0",
    "--min-snr-gamma nan": "--min-snr-gamma nan: must be at least 1.0",
    "--min-snr-gamma 0 --snr-floor none": "--min-snr-gamma 0.0: must be at least 0.01",
    "--max-steps -1": "--max-steps -1: must be at least 1",
    "--time-limit -3": "--time-limit -3.0: must be at least 0",
    "--sample-guidance nan": "--sample-guidance nan: must be from 0 to 100",
    "--num-train-timesteps 100": "--num-train-timesteps 100: .*alpha_bar 0.36; .*cosine",
    NO_VAE + " --beta-schedule cosine": "--prediction-type epsilon: .* 2e-09; use v_pred.*",
    NO_VAE + " --beta-schedule linear --num-train-timesteps 4000": "--prediction-type .*3e-18; .*",
    "--max-grad-norm 0": "--max-grad-norm 0.0: must be at least 1e-06",
    "--ema-decay 1": "--ema-decay 1.0: must be from 0 to 0.999999",
    "--batch-size 33 --accumulation 2": "--batch-size 33: must be a multiple .* = 1 x 2; try 32",
    "--batch-size 9999": "--batch-size 9999: there are only 7782 .*use at most 7782",
    "--resume {bad}/nowhere": "checkpoint {bad}/nowhere: no such file or run folder",
    "--resume {bad}/empty": "checkpoint {bad}/empty: the folder holds no checkpoint.*",
    "--resume {bad}/junk": "checkpoint {bad}/junk: none of the 1 files can be read; .*",
    "--resume {first}": "--resume {first}: .*epoch0009_step0009.pt.*add --folder.*",
    "--resume {run} --prediction-type epsilon": "--prediction-type eps.*{run}/.* has sample.*",
    "--resume {run} --seed 5": "--seed 5: .*{run}/.* has 0.*",
    "--resume {run} --text-encoder {clip}": "--text-encoder {clip}: .* trained with builtin; .*",
    "--init-from {run} --vae {vae}": "--vae {vae}: the model was trained with none; leave .*",
    "--name a/b": "--name a/b: is part of a folder's name; no / in it",
}


@pytest.fixture(scope="module")
def places(tmp_path_factory, photos, clip, vae):
    """Folders that cannot be trained on, and a run."""
    bad = tmp_path_factory.mktemp("bad")
    (bad / "empty").mkdir()
    (bad / "not.zip").write_bytes(b"no zip at all")
    (bad / "junk").mkdir()
    (bad / "junk/checkpoint_epoch0001_step0001.pt").write_bytes(b"no checkpoint at all")
    run = train_run(bad, *TINY, "--max-steps", 1)
    _, first = load_checkpoint(run)
    shutil.copy(first, run / "checkpoint_epoch0009_step0009.pt")
    return dict(bad=bad, photos=photos, clip=clip, vae=vae, run=run, first=first)


@pytest.mark.slow
@pytest.mark.parametrize("given", MISTAKES)
@pytest.mark.filterwarnings("ignore")
def test_mistakes_name_the_flag_the_value_and_the_fix(tmp_path, places, given):
    """Each is an error of the kinds that become one line, before a run folder is made."""
    batch = [] if "--resume" in given else ["--batch-size", "8"]
    with pytest.raises((ValueError, OSError)) as caught:
        train.main([*batch, "--device", "cpu", "--runs", str(tmp_path / "runs"),
                    *given.format(**places).split()])
    assert re.fullmatch(MISTAKES[given].format(**places), str(caught.value)), str(caught.value)
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("flag, said, processes, code", [
    ("--data", "--data igloo: no such folder, .zip or .tar", 1, 2),
    ("--data", "--data igloo: no such folder, .zip or .tar", 2, 1),
    ("--dota", "unrecognized arguments: --dota igloo; train.py --help lists the flags", 2, 1)])
def test_a_mistake_is_said_once(tmp_path, flag, said, processes, code):
    """Rank 0 says it in one line, nobody hangs, and only torchrun shows a traceback."""
    done = launch("train.py", flag, "igloo", processes=processes, cwd=tmp_path, timeout=90)
    assert errors(done.stderr) == [f"error: {said}"]
    assert "usage" not in done.stderr and done.returncode == code
    assert done.stderr.count("Traceback") == processes - 1


def test_more_processes_than_gpus_are_refused(monkeypatch):
    """Two processes on a node with one GPU are told so."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^--nproc_per_node=2: only 1 GPU.*--nproc_per_node=1$"):
        data.setup_processes()


def test_a_gpu_that_pytorch_was_not_built_for_is_refused(monkeypatch):
    """A V100 with a build that begins at sm_75 is told so; an H100 with one up to sm_90a is not."""
    for name, value in (("device_count", 1), ("is_available", True), ("set_device", None),
                        ("get_arch_list", ["sm_75", "sm_80", "sm_90a", "compute_120"])):
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    with pytest.raises(ValueError, match="^--device cuda:0: is sm_70; .*sm_75 and newer.*12.6$"):
        data.setup_processes()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert data.setup_processes() == torch.device("cuda", 0)


@pytest.mark.parametrize("device, flags, said", [
    ("cuda", [], True), ("cuda", ["--compile"], False), ("cpu", [], False),
    ("cuda", ["--batch-size", "1024"], False), ("cuda", ["--batch-size", "1023"], True)])
def test_a_batch_too_small_for_a_gpu_is_named(monkeypatch, capsys, device, flags, said):
    """At the start of a run on a GPU, where kernels would be shorter than their launches."""
    args, config, *_ = train.parse_args(flags)   # a grid of 8 x 8
    model, order = Model(config), GlobalOrder(np.arange(2048), args.batch_size)
    model.device = torch.device(device)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    train.print_start(args, model, BuiltinShapes(32, 8), order, (2048, 0), "run", None, None)
    assert ("too small a batch to fill a GPU" in capsys.readouterr().out) == said

"""Training by the real script: a plain loop on any number of processes, exact resume, orderly stops
and other ways to begin, go on and end."""
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from functools import cache

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import default_collate

import data
import evaluate
import sample
import train
from conftest import Job, assert_same, checkpoints, make_pictures, newest, run_ok, scalars
from data import BuiltinShapes, GlobalOrder, Samples, image_loader
from models import PRESETS, Model, load_checkpoint, load_model, save_checkpoint, with_words
from tiny_networks import make_vae

CONFIG = replace(PRESETS["tiny"], resolution=16, builtin_words=data.VOCABULARY)
DROPOUT = "import models; models.PRESETS['tiny'].unet['dropout'] = 0.1"


def make_samples(source, model, **more):
    return Samples(image_loader(source, model.config), source.captions, np.arange(len(source)),
                   model.config, model.codec.latent_shape, **more)


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
    samples = make_samples(BuiltinShapes(16, count=2000), Model(CONFIG))
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
    for schedule, steps, expected in (
            ("constant", (0, 4, 9, 100, 199), [0.1, 0.5, 1, 1, 1]),
            ("cosine", (100, 150, 200), [0.5, (1 - 0.5**0.5) / 2, 0]),
            ("decay", (100, 160, 180, 198), [1, 1, 0.5, 0.05])):
        args = train.TrainingConfig(lr=1, warmup_steps=10, lr_schedule=schedule)
        assert [train.learning_rate(step, 200, args) for step in steps] == pytest.approx(expected)


def test_validation_by_timestep(monkeypatch):
    """Each fifth of [0, T) has the mean squared error of its own samples, found one by one, also
    where the training loss is another."""
    model, source = Model(CONFIG), BuiltinShapes(16, count=12)
    samples = make_samples(source, model, validation=True)
    batches = [default_collate([samples[0, i, i] for i in range(k, 12, 2)]) for k in range(2)]
    one_by_one = [default_collate([samples[0, i, i]]) for i in range(12)]
    t = np.array([batch["t"].item() for batch in one_by_one])
    errors = np.array([torch.nn.functional.mse_loss(*train.predict(model.unet, model, batch)).item()
                       for batch in one_by_one])
    expected = {f"validation_by_t/{low:04d}-{low + 200:04d}": errors[t // 200 == low / 200].mean()
                for low in range(0, 1000, 200)} | {"loss/validation": errors.mean()}
    monkeypatch.setattr(train, "diffusion_loss", None)
    assert train.validate(model, batches, None) == pytest.approx(expected, rel=1e-4)


@cache
def plain_loop(photos, dropout):
    """Ten updates of two micro-batches written out, one network at a time: (curves and weights, the
    first weights)."""
    source = data.CaptionedImages(photos)
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    config = replace(CONFIG, unet=CONFIG.unet | dict(dropout=dropout), builtin_words=[])
    torch.manual_seed(0)
    model = Model(with_words(config, source.texts))
    order = GlobalOrder(data.split_images(source, 0.1)[0], 8, accumulation=2)
    start = {name: p.detach().clone() for name, p in model.unet.named_parameters()}
    ema, losses, norms = {name: p.clone() for name, p in start.items()}, {}, {}
    optimizer = torch.optim.AdamW(model.unet.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
    batches, seeds, samples = [], set(), make_samples(source, model)
    for epoch in range(5):
        order.start_at(epoch, 0)
        batches += order
    for step in range(1, 11):
        losses[step] = 0
        for micro in range(2):
            keys, seed = batches.pop(0), order.dropout_seed(step - 1, micro)
            seeds.add(seed)
            batch = default_collate([samples[key] for key in keys])
            pictures = torch.tensor(np.stack([source.image(i, 3, 16) for *_, i in keys]))
            x_0 = torch.pixel_unshuffle(pictures.permute(0, 3, 1, 2) / 127.5 - 1, 2)
            x_t = scheduler.add_noise(x_0, batch["eps"], batch["t"])
            tokens = model.text_encoder.tokenizer(batch["caption"], padding="max_length",
                                                  max_length=16).input_ids
            text_emb = model.text_encoder.clip(torch.tensor(tokens)).last_hidden_state
            torch.manual_seed(seed)
            output = model.unet(x_t, batch["t"], text_emb, class_labels=text_emb.mean(1)).sample
            alpha_bar_t = scheduler.alphas_cumprod[batch["t"]]
            snr = alpha_bar_t / (1 - alpha_bar_t)
            loss = (snr.clamp(1, 5) * (output - x_0).square().mean((1, 2, 3))).mean() / 2
            loss.backward()
            losses[step] += loss.item()
        norms[step] = torch.nn.utils.clip_grad_norm_(model.unet.parameters(), 1.0).item()
        optimizer.param_groups[0]["lr"] = 1e-3 * step / 100
        optimizer.step()
        optimizer.zero_grad()
        for name, p in model.unet.named_parameters():
            ema[name] += (1 - min(0.3, (1 + step) / (10 + step))) * (p.detach() - ema[name])
    assert len(seeds) == 20   # no two masks are the same
    return {"loss/train": losses, "train/grad_norm": norms, "unet": model.unet.state_dict(),
            "ema": ema}, start


@pytest.mark.slow
@pytest.mark.parametrize("dropout, processes, more, tolerance", [
    (0, 1, [], 1e-4), (0, 1, ["--accumulation", 4], 1e-4), (0, 2, ["--accumulation", 2], 1e-4),
    (0, 1, ["--compile"], 1e-4), (0, 1, ["--amp", "bf16"], 0.01), (0.1, 2, [], 1e-4),
    (0.1, 1, ["--accumulation", 2], 1e-4),
    (0.1, 1, ["--accumulation", 2, "--gradient-checkpointing"], 1e-4)])
def test_a_run_is_a_plain_loop(tmp_path, photos, flags, dropout, processes, more, tolerance):
    """Losses, gradients and weights are those of Ho et al. 2020 with diffusers' schedule, for any
    number of processes and micro-batches, with switches, and with dropout, whose masks no two
    micro-batches share."""
    run_ok("train.py", *flags, "--epochs", 1000, "--max-steps", 10, "--ema-decay", 0.3,
           "--warmup-steps", 100, *more, "--folder", tmp_path / "run", processes=processes,
           patch=DROPOUT if dropout else "")
    (expected, start), ours = plain_loop(photos, dropout), newest(tmp_path / "run")
    for tag, rel in (("loss/train", tolerance), ("train/grad_norm", 10 * tolerance)):
        assert scalars(tmp_path / "run", tag) == pytest.approx(expected[tag], rel=rel)
    for key in ("unet", "ema"):
        assert ours[key].keys() == start.keys()
        a, b, first = (torch.cat([weights[name].flatten() for name in start])
                       for weights in (ours[key], expected[key], start))
        apart = (a - b).norm() / (b - first).norm()
        assert apart < 100 * tolerance
        assert (apart > 3e-4) == (tolerance > 1e-4), "bfloat16 rounds, nothing else does"


# Stopping and going on


@pytest.mark.slow
@pytest.mark.parametrize("processes, is_old", [(1, False), (2, False), (1, True)])
def test_resume_is_exact(tmp_path, photos, flags, clip, vae, processes, is_old):
    """Stopped in mid-epoch and resumed, a run with loader workers and dropout ends in the same
    state and curves, bit for bit, with each point once, also where it had gone on before; its
    checkpoint may be an old version's. Captions that have changed are noticed."""
    captions = shutil.copytree(photos, tmp_path / "data") / "captions.txt"
    flags = [*flags, "--data", tmp_path / "data", "--text-encoder", clip, "--vae", vae, "--flip",
             "--pixel-unshuffle", 1, "--batch-size", 4, "--epochs", 4, "--workers", 1,
             "--log-every", 3, "--folder"]
    whole, stopped, how = tmp_path / "whole", tmp_path / "stopped", dict(processes=processes)
    run_ok("train.py", *flags, whole, patch=DROPOUT, **how)
    run_ok("train.py", *flags, stopped, "--max-steps", 8, patch=DROPOUT, **how)
    state = newest(stopped)
    assert (state["step"], state["epoch"], state["step_in_epoch"]) == (8, 1, 3)
    if is_old:   # as commit 7c2b5c5 wrote it
        payload, path = load_checkpoint(stopped)
        payload["args"] |= dict(keep_every=0, bf16_gradients=False, init_unet=None, name="a",
                                random_crop=False, sample_guidance=2.0, beta_schedule=None)
        save_checkpoint(payload, path)
        run_ok("sample.py", "--checkpoint", stopped, "--prompts", "a dog", "--steps", 2)
    else:
        run_ok("train.py", "--resume", stopped, "--max-steps", 13, **how)
        for path in checkpoints(stopped)[1:]:
            path.unlink()
    done = run_ok("train.py", "--resume", stopped, **how)
    assert "step00000008.pt" in done.stdout and "--data" not in done.stderr
    a, b = newest(whole), newest(stopped)
    assert a["step"] == 20 and len(a["epoch_losses"]) == 4 and a["config"]["unet"]["dropout"]
    for key in ("step", "unet", "ema", "optimizer", "scaler", "epoch_losses"):
        assert_same(a[key], b[key])
    for tag in ("loss/train", "train/grad_norm", "loss/epoch", "loss/validation"):
        assert scalars(whole, tag) == scalars(stopped, tag)
    captions.write_text(captions.read_text().replace("dog", "cat", 1))
    assert "warning: --data" in run_ok("train.py", "--resume", stopped).stderr


@pytest.mark.slow
def test_frozen_networks_that_have_moved(tmp_path, flags, clip, vae):
    """A run whose VAE and text encoder are elsewhere now goes on, is sampled and judged when told
    where; other weights at that place are refused by all three."""
    old, new, run = tmp_path / "old", tmp_path / "new", tmp_path / "run"
    shutil.copytree(clip, old / "clip")
    shutil.copytree(vae, old / "vae")
    train.main([*flags, "--text-encoder", old / "clip", "--vae", old / "vae", "--pixel-unshuffle",
                1, "--max-steps", 1, "--folder", run])
    old.rename(new)
    with pytest.raises(OSError, match=f"--text-encoder {old}"):
        train.main(["--resume", run, "--max-steps", 2])
    moved = ["--text-encoder", str(new / "clip"), "--vae", str(new / "vae")]
    ways = [(train.main, ["--resume", run, "--max-steps", 2, *moved]),
            (sample.main, ["--checkpoint", str(run), "--prompts", "a", "--steps", "1", *moved]),
            (evaluate.main, ["--checkpoint", str(run), "--metrics", "clip", *moved])]
    for main, way in ways[:2]:
        main(way)
    train.main(["--resume", run, "--max-steps", 3])
    assert newest(run)["step"] == 3
    make_vae(new / "vae", layers=2)
    for main, way in ways:
        with pytest.raises(ValueError, match=f"--vae {new}/vae: .*other weights"):
            main(way)


def test_a_state_moves_between_kinds_of_devices(tmp_path):
    """What a GPU saved goes on elsewhere: Adam's moments take the weights' layout, so that the next
    update is bit for bit; float16 begins with its own scale; a new weight decay counts. Parameters
    are averaged, while buffers are the trained network's own in the average too."""
    args = train.TrainingConfig(lr=0.1, epochs=1, batch_size=1)

    def make(layout=torch.contiguous_format, dtype=None):
        torch.manual_seed(0)
        unet = torch.nn.Sequential(torch.nn.Conv2d(8, 4, 3), torch.nn.BatchNorm2d(4))
        return train.TrainingState(unet.to(memory_format=layout), args, torch.device("cpu"), dtype)

    def update(*states):
        for state in states:
            torch.manual_seed(state.step)
            for p in state.weights:
                p.grad = torch.empty_like(p).copy_(torch.randn(p.shape))
            state.optimizer.step()
            state.unet(torch.randn(4, 8, 5, 5) + 5)
            train.update_ema(state.averages, state.weights, state.step, 0.5)
            state.step += 1

    gpu, cpu = make(torch.channels_last), make()
    update(gpu, cpu)
    gpu.save(tmp_path, 1, config=vars(CONFIG), train_images=1, fingerprint="", args=vars(args))
    args.weight_decay = 0.5
    moved = make(dtype=torch.float16)
    with pytest.warns(UserWarning, match="--data"):
        moved.restore(newest(tmp_path), args, BuiltinShapes, [0])
    assert_same(moved.unet.state_dict(), gpu.unet.state_dict())
    assert_same(moved.ema.state_dict(), gpu.ema.state_dict())
    assert torch.equal(gpu.ema[1].running_mean, gpu.unet[1].running_mean)
    group = moved.optimizer.param_groups[0]
    assert moved.scaler.get_scale() == 65536 and group["weight_decay"] == 0.5
    group["weight_decay"] = 0.01
    update(moved, cpu)
    assert_same(moved.weights, cpu.weights)


SLOW_VALIDATION = """
def slow(unet, *args, predict=train.predict):
    if not unet.training:
        os.write(1, b"validates\\n")
        open(os.environ["STOP"], "w").close()
        time.sleep(float(os.environ["SECONDS"]))
    return predict(unet, *args)

train.predict = slow
"""


@pytest.mark.slow
@pytest.mark.parametrize("processes, seconds", [(1, 1), (2, 35)])
def test_a_signal_saves_and_stops(tmp_path, flags, processes, seconds):
    """SIGUSR2 to a process and its loader workers, or SIGTERM to torchrun, in a validation of any
    length ends the run and its workers in order, with a checkpoint from which it goes on."""
    run, env = tmp_path / "run", dict(TORCH_ELASTIC_SHUTDOWN_TIMEOUT="300", STOP="/dev/null")
    env["SECONDS"] = str(seconds)
    with Job(tmp_path, *flags, "--workers", 1, "--folder", run, processes=processes, env=env,
             patch=SLOW_VALIDATION) as job:
        job.until(lambda: job.text().count("validates") == processes)
        assert newest(run)["epoch"] == 1
        send, number = (os.killpg, signal.SIGUSR2) if processes == 1 else (os.kill, signal.SIGTERM)
        send(job.process.pid, number)
        job.process.wait(seconds + 120)
        text = job.text()
    step = newest(run)["step"]
    assert f"stopped after {step} steps; go on with --resume {run}\n" in text
    # torchrun ends with a traceback of its own, the ranks with none.
    assert "error: " not in text and text.count("Traceback") == processes - 1, text
    train.main(["--resume", run, "--max-steps", step + 2])
    assert newest(run)["step"] == step + 2


def test_in_a_notebook(tmp_path, flags, monkeypatch):
    """train.main takes paths and numbers, is stopped by each signal after the update that is under
    way, returns the run's folder, from which it goes on, and gives the signals back."""
    monkeypatch.setattr(train, "update_ema", lambda *_: os.kill(os.getpid(), number))
    before, start = [*map(signal.getsignal, data.SIGNALS)], [*flags, "--runs", tmp_path]
    for step, number in enumerate(data.SIGNALS, 1):
        run = train.main(start)
        assert newest(run)["step"] == step
        start = ["--resume", run]
    assert [*map(signal.getsignal, data.SIGNALS)] == before and signal.SIGUSR2 in data.SIGNALS


def test_a_stop_that_is_there_before_the_start(tmp_path, flags, monkeypatch):
    """A file `stop` stops the run after an update, and stays. --resume goes on all the same; and
    --folder does where the file is that of a finished run. A time limit of 0 and the end of a Slurm
    job stop it as well."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "stop").touch()
    train.main([*flags, "--folder", run])
    assert newest(run)["step"] == 1 and (run / "stop").exists()
    for more, step in ((["--resume", run, "--max-steps", 5], 5),
                       (["--folder", run, "--max-steps", 6], 6),
                       (["--folder", run, "--time-limit", 0], 7), (["--folder", run], 8)):
        if step == 8:
            monkeypatch.setenv("SLURM_JOB_END_TIME", str(time.time()))
        train.main(more)
        assert newest(run)["step"] == step


@pytest.mark.slow
def test_a_stop_leaves_out_validation_and_grid(tmp_path, flags):
    """A file `stop` seen in a long validation, after an epoch that is not saved: two processes
    leave out the rest and the grid, save and end at once."""
    run, many = tmp_path / "run", make_pictures(tmp_path / "data", 150)
    done = run_ok("train.py", *flags, "--data", many, "--batch-size", 2, "--val-fraction", 0.9,
                  "--folder", "run", "--sample-every", 1, "--save-every", 10, processes=2,
                  cwd=tmp_path, patch=SLOW_VALIDATION, env=dict(STOP="run/stop", SECONDS="0.5"))
    assert 1 <= done.stdout.count("validates") <= 6
    path, = checkpoints(run)
    assert newest(path)["epoch"] == 1 and newest(path)["step_in_epoch"] == 0
    assert not list(run.glob("samples*")) and len(scalars(run, "loss/epoch")) == 1
    assert not scalars(run, "loss/validation")


# Other data, other beginnings


@pytest.mark.slow
@pytest.mark.parametrize("flag, value, T", [
    ("--image-channels", 3, 1000), ("--image-channels", 1, 20), ("--vae", None, 1000)])
def test_own_pictures(tmp_path, flags, clip, vae, flag, value, T):
    """A captioned folder trains in pixel space, in greyscale and in a VAE's latent space: the loss
    falls; curves, sample grid and configuration are written."""
    run = train.main([
        *flags, "--text-encoder", clip, flag, value or vae, "--pixel-unshuffle", 4 if value else 1,
        "--num-train-timesteps", T, "--beta-schedule", "cosine" if T == 20 else "linear",
        "--epochs", 12, "--sample-every", 12, "--workers", 1, "--runs", tmp_path])
    losses = newest(run)["epoch_losses"]
    assert len(losses) == 12 and np.mean(losses[-4:]) < 0.8 * np.mean(losses[:2])
    assert Image.open(run / "samples_epoch0012.png").width > 16
    assert json.loads((run / "config.json").read_text())["model"][flag[2:].replace("-", "_")]
    values = [*scalars(run, f"validation_by_t/{T // 5:04d}-{2 * T // 5:04d}").values()]
    assert len(values) == 12 and np.isfinite(values).all()


@pytest.mark.slow
def test_training_goes_on_from_another_run(tmp_path, flags):
    """--init-from takes a greyscale run's configuration and averaged weights to other pictures: the
    first loss is that model's, the optimizer is new, other flags are as usual, a restart goes on
    with the new run, and that needs the first no more."""
    start, run, other = tmp_path / "start", tmp_path / "run", tmp_path / "other"
    train.main([*flags, "--image-channels", 1, "--max-steps", 6, "--ema-decay", 0.5,
                "--pixel-unshuffle", 2, "--folder", start])
    flags = [*flags, "--data", make_pictures(other, count=12, seed=1), "--batch-size", 4,
             "--val-fraction", 0, "--lr", 1e-3, "--folder", run, "--init-from", start]
    train.main([*flags, "--max-steps", 2])
    model = load_model(start)
    samples = make_samples(data.CaptionedImages(other), model)
    batch = next(iter(data.make_loader(samples, GlobalOrder(np.arange(12), 4))))
    expected = train.diffusion_loss(model.unet, model, batch, 5.0, 1.0).mean().item()
    assert scalars(run, "loss/train")[1] == pytest.approx(expected, rel=1e-4)
    assert newest(run)["config"] == newest(start)["config"]
    assert all(moments["step"] == 2 for moments in newest(run)["optimizer"]["state"].values())
    given = train.parse_flags(["--init-from", start, "--resolution", 18])
    assert train.settle(given)[1] == replace(model.config, resolution=18)   # no multiple of 4
    train.main([*flags, "--max-steps", 3])
    shutil.rmtree(start)
    train.main(["--resume", run, "--max-steps", 4])
    assert newest(run)["step"] == 4

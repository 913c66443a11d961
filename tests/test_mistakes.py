"""A user's mistake is one line that names the flag, and exit code 2, before anything is made."""
import os
import shutil
import warnings
from functools import partial

import pytest
import torch

import data
import evaluate
import sample
import train
from conftest import TINY, Job, errors
from models import load_checkpoint

MAIN = dict(train=train.main, sample=sample.main, evaluate=evaluate.main)
OWN = "train --batch-size 8 --data {photos} "
DRAW, JUDGE = "sample --checkpoint {run} --prompts a ", "evaluate --checkpoint {run} "
# What is given, and what the line names: here the flag that has the wrong value ...
VALUES = {
    "train ": "data igloo, data {bad}/empty, data {bad}/not.zip, captions igloo --data {photos}, "
    "val-fraction 1, max-bad-images 2, workers -1, preset big, epochs 0, lr -1, "
    "batch-size 0, batch-size 9999, accumulation 0, accumulation 7, lr nan, warmup-steps -1, "
    "lr-schedule linear, adam-betas 1 2, weight-decay -1, max-grad-norm 0, min-snr-gamma 0.5, "
    "min-snr-gamma nan, snr-floor -1, ema-decay 1, seed -1, seed 0.5, amp 8, device cuda, "
    "max-steps 0, time-limit -3, save-every 0, save-minutes nan, keep-last 0, "
    "sample-every -1, log-every 0, resolution 30, resolution 31, image-channels 2, caption-dropout "
    "2, token-length 80, pixel-unshuffle 0, beta-schedule flat, "
    "text-encoder {vae}, prediction-type x, zero-terminal-snr --prediction-type epsilon, "
    "num-train-timesteps 9 --beta-schedule linear, cache-latents, dota 1",
    DRAW: "steps 0, steps 1001, images-per-prompt 0, guidance-scale -1, guidance-scales 1 1e9, "
    "guidance-rescale 2, eta 2, eta 0.5 --sampler ddpm, sampler euler, seed -1, batch-size 0, "
    "weights best, vae {vae}, device cuda, export {bad}/x, output {bad}/old",
    JUDGE: "num-images 1, guidance-scales -1, steps 0, metrics fid --num-images 100, data no, "
    "metrics clips, inception-layer 7, reference none, val-fraction 2, metrics accuracy --data "
    "{photos}, inception-weights {bad}/not.zip --metrics fid, clip-model no --metrics clip"}
MISTAKES = {f"{given}--{value}": f"--{value.split()[0]}" for given, values in VALUES.items()
            for value in values.split(", ")} | {   # ... and here another one
    OWN: "--text-encoder", OWN + "--text-encoder {clip}": "--vae",
    OWN + "--text-encoder {clip} --vae {clip}": "--vae",
    OWN + "--text-encoder {clip} --vae {vae} --resolution 31": "--resolution",
    OWN + "--beta-schedule cosine": "--prediction-type", OWN + "--resume {run}": "--batch-size",
    "train --image-channels 1 --vae a": "--vae none", "train --folder {bad}/not.zip": "not.zip",
    "train --resume {bad}/nowhere": "{bad}/nowhere", "train --resume {bad}/empty": "{bad}/empty",
    "train --resume {bad}/junk": "{bad}/junk", "train --resume {first}": "--resume",
    "train --resume {run} --prediction-type epsilon": "--prediction-type",
    "train --resume {run} --seed 5": "--seed", "train --init-from igloo": "igloo",
    "train --resume {run} --text-encoder {clip}": "--text-encoder",
    "train --init-from {run} --preset standard": "--preset",
    "train --init-from {run} --token-length 20": "--token-length",
    "train --init-from {run} --vae {vae}": "--vae",
    "train --init-from {run} --data {photos}": "--init-from",
    "sample --prompts a": "--checkpoint", "sample --checkpoint {run}": "--prompts",
    "sample --checkpoint {bad}/empty --prompts a": "{bad}/empty", DRAW + "--prompt-file no": "'no'",
    "evaluate --metrics fid": "--checkpoint", "evaluate --checkpoint {bad}/diverged": "--amp"}


@pytest.fixture(scope="module")
def places(tmp_path_factory, photos, clip, vae):
    """Folders that cannot be trained on, and a run."""
    bad = tmp_path_factory.mktemp("bad")
    for name in ("empty", "junk", "old"):
        (bad / name).mkdir()
    for name in ("not.zip", "junk/checkpoint_epoch0001_step0001.pt", "old/00000.png"):
        (bad / name).write_bytes(b"no zip, no checkpoint and no picture at all")
    run = train.main([*TINY, "--max-steps", 1, "--folder", bad / "run"])
    payload, first = load_checkpoint(run)
    shutil.copy(first, run / "checkpoint_epoch0009_step0009.pt")
    payload["ema"] = {name: value * torch.nan for name, value in payload["ema"].items()}
    torch.save(payload, bad / "diverged")
    return dict(bad=bad, photos=photos, clip=clip, vae=vae, run=run, first=first)


@pytest.mark.slow
@pytest.mark.parametrize("given", MISTAKES)
def test_a_mistake_is_one_line_that_names_the_flag(tmp_path, places, monkeypatch, capsys, given):
    """Each ends its script with exit code 2 and one line, and leaves nothing behind."""
    script, *flags = given.format(**places).split()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(warnings, "showwarning", None)   # run_main's own, to be given back
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail(f"exit code {code}", False))
    with pytest.raises(pytest.fail.Exception, match="^exit code 2$"):
        data.run_main(partial(MAIN[script], ["--device", "cpu", *flags]))
    line, = errors(capsys.readouterr().err)
    assert MISTAKES[given].format(**places) in line, line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("flag, processes", [("--data", 1), ("--data", 2), ("--dota", 2)])
def test_a_mistake_is_said_once(tmp_path, flag, processes):
    """Rank 0 says it in one line, nobody hangs, and only torchrun shows a traceback."""
    with Job(tmp_path, flag, "igloo", processes=processes) as job:
        assert job.process.wait(90) == (2 if processes == 1 else 1)
        said, = errors(job.text())
    assert flag in said and "usage" not in job.text()
    assert job.text().count("Traceback") == processes - 1


def test_mistakes_of_torchruns_flags(monkeypatch):
    """--nproc_per_node is refused where there are fewer GPUs."""
    for name, value in (("device_count", 1), ("is_available", True)):
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="--nproc_per_node"):
        data.setup_processes()

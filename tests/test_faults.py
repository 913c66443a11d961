"""Faults made on purpose: disks, numbers, bad pictures, lost and stopped processes, hostile files.
"""
import errno
import os
import pickle
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugin_util import markdown_to_safe_html

import evaluate
import train
from conftest import (
    TINY,
    Job,
    checkpoints,
    command_line,
    errors,
    launch,
    make_pictures,
    newest,
    run_ok,
    scalars,
)
from data import PLACE, CaptionedImages, UnreadableImage, first_readable, image_loader
from models import (
    ModelConfig,
    load_checkpoint,
    prune_checkpoints,
    save_checkpoint,
    write_atomically,
)

W = torch.arange(300.0)


@pytest.fixture(scope="module")
def flags(photos, clip):
    """A run on two dozen pictures, two steps an epoch."""
    return [*TINY, "--data", photos, "--text-encoder", clip, "--preset", "tiny", "--workers", 0,
            "--batch-size", 8, "--val-fraction", 0.1]


def new_state(dtype=None):
    args = train.make_parser().parse_args(["--lr", "0.1"])
    return train.TrainingState(torch.nn.Linear(3, 3), args, torch.device("cpu"), dtype)


# Checkpoints


def write(folder, step=0):
    """A checkpoint with the weights W; returns its path."""
    path = folder / f"checkpoint_epoch{step:04d}_step{step:08d}.pt"
    save_checkpoint(dict(unet={"w": W}, ema={}, config={}, step=step, epoch=step), path)
    return path


def test_a_damaged_checkpoint_is_skipped_with_its_name_and_reason(tmp_path):
    """The newest checkpoint with a flipped bit, and the one before it cut short, are named with the
    reason, and the one before them is taken."""
    paths = [write(tmp_path, step) for step in range(3)]
    content = bytearray(paths[2].read_bytes())
    content[content.index(W.numpy().tobytes()) + 4] ^= 1
    paths[2].write_bytes(content)
    os.truncate(paths[1], paths[1].stat().st_size - 200)
    with pytest.warns(UserWarning) as told:
        assert load_checkpoint(tmp_path)[1] == paths[0]
    for path, reason, said in zip(paths[:0:-1], ("data/0' have changed", "BadZipFile"), told):
        assert re.fullmatch(rf"checkpoint {path}: cannot be read \([^\n]*{reason}[^\n]*\); trying "
                            "the one before it", str(said.message))


def test_a_file_that_reads_back_wrong_never_gets_its_name(tmp_path, monkeypatch):
    """Where the disk keeps other bytes than were written, the file of that name stays as it was."""
    path = write(tmp_path)
    good = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda number: os.pwrite(number, b"\xff" * 600, 1000))
    with pytest.raises(OSError, match="^the bytes of '.+' have changed since they were written$"):
        write(tmp_path)
    assert path.read_bytes() == good and os.listdir(tmp_path) == [path.name]


def test_pruning(tmp_path):
    """The newest K stay and the first of every M-th epoch, files that are none of ours stay, and so
    do those newer than the one just written: a run may go on from an older one."""
    others = {"checkpoint_best.pt", "checkpoint_epoch0001_step00000010_copy.pt"}
    names = [f"checkpoint_epoch{e:04d}_step{10 * e + s:08d}.pt" for e in range(9) for s in (0, 5)]
    for name in [*names, *others]:
        (tmp_path / name).touch()
    prune_checkpoints(tmp_path / "checkpoint_epoch0007_step00000075.pt", keep_last=3, keep_every=2)
    left = {int(name[-7:-3]) for name in set(os.listdir(tmp_path)) - others}
    assert left == {85, 80, 75, 70, 65, 60, 40, 20} and len(os.listdir(tmp_path)) == 10


@pytest.mark.slow
def test_a_second_job_is_refused_and_leftovers_go(tmp_path):
    """While one process holds a run folder another is refused in one line; a SIGKILL frees it,
    though a child that the process had forked lives on; what it left half-written is removed."""
    script, run = tmp_path / "hold.py", tmp_path / "run"
    script.write_text("import os, pathlib, time, train\n_ = train.take_over(pathlib.Path('run'))\n"
                      "os.fork() or time.sleep(15) or os._exit(0)\n"
                      "print('held', flush=True)\ntime.sleep(60)")
    run.mkdir()
    with Job(tmp_path, script=script, processes=1) as job:
        job.until(lambda: "held" in job.text())
        with pytest.raises(ValueError, match=f"^--folder {run}: another job is training .+$"):
            train.take_over(run)
    (run / ".checkpoint_epoch0001_step00000001.pt.tmp").touch()
    train.take_over(run)
    assert os.listdir(run) == [".lock"]


def test_the_last_save_is_tried_again_and_then_fails(tmp_path, monkeypatch):
    """A save on a full device is said and survived; at the end of a run it is tried seven times,
    over a minute, and then fails in one line; nothing half-written is left."""
    slept, full = [], os.open("/dev/full", os.O_WRONLY)
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(torch, "save", lambda payload, file: os.write(full, b"x"))
    state = new_state()
    state.step = 1
    with pytest.warns(UserWarning, match=rf"^checkpoint {tmp_path}/\S+_step00000001\.pt could not "
                      r"be written \(.*No space left.*\); training goes on$"):
        state.save(tmp_path)
        with pytest.raises(OSError, match=f"^step 1: not saved in 7 tries; make room.+{tmp_path}"):
            state.save(tmp_path, tries=7)
    assert sum(slept) == 60 and not os.listdir(tmp_path)


def test_a_full_disk_drops_older_checkpoints(tmp_path, monkeypatch):
    """On a disk with room for two files a new checkpoint takes the place of the older ones: the
    newest good one stays, a damaged one newer than that does not count, and every fourth epoch's is
    kept."""
    paths = [write(tmp_path, step) for step in range(1, 7)]
    os.truncate(paths[5], 100)
    size, real_save = paths[0].stat().st_size, torch.save

    def save(payload, file):
        if sum(path.stat().st_size for path in checkpoints(tmp_path)) > 3 * size:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_save(payload, file)

    monkeypatch.setattr(torch, "save", save)
    state = new_state()
    state.epoch = state.step = 7
    with pytest.warns(UserWarning, match="step00000006.pt: cannot be read"):
        state.save(tmp_path, keep=(6, 4), config=asdict(ModelConfig()))
    left = [int(path.stem[-8:]) for path in checkpoints(tmp_path)]
    assert left == [4, 5, 6, 7] and load_checkpoint(tmp_path)[0]["step"] == 7


def test_a_file_on_a_full_disk_is_named(tmp_path):
    """Where numpy says only how many bytes it could not write."""
    def write(file):
        raise OSError("86930 requested and 65408 written")

    path = tmp_path / "latents_00000.npy"
    with pytest.raises(OSError, match=f"disk full. 86930 requested and 65408 written: '{path}'$"):
        write_atomically(path, write)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_disk_full_then_read_only_then_folder_removed(tmp_path, flags):
    """On a small file system that fills up, turns read-only and loses the run folder, a run goes
    on, says each fault, keeps the last good checkpoint, saves again when it can, and finishes."""
    run, gone = tmp_path / "disk" / "run", tmp_path / "disk" / "gone"

    def shell(command):
        return subprocess.run(command, shell=True, cwd=tmp_path, timeout=20).returncode

    if shell("mkdir disk view; mount -t tmpfs -o size=250m tmpfs disk"):
        pytest.skip("mounting is not allowed here")
    # Read-only is a view laid over the folder: remounting is refused while a file is being written.
    read_only = "mount -B disk/run view; mount -o remount,bind,ro view; mount -B view disk/run"
    faults = {"No space left": ("cat /dev/zero > disk/filler", "rm disk/filler"),
              "Read-only": (read_only, "umount -l disk/run view"),
              "epoch": ("mv disk/run disk/gone", "")}
    try:
        with Job(tmp_path, *flags, "--epochs", 1000, "--keep-last", 1, "--folder", run,
                 processes=1) as job:
            job.until(lambda: checkpoints(run))
            for message, (fault, repair) in faults.items():
                shell(fault)
                job.until(lambda: message in job.text())
                assert newest(gone if gone.exists() else run)["step"] > 0
                shell(repair)
                last = checkpoints(run)[-1:]
                job.until(lambda: checkpoints(run)[-1:] > last)
            job.process.send_signal(signal.SIGTERM)
            assert job.process.wait(60) == 0, job.text()[-4000:]
            assert "could not be written" in job.text() and "Traceback" not in job.text()
        assert newest(run)["step"] > newest(gone)["step"] and not list(run.glob(".*.tmp"))
        for path in [*checkpoints(run), *checkpoints(gone)]:
            load_checkpoint(path)
    finally:
        shell("umount -l disk")


# Numbers

PATCHED = """
import copy, os, time, zlib, sample, torch, train
from data import run_main

rank, fault, calls = int(os.environ["RANK"]), os.environ["FAULT"], []
real_loss, real_count = train.diffusion_loss, train.TrainingState.count_update
if fault == "late":   # rank 1 comes back after rank 0
    time.sleep(4 * rank * int(os.environ["TORCHELASTIC_RESTART_COUNT"]))

def loss(unet, *args):
    errors = real_loss(unet, *args)
    if fault == ("a step" if unet.training else "validation") and rank == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
    if unet.training and fault == "numbers" and rank == 1:
        calls.append(None)
        factor = torch.nan if len(calls) == 3 or len(calls) > 11 else 1
        more = torch.inf if len(calls) == 5 else 0   # its gradients are finite
        errors = factor * errors + more
    return errors

def count_update(state, loss, norm):
    real_count(state, loss, norm)
    weights = b"".join(p.detach().numpy().tobytes() for p in state.unet.parameters())
    moments = [x for of_one in state.optimizer.state.values() for x in of_one.values()]
    finite = all(x.isfinite().all() for x in [*moments, *state.ema.parameters()])
    # In one write: torchrun's processes are unbuffered, and share the file.
    print(f"rank {rank}: {state.step} {zlib.crc32(weights)} {finite} {loss.item()}\\n", end="")
    if fault == "drift" and rank == 1 and state.step == 7:
        next(state.unet.parameters()).data.view(-1)[0] += 1e-6
    if fault == "slow" and state.step == 4:
        print("slow", flush=True)
        time.sleep(10)

def generate(*args, **how):
    assert how["batch_size"] == 4   # of the micro-batch
    if fault == "samples" and rank == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB.")
    if fault == "pictures" and rank == 1:
        args[0].schedule = copy.copy(args[0].schedule)
        args[0].schedule.predict_x0 = lambda output, x_t, t: output * torch.nan
    return real_generate(*args, **how)

real_generate, sample.generate = sample.generate, generate
train.diffusion_loss, train.TrainingState.count_update = loss, count_update
run_main(train.main)
"""


@pytest.fixture
def patched_run(tmp_path, flags):
    """patched_run(fault, *more flags): a Job of two processes, with that fault."""
    def start(fault, *more, torchrun=(), **env):
        (tmp_path / "patched.py").write_text(PATCHED)
        return Job(tmp_path, *flags, "--folder", "run", *more, script=tmp_path / "patched.py",
                   torchrun=torchrun, env=dict(env, FAULT=fault))
    return start


@pytest.mark.slow
def test_bad_updates_are_skipped_by_all_and_too_many_end_the_run(tmp_path, patched_run):
    """A NaN on one rank, and an infinite loss with finite gradients, are skipped by both ranks:
    weights stay bit for bit, moments, EMA and mean losses stay finite, each log interval says how
    many; after 20 updates without a finite one the run ends and names the last checkpoint."""
    with patched_run("numbers", "--batch-size", 2, "--epochs", 9, "--log-every", 4) as job:
        assert job.process.wait(150) != 0
        text = job.text()
    rows = re.findall(r"rank (\d): (\d+) (\d+) True (\S+)", text)
    bad = [3, 5, *range(12, 33)]   # 11 steps an epoch; an epoch's end ends a log interval
    for rank in "01":
        weights = [bits for of, _, bits, _ in rows if of == rank]
        assert len(weights) == 32, text[-4000:]
        assert [k for k in range(2, 33) if weights[k - 1] == weights[k - 2]] == bad
    assert re.findall(r"warning: (\d of \d updates up to step \d+) skipped: .+", text) == [
        f"{k} of {n} updates up to step {step}" for k, n, step in zip(
            (1, 1, 1, 4, 4, 2, 2, 4), (4, 4, 1, 4, 4, 2, 2, 4), (4, 8, 12, 16, 20, 22, 24, 28))]
    error, = errors(text)
    assert re.fullmatch("error: .* 21 updates.* up to step 32; the last .*checkpoint is run/"
                        r"checkpoint_epoch0002_step00000022\.pt; try .*--lr or --amp off", error)

    def mean(last):   # of the updates that were made
        made = [float(loss) for _, k, _, loss in rows if int(k) <= last and int(k) not in bad]
        return pytest.approx(np.mean(made), rel=1e-6)

    assert scalars(tmp_path / "run", "train/loss")[4] == mean(4)
    first, second = newest(tmp_path / "run")["epoch_losses"]
    assert first == mean(11) and np.isnan(second)


def test_float16_skips_in_silence_until_there_are_too_many(tmp_path, capsys):
    """The float16 scaler's skips are part of its work, but 20 in a row end the run all the same."""
    state, bad = new_state(torch.float16), torch.tensor(torch.nan).double()
    log = train.StepLog(None, tmp_path, 4, state)
    with pytest.raises(ValueError, match="^no finite .* 20 updates.* step 20; .* is none; try .+$"):
        for _ in range(20):
            state.count_update(bad, bad)
            log.report(state, 0.1)
    assert state.step == 20 and capsys.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("what", ["validation", "samples", "pictures", "a step"])
def test_out_of_memory(tmp_path, patched_run, what):
    """One of two ranks runs out of memory. In validation or as it draws, both go on after one
    warning, also where pictures are not finite; in a step the run ends with a line that says where
    and names the flags."""
    with patched_run(what, "--epochs", 2, "--sample-every", 1) as job:
        code = job.process.wait(150)
        text = job.text()
    if what == "a step":
        assert code and re.search("error: rank 1 in main: OutOfMemoryError: CUDA out of memory.*; "
                                  ".*--batch-size.*--accumulation.*--gradient-check", text), text
        return
    assert code == 0 and newest(tmp_path / "run")["epoch"] == 2, text[-4000:]
    reason = "--amp off: pictures" if what == "pictures" else "CUDA out of memory."
    assert text.count(f"warning: validation or samples left out ({reason}") == 1
    assert len(scalars(tmp_path / "run", "epoch/loss")) == 2
    validated = scalars(tmp_path / "run", "epoch/validation_loss")
    assert len(validated) == (0 if what == "validation" else 2)
    assert not list((tmp_path / "run").glob("samples*"))


@pytest.mark.slow
def test_ranks_that_drift_apart_are_noticed(tmp_path, patched_run):
    """One weight of one rank, changed by 1e-6, ends the run before the next checkpoint."""
    with patched_run("drift", "--epochs", 50) as job:
        assert job.process.wait(150) != 0
    error, = errors(job.text())
    assert re.fullmatch(r"error: step 8: rank\(s\) \[1\] hold other weights than .+ with --resume",
                        error)
    assert checkpoints(tmp_path / "run")[-1].name == "checkpoint_epoch0003_step00000006.pt"


# Bad pictures

EVIL = "<script>alert(1)</script> ../../../evil $(touch pwned) `touch pwned` \x1b[2J 'x"


@pytest.fixture(scope="module")
def bad_pictures(tmp_path_factory):
    """120 pictures of which seven are bad, and odd captions; the folder and the bad ones' names."""
    folder = make_pictures(tmp_path_factory.mktemp("bad"), 120, captions=1, prefix="")
    bomb = b"IHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    bomb = b"\x89PNG\r\n\x1a\n\0\0\0\r" + bomb + zipfile.crc32(bomb).to_bytes(4, "big")
    bad = {"010.jpg": (folder / "000.jpg").read_bytes()[:400], "011.jpg": b"",
           "050.jpg": b"%PDF-1.4", "100.jpg": bomb + b"\0\0\0\1IDAT\0\0\0\0\0",
           "105.jpg": None, "107.jpg": None, "119.jpg": bomb[:8]}
    for name, content in bad.items():
        (folder / name).unlink()
        if content is not None:
            (folder / name).write_bytes(content)
    os.symlink("/etc/passwd", folder / "105.jpg")
    os.mkfifo(folder / "107.jpg")   # would be waited for
    text = (folder / "captions.txt").read_bytes() + b"gone.jpg,not there\n"
    text = text.replace(b"number 60", b"caf\xe9").replace(b'"a dog, number 0"', EVIL.encode())
    (folder / "captions.txt").write_bytes(text)
    return folder, list(bad)


@pytest.mark.filterwarnings("ignore:--data")
def test_bad_pictures_are_replaced_by_the_next(bad_pictures):
    """Exactly the seven bad pictures are refused, with their names; the next of the same split
    takes a bad one's place, after the last the first; what is no UTF-8 in a caption is replaced."""
    folder, bad = bad_pictures
    source = CaptionedImages(folder, max_missing=0.1)
    load, every = image_loader(source, ModelConfig(resolution=16)), np.arange(120)
    for i in every:
        if source.names[i] not in bad:
            load(i)
            continue
        with pytest.raises(UnreadableImage, match=f"^--data {folder}: '{source.names[i]}' cannot "
                           r"be read as an image \([^\n]+\); repair or remove it$"):
            load(i)
    assert source.captions(60) == ["a dog, caf\ufffd"]
    for images, index, expected in ((every, 9, 9), (every, 10, 12), (every, 11, 12),
                                    (every, 119, 0), (every[1::3], 10, 13)):
        number, loaded = first_readable(load, images, index)
        assert number == expected and (loaded["image"] == load(expected)["image"]).all()


@pytest.mark.slow
def test_training_on_bad_pictures_and_captions(tmp_path, flags, bad_pictures):
    """One and two processes, with and without loader workers, name the same bad pictures once each
    and end with the same weights up to rounding; beyond the limit the run stops with the list. A
    caption with HTML, paths, terminal codes and shell commands is text in TensorBoard's page, makes
    no file, and is quoted in the command that is printed for copying."""
    (folder, bad), runs = bad_pictures, [tmp_path / "1", tmp_path / "2"]
    flags = [*flags, "--data", folder, "--batch-size", 30, "--epochs", 2, "--val-fraction", 0,
             "--sample-every", 2, "--folder"]
    for run, processes, workers in zip(runs, (1, 2), (1, 0)):
        done = run_ok("train.py", *flags, run, "--max-bad-images", 0.06, "--workers", workers,
                      processes=processes, cwd=tmp_path)
        named = re.findall(r"^warning: \d of 120 images .*: ('.*')$", done.stderr, re.M)
        assert sorted(re.findall(r"'(.*?)'", "".join(named))) == bad, done.stderr[-3000:]
        assert re.search("left out .*1 named images that are not there", done.stdout)
        line, = re.findall("^draw pictures: .*$", done.stdout, re.M)
        assert shlex.split(line)[-1] == EVIL.replace("\x1b", "")
        assert {path.name[:6] for path in run.iterdir()} == {
            ".lock", "checkp", "config", "events", "sample", "stop"}
        text, = EventAccumulator(str(run)).Reload().Tensors("start/text_summary")
        page = markdown_to_safe_html(text.tensor_proto.string_val[0])
        assert "&lt;script&gt;alert(1)" in page and "<script" not in page
    assert not list(tmp_path.rglob("pwned"))
    torch.testing.assert_close(*(newest(run)["unet"] for run in runs), atol=2e-3, rtol=0)
    done = launch("train.py", *flags, tmp_path / "3", "--max-bad-images", 0.02)
    error, = errors(done.stderr)
    assert done.returncode == 2 and re.fullmatch(
        r"error: --max-bad-images 0.02: [3-7] of 120 images cannot be read; repair or remove "
        r"'\d+.jpg'(, '\d+.jpg')+", error)


def test_data_that_go_away_for_a_while_change_nothing(tmp_path, monkeypatch):
    """While the whole data folder is missing a picture is waited for, not replaced; after a minute
    that is an OSError."""
    folder, slept = make_pictures(tmp_path / "set", 3), []
    load = image_loader(CaptionedImages(folder), ModelConfig(resolution=16))
    before = load(1)["image"]

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            (tmp_path / "away").rename(folder)

    monkeypatch.setattr(time, "sleep", sleep)
    folder.rename(tmp_path / "away")
    with pytest.warns(UserWarning, match=rf"^--data {folder}: out of reach \(.*\); trying again"):
        number, loaded = first_readable(load, np.arange(3), 1)
    assert number == 1 and (loaded["image"] == before).all() and slept == [1, 2, 4]
    folder.rename(tmp_path / "gone")
    with pytest.warns(UserWarning), pytest.raises(OSError, match="out of reach for a minute"):
        load(1)
    assert sum(slept[3:]) == 63


# Processes


def test_restarts_need_a_folder_and_a_new_store(monkeypatch):
    """torchrun --max-restarts is refused where a restart would begin anew, or meet at the store in
    which the dead have left their addresses."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    for store, flags in (("1", []), ("0", ["--folder", "nowhere"])):
        monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", store)
        with pytest.raises(ValueError, match="^torchrun --max-restarts: add --folder RUN, and .*"
                                             "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1$"):
            train.parse_args(flags)


@pytest.mark.slow
@pytest.mark.parametrize("lost", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_others_and_a_restart_resumes(tmp_path, patched_run, lost):
    """One of two ranks is killed or hangs: the other ends within seconds, or soon after the limit
    with one line; torchrun kills one that hangs after 30 seconds of its own and restarts both. They
    go on at the first try, although one comes back late. One process then goes on, and says so."""
    run, limit = tmp_path / "run", 12 if lost == signal.SIGSTOP else 600
    env = dict(RANK_TIMEOUT_SECONDS=str(limit), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
    with patched_run("late", "--epochs", 30, torchrun=["--max-restarts=1"], **env) as job:
        job.until(lambda: len(checkpoints(run)) > 1)
        old = job.ranks()
        os.kill(old[1], lost)
        if lost == signal.SIGSTOP:
            job.until(lambda: errors(job.text()), seconds=30)
            assert re.fullmatch("error: rank 0 in main.*: .*[Tt]im.*; it lost another process, "
                                "which died or hangs; go on with --resume", errors(job.text())[0])
        job.until(lambda: len(job.ranks()) == 2 and not set(job.ranks()) & set(old), seconds=50)
        assert job.process.wait(120) == 0, job.text()[-4000:]
    assert len(re.findall("^epoch 1: ", job.text(), re.M)) == 1 and newest(run)["epoch"] == 30
    said = run_ok("train.py", "--resume", run, "--epochs", 31).stdout
    assert "2 processes up to step 60, 1 from here" in said
    # Two of 62 steps are left, the last fifth falls linearly, and 61 of 200 steps warm up.
    now = 1e-3 * 61 / 200 * 2 / (0.2 * 62)
    assert f"learning rate of update 61: {now:.3g}, and not 0 as before: " in said


@pytest.mark.slow
def test_a_checkpoint_every_few_seconds(tmp_path):
    """Inside an epoch both of two processes save each --save-minutes at the same step, the newest
    --keep-last stay, and after a SIGKILL the run goes on from the last."""
    run, seen = tmp_path / "run", set()
    with Job(tmp_path, *TINY, "--save-minutes", 0.02, "--keep-last", 2, "--folder", run) as job:
        job.until(lambda: seen.update(checkpoints(run)) or len(seen) > 4)
        for pid in job.ranks():
            os.kill(pid, signal.SIGKILL)
    assert "error" not in job.text().replace("ChildFailedError", "") and len(checkpoints(run)) < 4
    step = newest(run)["step"]
    assert newest(run)["step_in_epoch"] == step % 243 > 0
    run_ok("train.py", "--resume", run, "--max-steps", step + 1)
    assert newest(run)["step"] == step + 1


NO_DATA = """
import os, time, data, train

def get(self, key, get=data.Samples.__getitem__):
    if key[:2] == (0, 8) and not self.validation:
        time.sleep(600)
    return get(self, key)

def update(averages, weights, step, decay):
    print("update", step, flush=True)

train.update_ema = update
data.Samples.__getitem__ = get
data.run_main(train.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("asks", [True, False])
def test_data_that_never_come(tmp_path, flags, asks):
    """A batch of the third step never comes: one process saves the two steps and ends, as soon as
    it is asked to stop by a file, or after nine tenths of its patience."""
    (tmp_path / "script.py").write_text(NO_DATA)
    with Job(tmp_path, *flags, "--batch-size", 4, "--workers", 1, "--folder", "run", processes=1,
             script=tmp_path / "script.py", env={} if asks else {"RANK_TIMEOUT_SECONDS": "6"}
             ) as job:
        job.until(lambda: "update 2" in job.text())
        if asks:
            (tmp_path / "run" / "stop").touch()
        assert job.process.wait(60) == 2
    assert re.fullmatch("error: rank 0 in main > patiently: RuntimeError: DataLoader timed out .*"
                        "/dev/shm.*--workers 0.*", errors(job.text())[0])
    assert newest(tmp_path / "run")["step"] == 2


@pytest.mark.slow
def test_shared_memory_that_is_too_small(tmp_path, flags):
    """With 140 kB of /dev/shm batches of loader workers are lost; the run ends and says so."""
    command = ["mount -t tmpfs -o size=140k tmpfs /dev/shm && exec " + shlex.join(command_line(
        "train.py", *flags, "--batch-size", 4, "--workers", 1, "--folder", tmp_path / "run"))]
    command = ["unshare", "-m", "sh", "-c", *command]
    done = subprocess.run(command, env={**os.environ, "RANK_TIMEOUT_SECONDS": "8"}, text=True,
                          capture_output=True, timeout=120)
    if "mount" in done.stderr or "unshare" in done.stderr:
        pytest.skip("mounting is not allowed here")
    assert done.returncode == 2 and "Errno 28" not in done.stderr
    assert re.fullmatch("error: rank 0 in .*/dev/shm is too small.*--workers 0.*",
                        errors(done.stderr)[0]), done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("rank, host", [(0, "127.0.0.1"), (1, "nowhere.invalid")])
def test_processes_that_do_not_meet(rank, host):
    """Where the port is in use or the host name unknown the message speaks of the start."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        env = dict(RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR=host,
                   MASTER_PORT=str(server.getsockname()[1]), RANK_TIMEOUT_SECONDS="5")
        done = launch("train.py", *TINY, env=env)
    assert done.returncode == 2 and re.fullmatch(
        f"error: rank {rank} in main > setup_processes: .* at the start: .*a free port and a host "
        "name that all can reach", errors(done.stderr)[0]), done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c(tmp_path, patched_run, times):
    """Ctrl-C under torchrun: once, the update of ten seconds that is under way is finished, and the
    run saves and stops; a second one stops all processes at once."""
    with patched_run("slow", "--epochs", 1000, "--save-every", 1000) as job:
        job.until(lambda: "slow" in job.text())
        ranks = job.ranks()
        for _ in range(times):
            os.killpg(job.process.pid, signal.SIGINT)   # to torchrun, which passes on the first
            before = time.monotonic()
            time.sleep(2)
        job.process.wait(60)
        seconds = time.monotonic() - before
        assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks)
    if times == 1:
        assert "; to go on: train.py --resume run\n" in job.text()
        assert newest(tmp_path / "run")["step"] > 3
    else:
        assert seconds < 8 and not checkpoints(tmp_path / "run"), job.text()[-4000:]


@pytest.mark.slow
def test_kill_many_short(tmp_path):
    """Six SIGKILLs of the real train.py, two processes: nothing lost, the same weights."""
    with Job(tmp_path, "--kills", 6, "--epochs", 12, script="tests/kill_many.py",
             processes=1) as job:
        job.process.wait(500)
    assert re.search("^6 kills, .* 0 damaged, in .* s$", job.text(), re.M), job.text()


# Files made to harm


class Bomb:
    """Makes the folder `crater` when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("crater",)


def test_pickle_bombs(tmp_path, monkeypatch):
    """A pickle bomb as a checkpoint or as Inception weights, in torch's zip format, the old one or
    bare, is refused and does not run. An unsafe load of the same bytes shows that it is live."""
    monkeypatch.chdir(tmp_path)
    payload = dict(unet={}, ema={}, config={}, step=0, epoch=0, extra=Bomb())
    torch.save(payload, "zipped")
    torch.save(payload, "old", _use_new_zipfile_serialization=False)
    Path("bare").write_bytes(pickle.dumps(payload))
    for path in ("zipped", "old", "bare"):
        with pytest.raises(ValueError, match=f"^checkpoint {path}: cannot be read "):
            load_checkpoint(path)
        with pytest.raises(FileNotFoundError, match=f"^--inception-weights {path}: "):
            evaluate.Inception("2048", path, "cpu")
    assert not os.path.exists("crater")
    torch.load("zipped", weights_only=False)
    assert os.path.exists("crater")


def test_packed_bombs(tmp_path):
    """A checkpoint's compressed member that unfolds to a thousand times its size is refused unread,
    and so is one of hundreds of megabytes in a .zip of pictures, whatever packed size it states."""
    path, pictures = write(tmp_path), tmp_path / "pictures.zip"
    for place, name in ((path, "bomb/data/9"), (pictures, "a.png")):
        with zipfile.ZipFile(place, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, bytes(300 * 2**20))
            archive.writestr("captions.txt", "image,caption\na.png,fine\n")
    with pytest.raises(ValueError, match="not written by torch.save"):
        load_checkpoint(path)
    source = CaptionedImages(pictures)
    for stated in (300 * 2**10, 2**40):
        source.files.places[0, 1 + PLACE.index("compress_size")] = stated
        with pytest.raises(UnreadableImage, match="a zip bomb"):
            source.image(0, 3, 8)


def test_links_are_followed_but_captions_lead_nowhere(tmp_path):
    """Linked folders and pictures are read, a circle of links ends, and captions can name listed
    files only: neither a path out of the folder nor an absolute one, though these files exist."""
    folder = make_pictures(tmp_path / "set", 1)
    shutil.move(folder / "Images", tmp_path / "elsewhere")
    shutil.copy(tmp_path / "elsewhere/000.jpg", tmp_path / "outside.jpg")
    os.symlink("../elsewhere", folder / "Images")
    os.symlink(folder, tmp_path / "elsewhere" / "circle")
    os.symlink("../outside.jpg", folder / "link.jpg")
    names = ["link.jpg", "Images/000.jpg", "../outside.jpg", f"{tmp_path}/outside.jpg"]
    lines = ["image,caption", *(f"{name},x" for name in names)]
    (folder / "captions.txt").write_text("\n".join(lines))
    source = CaptionedImages(folder, max_missing=0.5)
    assert [*source.names] == names[:2] and source.image(0, 3, 8) == source.image(1, 3, 8)
    assert "2 named images of folders that are not there, such as '../" in source.report["left out"]


def test_class_names_and_captions_are_only_text(tmp_path):
    """Folder names with format fields stay as they are; captions that are no text are refused, and
    half characters mended."""
    for name in ("{0.__class__}", "{}", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "x.png")
    source = CaptionedImages(tmp_path, "{0.__init__} a {}")
    assert set(source.texts) == {f"{{0.__init__}} a {name}" for name in ("{0. class }", "{}", "b")}
    table = tmp_path / "metadata.jsonl"
    table.write_text('{"file_name": "b/x.png", "text": "half \\ud800 of it"}\n')
    assert CaptionedImages(tmp_path).captions(0) == ["half ? of it"]
    table.write_text('{"file_name": "b/x.png", "text": [7]}')
    with pytest.raises(ValueError, match="metadata.jsonl is not as expected: TypeError: .+"):
        CaptionedImages(tmp_path)


def test_pictures_are_told_by_content_and_run_nothing(tmp_path):
    """PostScript named .jpg, which Pillow would hand to Ghostscript, is refused, and so is any
    format that is not on the list."""
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"
                                    "%%EndComments\n(x) print\n%%EOF\n")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png", "ppm")
    (tmp_path / "captions.txt").write_text("image,caption\na.jpg,x\nb.png,x\n")
    source = CaptionedImages(tmp_path)
    for i, name in enumerate(("a.jpg", "b.png")):
        Image.open(tmp_path / name)   # Pillow alone would take it
        with pytest.raises(UnreadableImage, match=f"{name}' .*cannot identify image file"):
            source.image(i, 3, 8)

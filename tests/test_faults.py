"""Faults made on purpose: disks, numbers, bad pictures, lost and stopped processes, hostile files.
"""
import errno
import os
import pickle
import re
import shlex
import shutil
import signal
import time
import zipfile
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data
import evaluate
import models
import train
from conftest import Job, checkpoints, errors, launch, make_pictures, newest, run_ok, scalars
from data import CaptionedImages, UnreadableImage, first_readable, image_loader

W = torch.arange(300.0)

# Checkpoints


def write(folder, step=0):
    """A checkpoint with the weights W; returns its path."""
    path = folder / f"checkpoint_epoch{step:04d}_step{step:08d}.pt"
    models.save_checkpoint(dict(unet={"w": W}, ema={}, config={}, step=step, epoch=step), path)
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
        assert models.load_checkpoint(tmp_path)[1] == paths[0]
    for path, reason, said in zip(paths[:0:-1], ("have changed", "BadZipFile"), told):
        assert str(path) in str(said.message) and reason in str(said.message)


def test_a_file_that_cannot_be_written_stays_as_it_was(tmp_path, monkeypatch):
    """Where the disk keeps other bytes than were written, or numpy says only how many it could not
    write, the error names the file, which stays as it was; nothing half-written is left."""
    path = write(tmp_path)
    good = path.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda number: os.pwrite(number, b"\xff" * 600, 1000))
    with pytest.raises(OSError, match="have changed"):
        write(tmp_path)
    with pytest.raises(OSError, match=f"disk full.*'{path}'"):
        models.write_atomically(path, lambda file: np.zeros(9999).tofile("/dev/full"))
    assert path.read_bytes() == good and os.listdir(tmp_path) == [path.name]


def test_pruning(tmp_path):
    """The newest K stay, files that are none of ours stay, and so do those newer than the one just
    written: a run may go on from an older one."""
    names = [f"checkpoint_epoch{k:04d}_step{10 * k:08d}.pt" for k in range(12)]
    names += ["checkpoint_best.pt", "checkpoint_epoch0001_step00000010_copy.pt"]
    for name in names:
        (tmp_path / name).touch()
    models.prune_checkpoints(tmp_path / names[9], keep_last=3)
    assert {*os.listdir(tmp_path)} == {*names[7:]}


def test_a_full_disk(tmp_path, flags, monkeypatch):
    """On a disk with room for three files a new checkpoint takes the place of the older ones: the
    newest good one stays, and a damaged one newer than that does not count. Where there is no room
    at all that is an error, also at the end of a run."""
    paths, real_save = [write(tmp_path, step) for step in range(1, 7)], torch.save
    os.truncate(paths[5], 100)
    room = 3 * paths[0].stat().st_size

    def save_if_room(payload, file):
        if sum(path.stat().st_size for path in checkpoints(tmp_path)) > room:
            raise OSError(errno.ENOSPC, "No space left on device")
        real_save(payload, file)

    monkeypatch.setattr(torch, "save", save_if_room)
    with pytest.warns(UserWarning, match="step00000006.pt: cannot be read"):
        write(tmp_path, 7)
    assert checkpoints(tmp_path) == [paths[4], paths[5], models.load_checkpoint(tmp_path)[1]]
    room = -1
    with pytest.warns(UserWarning, match="No space"), pytest.raises(OSError, match="not saved"):
        train.main([*flags, "--max-steps", 1, "--folder", tmp_path / "run"])
    assert newest(tmp_path)["step"] == 7 and not list(tmp_path.rglob("*.tmp"))


@pytest.mark.slow
def test_disk_full_then_read_only_then_folder_removed(tmp_path, flags, monkeypatch):
    """On a small file system that fills up, turns read-only and loses the run folder, a run goes
    on, says each fault, keeps the last good checkpoint, saves again when it can, and finishes."""
    run, gone = tmp_path / "disk" / "run", tmp_path / "disk" / "gone"

    monkeypatch.chdir(tmp_path)
    if os.system("mkdir disk view; mount -t tmpfs -o size=250m tmpfs disk"):
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
                os.system(fault)
                job.until(lambda: message in job.text())
                assert newest(gone if gone.exists() else run)["step"] > 0
                os.system(repair)
                last = checkpoints(run)[-1:]
                job.until(lambda: checkpoints(run)[-1:] > last)
            job.process.send_signal(signal.SIGTERM)
            assert job.process.wait(60) == 0, job.text()[-4000:]
            assert "could not be written" in job.text() and "Traceback" not in job.text()
        assert newest(run)["step"] > newest(gone)["step"] and not list(run.glob(".*.tmp"))
    finally:
        os.system("umount -l disk")


@pytest.mark.slow
def test_two_jobs_in_one_folder(tmp_path, flags, monkeypatch):
    """A second job waits for half of RANK_TIMEOUT_SECONDS and is then refused; where the first ends
    meanwhile it removes what that left half-written and goes on from its newest checkpoint, which
    was not there before. A SIGKILL frees the folder."""
    run, half_written = tmp_path / "run", tmp_path / "run/.checkpoint_epoch0001.pt.tmp"
    how = [*flags, "--epochs", 1000, "--workers", 1, "--folder", run]
    (tmp_path / "second").mkdir()
    with Job(tmp_path, *how, "--save-every", 1000, processes=1) as first:
        first.until(lambda: "images/s" in first.text())
        monkeypatch.setattr(data, "RANK_TIMEOUT", 2)
        with pytest.raises(ValueError, match="--folder"):
            train.take_over(run)
        half_written.touch()
        with Job(tmp_path / "second", *how, "--save-every", 1, processes=1) as second:
            second.until(lambda: "waiting" in second.text())
            assert not checkpoints(run)
            first.process.send_signal(signal.SIGTERM)
            second.until(lambda: len(checkpoints(run)) > 1)
            assert checkpoints(run)[0].name in second.text() and not half_written.exists()
            assert first.process.wait(1) == 0
    train.take_over(run)


# Numbers

NUMBERS = """
import zlib
rank, calls = int(os.environ["RANK"]), []

def loss(*args, real=train.diffusion_loss):
    calls.append(None)
    is_bad = rank == 1 and (len(calls) == 3 or len(calls) > 11)
    more = torch.inf if rank == 1 and len(calls) == 5 else 0   # its gradients are finite
    return real(*args) * (torch.nan if is_bad else 1) + more

def count_update(state, loss, norm, real=train.TrainingState.count_update):
    real(state, loss, norm)
    weights = [zlib.crc32(p.detach().numpy().tobytes()) for p in state.weights]
    os.write(1, f"rank {rank}: {state.step} {sum(weights)} {loss.item()}\\n".encode())

train.diffusion_loss, train.TrainingState.count_update = loss, count_update
"""


@pytest.mark.slow
def test_bad_updates_are_skipped_by_all_and_too_many_end_the_run(tmp_path, flags):
    """A NaN on one rank, and an infinite loss with finite gradients, are skipped by both ranks:
    weights stay bit for bit, mean losses stay finite, each log interval says how many; after 20
    updates without a finite one the run ends and names the last checkpoint."""
    done = launch("train.py", *flags, "--batch-size", 2, "--epochs", 9, "--log-every", 4,
                  "--folder", "run", processes=2, cwd=tmp_path, patch=NUMBERS)
    rows = re.findall(r"rank (\d): (\d+) (\d+) (\S+)", done.stdout)
    bad = [3, 5, *range(12, 33)]   # 11 steps an epoch; an epoch's end ends a log interval
    for rank in "01":
        weights = [bits for of, _, bits, _ in rows if of == rank]
        assert len(weights) == 32, done.stderr[-4000:]
        assert [k for k in range(2, 33) if weights[k - 1] == weights[k - 2]] == bad
    assert re.findall(r"warning: (\d) of \d updates", done.stderr) == [*"11144224"]
    error, = errors(done.stderr)
    assert "step00000022.pt" in error and "--lr" in error and done.returncode == 2

    made = [float(loss) for rank, k, _, loss in rows if int(k) < 12 and int(k) not in bad]
    first, second = newest(tmp_path / "run")["epoch_losses"]
    assert first == pytest.approx(np.mean(made), rel=1e-6) and np.isnan(second)
    assert scalars(tmp_path / "run", "train/skipped")[4] == 1


SPARED = """
import sample
faults = [FloatingPointError("3"), torch.OutOfMemoryError("2"), torch.OutOfMemoryError("1")]

def predict(unet, *args, real=train.predict):
    if not unet.training and len(faults) == 3 and os.environ["RANK"] == "1":
        raise faults.pop()
    return real(unet, *args)

def generate(*args, real=sample.generate, **how):
    if faults and os.environ["RANK"] == "1":
        raise faults.pop()
    return real(*args, **how)

train.predict, sample.generate = predict, generate
"""


@pytest.mark.slow
def test_validation_and_samples_may_fail(tmp_path, flags):
    """One of two ranks runs out of memory in the first epoch's validation and the second's samples,
    and the third's pictures are not finite: each costs what it is about and is said once."""
    done = run_ok("train.py", *flags, "--epochs", 4, "--sample-every", 1, "--folder", "run",
                  processes=2, cwd=tmp_path, patch=SPARED)
    assert re.findall(r"left out \((\d)\)", done.stderr) == ["1", "2", "3"]
    assert [*scalars(tmp_path / "run", "loss/epoch")] == [2, 4, 6, 8]
    assert [*scalars(tmp_path / "run", "loss/validation")] == [4, 6, 8]
    assert [path.stem[-1] for path in tmp_path.rglob("samples*")] == ["4"]


@pytest.mark.slow
def test_ranks_that_drift_apart_are_noticed(tmp_path, flags):
    """Weights of one rank, changed by 1e-6, end the run before the next checkpoint."""
    patch = ("train.update_ema = lambda averages, weights, step, decay: "
             "weights[0].data.add_(1e-6 * (step == 7) * int(os.environ['RANK']))")
    done = launch("train.py", *flags, "--folder", tmp_path / "run", processes=2, patch=patch)
    error, = errors(done.stderr)
    assert "step 8" in error and "[1]" in error and newest(tmp_path / "run")["step"] == 6


# Bad pictures

EVIL = "<script>alert(1)</script> ../../../evil $(touch pwned) `touch pwned` \x1b[2J 'x"


@pytest.fixture(scope="module")
def bad_pictures(tmp_path_factory):
    """120 pictures of which seven are bad, and odd captions; the folder and the bad ones' names."""
    folder = make_pictures(tmp_path_factory.mktemp("bad"), 120, captions=1, prefix="")
    bomb = b"GIF89a" + b"\xff" * 4 + bytes(3) + b"," + bytes(4) + b"\xff" * 4 + bytes(9)
    bad = {"010.jpg": (folder / "000.jpg").read_bytes()[:400], "011.jpg": b"", "105.jpg": b"",
           "050.jpg": b"%PDF-1.4", "100.jpg": bomb, "107.jpg": b"", "119.jpg": bomb[:8]}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    for name, make in (("105.jpg", partial(os.symlink, "/etc/passwd")), ("107.jpg", os.mkfifo)):
        (folder / name).unlink()
        make(folder / name)   # a pipe would be waited for
    text = (folder / "captions.txt").read_text().replace('"a dog, number 0"', EVIL)
    (folder / "captions.txt").write_text(text + "gone.jpg,not there\n")
    return folder, list(bad)


def test_bad_pictures_are_replaced_by_the_next(bad_pictures):
    """Exactly the seven bad pictures are refused, with their names and the reason; the next of the
    same split takes a bad one's place, after the last the first; where there is none the last
    reason is said."""
    folder, bad = bad_pictures
    source = CaptionedImages(folder, max_missing=0.1)
    load, every = image_loader(source, models.ModelConfig(resolution=16)), np.arange(120)
    for i, name in enumerate(map(source.names.__getitem__, every)):
        reason = f"'{name}'.*: .+"
        with pytest.raises(UnreadableImage, match=reason) if name in bad else nullcontext():
            load(i)
    with pytest.warns(UserWarning, match="010.jpg"):
        for images, index, expected in ((every, 9, 9), (every, 10, 12), (every, 11, 12),
                                        (every, 119, 0), (every[1::3], 10, 13)):
            number, loaded = first_readable(load, images, index)
            assert number == expected and (loaded["image"] == load(expected)["image"]).all()
        with pytest.raises(ValueError, match="011.jpg.*cannot identify"):
            first_readable(load, every[10:12], 10)


@pytest.mark.slow
def test_training_on_bad_pictures_and_captions(tmp_path, flags, bad_pictures):
    """One and two processes, with and without loader workers, name the same bad pictures and end
    with the same weights up to rounding. A caption with HTML, paths, terminal codes and shell
    commands makes no file, and is quoted in the command that is printed for copying."""
    (folder, bad), runs = bad_pictures, [tmp_path / "1", tmp_path / "2"]
    for run, processes, workers in zip(runs, (1, 2), (1, 0)):
        done = run_ok("train.py", *flags, "--data", folder, "--batch-size", 30, "--epochs", 2,
                      "--val-fraction", 0, "--sample-every", 2, "--folder", run, "--workers",
                      workers, processes=processes, cwd=tmp_path)
        assert {*re.findall(r"warning: .*?'(\d+.jpg)'", done.stderr)} == {*bad}
        line, = re.findall("^finished.*$", done.stdout, re.M)
        assert shlex.split(line)[-1] == EVIL.replace("\x1b", "")
        assert {path.name[:6] for path in run.iterdir()} == {
            ".lock", "checkp", "config", "events", "sample", "stop"}
    assert not list(tmp_path.rglob("pwned"))
    torch.testing.assert_close(*(newest(run)["unet"] for run in runs), atol=2e-3, rtol=0)


def test_data_that_go_away_change_nothing(tmp_path):
    """Where the whole data folder is missing that is an OSError, and no other picture's turn."""
    folder = make_pictures(tmp_path / "set", 3)
    load = image_loader(CaptionedImages(folder), models.ModelConfig(resolution=16))
    folder.rename(tmp_path / "away")
    with pytest.raises(OSError, match=f"--data {folder}: out of reach"):
        first_readable(load, np.arange(3), 1)


NO_DATA = """
def get(self, key, get=data.Samples.__getitem__):
    return time.sleep(600) if key[:2] == (0, 8) else get(self, key)

data.Samples.__getitem__ = get
"""


@pytest.mark.slow
def test_data_that_never_come(tmp_path, flags):
    """A batch that never comes ends the run after nine tenths of its patience."""
    done = launch("train.py", *flags, "--batch-size", 4, "--workers", 1, "--folder",
                  tmp_path / "run", env={"RANK_TIMEOUT_SECONDS": "6"}, patch=NO_DATA)
    assert done.returncode and "DataLoader timed out" in done.stderr


# Processes

# Rank 1 comes back after rank 0.
LATE = "time.sleep(4 * int(os.environ['RANK']) * int(os.environ['TORCHELASTIC_RESTART_COUNT']))"


@pytest.mark.slow
@pytest.mark.parametrize("lost", [signal.SIGKILL, signal.SIGSTOP])
def test_a_lost_rank_ends_the_others_and_a_restart_resumes(tmp_path, flags, lost):
    """One of two ranks is killed or hangs: the other ends within seconds, or soon after the limit;
    torchrun kills one that hangs and restarts both. They go on at the first try, although one comes
    back late. One process then goes on, and says that the learning rate is counted anew."""
    run, limit = tmp_path / "run", 12 if lost == signal.SIGSTOP else 600
    env = dict(RANK_TIMEOUT_SECONDS=str(limit), TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1",
               TORCH_ELASTIC_SHUTDOWN_TIMEOUT="5")
    with Job(tmp_path, *flags, "--epochs", 16, "--folder", run, patch=LATE,
             torchrun=["--max-restarts=1"], env=env) as job:
        job.until(lambda: len(checkpoints(run)) > 1)
        old = job.ranks()
        os.kill(old[1], lost)
        job.until(lambda: len(job.ranks()) == 2 and not set(job.ranks()) & set(old), seconds=60)
        assert job.process.wait(120) == 0, job.text()[-4000:]
    assert len(re.findall("^epoch 1: ", job.text(), re.M)) == 1 and newest(run)["epoch"] == 16
    assert "as before" in run_ok("train.py", "--resume", run, "--epochs", 17).stdout
    # Two of 34 steps are left, of the last fifth, which falls linearly.
    assert scalars(run, "train/learning_rate")[33] == pytest.approx(1e-3 * 2 / (0.2 * 34))


SLOW = ("train.update_ema = lambda averages, weights, step, decay: "
        "step == 3 and (print('slow', flush=True), time.sleep(12))")


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c(tmp_path, flags, times):
    """Ctrl-C under torchrun: once, the long update that is under way is finished, and the
    run saves and stops; a second one stops all processes at once."""
    with Job(tmp_path, *flags, "--epochs", 1000, "--save-every", 1000, "--folder", "run",
             patch=SLOW) as job:
        job.until(lambda: job.text().count("slow") == 2)
        ranks = job.ranks()
        for _ in range(times):
            time.sleep(1)
            os.killpg(job.process.pid, signal.SIGINT)   # to torchrun, which passes on the first
        job.process.wait(60 if times == 1 else 8)
        assert not any(os.path.exists(f"/proc/{pid}") for pid in ranks)
    assert [newest(path)["step"] for path in checkpoints(tmp_path / "run")] == [3][:2 - times]
    assert ("go on with --resume" in job.text()) == (times == 1)


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
        with pytest.raises(ValueError, match=f"{path}: cannot be read"):
            models.load_checkpoint(path)
        with pytest.raises(OSError, match=f"--inception-weights {path}"):
            evaluate.Inception("2048", path, "cpu")
    assert not os.path.exists("crater")
    torch.load("zipped", weights_only=False)
    assert os.path.exists("crater")


def test_packed_bombs(tmp_path):
    """A checkpoint's compressed member that unfolds to a thousand times its size is refused unread,
    and so is one of hundreds of megabytes as a picture in a .zip."""
    path, pictures = write(tmp_path), tmp_path / "pictures.zip"
    for place, name in ((path, "bomb/data/9"), (pictures, "a.png")):
        with zipfile.ZipFile(place, "a", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(name, bytes(300 * 2**20))
            archive.writestr("captions.txt", "image,caption\na.png,fine\n")
    began = time.process_time()
    with pytest.raises(ValueError, match="not written by torch.save"):
        models.load_checkpoint(path)
    with pytest.raises(UnreadableImage, match="a.png"):
        CaptionedImages(pictures).image(0, 3, 8)
    assert time.process_time() - began < 0.3   # to unfold one takes a second


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
    (folder / "captions.txt").write_text("\n".join(["image,caption", *(f"{k},x" for k in names)]))
    source = CaptionedImages(folder, max_missing=0.5)
    assert [*source.names] == names[:2] and source.image(0, 3, 8) == source.image(1, 3, 8)
    assert "'../outside.jpg'" in source.report["left out"]


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
    with pytest.raises(ValueError, match="metadata.jsonl.*7"):
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
        with pytest.raises(UnreadableImage, match=f"{name}.*cannot identify image file"):
            source.image(i, 3, 8)

"""Faults made on purpose: disks, numbers, bad pictures, lost and stopped processes, and files that were made to harm."""
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import train
from conftest import ROOT, launch, run_ok
from data import BuiltinShapes, CaptionedImages, Ranks, UnreadableImage, first_readable
from models import load_checkpoint, prune_checkpoints, save_checkpoint

CPU = torch.device("cpu")
ONE = Ranks(0, 0, 1, 1, CPU)
PAYLOAD = dict(unet={}, ema={}, config={}, step=0, epoch=0)


@pytest.fixture(scope="module")
def flags(photos, clip):
    """A run on two dozen pictures, two steps an epoch."""
    return ["--data", photos, "--text-encoder", clip, "--vae", "none", "--preset", "tiny", "--resolution", 16, "--batch-size", 8,
            "--val-fraction", 0.1, "--log-every", 1, "--sample-every", 0, "--device", "cpu", "--workers", 0]


class Job:
    """train.py under torchrun in the background, its output in a file."""

    def __init__(self, folder, *args, processes=2, torchrun=(), code=None, env=None):
        self.log = Path(folder) / "log"
        command = [sys.executable, *(["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *torchrun]
                                     if processes > 1 else []), str(code or ROOT / "train.py"), *map(str, args)]
        with open(self.log, "ab") as log:
            self.process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True,
                                            env={**os.environ, "PYTHONPATH": str(ROOT), **(env or {})})

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for pid in [self.process.pid, *self.ranks()]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
        self.process.wait(20)

    def text(self):
        return self.log.read_text(errors="replace")

    def until(self, happened, seconds=120):
        deadline = time.monotonic() + seconds
        while not happened():
            assert time.monotonic() < deadline and self.process.poll() is None, self.text()[-6000:]
            time.sleep(0.05)

    def ranks(self):
        """Process ids of the ranks, rank 0 first."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                environ = dict(line.partition("=")[::2] for line in (entry / "environ").read_bytes().decode().split("\0"))
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, ValueError):
                continue
            if parent == self.process.pid and "RANK" in environ:
                found[int(environ["RANK"])] = int(entry.name)
        return [found[rank] for rank in sorted(found)]


def checkpoints(folder):
    return sorted(Path(folder).glob("checkpoint_*.pt"))


def errors(text):
    return [line for line in text.splitlines() if line.startswith("error: ")]


# Checkpoints


def test_a_changed_byte_is_noticed(tmp_path):
    """Whichever byte of a checkpoint is changed: it is refused in one line, or loads as it was where the byte means nothing."""
    path = tmp_path / "checkpoint_epoch0001_step00000001.pt"
    save_checkpoint(dict(PAYLOAD, unet={"w": torch.arange(300.0)}), path)
    whole, refused = path.read_bytes(), 0
    in_weights = range(whole.index(torch.arange(300.0).numpy().tobytes()), len(whole))[:1200]
    for k in [*range(0, len(whole), 7), *in_weights[::50]]:
        path.write_bytes(whole[:k] + bytes([whole[k] ^ 0x10]) + whole[k + 1:])
        try:
            assert torch.equal(load_checkpoint(path)[0]["unet"]["w"], torch.arange(300.0))
            assert k not in in_weights
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused += 1
    assert refused > 100


def test_a_damaged_checkpoint_is_skipped_with_its_name_and_reason(tmp_path):
    """A run folder's newest checkpoint with a flipped weight, and one cut short, are named with the reason, and the one before
    them is taken."""
    paths = [tmp_path / f"checkpoint_epoch{k:04d}_step{k:08d}.pt" for k in range(3)]
    for k, path in enumerate(paths):
        save_checkpoint(dict(PAYLOAD, step=k, unet={"w": torch.ones(99)}), path)
    content = bytearray(paths[2].read_bytes())
    content[content.index(torch.ones(99).numpy().tobytes()) + 4] ^= 1
    paths[2].write_bytes(content)
    paths[1].write_bytes(paths[1].read_bytes()[:-200])
    with pytest.warns(UserWarning) as told:
        payload, path = load_checkpoint(tmp_path)
    assert payload["step"] == 0 and path == paths[0]
    assert re.search(f"{paths[2].name}: .*data/0' have changed", str(told[0].message)) and paths[1].name in str(told[1].message)


def test_a_file_that_reads_back_wrong_never_gets_its_name(tmp_path, monkeypatch):
    """Where the disk returns other bytes than were written, the checkpoint is not renamed and the one before stays."""
    path = tmp_path / "checkpoint_epoch0001_step00000001.pt"
    save_checkpoint(dict(PAYLOAD, step=1), path)
    good = path.read_bytes()

    def lying_fsync(number):
        if list(tmp_path.glob(f".{path.name}.*.tmp")):
            os.pwrite(number, b"\xff" * 600, 2000)
    monkeypatch.setattr(os, "fsync", lying_fsync)
    with pytest.raises(OSError):
        save_checkpoint(dict(PAYLOAD, step=2, unet={"w": torch.ones(999)}), path)
    assert path.read_bytes() == good and os.listdir(tmp_path) == [path.name]


def test_pruning(tmp_path):
    """The newest K stay and the first of every M-th epoch, files that are none of ours stay, and so do those newer than the one
    just written: a run may go on from an older one."""
    names = [f"checkpoint_epoch{e:04d}_step{10 * e + s:08d}.pt" for e in range(9) for s in (0, 5)]
    for name in [*names, "checkpoint_best.pt", "checkpoint_epoch0001_step00000010_copy.pt"]:
        (tmp_path / name).touch()
    prune_checkpoints(tmp_path / "checkpoint_epoch0007_step00000075.pt", keep_last=3, keep_every=2)
    left = {name[16:20] + ":" + name[29:33] for name in os.listdir(tmp_path) if name in names}
    assert left == {"0008:0085", "0008:0080", "0007:0075", "0007:0070", "0006:0065", "0006:0060", "0004:0040", "0002:0020"}
    assert len(os.listdir(tmp_path)) == len(left) + 2


def test_second_job_is_refused_and_leftovers_go(tmp_path):
    """While one process holds a run folder another is refused in one line; a SIGKILL frees it, though a child that the process
    had forked lives on; a half-written checkpoint is removed by the next."""
    code = ("import os, sys, time; sys.path.insert(0, sys.argv[1]); import train; from pathlib import Path\n"
            "lock = train.take_over(Path('.'))\n"
            "os.fork() or time.sleep(15) or os._exit(0)\n"
            "print('held', flush=True); time.sleep(60)")
    holder = subprocess.Popen([sys.executable, "-c", code, ROOT], cwd=tmp_path, stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match="another job is training in this folder"):
        train.take_over(tmp_path)
    holder.kill()
    holder.wait()
    (tmp_path / ".checkpoint_epoch0001_step00000001.pt.tmp").write_bytes(b"half")
    train.take_over(tmp_path).close()
    assert os.listdir(tmp_path) == [".lock"]


@pytest.fixture
def state():
    net = torch.nn.Linear(3, 3)
    args = train.make_parser().parse_args(["--lr", "0.1", "--ema-decay", "0.9"])
    return train.TrainingState(net, args, CPU, None)


def test_final_save_tries_again_and_then_fails(state, tmp_path, monkeypatch):
    """A save on a full device is said and survived; at the end of a run it is tried seven times, over a minute, and then fails
    in one line; nothing half-written is left."""
    slept = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setattr(torch, "save", lambda payload, file: os.write(os.open("/dev/full", os.O_WRONLY), b"x"))
    with pytest.warns(UserWarning, match="checkpoint .* could not be written .*No space left on device.*; training goes on"):
        state.save(tmp_path, ONE)
        with pytest.raises(OSError, match="not saved in 7 tries; make room"):
            state.save(tmp_path, ONE, tries=7)
    assert sum(slept) == 60 and not os.listdir(tmp_path)


@pytest.mark.slow
def test_disk_full_then_read_only_then_folder_removed(tmp_path, flags):
    """On a small file system that fills up, turns read-only and loses the run folder, one after the other, a run goes on, says
    each fault in one line, saves again when it can, never damages the last good checkpoint, and finishes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.getuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=250m", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        run = disk / "run"
        with Job(tmp_path, *flags, "--epochs", 1000, "--keep-last", 2, "--folder", run, processes=1) as job:
            said = lambda text: job.text().count(text)  # noqa: E731
            job.until(lambda: len(checkpoints(run)) >= 2)
            with open(disk / "filler", "wb") as filler, pytest.raises(OSError):
                while True:
                    filler.write(b"x" * 2**16)
                    filler.flush()
            job.until(lambda: said("No space left on device"))
            assert load_checkpoint(run)[0]["step"] > 0
            (disk / "filler").unlink()
            newest = checkpoints(run)[-1]
            job.until(lambda: checkpoints(run)[-1] > newest)

            # A read-only view of the folder laid over it; remounting in place is refused while a file is open for writing.
            view = tmp_path / "view"
            view.mkdir()
            for step in (["--bind", run, view], ["-o", "remount,bind,ro", view], ["--bind", view, run]):
                subprocess.run(["mount", *step], check=True, timeout=20)
            job.until(lambda: said("Read-only file system"))
            assert load_checkpoint(run)[0]["step"] > 0
            subprocess.run(["umount", "-l", run, view], check=True, timeout=20)
            newest = checkpoints(run)[-1]
            job.until(lambda: checkpoints(run)[-1] > newest)

            os.rename(run, disk / "gone")
            job.until(lambda: checkpoints(run))
            job.process.send_signal(signal.SIGTERM)
            assert job.process.wait(60) == 0, job.text()[-4000:]
            text = job.text()
            assert "Traceback" not in text and "could not be written" in text and not errors(text), text[-4000:]
        assert not list(run.glob(".*.tmp")) and load_checkpoint(run)[0]["step"] > load_checkpoint(disk / "gone")[0]["step"]
        for path in [*checkpoints(run), *checkpoints(disk / "gone")]:
            load_checkpoint(path)
    finally:
        subprocess.run(["umount", "-l", disk], timeout=20)


# Numbers

HARNESS = """
import os, sys, time, torch, train
from data import run_main
rank, real, calls, seen = int(os.environ.get("RANK", 0)), train.diffusion_loss, [0], []

def loss(net, *args, **kwargs):
    value = real(net, *args, **kwargs)
    if getattr(net, "training", False):                # not the step that only counts memory
        calls[0] += 1
        if rank == 1 and calls[0] == 3:
            value = value * float("nan")
        if rank == 1 and calls[0] == 5:
            value = value.clone()
            value[0] = value[0].detach() + float("inf")    # infinite, with finite gradients
        if calls[0] > int(os.environ.get("ALL_BAD_AFTER", 1000)):
            value = value * float("nan")
        if calls[0] == int(os.environ.get("SLOW_AFTER", 1000)):
            print("slow", flush=True)
            time.sleep(10)
    return value

class Poll(train.StopRequest):
    def poll(self):
        import inspect
        frame = inspect.currentframe().f_back.f_locals
        seen.append(hash(tuple(p.detach().numpy().tobytes() for p in frame["model"].unet.parameters())))
        moments = [s["exp_avg"].isfinite().all() for s in frame["state"].optimizer.state.values()]
        ema = all(p.isfinite().all() for p in frame["state"].ema.parameters.values())
        if len(seen) == 8:
            print(f"rank {rank}", seen[2] == seen[1], seen[4] == seen[3], len(set(seen)), all(moments), ema, flush=True)
        if len(seen) == int(os.environ.get("DRIFT_AT", 1000)) and rank == 1:
            with torch.no_grad():
                next(frame["model"].unet.parameters()).view(-1)[0] += 1e-6
        return super().poll()

train.diffusion_loss, train.StopRequest = loss, Poll
run_main(train.main)
"""


@pytest.fixture(scope="module")
def harness(tmp_path_factory):
    path = tmp_path_factory.mktemp("harness") / "harness.py"
    path.write_text(HARNESS)
    return path


@pytest.mark.slow
def test_bad_updates_are_skipped_by_all_and_too_many_stop_the_run(tmp_path, flags, harness):
    """A NaN on one rank, and an infinite loss with finite gradients, are skipped by both ranks: weights stay bit for bit,
    moments, EMA and the epoch's losses stay finite, the steps are named; after four in a row the run ends in one line that
    names the last good checkpoint."""
    with Job(tmp_path, *flags, "--epochs", 50, "--folder", "run", "--max-bad-steps", 4, code=harness,
             env={"ALL_BAD_AFTER": "12", "PYTHONHASHSEED": "0"}) as job:
        assert job.process.wait(150) != 0
        text = job.text()
    for rank in range(2):
        assert f"rank {rank} True True 6 True True" in text, text[-5000:]
    assert re.findall(r"warning: update skipped at step (\d+):", text) == ["3", "5", "13", "14", "15"]
    assert len(errors(text)) == 1
    newest = checkpoints(tmp_path / "run")[-1].name
    assert re.search(f"error: --max-bad-steps 4: .*up to step 16; the last good checkpoint is run/{newest};", text), errors(text)
    losses = load_checkpoint(tmp_path / "run")[0]["epoch_losses"]
    assert np.isfinite(losses[:6]).all() and np.isnan(losses[6:]).all()   # 2 steps an epoch: 13 and 14 are all of the seventh


def test_skipped_updates_leave_the_means_alone():
    """The logged loss is the mean over the updates that were made: (1 + 3) / 2 with one of three skipped; the fp16 scaler's
    skips are not complained about, but too many in a row stop the run all the same."""
    log, written = train.StepLog(None, ONE, 4), {}
    for loss, bad in ((1.0, False), (0.0, True), (3.0, False)):
        log.sums += torch.tensor([loss, 2 * loss, float(not bad)])
        log.bad.append(torch.tensor(bad))
        log.steps += 1
    assert log.report(3, 0.1, max_bad_steps=2, quiet=True).startswith("loss 2.0000")
    log.bad, log.steps = [torch.tensor(True)] * 2, 2
    with pytest.raises(ValueError, match="--max-bad-steps 2: .* up to step 5"):
        log.report(5, 0.1, max_bad_steps=2, quiet=True)
    assert not written


@pytest.mark.slow
def test_ranks_that_drift_apart_are_noticed(tmp_path, flags, harness):
    """One weight of one rank, changed by 1e-6, stops the run at the next checkpoint, which is not written."""
    with Job(tmp_path, *flags, "--epochs", 50, "--folder", "run", code=harness, env={"DRIFT_AT": "7"}) as job:
        assert job.process.wait(150) != 0
        text = job.text()
    assert len(errors(text)) == 1, text[-4000:]
    assert re.search(r"error: step 8: rank\(s\) \[1\] hold other weights than rank 0", text)
    assert checkpoints(tmp_path / "run")[-1].name == "checkpoint_epoch0003_step00000006.pt"


# Bad pictures


def make_bad_pictures(folder):
    """300 pictures, numbered in the order of the captions file; returns the names of unreadable and of odd but good ones."""
    rng, names = np.random.default_rng(0), [f"{i:03d}.jpg" for i in range(300)]
    for i, name in enumerate(names):
        Image.fromarray(rng.integers(0, 256, (20 + i % 5, 20, 3), dtype=np.uint8)).save(folder / name)
    jpeg = (folder / "000.jpg").read_bytes()
    bad = {"010.jpg": jpeg[:len(jpeg) // 2], "011.jpg": b"", "050.jpg": b"%PDF-1.4 no picture",
           "299.jpg": b"\x89PNG\r\n\x1a\n"}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    header = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + (60000).to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    header += zipfile.crc32(header[12:]).to_bytes(4, "big")
    (folder / "100.jpg").write_bytes(header + b"\0\0\0\1IDAT\0\0\0\0\0")   # a decompression bomb
    os.remove(folder / "120.jpg")
    os.symlink("/etc/passwd", folder / "120.jpg")
    os.remove(folder / "130.jpg")
    os.mkfifo(folder / "130.jpg")   # would wait for ever
    good = ["200.jpg", "201.jpg", "202.jpg", "203.jpg", "204.jpg"]
    Image.new("RGB", (1, 1), "red").save(folder / "200.jpg")
    Image.new("RGB", (20000, 4), "blue").save(folder / "201.jpg")
    Image.new("L", (9, 9), 3).save(folder / "202.gif", save_all=True, append_images=[Image.new("L", (9, 9), 200)])
    os.replace(folder / "202.gif", folder / "202.jpg")
    Image.fromarray(np.full((9, 9), 40000, np.uint16)).save(folder / "203.png")
    os.replace(folder / "203.png", folder / "203.jpg")
    Image.new("CMYK", (9, 9), (0, 0, 0, 255)).save(folder / "204.jpg")
    lines = [f"{name},picture {i}".encode() for i, name in enumerate(names)] + [b"gone.jpg,not there"]
    lines[60] = b"060.jpg,caf\xe9 \xff\xfe"
    lines[61] = b"061.jpg," + b"word " * 10000
    (folder / "captions.txt").write_bytes(b"\n".join([b"image,caption", *lines]))
    return [*bad, "100.jpg", "120.jpg", "130.jpg"], good


@pytest.fixture(scope="module")
def bad_pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad_pictures")
    return folder, *make_bad_pictures(folder)


@pytest.mark.filterwarnings("ignore:--data")
def test_bad_pictures_are_replaced_by_the_next(bad_pictures):
    """Of the 300 exactly the seven bad ones are refused; 10 and 11 become 12, the last becomes the first; the odd ones load."""
    folder, bad, good = bad_pictures
    source = CaptionedImages(folder)
    refused = []
    for i in range(300):
        try:
            source.image(i, 3, 16)
        except UnreadableImage as error:
            refused.append(source.names[i])
            assert source.names[i] in str(error)
    assert refused == sorted(bad)
    every = np.arange(300)
    for index, expected, passed in ((9, 9, []), (10, 12, [10, 11]), (11, 12, [11]), (299, 0, [299])):
        number, picture, over = first_readable(source, every, index, 3, 16)
        assert (number, over) == (expected, passed) and picture.tobytes() == source.image(expected, 3, 16).tobytes()
    assert first_readable(source, every[every % 2 == 0], 10, 3, 16)[0] == 12    # never a picture of the other split
    assert [source.image(int(name[:3]), 3, 16).getpixel((8, 8)) for name in good[2:]] == [(3,) * 3, (156,) * 3, (0, 0, 0)]
    assert source.captions(60) == ["caf\ufffd \ufffd\ufffd"] and len(source.captions(61)[0].split()) == 10000


@pytest.mark.slow
def test_training_on_bad_pictures(tmp_path, flags, bad_pictures):
    """With 7 of 300 pictures bad, one and two processes, with and without loader workers, name the same seven once each and end
    with the same weights up to rounding; with the default limit of 1% the run stops with the list."""
    folder, bad, _ = bad_pictures
    runs = []
    for processes, workers in ((1, 1), (2, 0)):
        run = tmp_path / f"run{processes}"
        done = run_ok("train.py", *flags, "--data", folder, "--epochs", 2, "--folder", run, "--max-bad-images", 0.03, "--workers",
                      workers, "--batch-size", 30, "--val-fraction", 0.0, "--log-every", 3, processes=processes, cwd=tmp_path)
        named = re.findall(r"'(\d+\.jpg)'", "".join(line for line in done.stderr.splitlines() if "replaced so far" in line))
        assert sorted(named) == sorted(bad) and "7 of 300 images replaced so far" in done.stderr, done.stderr[-3000:]
        assert "1 image(s) named in captions.txt are not there" in done.stderr
        runs.append(load_checkpoint(run)[0])
    for name, value in runs[0]["unet"].items():
        assert torch.allclose(value, runs[1]["unet"][name], atol=2e-3), name
    done = launch("train.py", *flags, "--data", folder, "--epochs", 2, "--folder", tmp_path / "run3", "--batch-size", 30,
                  cwd=tmp_path)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    error, = errors(done.stderr)
    assert re.search(r"--max-bad-images 0.01: [4-7] of 300 images cannot be read; repair or remove '\d+.jpg', ", error)


def test_data_that_goes_away_for_a_while_changes_nothing(tmp_path, monkeypatch):
    """While the whole data folder is missing an image is waited for, not replaced; after a minute that is an OSError."""
    for i in range(3):
        Image.new("RGB", (8, 8), (50 * i, 0, 0)).save(tmp_path / f"{i}.png")
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(3):
        os.rename(tmp_path / f"{i}.png", folder / f"{i}.png")
    (folder / "captions.txt").write_text("image,caption\n" + "\n".join(f"{i}.png,number {i}" for i in range(3)))
    source = CaptionedImages(folder)
    os.rename(folder, tmp_path / "away")
    slept = []

    def sleep(seconds):
        slept.append(seconds)
        if len(slept) == 3:
            os.rename(tmp_path / "away", folder)
    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.warns(UserWarning, match="out of reach"):
        number, picture, passed = first_readable(source, np.arange(3), 1, 3, 8)
    assert (number, passed, picture.getpixel((0, 0))) == (1, [], (50, 0, 0)) and slept == [1, 2, 4]
    shutil.rmtree(folder)
    with pytest.warns(UserWarning), pytest.raises(OSError, match="out of reach for a minute"):
        first_readable(source, np.arange(3), 1, 3, 8)
    assert sum(slept[3:]) == 63


# Processes


def test_restarts_need_a_folder(monkeypatch):
    """torchrun --max-restarts without --folder or --resume, which would begin anew after each failure, is refused at once."""
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    with pytest.raises(ValueError, match="--max-restarts: .*add --folder RUN"):
        train.parse_args([])
    train.parse_args(["--folder", "nowhere"])


@pytest.mark.slow
def test_a_killed_rank_ends_the_others_and_a_restart_resumes(tmp_path, flags):
    """One of two ranks gets a SIGKILL: the other ends within seconds, torchrun restarts both, and they go on from the newest
    checkpoint to the end, at the first try, although the killed one comes back later than the other and its old address is
    still in torchrun's store; then one process goes on with what two began, and says so."""
    run, late = tmp_path / "run", tmp_path / "late.py"
    late.write_text("import os, runpy, time\n"
                    "time.sleep(4 * int(os.environ['RANK']) * int(os.environ['TORCHELASTIC_RESTART_COUNT']))\n"
                    f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n")
    with Job(tmp_path, *flags, "--epochs", 30, "--folder", run, torchrun=["--max-restarts=1"], code=late) as job:
        job.until(lambda: len(checkpoints(run)) >= 2)
        before, old = time.monotonic(), job.ranks()
        os.kill(old[1], signal.SIGKILL)
        job.until(lambda: len(job.ranks()) == 2 and not set(job.ranks()) & set(old))
        assert time.monotonic() - before < 40
        step = int(checkpoints(run)[-1].stem[-8:])
        assert job.process.wait(120) == 0, job.text()[-4000:]
        assert len(re.findall("^epoch 1: ", job.text(), re.MULTILINE)) == 1 and step >= 4
    assert load_checkpoint(run)[0]["epoch"] == 30
    done = run_ok("train.py", "--resume", run, "--epochs", 31, cwd=tmp_path)
    assert "2 processes up to step 60, 1 from here" in done.stdout


@pytest.mark.slow
def test_a_stopped_rank_ends_the_job_in_bounded_time(tmp_path, flags):
    """One of two ranks is stopped by a SIGSTOP: with a limit of 8 seconds the other ends within that and a little, with one line,
    and torchrun kills the stopped one within its own 30 seconds; the run resumes."""
    run = tmp_path / "run"
    with Job(tmp_path, *flags, "--epochs", 500, "--folder", run, env={"RANK_TIMEOUT_SECONDS": "8"}) as job:
        job.until(lambda: len(checkpoints(run)) >= 2)
        os.kill(job.ranks()[1], signal.SIGSTOP)
        before = time.monotonic()
        job.until(lambda: errors(job.text()), seconds=25)
        assert re.fullmatch(r"error: rank 0 lost another process, which died or hangs \(.*[Tt]im.*\); go on with --resume",
                            errors(job.text())[0])
        assert job.process.wait(60) != 0 and time.monotonic() - before < 70
    step = load_checkpoint(run)[0]["step"]
    run_ok("train.py", "--resume", run, "--max-steps", step + 1, cwd=tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c(tmp_path, flags, harness, times):
    """Ctrl-C under torchrun: once, the update of ten seconds that is under way is finished, and the run saves and stops; a second
    one stops all processes at once."""
    run = tmp_path / "run"
    with Job(tmp_path, *flags, "--epochs", 1000, "--save-every", 1000, "--folder", run, code=harness,
             env={"SLOW_AFTER": "4"}) as job:
        job.until(lambda: "slow" in job.text())
        ranks = job.ranks()
        for _ in range(times):
            os.killpg(job.process.pid, signal.SIGINT)   # to torchrun, which passes on the first
            before = time.monotonic()
            time.sleep(2)
        job.process.wait(60)
        seconds, text = time.monotonic() - before, job.text()
        assert not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    assert bool(checkpoints(run)) == (times == 1), text[-4000:]
    if times == 1:
        assert "to go on: train.py --resume" in text and load_checkpoint(run)[0]["step"] >= 4
    else:
        assert seconds < 8


@pytest.mark.slow
def test_kill_many_short(tmp_path):
    """The long script's short version: six SIGKILLs of the real train.py, two processes, nothing lost, the same weights."""
    done = subprocess.run([sys.executable, ROOT / "tests" / "kill_many.py", "--kills", "6", "--epochs", "12"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=500)
    assert done.returncode == 0 and re.search(r"^6 kills, .* 0 damaged", done.stdout, re.MULTILINE), done.stdout + done.stderr


# Files made to harm


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_pickle_bomb_as_checkpoint(tmp_path):
    """A checkpoint that carries a pickle bomb, in torch's zip format, in the old format or bare, is refused and does not run; an
    unsafe load of the same bytes shows that it is live."""
    crater = tmp_path / "crater"
    files = [tmp_path / f"{kind}.pt" for kind in ("zip", "old", "bare")]
    torch.save(dict(PAYLOAD, extra=Bomb(crater)), files[0])
    torch.save(dict(PAYLOAD, extra=Bomb(crater)), files[1], _use_new_zipfile_serialization=False)
    files[2].write_bytes(pickle.dumps(dict(PAYLOAD, extra=Bomb(crater))))
    for path in files:
        with pytest.raises(ValueError, match=f"checkpoint {path}: cannot be read"):
            load_checkpoint(path)
        assert not crater.exists()
    torch.load(files[0], weights_only=False)
    assert crater.exists()


def test_pickle_bomb_as_reference_statistics(tmp_path):
    """A bomb where evaluate.py keeps its reference statistics, and one as Inception weights, are refused and do not run."""
    import evaluate
    crater = tmp_path / "crater"
    made_of = dict(network="x")
    place = tmp_path / f"reference_inception_{evaluate.hash_of([made_of])[:16]}.npz"
    np.savez(place, moments=np.array([Bomb(crater)], dtype=object), features=np.zeros((1, 2)))
    network = type("Network", (), dict(name="inception", dim=2))
    with pytest.raises(ValueError, match="allow_pickle"):
        evaluate.reference_statistics(network, None, made_of, tmp_path, ONE, 1)
    assert not crater.exists()
    torch.save(Bomb(crater), tmp_path / "weights.pth")
    with pytest.raises(FileNotFoundError, match="--inception-weights"):
        evaluate.Inception("2048", str(tmp_path / "weights.pth"), "cpu")
    assert not crater.exists()
    np.load(place, allow_pickle=True)["moments"]
    assert crater.exists()


def test_a_packed_checkpoint_cannot_unfold(tmp_path):
    """A checkpoint of a few kilobytes whose compressed member would unfold to a thousand times that is refused unread."""
    path = tmp_path / "bomb.pt"
    save_checkpoint(PAYLOAD, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("bomb/data/9", "w") as member:
        for _ in range(64):
            member.write(bytes(2**20))
    with pytest.raises(ValueError, match="not written by torch.save"):
        load_checkpoint(path)


def test_captions_reach_no_file_outside(tmp_path):
    """Linked files that lead out of the folder, `..`, absolute names and zip members with such names give no outside bytes; a
    link within the folder works."""
    outside = tmp_path / "secret.png"
    Image.new("RGB", (8, 8), "red").save(outside)
    folder = tmp_path / "set"
    folder.mkdir()
    Image.new("RGB", (8, 8), "blue").save(folder / "a.png")
    os.symlink(outside, folder / "link.png")
    os.symlink("a.png", folder / "inner.png")
    (folder / "captions.txt").write_text("image,caption\na.png,fine\nlink.png,stolen\ninner.png,fine\n")
    source = CaptionedImages(folder)
    with pytest.raises(UnreadableImage, match="'link.png' .*a link out of the data folder"):
        source.image(1, 3, 8)
    assert source.image(2, 3, 8).getpixel((4, 4)) == (0, 0, 255)
    os.symlink(tmp_path / "captions.txt", folder / "metadata.csv")
    (tmp_path / "captions.txt").write_text("file_name,text\na.png,secret text\n")
    with pytest.raises(ValueError, match="metadata.csv is not as expected: .*a link out of"):
        CaptionedImages(folder)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.write(outside, "../secret.png")
        archive.write(outside, "/secret.png")
        archive.write(folder / "a.png", "a.png")
        archive.writestr("captions.txt", "image,caption\na.png,fine\n../secret.png,x\n/secret.png,y\n")
    before = set(tmp_path.rglob("*"))
    source = CaptionedImages(tmp_path / "set.zip", max_missing=0.5)
    for i in range(len(source)):
        source.image(i, 3, 8)    # bytes of the archive itself; nothing is ever unpacked
    assert set(tmp_path.rglob("*")) == before


def test_zip_bombs(tmp_path):
    """A member that unfolds to 100 times its size and hundreds of megabytes is refused, as an image and as a captions file, also
    where it declares a false packed size."""
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("captions.txt", "image,caption\na.png,fine\n")
        with archive.open("a.png", "w") as member:
            for _ in range(300):
                member.write(bytes(2**20))
    with pytest.raises(UnreadableImage, match="a zip bomb"):
        CaptionedImages(path).image(0, 3, 8)
    source = CaptionedImages(path)
    source.files.archive.getinfo("a.png").compress_size = 2**40
    with pytest.raises(UnreadableImage, match="a zip bomb"):
        source.image(0, 3, 8)


def test_class_names_and_captions_are_only_text(tmp_path):
    """Folder names with format fields stay as they are; captions that are no text, or half characters, are refused or mended."""
    for name in ("{0.__class__}", "{}", "b"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (4, 4)).save(tmp_path / name / "x.png")
    source = CaptionedImages(tmp_path, "{0.__init__} a {}")
    assert {source.captions(i)[0] for i in range(3)} == {"{0.__init__} a {0. class }", "{0.__init__} a {}", "{0.__init__} a b"}
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b/x.png", "text": "half \\ud800 of it"}\n')
    assert CaptionedImages(tmp_path).captions(0) == ["half ? of it"]
    for text in ('{"file_name": 5, "text": "x"}', '{"file_name": "b/x.png", "text": [7]}', "[" * 100000, "5"):
        (tmp_path / "metadata.jsonl").write_text(text)
        with pytest.raises(ValueError, match="metadata.jsonl is not as expected"):
            CaptionedImages(tmp_path)


def test_pictures_are_told_by_content_and_run_nothing(tmp_path):
    """PostScript named .jpg, which Pillow would hand to Ghostscript, is refused; so is any format that is not on the list."""
    (tmp_path / "a.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n(x) print\n%%EOF\n")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.ppm")
    os.rename(tmp_path / "b.ppm", tmp_path / "b.png")
    Image.new("RGB", (4, 4)).save(tmp_path / "c.png")
    (tmp_path / "captions.txt").write_text("image,caption\na.jpg,x\nb.png,x\nc.png,x\n")
    source = CaptionedImages(tmp_path)
    for i in (0, 1):
        with pytest.raises(UnreadableImage, match="cannot identify image file"):
            source.image(i, 3, 8)
    source.image(2, 3, 8)


@pytest.mark.slow
def test_captions_reach_neither_tensorboard_text_nor_file_names(tmp_path, photos, clip):
    """Captions with HTML, path separators, terminal codes and shell commands train and are sampled: TensorBoard's text holds none
    of them, no file is made of them, and the command that is printed for copying quotes them."""
    import shlex

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    folder = tmp_path / "set"
    shutil.copytree(photos, folder)
    evil = "<script>alert(1)</script> ../../../evil $(touch pwned) `touch pwned` \x1b[2J 'x"
    lines = [f'{i:03d}.jpg,"{evil} {i}"' for i in range(24)]
    (folder / "captions.txt").write_text("\n".join(["image,caption", *lines]))
    done = run_ok("train.py", "--data", folder, "--text-encoder", clip, "--vae", "none", "--preset", "tiny", "--resolution", 16,
                  "--batch-size", 8, "--epochs", 1, "--log-every", 1, "--device", "cpu", "--workers", 0,
                  "--folder", tmp_path / "run", cwd=tmp_path)
    line, = [line for line in done.stdout.splitlines() if line.startswith("draw pictures: ")]
    assert shlex.split(line)[-1].startswith(evil.replace("\x1b", "")) and "\x1b" not in line
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    text = b"".join(s for e in events.Tensors("config/text_summary") for s in e.tensor_proto.string_val)
    assert b"script" not in text and all(line.startswith("    ") for line in text.decode().splitlines())
    assert {re.sub(r"\d+.*", "", path.name) for path in (tmp_path / "run").iterdir()} == {
        ".lock", "checkpoint_epoch", "config.json", "events.out.tfevents.", "samples_epoch", "stop"}


def test_builtin_pictures_need_no_replacement():
    """The built-in pictures pass through the same rule untouched."""
    source = BuiltinShapes(16, count=10)
    number, picture, passed = first_readable(source, np.arange(10), 4, 3, 16)
    assert (number, passed) == (4, []) and (picture == source.pictures[4]).all()

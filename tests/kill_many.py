"""Kill train.py by SIGKILL at random moments, many of them inside a save: nothing is ever lost.

    python tests/kill_many.py                 # 200 kills, under an hour
    python tests/kill_many.py --kills 6       # what the tests run

Chains of runs in one folder each: start, kill, check that every checkpoint under a final name
loads, start again, until the run finishes. Its weights must then be those of a run that nobody
disturbed, bit for bit. Every other chain reads its pictures in loader workers, and all save inside
epochs too. Two processes run the real train.py; they are forked from this one, which has torch and
diffusers loaded already, so that a start takes seconds.
"""
import argparse
import os
import random
import runpy
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

# One thread: those of this process would not survive a fork.
os.environ |= dict(OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", RANK_TIMEOUT_SECONDS="40")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from conftest import ROOT, TINY, assert_same, checkpoints, make_pictures  # noqa: E402
from models import load_checkpoint  # noqa: E402
from tiny_networks import make_clip  # noqa: E402


def start(flags, log):
    """The process ids of the two ranks of a new run."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pids = []
    for rank in range(2):
        pids.append(os.fork())
        if pids[-1]:
            continue
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2",
                               LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            sys.argv = ["train.py", *map(str, flags)]
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")   # ends the process
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    return pids


def wait_for(pids, seconds, ends=lambda: False):
    """{pid: exit code} of those that end within so many seconds, or before `ends()`."""
    codes, deadline = {}, time.monotonic() + seconds
    while len(codes) < len(pids) and time.monotonic() < deadline and not ends():
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return codes


def saving(folder):
    return any(folder.glob(".checkpoint_*.tmp"))


def kill_chains(args, root, log, count):
    """Kill and resume as often as asked, counting; returns the undisturbed run's checkpoint.
    Raises: AssertionError at the first thing that is lost."""
    rng, chain, saved = random.Random(args.seed), 0, 0
    flags = [*TINY, "--data", make_pictures(root / "data"), "--text-encoder",
             make_clip(root / "clip"), "--preset", "tiny", "--batch-size", 8, "--val-fraction", 0.1,
             "--random-crop", "--flip", "--keep-last", 2, "--epochs", args.epochs, "--folder"]

    def open_all(folder):
        """The newest checkpoint's payload, or none; every one must load."""
        payloads = [load_checkpoint(path)[0] for path in checkpoints(folder)]
        count["checkpoints_opened"] += len(payloads)
        return payloads[-1] if payloads else dict(step=0)

    codes = wait_for(start([*flags, root / "whole", "--workers", 0], log), 300)
    assert set(codes.values()) == {0}, f"the undisturbed run ended with {codes}"
    whole = open_all(root / "whole")
    while count["kills"] < args.kills or saved:
        folder = root / f"chain{chain}"
        pids = start([*flags, folder, "--workers", (chain + 1) % 2, "--save-minutes", 0.01], log)
        count["resumes"] += saved > 0
        last = count["kills"] >= args.kills   # enough: let the last chain finish
        codes = wait_for(pids, 300 if last else rng.uniform(0.5, 8))
        if not last and rng.random() < 0.5:
            codes |= wait_for([pid for pid in pids if pid not in codes], 60, lambda: saving(folder))
            time.sleep(rng.uniform(0, 0.2))
        alive = [pid for pid in pids if pid not in codes]
        assert not (last and alive), "the last run hangs"
        if not alive:
            assert set(codes.values()) == {0}, f"a run that nobody killed ended with {codes}"
            payload = open_all(folder)
            for key in ("unet", "ema", "epoch_losses"):
                assert_same(payload[key], whole[key])
            count["finished"] += 1
            chain, saved = chain + 1, 0
            continue
        victims = alive if rng.random() < 0.7 or len(alive) == 1 else [rng.choice(alive)]
        count["in_a_save"] += saving(folder)
        for pid in victims:
            os.kill(pid, signal.SIGKILL)
        count["kills"] += 1
        count["of_one_rank"] += len(victims) < len(alive)
        # Before the ranks have met, torch tries its 40 seconds twice or thrice.
        assert len(wait_for(alive, 180)) == len(alive), "the other rank hangs"
        lost, saved = saved, open_all(folder)["step"]
        assert saved >= lost, f"step {lost} had been saved and is lost"
        print(f"chain {chain}, step {saved}: {dict(count)}", flush=True)
    return whole


def main():
    parser = argparse.ArgumentParser()
    for flag, default in (("--kills", 200), ("--epochs", 40), ("--seed", 0)):
        parser.add_argument(flag, type=int, default=default)
    args, began, count = parser.parse_args(), time.monotonic(), Counter()
    with tempfile.TemporaryDirectory(prefix="kill_many_") as root, open(f"{root}/log", "w+") as log:
        try:
            whole = kill_chains(args, Path(root), log, count)
        except Exception as error:
            log.seek(0)
            sys.exit(f"{log.read()[-6000:]}\nFAILED: {error!r}; {count}")
    print(f"{count['kills']} kills, {count['in_a_save']} of them in a save and "
          f"{count['of_one_rank']} of one rank alone; {count['resumes']} resumes, "
          f"{count['finished']} chains finished with the undisturbed run's weights and losses "
          f"{[round(loss, 5) for loss in whole['epoch_losses'][::5]]}; "
          f"{count['checkpoints_opened']} checkpoints opened, 0 damaged, "
          f"in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()

"""Kill train.py by SIGKILL at random moments, many of them inside a save, and see that nothing is ever lost.

    python tests/kill_many.py                 # 200 kills, under an hour
    python tests/kill_many.py --kills 6       # what the tests run

Chains of runs in one folder each: start, kill, check that every checkpoint under a final name loads, start again, until the
run finishes; its weights must then be those of a run that nobody disturbed, bit for bit. Two processes run the real train.py;
they are forked from this one, which has torch and diffusers loaded already, so that a start takes seconds.
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
from pathlib import Path

import diffusers  # noqa: F401, loaded once for all
import numpy as np
import torch
import torch.utils.tensorboard  # noqa: F401
import transformers  # noqa: F401
from PIL import Image

from tiny_networks import make_clip

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RANK_TIMEOUT_SECONDS"] = "40"


def make_data(folder):
    """Twenty-four small pictures with captions."""
    folder.mkdir()
    rng, lines = np.random.default_rng(0), ["image,caption"]
    for i in range(24):
        Image.fromarray(rng.integers(0, 256, (20, 18, 3), dtype=np.uint8)).save(folder / f"{i:03d}.png")
        lines.append(f"{i:03d}.png,picture number {i}")
    (folder / "captions.txt").write_text("\n".join(lines))


def start(flags, log):
    """The process ids of the two ranks of a new run."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    pids = []
    for rank in range(2):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        try:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            os.environ |= dict(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                               MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            sys.argv = ["train.py", *map(str, flags)]
            runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
            sys.stdout.flush()
            os._exit(0)
        except BaseException:
            traceback.print_exc()
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


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng, began = random.Random(args.seed), time.monotonic()
    count = dict(kills=0, in_a_save=0, of_one_rank=0, resumes=0, finished=0, checkpoints_opened=0)
    with tempfile.TemporaryDirectory(prefix="kill_many_") as root:
        root = Path(root)
        make_data(root / "data")
        pid = os.fork()   # torch's threads do not survive a fork, so this process never computes
        if not pid:
            make_clip(root / "clip")
            os._exit(0)
        os.waitpid(pid, 0)
        flags = ["--data", root / "data", "--text-encoder", root / "clip", "--preset", "tiny", "--resolution", 16,
                 "--batch-size", 8, "--val-fraction", 0.1, "--epochs", args.epochs,
                 "--log-every", 1, "--sample-every", 0, "--device", "cpu",
                 "--random-crop", "--flip", "--keep-last", 2, "--folder"]
        from models import load_checkpoint
        with open(root / "log", "w+") as log:
            def fail(why):
                log.seek(0)
                sys.exit(f"FAILED: {why}; {count}\n{log.read()[-6000:]}")

            def open_all(folder):
                """The newest checkpoint's payload; each that has its final name must load."""
                payload = None
                for path in sorted(folder.glob("checkpoint_*.pt"), reverse=True):
                    count["checkpoints_opened"] += 1
                    opened = load_checkpoint(path)[0]
                    payload = payload or opened
                return payload

            codes = wait_for(start([*flags, root / "whole"], log), 300)
            if set(codes.values()) != {0}:
                fail(f"the undisturbed run ended with {codes}")
            whole, chain, last_step = open_all(root / "whole"), 0, 0
            while count["kills"] < args.kills or last_step:
                folder = root / f"chain{chain}"
                pids = start([*flags, folder, "--workers", rng.choice([0, 0, 1])], log)
                count["resumes"] += last_step > 0
                mid_save = rng.random() < 0.5
                if count["kills"] >= args.kills:   # enough: let the last chain finish
                    codes = wait_for(pids, 300)
                elif mid_save:
                    codes = wait_for(pids, rng.uniform(1, 8))
                    saving = [pid for pid in pids if pid not in codes]
                    codes |= wait_for(saving, 60, lambda: list(folder.glob(".checkpoint_*.tmp")))
                    time.sleep(rng.uniform(0, 0.2))
                else:
                    codes = wait_for(pids, rng.uniform(0.5, 10))
                alive = [pid for pid in pids if pid not in codes]
                if not alive:
                    if set(codes.values()) != {0}:
                        fail(f"a run that nobody killed ended with {codes}")
                    payload = open_all(folder)
                    for key in ("unet", "ema"):
                        if not all(torch.equal(value, whole[key][name]) for name, value in payload[key].items()):
                            fail(f"{folder.name}: other {key} weights than the undisturbed run's")
                    if payload["epoch_losses"] != whole["epoch_losses"]:
                        fail(f"{folder.name}: other losses")
                    count["finished"] += 1
                    chain, last_step = chain + 1, 0
                    continue
                victims = alive if rng.random() < 0.7 or len(alive) == 1 else [rng.choice(alive)]
                count["in_a_save"] += bool(list(folder.glob(".checkpoint_*.tmp")))
                for pid in victims:
                    os.kill(pid, signal.SIGKILL)
                count["kills"] += 1
                count["of_one_rank"] += len(victims) < len(alive)
                codes = wait_for(alive, 180)   # before the ranks have met, torch tries its 40 seconds twice or thrice
                if len(codes) < len(alive):
                    fail("the other rank hangs")
                payload = open_all(folder)
                if last_step and (payload is None or payload["step"] < last_step):
                    fail(f"step {last_step} had been saved and is lost")
                last_step = payload["step"] if payload else 0
                if count["kills"] % 10 == 0:
                    print(f"{time.monotonic() - began:.0f} s: {count}", flush=True)
    print(f"{count['kills']} kills, {count['in_a_save']} of them in a save and {count['of_one_rank']} of one rank alone; "
          f"{count['resumes']} resumes, {count['finished']} chains finished with the undisturbed run's weights and losses "
          f"{[round(loss, 5) for loss in whole['epoch_losses'][::5]]}; {count['checkpoints_opened']} checkpoints opened, "
          f"0 damaged, in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()

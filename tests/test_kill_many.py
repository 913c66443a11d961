"""Kill train.py by SIGKILL at random moments, many of them inside a save: nothing is ever lost.

    KILLS=200 EPOCHS=40 pytest -s -n 0 tests/test_kill_many.py     # under an hour

Chains of runs in one folder each: start, kill, check that every checkpoint under a final name
loads, start again, until the run finishes. Its weights must then be those of a run that nobody
disturbed, bit for bit. Every other chain reads its pictures in loader workers, and all save inside
epochs too. Two processes run the real train.py.
"""
import os
import random
import time
from collections import Counter

import pytest

import preloaded
from conftest import ROOT, assert_same, checkpoints, newest
from models import load_checkpoint

KILLS, EPOCHS = int(os.environ.get("KILLS", 6)), os.environ.get("EPOCHS", "12")


def wait_for(ranks, seconds, happens=lambda: False):
    """Until it happens, all have ended or so many seconds have passed; returns those that live."""
    deadline = time.monotonic() + seconds
    while (alive := [rank for rank in ranks if rank.exitcode is None]) and not (
            happens() or time.monotonic() > deadline):
        time.sleep(0.002)
    return alive


@pytest.mark.slow
def test_kill_many(tmp_path, flags):
    """Nothing that had been saved is lost, no file under its final name is damaged, the other rank
    never hangs, and each chain ends with the undisturbed run's weights and losses."""
    rng, chain, saved, count = random.Random(0), 0, 0, Counter()

    def start(folder, *more):
        command = [ROOT / "train.py", *flags, "--flip", "--keep-last", 2, "--epochs", EPOCHS,
                   "--folder", folder, *more]
        return preloaded.start([*map(str, command)], 2, tmp_path,
                               os.environ | dict(RANK_TIMEOUT_SECONDS="40"), [tmp_path / "log"] * 2)

    whole = start(tmp_path / "whole")
    assert not wait_for(whole, 300) and [rank.exitcode for rank in whole] == [0, 0]
    while count["kills"] < KILLS or saved:
        folder, is_last = tmp_path / f"chain{chain}", count["kills"] >= KILLS
        ranks = start(folder, "--workers", (chain + 1) % 2, "--save-minutes", 0.01)
        alive = wait_for(ranks, 300 if is_last else rng.uniform(0.5, 8))
        if not is_last and rng.random() < 0.5:
            alive = wait_for(alive, 60, lambda: any(folder.glob(".checkpoint_*.tmp")))
            time.sleep(rng.uniform(0, 0.2))
        victims = alive if rng.random() < 0.7 else alive[rng.randrange(2):][:1]
        count += Counter(kills=bool(alive), of_one_rank=len(victims) < len(alive),
                         in_a_save=any(folder.glob(".checkpoint_*.tmp")))
        for rank in victims:
            rank.kill()
        # Before the ranks have met, torch tries its 40 seconds twice or thrice.
        assert not wait_for(ranks, 180), "the other rank hangs"
        kept = [load_checkpoint(path)[0] for path in checkpoints(folder)]
        count["opened"] += len(kept)
        assert saved <= (saved := kept[-1]["step"] if kept else 0) and len(kept) <= 3
        print(f"chain {chain}, step {saved}: {dict(count)}", flush=True)
        if not alive:
            assert [rank.exitcode for rank in ranks] == [0, 0], (tmp_path / "log").read_text()
            for key in ("unet", "ema", "epoch_losses"):
                assert_same(kept[-1][key], newest(tmp_path / "whole")[key])
            chain, saved = chain + 1, 0

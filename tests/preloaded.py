"""Runs scripts in processes forked from one that has the libraries loaded: five seconds a start."""
import multiprocessing.forkserver
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import diffusers.models.unets.unet_2d_condition  # noqa: F401, loaded for the forked processes
import torch
import torch.utils.tensorboard  # noqa: F401

import tiny_networks  # noqa: F401

HERE = str(Path(__file__).parent)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])
STARTING = threading.Lock()
torch.backends.cudnn.deterministic = True   # weights are compared bit for bit


def run(command, cwd, env, timeout):
    """What subprocess.run gives for `python *command`, with its output captured as text."""
    with STARTING:
        before = os.environ.get("PYTHONPATH", "")
        # Where the server, once started, finds this module.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (HERE, before)))
        multiprocessing.forkserver.ensure_running()
        os.environ["PYTHONPATH"] = before
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        args = command, str(cwd or os.getcwd()), env, outputs
        process = SERVER.Process(target=become, args=args)
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(command, timeout)
        texts = [path.read_text() for path in outputs]
        return subprocess.CompletedProcess(command, process.exitcode, *texts)


def become(command, cwd, env, outputs):
    """Turn this process into that script, its output into these files."""
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = list(command)
    sys.path[:] = [str(Path(command[0]).parent), *(p for p in sys.path if p != HERE)]
    runpy.run_path(command[0], run_name="__main__")

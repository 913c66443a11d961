"""Runs scripts in processes forked from one that has the libraries loaded: five seconds a start."""
import multiprocessing.forkserver
import os
import runpy
import socket
import sys
from pathlib import Path

import diffusers.models.unets.unet_2d_condition  # noqa: F401, loaded for the forked processes
import torch
import torch.utils.tensorboard  # noqa: F401

import tiny_networks  # noqa: F401

HERE = str(Path(__file__).parent)
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__])
torch.backends.cudnn.deterministic = True   # weights are compared bit for bit


class Process(SERVER.Process):
    """`python *command`, its output appended to two files; to be handled like subprocess.Popen."""

    def __init__(self, command, cwd, env, outputs):
        before = os.environ.get("PYTHONPATH", "")
        # Where the server, once started, finds this module.
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (HERE, before)))
        multiprocessing.forkserver.ensure_running()
        os.environ["PYTHONPATH"] = before
        super().__init__(target=become, args=(command, str(cwd or os.getcwd()), env, outputs))
        self.start()

    def poll(self):
        return self.exitcode

    def wait(self, timeout=None):
        self.join(timeout)
        return self.exitcode   # None where it is late

    def send_signal(self, number):
        os.kill(self.pid, number)


def become(command, cwd, env, outputs):
    """Turn this process into that script, its output into these files."""
    os.setsid()
    for number, path in enumerate(outputs, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = list(command)
    sys.path[:] = [str(Path(command[0]).parent), *(p for p in sys.path if p != HERE)]
    runpy.run_path(command[0], run_name="__main__")


def start(command, processes, cwd, env, outputs):
    """A Process of each rank, without torchrun."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        meet = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(server.getsockname()[1]))
    meet |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(processes))
    return [Process(command, cwd, env | (meet | dict(RANK=str(rank), LOCAL_RANK=str(rank))
                                         if processes > 1 else {}), outputs)
            for rank in range(processes)]

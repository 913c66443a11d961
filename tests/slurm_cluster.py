"""A private Slurm of two nodes on this machine, for the time of a test: its own configuration, key,
ports and folders.

    with SlurmCluster(folder, cwd=project) as slurm:
        job = slurm.submit("slurm/train.sh", "--epochs", "1", options=["--nodes=2"])
        slurm.finish(job, "COMPLETED")

Each node has two made-up GPUs. Jobs of the partition urgent preempt those of gpu, which get a grace
time of 30 s. The system's Slurm is not touched: the programs find this one through SLURM_CONF.
"""
import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path

# A requeued job waits for as long as a job credential is valid (cred_expire), by default two
# minutes.
SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
ReturnToService=2
SlurmdTimeout=10
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=DEFAULT CPUs=32 RealMemory=262144 Gres=gpu:2
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]}
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]}
PartitionName=gpu Nodes=node[1-2] Default=YES State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=node[1-2] State=UP PriorityTier=2
"""
# A job that takes both nodes for a second.
URGENT = ["sbatch", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null",
          "--wrap=sleep 1"]
PATH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "NODE_FAIL", "CANCELLED", "PREEMPTED")


def why_not():
    """The reason why no private Slurm can or should be started here, or None."""
    programs = ("sbatch", "slurmctld", "slurmd", "munged", "setpriv")
    if missing := [name for name in programs if not shutil.which(name, path=PATH)]:
        return f"no {' and no '.join(missing)} here: apt-get install slurm-wlm munge"
    places = ("/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf")
    if {"SLURM_CONF", "SLURM_JOB_ID"} & os.environ.keys() or any(map(os.path.exists, places)):
        return "this machine belongs to a real Slurm, which the tests leave alone"


def poll(condition, seconds, what):
    """The condition's first true value. Raises: TimeoutError."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    raise TimeoutError(f"waited {seconds} s for {what}")


def free_ports(count):
    with ExitStack() as stack:
        servers = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
        return [stack.enter_context(server).getsockname()[1] for server in servers]


def environment(pid):
    """{name: value} of a process, {} where it is gone or another user's."""
    with suppress(OSError):
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
        return dict(line.partition("=")[::2] for line in text.split("\0"))
    return {}


class SlurmCluster:
    def __init__(self, folder, cwd):
        """`cwd`: where commands are run, and so where jobs run."""
        self.folder, self.cwd, self.daemons = Path(folder), Path(cwd), {}
        self.env = {name: value for name, value in os.environ.items() if name[:5] != "SLURM"}
        self.env |= {"SLURM_CONF": f"{self.folder}/slurm.conf", "PATH": PATH}

    def __enter__(self):
        folder = self.folder
        (folder / "state").mkdir(parents=True)
        for name in ("key", "gpu0", "gpu1"):   # the latter stand for /dev/nvidia0 and /dev/nvidia1
            (folder / name).touch(mode=0o600)
        (folder / "key").write_bytes(os.urandom(128))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
        (folder / "slurm.conf").write_text(SLURM_CONF.format(
            host=socket.gethostname(), user=getpass.getuser(), folder=folder, ports=free_ports(3)))
        files = (f"--{name}-file={folder}/{name}" for name in ("key", "pid", "log", "seed"))
        self.start("munged", "--foreground", "--force", f"--socket={folder}/socket", *files)
        poll((folder / "socket").exists, 10, "munged's socket")
        self.start("slurmctld", "-D", "-c")
        self.start_node("node1")
        self.start_node("node2")
        poll(lambda: self.run("sinfo", "-ho%T", "-pgpu") == "idle\n", 60, "two idle nodes")
        return self

    def __exit__(self, *_):
        """End the daemons and all that they have started."""
        def all_gone():
            for pid in (left := self.processes()):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not left
        poll(all_gone, 20, "the last processes to end")

    def start(self, *command, name=None):
        """A daemon, which ends when this process does, however that ends."""
        name = name or command[0]
        with open(self.folder / f"{name}.out", "ab") as log:
            self.daemons[name] = subprocess.Popen(["setpriv", "--pdeathsig=KILL", *command],
                                                  env=self.env, stdout=log, stderr=log)

    def start_node(self, node):
        self.start("slurmd", "-D", "-N", node, name=node)

    def cut_off(self, node):
        """Slurm no longer reaches the node, on which all goes on."""
        self.daemons[node].kill()
        self.daemons[node].wait(timeout=20)

    def processes(self):
        """Ids of all processes that carry this cluster's configuration in their environment."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
                if environment(pid).get("SLURM_CONF") == self.env["SLURM_CONF"]]

    def run(self, *command):
        """A Slurm command's output. Raises: CalledProcessError."""
        return subprocess.run(command, env=self.env, cwd=self.cwd, stdout=subprocess.PIPE,
                              text=True, timeout=30, check=True).stdout

    def submit(self, *script_and_args, options=()):
        """sbatch's job id."""
        return self.run("sbatch", "--parsable", *options, *map(str, script_and_args)).strip()

    def job(self, job):
        """scontrol's fields of a job."""
        text = self.run("scontrol", "show", "job", "-o", job)
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def log(self, job):
        return "".join(path.read_text() for path in self.cwd.glob(f"slurm/*-{job}.log"))

    def finish(self, job, state, restarts=0, seconds=400):
        """Wait until the job, restarted so often, has ended, which must be in this state."""
        def ended():
            fields = self.job(job)
            return int(fields["Restarts"]) >= restarts and fields["JobState"] in ENDED and fields
        fields = poll(ended, seconds, f"the end of job {job} after {restarts} restarts")
        how = fields["JobState"], int(fields["Restarts"])
        assert how == (state, restarts), f"{how} {self.log(job)}"

"""A private Slurm of two nodes on this machine, for the time of a test: its own configuration, key, ports and folders.

    with SlurmCluster(folder, cwd=project) as slurm:
        job = slurm.submit("slurm/train.sh", "--epochs", "1", options=["--nodes=2"])
        slurm.wait(job, "COMPLETED", seconds=60)

Each node has two made-up GPUs and the feature gpu32g, so that the scripts' own #SBATCH lines are accepted. Nothing is
read from or written to the system's Slurm: the programs find this one through SLURM_CONF.
"""
import ctypes
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits for as long as a job credential is valid, by default two minutes.
AuthInfo=socket={munge}/socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
SlurmdTimeout=10
# A job that does not stop by itself at its time limit is ended a minute later: on a busy machine all takes longer.
OverTimeLimit=1
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=0
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=32 RealMemory=262144 Gres=gpu:2 Feature=gpu32g
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=32 RealMemory=262144 Gres=gpu:2 Feature=gpu32g
PartitionName=gpu Nodes=node[1-2] Default=YES MaxTime=INFINITE State=UP PriorityTier=1
PartitionName=urgent Nodes=node[1-2] MaxTime=INFINITE State=UP PriorityTier=2
"""


def why_not():
    """The reason why no private Slurm can or should be started here, or None."""
    missing = [name for name in ("sbatch", "slurmctld", "slurmd", "munged") if not shutil.which(name, path=search_path())]
    if missing:
        return f"no {' and no '.join(missing)} here: apt-get install slurm-wlm munge"
    if "SLURM_CONF" in os.environ or "SLURM_JOB_ID" in os.environ or any(
            Path(place).exists() for place in ("/etc/slurm/slurm.conf", "/etc/slurm-llnl/slurm.conf")):
        return "this machine belongs to a real Slurm, which the tests leave alone"
    return None


def search_path():
    return f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin"


def free_ports(count):
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [s.getsockname()[1] for s in sockets]
    for s in sockets:
        s.close()
    return ports


def end_with_parent():
    """Called in a child: the kernel kills it when the process that started it ends, however that ends."""
    PR_SET_PDEATHSIG = 1
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def environment(pid):
    """NAME=VALUE of a process, [] where it is gone or another user's."""
    try:
        return Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace").split("\0")
    except OSError:
        return []


class SlurmCluster:
    def __init__(self, folder, cwd):
        """`cwd`: where commands are run, and so where jobs run."""
        self.folder, self.cwd = Path(folder), cwd
        self.daemons = {}   # name: Popen
        self.env = {name: value for name, value in os.environ.items() if not name.startswith("SLURM")}
        self.env |= {"SLURM_CONF": str(self.folder / "slurm.conf"), "PATH": f"{Path(sys.executable).parent}:{search_path()}"}

    def __enter__(self):
        munge = self.folder / "munge"
        for path in (munge, self.folder / "state"):
            path.mkdir(parents=True, mode=0o755)
        (munge / "key").touch(mode=0o600)
        (munge / "key").write_bytes(secrets.token_bytes(128))
        (self.folder / "slurm.conf").write_text(SLURM_CONF.format(
            host=socket.gethostname(), user=getpass.getuser(), folder=self.folder, munge=munge, ports=free_ports(3)))
        for number in (0, 1):
            (self.folder / f"gpu{number}").touch()   # stands for /dev/nvidia0 and /dev/nvidia1
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-1]\n")
        try:
            self.start("munged", "munged", "--foreground", "--force", f"--socket={munge}/socket", f"--key-file={munge}/key",
                       f"--pid-file={munge}/pid", f"--log-file={munge}/log", f"--seed-file={munge}/seed")
            poll(lambda: (munge / "socket").exists(), 10, "munged's socket")
            self.start("slurmctld", "slurmctld", "-D", "-c")
            for node in ("node1", "node2"):
                self.start_node(node)
            poll(lambda: self.run("sinfo", "-h", "-o", "%T", "-p", "gpu").split() == ["idle"], 30, "two idle nodes")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        """Cancel all jobs, end the daemons and whatever they left."""
        self.cancel_all()
        for name in reversed(list(self.daemons)):
            self.kill(name, signal.SIGKILL if name != "munged" else signal.SIGTERM)
        def all_gone():
            left = self.processes()
            for pid in left:
                with suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            return not left
        poll(all_gone, 20, "the last processes to end")

    def start(self, name, *command):
        log = open(self.folder / f"{name}.out", "ab")
        self.daemons[name] = subprocess.Popen(command, env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                              start_new_session=True, preexec_fn=end_with_parent)

    def start_node(self, node):
        self.start(node, "slurmd", "-D", "-N", node)

    def kill_node(self, node):
        """What a power cut does: the node's slurmd and all that it runs are gone at once."""
        self.kill(node)
        # A job's processes know the node's name; the slurmstepd above them does not, and has to go first: it would report.
        victims = [pid for pid in self.processes() if f"SLURMD_NODENAME={node}" in environment(pid)]
        parents = {int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) for pid in victims}
        steps = {pid for pid in parents if "slurmstepd" in Path(f"/proc/{pid}/cmdline").read_text()}
        for pid in [*steps, *victims]:
            with suppress(OSError):
                os.kill(pid, signal.SIGKILL)

    def kill(self, name, number=signal.SIGKILL):
        process = self.daemons.pop(name)
        process.send_signal(number)
        process.wait(timeout=20)

    def processes(self):
        """Ids of all processes that carry this cluster's configuration in their environment, but for this one."""
        mark = f"SLURM_CONF={self.folder / 'slurm.conf'}"
        everyone = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        return [pid for pid in everyone if pid != os.getpid() and mark in environment(pid)]

    def run(self, *command, seconds=30):
        """A Slurm command's output. Raises: RuntimeError with its error text."""
        result = subprocess.run(command, env=self.env, cwd=self.cwd, capture_output=True, text=True, timeout=seconds)
        if result.returncode:
            raise RuntimeError(f"{' '.join(command)}: {result.stderr}")
        return result.stdout

    def submit(self, *script_and_args, options=()):
        """sbatch's job id."""
        return self.run("sbatch", "--parsable", *options, *map(str, script_and_args)).strip()

    def cancel_all(self):
        """End all jobs, without time to save."""
        for how in (["--signal=KILL", "--full"], []):
            subprocess.run(["scancel", *how, "--user", getpass.getuser()], env=self.env, capture_output=True, timeout=30)

    def job(self, job):
        """scontrol's fields of a job."""
        text = self.run("scontrol", "show", "job", "-o", job)
        return dict(field.split("=", 1) for field in text.split() if "=" in field)

    def seconds_running(self, job):
        minutes, seconds = self.job(job)["RunTime"].split(":")[-2:]
        return 60 * int(minutes) + int(seconds)

    def wait(self, job, *states, seconds, restarts=0):
        """The job's fields once it is in one of the states and has been restarted at least so often."""
        def reached():
            fields = self.job(job)
            return fields if fields["JobState"] in states and int(fields["Restarts"]) >= restarts else None
        return poll(reached, seconds, f"job {job} to be {' or '.join(states)} after {restarts} restarts")


def poll(condition, seconds, what):
    """The condition's first true value. Raises: TimeoutError."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = condition()
        if value:
            return value
        time.sleep(0.1)
    raise TimeoutError(f"waited {seconds} s for {what}")

# shellcheck shell=bash
# Sourced by the scripts of this folder: the environment, how a script is started on all GPUs of the
# job, and how the job is put back in the queue.

# >>> Your site: activate the environment in which `python -c "import torch, diffusers"` works, for example
#     module load cuda;  source /path/to/venv/bin/activate;  eval "$(conda shell.bash hook)" && conda activate NAME
# and keep the downloaded networks on the work file system (slurm/fetch.sh fills the folder).
export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}
# <<<
set -euo pipefail   # not above: modules and conda do not expect it

command -v torchrun > /dev/null || { echo "error: no torchrun: activate your environment in slurm/common.sh" >&2; exit 1; }
export HF_HUB_OFFLINE=1 TORCH_HOME="$HF_HOME/torch"   # compute nodes have no internet
export RDMAV_FORK_SAFE=1 FI_EFA_FORK_SAFE=1 OMP_NUM_THREADS=1   # loader workers are forked beside InfiniBand and EFA; no notice of torchrun
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300             # how long torchrun lets its processes save after a SIGTERM; 30 before PyTorch 2.12
trap '' USR1 USR2                                     # --signal=B:USR1@60 would end the script
trap : TERM                                           # so would Slurm, at the time limit, before the job is requeued

# retry COMMAND...: for ten minutes, since Slurm's controller may be busy or down.
retry() {
    local end=$((SECONDS + 600))
    until "$@"; do
        ((SECONDS < end)) || return
        sleep 5
    done
}

job=${SLURM_JOB_ID:-}                                 # one task of an array has the array's own number, which means all its tasks
if [[ $job && $job == "${SLURM_ARRAY_JOB_ID:-}" ]]; then job+=_$SLURM_ARRAY_TASK_ID; fi
job_says() { [[ $(retry scontrol show job "$job") =~ $1 ]]; }
# Slurm puts a preempted job back in the queue, but not one that ends within the grace time, as it does while it starts.
preempted() { job_says 'PreemptTime=[0-9]'; }
# Not a job that was cancelled, nor one that Slurm has begun anew since a dead network cut this turn off.
requeue() {
    if job_says 'JobState=RUNNING|Reason=TimeLimit|PreemptTime=[0-9]' && job_says 'Requeue=1 Restarts=([0-9]+)' &&
        ((BASH_REMATCH[1] <= ${SLURM_RESTART_COUNT:-0})); then
        trap - TERM                                   # it ends this turn
        retry scontrol requeue "$job"
    fi
}

# launch SCRIPT FLAGS...: one torchrun per node, one process per GPU, meeting at a free port.
launch() {
    if ((${SLURM_JOB_END_TIME:-0} < $(date +%s))); then   # Slurm before 23.02 does not say when the job will end
        SLURM_JOB_END_TIME=$(SLURM_TIME_FORMAT=%s retry squeue --noheader --jobs="$job" --format=%e | grep -x '[0-9]\+') ||
            echo "warning: job $job: no time limit is known, so only --time-limit stops it in time" >&2
        export SLURM_JOB_END_TIME
    fi
    # The one task of a node gets all its GPUs.
    if [[ ${SLURM_GPUS_PER_TASK:-} ]]; then export SLURM_GPUS=$((SLURM_NTASKS * ${SLURM_GPUS_PER_TASK##*:})); fi
    unset SLURM_GPUS_PER_TASK SLURM_NTASKS_PER_GPU SLURM_TRES_PER_TASK SLURM_TRES_BIND
    # shellcheck disable=SC2016   # quoted here, for the shell of each node: nodes may differ in GPUs
    srun --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none \
        --kill-on-bad-exit=1 --unbuffered bash -c '
        trap "" USR1 USR2   # --signal=USR1@60 is for the training processes, and would end torchrun
        exec torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" --local-addr="$(address)" \
            --rdzv-backend=c10d --rdzv-endpoint="$0" --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" "$@"
        ' "$(address):$(free_port)" "$@"
}
free_port() { python -c 'import socket; print(socket.create_server(("", 0)).getsockname()[1])'; }
# Where this node is found: by its name, which need not be known where there is no other node.
address() { if ((SLURM_JOB_NUM_NODES > 1)); then hostname; else echo 127.0.0.1; fi; }
export -f address

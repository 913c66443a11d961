# shellcheck shell=bash
# Sourced by the scripts of this folder: the environment, once, and how a script is started on all GPUs of the job
# and the job put back in the queue.

# >>> Your site: activate the environment in which `python -c "import torch, diffusers"` works, for example
#     module load cuda;  source /path/to/venv/bin/activate;  eval "$(conda shell.bash hook)" && conda activate NAME
# and keep the downloaded networks on the work file system (slurm/fetch.sh fills the folder).
export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}
# <<<

command -v torchrun > /dev/null || { echo "error: no torchrun: activate your environment in slurm/common.sh" >&2; return 1; }
export HF_HUB_OFFLINE=1 TORCH_HOME="$HF_HOME/torch"   # compute nodes have no internet
export RDMAV_FORK_SAFE=1 FI_EFA_FORK_SAFE=1 OMP_NUM_THREADS=1   # loader workers are forked beside InfiniBand and EFA; no notice of torchrun
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300             # how long torchrun lets its processes save after a SIGTERM; 30 before PyTorch 2.12
trap '' USR1                                          # --signal=B:USR1@60 would end the script

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
requeue() { if job_says 'Requeue=1'; then retry scontrol requeue "$job"; fi; }

if [[ $job ]]; then                                   # Slurm before 23.02 does not say by itself when the job will end
    end=$(SLURM_TIME_FORMAT=%s retry squeue --noheader --jobs="$job" --format=%e) || true
    if [[ $end =~ ^[0-9]+$ ]]; then export SLURM_JOB_END_TIME=$end; fi
    [[ ${SLURM_JOB_END_TIME:-} ]] || echo "warning: job $job: no time limit is known, so only --time-limit stops it in time" >&2
fi

# launch SCRIPT FLAGS...: one torchrun per node, one process per GPU, meeting at a port made from the job's number.
launch() {
    if [[ ${SLURM_GPUS_PER_TASK:-} ]]; then           # the one task of a node gets all its GPUs
        export SLURM_GPUS=$((SLURM_NTASKS * ${SLURM_GPUS_PER_TASK##*:}))
        unset SLURM_GPUS_PER_TASK SLURM_TRES_PER_TASK
    fi
    # shellcheck disable=SC2016   # quoted here, for the shell of each node: nodes may differ in GPUs
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none \
        --kill-on-bad-exit=1 --unbuffered bash -c '
        trap "" USR1   # --signal=USR1@60 is for the training processes, and would end torchrun
        exec torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" --local-addr="$(address)" \
            --rdzv-backend=c10d --rdzv-endpoint="$0" --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" "$@"
        ' "$(address):$((10000 + SLURM_JOB_ID % 20000))" "$@"
}
# Where this node is found: by its name, which need not be known where there is no other node.
address() { if ((SLURM_JOB_NUM_NODES > 1)); then hostname; else echo 127.0.0.1; fi; }
export -f address

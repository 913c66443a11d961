# shellcheck shell=bash
# Sourced by the scripts of this folder: the environment, once, and how a script is started on all GPUs of the job.

# >>> Your site: activate the environment in which `python -c "import torch, diffusers"` works, for example
#     module load cuda;  source /path/to/venv/bin/activate;  eval "$(conda shell.bash hook)" && conda activate NAME
# and keep the downloaded networks on the work file system (slurm/fetch.sh fills the folder).
export HF_HOME=${HF_HOME:-$HOME/.cache/huggingface}
# <<<

export HF_HUB_OFFLINE=1 TORCH_HOME="$HF_HOME/torch"   # compute nodes have no internet
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300             # how long torchrun lets its processes save after a SIGTERM; 30 before PyTorch 2.12
if [[ ${SLURM_JOB_ID:-} ]]; then                      # Slurm before 23.02 does not say by itself when the job will end
    end=$(SLURM_TIME_FORMAT=%s squeue --noheader --jobs="$SLURM_JOB_ID" --format=%e || true)
    if [[ $end =~ ^[0-9]+$ ]]; then export SLURM_JOB_END_TIME=$end; fi
fi

# launch SCRIPT FLAGS...: one torchrun per node, one process per GPU, meeting at a port made from the job's number.
launch() {
    srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 --unbuffered \
        torchrun --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="${SLURM_GPUS_ON_NODE:-1}" \
        --rdzv-backend=c10d --rdzv-endpoint="$(hostname):$((10000 + SLURM_JOB_ID % 20000))" \
        --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" "$@"
}

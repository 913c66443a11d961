#!/bin/bash
#SBATCH --job-name=jupyter
#SBATCH --nodes=1
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-gpu=8
#SBATCH --mem=32G
#SBATCH --time=8:00:00
#SBATCH --output=slurm/%x-%j.log        # from the folder in which sbatch is called
#
# sbatch slurm/jupyter.sh                   Jupyter Lab and TensorBoard on a compute node, for slurm/connect_jupyter.sh JOBID
# sbatch slurm/jupyter.sh notebook FLAGS    another of Jupyter's servers, and flags for it
source slurm/common.sh

umask 077   # what is written from here on, the connection files among it, is readable by the owner alone
export JUPYTER_RUNTIME_DIR=$PWD/slurm/jupyter-$SLURM_JOB_ID
mkdir -p "$JUPYTER_RUNTIME_DIR"
rm -f "$JUPYTER_RUNTIME_DIR"/*   # of a turn that was cut off
# Both servers end first, since they write there until they do.
trap 'kill $(jobs -p) 2> /dev/null || true; wait; rm -rf "$JUPYTER_RUNTIME_DIR"' EXIT
JUPYTER_TOKEN=$(python -c 'import secrets; print(secrets.token_hex())')   # given like this, it is not written to the log
export JUPYTER_TOKEN

# Both listen to this node alone. TensorBoard knows no token: other users of the node can look at the curves.
port=$(free_port)
printf '\n"tensorboard": %s\n' "$port" > "$JUPYTER_RUNTIME_DIR/tensorboard"
tensorboard --logdir=runs --host=127.0.0.1 --port="$port" &
jupyter "${1:-lab}" --no-browser --ip=127.0.0.1 --port="$(free_port)" "${@:2}" &
wait $!   # for Jupyter alone; unlike a command in the foreground it lets a signal through to the trap at once

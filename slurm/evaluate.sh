#!/bin/bash
#SBATCH --job-name=evaluate
#SBATCH --nodes=1
#SBATCH --gres=gpu:2                    # GPUs per node
#SBATCH --cpus-per-gpu=8
#SBATCH --mem=64G                       # per node
#SBATCH --time=4:00:00
#SBATCH --constraint=gpu32g             # which nodes: see README.md beside this file
#SBATCH --requeue                       # starting again gives the same figures
#SBATCH --output=slurm/%x-%j.log        # from the folder in which sbatch is called: the one of evaluate.py
#SBATCH --open-mode=append
#
# sbatch slurm/evaluate.sh --checkpoint runs/job_123 --data flickr8k
set -euo pipefail
source slurm/common.sh

launch evaluate.py "$@" || { preempted && requeue; exit 1; }

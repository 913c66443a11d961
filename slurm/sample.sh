#!/bin/bash
#SBATCH --job-name=sample
#SBATCH --nodes=1
#SBATCH --gres=gpu:1                    # GPUs per node
#SBATCH --cpus-per-gpu=8
#SBATCH --mem=32G                       # per node
#SBATCH --time=1:00:00
#SBATCH --constraint=gpu32g             # which nodes: see README.md beside this file
#SBATCH --requeue                       # pictures depend on the seed alone, so starting again costs only time
#SBATCH --output=slurm/%x-%j.log        # from the folder in which sbatch is called: the one of sample.py
#SBATCH --open-mode=append
#
# sbatch slurm/sample.sh --checkpoint runs/job_123 --prompts "a dog, running" "two cats"
set -euo pipefail
source slurm/common.sh

launch sample.py "$@" || { preempted && requeue; exit 1; }

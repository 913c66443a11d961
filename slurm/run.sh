#!/bin/bash
#SBATCH --job-name=run
#SBATCH --nodes=1
#SBATCH --gres=gpu:1                    # GPUs per node
#SBATCH --cpus-per-gpu=8
#SBATCH --mem=64G                       # per node
#SBATCH --time=4:00:00
#SBATCH --requeue                       # results depend on the seed alone, so starting again costs only time
#SBATCH --output=slurm/%x-%j.log        # from the folder in which sbatch is called: the one of train.py
#SBATCH --open-mode=append
#
# sbatch slurm/run.sh sample.py --checkpoint runs/job_123 --prompts "a dog, running" "two cats"
# sbatch slurm/run.sh evaluate.py --checkpoint runs/job_123 --data flickr8k
source slurm/common.sh

launch "$@" || { preempted && requeue; exit 1; }

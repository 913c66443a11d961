#!/bin/bash
#SBATCH --job-name=preflight
#SBATCH --nodes=1
#SBATCH --gres=gpu:2                    # GPUs per node
#SBATCH --cpus-per-gpu=8
#SBATCH --mem=64G                       # per node
#SBATCH --time=0:15:00
#SBATCH --output=slurm/%x-%j.log        # from the folder in which sbatch is called: the one of train.py
#
# sbatch slurm/preflight.sh FLAGS       with the flags, and the --nodes and --gres, of the run to come: two minutes that
#                                       may save a week. A FAIL line, and a failed job, where something is wrong.
source slurm/common.sh

# What the run will have, unless told by --time-limit. Slurm's forms are M, M:S, H:M:S, D-H, D-H:M and D-H:M:S.
minutes=$(sed -n 's/^#SBATCH --time=\([0-9][-:0-9]*\).*/\1/p' slurm/train.sh | awk -F '[-:]' '
    /-/ { minutes = 1440 * $1 + 60 * $2 + $3 }
    !/-/ { minutes = NF == 3 ? 60 * $1 + $2 : $1 }
    { print (minutes > 50 ? minutes - 5 : 0.9 * minutes) }')
launch slurm/preflight.py --time-limit "${minutes:-inf}" "$@"

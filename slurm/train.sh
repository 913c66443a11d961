#!/bin/bash
#SBATCH --job-name=train
#SBATCH --nodes=1
#SBATCH --gres=gpu:2                    # GPUs per node
#SBATCH --cpus-per-gpu=8
#SBATCH --mem=64G                       # per node
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --output=slurm/%x-%j.log        # from the folder in which sbatch is called: the one of train.py
#SBATCH --open-mode=append
#
# sbatch slurm/train.sh --data flickr8k --epochs 100          options of sbatch itself, such as --nodes=2, go before the script
#
# The run lives in runs/job_JOBID. train.py stops in time by itself, with a checkpoint, and this script puts the job back
# in the queue as long as the run is unfinished and each turn brings it further, so that an error cannot repeat for ever.
# A turn that a preemption ended does not count.
source slurm/common.sh

run=runs/job_$SLURM_JOB_ID
for flag; do
    [[ $flag != --fo* ]] || { echo "error: --folder: the run lives in $run; to go on from another: --resume RUN" >&2; exit 2; }
done
if [[ -e $run/stop ]]; then echo "stopped by $run/stop: remove it to go on"; exit; fi
mkdir -p "$run"
newest_checkpoint() { find "$run" -name 'checkpoint_*.pt' | sort | tail -n 1; }

before=$(newest_checkpoint)
status=0
launch train.py --folder "$run" "$@" || status=$?
# The file `stop` is made by train.py when nothing is left to do, or by you, to stop the job for good.
if [[ ! -e $run/stop ]] && { [[ $(newest_checkpoint) != "$before" ]] || preempted; }; then requeue; fi
exit "$status"

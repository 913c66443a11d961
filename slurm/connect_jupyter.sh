#!/bin/bash
# The ssh tunnel from your laptop to a job of jupyter.sh: Jupyter and TensorBoard on the laptop's ports 8888 and 6006.
#
#     slurm/connect_jupyter.sh JOBID                       on the login node: prints the command for the laptop
#     connect_jupyter.sh --login USER@HOST JOBID           on the laptop: asks the login node, prints the same
#     connect_jupyter.sh --login USER@HOST --run JOBID     ... and opens the tunnel
set -euo pipefail

login='' run='' job=''
while (($#)); do
    case $1 in
        --login) login=${2:?--login needs USER@HOST} && shift ;;
        --run) run=yes ;;
        *) job=$1 ;;
    esac
    shift
done
[[ $job =~ ^[0-9]+$ ]] || { echo "usage: connect_jupyter.sh [--login USER@HOST] [--run] JOBID" >&2; exit 2; }

# shellcheck disable=SC2029   # quoted here, for the shell over there
ask() { if [[ $login ]]; then ssh "$login" "$(printf '%q ' "$@")"; else "$@"; fi; }
IFS='|' read -r state node folder reason < <(ask squeue --noheader --jobs="$job" --format='%T|%N|%Z|%r' 2>/dev/null) || true
case $state in
    RUNNING) ;;
    '') echo "job $job is gone, or never was: see slurm/jupyter-$job.log" >&2; exit 1 ;;
    *) echo "job $job is still ${state,,} ($reason): try again when it runs" >&2; exit 1 ;;
esac
files=$folder/slurm/jupyter-$job
read -r port token tensorboard < <(ask sh -c "cat $(printf %q "$files")/jpserver-*.json $(printf %q "$files")/tensorboard" \
    2>/dev/null | sed -n 's/.*"port": \([0-9]*\).*/\1/p; s/.*"token": "\(.*\)".*/\1/p; s/^"tensorboard": //p' | xargs) || true
[[ ${tensorboard:-} ]] || { echo "job $job has not got Jupyter up yet: try again in a moment, or see slurm/jupyter-$job.log" >&2; exit 1; }

login=${login:-$USER@$(hostname -f)}
tunnel=(ssh -N -o ExitOnForwardFailure=yes -J "$login" -L "8888:127.0.0.1:$port" -L "6006:127.0.0.1:$tensorboard"
    "${login%@*}@$node")
echo "on the laptop: ${tunnel[*]}"
echo "then open http://127.0.0.1:8888/?token=$token and, for TensorBoard, http://127.0.0.1:6006"
if [[ $run ]]; then exec "${tunnel[@]}"; fi

#!/bin/bash
# The ssh tunnel from your laptop to a job of jupyter.sh: Jupyter and TensorBoard on the laptop's ports 8888 and 6006,
# or on others: --port N and --tensorboard-port N.
#
#     slurm/connect_jupyter.sh JOBID                       on the login node: prints the command for the laptop
#     connect_jupyter.sh --login USER@HOST JOBID           on the laptop: asks the login node, prints the same
#     connect_jupyter.sh --login USER@HOST --run JOBID     ... and opens the tunnel
set -euo pipefail

login='' run='' job='' local=8888 board=6006
while (($#)); do
    case $1 in
        --login) login=${2:?--login needs USER@HOST} && shift ;;
        --run) run=yes ;;
        --port) local=${2:?--port needs a number} && shift ;;
        --tensorboard-port) board=${2:?--tensorboard-port needs a number} && shift ;;
        *) job=$1 ;;
    esac
    shift
done
[[ $job =~ ^[0-9]+$ ]] || { echo "usage: connect_jupyter.sh [--login USER@HOST] [--run] [--port N] [--tensorboard-port N] JOBID" >&2; exit 2; }

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

login=${login:-$(id -un)@$(hostname -f)}
tunnel=(ssh -N -o ExitOnForwardFailure=yes -J "$login" -L "$local:127.0.0.1:$port" -L "$board:127.0.0.1:$tensorboard"
    "${login%@*}@$node")
echo "on the laptop: ${tunnel[*]}"
echo "then open http://127.0.0.1:$local/?token=$token and, for TensorBoard, http://127.0.0.1:$board"
if [[ $run ]]; then exec "${tunnel[@]}"; fi

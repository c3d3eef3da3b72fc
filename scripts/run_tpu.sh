#!/usr/bin/env bash
# Trains on a Cloud TPU slice: makes the TPU VM if it is not there, installs the project on every
# worker, runs main.py on all of them, and starts again what a preemption ended.
#
#   scripts/run_tpu.sh --name=pod --zone=us-central2-b --project=lab --type=v4-128 \
#     [--spot] [--version=tpu-ubuntu2204-base] [--repository=URL] [--tries=100] [--keep] [--dry_run] \
#     [--bucket=NAME] -- --config=configs/coatnet0.py --workdir=gs://NAME/run1
#
# What stands behind `--` goes to main.py. The run's folder must be one that all workers see, and
# that outlives them: after a preemption it is what the run goes on from. That is one in a bucket,
# gs://NAME/..., or on a disk of the network; --bucket mounts a bucket at /mnt/NAME on every worker,
# with gcsfuse, for what reads files only. main.py ends with 0 when it is through, and with 2 when it
# refuses a config, which no further try would mend. --dry_run prints the commands and runs none.
# --keep leaves the TPU VM when the run is through.
set -euo pipefail

name='' zone='' project='' type='' spot='' keep='' dry_run='' tries=100
version='tpu-ubuntu2204-base'
repository=''
bucket=''

die() {
  echo "error: $*" >&2
  exit 2
}

while (($#)); do
  case $1 in
    --name=* | --zone=* | --project=* | --type=* | --version=* | --repository=* | --tries=* | --bucket=*)
      option=${1%%=*}
      printf -v "${option#--}" '%s' "${1#*=}"
      ;;
    -h | --help)
      sed -n '2,/^set /{s/^# \{0,1\}//;/^set /d;p}' "$0"
      exit
      ;;
    --spot) spot=1 ;;
    --keep) keep=1 ;;
    --dry_run) dry_run=1 ;;
    --)
      shift
      break
      ;;
    *) die "unknown argument $1: arguments of main.py stand behind --" ;;
  esac
  shift
done
for needed in name zone project type; do
  [[ -n ${!needed} ]] || die "--$needed is missing"
done
(($#)) || die 'nothing for main.py: give its arguments behind --'
[[ $tries =~ ^[1-9][0-9]*$ ]] || die "--tries=$tries is no number of tries"
if [[ " $* " != *' --workdir=gs://'* && " $* " != *' --workdir=/mnt/'* ]]; then
  echo 'warning: no --workdir=gs://... or /mnt/...: what workers write to their own disks is lost with them' >&2
fi
repository=${repository:-$(git -C "$(dirname "$0")" config --get remote.origin.url || true)}
[[ -n $repository ]] || die 'the project has no remote: give its --repository'

where=("$name" "--zone=$zone" "--project=$project")

run() {
  if [[ -n $dry_run ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_all_workers() {
  run gcloud compute tpus tpu-vm ssh "${where[@]}" --worker=all --command="$1"
}

is_ready() {
  local state
  state=$(gcloud compute tpus tpu-vm describe "${where[@]}" '--format=value(state)' 2>/dev/null) || true
  [[ $state == READY ]]
}

prepare() {
  if [[ -z $dry_run ]] && is_ready; then
    return
  fi
  # A preempted slice still has its name.
  run gcloud compute tpus tpu-vm delete "${where[@]}" --quiet || true
  run gcloud compute tpus tpu-vm create "${where[@]}" "--accelerator-type=$type" \
    "--version=$version" ${spot:+--spot} || return 1
}

install() {
  on_all_workers "test -d vision_attention || git clone $(printf %q "$repository") vision_attention; \
cd vision_attention && python3 -m venv .venv && .venv/bin/pip install --quiet -e '.[gcs]' 'jax[tpu]'" || return 1
  if [[ -n $bucket ]]; then
    # Images of TPU VMs carry gcsfuse; the folder is the user's, and a mounted one is left alone.
    on_all_workers "sudo install -d -o \$USER /mnt/$bucket && \
(mountpoint -q /mnt/$bucket || gcsfuse --implicit-dirs $bucket /mnt/$bucket)"
  fi
}

arguments=$(printf '%q ' "$@")
for ((try = 1; try <= tries; try++)); do
  code=0
  prepare && install || code=$?
  if ((code == 0)); then
    on_all_workers "cd vision_attention && .venv/bin/python main.py $arguments" || code=$?
  fi
  if ((code == 0)); then
    [[ -n $keep ]] || run gcloud compute tpus tpu-vm delete "${where[@]}" --quiet
    exit 0
  fi
  ((code != 2)) || die 'main.py refused to run; see its message above'
  echo "try $try of $tries ended with $code; starting again" >&2
  sleep "${RETRY_SECONDS:-60}"
done
die "gave up after $tries tries"

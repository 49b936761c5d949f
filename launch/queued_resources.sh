#!/usr/bin/env bash
# Trains on a TPU slice that Google Cloud lends through a queued resource, and gives it back at the end, whatever happens.
#
#   launch/queued_resources.sh [options] -- --config=FILE[:VARIANT] --workdir=DIR [more flags of flexjax.main]
#
#   --name=N          of the queued resource and its TPU; one that exists is used
#   --zone=Z          for instance us-west4-a
#   --topology=T      v5e:16x16, v5p:4x4x8 or v6e:16x16, in the size you want; the plan for it is printed first
#   --mount=SOURCE    what every host mounts at --mount_point: HOST:/SHARE (NFS, Filestore) or gs://BUCKET
#   --mount_point=DIR default /mnt/flexjax; the workdir lies below it
#   --project=P       default: that of gcloud
#   --restarts=N      how often exit code 75 starts again, on a new slice if the old one is gone; default 10
#   --spot            cheaper, can be taken away; or --reserved: from your reservation
#   --keep            do not delete the slice at the end: it goes on costing
#   --skip_plan       no plan
#   --dry_run         print the commands and run nothing
#
# What runs is the last commit of this checkout. Keep this script alive (tmux, on a machine in the cloud): if its connection
# ends, so does training. SIGTERM and Ctrl-C let the run save first; the exit code is then 75.

set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/flags.sh"
source "$here/exit_codes.sh"
source "$here/topology.sh"
source "$here/slice.sh"

name="" zone="" topology="" mount="" mount_point=/mnt/flexjax project="" restarts=10
spot="" reserved="" keep="" skip_plan="" dry_run=""
parse "name= zone= topology= mount= mount_point= project= restarts= spot reserved keep skip_plan dry_run" "$@"
need name zone topology mount
label name
whole restarts 0
[[ ! $spot || ! $reserved ]] || die "--spot and --reserved exclude each other; choose one"
[[ $mount =~ ^(gs://[^/]+|[^:/]+:/[^/].*)$ ]] || die "--mount=$mount is no mountable place; write HOST:/SHARE or gs://BUCKET"
[[ $workdir == "$mount_point"/* ]] || die "--workdir=$workdir does not lie below --mount_point=$mount_point"
read_topology
((chips == 8)) && [[ $topology == v[56]e:* ]] && hosts=1 # here, eight chips of these kinds are one machine

where=(--zone="$zone")
[[ ! $project ]] || where+=(--project="$project")
size=(--accelerator-type="$accelerator_type" --runtime-version="$runtime_version" ${spot:+--spot} ${reserved:+--reserved})
workers() { run gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all --command="$1"; }

archive=flexjax-$(git rev-parse --short HEAD).tar.gz
set_up() { # the same commit on every host
  run git archive --format=tar.gz --output="${TMPDIR:-/tmp}/$archive" HEAD &&
    run gcloud compute tpus tpu-vm scp "${TMPDIR:-/tmp}/$archive" "$name:" "${where[@]}" --worker=all &&
    workers "rm -rf flexjax && mkdir flexjax && tar -xzf $archive -C flexjax && \
bash flexjax/launch/setup_worker.sh $(words "$mount" "$mount_point")"
}

marker=flexjax-exit-code # gcloud returns one worker's code, which may hide the error of another: each says its own
command="cd flexjax && code=0; \$PWD/.venv/bin/python -m flexjax.main --distributed $(words "${training[@]}") || code=\$?; \
echo; echo $marker \$code"
train() { # sets `code`
  local log line found=()
  log=$(mktemp)
  set -m # Ctrl-C of a terminal must not reach the connections
  { workers "$command" | tee "$log"; } &
  connection=$!
  set +m
  while kill -0 "$connection" 2>/dev/null; do wait "$connection" || true; done # a signal to us ends `wait` only
  while read -r line; do found+=("$line"); done < <(sed -n "s/^$marker \([0-9][0-9]*\)\$/\1/p" "$log")
  ((${#found[@]} >= hosts)) || found+=("$again") # a worker that answers no more is a lost host
  code=$(verdict "${found[@]}")
  connection=""
  rm "$log"
}

stopping="" connection=""
# shellcheck disable=SC2329  # called by the trap
stop() { # the pattern fits the processes, not the shells that wait for them
  stopping=yes
  [[ ! $connection ]] || workers "pkill -TERM -f '^[^ ]*python -m flexjax.main' || true" || true
}

plan --topology="$topology"
if [[ $dry_run ]]; then
  borrow && set_up && workers "$command" && give_back
  exit 0
fi
trap give_back EXIT
trap stop TERM INT HUP
done=0 code=$again
until [[ $stopping ]]; do
  borrow
  if [[ $stopping ]]; then break; fi
  if set_up; then
    train
  elif [[ $(state) == ACTIVE ]]; then
    die "setting up the hosts failed, see above; nothing was trained" 6
  else
    code=$again
  fi
  if [[ $stopping ]] || ! may_restart "$code" "$done" "$restarts"; then break; fi
  done=$((done + 1))
done
exit "$code"

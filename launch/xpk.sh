#!/usr/bin/env bash
# Trains on one TPU slice of a GKE cluster that xpk made, as an xpk workload.
#
#   launch/xpk.sh [options] -- --config=FILE[:VARIANT] --workdir=DIR [more flags of flexjax.main]
#
#   --name=N         of the workload
#   --cluster=C      made with `xpk cluster create`
#   --zone=Z         for instance us-west4-a
#   --topology=T     v5e:16x16, v5p:4x4x8 or v6e:16x16, in the size you want; the plan for it is printed first
#   --storage=S      attached with `xpk storage attach`; the workdir lies below its mount point
#   --image=I        with flexjax and its packages in it, see docs/pods.md
#   --project=P      default: that of gcloud
#   --restarts=N     how often exit code 75 starts all hosts again; default 10
#   --skip_plan      no plan
#   --dry_run        print the commands and run nothing
#
# xpk also starts again on codes 42 and 127 to 255 (a process that was killed); all others end the workload.

set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/flags.sh"
source "$here/exit_codes.sh"
source "$here/topology.sh"

name="" cluster="" zone="" topology="" storage="" image="" project="" restarts=10 skip_plan="" dry_run=""
parse "name= cluster= zone= topology= storage= image= project= restarts= skip_plan dry_run" "$@"
need name cluster zone topology storage image
label name
whole restarts 0
read_topology

where=(--cluster="$cluster" --zone="$zone")
[[ ! $project ]] || where+=(--project="$project")
command="exec $(words python -m flexjax.main --distributed "${training[@]}")" # exec: so that xpk's SIGTERM reaches Python

plan --topology="$topology"
run xpk workload create --workload="$name" "${where[@]}" --tpu-type="$tpu_type" --num-slices=1 --docker-image="$image" \
  --storage="$storage" --max-restarts="$restarts" --restart-on-exit-codes="$again" --termination-grace-period-seconds=120 \
  --command="$command"
[[ $dry_run ]] || printf 'then: %s\n' "$(words xpk workload list "${where[@]}" --wait-for-job-completion="$name")" >&2

#!/usr/bin/env bash
# Trains on one TPU slice of a GKE cluster that has the JobSet controller: fills in launch/jobset.yaml and applies it.
#
#   launch/jobset.sh [options] -- --config=FILE[:VARIANT] --workdir=DIR [more flags of flexjax.main]
#
#   --name=N          of the JobSet
#   --topology=T      v5e:16x16, v5p:4x4x8 or v6e:16x16, in the size you want; the plan for it is printed first
#   --image=I         with flexjax and its packages in it, see docs/pods.md
#   --claim=C         a PersistentVolumeClaim that many hosts may write (Filestore, Lustre, or a bucket)
#   --mount_point=DIR where it is mounted; default /mnt/flexjax; the workdir lies below it
#   --gcsfuse         the claim is a bucket
#   --spot            on a node pool of Spot VMs
#   --namespace=N     default: default
#   --restarts=N      how often exit code 75 starts all hosts again; default 10
#   --skip_plan       no plan
#   --dry_run         print the YAML, with the commands as comments, and run nothing

set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/flags.sh"
source "$here/topology.sh"

# shellcheck disable=SC2034  # some are only read by their names
name="" topology="" image="" claim="" mount_point=/mnt/flexjax gcsfuse="" spot="" namespace=default restarts=10
skip_plan="" dry_run=""
parse "name= topology= image= claim= mount_point= gcsfuse spot namespace= restarts= skip_plan dry_run" "$@"
need name topology image claim
label name
label namespace
whole restarts 0
[[ $workdir == "$mount_point"/* ]] || die "--workdir=$workdir does not lie below --mount_point=$mount_point"
read_topology

hold_plain() { # OPTION...: what goes into the YAML as it is
  local option
  for option; do
    [[ ${!option} =~ ^[A-Za-z0-9_./:@-]+$ ]] || die "--$option=${!option} may hold letters, digits and _ . / : @ - only"
  done
}
hold_plain image claim mount_point

manifest() { # launch/jobset.yaml with each ${variable} as this script has it
  local text variable word arguments="" bucket=${gcsfuse:+true}
  for word in "${training[@]}"; do
    word=${word//\\/\\\\} word=${word//\"/\\\"}
    # shellcheck disable=SC2016  # nothing is meant to expand
    arguments+="${arguments:+, }\"${word//'$('/'$$('}\"" # Kubernetes reads $$( as $(
  done
  arguments="[$arguments]" bucket=${bucket:-false}
  text=$(<"$here/jobset.yaml")
  for variable in name namespace image claim mount_point bucket restarts hosts chips_per_host node_label shape arguments; do
    text=${text//"\${$variable}"/"${!variable}"}
  done
  [[ ! $spot ]] || text=${text//'# --spot: '/}
  printf '%s\n' "$text"
}

if [[ $dry_run ]]; then
  { plan --topology="$topology" && run kubectl apply --filename=-; } | sed 's/^/# /'
  manifest
  exit 0
fi
plan --topology="$topology"
manifest | run kubectl apply --filename=-
first_pod=jobset.sigs.k8s.io/jobset-name=$name,batch.kubernetes.io/job-completion-index=0
printf 'then: kubectl logs --namespace=%s --follow --selector=%s\n' "$namespace" "$first_pod" >&2

#!/usr/bin/env bash
# Submits launch/slurm.sbatch: one process per GPU. Call it in the checkout, with the environment of the job active.
#
#   launch/slurm.sh [options] -- --config=FILE[:VARIANT] --workdir=DIR [more flags of flexjax.main]
#
#   --nodes=N        default 2
#   --gpus=N         of each node; default 8
#   --partition=P    default: the cluster's
#   --account=A      default: yours
#   --time=T         limit of one start, for instance 12:00:00; default 24:00:00
#   --gpu=G          a100, h100 or h200: print the plan for all of them first; default: no plan
#   --restarts=N     how often exit code 75 queues the job again; default 10
#   --skip_plan      no plan
#   --dry_run        print the commands and run nothing
#
# Other options of sbatch: as SBATCH_... variables. The workdir is a directory that all nodes see.

set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/flags.sh"

nodes=2 gpus=8 partition="" account="" time=24:00:00 gpu="" restarts=10 skip_plan="" dry_run=""
parse "nodes= gpus= partition= account= time= gpu= restarts= skip_plan dry_run" "$@"
whole nodes 1
whole gpus 1
whole restarts 0
[[ -f launch/slurm.sbatch && -d flexjax ]] || die "this is not the checkout; the job starts where sbatch is called: cd there"

submit=(sbatch --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" --time="$time")
[[ ! $partition ]] || submit+=(--partition="$partition")
[[ ! $account ]] || submit+=(--account="$account")
job=(launch/slurm.sbatch --restarts="$restarts")

plan ${gpu:+"--topology=gpu:$((nodes * gpus))" "--gpu=$gpu"}
run "${submit[@]}" "${job[@]}" -- "${training[@]}"
if [[ $dry_run ]]; then PYTHON=$python bash "${job[@]}" --dry_run -- "${training[@]}"; fi

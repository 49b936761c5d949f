#!/usr/bin/env bash
# Trains with several processes on this machine; they meet at a free port of it.
#
#   launch/local.sh [options] -- --config=FILE[:VARIANT] --workdir=DIR [more flags of flexjax.main]
#
#   --processes=N   how many; default 2
#   --devices=N     fake CPU devices of each; default: the devices there are
#   --topology=T    print the plan for these chips first (v5e:2x4); default: no plan
#   --restarts=N    how often exit code 75 starts all of them again; default 10
#   --skip_plan     no plan
#   --dry_run       print the commands and run nothing
#
# SIGTERM and Ctrl-C reach every process as SIGTERM: they save, and the exit code is 75. Otherwise it is the worst one.

set -euo pipefail
here=$(dirname "${BASH_SOURCE[0]}")
source "$here/flags.sh"
source "$here/exit_codes.sh"

processes=2 devices="" topology="" restarts=10 skip_plan="" dry_run=""
parse "processes= devices= topology= restarts= skip_plan dry_run" "$@"
whole processes 1
whole restarts 0
[[ ! $devices ]] || whole devices 1

command=("$python" -m flexjax.main)
if [[ $devices ]]; then
  fake="--xla_force_host_platform_device_count=$devices"
  command=(env JAX_PLATFORMS=cpu XLA_FLAGS="${XLA_FLAGS:+$XLA_FLAGS }$fake" "${command[@]}")
fi

free_port() { # below the range from which the system gives ports away
  local port
  for _ in {1..50}; do
    port=$((20000 + RANDOM % 10000))
    (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null || { printf '%s\n' "$port" && return; }
  done
  die "no free port from 20000 to 29999 on this machine; stop what listens there" 6
}

pids=() stopping="" interrupted=""
# shellcheck disable=SC2329  # called by the trap
stop() {
  stopping=yes interrupted=yes
  local pid
  for pid in "${pids[@]-}"; do [[ ! $pid ]] || kill -TERM "$pid" 2>/dev/null || true; done
}

wait_for() { # PID: sets `code`; a signal to this script ends `wait`, not the process
  local first=""
  while true; do
    interrupted="" code=0
    wait "$1" || code=$?
    [[ $code != 127 || ! $first ]] || code=$first # its end had been reported before the signal came
    [[ $interrupted ]] || return 0
    first=$code
  done
}

train() { # one start of all processes; sets `code`
  local index port codes=()
  pids=()
  port=$(free_port)
  set -m # each process in a group of its own: Ctrl-C of a terminal must reach it once, by us
  for ((index = 0; index < processes; index++)); do
    "${command[@]}" --coordinator="127.0.0.1:$port" --num_processes="$processes" --process_id="$index" "${training[@]}" \
      </dev/null &
    pids+=("$!")
    [[ ! $stopping ]] || kill -TERM "$!" 2>/dev/null || true
  done
  set +m
  for index in "${!pids[@]}"; do
    wait_for "${pids[index]}"
    codes+=("$code")
  done
  code=$(verdict "${codes[@]}")
}

if [[ $dry_run ]]; then
  plan ${topology:+"--topology=$topology"}
  for ((index = 0; index < processes; index++)); do
    run "${command[@]}" --coordinator=127.0.0.1:PORT --num_processes="$processes" --process_id="$index" "${training[@]}"
  done
  exit 0
fi

trap stop TERM INT HUP
plan ${topology:+"--topology=$topology"}
done=0 code=$again
until [[ $stopping ]]; do
  train
  if [[ $stopping ]] || ! may_restart "$code" "$done" "$restarts"; then break; fi
  done=$((done + 1))
done
exit "$code"

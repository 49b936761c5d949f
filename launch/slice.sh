# Borrows a TPU slice through a queued resource, and gives it back.
# shellcheck shell=bash disable=SC2154  # the script that sources this has: name where size keep dry_run stopping

resource() { run gcloud compute tpus queued-resources "$1" "$name" "${where[@]}" "${@:2}"; }
create() { resource create --node-id="$name" "${size[@]}"; }

only_state="--format=value(state.state)"
state() {
  local found problem
  problem=$(mktemp)
  if ! found=$(gcloud compute tpus queued-resources describe "$name" "${where[@]}" "$only_state" 2>"$problem"); then
    if grep -q NOT_FOUND "$problem"; then found=ABSENT; else found="UNKNOWN, $(tail -n 1 "$problem")"; fi
  fi
  rm "$problem"
  printf '%s\n' "$found"
}

borrow() { # returns with a slice that is ours, however long that takes
  if [[ $dry_run ]]; then create && resource describe "$only_state" && return; fi
  local now
  until [[ $stopping ]]; do
    now=$(state)
    case $now in
      ACTIVE) return ;;
      ABSENT) create ;;
      FAILED | SUSPENDED) resource delete --force --quiet && create ;;
      *) printf '%s: %s\n' "$name" "$now" >&2 && sleep "${POLL_SECONDS:-30}" ;; # in the queue, or no answer
    esac
  done
}

give_back() {
  [[ ! $keep ]] || return 0
  resource delete --force --quiet ||
    printf 'warning: %s may not be deleted, and then goes on costing; see: %s\n' "$name" \
      "$(words gcloud compute tpus queued-resources list "${where[@]}")" >&2
}

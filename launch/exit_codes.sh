# What several exit codes mean together, and whether to start again.
# shellcheck shell=bash

again=75 # preempted or a host was lost, state saved: run the same command again

verdict() { # CODE...: prints the exit code of a job from those of its processes
  # A process that names an error decides; the others only noticed that it was gone (75). A process that was killed
  # (above 127) is a lost host if another one lived to say so.
  local code rank highest=0 worst=0
  for code; do
    if ((code == 0)); then rank=0; elif ((code > 127)); then rank=1; elif ((code == again)); then rank=2; else rank=3; fi
    if ((rank > highest || (rank == highest && code > worst))); then highest=$rank worst=$code; fi
  done
  printf '%s\n' "$worst"
}

may_restart() { # CODE DONE LIMIT: whether another start follows, after DONE of LIMIT restarts
  (($1 == again)) || return 1
  if (($2 >= $3)); then
    printf 'exit code %s, and all %s restarts are used; run the same command again\n' "$1" "$3" >&2
    return 1
  fi
  printf 'exit code %s: restart %s of %s\n' "$1" "$(($2 + 1))" "$3" >&2
}

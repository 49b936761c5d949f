"""Programs that stand in for Python and for the tools of clusters: they write down how they were called."""

RECORD = r"""
record() {  # one line a call, words separated by the unit separator
  local IFS=$'\x1f'
  printf '%s\n' "${0##*/}$IFS$*" >>"$STATE/calls"
}
next() {  # LIST COUNTER: the entry of this call, the last one from then on
  local -a list=($1)
  local done=0
  [[ ! -f $STATE/$2 ]] || done=$(<"$STATE/$2")
  echo $((done + 1)) >"$STATE/$2"
  echo "${list[done < ${#list[@]} ? done : ${#list[@]} - 1]}"
}
"""

PYTHON = r"""
record "$@"
[[ $2 != flexjax.plan ]] || exit "${PLAN_CODE:-0}"
id=${SLURM_PROCID:-0}
for word; do [[ $word != --process_id=* ]] || id=${word#*=}; done
[[ ! ${UNTIL_SIGNAL-} ]] || exec "$UNTIL_SIGNAL" -S -E -c "$LISTEN" "$STATE" "$id"
codes=CODES_$id
code=$(next "${!codes:-${CODES:-0}}" "starts.$id")
((code != 137)) || kill -KILL $$
exit "$code"
"""

LISTEN = r"""
import os, signal, sys, time
state, process = sys.argv[1:]

def heard(number, _):  # unlike a shell, Python hears signals that its parent ignored
    with open(f"{state}/signals", "a") as file:
        file.write(f"{process} {signal.Signals(number).name}\n")
    if number == signal.SIGTERM:
        time.sleep(0.4 if process == "0" else 0.1)  # saving takes a while, and longest where it is waited for first
        open(f"{state}/saved.{process}", "w").close()
        os._exit(75)

for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, heard)
open(f"{state}/ready.{process}", "w").close()
while True:
    signal.pause()
"""

GCLOUD = r"""
record "$@"
case "$* " in
  *" describe "*)
    state=$(next "${STATES:-ACTIVE}" describe)
    case $state in
      ABSENT) echo "ERROR: NOT_FOUND: it was not found" >&2 && exit 1 ;;
      OFFLINE) echo "ERROR: no network" >&2 && exit 1 ;;
    esac
    echo "$state" && exit ;;
  *" ssh "*pkill*) touch "$STATE/stopped" ;;
  *" delete "*) [[ ! -f $STATE/stopped || -f $STATE/saved ]] || touch "$STATE/deleted-too-early" ;;
  *" ssh "*flexjax.main*)
    if [[ ${UNTIL_SIGNAL-} ]]; then
      "$UNTIL_SIGNAL" -S -E -c "$LISTEN" "$STATE" gcloud &
      while [[ ! -f $STATE/stopped ]]; do sleep 0.02; done
      kill -KILL $! && sleep 0.2 && touch "$STATE/saved"
    fi
    for code in $(next "${WORKERS:-0,0,0,0}" ssh | tr , ' '); do printf 'step 1\n\nflexjax-exit-code %s\n' "$code"; done
    exit 1 ;;  # as gcloud does when one worker failed; what the workers say themselves counts
esac
exit "${GCLOUD_CODE:-0}"
"""

SRUN = r"""
record "$@"
while [[ $1 == --* ]]; do shift; done
[[ ! ${SRUN_CODE-} ]] || exit "$SRUN_CODE"
trap : TERM
worst=0
for ((task = 0; task < SLURM_NTASKS; task++)); do
  SLURM_PROCID=$task "$@" || { code=$?; ((code <= worst)) || worst=$code; }
done
exit "$worst"
"""

GIT = r"""
[[ $1 != rev-parse ]] || { echo abc1234 && exit; }
record "$@"
"""

KUBECTL = r"""
record "$@"
cat >"$STATE/applied.yaml"
"""

NOT_MOUNTED = 'record "$@"\nexit "${MOUNTED:-1}"\n'
ANY = 'record "$@"\n'
PROGRAMS = {"python": PYTHON, "gcloud": GCLOUD, "srun": SRUN, "git": GIT, "kubectl": KUBECTL}
PROGRAMS |= {"mountpoint": NOT_MOUNTED}
PROGRAMS |= {name: ANY for name in ("xpk", "sbatch", "scontrol", "sudo", "gcsfuse", "mount.nfs", "python3", "uv")}


def install(directory):
    for name, body in PROGRAMS.items():
        path = directory / name
        path.write_text(f"#!/usr/bin/env bash\n{RECORD}{body}")
        path.chmod(0o755)

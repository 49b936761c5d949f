# What the launch scripts share: their flags, one-line errors, the plan, and commands that --dry_run only prints.
#
# A script sets a default for each of its options, then calls `parse`, which assigns them:
#   dry_run="" skip_plan="" name=""
#   parse "name= dry_run skip_plan" "$@"
# What follows `--` is for flexjax.main: the array `training`, and from it `workdir`.
# shellcheck shell=bash

python=${PYTHON:-python}

die() { # MESSAGE [EXIT_CODE]
  printf 'error: %s\n' "$1" >&2
  exit "${2:-2}"
}

usage() { # the comment at the head of the script
  sed -n '2,/^$/{/^#SBATCH/d;s/^# \{0,1\}//p;}' "$0"
}

parse() { # "OPTION= SWITCH ..." ARGUMENT...
  local known=" $1 " argument option
  shift
  training=()
  while (($#)); do
    argument=$1 option=${1#--}
    option=${option%%=*}
    shift
    case $argument in
      -h | --help) usage && exit 0 ;;
      --) training=("$@") && break ;;
      --config* | --workdir*) die "$argument is a flag of flexjax.main and belongs behind a --" ;;
      --*=?*) [[ $known == *" $option= "* ]] || die "unknown option --$option=...; see --help" ;;
      *) [[ $argument == --* && $known == *" $option "* ]] || die "unknown or unfinished argument '$argument'; see --help" ;;
    esac
    if [[ $argument == *=* ]]; then argument=${argument#*=}; else argument=yes; fi
    printf -v "$option" '%s' "$argument"
  done
  ((${#training[@]})) || die "nothing to train; add: -- --config=configs/NAME.py --workdir=DIR"
  check_training
}

check_training() { # sets `workdir`
  local argument config=""
  workdir=""
  for argument in "${training[@]}"; do
    case $argument in
      *$'\n'*) die "a flag behind the -- holds a line break; write it in one line" ;;
      --config=?*) config=yes ;;
      --workdir=?*) workdir=${argument#*=} ;;
      --distributed* | --coordinator=* | --num_processes=* | --process_id=*) die "$argument: the launcher adds it" ;;
      --?*) ;;
      *) die "'$argument' behind the -- is no flag; write --flag=value" ;;
    esac
  done
  [[ $config ]] || die "--config is missing behind the --; for instance --config=configs/math_expert.py"
  [[ $workdir ]] || die "--workdir is missing behind the --; give a directory that all hosts see"
  [[ $workdir != *://* ]] || die "--workdir=$workdir is no directory; mount the bucket (gcsfuse) and give the path below it"
}

need() { # OPTION...
  local option
  for option; do [[ ${!option} ]] || die "--$option is missing; see --help"; done
}

whole() { # OPTION LEAST
  if [[ ! ${!1} =~ ^[0-9]{1,6}$ ]] || ((10#${!1} < $2)); then die "--$1=${!1} is no whole number of at least $2"; fi
}

label() { # OPTION: what Google Cloud and Kubernetes take as a name
  [[ ${!1} =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
    die "--$1=${!1} is no name; use at most 40 of a-z, 0-9 and -, a letter first, no - last"
}

words() { # WORD...: as a shell would read them again
  local word line=""
  for word; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then word="'${word//\'/\'\\\'\'}'"; fi
    line+="${line:+ }$word"
  done
  printf '%s\n' "$line"
}

run() { # COMMAND...: runs it, and says so; with --dry_run only says so
  if [[ ${dry_run-} ]]; then words "$@"; else
    printf '+ %s\n' "$(words "$@")" >&2
    "$@"
  fi
}

plan() { # [--topology=T [FLAG...]]: the plan for that machine, before it costs; needs `skip_plan`, `training`
  local argument given=() code=0
  if (($# == 0)) || [[ $skip_plan ]]; then return; fi
  for argument in "${training[@]}"; do [[ $argument != --config[=.]* ]] || given+=("$argument"); done
  run env JAX_PLATFORMS=cpu "$python" -m flexjax.plan "$@" "${given[@]}" || code=$?
  ((code == 0)) || die "the plan for ${1#*=} failed with exit code $code; change what it names, or pass --skip_plan" "$code"
}

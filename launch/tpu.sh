#!/usr/bin/env bash
# A search or training on a Cloud TPU pod: create it, set it up, run, follow, resume, delete.
# Made for bash 3.2 and later, so that it runs on a Mac as well.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
# shellcheck source-path=SCRIPTDIR source=tpu_functions.sh
source "$root/launch/tpu_functions.sh"

usage() {
  cat <<'END'
launch/tpu.sh VERB --FLAG=VALUE ... [-- flags of cpnas_jax.main]

  create   ask for the pod through a queued resource and wait until it is there
  setup    copy this repository's commit to all workers and install it there
  run      start `python -m cpnas_jax.main --workdir=... FLAGS` on all workers and return
  logs     follow the log of one worker; Ctrl-C ends the following, not the run
  status   the states of pod and workers
  stop     let the run save and end; a second time: end at once
  resume   see the run through: whatever of the above is needed, again after each preemption
  delete   delete the pod, which is billed until then

  --name=NAME         of queued resource and node                       CPNAS_NAME
  --project=PROJECT   of Google Cloud                                   CPNAS_PROJECT
  --zone=ZONE         such as us-central2-b                             CPNAS_ZONE
  --type=TYPE         accelerator type, such as v4-32                   CPNAS_TYPE
  --version=VERSION   runtime version; by default what fits the type    CPNAS_VERSION
  --workdir=DIR       gs://... wherever there is more than one worker   CPNAS_WORKDIR
  --ref=REF           commit to set up, HEAD by default
  --data=gs://DIR     prepared data sets to copy to every worker's ~/tensorflow_datasets
  --spot, --reserved  the tier; none of them is on demand
  --create-flag=FLAG  one more flag of `queued-resources create`; may be repeated
  --worker=N          whose log, 0 by default
  --wait=MINUTES      for the pod, 120 by default; the request expires by itself then
  --poll=SECONDS      between two questions, 30 by default
  --grace=SECONDS     for the other workers after one has failed, 300 by default
  --attempts=N        at the run, 20 by default
  --delete            resume: delete the pod at the end, however the run ended
  --dry-run           print the commands, as for a run without incidents; run none

Exit status: that of the run; 75 when the attempts are used up and the same command would resume;
1 when gcloud fails; 2 for wrong usage.
END
}

usage_error() {
  printf 'error: %s; see launch/tpu.sh --help\n' "$*" >&2
  exit 2
}

# need NAME VARIABLE EXAMPLE VALUE: a flag without which the verb cannot do its work.
need() {
  [ -n "$4" ] || usage_error "$verb needs --$1=..., such as --$1=$3 (or $2 in the environment)"
}

check_number() {
  case $2 in
    '' | *[!0-9]*) usage_error "--$1=$2 is no whole number" ;;
  esac
}

check_name() {
  # It becomes part of addresses (NAME:file) and paths.
  case $name in
    [!a-z]* | *[!a-z0-9-]* | *-) usage_error "--name=$name: lower-case letters, digits and hyphens" ;;
  esac
}

check_workdir() {
  case $workdir in
    gs://?*) return ;;
  esac
  # The disk of a preempted pod is lost.
  [ "$verb" != resume ] || usage_error "--workdir=$workdir: resume needs gs://..., which outlives a pod"
  need type CPNAS_TYPE v4-8 "$type"
  case $type in
    v[234]-8 | v5p-8 | v5litepod-[148] | v6e-[148]) ;;
    *) usage_error "--workdir=$workdir is not shared by the workers of $type; give gs://..." ;;
  esac
}

check_main_flags() {
  local word
  for word in ${main_flags[@]+"${main_flags[@]}"}; do
    case $word in
      --workdir | --workdir=*) usage_error "--workdir stands before --, not among the flags of main" ;;
    esac
  done
  [ "${#main_flags[@]}" -gt 0 ] || usage_error "$verb needs the flags of main behind --, such as -- --config=configs/cifar10.py:search"
}

choose_version() {
  [ -z "$version" ] || return 0
  case $type in
    v[234]-*) version=tpu-ubuntu2204-base ;;
    v5p-*) version=v2-alpha-tpuv5 ;;
    v5litepod-*) version=v2-alpha-tpuv5-lite ;;
    v6e-*) version=v2-alpha-tpuv6e ;;
    *) usage_error "--version=... is needed for --type=$type" ;;
  esac
}

case ${1-} in
  create | setup | run | logs | status | stop | resume | delete) verb=$1 && shift ;;
  -h | --help | help)
    usage
    exit 0
    ;;
  '') usage_error 'a verb is missing' ;;
  *) usage_error "there is no verb $1" ;;
esac

name=${CPNAS_NAME-} project=${CPNAS_PROJECT-} zone=${CPNAS_ZONE-} type=${CPNAS_TYPE-}
version=${CPNAS_VERSION-} workdir=${CPNAS_WORKDIR-}
ref=HEAD data='' worker=0 wait=120 poll=30 grace=300 attempts=20
delete_at_end=false dry_run=false tier='' create_flags=() main_flags=()

while [ $# -gt 0 ]; do
  case $1 in
    --name=* | --project=* | --zone=* | --type=* | --version=* | --workdir=* | --ref=* | --data=* | \
      --worker=* | --wait=* | --poll=* | --grace=* | --attempts=*)
      flag=${1%%=*}
      printf -v "${flag#--}" '%s' "${1#*=}"
      ;;
    --create-flag=*) create_flags+=("${1#*=}") ;;
    --spot | --reserved)
      [ -z "$tier" ] || [ "$tier" = "$1" ] || usage_error "$tier and $1 exclude each other"
      tier=$1
      ;;
    --delete) delete_at_end=true ;;
    --dry-run) dry_run=true ;;
    -h | --help)
      usage
      exit 0
      ;;
    --)
      shift
      main_flags=("$@")
      break
      ;;
    *) usage_error "unexpected $1; flags are --FLAG=VALUE, those of main stand behind --" ;;
  esac
  shift
done

need name CPNAS_NAME pod "$name"
need project CPNAS_PROJECT my-project "$project"
need zone CPNAS_ZONE us-central2-b "$zone"
check_name
for flag in worker wait poll grace attempts; do
  check_number "$flag" "${!flag}"
done
case $verb in
  create | resume)
    need type CPNAS_TYPE v4-32 "$type"
    choose_version
    ;;
esac
case $verb in
  run | resume)
    need workdir CPNAS_WORKDIR gs://bucket/run "$workdir"
    check_workdir
    check_main_flags
    ;;
  *)
    [ "${#main_flags[@]}" -eq 0 ] || usage_error "$verb takes no flags of main"
    ;;
esac
case $data in
  '' | gs://?*) ;;
  *) usage_error "--data=$data is no gs://... directory" ;;
esac
case $verb in
  # Resolved once: a pod that is recreated gets the same commit, whatever is committed meanwhile.
  setup | resume) commit=$(git -C "$root" rev-parse --verify --quiet "$ref^{commit}") ||
    usage_error "--ref=$ref is no commit of $root" ;;
esac

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
trap 'interrupted 130' INT
trap 'interrupted 143' TERM
# Commands that are only printed come here, past what captures a function's output.
exec 3>&1

case $verb in
  create) create_pod && wait_for_pod ;;
  setup) set_up ;;
  run) start && say "started; launch/tpu.sh logs follows it, launch/tpu.sh resume sees it through" ;;
  logs) on_worker "$worker" 'tail -n 100 -F cpnas_run/log' ;;
  status) show_status ;;
  stop) stop_run ;;
  resume) see_through ;;
  delete) delete_pod ;;
esac

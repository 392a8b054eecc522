#!/usr/bin/env bash
# What one worker of a TPU pod does; launch/tpu.sh copies it there and calls it over ssh.
#   setup FILE [DATA]   install the commit in this archive, and copy prepared data sets from gs://
#   start FLAGS...      run main with these flags, detached from the connection
#   status              print `cpnas-worker HOST bare|idle|running|ended STATUS|vanished`
#   stop SIGNAL SECONDS signal the run and wait so long for its end
set -euo pipefail
root=$HOME/cpnas_jax venv=$HOME/cpnas_venv run=$HOME/cpnas_run
mkdir -p "$run"
host=$(hostname)

fail() {
  printf 'tpu_worker.sh: %s: %s\n' "$host" "$1" >&2
  exit "$2"
}

# The lock is held by whatever is left of a run, so it ends with the machine, and no number of a
# process that has been given to another one misleads.
active() {
  ! (flock -n -s 8) 8>>"$run/lock"
}

set_up() {
  local uv=$HOME/.local/bin/uv
  ! active || fail 'a run is active here; stop it first' 1
  rm -f "$run/ready"
  mkdir -p "$root"
  tar -xzf "$HOME/$1" -C "$root"
  # The machines' own Python is older than the one that is needed; uv brings that.
  [ -x "$uv" ] || python3 -m pip install --user --quiet uv
  "$uv" venv --quiet --allow-existing --python 3.11 "$venv"
  "$uv" pip install --quiet --python "$venv/bin/python" "${root}[tpu,demo]"
  (cd "$root" && "$venv/bin/python" -m cpnas_jax.main --help >/dev/null)
  [ $# -lt 2 ] || gcloud storage rsync --recursive "$2" "$HOME/tensorflow_datasets"
  touch "$run/ready"
}

# The run is detached by setsid and nohup, which need neither root nor a user's systemd. The
# session's processes are spared when the connection ends and get SIGTERM when the machine goes
# down, which is the notice that a preemption gives.
start() {
  [ -e "$run/ready" ] || fail 'not set up; launch/tpu.sh setup does that' 1
  exec 9>>"$run/lock"
  flock -w 1 9 || fail 'a run is active here' 3
  rm -f "$run/status" "$run/pid"
  touch "$run/begun"
  setsid nohup bash "$0" supervise "$@" </dev/null >>"$run/log" 2>&1 &
}

# Whole, or not there at all.
note() {
  printf '%s\n' "$2" >"$run/$1.new"
  mv "$run/$1.new" "$run/$1"
}

supervise() {
  local status=0 pid
  cd "$root"
  printf '== %s: %s\n' "$(date -u +%FT%TZ)" "$*"
  # A TPU that cannot be had is an error, no reason to compute on the CPU.
  export JAX_PLATFORMS=${JAX_PLATFORMS:-tpu,cpu}
  # The machine's SIGTERM reaches main as well; passed on, it would be the second one, which stops
  # at once.
  trap : TERM INT HUP
  setsid "$venv/bin/python" -m cpnas_jax.main "$@" &
  pid=$!
  note pid "$pid"
  # A signal ends the waiting, not main.
  while :; do
    status=0
    wait "$pid" || status=$?
    kill -0 "$pid" 2>/dev/null || break
  done
  kill -KILL -- "-$pid" 2>/dev/null || true
  printf '== %s: exit status %s\n' "$(date -u +%FT%TZ)" "$status"
  note status "$status"
}

state() {
  if active; then
    printf 'running'
  elif [ ! -e "$run/ready" ]; then
    printf 'bare'
  elif [ -e "$run/status" ]; then
    printf 'ended %s' "$(cat "$run/status")"
  elif [ -e "$run/begun" ]; then
    printf 'vanished'
  else
    printf 'idle'
  fi
}

stop() {
  local left=$2
  active || return 0
  if [ -e "$run/pid" ]; then
    kill -s "$1" "$(cat "$run/pid")" 2>/dev/null || true
  fi
  while active; do
    [ "$left" -gt 0 ] || fail "still running $2 s after SIG$1" 1
    left=$((left - 1))
    sleep 1
  done
}

verb=${1-}
[ $# -eq 0 ] || shift
case $verb in
  setup) set_up "$@" ;;
  start) start "$@" ;;
  supervise) supervise "$@" ;;
  status) printf 'cpnas-worker %s %s\n' "$host" "$(state)" ;;
  stop) stop "$@" ;;
  *) fail "there is no verb '$verb'" 2 ;;
esac

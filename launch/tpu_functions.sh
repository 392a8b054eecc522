# shellcheck shell=bash disable=SC2154
# Functions of launch/tpu.sh, which reads its flags into the variables that are used here.

say() {
  printf 'tpu.sh: %s\n' "$*" >&2
}

# One word as a shell reads it back, whatever is in it.
quoted() {
  local escaped="'\\''"
  case $1 in
    '' | *[!A-Za-z0-9_@%+=:,./-]*) printf "'%s'" "${1//\'/$escaped}" ;;
    *) printf '%s' "$1" ;;
  esac
}

line_of() {
  local word separator=''
  for word in "$@"; do
    printf '%s' "$separator"
    quoted "$word"
    separator=' '
  done
}

# call COMMAND...: run it and show it, or only print it.
call() {
  if $dry_run; then
    printf '%s\n' "$(line_of "$@")" >&3
  else
    printf '+ %s\n' "$(line_of "$@")" >&2
    "$@" 3>&-
  fi
}

# ask ANSWER COMMAND...: run a question that is asked often and not shown; only printed, ANSWER is
# what a run without incidents would hear.
ask() {
  local answer=$1
  shift
  if $dry_run; then
    call "$@"
    printf '%s\n' "$answer"
  else
    "$@" 3>&-
  fi
}

interrupted() {
  say "interrupted. $name, if it was asked for, is still there or in the queue, a run on it goes on, and it is billed:"
  say "launch/tpu.sh resume takes it up again, stop ends the run, delete ends the bill"
  exit "$1"
}

# on_worker N|all COMMAND [ANSWER]: the exit status is the first failing worker's, 255 where ssh
# cannot reach one. With an ANSWER it is a question.
on_worker() {
  local how=(call)
  [ $# -lt 3 ] || how=(ask "$3")
  "${how[@]}" gcloud compute tpus tpu-vm ssh "$name" --project="$project" --zone="$zone" --quiet \
    --worker="$1" --ssh-flag=-oConnectTimeout=20 --ssh-flag=-oServerAliveInterval=15 --command="$2"
}

create_pod() {
  local tier_flags=()
  [ -z "$tier" ] || tier_flags=("$tier")
  # Nobody waits for it longer than this, so nobody should be given it later and pay.
  call gcloud compute tpus queued-resources create "$name" --project="$project" --zone="$zone" \
    --quiet --node-id="$name" --accelerator-type="$type" --runtime-version="$version" \
    --valid-until-duration="${wait}m" ${tier_flags[@]+"${tier_flags[@]}"} \
    ${create_flags[@]+"${create_flags[@]}"} ||
    { say "the pod was not created" && return 1; }
}

# pod_state ANSWER: READY, ABSENT, DELETING, FAILED, UNKNOWN (gcloud does not answer, or an odd word), or WAITING or LOST
# and the state's own name. In a dry run the queued resource is ANSWER: ACTIVE or ABSENT.
pod_state() {
  local queued node
  if ! queued=$(ask "$1" gcloud compute tpus queued-resources describe "$name" \
    --project="$project" --zone="$zone" --format='value(state.state)' 2>"$scratch/errors"); then
    grep -q NOT_FOUND "$scratch/errors" || { printf 'UNKNOWN\n' && return; }
    queued=ABSENT
  fi
  case $queued in
    ACTIVE) ;;
    ABSENT) printf 'ABSENT\n' && return ;;
    FAILED) printf 'FAILED\n' && return ;;
    DELETING) printf 'DELETING\n' && return ;;
    SUSPENDING | SUSPENDED) printf 'LOST %s\n' "$queued" && return ;;
    *) printf 'WAITING %s\n' "$queued" && return ;;
  esac
  # A preempted node may be known as such before its queued resource is.
  if ! node=$(ask READY gcloud compute tpus tpu-vm describe "$name" \
    --project="$project" --zone="$zone" --format='value(state)' 2>"$scratch/errors"); then
    grep -q NOT_FOUND "$scratch/errors" || { printf 'UNKNOWN\n' && return; }
    node=ABSENT
  fi
  case $node in
    READY) printf 'READY\n' ;;
    CREATING | STARTING | RESTARTING | REIMAGING | REPAIRING) printf 'WAITING %s\n' "$node" ;;
    PREEMPTED | TERMINATED | STOPPING | STOPPED | HIDING | HIDDEN | DELETING | ABSENT)
      printf 'LOST %s\n' "$node"
      ;;
    # Nothing is deleted for a word that is not understood.
    *) printf 'UNKNOWN\n' ;;
  esac
}

# wait_for_pod: return 0 when it is ready, 75 when it was taken away, otherwise 1.
wait_for_pod() {
  # The request expires after --wait; then the state is FAILED. The rest is for the service.
  local deadline=$((SECONDS + 60 * wait + 300)) before='' state
  while :; do
    state=$(pod_state ACTIVE)
    [ "$state" = "$before" ] || say "$name: $state"
    before=$state
    case $state in
      READY) return 0 ;;
      LOST*)
        say "$name was taken away before it could be used"
        return 75
        ;;
      FAILED)
        say "the request failed: no capacity in ${wait} minutes, no quota, or a type that $zone does not have. Delete it (launch/tpu.sh delete), then try again. Google Cloud says:"
        gcloud compute tpus queued-resources describe "$name" --project="$project" --zone="$zone" >&2 || true
        return 1
        ;;
      ABSENT | DELETING)
        say "there is no request $name in $zone of $project any more"
        return 1
        ;;
    esac
    if [ "$SECONDS" -ge "$deadline" ]; then
      say "$name is not there after --wait=$wait minutes; launch/tpu.sh delete withdraws the request"
      return 1
    fi
    sleep "$poll"
  done
}

set_up() {
  local file=cpnas_jax-$name.tar.gz archive command status=0
  archive=${TMPDIR:-/tmp}/$file command="bash tpu_worker.sh setup $file"
  [ -z "$(git -C "$root" status --porcelain --untracked-files=no)" ] ||
    say "changes that are not committed are not copied; the workers get commit ${commit:0:12}"
  [ -z "$data" ] || command="$command $(quoted "$data")"
  call git -C "$root" archive --format=tar.gz --output="$archive" "$commit" || return
  call gcloud compute tpus tpu-vm scp "$archive" "$root/launch/tpu_worker.sh" "$name:" \
    --project="$project" --zone="$zone" --quiet --worker=all || status=$?
  call rm -f "$archive"
  [ "$status" -ne 0 ] || on_worker all "$command" || status=$?
  [ "$status" -eq 0 ] || say "setting up failed on a worker (status $status); the same command tries again"
  return "$status"
}

start() {
  on_worker all "bash tpu_worker.sh start $(line_of --workdir="$workdir" "${main_flags[@]}")" ||
    { local status=$? && say "not all workers could start (status $status); launch/tpu.sh status shows them" && return "$status"; }
}

stop_run() {
  on_worker all "bash tpu_worker.sh stop TERM $grace"
}

# worker_states ANSWER: a line `cpnas-worker HOST STATE [STATUS]` for each worker.
worker_states() {
  on_worker all 'bash tpu_worker.sh status' "cpnas-worker worker $1"
}

# ask_workers ANSWER: ask into $states until all workers answer. Return 0 then, 127 where a worker
# has nothing to answer with, 75 when the pod is lost, 1 after an hour at the default --poll.
ask_workers() {
  local unanswered=0 status state
  while :; do
    status=0
    states=$(worker_states "$1") || status=$?
    case $status:$states in
      0:*cpnas-worker*) return 0 ;;
      127:*) return 127 ;; # bash does not find what setup brings
    esac
    state=$(pod_state ACTIVE)
    unanswered=$((unanswered + 1))
    say "not all workers answered, $unanswered in a row (status $status); $name: $state"
    case $state in
      LOST*) return 75 ;;
      # Nobody wants to pay for another one.
      ABSENT | DELETING)
        say "$name was deleted; the same command makes it again and resumes"
        return 1
        ;;
    esac
    if [ "$unanswered" -ge 120 ]; then
      say "giving up asking; a run on $name may go on, and is billed"
      return 1
    fi
    sleep "$poll"
  done
}

show_status() {
  local state
  state=$(pod_state ACTIVE)
  printf '%s: %s\n' "$name" "$state"
  [ "$state" != READY ] || worker_states 'ended 0' || say "not all workers answered, or they are not set up"
}

delete_pod() {
  local state
  # --force takes the node along. A node that was created without a queue has only itself.
  call gcloud compute tpus queued-resources delete "$name" --project="$project" --zone="$zone" \
    --force --quiet ||
    call gcloud compute tpus tpu-vm delete "$name" --project="$project" --zone="$zone" --quiet ||
    say "gcloud could not delete $name"
  state=$(pod_state ABSENT)
  [ "$state" = ABSENT ] || { say "$name may still be billed: its state is $state; look at the console" && return 1; }
}

# ready_pod: a pod that is ready and set up, whatever was there before; in $states what the workers
# of one that needed nothing say. Return 75 when it is lost meanwhile.
ready_pod() {
  local state status=0
  states=''
  state=$(pod_state ABSENT)
  case $state in
    UNKNOWN)
      say "gcloud cannot say what state $name is in: $(cat "$scratch/errors")"
      return 1
      ;;
    DELETING)
      say "$name is being deleted; the same command makes it again when that is over"
      return 1
      ;;
    LOST* | FAILED)
      say "$name: $state; it is deleted and asked for again"
      delete_pod && create_pod || return
      ;;
    ABSENT) create_pod || return ;;
  esac
  if [ "$state" = READY ]; then
    ask_workers idle || status=$?
    case $status:$states in
      0:*' bare'*) states='' ;;
      0:*) return 0 ;;
      127:*) ;;
      *) return "$status" ;;
    esac
  else
    wait_for_pod || return
  fi
  set_up
}

# judge: count what the workers say in $states into running, and $outcome: the run's exit status as
# far as it is known, 75 where the same command would resume.
judge() {
  local tag host state status vanished=false stopped=false missed=false
  running=0 outcome=0 failing=''
  while read -r tag host state status; do
    [ "$tag" = cpnas-worker ] || continue
    case $state in
      running) running=$((running + 1)) ;;
      ended)
        if [ "$status" -eq 75 ]; then
          stopped=true
        elif [ "$status" -eq 134 ]; then
          # JAX aborts when it misses another process: no cause, where there is another one.
          missed=true
        elif [ "$outcome" -eq 0 ] && [ "$status" -ne 0 ]; then
          outcome=$status
          failing=$host
        fi
        ;;
      # Neither running nor ended: the machine restarted, or the process that waits was killed.
      *) vanished=true ;;
    esac
  done <<<"$(sort <<<"$states")"
  # When a worker is lost or stops, the others may fail of it: theirs is not the cause.
  if $vanished || $stopped || { $missed && [ "$outcome" -eq 0 ]; }; then
    outcome=75
  fi
}

# follow_run: wait for its end and return its exit status, 75 when the pod is lost.
follow_run() {
  local failed_at='' cause=0 status
  while :; do
    status=0
    ask_workers 'ended 0' || status=$?
    case $status in
      0) judge ;;
      127) return 75 ;; # a machine was made anew
      *) return "$status" ;;
    esac
    # Those that were ended here are no cause.
    [ "$cause" -eq 0 ] || [ "$outcome" -eq 75 ] || outcome=$cause
    [ "$running" -gt 0 ] || return "$outcome"
    if [ "$outcome" -ne 0 ]; then
      : "${failed_at:=$SECONDS}"
      if [ $((SECONDS - failed_at)) -ge "$grace" ]; then
        say "$running of the workers still run $grace s after another ended; they are ended"
        cause=$outcome
        on_worker all 'bash tpu_worker.sh stop KILL 60' || true
      fi
    fi
    sleep "$poll"
  done
}

# lost STATUS: was the pod taken away while a step ended with this status? Where a worker could not
# be reached (255), what gcloud knows may be some minutes behind.
lost() {
  local left=1
  [ "$1" -ne 255 ] || left=10
  while :; do
    case $(pod_state ACTIVE) in
      LOST*) return 0 ;;
    esac
    left=$((left - 1))
    [ "$left" -gt 0 ] || return 1
    sleep "$poll"
  done
}

# see_through: run until it has ended, on as many pods as that takes.
see_through() {
  local attempt=1 status failing=''
  while :; do
    status=0
    if ready_pod && judge && { [ "$running" -gt 0 ] || start; }; then
      follow_run || status=$?
    else
      status=$?
      [ "$status" -eq 75 ] || ! lost "$status" || status=75
    fi
    [ "$status" -eq 75 ] || break
    if [ "$attempt" -ge "$attempts" ]; then
      say "stopped at attempt $attempt of --attempts=$attempts; the same command resumes"
      break
    fi
    attempt=$((attempt + 1))
    say "attempt $attempt of $attempts: the same command again"
    sleep "$poll"
  done
  case $status in
    0) say "the run has finished" ;;
    75) ;;
    *)
      say "failed with status $status${failing:+ on $failing}; the end of its log on worker 0:"
      on_worker 0 'tail -n 30 cpnas_run/log' >&2 || true
      ;;
  esac
  if $delete_at_end; then
    delete_pod || return 1
  else
    say "$name is there until launch/tpu.sh delete, and billed"
  fi
  return "$status"
}

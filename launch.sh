#!/usr/bin/env bash
# Set up once, then run a recipe: train its bases and itself, score base against tuned, write the report.
#   ./launch.sh [RECIPE] [key=value ...]     RECIPE is recipes/quickstart.yaml where nothing is said
#   ./launch.sh test [pytest arguments]      the gate (format, lint, types, import arrows) and the tests
#   PROCESSES=2 ./launch.sh ...              so many processes; the default is the number of GPUs, else 1
set -euo pipefail
here=$(cd "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")" && pwd)
venv=$here/.venv

set_up() {  # [extras, such as "[dev]"]; nothing is done where the last set-up was for the same files
  local wanted
  wanted="$(cat "$here/pyproject.toml" "$here/constraints.txt" | cksum) $here ${1:-}"
  export PATH="$venv/bin:$PATH"
  case "$(cat "$venv/set-up" 2>/dev/null)" in "$wanted"*) return ;; esac
  echo "setting up $venv" >&2
  [ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv" || {
    rm -rf "$venv"; echo "launch.sh: python3 -m venv failed; install Python 3.11 or newer with venv" >&2; exit 2; }
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$here/constraints.txt" torch
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$here/constraints.txt" -e "$here${1:-}"
  echo "$wanted" > "$venv/set-up"
}

stage() {  # a command in a process group of its own, so that a signal to this script reaches all its processes
  set -m; "$@" & local pid=$! status=0; set +m
  trap 'kill -TERM -- -'"$pid"' 2>/dev/null || true' TERM
  trap 'kill -HUP -- -'"$pid"' 2>/dev/null || true' HUP
  trap 'kill -INT -- -'"$pid"' 2>/dev/null || true' INT
  while wait "$pid" || status=$?; kill -0 "$pid" 2>/dev/null; do status=0; done
  trap - TERM HUP INT
  [ "$status" = 0 ] || exit "$status"
}

case "${1:-}" in -h | --help) sed -n 's/^# \{0,1\}//p' "$here/launch.sh" | sed 1d | head -5; exit ;; esac
if [ "${1:-}" = test ]; then
  shift
  set_up "[dev]"
  cd "$here"
  for check in "ruff format --check ." "ruff check ." "mypy" "lint-imports"; do
    echo "== $check" >&2
    # shellcheck disable=SC2086  # each check is a command line
    $check
  done
  echo "== pytest" >&2
  # as many processes as cores, of one thread each: the models of the tests are too small for more
  stage env HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 pytest -n auto --maxprocesses 8 --dist loadfile "$@"
  exit
fi

export TOKENIZERS_PARALLELISM=true
case "${1:-}" in "" | *=*) set -- "$here/recipes/quickstart.yaml" "$@" ;; esac
recipe=$1; shift
set_up
if [ -z "${PROCESSES:-}" ]; then
  PROCESSES=$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU ' || true)
  [ -z "${CUDA_VISIBLE_DEVICES:-}" ] || PROCESSES=$(tr ',' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c .)
  [ "$PROCESSES" -gt 0 ] || PROCESSES=1
fi
export PROCESSES
train=(sft train)
if [ "$PROCESSES" -gt 1 ]; then
  # else each process would take all cores; and a mistake in the data is reported once, not by every process
  export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$(( ($(getconf _NPROCESSORS_ONLN) + PROCESSES - 1) / PROCESSES ))}"
  train=(accelerate launch --config_file "$here/recipes/accelerate/several_processes.yaml"
         --num_processes "$PROCESSES" --main_process_port 0 -m sft train)
fi

bases=$(sft bases "$recipe" "$@")
while IFS=$'\t' read -r each given; do
  IFS=$'\t' read -r -a settings <<< "$given"
  if [ "$each" = "$recipe" ] && [ -z "$given" ]; then settings=("$@"); fi
  # (the form with + is for bash 3.2, which takes an empty array for an unset one)
  if [ "$PROCESSES" -gt 1 ]; then stage sft check "$each" ${settings[@]+"${settings[@]}"}; fi
  stage "${train[@]}" "$each" ${settings[@]+"${settings[@]}"}
done <<< "$bases"
stage sft eval "$recipe" "$@"
stage sft report "$recipe" "$@"

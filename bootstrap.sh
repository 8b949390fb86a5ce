#!/usr/bin/env bash
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

export HOST=${HOST:-127.0.0.1}
PORT=${PORT:-5000}
export OLLAMA_HOST=${OLLAMA_HOST:-127.0.0.1:11434}
export MODEL_DIR=${MODEL_DIR:-results/smollm2-135m}
export DATABASE_URL=${DATABASE_URL:-sqlite:///$PWD/.data/requests.sqlite3}
BASE=.cache/SmolLM2-135M-Instruct.Q4_1.gguf
# What is on this machine is never asked through a proxy.
export no_proxy=127.0.0.1,localhost,::1,$HOST${no_proxy:+,$no_proxy} NO_PROXY=127.0.0.1,localhost,::1,$HOST${NO_PROXY:+,$NO_PROXY}

usage() {
  cat <<EOF
./bootstrap.sh                     from a fresh machine to the service; later: from a stop to the service, in seconds
./bootstrap.sh test [ARG ...]      from a fresh machine through all tests; ARGs go to pytest, e.g. -m 'not slow'
./bootstrap.sh --help              this

Settings, from the environment:
  HOST, PORT           where the service listens; now $HOST:$PORT. Off loopback it demands API keys
  OLLAMA_HOST          the Ollama to use; one is started there if none answers; now $OLLAMA_HOST
  OLLAMA_HOSTS         several that run already instead, separated by commas
  OLLAMA_TIMEOUT_S     seconds an answer of Ollama may take before the service says 503; now ${OLLAMA_TIMEOUT_S:-10}
  OLLAMA_LOAD_TIMEOUT_S  seconds Ollama may take to load the model; now ${OLLAMA_LOAD_TIMEOUT_S:-300}
  MODEL_DIR            the run to serve: a folder that python -m train made; now $MODEL_DIR
  DATABASE_URL         the request log; now $DATABASE_URL
  UPLOADS_DIR          files given to the page /file; now ${UPLOADS_DIR:-.data/files}
  FLAG_ABOVE           the P(Hate) from which an answer is flagged; now ${FLAG_ABOVE:-as the run was calibrated}
  LOG_TEXT             what the log keeps of a text: full, hash (with a secret in LOG_HASH_KEY) or none; now ${LOG_TEXT:-full}
  MAX_IN_FLIGHT        requests at Ollama at a time; MAX_QUEUE more wait, the rest get 503; now ${MAX_IN_FLIGHT:-4} and ${MAX_QUEUE:-32}
  MAX_CONTENT_LENGTH   bytes of a request's body, but for uploads; now ${MAX_CONTENT_LENGTH:-1048576}
  TRUSTED_PROXIES      how many proxies stand before the service; it then demands keys of all; now ${TRUSTED_PROXIES:-0}
  TRUSTED_HOSTS        names besides localhost that it answers to without a key; now ${TRUSTED_HOSTS:-none}
  CORS_ORIGINS         origins whose pages may call the API from a browser; now ${CORS_ORIGINS:-none}
  REQUIRE_API_KEY      1 to demand keys on loopback too
  PERSPECTIVE_UNSUPPORTED  what becomes of attributes of Perspective API that have no score here: refuse or omit
  OLLAMA_MODELS        where Ollama keeps its models, if this script starts it; now ${OLLAMA_MODELS:-its own default}
  OLLAMA_DOWNLOAD_URL  the folder with Ollama's release and its sha256sum.txt; now ${OLLAMA_DOWNLOAD_URL:-the official one}

All it makes is in this folder (.venv, .cache, .data, $MODEL_DIR/model.gguf) and in Ollama's model store.
EOF
}

mkdir -p .cache
case "${1:-}" in
  "") steps=7 ;;
  test) steps=5 ;;
  -h | --help) usage; exit 0 ;;
  *) usage >&2; exit 2 ;;
esac

n=0 name="start" begun=$SECONDS
step() { n=$((n + 1)) name=$1; printf '[%d/%d] %s (%d s so far)\n' "$n" "$steps" "$name" $((SECONDS - begun)); }
fail() { # cause, remedy
  trap - ERR
  printf '\nbootstrap: step %d of %d failed: %s\n  cause:  %s\n  remedy: %s\n' "$n" "$steps" "$name" "$1" "$2" >&2
  exit 1
}
trap '[ "$BASH_SUBSHELL" -gt 0 ] || fail "the command in line $LINENO ended with status $?; its own words are above" "mend that and run ./bootstrap.sh again: it goes on where it stopped"' ERR

started=() # sessions to end when this script ends, the newest first; nothing else is ever ended
said=.cache/install.$$
stop() {
  trap - ERR EXIT INT TERM HUP
  local pid
  rm -f "$said"
  for pid in "${started[@]}"; do
    kill -- "-$pid" 2>/dev/null || kill "$pid" 2>/dev/null || continue
    # Its helpers too, also those that outlived a kill -9 of what started them.
    for _ in $(seq 300); do kill -0 -- "-$pid" 2>/dev/null || break; sleep 0.1; done
    kill -KILL -- "-$pid" 2>/dev/null || true
  done
}
trap stop EXIT
trap 'echo; echo "stopping what this script started"; exit 130' INT
trap 'exit 143' TERM HUP

launch() { # COMMAND ...: in the background, in a session of its own, whose id is then $!
  .venv/bin/python -c 'import os, sys; os.setsid(); os.execvp(sys.argv[1], sys.argv[1:])' "$@" &
  started=("$!" "${started[@]}")
}

own() { # a step of hatespeech/install.py; its standard output is the result, or the cause and the remedy
  local status=0
  launch .venv/bin/python -m hatespeech.install "$@" >"$said"
  wait "$!" || status=$?
  started=("${started[@]:1}") result=$(cat "$said")
  if [ "$status" = 0 ]; then return; fi
  [ -n "$result" ] || result=$'its own words are above\nmend that and run ./bootstrap.sh again'
  fail "${result%%$'\n'*}" "${result#*$'\n'}"
}

need_disk_mb() {
  local free_mb
  free_mb=$(df -Pm . | awk 'NR == 2 { print $4 }')
  [ "$free_mb" -ge "$1" ] || fail "this needs $1 MB of disk in $PWD, and $free_mb MB are free" "free some, or move the folder to another disk"
}

find_python() {
  for python in python3 python3.13 python3.12 python3.11; do
    if "$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' 2>/dev/null; then return; fi
  done
  fail "no Python 3.11, 3.12 or 3.13 on the PATH" "apt-get install python3 python3-venv (or see python.org), then run ./bootstrap.sh again"
}

make_venv() {
  find_python
  "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$("$python" --version) has no venv module" "apt-get install python3-venv"
  # A venv holds absolute paths: one that moved or broke is made anew.
  [ "$(cat .venv/.made-in 2>/dev/null)" = "$PWD" ] && .venv/bin/python -c '' 2>/dev/null && return
  rm -rf .venv
  "$python" -m venv .venv
  printf %s "$PWD" >.venv/.made-in
}

install() { # "" or an extra, e.g. [test]
  local stamp=.venv/.installed$1 wanted
  wanted=$(cksum <pyproject.toml)
  [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
  .venv/bin/python -m pip install --disable-pip-version-check --no-warn-script-location -e ".$1" | sed -n 's/^ *Downloading /  /p; s/^Installing collected.*/  installing/p' ||
    fail "pip could not install what pyproject.toml lists" "see pip's words above; check the network or the package index, then run ./bootstrap.sh again"
  printf %s "$wanted" >"$stamp"
}

find_ollama() { # [--command-needed]
  own ollama --into .cache/ollama "$@"
  [ -z "$result" ] || export PATH=$result:$PATH
}

find_package() { # find_package NAME GLOB: Debian's package, where nothing of the glob is here; tests are skipped without
  if compgen -G "$2" >/dev/null; then return; fi
  if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
    echo "  installing Debian's package $1"
    (apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$1") >".cache/$1.log" 2>&1 ||
      echo "  that failed (see .cache/$1.log): its tests will be skipped"
  else
    echo "  there is no $1: its tests will be skipped. To run them: apt-get install $1"
  fi
}

start_ollama() {
  local log=.cache/ollama-serve.log
  own server
  if [ "$result" = yes ]; then return; fi
  launch ollama serve >"$log" 2>&1
  own wait --pid "$!" --log "$log"
}

serve() {
  local url=http://$HOST:$PORT
  .venv/bin/python -c "import sys; from app import create_app; from hatespeech import UserError
try: create_app()
except UserError as error: sys.exit(f'  {error}')" || fail "the service can't start with these settings; the reason is above" "mend that and run ./bootstrap.sh again"
  launch .venv/bin/python -m gunicorn --config python:hatespeech.serving.gunicorn_conf --bind "$HOST:$PORT" 'app:create_app()'
  local gunicorn=$! # it stops first, while Ollama still answers what is in flight
  until .venv/bin/python -c "import requests; requests.get('$url/healthcheck', timeout=10).raise_for_status()" 2>/dev/null; do
    kill -0 "$gunicorn" 2>/dev/null || fail "the service ended at once; its words are above" "mend that and run ./bootstrap.sh again"
    sleep 0.2
  done
  printf '\nReady after %d s. Ctrl-C stops it. Try:\n\n  curl %s/infer -d "I hope you all have a lovely day"\n\n' $((SECONDS - begun)) "$url"
  wait "$gunicorn" || fail "the service ended with status $?; its words are above" "run ./bootstrap.sh again"
}

check_port() {
  "$python" -c 'import socket, sys
try: socket.create_server((sys.argv[1], int(sys.argv[2]))).close()
except (OSError, ValueError, OverflowError) as error: sys.exit(f"  {error}")' "$HOST" "$PORT" ||
    fail "$HOST:$PORT can't be listened on (see above)" "stop what holds it, or choose another: PORT=5001 ./bootstrap.sh"
}

if [ "${1:-}" = test ]; then
  step "Python environment in .venv"
  make_venv
  step "dependencies of service, training and tests: 7 GB, some minutes the first time"
  [ -f ".venv/.installed[test]" ] || need_disk_mb 20000
  install "[test]"
  step "Ollama and the base model"
  find_ollama --command-needed
  own base --into "$BASE"
  step "PostgreSQL and Chromium, for the tests that need them"
  find_package postgresql '/usr/lib/postgresql/*/bin/initdb'
  find_package chromium '/usr/bin/chromium'
  step "tests"
  trap - ERR
  .venv/bin/python -m pytest "${@:2}"
  exit
fi

step "Python environment in .venv"
[ -f "$MODEL_DIR/settings.json" ] || fail "$MODEL_DIR is no finished run: it has no settings.json" "set MODEL_DIR to a folder that python -m train made, e.g. results/smollm2-135m"
make_venv
check_port
step "the service's dependencies"
[ -f ".venv/.installed" ] || need_disk_mb 1500
install ""
step "Ollama"
find_ollama
step "the model's weights in $MODEL_DIR"
if [ ! -f "$MODEL_DIR/model.gguf" ] && [ ! -d "$MODEL_DIR/merged" ]; then
  need_disk_mb 1000
  own base --into "$BASE"
  .venv/bin/python -m hatespeech.training.export "$MODEL_DIR" --base "$BASE" || fail "model.gguf could not be made; the reason is above" "mend that and run ./bootstrap.sh again"
fi
.venv/bin/python -m hatespeech.training.checks "$MODEL_DIR" | sed 's/^/  /' || echo "  it is served all the same"
step "an Ollama that serves"
start_ollama
step "the model in Ollama"
own model "$MODEL_DIR"
step "the service on $HOST:$PORT"
serve

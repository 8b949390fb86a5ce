#!/usr/bin/env bash
# What is too long for ./bootstrap.sh test, which has each in short. After it, on a quiet machine; an hour or two.
#
#   tests/long.sh [OLLAMA ...] | tee results/long.txt      # OLLAMA: executables of other Ollamas, for the contract
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
git log -1 --format='commit %h, %cs'
python=.venv/bin/python
for other in "$@"; do
  echo "== the contract on $other"
  TESTS_OLLAMA=$other $python -m pytest -q -s tests/test_contract.py
done
echo "== long"
$python -m pytest -q -s -m long

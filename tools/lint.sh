#!/usr/bin/env bash
# Format, lint and types: what CI demands. `tools/lint.sh --fix` repairs what can be repaired.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = --fix ]; then
  ruff format .
  ruff check --fix .
else
  ruff format --check .
  ruff check .
fi
basedpyright --pythonpath "$(command -v python)"

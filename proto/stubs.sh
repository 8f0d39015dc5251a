#!/usr/bin/env bash
# Generates the Python stubs under client/loraplex/v1, and checks the contract they come from.
#
#   proto/stubs.sh generate          write the stubs
#   proto/stubs.sh check             fail if the stubs are not what the .proto files say
#   proto/stubs.sh lint              buf lint, and buf format without changing anything
#   proto/stubs.sh format            buf format in place
#   proto/stubs.sh breaking [REF]    fail if callers built against REF (default: the last release) would break
#
# Everything runs from a virtual environment of its own, which is made on first use.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-stubs
stubs=client/loraplex/v1

make_environment() {
  local pinned=proto/stubs-requirements.txt
  if [[ -e $venv/made && ! $pinned -nt $venv/made ]]; then return; fi
  local python
  for python in "${STUBS_PYTHON:-}" python3.12 python3.11 python3; do
    if [[ -n $python ]] && "$python" -c 'import sys; sys.exit(sys.version_info[:2] not in {(3, 11), (3, 12)})' 2>/dev/null; then
      "$python" -m venv --clear "$venv"
      "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$pinned"
      touch "$venv/made"
      return
    fi
  done
  echo "The stubs are generated with Python 3.11 or 3.12, and neither was found. Set STUBS_PYTHON to one." >&2
  exit 1
}

# compile PROTO_ROOT PATTERN OPTION... : run protoc on the .proto files under PROTO_ROOT that hold PATTERN.
compile() {
  local root=$1 pattern=$2 packages
  shift 2
  packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -W ignore -m grpc_tools.protoc \
    -I"$root" -I"$packages" -I"$packages/grpc_tools/_proto" "$@" $(cd "$root" && grep -rlE --include='*.proto' "$pattern" loraplex | sort)
}

# generate_into FOLDER : the stubs, below FOLDER/loraplex/v1.
generate_into() {
  compile proto '^syntax' --python_out="$1" --mypy_out=quiet:"$1"
  compile proto '^service' --grpc_python_out="$1" --mypy_grpc_out=quiet:"$1"
}

# image PROTO_ROOT FILE : the compiled contract with its comments, as buf reads it.
image() {
  compile "$1" '^syntax' --include_imports --include_source_info --descriptor_set_out="$2"
}

make_environment
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

case "${1:-}" in
  generate)
    rm -f "$stubs"/*_pb2*
    generate_into client
    ;;
  check)
    generate_into "$scratch"
    if ! diff -ru --exclude=__init__.py --exclude=__pycache__ "$stubs" "$scratch/loraplex/v1"; then
      echo "The stubs under $stubs are out of date. Run: make stubs" >&2
      exit 1
    fi
    ;;
  lint)
    image proto "$scratch/image.binpb"
    "$venv/bin/buf" lint "$scratch/image.binpb" --path loraplex/v1 --config proto/buf.yaml
    (cd proto && "../$venv/bin/buf" format --diff --exit-code)
    ;;
  format)
    (cd proto && "../$venv/bin/buf" format --write)
    ;;
  breaking)
    release=$(git describe --tags --abbrev=0 --match 'v*' 2>/dev/null || true)
    if [[ -z ${2:-$release} ]]; then
      echo "There is no release yet, so there is no contract to break."
      exit
    fi
    ref=$(git rev-parse --verify "${2:-$release}")
    mkdir "$scratch/before"
    git archive "$ref" proto | tar -x -C "$scratch/before"
    image proto "$scratch/now.binpb"
    image "$scratch/before/proto" "$scratch/before.binpb"
    "$venv/bin/buf" breaking "$scratch/now.binpb" --against "$scratch/before.binpb" --path loraplex/v1 --config proto/buf.yaml
    ;;
  *)
    sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'
    exit 2
    ;;
esac

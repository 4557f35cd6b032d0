#!/usr/bin/env bash
# Packs what a GPU machine without a package registry lacks into FOLDER: site.tar.xz (Python 3.12 packages for x86-64,
# FlashInfer with its kernels compiled for sm_90a) and kv.tgz (this checkout's HEAD). About 38 MB, so that it can be
# carried in one go; 10 minutes the first time, a minute later ($PACK_CACHE, by default ~/.cache/kvasir-gpu).
#
#     bench/gpu/pack.sh .gpu               # from the project's root; git ignores .gpu
#     OUT=FOLDER bash .gpu/run.sh          # on that machine: everything, in less than 8 minutes
#
# That machine is taken to have what image.txt names, with CUDA 13; packages.txt is what it lacks.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd); out=$(mkdir -p "$1" && cd "$1" && pwd); cache=${PACK_CACHE:-$HOME/.cache/kvasir-gpu}
mkdir -p "$cache"/{wheels,wheels311,aot,stubs}
mapfile -t pins < <(grep -v "^#" "$here/packages.txt")
constraint() { grep -iE "^${1//[-_]/[-_]}==" constraints.txt || echo "$1"; }
get() { python3 -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    $(printf -- '--platform manylinux_2_%s_x86_64 ' 39 34 31 28 27 24 17 5) --platform manylinux2014_x86_64 \
    --platform manylinux1_x86_64 -d "$cache/wheels" "$1" 2>/dev/null || echo "no wheel of $1" >&2; }
for name in "${pins[@]}"; do get "$(constraint "$name")"; done
get flashinfer-python==0.7.2; get "apache-tvm-ffi<0.2"

if [ ! -x "$cache/env/bin/python" ]; then
    python3.11 -m venv "$cache/env"
    "$cache/env/bin/pip" install -q torch==2.13.0 numpy
    "$cache/env/bin/pip" install -q --no-deps flashinfer-python==0.7.2 "apache-tvm-ffi<0.2" click einops requests tabulate \
        tqdm nvidia-ml-py packaging ninja urllib3 idna certifi charset_normalizer
fi
echo | gcc -shared -x c - -o "$cache/stubs/libcuda.so" -Wl,-soname,libcuda.so.1
PATH="$cache/env/bin:$PATH" PYTHONPATH=engine LIBRARY_PATH="$cache/stubs" "$cache/env/bin/python" "$here/compile_flashinfer.py" "$cache/aot"

site=$(mktemp -d); trap 'rm -rf "$site"' EXIT
for wheel in "$cache"/wheels/*.whl; do python3 -m zipfile -e "$wheel" "$site"; done
rm -rf "$site"/nixl_ep_cu13 "$site"/nixl_cu13.libs/ucx/libucx_perftest*
data=$site/flashinfer/data; mv "$data/csrc" "$site/csrc"; rm -rf "$data"/{cutlass,cccl}; mkdir "$data/csrc"
find "$site/csrc" -maxdepth 1 \( -name '*.jinja' -o -name '*.h' -o -name 'batch_*' -o -name 'page*' -o -name 'tvm_ffi*' \
    -o -name 'norm*' -o -name 'rope*' -o -name 'sampling*' -o -name 'activation*' -o -name 'cascade*' -o -name 'flashinfer*' \) \
    -type f -exec cp {} "$data/csrc/" \;
rm -rf "$site/csrc"; cp -r "$cache/aot" "$data/aot"
tar cf - -C "$site" . | xz -6 -T2 > "$out/site.tar.xz"
git archive HEAD engine operator bench tests conftest.py pyproject.toml manifests | gzip > "$out/kv.tgz"
cp "$here/run.sh" "$out/"
ls -l "$out"

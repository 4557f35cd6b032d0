#!/usr/bin/env bash
# On the GPU machine, in the folder that pack.sh filled, with results into $OUT (below 8 minutes; parts: PARTS="tests nixl ...").
set -u
here=$(cd "$(dirname "$0")" && pwd); parts=${PARTS:-tests nixl harvest pair http}; began=$(date +%s)
work=${WORK:-${TMPDIR:-/tmp}/kvasir-gpu}; mkdir -p "$work"
say() { echo "[$(($(date +%s) - began)) s] $*"; }
wants() { [[ " $parts " == *" $1 "* ]]; }
[ -d "$work/site/flashinfer" ] || { mkdir -p "$work/site" && tar xJf "$here/site.tar.xz" -C "$work/site"; }
mkdir -p "$work/kv" && tar xzf "$here/kv.tgz" -C "$work/kv" && cd "$work/kv"
export PYTHONPATH=$work/site:$PWD/engine:$PWD/operator:$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 FLASHINFER_LOGGING_LEVEL=warning
nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
python3 -c "import kvasir_engine.entrypoints.build, flashinfer, torch; print('torch', torch.__version__, 'flashinfer', flashinfer.__version__)" || exit 9
model=/dev/shm/llama-8b
[ -f $model/config.json ] || python3 -c "from pathlib import Path; from bench.h100 import make_model, H100; make_model(Path('$model'), H100)" &
if wants tests; then
    timeout 120 python3 -m pytest -q -m cuda -c /dev/null --rootdir "$PWD" -p no:cacheprovider --tb=short \
        $(grep -rlE "mark\.cuda" tests --include='test_*.py') > "$OUT/tests.log" 2>&1; say "tests: $(tail -1 "$OUT/tests.log")"
fi
if wants nixl; then
    for tls in "" cuda_copy,tcp,self; do timeout 45 python3 -m bench.gpu.nixl_raw VRAM $tls 2>&1 | grep "NIXL VRAM"; done; say nixl
fi
wait; say model
if wants harvest; then
    timeout "${HARVEST_S:-200}" python3 -m bench.gpu.harvest $model "$OUT/harvest.json" $((${HARVEST_S:-200} - 8)) > "$OUT/harvest.log" 2>&1
    say "harvest: status $?"; grep -vE "progress|^$" "$OUT/harvest.log" | tail -n 60 | cut -c1-400
fi
if wants pair; then
    timeout 75 python3 -m bench.h100_parts pair $model "$OUT" > "$OUT/pair.log" 2>&1; say "pair: status $?"; cat "$OUT/pair.json"; echo
fi
if wants http; then
    python3 -m bench.gpu.tokenizer $model
    python3 -c "from kvasir_engine.entrypoints.main import main; main()" serve file://$model --served-model-name m --device cuda --port 8000 \
        --max-running 256 --prefill-chunk 4096 > "$OUT/serve.log" 2>&1 & server=$!
    for _ in $(seq 120); do curl -sf -m 1 http://127.0.0.1:8000/ready > /dev/null && break; sleep 0.5; done; say "serve is ready"
    timeout 60 python3 -m bench.gpu.http_load http://127.0.0.1:8000 m 1000 256 8; say http
    kill $server; wait $server 2> /dev/null
fi
say end

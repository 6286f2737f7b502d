#!/usr/bin/env bash
# Checks and measurements on one NVIDIA GPU, in about 5 minutes; it installs nothing.
#
#     benchmarks/gpu.sh [FOLDER]          # results go to FOLDER, default $OUT, else runs/gpu
#     PYTHON=python3 benchmarks/gpu.sh    # another Python than .venv/bin/python, e.g. one that has only torch and transformers
#
# Not run on a GPU yet: it was written and tested on CPU. docs/results.md names the figures that come from a GPU.
# A step whose package is missing is skipped and reported. Exit code: 0 if no step failed, 1 if one failed, 2 without a GPU.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
folder=${1:-${OUT:-runs/gpu}}
python=${PYTHON:-.venv/bin/python}
command -v "$python" >/dev/null || { echo "gpu.sh: PYTHON=$python does not exist; run make setup, or set PYTHON" >&2; exit 2; }
"$python" -c 'import torch, transformers' 2>/dev/null || { echo "gpu.sh: PYTHON=$python has no torch or no transformers; set PYTHON" >&2; exit 2; }
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
    { echo "gpu.sh: torch of $python finds no NVIDIA GPU; check nvidia-smi, or run make setup on the machine with the GPU" >&2; exit 2; }
mkdir -p "$folder"
export HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

failed=0 ran=0 skipped=0
step() { # NAME SECONDS COMMAND...: run a step with a time limit; its output goes to FOLDER/NAME.log
    local name=$1 limit=$2 code
    shift 2
    timeout "$limit" "$@" >"$folder/$name.log" 2>&1
    code=$?
    if [ $code -eq 0 ]; then
        ran=$((ran + 1))
        echo "ok       $name: $(tail -n 2 "$folder/$name.log" | head -n 1)"
    else
        failed=$((failed + 1))
        echo "FAILED   $name: exit code $code, see $folder/$name.log: $(tail -n 1 "$folder/$name.log")"
    fi
}

step device 60 "$python" - <<'END'
import json, torch, transformers
name, memory = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory
assert torch.cuda.is_bf16_supported(), f"{name} has no bfloat16"
product = torch.ones(64, 64, device="cuda", dtype=torch.bfloat16) @ torch.ones(64, 64, device="cuda", dtype=torch.bfloat16)
assert product.float().eq(64).all(), "a bfloat16 product is wrong"
print(f"{name}, {memory / 2**30:.0f} GiB, torch {torch.__version__}, transformers {transformers.__version__}")
print(json.dumps({"device": name, "memory_gib": memory / 2**30, "torch": torch.__version__, "transformers": transformers.__version__}))
END
step training 120 "$python" -m benchmarks.gpu_checks training --json -
step scoring 120 "$python" -m benchmarks.gpu_checks scoring --json -
step training_step 240 "$python" -m benchmarks.training_step --device cuda --dtype bfloat16 --turns 3 --json -
if "$python" -c 'import vllm, ray' 2>/dev/null; then
    step engine 240 "$python" -m benchmarks.gpu_checks engine --json -
else
    skipped=$((skipped + 1))
    echo "skipped  engine: vllm or ray is not installed for $python; run make setup on this machine"
fi
echo "$ran ok, $failed failed, $skipped skipped; logs with a JSON result on the last line: $folder"
[ $failed -eq 0 ]

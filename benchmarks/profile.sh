#!/usr/bin/env bash
# Records a few decode steps of a patched model under Nsight Systems, and prints the Nsight Compute
# command for one kernel. docs/profiling.md says how to read both.
#
#   benchmarks/profile.sh [out-prefix] [options of benchmarks/decode_cuda.py]
#   benchmarks/profile.sh /tmp/stda --method stda --layers 8 --mode dynamic
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
python=${PYTHON:-python3}
out=${1:-moyu-decode}
shift || true
decode=("$python" "$here/decode_cuda.py" --profile --mode dynamic --layers 8 --prompt 256 --new 16 "$@")
export MOYU_NVTX=1

if command -v nsys >/dev/null; then
  nsys profile --force-overwrite=true --output "$out" --trace=cuda,nvtx \
    --cuda-graph-trace=node --capture-range=cudaProfilerApi --capture-range-end=stop \
    "${decode[@]}"
  nsys stats --report cuda_gpu_kern_sum --report nvtx_sum "$out.nsys-rep"
  echo "timeline: open $out.nsys-rep in the Nsight Systems window"
else
  echo "nsys is not on the PATH; the timeline is skipped" >&2
fi

# Clocks stay as they are: a locked clock would change the ratio of memory to arithmetic.
kernel=${MOYU_PROFILE_KERNEL:-sparse_mlp_kernel}
echo
echo "one kernel in detail (counters, memory tables, source lines):"
echo "  ncu --set full --clock-control none --profile-from-start off \\"
echo "      --kernel-name regex:$kernel --launch-skip 8 --launch-count 3 \\"
echo "      --export $out-$kernel ${decode[*]}"

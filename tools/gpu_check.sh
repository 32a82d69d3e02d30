#!/usr/bin/env bash
# Everything that needs a GPU, in one call and without a network: build, tests, compute-sanitizer,
# benchmarks. Rows go to benchmarks/results/ (or $MOYU_RESULTS), a summary is printed last.
# Needs nvcc and a CUDA build of torch; tools that are missing are named and skipped.
#
#   tools/gpu_check.sh [build test sanitize bench decode]     default: all steps
#   MOYU_QUICK=1 tools/gpu_check.sh bench                      few replays, to try the script
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
results=${MOYU_RESULTS:-benchmarks/results}
work=${MOYU_WORK:-build/gpu}
arch=${MOYU_ARCH:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -1 | tr -d '.')}
steps=${*:-build test sanitize bench decode}
replays=$([ "${MOYU_QUICK:-0}" = 1 ] && echo 20 || echo 200)
mkdir -p "$results" "$work"
summary=()
failures=0

run() {  # run NAME COMMAND...: the log goes to a file, its end and the result to the screen
  local name=$1 begin=$SECONDS status
  shift
  echo "== $name"
  if "$@" >"$work/$name.log" 2>&1; then
    status=ok
  else
    status="FAILED ($?)"
    failures=$((failures + 1))
  fi
  tail -n "${TAIL:-4}" "$work/$name.log"
  summary+=("$(printf '%-28s %-12s %4d s' "$name" "$status" $((SECONDS - begin)))")
}
skip() {
  summary+=("$(printf '%-28s skipped: %s' "$1" "$2")")
}

if [ -z "$arch" ]; then
  echo "gpu_check: nvidia-smi names no GPU" >&2
  exit 3
fi
commit=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
[ -n "$(git status --porcelain -- csrc moyu_ext python 2>/dev/null)" ] && commit+="+"
gencode=(-gencode "arch=compute_$arch,code=sm_$arch")
kernels=(csrc/cuda/threshold_compact.cu csrc/cuda/gather_gemv.cu csrc/cuda/gather_gemv_t.cu
  csrc/cuda/sparse_mlp.cu csrc/cuda/threshold_mlp.cu)

compile_all() {  # kernels once, in parallel; then the test, and the benchmark
  local objects=() jobs=() source job
  for source in "${kernels[@]}"; do
    objects+=("$work/$(basename "$source").o")
    nvcc -std=c++20 -O3 -lineinfo "${gencode[@]}" -c "$source" -o "${objects[-1]}" &
    jobs+=($!)
  done
  nvcc -std=c++20 -O1 "${gencode[@]}" -x cu -c tests/cpp/test_cuda_kernels.cpp \
    -o "$work/test_cuda_kernels.o" &
  jobs+=($!)
  nvcc -std=c++20 -O2 "${gencode[@]}" -c benchmarks/bench_mlp_cuda.cu -o "$work/bench_mlp_cuda.o" &
  jobs+=($!)
  for job in "${jobs[@]}"; do wait "$job" || return 1; done
  nvcc "$work/test_cuda_kernels.o" "${objects[@]}" -o "$work/test_cuda_kernels" &&
    nvcc "$work/bench_mlp_cuda.o" "${objects[@]}" -ldl -o "$work/bench_mlp_cuda"
}

install_package() {
  MOYU_CUDA=1 MOYU_CUDA_ARCHS="$arch" "$python" -m pip install -q --no-build-isolation --no-deps \
    --target "$work/site" --upgrade . &&
    PYTHONPATH=$work/site "$python" -c 'from moyu_ext._load import _C
print(_C.build_info())
assert _C.build_info()["cuda"], "the extension was built without its CUDA kernels"'
}

# The cuBLAS that torch brings, where the toolkit has none.
if [ -z "${MOYU_CUBLAS:-}" ]; then
  MOYU_CUBLAS=$("$python" - <<'PY'
import glob, site
paths = site.getsitepackages()
print(next(iter(sorted(f for p in paths for f in glob.glob(p + "/nvidia/*/lib/libcublas.so.*"))), ""))
PY
  )
  [ -n "$MOYU_CUBLAS" ] && export MOYU_CUBLAS || unset MOYU_CUBLAS
fi
[ -n "${MOYU_CUBLAS:-}" ] && export LD_LIBRARY_PATH="$(dirname "$MOYU_CUBLAS"):${LD_LIBRARY_PATH:-}"

mlp() {
  local name=$1
  shift
  TAIL=14 run "$name" "$work/bench_mlp_cuda" --csv "$results/cuda_mlp.csv" --commit "$commit" \
    --replays "$replays" "$@"
}
decode() {
  local name=$1
  shift
  PYTHONPATH=$work/site TAIL=3 run "$name" "$python" benchmarks/decode_cuda.py \
    --csv "$results/cuda_decode.csv" --commit "$commit" "$@"
}

for step in $steps; do
  case $step in
    build)
      run compile compile_all
      run install install_package
      ;;
    test)
      run test_cuda_kernels "$work/test_cuda_kernels"
      PYTHONPATH=$work/site run pytest "$python" -m pytest -q -p no:cacheprovider -m "" \
        tests/test_cuda.py tests/test_ops.py
      ;;
    sanitize)
      if command -v compute-sanitizer >/dev/null; then
        for tool in memcheck racecheck synccheck; do
          MOYU_TEST_EXACT=1 run "$tool" compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$work/test_cuda_kernels"
        done
      else
        skip sanitize "compute-sanitizer is not on the PATH"
      fi
      ;;
    bench)
      mlp mlp_7b --d 4096 --f 11008 --density 0.3288,0.5,0.1
      mlp mlp_8b --d 4096 --f 14336 --density 0.5416,0.3288
      mlp mlp_7b_bf16 --d 4096 --f 11008 --dtype bfloat16 --density 0.3288
      mlp mlp_7b_fp32 --d 4096 --f 11008 --dtype float32 --density 0.3288
      for rows in 2 4 8; do
        mlp "mlp_7b_rows$rows" --d 4096 --f 11008 --rows "$rows" --density 0.3288 --plans given
      done
      ;;
    decode)
      decode decode_stda --method stda --density 0.3288 --prompt 1024 --new 1024
      decode decode_srida --method srida --density 0.4383 --prompt 1024 --new 128
      ;;
    *)
      echo "gpu_check: unknown step $step" >&2
      exit 2
      ;;
  esac
done

echo
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader
printf '%s\n' "${summary[@]}"
exit $((failures > 0))

#!/usr/bin/env bash
# Everything that needs a GPU, without a network: build, tests, compute-sanitizer, benchmarks. Rows
# and the log go to $MOYU_RESULTS (default: benchmarks/results), a summary is printed last.
# Needs nvcc and a CUDA build of torch; other tools that are missing are named and skipped.
#
#   tools/gpu_check.sh [build test sanitize bench decode]     default: all steps
#   MOYU_QUICK=1 tools/gpu_check.sh bench                      few replays, to try the script
#
# On an H100 with 16 cores the parts of "build test sanitize bench" took five minutes, the first half of
# "decode" three; it builds first where the first call's build is gone.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
mkdir -p "${MOYU_RESULTS:=benchmarks/results}" "${MOYU_WORK:=build/gpu}"
results=$(cd "$MOYU_RESULTS" && pwd)
work=$(cd "$MOYU_WORK" && pwd)
read -r -a steps <<<"${*:-build test sanitize bench decode}"
replays=$([ "${MOYU_QUICK:-0}" = 1 ] && echo 20 || echo 200)
command -v nvcc >/dev/null || PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
summary=()
failures=0

finish() {  # finish NAME STATUS SECONDS: one line of the summary, and the log kept with the rows
  case $2 in
    0) status=ok ;;
    77) status=skipped ;;
    124) status="FAILED (time)" && failures=$((failures + 1)) ;;
    *) status="FAILED ($2)" && failures=$((failures + 1)) ;;
  esac
  tail -n "${TAIL:-4}" "$work/$1.log"
  { echo "==== $1: $status" && cat "$work/$1.log"; } >>"$results/gpu_check.log"
  summary+=("$(printf '%-24s %-14s %4d s' "$1" "$status" "$3")")
}
run() {  # run NAME COMMAND...: at most $LIMIT seconds
  local name=$1 begin=$SECONDS status=0
  shift
  echo "== $name"
  timeout --foreground "${LIMIT:-400}" "$@" >"$work/$name.log" 2>&1 || status=$?
  finish "$name" "$status" $((SECONDS - begin))
}
start() {  # start NAME COMMAND...: beside others; `join` waits for all
  local name=$1
  shift
  rm -f "$work/$name.status"
  {
    begin=$SECONDS status=0
    timeout "${LIMIT:-400}" "$@" >"$work/$name.log" 2>&1 || status=$?
    echo "$status $((SECONDS - begin))" >"$work/$name.status"
  } &
  started+=("$name")
}
started=()
join() {
  local name
  wait
  for name in "${started[@]}"; do
    echo "== $name"
    # shellcheck disable=SC2046
    finish "$name" $(cat "$work/$name.status")
  done
  started=()
}
skip() {
  echo "$2" >"$work/$1.log"
  finish "$1" 77 0
}

capability=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2>"$work/gpu.log")
arch=${MOYU_ARCH:-$capability}
if [ -z "$arch" ]; then
  echo "gpu_check: torch finds no GPU: $(tail -n 1 "$work/gpu.log")" >&2
  exit 3
fi
if [ -z "${MOYU_COMMIT:-}" ]; then
  MOYU_COMMIT=$(git rev-parse --short=12 HEAD 2>/dev/null || echo unknown)
  [ -n "$(git status --porcelain -- csrc moyu_ext python 2>/dev/null)" ] && MOYU_COMMIT+="+"
fi
export MOYU_COMMIT HF_HUB_OFFLINE=1
export PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
[ -x "$work/bench_mlp_cuda" ] && [ -d "$work/site/moyu_ext" ] || [ "${steps[0]}" = build ] ||
  steps=(build "${steps[@]}")

compile_all() {  # the kernels once, each file by a compiler of its own, for tests and benchmark
  local flags=(-std=c++20 -gencode "arch=compute_$arch,code=sm_$arch") jobs=() job source
  for source in csrc/cuda/*.cu benchmarks/bench_mlp_cuda.cu; do
    nvcc "${flags[@]}" -O3 -lineinfo -c "$source" -o "$work/$(basename "$source" .cu).o" &
    jobs+=($!)
  done
  nvcc "${flags[@]}" -O2 -x cu -c tests/cpp/test_cuda_kernels.cpp -o "$work/test_cuda_kernels.o" &
  jobs+=($!)
  for job in "${jobs[@]}"; do wait "$job" || return 1; done
  local objects=()
  for source in csrc/cuda/*.cu; do objects+=("$work/$(basename "$source" .cu).o"); done
  for job in test_cuda_kernels bench_mlp_cuda; do
    nvcc "${flags[@]}" "$work/$job.o" "${objects[@]}" -ldl -o "$work/$job" || return 1
  done
}
install_package() {
  MOYU_CUDA=1 MOYU_CUDA_ARCHS="$arch" "$python" -m pip install -q --no-build-isolation --no-deps \
    --no-index --target "$work/site" --upgrade . &&
    "$python" -c 'from moyu_ext._load import _C
import moyu_ext
print(moyu_ext.__file__, _C.build_info())
assert _C.build_info()["cuda"], "the extension was built without its CUDA kernels"'
}
export -f compile_all install_package
export python work arch

# The cuBLAS that torch brings, where the toolkit has none.
if [ -z "${MOYU_CUBLAS:-}" ]; then
  MOYU_CUBLAS=$("$python" -c 'import glob, pathlib, torch
nvidia = pathlib.Path(torch.__file__).parents[1] / "nvidia"
print(next(iter(sorted(glob.glob(f"{nvidia}/*/lib/libcublas.so.*"))), ""))')
fi
if [ -n "$MOYU_CUBLAS" ]; then
  export MOYU_CUBLAS
  LD_LIBRARY_PATH=$(dirname "$MOYU_CUBLAS")${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}
  export LD_LIBRARY_PATH
fi

kernels() {  # the C++ benchmark: ours against cuBLAS, both in CUDA graphs
  local name=$1
  shift
  TAIL=14 run "$name" "$work/bench_mlp_cuda" --csv "$results/cuda_mlp.csv" \
    --commit "$MOYU_COMMIT" --replays "$replays" "$@"
}
moyu() {  # torch's dense MLPs, every plan and the Triton peer
  local name=$1
  shift
  TAIL=24 run "$name" "$python" -m moyu_ext bench mlp --device cuda --repeats "$replays" \
    --csv "$results/cuda_moyu.csv" "$@"
}
decode() {  # beside others: all prepare at once, and take turns to be measured
  local name=$1
  shift
  LIMIT=290 start "$name" "$python" benchmarks/decode_cuda.py --lock "$work/decode.lock" \
    --csv "$results/cuda_decode.csv" "$@"
}

for step in "${steps[@]}"; do
  case $step in
    build)
      start compile bash -c compile_all
      start install bash -c install_package
      join
      ;;
    test)
      "$python" -c 'import xdist' 2>/dev/null && parallel=(-n 8) || parallel=()
      export OMP_NUM_THREADS=2
      start test_cuda_kernels "$work/test_cuda_kernels"
      start pytest "$python" -m pytest -q -p no:cacheprovider "${parallel[@]}" -m "" \
        tests/test_cuda.py tests/test_cuda_shadow.py tests/test_ops.py tests/test_benchmarking_cuda.py
      join
      unset OMP_NUM_THREADS
      ;;
    sanitize)
      sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null)
      if [ -n "$sanitizer" ]; then
        export MOYU_TEST_EXACT=1
        for tool in memcheck synccheck racecheck; do
          [ "$tool" = racecheck ] && export MOYU_TEST_BRIEF=1  # one type: it is slow
          LIMIT=280 start "$tool" "$sanitizer" --tool "$tool" --error-exitcode 9 \
            "$work/test_cuda_kernels"
        done
        join
        unset MOYU_TEST_EXACT MOYU_TEST_BRIEF
      else
        skip sanitize "compute-sanitizer is not there"
      fi
      ;;
    bench)
      kernels mlp_7b --d 4096 --f 11008 --density 0.3288,0.5,0.1
      kernels mlp_8b --d 4096 --f 14336 --density 0.5416,0.3288
      moyu moyu_7b --dtype float16 -g llama-2-7b -d 0.3288 -d 0.33 -p given -p gate -p product \
        -p shadow-2 -p shadow-eps-2 -p scores-2
      moyu moyu_8b --dtype float16 -g llama-3-8b -d 0.5416 -p given
      for dtype in bfloat16 float32; do
        kernels "mlp_7b_$dtype" --d 4096 --f 11008 --dtype "$dtype" --density 0.3288
      done
      for rows in 2 4 8; do
        kernels "mlp_7b_rows$rows" --d 4096 --f 11008 --rows "$rows" --density 0.3288 --plans given
      done
      ;;
    decode)
      for mode in static loop; do
        decode "stda_$mode" --mode "$mode" --method stda --density 0.3288 --prompt 1024 \
          --new 1024 --rounds 2 --projections
        decode "srida_$mode" --mode "$mode" --method srida --density 0.4383 --prompt 1024 \
          --new 128 --projections
        join
      done
      ;;
    *)
      echo "gpu_check: unknown step $step" >&2
      exit 2
      ;;
  esac
done

echo
"$python" tools/gpu_targets.py "$results"
nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem --format=csv,noheader
printf '%s\n' "${summary[@]}"
exit $((failures > 0))

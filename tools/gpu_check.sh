#!/usr/bin/env bash
# Everything that needs a GPU, without a network: build, tests, compute-sanitizer, benchmarks. Rows
# and the log go to $MOYU_RESULTS (default: benchmarks/results), a summary is printed last.
# Needs nvcc and a CUDA build of torch; other tools that are missing are named and skipped.
#
#   tools/gpu_check.sh [STEP...]                  default: build smoke test sanitize bench profile decode
#   MOYU_QUICK=1 tools/gpu_check.sh bench         few replays, to try the script
#
# Steps: build; smoke (a model of two layers in every mode of "decode"); test; sanitize; bench (one MLP);
# pdl (the tests and the MLPs without dependent launches); ptx (a build with PTX for 8.0 alone); profile;
# decode, or its parts decode-static, decode-deferred, decode-loop (a whole LLaMA-2-7B).
# "build" comes first by itself where sources have changed since the last one.
#
# Where a command may take ten minutes and the machine has no repository:
#   MOYU_RESULTS=$OUT MOYU_COMMIT=<hash> MOYU_DEADLINE=570 tools/gpu_check.sh build test bench
# A part that would begin behind MOYU_DEADLINE seconds is left out, and named.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
mkdir -p "${MOYU_RESULTS:=benchmarks/results}" "${MOYU_WORK:=build/gpu}"
results=$(cd "$MOYU_RESULTS" && pwd)
work=$(cd "$MOYU_WORK" && pwd)
read -r -a steps <<<"${*:-build smoke test sanitize bench profile decode}"
deadline=${MOYU_DEADLINE:-86400}
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
in_time() {  # in_time NAME: false, and said so, where nothing may begin any more
  [ $((deadline - SECONDS)) -gt 10 ] && return 0
  skip "$1" "left out: $SECONDS of $deadline seconds are over"
  return 1
}
limit() { echo $((deadline - SECONDS < ${LIMIT:-400} ? deadline - SECONDS : ${LIMIT:-400})); }
run() {  # run NAME COMMAND...: at most $LIMIT seconds
  local name=$1 begin=$SECONDS status=0
  shift
  in_time "$name" || return
  echo "== $name"
  timeout --foreground "$(limit)" "$@" >"$work/$name.log" 2>&1 || status=$?
  finish "$name" "$status" $((SECONDS - begin))
}
start() {  # start NAME COMMAND...: beside others; `join` waits for all
  local name=$1
  shift
  in_time "$name" || return
  rm -f "$work/$name.status"
  {
    begin=$SECONDS status=0
    timeout "$(limit)" "$@" >"$work/$name.log" 2>&1 || status=$?
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
    # A part that was killed has left no status.
    # shellcheck disable=SC2046
    finish "$name" $(cat "$work/$name.status" 2>/dev/null || echo 137 0)
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
# What was built from other sources would be measured under this commit's name.
stamp=$(find csrc moyu_ext python setup.py benchmarks/*.cu* tests/cpp -type f -not -name '*.pyc' \
  -not -name '*.so' -print0 | sort -z | xargs -0 cat | sha256sum)
[ "$(cat "$work/stamp" 2>/dev/null)" = "$stamp" ] || [ "${steps[0]}" = build ] ||
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
      [ $failures = 0 ] && echo "$stamp" >"$work/stamp"
      ;;
    smoke)
      for mode in static deferred loop; do
        LIMIT=120 start "smoke_$mode" "$python" benchmarks/decode_cuda.py --mode "$mode" --layers 2 \
          --method stda --prompt 64 --new 8 --rounds 1 --projections
      done
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
          LIMIT=280 start "$tool" bash -c 'out=$("$0" "$@" 2>&1); status=$?; echo "$out"
            [[ $out == *"Device not supported"* ]] && exit 77; exit $status' \
            "$sanitizer" --tool "$tool" --error-exitcode 9 "$work/test_cuda_kernels"
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
    pdl)
      MOYU_PDL=0 run test_without_pdl "$work/test_cuda_kernels"
      MOYU_PDL=0 kernels mlp_7b_without_pdl --d 4096 --f 11008 --density 0.3288 --commit \
        "$MOYU_COMMIT-pdl0"
      ;;
    ptx)  # a device newer than the code: what must not rely on waits that are not compiled in
      mkdir -p "$work/ptx"
      run ptx_compile bash -c 'nvcc -std=c++20 -gencode arch=compute_80,code=compute_80 -O3 -x cu \
        tests/cpp/test_cuda_kernels.cpp csrc/cuda/*.cu -ldl -o "$work/ptx/test_cuda_kernels"'
      MOYU_TEST_BRIEF=1 run ptx_test "$work/ptx/test_cuda_kernels"
      ;;
    profile)
      if command -v ncu >/dev/null; then
        TAIL=1 run ncu ncu --clock-control none --launch-count 24 \
          --kernel-name "regex:^(sparse_mlp|threshold_mlp|shadow_scores|quantise|choose)_kernel" \
          --section LaunchStats --section Occupancy --section SpeedOfLight \
          --section WarpStateStats --section MemoryWorkloadAnalysis \
          --metrics "regex:smsp__average_warps_issue_stalled_.*_per_issue_active" \
          "$python" -m moyu_ext bench mlp --device cuda --repeats 3 --dtype float16 -g llama-2-7b \
          -d 0.33 -p given -p shadow-2 -p shadow-eps-2
        cp "$work/ncu.log" "$results/ncu.txt"
      else
        skip ncu "ncu is not there"
      fi
      TAIL=60 run layer "$python" benchmarks/decode_cuda.py --mode loop --layers 4 --method stda \
        --prompt 2016 --new 32 --rounds 1 --projections --kernels
      cp "$work/layer.log" "$results/layer.txt"
      ;;
    decode | decode-static | decode-deferred | decode-loop)
      mode=${step#decode}
      for mode in ${mode:+"${mode#-}"} $([ "$step" = decode ] && echo static deferred loop); do
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

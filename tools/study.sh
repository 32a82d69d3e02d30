#!/usr/bin/env bash
# Every number of docs/findings*.md again, from its seed, below DIR as in benchmarks/results.
#
#   tools/study.sh DIR        two commands at a time, one thread each; logs in DIR/logs
#
# MOYU_DATA names the data folder (its layout: `moyu study --help`). What needs its models and texts
# is left out without it. Tasks and ROUGE need `pip install '.[eval]'`. A run that was interrupted
# goes on: what is there already is not measured again.
set -euo pipefail
out=${1:?usage: tools/study.sh DIR}
data=${MOYU_DATA:-}
work=$out/work # texts and routers, to go on with; nothing to keep
mkdir -p "$out/logs" "$out/eval" "$work"
: >"$work/summary"
moyu() { "${PYTHON:-python3}" -m moyu_ext "$@"; }
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1

running=0
job() { # job NAME COMMAND...: in the background, when one of two places is free
  local name=$1
  shift
  if ((running == 2)); then
    wait -n || true
    running=$((running - 1))
  fi
  running=$((running + 1))
  {
    local begin=$SECONDS status=0
    "$@" >"$out/logs/$name.log" 2>&1 || status=$?
    printf '%-28s %-10s %5d s\n' "$name" "$( ((status == 0)) && echo ok || echo "FAILED $status")" \
      $((SECONDS - begin)) | tee -a "$work/summary"
  } &
}
study() { # study NAME FOLDER MODEL...: into FOLDER
  local name=$1 folder=$2 models=() model
  shift 2
  for model in "$@"; do models+=(--model "$model"); done
  job "$name-$(basename "$folder")" moyu study "$name" "${models[@]}" --resume --out "$out/$folder"
}
# The twins' studies run on text that the project makes itself, so that they need no data folder.
made() { MOYU_DATA='' "$@"; }
evaluate() { # evaluate NAME MODEL OPTION...
  local name=$1 model=$2
  shift 2
  job "eval-$name" scored "$name" "$model" "$@"
}
scored() { # scored NAME MODEL OPTION...: table and picture in a folder, the numbers beside it
  local name=$1 model=$2
  shift 2
  moyu eval "$model" --dtype float32 --out "$out/eval/$name" --json "$out/eval/$name.json" "$@"
}
router() { # router MODEL: trained on the stories' training part
  local name
  name=$(basename "$1")
  [[ ! -s $out/eval/router_$name.json || ! -d $work/router_$name ]] || return 0
  moyu train-router "$1" --dtype float32 --texts "$work/stories.txt" --out "$work/router_$name" \
    --json "$out/eval/router_$name.json"
}
abroad() { # abroad MODEL: its router of the stories on news, offline and online
  local name
  name=$(basename "$1")
  router "$1" && scored "roda_news_$name" "$1" --methods dense,roda,roda-online \
    --router "$work/router_$name" --text "$data/train_mix/heldout/cnndm.txt" --texts 24 --written 0
}


twins=(stories_silu stories_relu)
pareto=(--methods all --texts 16 --written 32)
if [[ -n $data ]]; then
  "${PYTHON:-python3}" - "$work/stories.txt" <<'PYTHON'
import sys
from pathlib import Path

from moyu_ext.evaluation.corpus import Corpus

texts = Corpus().documents("stories", train=True)
Path(sys.argv[1]).write_text("<|endoftext|>".join(texts), encoding="utf-8")
PYTHON
  study qrida qrida mix4m_silu mix4m_relu stories260K "${twins[@]}"
  study qrida-bytes qrida mix4m_silu mix4m_relu "${twins[@]}"
fi
for twin in "${twins[@]}"; do evaluate "pareto_$twin" "$twin" "${pareto[@]}"; done
[[ -z $data ]] || study tables studies/twins "${twins[@]}"
made study training studies/twins # trains models of its own
for name in history heavy-hitters inertia gradient prompt-length; do
  made study "$name" studies/twins "${twins[@]}"
done
[[ -n $data ]] || made study tables studies/twins "${twins[@]}"
if [[ -n $data ]]; then
  models=$data/models
  study qrida-guard qrida mix4m_silu
  evaluate tasks_mix4m_silu "$models/mix4m_silu" --methods dense,tda,srida,qrida -d 0.33 --cett 0.2 \
    --tasks mmlu,truthfulqa_mc1,truthfulqa_mc2,winogrande,gsm8k,hellaswag,arc_easy,arc_challenge,piqa,boolq,last_word \
    --summaries xsum,cnn_dailymail --limit 20 --texts 16 --written 0
  for name in tables history gradient heavy-hitters inertia prompt-length; do
    study "$name" studies/stories260K stories260K
  done
  evaluate pareto_stories260K "$models/stories260K" "${pareto[@]}"
  evaluate tda_mix4m_relu "$models/mix4m_relu" --methods dense,tda --texts 48 --written 0
  for name in mix4m_silu mix4m_relu; do job "roda-news-$name" abroad "$models/$name"; done
  for name in "${twins[@]}"; do job "router-$name" router "$name"; done
  job router-stories260K router "$models/stories260K"
fi
wait
echo
sort -k1 "$work/summary"
printf '%-28s %16d s\n' all "$SECONDS"
if grep -q FAILED "$work/summary"; then
  echo "see $out/logs" >&2
  exit 1
fi

#!/usr/bin/env bash
# One GPU, ten minutes: from pictures of emoji to a judged 64x64 model and a report card in out/speedrun/results.
#
#   bash speedrun.sh                                  about ten minutes, whatever the card
#   MINUTES=60 bash speedrun.sh                       an hour, spent in the same shares
#   MINUTES=2 bash speedrun.sh                        without a GPU: a rehearsal with a tiny network
#   RESULTS=DIR timeout -s KILL 560 bash speedrun.sh  under a time limit: the results of finished stages are in DIR
#
# The pictures come from out/data/emoji (shards), else from out/emoji.zip (35 MB, made by `python data.py emoji
# --pictures=out/emoji.zip`), else from npm. The same command continues an interrupted run after the last stage that has
# ended. evidence/speedrun.py has the stages.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
[ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ] && python=.venv/bin/python
export npm_config_prefer_offline=true # use npm's cache where it has the packages
exec "$python" -m evidence.speedrun --minutes="${MINUTES:-10}" --results="${RESULTS:-}" "$@"

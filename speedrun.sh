#!/usr/bin/env bash
# One GPU, ten minutes: from pictures of emoji to a judged 64x64 model and a report card in out/speedrun/results.
#
#   bash speedrun.sh                                  about ten minutes, whatever the card
#   MINUTES=60 bash speedrun.sh                       an hour, spent in the same shares
#   MINUTES=2 bash speedrun.sh                        without a GPU: a rehearsal with a tiny network
#   RESULTS=DIR timeout -s KILL 560 bash speedrun.sh  where time is cut: what has ended by then is whole in DIR
#
# The pictures come from out/data/emoji (shards), else out/emoji.zip (35 MB, `python data.py emoji --pictures=` makes
# it), else npm. Run again, it goes on after the last stage that has ended. What it does is in evidence/speedrun.py.
set -euo pipefail
cd "$(dirname "$0")"
python=${PYTHON:-python3}
[ -z "${PYTHON:-}" ] && [ -x .venv/bin/python ] && python=.venv/bin/python
export npm_config_prefer_offline=true # npm's cache will do
exec "$python" -m evidence.speedrun --minutes="${MINUTES:-10}" --results="${RESULTS:-}" "$@"

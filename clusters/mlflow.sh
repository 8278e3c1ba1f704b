#!/usr/bin/env bash
# MLflow on this machine only, its artifacts in a bucket and its database copied there.
#
#   bash clusters/mlflow.sh s3://my-bucket/mlflow
#
# Starts both once: a server that answers already is left alone, and so are its copies. A machine
# without a database takes the bucket's, so a new head goes on with the old one's runs. The newest
# copy is PLACE/mlflow.db; to look at it elsewhere:
#   python clusters/backup.py restore mlflow.db PLACE && mlflow server --backend-store-uri sqlite:///mlflow.db
#
# PORT, DATABASE, ARTIFACTS and EVERY (seconds between copies) can be set in the environment. With
# BESIDE, a port of this machine such as Ray's 6379, both end when nobody has listened there for
# PATIENCE seconds, after a last copy: where `ray down` does not end the machine, it ends them too.
set -euo pipefail
place=${1:?"usage: mlflow.sh PLACE, a bucket or a folder for artifacts and copies"}
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
port=${PORT:-5000}
database=${DATABASE:-$HOME/mlflow.db}

answers() {
    python -c "import urllib.request as r; r.urlopen('http://127.0.0.1:$port/health', timeout=5)" \
        2>/dev/null
}

if answers; then
    exit 0
fi
python "$here/backup.py" restore "$database" "$place"
# Without the workers for language models, which take as long to start as all the rest.
export MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
setsid nohup python -m mlflow server --host 127.0.0.1 --port "$port" --workers 1 \
    --backend-store-uri "sqlite:///$database" --artifacts-destination "${ARTIFACTS:-$place/artifacts}" \
    >"$database.server.log" 2>&1 </dev/null &
server=$!  # of a session and a group of its own
copies=(python "$here/backup.py" watch "$database" "$place" --every "${EVERY:-300}")
if [ -n "${BESIDE:-}" ]; then
    copies+=(--beside "$BESIDE" --patience "${PATIENCE:-60}")
fi
# shellcheck disable=SC2016  # the inner shell's
setsid nohup bash -c 'group=$1; shift; "$@" && kill -- "-$group"' copies "$server" "${copies[@]}" \
    >"$database.backup.log" 2>&1 </dev/null &
for _ in $(seq 300); do
    if answers; then
        exit 0
    fi
    sleep 1
done
echo "mlflow.sh: MLflow did not start within five minutes. See $database.server.log." >&2
exit 1

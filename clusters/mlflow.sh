#!/usr/bin/env bash
# Starts the MLflow server on the head: artifacts in the bucket, runs in a database on the head's own
# disk, as SQLite and network file systems do not go together. A copy of it goes to the shared folder
# every five minutes, and the next head starts from that. The server listens to this machine alone;
# `ray attach -p 5000` brings it to yours. One process of it, as one file takes one writer at a time.
set -euo pipefail
cd "$HOME"
copy="$FETA_SWEEP_MOUNT/mlflow.db"

healthy() { curl -sf http://127.0.0.1:5000/health >/dev/null; }

healthy && exit 0
[ -e mlflow.db ] || [ ! -e "$copy" ] || cp "$copy" mlflow.db
MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false nohup setsid mlflow server \
    --host 127.0.0.1 --port 5000 --workers 1 \
    --backend-store-uri "sqlite:///$HOME/mlflow.db" \
    --artifacts-destination "$FETA_SWEEP_BUCKET" \
    >mlflow.log 2>&1 </dev/null &
# SQLite copies a database in use. Read-only, as opening one that is gone would make an empty one; the
# rename comes last, as the machine may end at any time.
nohup setsid flock --nonblock mlflow-copy.lock bash -c '
while sleep "${FETA_SWEEP_COPY_SECONDS:-300}" && [ -e mlflow.db ]; do
    python -c "
import sqlite3
runs = sqlite3.connect(\"file:mlflow.db?mode=ro\", uri=True)
runs.backup(sqlite3.connect(\"mlflow.copy\"))" &&
        cp mlflow.copy "$1.part" && mv "$1.part" "$1"
done' copy "$copy" >mlflow-copy.log 2>&1 </dev/null &
for _ in $(seq 90); do
    healthy && exit 0
    sleep 1
done
echo "error: the MLflow server did not start: see ~/mlflow.log on the head" >&2
exit 1

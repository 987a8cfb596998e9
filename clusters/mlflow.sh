#!/usr/bin/env bash
# Starts the MLflow server on the head: runs on the shared folder, artifacts in the bucket. It
# listens to this machine alone; `ray attach -p 5000` brings it to yours.
set -euo pipefail

healthy() { curl -sf http://127.0.0.1:5000/health >/dev/null; }

healthy && exit 0
MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false nohup setsid mlflow server \
    --host 127.0.0.1 --port 5000 \
    --backend-store-uri "sqlite:///$FETA_SWEEP_MOUNT/mlflow.db" \
    --artifacts-destination "$FETA_SWEEP_BUCKET" \
    >"$HOME/mlflow.log" 2>&1 </dev/null &
for _ in $(seq 90); do
    healthy && exit 0
    sleep 1
done
echo "error: the MLflow server did not start: see ~/mlflow.log on the head" >&2
exit 1

# What every shell of a node knows; setup.sh makes ~/.bashrc read this, and Ray's commands read that.
# The folder with secrets and settings comes from the user's own machine, over SSH.
FETA_SWEEP_SETTINGS="$HOME/.config/feta-sweep"
set -a
. "$FETA_SWEEP_SETTINGS/cluster.env"
FETA_SWEEP_MOUNT=/mnt/feta-sweep
FETA_SWEEP_SECRET_FILE="$FETA_SWEEP_SETTINGS/master.secret"
RAY_AUTH_MODE=token
RAY_AUTH_TOKEN_PATH="$FETA_SWEEP_SETTINGS/ray.token"
# The driver and the trials log, and these run on the head alone: no other node needs the server.
MLFLOW_TRACKING_URI=http://127.0.0.1:5000
PATH="$HOME/feta-sweep/.venv/bin:$PATH"
set +a

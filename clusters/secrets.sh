#!/usr/bin/env bash
# Makes the master secret and Ray's token on your own machine, where they do not exist yet.
set -euo pipefail
umask 077
folder="$HOME/.config/feta-sweep"
mkdir -p "$folder"
for name in master.secret ray.token; do
    [ -s "$folder/$name" ] || openssl rand -hex 32 >"$folder/$name"
done
echo "secrets are in $folder: keep a copy of master.secret, without which no run can be resumed"

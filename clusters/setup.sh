#!/usr/bin/env bash
# Prepares a node with Ubuntu 24.04: `setup.sh aws|gcp`. Running it again changes nothing.
set -euo pipefail
cloud=$1
cd "$(dirname "$0")/.."

fail() {
    echo "error: $*" >&2
    exit 1
}

for name in master.secret ray.token cluster.env; do
    [ -s "$HOME/.config/feta-sweep/$name" ] ||
        fail "$HOME/.config/feta-sweep/$name is missing or empty: make it as clusters/README.md says"
done
chmod -R go= "$HOME/.config/feta-sweep"
. clusters/environment.sh
# First, as Ubuntu's own file returns early in shells that nobody types into.
grep -q feta-sweep "$HOME/.bashrc" ||
    sed -i '1i . "$HOME/feta-sweep/clusters/environment.sh"' "$HOME/.bashrc"

wait_for_lock="-o DPkg::Lock::Timeout=600" # A new machine updates itself first.
sudo apt-get $wait_for_lock -qq update
sudo apt-get $wait_for_lock -qq install -y curl nfs-common pciutils python3-venv
[ -x .venv/bin/python ] || python3 -m venv .venv
.venv/bin/python -m pip install -q --constraint constraints.txt \
    --editable ".[images,sweep,$cloud]"

# In version 3 a machine that vanishes keeps its locks for ever; in 4.1 they end with its lease.
options=vers=4.1,hard,noatime
sudo mkdir -p "$FETA_SWEEP_MOUNT"
mountpoint -q "$FETA_SWEEP_MOUNT" ||
    sudo mount -t nfs -o "$options" "$FETA_SWEEP_NFS" "$FETA_SWEEP_MOUNT" ||
    fail "FETA_SWEEP_NFS=$FETA_SWEEP_NFS cannot be mounted: give HOST:/PATH of an NFS 4.1 share"
grep -q "$FETA_SWEEP_MOUNT" /etc/fstab || # For the next boot.
    echo "$FETA_SWEEP_NFS $FETA_SWEEP_MOUNT nfs $options,_netdev 0 0" | sudo tee -a /etc/fstab >/dev/null
sudo chown "$(id -u):$(id -g)" "$FETA_SWEEP_MOUNT"
flock --timeout 60 "$FETA_SWEEP_MOUNT/.lock-check" true ||
    fail "FETA_SWEEP_NFS=$FETA_SWEEP_NFS passes no locks between hosts, which the ledger needs"

if lspci | grep -qi nvidia; then
    .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        fail "PyTorch finds no GPU: take an image whose NVIDIA driver supports its CUDA"
fi

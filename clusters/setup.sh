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
grep -qs feta-sweep "$HOME/.bashrc" ||
    sed -i '1i . "$HOME/feta-sweep/clusters/environment.sh"' "$HOME/.bashrc"

programs="curl nfs-common pciutils python3-venv zstd"
wait_for_lock="-o DPkg::Lock::Timeout=600" # A new machine updates itself first.
dpkg --status $programs >/dev/null 2>&1 || {
    sudo apt-get $wait_for_lock -qq update
    sudo apt-get $wait_for_lock -qq install -y $programs
}

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

# The first node, the head, installs Python 3.11 and all packages, and leaves them in the shared folder.
# Every other unpacks that: no package index is asked again, and all have the same to the byte.
wanted="$cloud-$(cat pyproject.toml constraints.txt clusters/setup.sh | sha256sum | cut -c1-16)"
packed="$FETA_SWEEP_MOUNT/environments/$wanted.tar.zst"
if [ "$(cat .venv/wanted 2>/dev/null)" != "$wanted" ]; then
    rm -rf .venv .python
    if [ ! -s "$packed" ]; then
        python3 -m venv .uv
        .uv/bin/python -m pip install -q --constraint constraints.txt uv
        export UV_PYTHON_INSTALL_DIR="$PWD/.python"
        .uv/bin/uv venv -q --managed-python --python 3.11 .venv
        .uv/bin/uv pip install -q --python .venv/bin/python --constraint constraints.txt \
            --editable ".[images,sweep,$cloud]"
        mkdir -p "$(dirname "$packed")"
        part=$(mktemp "$packed.XXXXXX")
        tar --create --use-compress-program "zstd -T0" --file "$part" .python .venv
        mv "$part" "$packed"
    else
        tar --extract --use-compress-program zstd --file "$packed"
    fi
    echo "$wanted" >.venv/wanted
fi

if lspci | grep -i nvidia >/dev/null; then
    .venv/bin/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
        fail "PyTorch finds no GPU: take an image whose NVIDIA driver supports its CUDA"
fi

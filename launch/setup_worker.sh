#!/usr/bin/env bash
# Prepares one host of a TPU slice: mounts the storage that all hosts share, and installs flexjax beside this script.
#
#   launch/setup_worker.sh SOURCE MOUNT_POINT       SOURCE: HOST:/SHARE (NFS, Filestore) or gs://BUCKET
#
# Ubuntu, with sudo; queued_resources.sh calls it on every host, again after a restart.

set -euo pipefail
(($# == 2)) || { echo "error: expected SOURCE and MOUNT_POINT, got $# arguments" >&2 && exit 2; }
source=$1 mount_point=$2
cd "$(dirname "${BASH_SOURCE[0]}")/.."

if ! mountpoint --quiet "$mount_point"; then
  sudo mkdir -p "$mount_point"
  if [[ $source == gs://* ]]; then
    command -v gcsfuse >/dev/null || { echo "error: no gcsfuse on this host; install it, or use an NFS share" >&2 && exit 6; }
    sudo chown "$(id -u)" "$mount_point"
    # hosts must see each other's files at once: by default names are remembered for a minute, on some machines for ever
    gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 "${source#gs://}" "$mount_point"
  else
    command -v mount.nfs >/dev/null || sudo apt-get install --yes --quiet nfs-common
    sudo mount -t nfs -o hard "$source" "$mount_point"
    sudo chmod a+rwx "$mount_point"
  fi
fi

python3 -m pip install --quiet --user uv # brings the Python that flexjax needs; the image's may be older
~/.local/bin/uv venv --quiet --python=3.12 .venv
~/.local/bin/uv pip install --quiet --python=.venv/bin/python -r requirements.txt "jax[tpu]"

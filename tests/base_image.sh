#!/usr/bin/env bash
# A stand-in for python:3.11-slim-bookworm, for machines that reach Debian's packages but no image registry: the same Debian, with Debian's own Python 3.11.
# bash tests/base_image.sh NAME makes it once, in a minute; buildah keeps it.
set -euo pipefail
container=$(buildah from scratch)
trap 'buildah rm "$container" >/dev/null' EXIT
root=$(buildah mount "$container")
log=$(debootstrap --variant=minbase --include=python3,python3-venv,ca-certificates bookworm "$root" 2>&1) || { echo "error: debootstrap: ${log##*$'\n'}" >&2; exit 1; }
rm -rf "$root"/var/lib/apt/lists/* "$root"/var/cache/apt/*
buildah umount "$container" >/dev/null
buildah config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin --cmd python3 "$container"
buildah commit "$container" "$1"

#!/bin/bash
# Builds an image by buildah, without a daemon; as root, or within `buildah unshare`.
#
#   launch/container/build.sh lock                      # fixes the versions of all packages anew
#   launch/container/build.sh edge | service | train    # prints the name and the size of the image
#
# BASE names the base image, by default Debian with Python, made here from Debian's packages, so that no registry is needed.
# STORAGE is buildah's folder of images, by default its own.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../.." && pwd)
python="${PYTHON:-python3}"
images=(buildah)
[ -z "${STORAGE:-}" ] || images+=(--root "$STORAGE/images" --runroot "$STORAGE/run")
images+=(--storage-driver vfs)

lock() {
  local compile=("$python" -m uv pip compile --quiet --no-header --no-annotate --python-version 3.11)
  "${compile[@]}" "$root/launch/edge/pyproject.toml" --output-file "$here/edge.txt"
  "${compile[@]}" "$root/pyproject.toml" --extra serve --extra redis --output-file "$here/service.txt"
  "${compile[@]}" "$root/pyproject.toml" --extra cuda12 --output-file "$here/train.txt"
}

# Debian with its Python, and no more.
make_base() {
  local name=localhost/crcjax-base:bookworm folder container
  if ! "${images[@]}" inspect "$name" >/dev/null 2>&1; then
    folder=$(mktemp -d)
    debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv bookworm "$folder/debian" >"$folder/log" 2>&1 \
      || { tail -5 "$folder/log" >&2; exit 1; }
    rm -rf "$folder/debian/var/cache/apt" "$folder/debian/var/lib/apt/lists" "$folder/debian/usr/share/doc" "$folder/debian/usr/share/locale"
    container=$("${images[@]}" from scratch)
    "${images[@]}" copy --quiet "$container" "$folder/debian" / >/dev/null
    "${images[@]}" commit --quiet "$container" "$name" >/dev/null
    "${images[@]}" rm "$container" >/dev/null
    rm -rf "$folder"
  fi
  echo "$name"
}

build() {
  local kind=$1 name="crcjax-$1" context version source="$root"
  [ "$kind" != train ] || name=crcjax
  [ "$kind" != edge ] || source="$root/launch/edge"
  context=$(mktemp -d)
  # shellcheck disable=SC2064
  trap "rm -rf '$context'" EXIT
  "$python" -m pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir "$context/wheels" "$source"
  "$python" -m pip download --quiet --disable-pip-version-check --only-binary :all: --python-version 3.11 --no-deps \
    --dest "$context/wheels" --requirement "$here/$kind.txt"
  cp "$here/$kind.txt" "$context"
  "$python" "$here/sbom.py" "$here/$kind.txt" "$context/wheels" >"$context/sbom.json"
  version=$(sed -n 's/^__version__ = "\(.*\)"/\1/p' "$root/crcjax/__init__.py")
  "${images[@]}" build --isolation chroot --layers=false --quiet --file "$here/$kind.Dockerfile" \
    --build-arg "BASE=${BASE:-$(make_base)}" --build-arg "VERSION=$version" \
    --build-arg "REVISION=$(git -C "$root" rev-parse HEAD 2>/dev/null || echo unknown)" --tag "$name:$version" "$context" >/dev/null
  "${images[@]}" images --format '{{.Name}}:{{.Tag}} {{.Size}}' "$name:$version"
}

case "${1:-}" in
  lock) lock ;;
  edge | service | train) build "$1" ;;
  *) echo "usage: $0 lock | edge | service | train" >&2; exit 2 ;;
esac

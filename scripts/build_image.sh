#!/usr/bin/env bash
# Build the image and train in it on a machine without a container engine or a registry: buildah
# with chroot isolation, on a Debian base that debootstrap makes here in place of BASE_IMAGE.
# As root on Debian: apt-get install buildah debootstrap; scripts/build_image.sh
#
# What pip is configured to use here (indexes, certificates, folders of wheels) is mounted for the
# build and does not enter the image. MIRROR names another Debian mirror. Nothing is left behind.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

die() { echo "error: $*" >&2; exit 2; }
[[ $EUID -eq 0 ]] || die "debootstrap and chroot isolation need root; run it as root"
for tool in buildah debootstrap python3; do
    command -v "$tool" > /dev/null || die "$tool is missing; apt-get install buildah debootstrap python3-pip"
done

work=$(mktemp -d)
export BUILDAH_ISOLATION=chroot
b() { buildah --root "$work/storage" --runroot "$work/runroot" --storage-driver overlay "$@"; }
cleanup() {
    b rm --all || true
    rm -rf --one-file-system "$work"
} > /dev/null 2>&1
trap cleanup EXIT

step() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

step "base: Debian bookworm with Python 3.11 and its headers, as in python:3.11-slim-bookworm"
base=$(b from scratch)
root=$(b mount "$base")
debootstrap --variant=minbase --include=ca-certificates,python3-dev,python3-venv \
    bookworm "$root" "${MIRROR:-http://deb.debian.org/debian}" > "$work/debootstrap.log" \
    || { tail "$work/debootstrap.log" >&2; exit 1; }
b config --env PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin "$base"
b commit --quiet --rm "$base" localhost/base > /dev/null

# pip.conf: the settings of every configuration file and variable here; folders: what they name.
python3 -m pip config list | python3 -c '
import ast, configparser, pathlib, sys, urllib.parse
conf = configparser.RawConfigParser()
conf["global"] = {}
# The variables (":env:") come first in this list, and win over the files.
for line in reversed(sys.stdin.readlines()):
    name, value = line.rstrip("\n").split("=", 1)
    section, key = name.replace(":env:", "global", 1).split(".", 1)
    if section not in conf:
        conf[section] = {}
    conf[section][key] = ast.literal_eval(value)
bundle = "/etc/ssl/certs/ca-certificates.crt"
if "cert" not in conf["global"] and pathlib.Path(bundle).exists():
    conf["global"]["cert"] = bundle
with open(sys.argv[1], "w") as file:
    conf.write(file)
words = [w for s in conf.values() for v in s.values() for w in v.split()]
paths = [pathlib.Path(urllib.parse.unquote(w.removeprefix("file://"))) for w in words]
print(*(p for p in paths if p.is_absolute() and p.exists()), sep="\n")
' "$work/pip.conf" > "$work/folders"
mounts=(--volume "$work/pip.conf:/etc/pip.conf:ro")
while read -r path; do
    # The folder of an index may name wheels beside it.
    [[ $path != */simple ]] || path=${path%/simple}
    [[ -z $path ]] || mounts+=(--volume "$path:$path:ro")
done < "$work/folders"

build() {
    b bud --layers --build-arg BASE_IMAGE=localhost/base "${mounts[@]}" --tag localhost/tre_lightning "$1"
}
step "image"
build .
printf 'size: %s\n' "$(b images --format '{{.Size}}' localhost/tre_lightning)"

step "image again, after a change of the source: the dependencies are those of the first build"
mkdir "$work/changed"
tar --exclude=./.git --exclude=./.venv --exclude=./runs -c . | tar -x -C "$work/changed"
echo '# changed' >> "$work/changed/src/tre_lightning/__init__.py"
build "$work/changed" | tee "$work/again.log"
! grep -q 'Successfully installed .*torch-' "$work/again.log" || { echo "error: torch was installed again" >&2; exit 1; }

# `docker run [--user USER] -v runs:/app/runs tre_lightning ARGUMENT...`
container=$(b from localhost/tre_lightning)
mapfile -t entrypoint < <(b inspect --format '{{range .OCIv1.Config.Entrypoint}}{{println .}}{{end}}' "$container" | sed '/^$/d')
run() {
    local user=$1 runs=$2
    shift 2
    b run --env OMP_NUM_THREADS=1 --user "$user" --volume "$runs:/app/runs" "$container" -- "${entrypoint[@]}" "$@"
}
user=$(b inspect --format '{{.OCIv1.Config.User}}' "$container")
[[ $user == 1000:1000 ]] || { echo "error: the image runs as '$user'" >&2; exit 1; }
short=(--config configs/countdown_tiny.yaml --config configs/memory/lora.yaml
    --warm_start.steps 5 --warm_start.batch_size 16 --trainer.max_epochs 1
    --data.init_args.iterations_per_epoch 2 --data.init_args.batch_size 16
    --data.init_args.val_size 16 --data.init_args.test_size 16 --data.init_args.eval_batch_size 16)
# The second is the uid of some user of the host, which the image does not know.
for uid in "$user" 4711:4711; do
    step "fit as $uid"
    runs=$work/runs-${uid%:*}
    install -d -m 700 -o "${uid%:*}" -g "${uid#*:}" "$runs"
    run "$uid" "$runs" fit "${short[@]}"
    [[ $(stat -c %u:%g "$runs/countdown_tiny/checkpoints/last.ckpt") == "$uid" ]] \
        || { echo "error: the checkpoint is not one of $uid" >&2; exit 1; }
done

step "a mistake is one line and exit code 2; --help is exit code 0"
code=0
run "$user" "$work/runs-1000" fit --config configs/none.yaml || code=$?
[[ $code -eq 2 ]] || { echo "error: exit code $code" >&2; exit 1; }
run "$user" "$work/runs-1000" --help > /dev/null

step "done"

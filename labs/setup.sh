#!/usr/bin/env bash
# Makes this checkout ready to run: Debian packages, the virtual environment, the lab guest's kernel and the guest itself.
# Each step looks first and does only what is missing, and says what it does; a second run is silent and takes a moment.
#
#   labs/setup.sh [packages | venv | kernel | guest | bench]...      nothing named: packages venv kernel guest
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PACKAGES=(qemu-system-x86 qemu-utils qemu-block-extra    # machines, disks, qemu-storage-daemon
          nbdkit libnbd-bin                              # the NBD programs the tests compare ours with
          libvirt-daemon libvirt-daemon-driver-qemu swtpm swtpm-tools ovmf    # a libvirtd of the tests' own
          e2fsprogs sqlite3 gcc libc6-dev                # the lab guest's file systems and its one C program
          dosfstools mtools ntfs-3g xfsprogs btrfs-progs gdisk fdisk    # file systems inside disks
          chromium fonts-dejavu-core                     # the console is tested in a real browser
          debootstrap                                    # a bare system, for the test of the package
          ca-certificates tzdata)                        # tzdata: calendars of retention
LIBVIRT_PACKAGES=(libvirt-dev pkg-config gcc libc6-dev)   # libvirt-python is built against the libvirt that is here
BENCH_PACKAGES=(virtnbdbackup restic gdisk e2fsprogs python3-libnbd nbdkit qemu-utils
                gcc pkg-config libacl1-dev liblz4-dev libzstd-dev libxxhash-dev libssl-dev)   # borg is built from source
LAB=.lab

say() { printf '\033[1m==>\033[0m %s\n' "$*" >&2; }
die() { printf 'setup: %s\n' "$*" >&2; exit 1; }

as_root() {
    if [ "$(id -u)" = 0 ]; then "$@"
    elif ! command -v sudo >/dev/null; then die "That needs root, and there is no sudo here; run first, as root: $0 packages"
    elif [ -t 0 ] || sudo -n true 2>/dev/null; then sudo "$@"
    else die "That needs root, and nobody is here to give sudo a password; run first: sudo $0 packages"
    fi
}

missing_packages() {
    local name
    for name in "$@"; do
        [ "$(dpkg-query -W -f '${db:Status-Status}' "$name" 2>/dev/null)" = installed ] || echo "$name"
    done
}

APT_UPDATED=
apt_update() {
    [ -z "$APT_UPDATED" ] || return 0
    say "Refreshing apt's package lists"
    as_root apt-get update -qq || say "That failed; going on with the lists that are here"
    APT_UPDATED=yes
}

apt_install() {
    local missing
    mapfile -t missing < <(missing_packages "$@")
    [ "${#missing[@]}" -gt 0 ] || return 0
    command -v apt-get >/dev/null || die "This is not Debian or Ubuntu; install these yourself: ${missing[*]}"
    say "Installing Debian packages: ${missing[*]}"
    apt_update
    rm -f "$LAB/apt.log"
    as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends \
        -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "${missing[@]}" </dev/null >"$LAB/apt.log" 2>&1 \
        || { tail -n 20 "$LAB/apt.log" >&2; die "apt-get could not install: ${missing[*]}"; }
}

step_packages() { apt_install "${PACKAGES[@]}"; }
step_bench() { apt_install "${BENCH_PACKAGES[@]}"; }

# --- the virtual environment ------------------------------------------------------------------------------------------

find_python() {     # the first Python that is new enough
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11 /usr/bin/python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

choose_python() {
    PY=$(find_python) && return
    local newest
    for newest in python3 python3.13 python3.12 python3.11; do
        missing_packages "$newest" | grep -q . || continue      # this one is here, and too old
        apt_install "$newest" || continue
        PY=$(find_python) && return
    done
    die "Python 3.11 or newer is needed; install one and name it with PYTHON=/path/to/python3"
}

step_venv() {
    local stamp=.venv/.hvbackup want
    if [ -f "$stamp" ] && [ -x .venv/bin/python ] && [ "$(cat "$stamp")" = "$(venv_fingerprint)" ]; then return; fi
    if ! .venv/bin/python -c 'import pip' 2>/dev/null || ! grep -qsxF "home $PWD" "$stamp"; then
        choose_python
        if ! "$PY" -c 'import ensurepip, venv' 2>/dev/null; then
            apt_install "$("$PY" -c 'import sys; print("python3.%d-venv" % sys.version_info[1])')"
        fi
        say "Making the virtual environment .venv with $("$PY" --version)"
        "$PY" -m venv --clear .venv
    fi
    apt_install "${LIBVIRT_PACKAGES[@]}" $(python_headers)
    say "Installing hvbackup and its tools into .venv (the versions in constraints.txt)"
    PIP_CONSTRAINT=$PWD/constraints.txt .venv/bin/python -m pip install -qq --disable-pip-version-check \
        --no-input -e '.[dev,libvirt,parity,files]'
    want=$(venv_fingerprint)
    printf '%s\n' "$want" >"$stamp"
}

python_headers() {      # the package with the headers of the Python in .venv, where they are missing
    .venv/bin/python -c 'import os, sys, sysconfig
if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("python3.%d-dev" % sys.version_info[1])'
}

venv_fingerprint() {    # what the environment was made from; it is made anew when one of these lines changes
    echo "home $PWD"
    echo "extras dev,libvirt,parity,files"
    { sed '/^# --- /,$d' pyproject.toml; cat constraints.txt packaging/build_target.py hvbackup/target/target.c; } | sha256sum    # not the tools' settings
}

# --- the lab guest ----------------------------------------------------------------------------------------------------
# The guest boots a distribution kernel that is unpacked under .lab and never installed: the boot of this machine is not
# touched.  What the guest's builder reads: .lab/kernel/vmlinuz, and .lab/kernel/modules/ (plain kernel/**/*.ko, no modules.dep).

kernel_packages() {     # the kernel image behind the distribution's meta-package, and its modules where they are apart
    local meta=linux-image-cloud-amd64 image
    apt-cache show "$meta" >/dev/null 2>&1 || meta=linux-image-virtual
    image=$(package_depends "$meta" '^linux-image-[0-9]' | head -n 1)
    [ -n "$image" ] || return 1
    echo "$image"
    package_depends "$image" '^linux-modules-[0-9]'
}

package_depends() {
    apt-cache depends "$1" 2>/dev/null | awk '/^ *\|?(Pre)?Depends:/ {print $2}' | grep -E "$2" | sort -u || true
}

step_kernel() {
    [ -s "$LAB/kernel/vmlinuz" ] && return
    [ "$(dpkg --print-architecture)" = amd64 ] || die "The lab guest needs an amd64 machine"
    local packages tmp="$LAB/kernel.tmp" deb
    mapfile -t packages < <(kernel_packages)
    if [ "${#packages[@]}" = 0 ]; then
        apt_update
        mapfile -t packages < <(kernel_packages)
    fi
    [ "${#packages[@]}" -gt 0 ] || die "apt knows no kernel package for the lab guest (linux-image-cloud-amd64)"
    rm -rf "$tmp" "$LAB/kernel" && mkdir -p "$tmp/tree"
    say "Unpacking a kernel for the lab guest into $LAB, without installing it: ${packages[*]}"
    download "$tmp" "${packages[@]}" || { apt_update && download "$tmp" "${packages[@]}"; } \
        || die "apt-get could not download: ${packages[*]}"
    for deb in "$tmp"/*.deb; do dpkg-deb -x "$deb" "$tmp/tree"; done
    mkdir "$tmp/kernel"
    mv "$tmp"/tree/boot/vmlinuz-* "$tmp/kernel/vmlinuz"
    chmod 0644 "$tmp/kernel/vmlinuz"
    mv "$(modules_folder "$tmp/tree")" "$tmp/kernel/modules"
    plain_modules "$tmp/kernel/modules"
    mv "$tmp/kernel" "$LAB/kernel"
    rm -rf "$tmp"
}

modules_folder() {
    local folder
    for folder in "$1"/usr/lib/modules/*/ "$1"/lib/modules/*/; do
        [ -d "$folder/kernel" ] && { echo "$folder"; return; }
    done
    return 1
}

plain_modules() {       # Debian's newer and Ubuntu's modules are compressed
    local suffix tool
    for suffix in xz zst; do
        [ -n "$(find "$1" -name "*.ko.$suffix" -print -quit)" ] || continue
        if [ "$suffix" = xz ]; then tool=(xz -d); apt_install xz-utils; else tool=(zstd -dq --rm); apt_install zstd; fi
        find "$1" -name "*.ko.$suffix" -exec "${tool[@]}" {} +
    done
}

download() {
    local folder=$1
    shift
    (cd "$folder" && apt-get download -qq -o APT::Sandbox::User=root "$@" </dev/null)
}

step_guest() {
    [ -f labs/guest.py ] || return 0
    [ -e "$LAB/guest/stamp" ] || {
        apt-cache show busybox-static qemu-guest-agent >/dev/null 2>&1 || apt_update    # the builder unpacks these
        say "Building the lab guest in $LAB/guest"
    }
    .venv/bin/python labs/guest.py build >/dev/null
}

main() {
    [ $# -gt 0 ] || set -- packages venv kernel guest
    mkdir -p "$LAB"
    exec 9>"$LAB/lock"
    if [ -n "${SUDO_UID:-}" ]; then chown "$SUDO_UID:$SUDO_GID" "$LAB" "$LAB/lock"; fi      # theirs, not root's
    flock -w 900 9 || die "Another set-up of this checkout is still running after 15 minutes"
    local step
    for step in "$@"; do
        case $step in
            packages | venv | kernel | guest | bench) "step_$step" ;;
            *) die "There is no step named $step" ;;
        esac
    done
}

main "$@"

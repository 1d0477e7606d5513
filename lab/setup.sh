#!/bin/bash
# Everything that a bare Debian 12 needs for the lab, the tests and the demo. Run as root; does nothing when all is there.
#
#   HANDOFF_PREFIX   where QEMU and the guest's kernel go, by default /opt/handoff
#
# Packages come from the machine's own apt sources. The QEMU of backports is unpacked into two prefixes of its own, so
# that the machine's QEMU stays what it is; the second one stands for a rebuild of the same release.
# HANDOFF_PREFIX/releases lists the three, the preferred one first: a name and a path a line. No service is started.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
root=$(dirname "$here")
prefix=${HANDOFF_PREFIX:-/opt/handoff}

packages=(
  busybox-static ca-certificates cpio etcd-client etcd-server ethtool gcc iproute2 iptables kmod
  libc6-dev libvirt-clients libvirt-daemon-driver-qemu libvirt-daemon-system libvirt-dev make openvswitch-switch
  pkg-config procps python3 python3-dev python3-venv qemu-block-extra qemu-system-x86 qemu-utils seabios
  spin util-linux
)
backports_packages=(qemu-system-x86 qemu-system-common qemu-system-data qemu-block-extra qemu-utils seabios)
guest_kernel=linux-image-cloud-amd64

say() { printf 'setup: %s\n' "$*" >&2; }
die() { say "$*"; exit 1; }

[ "$(id -u)" = 0 ] || die "must run as root (it installs packages): sudo $0"
[ "$(dpkg --print-architecture)" = amd64 ] || die "the lab's guests are x86-64: needs an amd64 machine"

scratch=$(mktemp -d)
chmod 755 "$scratch" # apt drops its privileges to download
policy_made=
cleanup() {
  rm -rf "$scratch"
  [ -z "$policy_made" ] || rm -f /usr/sbin/policy-rc.d
}
trap cleanup EXIT

codename() { . /etc/os-release && echo "$VERSION_CODENAME"; }

# apt's lists are read once a run, and only when something has to be fetched.
lists_updated=
update_lists() {
  [ -z "$lists_updated" ] || return 0
  say "reading package lists"
  apt-get -qq update
  lists_updated=1
}

install_packages() {
  local missing=() package
  for package in "${packages[@]}"; do
    [ "$(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null)" = "ii " ] || missing+=("$package")
  done
  [ ${#missing[@]} -gt 0 ] || return 0
  update_lists
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
    chmod 755 /usr/sbin/policy-rc.d
    policy_made=1
  fi
  say "installing ${missing[*]}"
  DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends install "${missing[@]}" >"$scratch/apt.log" 2>&1 ||
    { tail -20 "$scratch/apt.log" >&2; die "apt could not install ${missing[*]}"; }
}

# The mirror that the machine already takes its release from also has its backports.
mirror() {
  apt-get indextargets --format '$(CODENAME) $(COMPONENT) $(SITE)' 'Created-By: Packages' |
    awk -v codename="$(codename)" '$1 == codename && $2 == "main" { print $3; exit }'
}

# "10.0", of a QEMU that says 10.0.2.
release_of() { "$1" -version | sed -n 's/^QEMU emulator version \([0-9]*\.[0-9]*\)\..*/\1/p'; }

download_qemu() {
  local site apt package found=()
  update_lists
  site=$(mirror)
  [ -n "$site" ] || die "no apt source for $(codename) main is configured: add a Debian mirror to /etc/apt/sources.list.d"
  say "unpacking QEMU of $(codename)-backports below $prefix"
  mkdir -p "$scratch/lists/partial" "$scratch/debs" "$scratch/root"
  echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $site $(codename)-backports main" >"$scratch/backports.list"
  apt=(apt-get -qq -o Dir::Etc::SourceList="$scratch/backports.list" -o Dir::Etc::SourceParts=/dev/null
    -o Dir::State::Lists="$scratch/lists" -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= -o APT::Sandbox::User=root)
  "${apt[@]}" update
  for package in "${backports_packages[@]}"; do # seabios is not always in backports: then the machine's own serves
    [ -z "$(apt-cache "${apt[@]:2}" show "$package" 2>/dev/null)" ] || found+=("$package")
  done
  (cd "$scratch/debs" && "${apt[@]}" download "${found[@]}")
  for package in "$scratch"/debs/*.deb; do dpkg -x "$package" "$scratch/root"; done
  rm -rf "$scratch"/root/usr/share/{doc,man,locale,lintian,bug}
  install -D -m 755 "$here/qemu/qemu-system-x86_64" "$scratch/root/bin/qemu-system-x86_64"
}

install_qemu() {
  local release target unpacked=()
  for target in "$prefix"/qemu-*; do # what an earlier run installed stays, whatever backports has by now
    [[ $target == *-rebuilt || ! -e $target/usr/bin/qemu-system-x86_64 ]] || unpacked+=("$target")
  done
  if [ ${#unpacked[@]} = 0 ]; then
    download_qemu
    release=$(release_of "$scratch/root/bin/qemu-system-x86_64")
    [ -n "$release" ] || die "the QEMU of $(codename)-backports does not run"
    unpacked=("$prefix/qemu-$release")
    mkdir -p "${unpacked[0]}.new"
    cp -a "$scratch"/root/{usr,bin} "${unpacked[0]}.new/"
    mv "${unpacked[0]}.new" "${unpacked[0]}"
  fi
  target=${unpacked[0]} release=${unpacked[0]##*/qemu-}
  if [ ! -e "$target-rebuilt/usr/bin/qemu-system-x86_64" ]; then
    rm -rf "$target-rebuilt" "$target-rebuilt.new"
    cp -a "$target" "$target-rebuilt.new"
    mv "$target-rebuilt.new" "$target-rebuilt"
  fi
  for target in "$prefix/qemu-$release" "$prefix/qemu-$release-rebuilt"; do
    install -D -m 755 "$here/qemu/qemu-system-x86_64" "$target/bin/qemu-system-x86_64"
    "$target/bin/qemu-system-x86_64" -machine help | grep -q "^pc-q35-${release/./\\.} " ||
      die "$target/bin/qemu-system-x86_64 does not offer the machine pc-q35-$release; remove $target and run again"
  done
  {
    echo "$release $prefix/qemu-$release/bin/qemu-system-x86_64"
    echo "$release-rebuilt $prefix/qemu-$release-rebuilt/bin/qemu-system-x86_64"
    echo "$(release_of /usr/bin/qemu-system-x86_64) /usr/bin/qemu-system-x86_64"
  } >"$prefix/releases.new"
  mv "$prefix/releases.new" "$prefix/releases"
}

install_guest() {
  local target=$prefix/guest kernel
  mkdir -p "$target"
  if [ ! -e "$target/vmlinuz" ] || [ ! -d "$target/modules" ]; then
    update_lists
    kernel=$(apt-cache depends "$guest_kernel" | awk '$1 == "Depends:" && /linux-image-.*-cloud-amd64$/ { print $2; exit }')
    [ -n "$kernel" ] || die "$guest_kernel is not in the configured apt sources"
    say "unpacking $kernel into $target"
    mkdir -p "$scratch/kernel"
    (cd "$scratch/kernel" && apt-get -qq -o APT::Sandbox::User=root download "$kernel" && dpkg -x ./*.deb root)
    "$here/guest/pick-modules" "$scratch"/kernel/root/lib/modules/*/kernel "$target/modules"
    cp "$scratch"/kernel/root/boot/vmlinuz-* "$target/vmlinuz"
  fi
  "$here/guest/build" "$target"
}

install_probe() {
  local target=$prefix/bin/handoff-probe
  [ "$target" -nt "$here/probe/probe.c" ] && return 0
  mkdir -p "$prefix/bin"
  gcc -std=gnu17 -O2 -Wall -Wextra -Werror -o "$target" "$here/probe/probe.c"
}

install_switch_room() {
  local target=$prefix/lib/handoff-switch-room.so
  [ "$target" -nt "$here/ovs/room.c" ] && return 0
  mkdir -p "$prefix/lib"
  # Switches that run have the old one mapped: they keep it.
  gcc -std=gnu17 -O2 -Wall -Wextra -Werror -D_GNU_SOURCE -shared -fPIC -o "$target.new" "$here/ovs/room.c"
  mv "$target.new" "$target"
}

install_python() {
  local uv
  if ! uv=$(command -v uv); then
    uv=$root/build/tools/bin/uv
    if [ ! -x "$uv" ]; then
      say "installing uv into build/tools"
      mkdir -p "$root/build"
      python3 -m venv "$root/build/tools"
      "$root/build/tools/bin/pip" -q --disable-pip-version-check install uv
    fi
  fi
  (cd "$root" && "$uv" sync -q --frozen)
}

# Mount points: an emulated host puts directories of its own over these, and leaves the machine's alone.
mkdir -p /etc/handoff /etc/libvirt /etc/openvswitch /srv \
  /var/lib/libvirt /var/log/libvirt /var/cache/libvirt /var/lib/openvswitch /var/log/openvswitch

install_packages
install_qemu
install_guest
install_probe
install_switch_room
install_python
say "done: QEMU and the guest are in $prefix"

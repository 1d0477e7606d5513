#!/bin/sh
# PID 1 of a node: node_init.sh NAME DIRECTORY, in fresh namespaces. Killing it is a power-off.
# Tells its pid outside, and later that it is ready, on descriptor 0, a pipe.
set -e
name=$1 directory=$2
read -r pid _ </proc/self/stat # the old /proc still counts the pids outside
echo "$pid" >&0
mount --make-rprivate /
hostname "$name"
mount -t proc proc /proc
mount -t sysfs sysfs /sys # shows this network namespace, and hides cgroups
[ ! -e "$directory/srv" ] || mount -t tmpfs -o size=1m,mode=755 tmpfs /srv
while read -r source target; do
  [ -e "$target" ] || mkdir -p "$target"
  mount --bind "$source" "$target"
done <"$directory/binds"
ip link set lo up
echo ready >&0
exec </dev/null
trap 'exit 0' TERM
while :; do sleep 2147483 & wait; done

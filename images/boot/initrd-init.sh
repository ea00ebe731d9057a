#!/bin/sh
# Mount the root file system read-only and go there. If that fails this script ends, which makes
# the kernel panic and restart, so that the bootloader counts the attempt.
mount -t devtmpfs dev /dev
mount -t proc proc /proc
while read -r module; do insmod "$module"; done < /load
read -r cmdline < /proc/cmdline
for word in $cmdline; do
    case $word in root=*) root=${word#*=} ;; esac
done
tries=0
while [ ! -b "$root" ] && [ $tries -lt 500 ]; do usleep 20000; tries=$((tries + 1)); done
if ! mount -t ext4 -o ro "$root" /root; then
    echo "BROWNOUT ROOT-FAILED $root"
    exit 1
fi
mount -o move /dev /root/dev
mount -o move /proc /root/proc
exec switch_root /root /sbin/init

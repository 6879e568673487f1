#!/bin/busybox sh
# Find the disks, and go on from them: the system on the first, what changes more often on the second.
box=/bin/busybox
$box mount -t proc proc /proc
$box mount -t sysfs sys /sys
$box mount -t devtmpfs dev /dev
while read -r module; do $box insmod "/modules/$module"; done < /modules/order
while [ ! -e /dev/vdb ]; do $box sleep 0.1; done
$box mount -t ext4 /dev/vda /new
$box mount -t ext4 -o ro,noload /dev/vdb /new/lab
for folder in dev proc sys; do $box mount --move "/$folder" "/new/$folder"; done
exec $box switch_root /new /bin/bash /lab/init.sh

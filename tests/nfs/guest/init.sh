#!/bin/bash
# The first process of a machine, after the initramfs: networks as the kernel's command line says
# (lab.eth1=10.9.1.2/24 …), then the agent, and off when that ends.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /tmp
ip link set lo up
for word in $(cat /proc/cmdline); do
  case $word in
    # Two clients with one host name are one client to an NFSv4 server, and break each other's mounts.
    lab.name=*) echo "${word#*=}" > /proc/sys/kernel/hostname ;;
    lab.eth*)
      device=${word%%=*}
      device=${device#lab.}
      for _ in {1..300}; do  # a slow machine may be here before its cards are
        [ -e "/sys/class/net/$device" ] && break
        sleep 0.1
      done
      ip link set "$device" up
      ip addr add "${word#*=}" dev "$device"
      ;;
  esac
done
python3 -u /lab/agent.py
echo o > /proc/sysrq-trigger
sleep 60

#!/bin/bash
# usage: boot.sh <unpacked kernel package> <initrd> <out folder holding run.sh>
# Boots that kernel without KVM. The guest sees this machine's root read-only under a tmpfs overlay, runs run.sh, writes
# log.txt into the out folder and powers off. TIMEOUT in seconds.
set -euo pipefail
kernel=$1 initrd=$2 out=$(realpath "$3")
exec timeout "${TIMEOUT:-580}" qemu-system-x86_64 -accel tcg,thread=multi -cpu max -smp 2 -m 4096 \
    -nodefaults -no-user-config -nographic -no-reboot \
    -kernel "$kernel"/boot/vmlinuz-* -initrd "$initrd" \
    -append "console=ttyS0 panic=-1 quiet mitigations=off nokaslr lsm=landlock,lockdown,yama,integrity,bpf" \
    -serial stdio -monitor none \
    -fsdev local,id=hr,path=/,security_model=none,readonly=on,multidevs=remap \
    -device virtio-9p-pci,fsdev=hr,mount_tag=hostroot \
    -fsdev local,id=ho,path="$out",security_model=none -device virtio-9p-pci,fsdev=ho,mount_tag=hostout \
    -device virtio-rng-pci

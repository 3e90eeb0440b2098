#!/bin/bash
# usage: mkinitrd.sh <unpacked kernel package> <out.cpio.gz>
# A busybox initrd with that kernel's 9p, virtio and overlay modules, and those that the tests use.
# Needs busybox-static (also in the guest), kmod, cpio.
set -euo pipefail
kernel=$1 out=$(realpath -m "$2")
version=$(ls "$kernel/lib/modules")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir -p "$work"/{bin,proc,sys,dev,lower,upper,new,lib/modules}
cp /bin/busybox "$work/bin/"
depmod -b "$kernel" "$version" 2>/dev/null || true

for module in virtio_pci 9pnet_virtio 9p overlay virtio_rng ${EXTRA_MODS-loop ext4 fuse dm-mod dm-delay tun sch_fq}; do
    modprobe -d "$kernel" -S "$version" --show-depends "$module" 2>/dev/null | awk '/^insmod/ {print $2}' || true
done | awk '!seen[$0]++' | while read -r file; do
    name=$(basename "$file")
    case $file in
    *.xz) name=${name%.xz}; xz -dc "$file" > "$work/lib/modules/$name" ;;
    *.zst) name=${name%.zst}; zstd -dc "$file" > "$work/lib/modules/$name" ;;
    *) cp "$file" "$work/lib/modules/$name" ;;
    esac
    echo "$name"
done > "$work/modlist"

cat > "$work/init" <<'I'
#!/bin/busybox sh
b=/bin/busybox
$b mount -t proc proc /proc; $b mount -t sysfs sys /sys; $b mount -t devtmpfs dev /dev
for m in $($b cat /modlist); do $b insmod /lib/modules/$m || echo "insmod $m failed"; done
nine=trans=virtio,version=9p2000.L,msize=1048576
$b mount -t 9p -o $nine,cache=loose,ro hostroot /lower || echo "host root: 9p failed"
$b mount -t tmpfs -o size=2g tmpfs /upper; $b mkdir -p /upper/u /upper/w
$b mount -t overlay overlay -o lowerdir=/lower,upperdir=/upper/u,workdir=/upper/w /new || echo "overlay failed"
$b mount -t proc proc /new/proc; $b mount -t sysfs sys /new/sys; $b mount -t devtmpfs dev /new/dev
$b mkdir -p /new/dev/shm /new/dev/pts /new/out
$b mount -t tmpfs tmpfs /new/dev/shm; $b mount -t tmpfs tmpfs /new/run; $b mount -t devpts devpts /new/dev/pts
$b mount -t cgroup2 cgroup2 /new/sys/fs/cgroup; echo "+cpu +io +memory +pids" > /new/sys/fs/cgroup/cgroup.subtree_control || echo "a controller is missing"
$b mount -t bpf bpf /new/sys/fs/bpf
$b mount -t tracefs tracefs /new/sys/kernel/tracing; $b mount -t securityfs securityfs /new/sys/kernel/security
$b mount -t 9p -o $nine hostout /new/out || echo "out folder: 9p failed"
$b ip link set lo up
echo "GUEST-UP $($b uname -r) after $($b cut -d' ' -f1 /proc/uptime) s"
$b cat > /new/run/first.sh <<'F'
/bin/bash /out/run.sh > /out/log.txt 2>&1; echo "rc=$?" >> /out/log.txt
echo "GUEST-DONE after $(/bin/busybox cut -d' ' -f1 /proc/uptime) s"
/bin/busybox sync; /bin/busybox poweroff -f
F
# Not a chroot: setns() of a mount namespace would leave it, and user namespaces would be refused.
exec $b switch_root /new /bin/bash /run/first.sh
I
chmod +x "$work/init"
(cd "$work" && find . | cpio -o -H newc --quiet | gzip -1) > "$out"

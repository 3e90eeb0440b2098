#!/bin/bash
# usage: suite.sh <python> <unpacked kernel package>...
# Kernel headers that are unpacked into the same folder (linux-headers-*, and its -common) are there for bcc.
# The same kernel tests in each of these kernels, without KVM: the same blobs, relocated again by the guest. One retry,
# because a boot in ten hangs without a message. A guest is ten times slower: correctness only, no figures.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
root=$(cd "$here/../../.." && pwd)
python=$1
shift
failed=0

run() {
    local kernel=$1 out=$2
    rm -f "$out/log.txt"
    "$here/boot.sh" "$kernel" "$out/initrd.gz" "$out" > "$out/console.txt" 2>&1 || true
    grep -q '^rc=' "$out/log.txt" 2> /dev/null
}

for kernel in "$@"; do
    kernel=$(realpath "$kernel")
    name=$(ls "$kernel/lib/modules")
    out=$root/build/vm-$name
    mkdir -p "$out"
    "$here/mkinitrd.sh" "$kernel" "$out/initrd.gz"
    cat > "$out/run.sh" <<I
export PYTHONDONTWRITEBYTECODE=1 POINTCALL_REQUIRE_BLOBS='breaker drill isolate lifecycle storage syscalls tamper transport vfs' HYPOTHESIS_STORAGE_DIRECTORY=/run/hypothesis
mkdir -p "/lib/modules/$name"
mount --bind "$kernel/lib/modules/$name" "/lib/modules/$name"
[ ! -d "$kernel/usr/src" ] || mount --bind "$kernel/usr/src" /usr/src
cd "$root"
"$python" -m pytest tests/kernel tests/unit/kernel -q -p no:cacheprovider ${PYTEST_ARGS:-} || exit
# A pure cgroup v2 host: what limits hold there.
"$python" -m pytest tests/unit/services/test_process.py -q -p no:cacheprovider -k "memory_limit or processes or forks_beyond"
I
    run "$kernel" "$out" || run "$kernel" "$out" || true
    echo "== $name"
    tail -n "${LINES_SHOWN:-30}" "$out/log.txt" || cat "$out/console.txt"
    grep -q '^rc=0' "$out/log.txt" || failed=1
done
exit $failed

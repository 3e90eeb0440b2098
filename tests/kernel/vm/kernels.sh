#!/bin/bash
# usage: kernels.sh <folder>
# Downloads Debian's kernel and its 6.12 of backported security updates, with their headers for bcc, unpacks each into
# a folder of its own, and prints these folders. What is there already is not downloaded again. Installs nothing.
set -euo pipefail
mkdir -p "$1"
cd "$1"
apt-cache show linux-image-amd64 > /dev/null 2>&1 || apt-get update -qq
for meta in linux-image-amd64 linux-image-6.12-amd64; do
    image=$(apt-cache depends --important "$meta" | awk '$1 == "Depends:" && $2 ~ /^linux-image-[0-9]/ {print $2; exit}')
    [ -n "$image" ] || { echo "no package $meta: apt-get update, on Debian 12" >&2; continue; }
    version=${image#linux-image-}
    if [ ! -e "$version/complete" ]; then
        rm -rf "$version" && mkdir -p "$version/packages"
        headers=linux-headers-$version
        (cd "$version/packages" && apt-get download -q "$image" "$headers" "${headers%-amd64}-common" >&2)
        for package in "$version"/packages/*.deb; do dpkg-deb -x "$package" "$version"; done
        rm -r "$version/packages"
        touch "$version/complete"
    fi
    echo "$PWD/$version"
done

#!/bin/sh
# Make sure that FFCV, which PyPI carries as source only, can be built: OpenCV's and libturbojpeg's headers.
# Exit 0 if they are there; otherwise install them by apt where that is possible; otherwise say what is missing
# and what works without, and exit 1. libjpeg's header, which pipelines/jpeg/decoder.c is compiled with at first use, comes along.
set -u
packages="pkg-config libopencv-dev libturbojpeg0-dev libjpeg-dev"

have() {
  command -v pkg-config >/dev/null && pkg-config --exists opencv4 libturbojpeg
}

have && pkg-config --exists libjpeg && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
fi
pkg-config --exists libjpeg 2>/dev/null ||
  echo "Our JPEG decoder cannot be compiled: jpeglib.h is missing (apt-get install libjpeg-dev, as root)." >&2
have && exit 0
echo "FFCV cannot be built: the system libraries $packages are missing (apt-get install $packages, as root)." >&2
echo "Without FFCV everything works but reading and writing .beton files; use the other loaders." >&2
exit 1

#!/bin/sh
# Make sure that FFCV, which PyPI carries as source only, can be built: OpenCV's and libturbojpeg's headers.
# Exit 0 if they are there; otherwise install them by apt where that is possible; otherwise say what is missing
# and what works without, and exit 1.
set -u
packages="pkg-config libopencv-dev libturbojpeg0-dev"

have() {
  command -v pkg-config >/dev/null && pkg-config --exists opencv4 libturbojpeg
}

have && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $packages >/dev/null
fi
have && exit 0
echo "FFCV cannot be built: the system libraries $packages are missing (apt-get install $packages, as root)." >&2
echo "Without FFCV everything works but reading and writing .beton files; use the other loaders." >&2
exit 1

#!/bin/sh
# Install what looking at a page in a browser needs: Chromium from Debian's packages, playwright and
# axe-core from the package index. What cannot be installed, the tests name.
if ! python -c 'import playwright, axe_playwright_python' 2>/dev/null; then
  echo "Installing playwright and axe-core"
  python -m pip install --quiet --disable-pip-version-check -r tests/browser/requirements.txt
fi
for name in chromium chromium-browser google-chrome google-chrome-stable; do
  if command -v "$name" >/dev/null; then exit 0; fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then exit 0; fi
echo "Installing chromium"
export DEBIAN_FRONTEND=noninteractive
{ apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core; } \
  >/dev/null 2>&1 || echo "chromium could not be installed" >&2
exit 0

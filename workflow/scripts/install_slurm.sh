#!/bin/sh
# Install what a Slurm on this machine needs, from Debian's or Ubuntu's packages. Where that is not
# possible nothing happens: the tests say what is missing and are skipped.
PATH="$PATH:/usr/sbin:/sbin"
if command -v slurmctld && command -v slurmd && command -v munged; then exit 0; fi >/dev/null
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then exit 0; fi
echo "Installing slurm-wlm and munge"
export DEBIAN_FRONTEND=noninteractive
{ apt-get update -qq && apt-get install -y -qq --no-install-recommends slurm-wlm munge iproute2; } \
  >/dev/null 2>&1 || echo "the packages could not be installed" >&2
exit 0

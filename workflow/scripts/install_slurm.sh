#!/bin/sh
# Install what a Slurm on this machine needs, from Debian's or Ubuntu's packages. Where that is not
# possible nothing happens: the tests say what is missing and are skipped.
PATH="$PATH:/usr/sbin:/sbin"
export DEBIAN_FRONTEND=noninteractive

lacks() { for name; do command -v "$name" >/dev/null || return 0; done; return 1; }

wanted=
if lacks munged slurmctld slurmd srun ss; then wanted="slurm-wlm munge iproute2"; fi
# For accounting; without the packages that start a database server of their own.
if lacks slurmdbd mariadbd mariadb mariadb-install-db; then
  wanted="$wanted slurmdbd mariadb-server-core mariadb-client-core"
fi
if [ -z "$wanted" ] || [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then exit 0; fi

# The tests start daemons of their own; no package is to start one.
policy=/usr/sbin/policy-rc.d
if ! [ -e "$policy" ]; then
  printf '#!/bin/sh\nexit 101\n' >"$policy" && chmod 755 "$policy"
  trap 'rm -f "$policy"' EXIT
fi
apt-get update -qq >/dev/null 2>&1
for package in $wanted; do
  echo "Installing $package"
  apt-get install -y -qq --no-install-recommends "$package" >/dev/null 2>&1 ||
    echo "$package could not be installed" >&2
done
exit 0

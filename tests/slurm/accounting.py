"""A cluster with accounting: slurmdbd and the database behind it, both on loopback."""

from __future__ import annotations

import os
import secrets
import subprocess

from tests.slurm.cluster import PATIENCE, SEARCH_PATH, Cluster, wait_until

NEEDED = ("slurmdbd", "mariadbd", "mariadb", "mariadb-install-db", "sacct", "sacctmgr")
ACCOUNT = "lab"


class AccountedCluster(Cluster):
    """Jobs need an account, of which at most one job may be queued or running at a time.

    The controller forgets a job two seconds after its end, so that only ``sacct`` knows of it.
    """

    DAEMONS = (*Cluster.DAEMONS[:-1], "slurmdbd", "mariadbd", "munged")
    ACCOUNTING = """\
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1
AccountingStoragePort={database_port}
AccountingStoragePass={root}/munge.socket
AccountingStorageEnforce=associations,limits
AccountingStoreFlags=job_comment
AccountingStorageTRES=gres/gpu
MinJobAge=2"""

    def finished(self) -> list[tuple[str, str, str]]:
        """Comment, state and account of every job, as ``sacct`` has them, oldest first."""
        rows = self.call(
            *("sacct", "--allocations", "--noheader", "--parsable2", "--duplicates"),
            "--format=Comment,State,Account",
        )
        return [(*row.split("|"),) for row in rows.splitlines()]  # type: ignore[misc]

    def _start_munge(self) -> None:
        super()._start_munge()
        password = secrets.token_hex()
        self._start_mariadb(password)
        configuration = self.root / "slurmdbd.conf"
        configuration.touch(mode=0o600)
        configuration.write_text(
            DATABASE.format(
                root=self.root,
                host=self.host,
                user=self.user,
                port=self.port + 1,
                mariadb_port=self.port + 2,
                password=password,
            ),
            encoding="utf-8",
        )
        self._daemon("slurmdbd")
        manage = ("sacctmgr", "--immediate")
        wait_until(lambda: self._works("sacctmgr", "--noheader", "list", "cluster"), "slurmdbd")
        self.call(*manage, "add", "cluster", "loopback")
        self.call(*manage, "add", "account", ACCOUNT, "MaxSubmitJobs=1")
        self.call(*manage, "add", "user", self.user, f"Account={ACCOUNT}")

    def _start_mariadb(self, password: str) -> None:
        data, socket = self.root / "mysql", self.root / "mariadb.socket"
        log = (self.root / "mariadb.log").open("ab")
        common = ["--no-defaults", f"--user={self.user}", f"--datadir={data}"]
        install = ["mariadb-install-db", *common, "--skip-test-db"]
        install.append("--auth-root-authentication-method=socket")
        environment = {**os.environ, "PATH": SEARCH_PATH}
        subprocess.run(
            install, env=environment, stdout=log, stderr=log, timeout=PATIENCE, check=True
        )
        server = ["mariadbd", *common, f"--socket={socket}", "--bind-address=127.0.0.1"]
        server += [f"--port={self.port + 2}", f"--pid-file={self.root}/mariadbd.pid"]
        server += [
            f"--log-error={self.root}/mariadbd.log",
            "--innodb-buffer-pool-size=64M",
            "--innodb-lock-wait-timeout=900",
        ]
        self._daemon("setsid", "--fork", *server)
        log.close()
        client = ("mariadb", "--no-defaults", f"--user={self.user}", f"--socket={socket}")
        wait_until(lambda: self._works(*client, "--execute=select 1"), "mariadb")
        for command in (
            "create database slurm_acct_db",
            f"create user slurm@'127.0.0.1' identified by '{password}'",
            f"create user slurm@localhost identified by '{password}'",
            "grant all on slurm_acct_db.* to slurm@'127.0.0.1'",
            "grant all on slurm_acct_db.* to slurm@localhost",
        ):
            self.call(*client, f"--execute={command}")

    def _works(self, *command: str) -> bool:
        environment = {**os.environ, **self.environment}
        try:
            result = subprocess.run(command, env=environment, capture_output=True, timeout=60)
        except subprocess.TimeoutExpired:
            return False
        return result.returncode == 0


DATABASE = """\
AuthType=auth/munge
AuthInfo=socket={root}/munge.socket
DbdHost={host}
DbdAddr=127.0.0.1
DbdPort={port}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser={user}
PidFile={root}/slurmdbd.pid
LogFile={root}/slurmdbd.log
StorageType=accounting_storage/mysql
StorageHost=127.0.0.1
StoragePort={mariadb_port}
StorageUser=slurm
StoragePass={password}
StorageLoc=slurm_acct_db
"""

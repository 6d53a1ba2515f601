"""A real API server: etcd and kube-apiserver on loopback, the latter as tests/e2e/build_kube_apiserver.sh leaves it."""

from __future__ import annotations

import os
import shutil
import ssl
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import yaml
from lightkube import Client, KubeConfig

from flyball.adapters.engines.process import ChildProcess, free_port

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "flyball" / "kubernetes-1.20.2"


@dataclass(frozen=True)
class ApiServer:
    """Where it is, and kubeconfig files for an administrator and for the operator."""

    url: str
    folder: Path

    def kubeconfig(self, user: str) -> Path:
        """A file that logs this user in."""
        path = self.folder / f"{user}.kubeconfig"
        cluster = {"server": self.url, "insecure-skip-tls-verify": True}
        path.write_text(
            yaml.safe_dump(
                {
                    "apiVersion": "v1",
                    "kind": "Config",
                    "current-context": "test",
                    "clusters": [{"name": "test", "cluster": cluster}],
                    "users": [{"name": user, "user": {"token": f"token-of-{user}"}}],
                    "contexts": [
                        {"name": "test", "context": {"cluster": "test", "user": user, "namespace": "default"}}
                    ],
                }
            )
        )
        return path

    def client(self, user: str) -> Client:
        """The API as this user."""
        return Client(config=KubeConfig.from_file(self.kubeconfig(user)), namespace="default")


@contextmanager
def api_server_in(folder: Path) -> Iterator[ApiServer]:
    """etcd and kube-apiserver while the block runs; skips the test where there are none."""
    program, etcd = CACHE / "kube-apiserver", shutil.which("etcd")
    if not program.exists() or etcd is None:
        pytest.skip("no kube-apiserver was built; run tests/e2e/build_kube_apiserver.sh")
    key = folder / "sa.key"
    subprocess.run(["openssl", "genrsa", "-out", str(key), "2048"], check=True, capture_output=True)
    (folder / "tokens.csv").write_text("token-of-admin,admin,1,system:masters\ntoken-of-operator,operator,2\n")
    client_port, peer_port, port = free_port(), free_port(), free_port()
    store = f"http://127.0.0.1:{client_port}"
    etcd_command = [
        etcd, "--data-dir", str(folder / "etcd"), "--listen-client-urls", store,
        "--advertise-client-urls", store, "--listen-peer-urls", f"http://127.0.0.1:{peer_port}",
        "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer_port}",
        "--initial-cluster", f"default=http://127.0.0.1:{peer_port}",
    ]  # fmt: skip
    url = f"https://127.0.0.1:{port}"
    api_command = [
        str(program), f"--etcd-servers={store}", "--bind-address=127.0.0.1", "--advertise-address=127.0.0.1",
        f"--secure-port={port}", "--insecure-port=0", f"--cert-dir={folder}", f"--service-account-issuer={url}",
        f"--service-account-key-file={key}", f"--service-account-signing-key-file={key}",
        f"--token-auth-file={folder / 'tokens.csv'}", "--authorization-mode=RBAC",
        "--service-cluster-ip-range=10.0.0.0/24", "--disable-admission-plugins=ServiceAccount",
        "--endpoint-reconciler-type=none",
    ]  # fmt: skip
    children = [
        ChildProcess(etcd_command, log=folder / "etcd.log"),
        ChildProcess(api_command, log=folder / "api.log"),
    ]
    try:
        late_s = time.monotonic() + 120
        while not _ready(url):
            assert time.monotonic() < late_s, children[1].output()[-2000:]
            time.sleep(0.3)
        yield ApiServer(url, folder)
    finally:
        for child in reversed(children):
            child.stop()


def _ready(url: str) -> bool:
    context = ssl._create_unverified_context()
    try:
        headers = {"Authorization": "Bearer token-of-admin"}
        return httpx.get(f"{url}/readyz", headers=headers, verify=context, timeout=2.0).status_code == 200
    except httpx.HTTPError:
        return False

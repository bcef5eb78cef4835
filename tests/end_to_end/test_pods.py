"""What dtrun k8s prints, run where Kubernetes would: in two pods that are network namespaces.

A pod has its job's hostname, its index in the environment and, here from a file, the names that the
cluster's DNS would tell: of itself in full, and of the pods in the service's domain.
"""

from __future__ import annotations

import sys

import pytest

from dtrun.cli import main
from tests.end_to_end.hosts import ADDRESSES, ended, two_hosts, why_not
from tests.tree import ROOT

yaml = pytest.importorskip("yaml", reason="not run: install the extra 'test'")
pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not() or "-"),
    pytest.mark.timeout(120),
]

# Its arguments: the file with the names, the pod's own name, and the command to become.
BECOME = 'mount --bind "$0" /etc/hosts; echo "$1" > /proc/sys/kernel/hostname; shift; exec "$@"'
SELFTEST = ["-m", "dtrain.distributed.selftest"]


@pytest.mark.parametrize(
    ("flags", "base"),
    [
        (["--nnodes", "2", "--nproc-per-node", "2"], "dtrain"),
        (["--jobset", "--name", "gpt", "--nnodes=1:2", "--max-restarts", "1"], "gpt-nodes-0"),
    ],
    ids=["job", "jobset"],
)
def test_the_pods_of_a_manifest_work_together(flags, base, tmp_path, capsys):
    """Pod 1 is there first, and the name of pod 0 is told when that has its address."""
    assert main(["k8s", *flags, *SELFTEST]) == 0
    *_, job = yaml.safe_load_all(capsys.readouterr().out)
    domain, spec = job["metadata"]["name"], job["spec"]
    if job["kind"] == "JobSet":
        spec = spec["replicatedJobs"][0]["template"]["spec"]
    pod = spec["template"]["spec"]
    key = tmp_path / "job.key"
    key.write_bytes(bytes(range(32)))
    key.chmod(0o600)
    words = [str(key) if "/run/secrets" in w else w for w in pod["containers"][0]["command"][1:]]

    def tell(index, *others):
        """What pod `index` knows by now: itself and some others."""
        own = f"{ADDRESSES[index]} {base}-{index}.{domain}.ns.svc.cluster.local {base}-{index}\n"
        known = [f"{ADDRESSES[i]} {base}-{i}.{domain}\n" for i in (index, *others)]
        names = tmp_path / f"hosts-{index}"
        names.write_text("127.0.0.1 localhost\n" + own + "".join(known))
        return names

    def start(hosts, index, names):
        become = ["unshare", "--mount", "sh", "-c", BECOME, names, f"{base}-{index}"]
        environ = {"JOB_COMPLETION_INDEX": str(index), "PYTHONPATH": str(ROOT)}
        return hosts.start(index, *become, sys.executable, "-m", "dtrun", *words, **environ)

    assert spec["completions"] == 2
    with two_hosts() as hosts:
        second = start(hosts, 1, tell(1))
        if job["kind"] == "JobSet":  # nodes that meet; else the ranks themselves ask again
            for line in second.stderr:
                if "is not known here" in line:
                    break
        first = start(hosts, 0, tell(0, 1))
        tell(1, 0)
        (code, out, err), (other, _, other_err) = ended(first, second)
    assert (code, other) == (0, 0), err + other_err
    count = 2 if job["kind"] == "JobSet" else 4
    there = ", ".join(f"{base}-{index} {count // 2}" for index in (0, 1))
    assert f"{count} ranks work together ({there})" in out, out
    assert f"meeting at {base}-0.{domain}:29500" in err

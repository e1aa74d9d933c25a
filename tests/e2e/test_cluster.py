"""Presets, overlays and what docs and README say of clusters: all of it parses, and its numbers agree."""

from __future__ import annotations

import re
import shlex
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import yaml

from snake_lora_pl.__main__ import main
from snake_lora_pl.paths import shipped_configs

ROOT = Path(__file__).parents[2]
PYTORCHJOB = ROOT / "docs" / "cluster" / "kubernetes-pytorchjob.yaml"
STRATEGIES = {
    "ddp.yaml": "ddp",
    "fsdp.yaml": {"class_path": "snake_lora_pl.training.sharding.FullyShardedStrategy"},
}
PAIRS = list(product(["lightweight.yaml", "balanced.yaml", "high_capacity.yaml"], ["lora", "qlora", "adalora"]))


def read_config(name: str) -> dict[str, Any]:
    return yaml.safe_load(shipped_configs()[name].read_text())


def leaves(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config's values by their dotted keys; a strategy is one value."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        nested = isinstance(value, dict) and "class_path" not in value
        found |= leaves(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value}
    return found


def resolve(*arguments: str, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit, match="0"):
        main([*arguments, "--print_config"])
    return yaml.safe_load(capsys.readouterr().out)


# Every pair; all three together would add nothing, since the overlays touch different keys, see below.
@pytest.mark.parametrize(("preset", "kind", "processes"), [(*pair, p) for pair, p in zip(PAIRS, cycle(STRATEGIES))])
def test_presets_kinds_and_processes_compose(
    preset: str, kind: str, processes: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [preset, *([] if kind == "lora" else [f"{kind}.yaml"]), processes]
    resolved = leaves(resolve("fit", *(f"--config={name}" for name in names), capsys=capsys))
    expected: dict[str, Any] = {}
    for name in names:
        expected |= leaves(read_config(name))
    assert expected.items() <= (resolved | {"trainer.strategy": _without_defaults(resolved)}).items()
    assert resolved["model.adapter_type"] == kind
    assert _without_defaults(resolved) == STRATEGIES[processes]
    assert resolved["model.lora.rank"] == read_config(preset)["model"]["lora"]["rank"]


def _without_defaults(resolved: dict[str, Any]) -> Any:
    strategy = resolved["trainer.strategy"]
    return {"class_path": strategy["class_path"]} if isinstance(strategy, dict) else strategy


def test_overlays_of_kind_and_of_processes_touch_different_keys() -> None:
    # So the order in which they are given does not matter.
    for kind in ("qlora.yaml", "adalora.yaml"):
        for processes in STRATEGIES:
            assert not leaves(read_config(kind)).keys() & leaves(read_config(processes)).keys()


# Its fields were checked against the PyTorchJob schema of Kubeflow's training operator 1.7.0, 1.8.1 and 1.9.0, which is
# too large to be kept here.
def test_the_kubernetes_manifest_starts_as_many_processes_as_it_tells_the_trainer(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    job = yaml.safe_load(PYTORCHJOB.read_text())
    assert (job["apiVersion"], job["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = job["spec"]["pytorchReplicaSpecs"]
    assert replicas.keys() == {"Master", "Worker"}
    assert replicas["Master"]["replicas"] == 1
    commands = []
    for replica in replicas.values():
        assert replica["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        pod = replica["template"]["spec"]
        (container,) = pod["containers"]
        assert container["name"] == "pytorch"
        assert container["resources"]["limits"]["nvidia.com/gpu"] == int(job["spec"]["nprocPerNode"])
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        commands.append(container["command"])
    assert commands[0] == commands[1]
    launcher, arguments = commands[0][:3], commands[0][3:]
    assert launcher == ["torchrun", "--module", "snake_lora_pl"]
    resolved = resolve(*arguments, capsys=capsys)
    assert int(resolved["trainer"]["devices"]) == int(job["spec"]["nprocPerNode"])
    assert resolved["trainer"]["num_nodes"] == sum(replica["replicas"] for replica in replicas.values())
    shared = {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] == "runs"}
    assert any(Path(directory) in Path(resolved["root"]).parents for directory in shared)


def test_documented_torchrun_commands_start_as_many_processes_as_they_tell_the_trainer(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "how-to" / "several-gpus.md").read_text()
    commands = [shlex.split(code) for code in re.findall(r"`([^`]*torchrun [^`]*)`", text)]
    assert len(commands) == 2
    for command in commands:
        launcher, arguments = command[: command.index("-m")], command[command.index("-m") + 2 :]
        trainer = resolve(*arguments, capsys=capsys)["trainer"]
        assert int(launcher[launcher.index("--nproc-per-node") + 1]) == int(trainer["devices"])
        num_nodes = int(launcher[launcher.index("--nnodes") + 1]) if "--nnodes" in launcher else 1
        assert num_nodes == trainer["num_nodes"]
        assert trainer["strategy"] == "ddp"


def test_the_slurm_script_hands_its_nodes_and_tasks_to_the_trainer(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = (ROOT / "docs" / "cluster" / "slurm.sbatch").read_text()
    (command,) = re.findall(r"^srun python -m snake_lora_pl (.*?[^\\\\])$", script, flags=re.MULTILINE | re.DOTALL)
    given = {name: value for name, value in re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script, flags=re.MULTILINE)}
    values = {"SLURM_NNODES": given["nodes"], "SLURM_NTASKS_PER_NODE": given["ntasks-per-node"], "SLURM_JOB_ID": "7"}
    command = re.sub(r"\$(\w+)", lambda name: values[name[1]], command.replace('"$@"', "").replace("\\\n", ""))
    resolved = resolve(*shlex.split(command), capsys=capsys)
    assert resolved["trainer"]["num_nodes"] == int(given["nodes"])
    assert int(resolved["trainer"]["devices"]) == int(given["ntasks-per-node"]) == int(given["gpus-per-node"])
    assert resolved["root"] == "runs/7"
    assert resolved["ckpt_path"] == "auto"

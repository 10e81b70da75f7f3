"""Installation: wheel and sdist, built without a network, in an environment with nothing but what they require."""

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
EXTRAS = {"transformers", "timm", "triton", "matplotlib", "plotly", "lightning", "onnx", "peft", "gguf"}
PLACES = {"passes": "ecospa_fx/passes", "kernels": "ecospa_fx/kernels", "ecospa_fx": "ecospa_fx"}
"""Folder of the source tree -> folder of the wheel."""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Wheel and sdist of the source tree, copied so that nothing is written into it; the wheel is made of the sdist."""
    top = tmp_path_factory.mktemp("built")
    source = top / "source"
    for folder in PLACES:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(top), str(source)]
    done = subprocess.run(command, cwd=top, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (wheel,), (sdist,) = top.glob("*.whl"), top.glob("*.tar.gz")
    return wheel, sdist


def test_the_wheel_holds_every_file_of_the_source_tree(built):
    wheel, sdist = built
    files = [
        path
        for folder in PLACES
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.parent.name != "__pycache__"
    ]
    wanted = {re.sub(r"^\w+", lambda top: PLACES[top[0]], path.relative_to(ROOT).as_posix()) for path in files}
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert held == wanted
    assert {"ecospa_fx/py.typed", "ecospa_fx/passes/__init__.py", "ecospa_fx/kernels/__init__.py"} <= held
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert {path.relative_to(ROOT).as_posix() for path in files} | {"pyproject.toml", "README.md", "LICENSE"} <= packed


def required(wheel):
    """All distributions, by name, that a wheel requires without its extras, those that they require included."""
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        text = archive.read(metadata).decode()
    left = [(Requirement(line), "") for line in re.findall(r"^Requires-Dist: (.*)$", text, re.MULTILINE)]
    found, seen = {}, set()
    while left:
        requirement, extra = left.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        found.setdefault(name, importlib.metadata.distribution(name))
        for wanted in {"", *requirement.extras}:  # torch for CUDA takes most of what it needs as extras
            if (name, wanted) not in seen:
                seen.add((name, wanted))
                left += [(Requirement(line), wanted) for line in found[name].requires or []]
    return found


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """The Python of an environment with the wheel, and links to what it requires: nothing is downloaded."""
    wheel, _ = built
    top = tmp_path_factory.mktemp("installed")
    venv.create(top, with_pip=False)
    python = top / "bin" / "python"
    (site,) = (top / "lib").glob("python*/site-packages")
    for distribution in required(wheel).values():
        for name in {file.parts[0] for file in distribution.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / name).exists():
                (site / name).symlink_to(distribution.locate_file(name))
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
    # Nothing else may be installed: it would be written through the links, over what this environment has.
    subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", "--no-compile", str(wheel)], check=True)
    checked = subprocess.run([*pip, "check"], capture_output=True, text=True, check=False)  # what is missing or too old
    assert checked.returncode == 0, checked.stdout
    return python


PROGRAM = """
import importlib.util, sys
import torch
from torch import nn
import ecospa_fx

assert ecospa_fx.__file__.startswith(sys.prefix), ecospa_fx.__file__
print(*[name for name in sys.argv[1].split() if importlib.util.find_spec(name)])


class Glu(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 16), nn.Linear(6, 16), nn.Linear(16, 6)

    def forward(self, x):
        return self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))


torch.manual_seed(0)
x = torch.randn(8, 6)
model = ecospa_fx.compile(Glu(), example_inputs=(x,))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
(glu,) = ecospa_fx.couplings(model)
ecospa_fx.shrink(model, {glu: torch.arange(12)}, optimizer=optimizer)
trainer = ecospa_fx.EcoSpaTrainer(model, optimizer, target=0.5, interval=2, end=8)
for _ in range(12):
    loss = (model(x) - x).square().mean()
    loss.backward()
    optimizer.step()
    trainer.step(loss=loss)
    optimizer.zero_grad()
assert trainer.done and tuple(model.down.weight.shape) == (6, 8), model
ecospa_fx.save(model, "run", optimizer=optimizer, trainer=trainer)
loaded = ecospa_fx.load("run", Glu)
assert torch.equal(loaded(x), model(x))
print(ecospa_fx.explain(loaded, example_inputs=(x,)))

from ecospa_fx.cli import main

assert main(["explain", "hf/gpt2"]) == 1
"""


def outside(tmp_path):
    """Keywords of a process that sees neither the source tree nor this environment."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return {"cwd": tmp_path, "env": environment | {"COLUMNS": "80"}, "capture_output": True, "text": True}


def test_it_works_without_any_extra(installed, built, tmp_path):
    demanded = {"triton"} & required(built[0]).keys()  # torch for CUDA brings it
    command = [str(installed), "-W", "error", "-c", PROGRAM, " ".join(sorted(EXTRAS))]
    done = subprocess.run(command, check=False, **outside(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert set(done.stdout.split("\n")[0].split()) == demanded
    assert "glu" in done.stdout
    missing = "ecospa-fx explain: error: transformers is not installed: pip install 'ecospa-fx[hf,timm,report]'\n"
    assert done.stderr == missing


def test_the_command_is_there(installed, tmp_path):
    done = subprocess.run([installed.parent / "ecospa-fx", "--help"], check=False, **outside(tmp_path))
    assert (done.returncode, done.stderr) == (0, "") and "explain" in done.stdout

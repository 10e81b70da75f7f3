"""ecospa-fx doctor: versions, devices, and known problems with their cures."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import shutil
from dataclasses import asdict, dataclass

import typer
from rich.table import Table
from rich.text import Text

from . import options as o
from .console import FAILED, CommandError, at_work, show, show_json

OLDEST = (2, 11)
EPILOG = """\
\b
Examples:
  ecospa-fx doctor
  ecospa-fx doctor --json

Exit code 1 if there is a problem with a cure.
"""


@dataclass(frozen=True)
class Finding:
    """One item of the diagnosis.

    Attributes:
        what: name of the item.
        found: its version or state.
        ok: no action is needed.
        cure: the action to take otherwise.
    """

    what: str
    found: str
    ok: bool = True
    cure: str = ""


def findings() -> list[Finding]:
    """Examine the environment."""
    results = [
        Finding("ecospa_fx", importlib.metadata.version("ecospa-fx")),
        Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        _torch(),
        *_devices(),
        _optional("triton", "kernels run as plain torch"),
        _optional("transformers", "hf/TYPE needs it: pip install 'ecospa-fx[hf]'"),
        _torchvision(),
        _optional("timm", "timm/NAME needs it: pip install 'ecospa-fx[timm]'"),
        _optional("jinja2", "reports need it: pip install 'ecospa-fx[report]'"),
        _optional("plotly", "curves in reports need it: pip install 'ecospa-fx[report]'"),
    ]
    dot = shutil.which("dot")
    results.append(Finding("graphviz", "dot is installed" if dot else "not installed: no SVG (apt install graphviz)"))
    return results


def _torch() -> Finding:
    import torch

    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    supported = version >= OLDEST
    return Finding("torch", str(torch.__version__), supported, "" if supported else "pip install 'torch>=2.11'")


def _devices() -> list[Finding]:
    import torch

    threads = Finding("cpu", f"{torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        return [threads, Finding("gpu", "none")]
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return [threads, Finding("gpu", ", ".join(names))]


def _optional(name: str, without: str) -> Finding:
    try:
        return Finding(name, importlib.metadata.version(name))
    except importlib.metadata.PackageNotFoundError:
        return Finding(name, f"not installed: {without}")


def _torchvision() -> Finding:
    """Try torchvision: one built for another torch breaks the import of every transformers and timm model."""
    import torch

    try:
        version = importlib.metadata.version("torchvision")
    except importlib.metadata.PackageNotFoundError:
        return Finding("torchvision", "not installed: timm needs it, transformers does not")
    try:
        importlib.import_module("torchvision")
        torch.ops.torchvision.nms  # noqa: B018
    except (RuntimeError, AttributeError, ImportError, OSError) as error:
        line = str(error).splitlines()[0]
        return Finding(
            "torchvision",
            f"{version}, built for another torch: {line}",
            False,
            "install the torchvision that matches this torch (pip install --force-reinstall torch torchvision from one "
            "index); until then this command line works without its compiled ops",
        )
    return Finding("torchvision", version)


def doctor(as_json: o.Json = False) -> None:
    """Check versions, GPU, Triton and torchvision."""
    with at_work("checking"):
        results = findings()
    problems = [each.what for each in results if not each.ok]
    if as_json:
        show_json({"ok": not problems, "findings": [asdict(each) for each in results]})
    else:
        table = Table(box=None, pad_edge=False, show_header=False)
        for each in results:
            mark = Text("ok", style="green") if each.ok else Text("!!", style="bold red")
            table.add_row(mark, each.what, Text(each.found + (f"\n-> {each.cure}" if each.cure else "")))
        show(table)
    if problems:
        raise CommandError(f"{', '.join(problems)}: see the cure above", FAILED)


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command(epilog=EPILOG)(doctor)

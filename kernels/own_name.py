"""Own name: the folder `kernels/` is the package `ecospa_fx.kernels`, under any other name it is empty.

transformers and others ask whether a package `kernels` is installed, that of PyPI, and import whatever has the name.
With the root of this repository on `sys.path` that is this folder. Its files under a second name would define every
operator a second time (see `register.py`), and hide the package that was meant.
"""

import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import module_from_spec
from pathlib import Path
from types import ModuleType


def stand_aside(name: str) -> None:
    """Put into `sys.modules`, while this folder is imported as `name`, what would be there without the folder.

    That is the package of that name further down on the path; else an empty module without a file and without
    submodules, as of a folder that holds no package. An ImportError would end the import of whoever only asks.
    """
    folder = Path(__file__).resolve().parent
    elsewhere = [path for path in sys.path if (Path(path) / folder.name).resolve() != folder]
    spec = PathFinder.find_spec(name, elsewhere) if "." not in name else None
    if spec is not None and spec.loader is not None and spec.has_location:
        module = module_from_spec(spec)
        sys.modules[name] = module
        spec.loader.exec_module(module)
        return
    empty = ModuleType(name, f"Nothing: the folder {folder} is the package ecospa_fx.kernels, import it by that name.")
    empty.__spec__ = ModuleSpec(name, None)
    sys.modules[name] = empty

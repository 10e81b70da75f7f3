"""Without us: the first lines of a program for a process that cannot import this library."""

import inspect

from ecospa_fx.demo import torchvision_cure

WITHOUT_US = f"""
import sys

class Blocked:
    def find_spec(self, name, *_):
        if name.partition(".")[0] == "ecospa_fx":
            raise ImportError("this process must do without it")

sys.meta_path.insert(0, Blocked())
{inspect.getsource(torchvision_cure).replace("from __future__ import annotations", "")}
tolerate_missing_torchvision_ops()
import torch, transformers
"""

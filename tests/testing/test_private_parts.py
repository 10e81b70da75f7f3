"""Private parts of torch: all are found in the source, and the installed torch has them."""

import ast

from ecospa_fx.testing.private_parts import _names_in, main, missing, private_parts


def test_this_torch_has_all_of_them(capsys):
    parts = private_parts()
    assert missing(parts) == [] and main() == 0
    assert parts["torch._C._storage_Use_Count"] == ["ecospa_fx/model/memory.py"]
    assert "torch._C._autograd._top_saved_tensors_default_hooks" in parts
    assert "torch.fx" not in parts
    assert capsys.readouterr().out.splitlines()[0].endswith(f"{len(parts)} private parts, 0 missing")


def test_names_are_found_however_they_are_written():
    source = """
import torch._dynamo.config
from torch._gone import something
found = torch._C._more.part(1) if getattr(torch._C, "_absent", None) else torch.nn.functional
"""
    found = {*_names_in(ast.parse(source))}
    assert {"torch._dynamo.config", "torch._gone.something", "torch._C._more.part", "torch._C._absent"} <= found
    gone = {"torch._gone.something", "torch._C._more.part", "torch._C._more", "torch._C._absent"}
    assert {*missing(dict.fromkeys(found))} == gone

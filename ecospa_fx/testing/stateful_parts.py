"""Parts of stateful modules: what people keep on modules and change in a forward or between two calls."""

from __future__ import annotations

from typing import TypeAlias

from .stateful import Draw, Piece, held, holders, part

Lines: TypeAlias = tuple[str, ...]
CLASSES = "class", "own class"


@part(4.0)
def running_tensor(draw: Draw) -> Piece:
    """A running mean: a buffer, an attribute or elsewhere, changed in place or assigned."""
    start = f"torch.{draw.pick('zeros', 'ones')}({draw.width}, dtype=torch.float64)"
    place = draw.rng.choice(holders(draw.number, start, tensor=True))
    s, mean = place.read, draw.mean
    update: Lines = draw.rng.choice((
        (f"{s} = 0.9 * {s} + 0.1 * {mean}",),
        (f"{s} = torch.lerp({s}, {mean}, 0.1)",),
        (f"{s}.mul_(0.9).add_(0.1 * {mean})",),
        ("with torch.no_grad():", f"    {s}.mul_(0.9).add_(0.1 * {mean})"),
        (f"{s}.copy_(0.9 * {s} + 0.1 * {mean})",),
        (f"{s}.data = 0.9 * {s} + 0.1 * {mean}",),
        (f"{s} *= 0.9", f"{s} += 0.1 * {mean}"),
    ))  # fmt: skip
    if draw.chance(0.4):
        update = ("if self.training:", *(f"    {line}" for line in update))
    v = draw.place
    use = draw.rng.choice(((), (f"{v} = {v} - {s}",), (f"{v} = {v} * torch.rsqrt({s}.abs() + 1)",),
                           ("if not self.training:", f"    {v} = {v} - {s}")))  # fmt: skip
    lines = (*update, *use) if draw.chance(0.5) else (*use, *update)
    return held(draw, "running tensor", place, lines, wide=True)


@part(3.0)
def counter(draw: Draw) -> Piece:
    """A number that the forward counts up."""
    place = draw.rng.choice(holders(draw.number, "0", tensor=False))
    s, v = place.read, draw.place
    update: Lines = draw.rng.choice((
        (f"{s} += 1",), (f"{s} = {s} + 1",), ("if self.training:", f"    {s} += 1"), (f"{s} = {v}.shape[0]",),
        (f"{s} += {v}.shape[0]",), (f"{s} = float({v}.detach().mean())",), (f"{s} += {v}.detach().mean().item()",),
    ))  # fmt: skip
    use = draw.rng.choice((
        (), (), (f"{v} = {v} * (1 + 0.1 * {s})",), (f"if {s} > 2:", f"    {v} = {v} * 2"),
        (f"if {s} % 2 == 0:", f"    {v} = -{v}"),
    ))  # fmt: skip
    lines = (*update, *use) if draw.chance(0.5) else (*use, *update)
    return held(draw, "counter", place, lines)


@part(1.0)
def tensor_counter(draw: Draw) -> Piece:
    """A count in a tensor."""
    place = draw.rng.choice(
        holders(draw.number, draw.pick("torch.tensor(0)", "torch.zeros((), dtype=torch.float64)"), tensor=True)
    )
    s, v = place.read, draw.place
    update = draw.pick(f"{s} += 1", f"{s} = {s} + 1", f"{s}.add_(1)")
    use = draw.rng.choice(((), (f"{v} = {v} / (1 + {s})",), (f"if {s} > 2:", f"    {v} = {v} * 2"),
                           (f"if {s}.item() % 2:", f"    {v} = {v} * 2")))  # fmt: skip
    return held(draw, "tensor counter", place, (update, *use))


@part(2.0)
def log(draw: Draw) -> Piece:
    """A list that grows by one entry in each call."""
    i, v = draw.number, draw.place
    start = draw.pick("[]", "collections.deque(maxlen=3)")
    place = draw.rng.choice(holders(i, start, tensor=False))
    s = place.read
    entry = draw.pick(
        f"{v}.detach().mean()", f"{v}.detach().mean().item()", f"{v}.shape[0]", f"tuple({v}.shape)", draw.mean,
        f"{v}.sum()", "self.training", '"called"',
    )  # fmt: skip
    update = draw.pick(f"{s}.append({entry})", f"{s}.extend([{entry}])", f"{s} += [{entry}]")
    use = draw.rng.choice(((), (), (f"{v} = {v} * (1 + 0.1 * len({s}))",), (f"{s}.append(0)", f"{s}.pop()")))
    return held(draw, "list", place, (update, *use))


@part(2.0)
def left_for_the_loop(draw: Draw) -> Piece:
    """A loss, an output or a size that the forward leaves for the loop."""
    i, v = draw.number, draw.place
    value = draw.pick(
        f"{v}.pow(2).mean()", f"{v}.softmax(-1).mean(0).pow(2).sum()", f"{v}.abs().sum(-1).mean()",
        "(self.down.weight ** 2).mean()", f"{v}.mean(-1).pow(2).sum()",
    )  # fmt: skip
    where = draw.pick(f"self.aux{i}", f"self.aux{i}", f"self.c{i}.aux")
    init = draw.rng.choice(((), (f"self.aux{i} = None",), (f"self.aux{i} = 0.0",)))
    if where == f"self.c{i}.aux":
        init = (f"self.c{i} = nn.Module()",)
    line = f"{where} = {value}"
    lines = ("if self.training:", f"    {line}") if draw.chance(0.2) else (line,)
    return Piece("aux loss", v, lines, init)


@part(1.0)
def last_value(draw: Draw) -> Piece:
    """The last value, kept on the module."""
    i, v = draw.number, draw.place
    line = draw.pick(
        f"self.last{i} = {v}", f"self.last{i} = {v}.detach()", f"self.shape{i} = {v}.shape", f"self.last{i} = {v} * 2",
        f'setattr(self, "last{i}", {v}.detach().clone())', f'self.__dict__["last{i}"] = {v}.shape[0]',
        f"self.kept{i} = self.up if hasattr(self, 'up') else self.down",
    )  # fmt: skip
    return Piece("last value", v, (line,))


@part(1.5)
def momentum_copy(draw: Draw) -> Piece:
    """A copy of parameters that the forward moves after them, as in BYOL."""
    i = draw.number
    update = draw.pick(
        "q.mul_(0.9).add_(0.1 * p)", "q.data = 0.9 * q.data + 0.1 * p.data", "q.copy_(0.9 * q + 0.1 * p)",
        "q.data.lerp_(p.data, 0.1)",
    )  # fmt: skip
    guard = draw.pick("", "if self.training:")
    body: Lines = (
        "with torch.no_grad():",
        f"    for p, q in zip(self.down.parameters(), self.k{i}.parameters()):",
        f"        {update}",
    )
    lines: Lines = (guard, *(f"    {line}" for line in body)) if guard else body
    use = draw.rng.choice(((f"y = y + self.k{i}(h)",), (f"y = y + self.k{i}(h).detach()",), ()))
    init = (f"self.k{i} = copy.deepcopy(self.down).requires_grad_(False)",)
    return Piece("momentum copy", "y", (*lines, *use), init)


@part(1.0)
def parameters_changed(draw: Draw) -> Piece:
    """Parameters that the forward itself changes."""
    line = draw.pick(
        "self.down.weight.data.clamp_(-0.4, 0.4)", "self.down.weight.data = self.down.weight.data.clamp(-0.4, 0.4)",
        "self.down.bias.data.mul_(0.9)",
    )  # fmt: skip
    lines: Lines = (line,)
    if draw.chance(0.3):
        lines = ("with torch.no_grad():", "    self.down.weight.mul_(0.99)")
    return Piece("parameters changed", "h", lines)


@part(2.0)
def cache(draw: Draw) -> Piece:
    """Something made at the first call, or at the first of each size."""
    i, v, n = draw.number, draw.place, draw.width
    if draw.chance(0.2):
        entry = f"self.cache{i}[{v}.shape[0]]"
        return Piece("cache of sizes", v, (
            f"if {v}.shape[0] not in self.cache{i}:",
            f"    {entry} = torch.linspace(0.5, 1, {v}.shape[0], dtype={v}.dtype)",
            f"{v} = ({v}.transpose(0, -1) * {entry}).transpose(0, -1)",
        ), (f"self.cache{i} = {{}}",))  # fmt: skip
    made = draw.pick(
        f"torch.full(({n},), 0.5, dtype={v}.dtype)", f"torch.linspace(0.5, 1, {n}, dtype={v}.dtype)",
        f"torch.rand((), dtype={v}.dtype).expand({n})", f"1 + {draw.mean}",
    )  # fmt: skip
    name = f"self.made{i}"
    ready, buffer = f"self.ready{i}", f'self.register_buffer("ready{i}", torch.tensor(False))'
    kind, read, missing, makes, init = draw.rng.choice((
        ("cache", f'self.cache{i}["a"]', f'"a" not in self.cache{i}', None, (f"self.cache{i} = {{}}",)),
        ("attribute that was None", name, f"{name} is None", None, (f"{name} = None",)),
        ("new attribute", name, f'not hasattr(self, "made{i}")', None, ()),
        ("new buffer", name, f'not hasattr(self, "made{i}")', f'self.register_buffer("made{i}", {made})', ()),
        ("buffer filled once", name, f"not {ready}", f"{name}.copy_({made}); {ready}.fill_(True)",
         (f'self.register_buffer("made{i}", torch.zeros({n}))', buffer)),
    ))  # fmt: skip
    lines = (f"if {missing}:", f"    {makes or f'{read} = {made}'}", f"{v} = {v} * {read}")
    return Piece(kind, v, lines, init, wide=True)


@part(4.0)
def chance(draw: Draw) -> Piece:
    """A number or a branch of Python's, numpy's or torch's generator."""
    i, v = draw.number, draw.place
    number = draw.pick(
        "random.random()", "random.uniform(0, 1)", "np.random.rand()", "np.random.uniform()", "torch.rand(()).item()",
        "random.choice((0.2, 0.7))", "float(torch.rand(1))",
    )  # fmt: skip
    skip = "return x" if v == "x" else f"{v} = {v} * 0.5"
    lines = draw.rng.choice((
        (f"if self.training and {number} < 0.5:", f"    {skip}"),
        (f"if {number} < 0.5:", f"    {skip}"),
        (f"{v} = {v} * (0.5 + {number})",),
        ("if self.training:", f"    {v} = {v} * (0.5 + {number})"),
        (f"self.noise{i} = {number}",),
        (f"p{i} = {number}", f"{v} = {v} if p{i} < 0.5 else {v} * p{i}"),
        ("if not self.training:", f"    {v} = {v} + {number}"),
    ))  # fmt: skip
    return Piece("chance", v, lines)


@part(1.5)
def noise(draw: Draw) -> Piece:
    """Random tensors."""
    v = draw.place
    batch = f"torch.rand({v}.shape[0], *[1] * ({v}.ndim - 1), dtype={v}.dtype)"
    lines: Lines
    lines, sized = draw.rng.choice((
        ((f"{v} = F.dropout({v}, 0.3, self.training)",), True),
        ((f"{v} = {v} + 0.1 * torch.randn_like({v})",), True),
        ((f"{v} = {v} * (0.5 + torch.rand(()))",), False),
        (("if self.training:", f"    {v} = {v} * ({batch} < 0.7) / 0.7"), False),
        ((f"{v} = {v}[torch.randperm({v}.shape[0])]",), False),
        ((f"{v} = {v} * torch.bernoulli(torch.tensor(0.5))",), False),
    ))  # fmt: skip
    return Piece("noise", v, lines, sized=sized)


@part(5.0)
def scheduled(draw: Draw) -> Piece:
    """Something that a schedule changes between two calls: a number, text, function, flag or tensor."""
    v = draw.place
    kind, (start, *others) = draw.rng.choice((
        ("float", ("1.0", "0.5", "0.25", "2.0")), ("float", ("1.0", "0.9", "0.8", "0.7")), ("int", ("1", "2", "3")),
        ("bool", ("True", "False")), ("text", ('"a"', '"b"')), ("function", ("F.gelu", "F.relu", "torch.tanh")),
        ("tensor", ("torch.tensor(1.0)", "torch.tensor(0.5)", "torch.tensor(2.0)")),
        ("numpy", ("np.float64(1.0)", "np.float64(0.5)")), ("array", ("np.array([1.0])", "np.array([0.5])")),
        ("tuple", ("(1.0, 2.0)", "(0.5, 3.0)")), ("none", ("None", "0.5")),
    ))  # fmt: skip
    place = draw.rng.choice(holders(draw.number, start, tensor=kind == "tensor"))
    s = place.read
    use: Lines = {
        "float": (f"{v} = {v} * {s}",),
        "int": (f"{v} = {v} * {s}",),
        "bool": (f"if {s}:", f"    {v} = {v} * 2"),
        "text": (f'{v} = {v} * 2 if {s} == "a" else -{v}',),
        "function": (f"{v} = {s}({v})",),
        "tensor": (f"{v} = {v} * {s}",),
        "numpy": (f"{v} = {v} * {s}",),
        "array": (f"{v} = {v} * float({s}[0])",),
        "tuple": (f"{v} = {v} * {s}[0] / {s}[1]",),
        "none": (f"if {s} is not None:", f"    {v} = {v} * {s}"),
    }[kind]
    if kind == "float" and draw.chance(0.3):
        use = draw.rng.choice(
            ((f"if {s} > 0.6:", f"    {v} = -{v}"), (f"{v} = F.dropout({v}, {s} * 0, self.training)",))
        )
    if place.name in CLASSES:  # a function in a class would be a method
        place = place if kind != "function" else holders(draw.number, start, tensor=False)[0]
        use = tuple(line.replace(s, f"self.S{draw.number}" if kind != "function" else place.read) for line in use)
    changes = [f"{place.outside} = {other}" for other in (start, *others)]
    if kind == "tensor":
        changes += [f"{place.outside}.fill_(0.3)", f"{place.outside}.mul_(1.1)"]
    if kind == "array":
        changes += [f"{place.outside}[0] = 0.7"]
    return held(draw, f"scheduled {kind}", place, use, changes)


@part(1.0)
def by_mode(draw: Draw) -> Piece:
    """Another computation in train than in eval mode."""
    v, n, i = draw.place, draw.width, draw.number
    lines: Lines
    init: Lines
    lines, init = draw.rng.choice((
        (("if self.training:", f"    {v} = {v} * 2"), ()),
        ((f"{v} = torch.relu({v}) if self.training else {v}",), ()),
        (("if self.training:", f"    mean, var = {draw.mean}, {draw.mean.replace('.mean(', '.var(')}",
          "    with torch.no_grad():", f"        self.rm{i}.mul_(0.9).add_(0.1 * mean)",
          f"        self.rv{i}.mul_(0.9).add_(0.1 * var)", "else:", f"    mean, var = self.rm{i}, self.rv{i}",
          f"{v} = ({v} - mean) * torch.rsqrt(var + 1e-2)"),
         (f'self.register_buffer("rm{i}", torch.zeros({n}))', f'self.register_buffer("rv{i}", torch.ones({n}))')),
    ))  # fmt: skip
    return Piece("by mode", v, lines, init)


@part(1.0)
def norm(draw: Draw) -> Piece:
    """A layer of torch.nn with state of its own."""
    v, i, n = draw.place, draw.number, draw.width
    if draw.tokens:
        return Piece("batch norm", v, (f"{v} = self.norm{i}({v}.transpose(1, 2)).transpose(1, 2)",),
                    (f"self.norm{i} = nn.BatchNorm1d({n})",))  # fmt: skip
    made = draw.pick(f"nn.BatchNorm1d({n})", f"nn.BatchNorm1d({n}, momentum=None)")
    return Piece("batch norm", v, (f"{v} = self.norm{i}({v})",), (f"self.norm{i} = {made}",))


@part(0.7)
def scheduled_dropout(draw: Draw) -> Piece:
    """A dropout whose probability a schedule changes."""
    v, i = draw.place, draw.number
    changes = tuple(f"block.drop{i}.p = {p}" for p in (0.0, 0.1, 0.2, 0.3))
    return Piece("scheduled dropout", v, (f"{v} = self.drop{i}({v})",), (f"self.drop{i} = nn.Dropout(0.1)",),
                changes=changes, sized=True)  # fmt: skip


@part(2.0)
def own_generator(draw: Draw) -> Piece:
    """A number or a branch of a generator that the module holds."""
    i, v = draw.number, draw.place
    value, number = draw.rng.choice((
        ("random.Random(0)", ".random()"), ("np.random.default_rng(0)", ".random()"),
        ("torch.Generator().manual_seed(0)", ""), ("iter((0.2, 0.7, 0.4) * 99)", ""),
    ))  # fmt: skip
    place = draw.rng.choice([each for each in holders(i, value, tensor=False) if each.name not in CLASSES])
    s = place.read
    number = f"{s}{number}" if number else f"next({s})" if "iter" in value else f"torch.rand((), generator={s})"
    skip = "return x" if v == "x" else f"{v} = {v} * 0.5"
    lines = draw.rng.choice((
        (f"{v} = {v} * (0.5 + {number})",), (f"if {number} < 0.5:", f"    {skip}"),
        ("if self.training:", f"    {v} = {v} * (0.5 + {number})"), (f"{number}",),
    ))  # fmt: skip
    return held(draw, "own generator", place, lines)


@part(1.0)
def closure(draw: Draw) -> Piece:
    """A function that remembers, or whose arguments do."""
    i, v = draw.number, draw.place
    file = draw.rng.choice((
        ("def make():", "    n = 0", "", "    def count():", "        nonlocal n", "        n += 1", "        return n",
         "", "    return count", "", "", f"COUNT{i} = make()"),
        (f"def COUNT{i}(seen=[0]):", "    seen[0] += 1", "    return seen[0]"),
    ))  # fmt: skip
    lines = draw.rng.choice(((f"COUNT{i}()",), (f"{v} = {v} / COUNT{i}()",)))
    return Piece("closure", v, lines, file=file)


@part(1.0)
def hook(draw: Draw) -> Piece:
    """A hook of a layer that writes something down."""
    i, v = draw.number, draw.place
    line = draw.pick(  # a sum: of a layer that has shrunk a hook sees what is left, whose mean is another
        f"CALLS{i}.append(module.training)", f"CALLS{i}.append(out.shape[0])", f"CALLS{i}.append(out.detach().sum())",
        "module.seen = out.shape[0]", "return out * 2", "module.aux = out.pow(2).sum()",
    )  # fmt: skip
    file = (f"CALLS{i} = []", "", "", f"def hook{i}(module, args, out):", f"    {line}")
    return Piece("hook", v, (), (f"self.down.register_forward_hook(hook{i})",), file=file)

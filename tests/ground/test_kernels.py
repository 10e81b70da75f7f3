"""Kernels against float64: compiled where there is a GPU, in Triton's interpreter where there is none."""

import sys

import pytest
import torch

import ecospa_fx
from ecospa_fx.kernels import adamw_slice_sums, add_slice_sums, compact, slice_sums
from ecospa_fx.kernels import launch as launch_module
from ecospa_fx.kernels.adamw import adamw_slice_sums_ref, adamw_slice_sums_triton
from ecospa_fx.kernels.compact import compact_ref, compact_triton
from ecospa_fx.kernels.launch import Pointers
from ecospa_fx.kernels.slice_sums import Layout, add_slice_sums_ref, add_slice_sums_triton, slice_sums_ref
from ecospa_fx.kernels.windows import walks

pytest.importorskip("triton")  # the extra `test` brings it on Linux
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]

CASES = {
    "matrix": lambda: torch.randn(33, 520),
    "long rows": lambda: torch.randn(2, 5000),
    "long columns": lambda: torch.randn(600, 8),
    "odd width": lambda: torch.randn(19, 37),
    "width of 2 mod 4": lambda: torch.randn(19, 42),
    "row": lambda: torch.randn(1, 40),
    "column": lambda: torch.randn(40, 1),
    "one": lambda: torch.randn(1, 1),
    "vector": lambda: torch.randn(1000),
    "strided vector": lambda: torch.randn(300)[::3],
    "transposed": lambda: torch.randn(40, 72).t(),
    "unaligned": lambda: torch.randn(21, 80)[:, 1:73],
    "offset by 8 bytes": lambda: torch.randn(8 * 24 + 4)[4:].view(8, 24),
    "every other column": lambda: torch.randn(9, 64)[:, ::2],
    "every other row": lambda: torch.randn(64, 24)[::2],
    "experts": lambda: torch.randn(3, 18, 300),
    "experts, inner transposed": lambda: torch.randn(3, 40, 24).transpose(1, 2),
    "experts, outer transposed": lambda: torch.randn(18, 3, 20).transpose(0, 1),
    "convolution": lambda: torch.randn(8, 6, 3, 3),
    "channels last": lambda: torch.randn(8, 6, 3, 3).contiguous(memory_format=torch.channels_last),
    "no order": lambda: torch.randn(4, 5, 6, 7).permute(3, 1, 0, 2)[::2],
    "expanded": lambda: torch.randn(12, 1).expand(12, 9),
    "no rows": lambda: torch.randn(0, 5),
    "no columns": lambda: torch.randn(5, 0),
}


def made(case, dtype=torch.float32):
    torch.manual_seed(0)
    x = CASES[case]()
    if dtype == torch.float32 and DEVICE.type == "cpu":
        return x
    # The same strides and offset in another dtype, on another device.
    storage = x.as_strided((x.untyped_storage().nbytes() // 4,), (1,), 0).to(DEVICE, dtype)
    return storage.as_strided(x.shape, x.stride(), x.storage_offset())


def targets_of(x):
    """All dims of all tensors: which tensor, which dim, where in the result, and how wide it is."""
    pairs = [(t, d) for t, tensor in enumerate(x) for d in range(tensor.ndim)]
    sizes = [x[t].shape[d] for t, d in pairs]
    offsets = [sum(sizes[:k]) for k in range(len(sizes))]
    return [t for t, _ in pairs], [d for _, d in pairs], offsets, sum(sizes)


def twin(x, weights, tensors, dims, width):
    """Float64, one slice sum at a time."""
    planes = []
    for plane in range(2 if weights else 1):
        sums = []
        for t, d in zip(tensors, dims):
            value = x[t].double() * (weights[t].double() if plane else 1)
            sums.append((value * value).movedim(d, 0).flatten(1).sum(1) if x[t].ndim > 1 else value * value)
        planes.append(torch.cat(sums) if sums else torch.zeros(0))
    return torch.stack(planes)


def check(x, weights=(), **options):
    weights = list(weights)
    tensors, dims, offsets, width = targets_of(x)
    out = torch.full((2 if weights else 1, width), float("nan"), device=DEVICE)
    add_slice_sums_triton(out, x, weights, tensors, dims, offsets, 0.0, 1.0, **options)
    again = torch.full_like(out, float("nan"))
    add_slice_sums_triton(again, x, weights, tensors, dims, offsets, 0.0, 1.0, **options)
    assert torch.equal(out, again)  # to the bit
    expected = twin(x, weights, tensors, dims, width)
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=1e-9)
    plain = torch.full_like(out, float("nan"))
    add_slice_sums_ref(plain, x, weights, tensors, dims, offsets, 0.0, 1.0, **options)
    torch.testing.assert_close(plain.double(), expected, rtol=2e-6, atol=1e-9)
    return out


@pytest.mark.parametrize("case", CASES)
def test_slice_sums_of_any_strides(case):
    check([made(case)])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
def test_the_reference_takes_large_tensors_by_blocks(dtype, order, monkeypatch):
    monkeypatch.setattr(sys.modules["ecospa_fx.kernels.slice_sums"], "BLOCK", 1000)
    x = torch.randn(23, 17, 40).to(dtype).permute(order)
    for dim, sums in enumerate(slice_sums_ref(x, (0, 1, 2))):
        expected = x.double().square().sum([d for d in range(3) if d != dim])
        torch.testing.assert_close(sums.double(), expected, rtol=1e-5, atol=0)
        assert sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("case", ["matrix", "odd width", "transposed", "unaligned", "convolution", "experts", "vector"])
def test_slice_sums_with_weights(case):
    x = made(case)
    weight = torch.empty_strided(x.shape, x.stride(), device=DEVICE).copy_(torch.randn(x.shape))
    check([x], [weight])


@pytest.mark.parametrize("dtype", DTYPES)
def test_all_tensors_of_a_dtype_and_alignment_go_in_one_launch(dtype, monkeypatch):
    x = [made(case, dtype) for case in ("matrix", "transposed", "vector")]
    layouts = []
    init = Layout.__init__
    monkeypatch.setattr(Layout, "__init__", lambda self, *args: (init(self, *args), layouts.append(self))[0])
    check(x, [torch.empty_strided(t.shape, t.stride(), dtype=dtype, device=DEVICE).fill_(0.5) for t in x])
    (layout,) = layouts
    by_width = {vector for _, vector, _ in layout.launches}
    assert len(layout.launches) == len(by_width)
    full = 16 // dtype.itemsize
    assert layout.launches[0][1] == full


def test_dtypes_mix_and_half_precision_does_not_overflow():
    x = [made("matrix", dtype) for dtype in DTYPES] + [torch.full((4, 8), 60_000.0, dtype=torch.float16, device=DEVICE)]
    out = check(x)
    assert out.isfinite().all()


def test_weights_of_another_layout_and_tensors_of_another_dtype_take_the_reference():
    x = [made("matrix"), made("odd width"), made("row", torch.float64)]
    weights = [torch.randn(520, 33, device=DEVICE).t(), made("odd width").bfloat16(), made("row", torch.float64)]
    check(x, weights)


def test_a_tensor_at_other_addresses_is_read_there():
    x = [made("matrix")]
    tensors, dims, offsets, width = targets_of(x)
    for shift in (0, 1, 0, 2):
        moved = torch.randn(33 * 520 + 4, device=DEVICE)[shift : shift + 33 * 520].view(33, 520)
        out = torch.zeros(1, width, device=DEVICE)
        add_slice_sums_triton(out, [moved], [], tensors, dims, offsets)
        torch.testing.assert_close(out.double(), twin([moved], [], tensors, dims, width), rtol=2e-6, atol=1e-9)


def test_pointers_are_copied_only_when_they_change():
    pointers = Pointers(2, DEVICE)
    first = pointers.of([1, 2])
    assert first.tolist() == [1, 2]
    first[0] = 7  # would be overwritten by a copy
    assert pointers.of([1, 2]).tolist() == [7, 2]
    assert pointers.of([1, 3]).tolist() == [1, 3]
    assert pointers.of([1, 3]).data_ptr() == first.data_ptr()


@pytest.mark.parametrize("way", [add_slice_sums_triton, add_slice_sums_ref])
@pytest.mark.parametrize(("decay", "gain"), [(1.0, 1.0), (0.9, 0.1), (0.0, 0.5)])
def test_sums_averages_scales_and_skips(way, decay, gain):
    x = [made("odd width"), made("matrix")]
    tensors, dims, offsets, width = targets_of(x)
    before = torch.rand(1, width, device=DEVICE)
    scaled, scale = [tensor * 1024 for tensor in x], torch.tensor(1024.0, device=DEVICE)
    flag = torch.zeros((), device=DEVICE)
    expected = decay * before.double() + gain * twin(x, [], tensors, dims, width)
    for options in ({}, {"found_inf": flag}):
        out = before.clone()
        way(out, x, [], tensors, dims, offsets, decay, gain, **options)
        torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=1e-9)
        out = before.clone()
        way(out, scaled, [], tensors, dims, offsets, decay, gain, scale, **options)
        torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=1e-9)
    scaled[0][3, 3] = float("inf")
    out = before.clone()
    way(out, scaled, [], tensors, dims, offsets, decay, gain, scale, flag + 1)
    assert torch.equal(out, before)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")  # of the interpreter's numpy
@pytest.mark.parametrize("way", [add_slice_sums_triton, add_slice_sums_ref])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_reach_their_slices_and_no_others(way, value):
    x, weight = made("odd width"), torch.ones(19, 37, device=DEVICE)
    x[4, 20], weight[4, 20] = value, 0.0
    out = torch.zeros(2, 19 + 37, device=DEVICE)
    way(out, [x], [weight], [0, 0], [0, 1], [0, 19])
    hit = torch.zeros(19 + 37, dtype=torch.bool, device=DEVICE)
    hit[4] = hit[19 + 20] = True
    assert out[:, ~hit].isfinite().all()
    assert (out[0, hit].isnan() if value != value else out[0, hit] == float("inf")).all()
    assert out[1, hit].isnan().all()  # 0 * inf is NaN


def test_no_targets_and_no_tensors():
    out = torch.ones(1, 3, device=DEVICE)
    add_slice_sums_triton(out, [], [], [], [], [])
    add_slice_sums_triton(out, [made("matrix")], [], [], [], [])
    assert torch.equal(out, torch.ones(1, 3, device=DEVICE))
    assert slice_sums([], []) == []


def test_slice_sums_gives_norms():
    x = [made("matrix"), made("vector"), made("experts")]
    norms = [sums.sqrt() for sums in slice_sums(x, [1, 0, -2 + 3])]
    torch.testing.assert_close(norms[0], torch.linalg.vector_norm(x[0], dim=0))
    torch.testing.assert_close(norms[1], x[1].abs())
    torch.testing.assert_close(norms[2], torch.linalg.vector_norm(x[2], dim=(0, 2)))


@pytest.mark.parametrize("case", CASES)
def test_walks_visit_every_entry_once(case):
    """The cutting alone, on addresses: no kernel, no arithmetic on values."""
    x = made(case)
    for dim in range(x.ndim):
        visited = []
        for walk in walks(x, dim):
            kept = torch.arange(walk.kept.size) * walk.kept.stride
            i = torch.arange(walk.summed.size)
            summed = (i // walk.summed.inner) * walk.summed.outer + (i % walk.summed.inner) * walk.summed.stride
            visited.append(walk.start + kept[:, None] + summed[None, :])
        expected = torch.arange(x.untyped_storage().nbytes() // x.element_size())
        expected = expected.as_strided(x.shape, x.stride(), 0).movedim(dim, 0)[..., None].flatten(1)
        found = torch.cat(visited, 1) if visited else expected.new_empty(x.shape[dim], 0)
        assert torch.equal(found.sort(1).values, expected.sort(1).values)


def jobs():
    """Tensors of many kinds, each with some dims indexed."""
    x = [made(case, dtype) for case, dtype in zip(CASES, DTYPES * 8)]
    x += [torch.randint(0, 2, (9, 40), device=DEVICE).bool(), torch.randn(7, 9, device=DEVICE).double()]
    x += [torch.randn(5, 4, device=DEVICE).cfloat(), torch.randn(6, 24, device=DEVICE).to(torch.complex128)]
    draw = torch.Generator().manual_seed(0)
    indices, tensors, dims = [], [], []
    for number, tensor in enumerate(x):
        for dim in range(tensor.ndim):
            if torch.rand((), generator=draw) < 0.6 and tensor.shape[dim]:
                mask = torch.rand(tensor.shape[dim], generator=draw) < 0.7
                mask[0] = True
                indices.append(mask.nonzero().flatten())
                tensors.append(number)
                dims.append(dim)
    return x, indices, tensors, dims


def test_compaction_equals_indexing():
    x, indices, tensors, dims = jobs()
    found = compact_triton(x, indices, tensors, dims)
    for number, (got, plain) in enumerate(zip(found, compact_ref(x, indices, tensors, dims))):
        expected = x[number]
        for index, tensor, dim in zip(indices, tensors, dims):
            if tensor == number:
                expected = expected.index_select(dim, index.to(DEVICE))
        assert got.is_contiguous()
        assert not got.numel() or got.untyped_storage().data_ptr() != x[number].untyped_storage().data_ptr()
        assert torch.equal(got, expected), number
        assert torch.equal(plain, expected), number


def test_a_shrink_by_the_kernel_equals_one_by_the_reference(monkeypatch):
    def shrunk():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 24), torch.nn.ReLU(), torch.nn.Linear(24, 4)).to(DEVICE)
        x = torch.randn(3, 8, device=DEVICE)
        ecospa_fx.compile(model, example_inputs=(x,))
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        model(x).square().sum().backward()
        optimizer.step()
        (coupling,) = ecospa_fx.couplings(model)
        ecospa_fx.shrink(model, {coupling: torch.arange(1, 24, 3)}, optimizer=optimizer)
        state = [value for p in model.parameters() for value in optimizer.state[p].values()]
        return [*model.parameters(), *(p.grad for p in model.parameters()), *state]

    calls = []
    compact_module = sys.modules["ecospa_fx.kernels.compact"]
    monkeypatch.setattr(compact_module, "compiled_for", lambda device: False)
    plain = shrunk()
    monkeypatch.setattr(compact_module, "compiled_for", lambda device: True)
    monkeypatch.setattr(compact_module, "compact_triton", lambda *a: (calls.append(len(a[0])), compact_triton(*a))[1])
    for ours, theirs in zip(shrunk(), plain, strict=True):
        assert torch.equal(ours, theirs)
    assert calls == [3 * 4]  # once: three tensors with gradients and two moments each


ADAMW_CASES = ("matrix", "transposed", "odd width", "experts, inner transposed", "vector", "no rows")


def adamw_setting(dtype=torch.float32):
    """Parameters, gradients and moments of some steps in, alike in layout."""
    parameters = [made(case, dtype) for case in ADAMW_CASES] + [torch.randn((), device=DEVICE, dtype=dtype)]
    parts = [[torch.empty_strided(p.shape, p.stride(), dtype=dtype, device=DEVICE) for p in parameters] for _ in "gmv"]
    for part in parts:
        for tensor in part:
            tensor.copy_(torch.randn(tensor.shape))
    for tensor in parts[2]:
        tensor.abs_()
    targets = ([0, 0, 1, 2, 3, 4], [0, 1, 1, 0, 1, 0], [0, 33, 553, 593, 612, 636])  # the last two have none
    return parameters, *parts, targets, torch.rand(1, 1636, device=DEVICE)


@pytest.mark.parametrize("way", [adamw_slice_sums_triton, adamw_slice_sums_ref])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7)])
def test_adamw_equals_torch_in_float64_and_leaves_the_sums(way, dtype, tolerance):
    parameters, gradients, first, second, targets, out = adamw_setting(dtype)
    options = {"lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    twins = [torch.nn.Parameter(p.double()) for p in parameters]
    optimizer = torch.optim.AdamW(twins, **options)
    for parameter, g, m, v in zip(twins, gradients, first, second):
        parameter.grad = g.double()
        optimizer.state[parameter] = {"step": torch.tensor(4.0), "exp_avg": m.double(), "exp_avg_sq": v.double()}
    optimizer.step()
    expected = out.double() * 0.5 + 0.25 * torch.cat(
        [sums for t, d in zip(*targets[:2]) for sums in twin([gradients[t]], [], [0], [d], 0)]
    )
    way(out, parameters, gradients, first, second, *targets, 5, 0.01, 0.9, 0.95, 1e-6, 0.1, 0.5, 0.25)
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=1e-9)
    for parameter, p, m, v in zip(twins, parameters, first, second):
        state = optimizer.state[parameter]
        torch.testing.assert_close(p.double(), parameter.detach(), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(m.double(), state["exp_avg"], rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(v.double(), state["exp_avg_sq"], rtol=tolerance, atol=tolerance)


def test_adamw_refuses_tensors_that_do_not_lie_alike():
    x = made("matrix")
    odd = torch.randn(520, 33, device=DEVICE).t()
    with pytest.raises(ValueError, match="all four need the same strides") as caught:
        adamw_slice_sums_triton(torch.zeros(1, 33, device=DEVICE), [x], [odd], [x], [x], [0], [0], [0], 1, 0.1)
    assert str(caught.value) == (
        "parameter 0 is torch.float32 of strides (520, 1), its gradient torch.float32 of (1, 33), its moments "
        "torch.float32 of (520, 1) and torch.float32 of (520, 1): all four need the same strides, each pair the same "
        "dtype of 32 or 16 bits; use torch.optim.AdamW(fused=True) and add_slice_sums"
    )


OP_ARGS = {
    "sums": lambda: (
        torch.zeros(1, 33 + 520, device=DEVICE),
        [made("matrix")],
        [],
        [0, 0],
        [0, 1],
        [0, 33],
        1.0,
        1.0,
        None,
        None,
    ),
    "average of two, scaled": lambda: (
        torch.zeros(2, 37, device=DEVICE),
        [made("odd width")],
        [made("odd width")],
        [0],
        [1],
        [0],
        0.9,
        0.1,
        torch.ones((), device=DEVICE),
        torch.zeros((), device=DEVICE),
    ),
}


@pytest.mark.parametrize("case", OP_ARGS)
def test_opcheck_of_slice_sums(case):
    torch.library.opcheck(add_slice_sums, OP_ARGS[case]())


def test_opcheck_of_compaction():
    torch.library.opcheck(compact, ([made("matrix")], [torch.arange(0, 33, 2, device=DEVICE)], [0], [0]))


def test_opcheck_of_adamw():
    parameters, gradients, first, second, targets, out = adamw_setting()
    torch.library.opcheck(adamw_slice_sums, (out, parameters, gradients, first, second, *targets, 5, 0.01))


def test_in_a_compiled_step_without_graph_breaks():
    x = made("matrix")

    def step(out, x):
        gradient = x * 2
        add_slice_sums(out, [gradient], [], [0], [1], [0])
        (small,) = compact([gradient], [torch.arange(0, 33, 3, device=DEVICE)], [0], [0])
        return small.sum()

    out, expected = torch.zeros(1, 520, device=DEVICE), torch.zeros(1, 520, device=DEVICE)
    total = torch.compile(step, fullgraph=True, backend="aot_eager")(out, x)
    torch.testing.assert_close(total, step(expected, x))
    assert torch.equal(out, expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a GPU")
def test_in_a_cuda_graph():
    x = [torch.randn(64, 256, device=DEVICE), torch.randn(48, 64, device=DEVICE)]
    tensors, dims, offsets, width = targets_of(x)
    out = torch.zeros(1, width, device=DEVICE)
    add_slice_sums(out, x, [], tensors, dims, offsets)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        produced = [tensor * 2 for tensor in x]
        add_slice_sums(out, produced, [], tensors, dims, offsets)
    other = [tensor * 3 for tensor in x]
    add_slice_sums(out, other, [], tensors, dims, offsets)  # eager steps in between must not disturb the graph
    out.zero_()
    for step in range(3):
        for tensor in x:
            tensor.fill_(step + 1.0)
        graph.replay()
    expected = sum(twin([torch.full_like(t, 2.0 * (s + 1)) for t in x], [], tensors, dims, width) for s in range(3))
    torch.testing.assert_close(out.double(), expected, rtol=2e-6, atol=0)


def test_interpreting_is_what_the_environment_says():
    assert launch_module.interpreting() == (not torch.cuda.is_available())
    assert launch_module.compiled_for(DEVICE) == torch.cuda.is_available()

"""DistributedDataParallel through shrinks: every setting equals one process on the whole batch, to rounding."""

import pytest
from crew import Crew
from rank_models import Run, compared
from torch.nn.parallel import DistributedDataParallel as DDP


@pytest.fixture(scope="module")
def two():
    with Crew(2) as crew:
        yield crew


def like_one_process(rank, world, kind, execution, settings, lazily=False, **trainer):
    alone = Run(kind, execution, lazily=lazily, **trainer).train()
    run = Run(kind, execution, lambda m: DDP(m, **settings), (rank, world), lazily, **trainer)
    wrapper, held = run.called, [run.called.reducer]
    run.train()
    assert run.called is wrapper and run.called.reducer is not held[0]
    return compared(run, alone)


SETTINGS = {
    "default": {},
    "find_unused": {"find_unused_parameters": True},
    "static_graph": {"static_graph": True},
    "bucket_view": {"gradient_as_bucket_view": True},
    "small_buckets": {"bucket_cap_mb": 0.001},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_every_setting_of_the_wrapper(two, settings):
    for apart, ranks in two.run(like_one_process, "gated", "graph", SETTINGS[settings]):
        assert apart < 1e-12 and ranks == 0.0

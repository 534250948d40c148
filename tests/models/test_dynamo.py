"""What `models.dynamo` takes from torch.compile does what its functions say."""

import pytest
import torch

from qwenvl_lit.models.dynamo import (
    CompileError,
    allow_recompilations,
    compiled_graphs,
    mark_dynamic,
    recompilation_limits,
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    config = torch._dynamo.config
    limits = config.recompile_limit, config.accumulated_recompile_limit
    torch.compiler.reset()
    yield
    config.recompile_limit, config.accumulated_recompile_limit = limits
    torch.compiler.reset()


def doubled(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def test_a_graph_is_counted_once_per_shape_and_a_dynamic_size_has_one_for_all():
    before = compiled_graphs()
    function = torch.compile(doubled, backend="eager", dynamic=False)
    for rows in (2, 3, 3):
        function(torch.ones(rows))
    assert compiled_graphs() == before + 2

    torch.compiler.reset()
    before = compiled_graphs()
    function = torch.compile(doubled, backend="eager")
    for rows in (2, 3, 4):
        x = torch.ones(rows)
        mark_dynamic(x, 0)
        function(x)
    assert compiled_graphs() == before + 1


def test_shapes_beyond_the_limit_run_uncompiled():
    before = compiled_graphs()
    function = torch.compile(doubled, backend="eager", dynamic=False)
    with recompilation_limits(per_function=2, in_total=1024):
        for rows in range(2, 7):
            assert torch.equal(function(torch.ones(rows)), torch.full((rows,), 2.0))
    assert compiled_graphs() == before + 2


def test_limits_are_set_again_and_again_without_taking_memory():
    config = torch._dynamo.config
    before = config.recompile_limit, config.accumulated_recompile_limit
    limits = recompilation_limits(per_function=3, in_total=7)
    for _ in range(3):
        again = recompilation_limits(per_function=3, in_total=7)
        assert again is limits  # torch never frees one
        with again:
            assert (config.recompile_limit, config.accumulated_recompile_limit) == (3, 7)
        assert (config.recompile_limit, config.accumulated_recompile_limit) == before


def test_a_limit_is_raised_and_never_lowered():
    config = torch._dynamo.config
    usual = config.recompile_limit
    allow_recompilations(usual - 1)
    assert config.recompile_limit == usual
    allow_recompilations(usual + 1)
    assert config.recompile_limit == usual + 1


def test_limits_hold_inside_their_context_only():
    config = torch._dynamo.config
    usual = config.recompile_limit, config.accumulated_recompile_limit
    with recompilation_limits(per_function=3, in_total=5):
        assert (config.recompile_limit, config.accumulated_recompile_limit) == (3, 5)
    assert (config.recompile_limit, config.accumulated_recompile_limit) == usual


def test_what_cannot_be_compiled_raises_a_compile_error():
    def broken(x):
        torch._dynamo.graph_break()
        return x

    with pytest.raises(CompileError):
        torch.compile(broken, backend="eager", fullgraph=True)(torch.ones(2))

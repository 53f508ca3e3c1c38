"""diffusers' caches by whole blocks, FirstBlockCache and MagCache, on transformers whose blocks are chunked."""

import pytest
import torch

pytest.importorskip("diffusers")
from transformer_families import FAMILIES, cache, close, make, run

from dcdit.errors import ConfigError
from dcdit.integrations.attention import add_dynamic_chunking, remove_dynamic_chunking

CACHES = {
    "FirstBlockCacheConfig": {"threshold": 1e6},
    "MagCacheConfig": {"mag_ratios": torch.ones(3), "num_inference_steps": 3, "threshold": 9.0, "max_skip_steps": 2},
    "TaylorSeerCacheConfig": {"cache_interval": 2, "disable_cache_before_step": 1, "max_order": 1},
}


@pytest.mark.parametrize("kind", ["FirstBlockCacheConfig", "MagCacheConfig"])
@pytest.mark.parametrize("name", ["flux", "qwen-image", "wan", "ltx"])
def test_caches_by_whole_blocks(name, kind):
    """Steps of equal inputs: the second and third run no chunked block and give what the first gave; another pass of
    guidance has its own. The blocks' change is kept, not their output: without the cache the model is as it was."""
    family = FAMILIES[name]
    model, runs = make(family), []
    inputs = family.inputs()
    chunking = add_dynamic_chunking(model, blocks=slice(1, -1))
    chunking.drop_fraction = 0.5
    want = run(model, inputs)
    chunking.router.register_forward_hook(lambda *_: runs.append(1))
    model.enable_cache(cache(kind, **CACHES[kind]))
    for passing in ("cond", "uncond"):
        with model.cache_context(passing):
            for _ in range(3):
                close(run(model, inputs), want, 1e-5)
    assert len(runs) == 2
    with pytest.raises(ConfigError, match=r"cache must go before remove_dynamic_chunking: disable_cache\(\) first"):
        remove_dynamic_chunking(model)
    model.disable_cache()
    assert torch.equal(run(model, inputs), want) and len(runs) == 3
    remove_dynamic_chunking(model)


def test_a_cache_adds_the_change_of_an_earlier_step():
    """The input of the tail is another step's: head of this one, and what the other blocks changed in the first."""
    family = FAMILIES["flux"]
    model, seen = make(family), []
    first, second = family.inputs(), family.inputs()
    add_dynamic_chunking(model, blocks=slice(1, -1)).drop_fraction = 0.5
    model.transformer_blocks[0].register_forward_hook(lambda *a: seen.append(a[2][1]))
    model.norm_out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.enable_cache(cache("FirstBlockCacheConfig", threshold=1e6))
    with model.cache_context("cond"):
        run(model, first), run(model, second)
    head, end, other_head, other_end = seen
    head, other_head = head + 0, other_head - (end - head)  # the hook sees the head with the change added
    close(other_end, other_head + (end - head), 1e-5)


@pytest.mark.parametrize("kind", CACHES)
def test_caches_that_do_not_fit(kind):
    """TaylorSeer would find no block and say nothing. A cache from before the wrapping has hooks on blocks."""
    model, config = make(FAMILIES["flux"]), cache(kind, **CACHES[kind])
    model.enable_cache(config)
    with pytest.raises(
        ConfigError, match=r"enable_cache must come after add_dynamic_chunking: disable_cache\(\) first"
    ):
        add_dynamic_chunking(model)
    model.disable_cache()
    add_dynamic_chunking(model)
    if kind == "MagCacheConfig":
        model.enable_cache(config)  # it skips the first block as well
        return
    wanted = "first block in every step.*got slice" if kind == "FirstBlockCacheConfig" else f"got {kind}"
    with pytest.raises(ConfigError, match=wanted):
        model.enable_cache(config)

"""Prompts above the length of training: dynamic NTK by prompt, as in our own engine."""

import random

import pytest
import torch
from transformers import GenerationConfig

pytestmark = pytest.mark.vllm

LENGTHS = (300, 480, 500, 600, 900, 1100)  # the model was trained on up to 512
NEW_TOKENS = 96


@pytest.fixture(scope="module")
def prompts(demo) -> list[list[int]]:
    tokenizer = demo.load().processor.tokenizer
    choose = random.Random(0)
    start = [tokenizer.im_start_id, *tokenizer.encode("user\n")]
    end = [tokenizer.im_end_id, *tokenizer.encode("\n")]
    end += [tokenizer.im_start_id, *tokenizer.encode("assistant\n")]
    prompts = []
    for length in LENGTHS:
        words = [choose.randrange(60, 400) for _ in range(length - len(start + end))]
        prompts.append([*start, *words, *end])
    return prompts


@pytest.fixture(scope="module")
def expected(demo, prompts) -> list[list[int]]:
    model = demo.load().model
    options = GenerationConfig(
        max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=None
    )
    found = []
    for prompt in prompts:
        ids = model.generate(torch.tensor([prompt]), generation_config=options)
        found.append(ids[0, len(prompt) :].tolist())
    return found


def test_long_prompts_have_the_same_tokens_in_chunks_and_after_preemption(demo, prompts, expected):
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(demo.folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=2048,
        max_num_seqs=len(prompts),
        max_num_batched_tokens=256,  # prompts are read in chunks
        block_size=32,
        num_gpu_blocks_override=66,  # enough for the first four prompts, but not with their answers
        disable_log_stats=False,
    )
    assert not engine.llm_engine.vllm_config.cache_config.enable_prefix_caching
    parameters = SamplingParams(max_tokens=NEW_TOKENS, ignore_eos=True, temperature=0)
    inputs = [{"prompt_token_ids": prompt} for prompt in prompts]
    outputs = engine.generate(inputs, parameters, use_tqdm=False)
    assert [list(output.outputs[0].token_ids) for output in outputs] == expected
    counters = {metric.name: metric for metric in engine.get_metrics()}
    assert counters["vllm:num_preemptions"].value > 0

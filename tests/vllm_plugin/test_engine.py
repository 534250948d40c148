"""Prompts and answers of vLLM with the plugin are those of our own engine."""

import gc

import pytest
from vllm_plugin.questions import messages_of

pytestmark = pytest.mark.vllm

ADAPTED_ROWS = 200


@pytest.fixture(scope="module")
def engine(demo, adapters):
    from vllm import LLM

    # One more slot than adapters, see `launch`.
    options = {"enable_lora": True, "max_loras": len(adapters) + 1, "max_lora_rank": 8}
    engine = LLM(str(demo.folder), dtype="float32", max_num_seqs=32, enforce_eager=True, **options)
    yield engine
    del engine
    gc.collect()


def ask(engine, rows, **options):
    return engine.chat([messages_of(row) for row in rows], use_tqdm=False, **options)


def test_prompts_and_answers_equal_those_of_our_engine(engine, demo, answers):
    outputs = ask(engine, demo.rows)
    processor = demo.load().processor
    for row, output, answer in zip(demo.rows, outputs, answers, strict=True):
        prompt = processor.encode(row, prompt=True).input_ids.tolist()
        assert list(output.prompt_token_ids) == prompt, row.id
        assert output.outputs[0].text.strip() == answer, row.id
    assert any("<box>" in output.outputs[0].text for output in outputs)


def test_adapters_answer_as_here_among_requests_without_one(engine, demo, adapters, answers):
    from vllm.lora.request import LoRARequest

    rows = demo.rows[:ADAPTED_ROWS]
    expected = {None: answers[:ADAPTED_ROWS]}
    requests = {None: None}
    for number, (name, folder) in enumerate(adapters.items(), 1):
        model = demo.load(folder, base_model=demo.folder)
        found = [str(answer) for answer in model.generate(rows, batch_size=32, max_new_tokens=64)]
        assert sum(map(str.__ne__, found, answers)) > 20, f"{name} changes too little"
        expected[name] = found
        requests[name] = LoRARequest(name, number, str(folder))
    mixed = [(row, request) for row in rows for request in requests.values()]
    outputs = ask(engine, [row for row, _ in mixed], lora_request=[lora for _, lora in mixed])
    texts = [output.outputs[0].text.strip() for output in outputs]
    for index, name in enumerate(requests):
        assert texts[index :: len(requests)] == expected[name], name


def test_turns_system_messages_and_several_images_give_the_same_prompt(engine, demo):
    model, rows = demo.load(), demo.rows
    [first], [second] = messages_of(rows[0]), messages_of(rows[4])
    system = {"role": "system", "content": "Be brief."}
    answer = {"role": "assistant", "content": "<ref>a star</ref><box>(1,2),(3,4)</box>"}
    [output] = engine.chat([system, first, answer, second], use_tqdm=False)
    turns = [(rows[0].prompt().turns[-1].parts, answer["content"])]
    history = [[list(parts), text] for parts, text in turns]
    conversation = model._conversation(list(rows[4].prompt().turns[-1].parts), history, "Be brief.")
    expected = model.processor.encode(conversation, prompt=True).input_ids.tolist()
    assert list(output.prompt_token_ids) == expected
    assert output.outputs[0].text.strip() == str(model.generate([conversation])[0])


def test_requests_are_greedy_and_as_short_as_in_the_run_by_default(engine):
    parameters = engine.get_default_sampling_params()
    assert (parameters.temperature, parameters.max_tokens) == (0, 64)


def test_prompts_may_be_as_long_as_in_training_by_default(engine):
    assert engine.llm_engine.model_config.max_model_len == 512


def test_text_in_any_script_is_decoded_character_by_character(engine):
    from vllm.tokenizers.detokenizer_utils import detokenize_incrementally

    tokenizer = engine.get_tokenizer()
    text = "图中有一只猫 🐱 <ref>猫</ref><box>(1,2),(3,4)</box> naïve"
    ids = tokenizer.encode(text)
    pieces, state = [], (None, 0, 0)
    for count in range(1, len(ids) + 1):
        tokens, piece, *offsets = detokenize_incrementally(
            tokenizer, ids[:count], *state, skip_special_tokens=True
        )
        state = ([*(state[0] or []), *tokens], *offsets)
        pieces.append(piece)
    assert "".join(pieces) == tokenizer.decode(ids) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_an_adapter_of_the_vision_tower_is_refused_not_ignored(engine, demo, tmp_path):
    from peft import LoraConfig, get_peft_model
    from vllm.lora.request import LoRARequest

    config = LoraConfig(r=8, target_modules=["c_proj"])  # also of the vision tower's MLPs
    get_peft_model(demo.load().model, config).save_pretrained(tmp_path)
    with pytest.raises(Exception, match="vision_layer"):
        engine.llm_engine.add_lora(LoRARequest("vision", 9, str(tmp_path)))

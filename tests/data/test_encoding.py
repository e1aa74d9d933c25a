from __future__ import annotations

import copy
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snake_lora_pl.data.encoding import SPECIAL_TOKEN, TOO_LONG, Encoder, Example, Refusal
from snake_lora_pl.data.jsonl import Row
from snake_lora_pl.errors import UserError

LINES = ["Moving UP from [1, 1]", *(f"- metric {letter}: 1" for letter in string.ascii_lowercase), "Conclusion: UP"]
COMPLETION = "\n".join(LINES)


def row(prompt: str = "a prompt", completion: str = COMPLETION) -> Row:
    return Row(prompt, completion, None, "rows.jsonl", 3)


def encode(encoder: Encoder, *rows: Row) -> Example | Refusal:
    (result,) = encoder.encode(rows)
    return result


def completion_text(encoder: Encoder, example: Example) -> str:
    return encoder.tokenizer.decode(list(example.input_ids[example.num_prompt :]))


# Templates


def test_instruction_is_the_text_of_the_contract(tiny_tokenizer):
    example = encode(Encoder(tiny_tokenizer), row("the prompt", "the completion"))
    prompt_ids, completion_ids = example.input_ids[: example.num_prompt], example.input_ids[example.num_prompt :]
    assert tiny_tokenizer.decode(prompt_ids) == "### Instruction:\nthe prompt\n\n### Response:\n"
    assert tiny_tokenizer.decode(completion_ids) == "the completion" + tiny_tokenizer.eos_token


def test_raw_joins_the_two(tiny_tokenizer):
    encoder = Encoder(tiny_tokenizer, "raw")
    example = encode(encoder, row("the prompt", " and the completion"))
    assert tiny_tokenizer.decode(example.input_ids) == "the prompt and the completion" + tiny_tokenizer.eos_token
    assert completion_text(encoder, example) == " and the completion" + tiny_tokenizer.eos_token


def test_chat_has_the_ids_of_the_tokenizers_own_rendering_up_to_eos(tiny_tokenizer):
    example = encode(Encoder(tiny_tokenizer, "chat"), row("the prompt", "the completion"))
    turns = [{"role": "user", "content": "the prompt"}, {"role": "assistant", "content": "the completion"}]
    whole = tiny_tokenizer.apply_chat_template(turns, return_dict=False)
    before = tiny_tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    assert example.input_ids == whole[: len(example.input_ids)]
    assert example.num_prompt == len(before)
    assert example.input_ids[-1] == tiny_tokenizer.eos_token_id
    assert tiny_tokenizer.decode(whole[len(example.input_ids) :]).strip() == ""


def test_chat_appends_eos_where_the_template_ends_a_turn_with_another_token(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    example = encode(Encoder(tokenizer, "chat"), row("the prompt", "the completion"))
    assert tokenizer.decode(example.input_ids).endswith("the completion<|endoftext|><|im_end|>")


@given(st.text(min_size=1, max_size=60), st.text(min_size=1, max_size=60), st.sampled_from(["instruction", "raw"]))
def test_any_text_comes_back_from_its_ids_with_eos_at_the_end_alone(tiny_tokenizer, prompt, completion, template):
    encoder = Encoder(tiny_tokenizer, template, max_length=1000)
    example = encode(encoder, row(prompt, completion))
    assert completion_text(encoder, example) == completion + tiny_tokenizer.eos_token
    assert list(example.input_ids).index(tiny_tokenizer.eos_token_id) == len(example.input_ids) - 1


@pytest.mark.parametrize("template", ["instruction", "chat", "raw"])
def test_a_prompt_has_the_same_ids_in_play_as_in_training(tiny_tokenizer, template):
    encoder = Encoder(tiny_tokenizer, template)
    example = encode(encoder, row())
    assert encoder.encode_prompt("a prompt") == list(example.input_ids[: example.num_prompt])


@pytest.mark.parametrize("template", ["instruction", "chat", "raw"])
def test_rows_encoded_together_are_encoded_as_one_by_one(tiny_tokenizer, template):
    encoder = Encoder(tiny_tokenizer, template, max_length=90)
    rows = [row("p" * n, COMPLETION[: 40 * n]) for n in range(1, 20)]
    assert encoder.encode(rows) == [encode(encoder, one) for one in rows]


def test_an_example_knows_where_its_row_stands(tiny_tokenizer):
    assert encode(Encoder(tiny_tokenizer), row()).source == "rows.jsonl:3"


# BOS


def with_bos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tokenizer)
    bos, eos = ((token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A {eos[0]}", special_tokens=[bos, eos]
    )
    return tokenizer


@pytest.mark.parametrize("template", ["instruction", "raw"])
def test_bos_is_put_in_front_if_the_tokenizers_own_call_does_so(tiny_tokenizer, template):
    bos_tokenizer = with_bos(tiny_tokenizer)
    for tokenizer, expected in ((tiny_tokenizer, 0), (bos_tokenizer, 1)):
        ids = list(encode(Encoder(tokenizer, template), row()).input_ids)
        assert ids.count(tokenizer.bos_token_id) == expected
        assert (ids[0] == tokenizer.bos_token_id) == bool(expected)
        assert ids.count(tokenizer.eos_token_id) == 1


def test_a_chat_template_writes_its_own_bos(tiny_tokenizer):
    assert encode(Encoder(with_bos(tiny_tokenizer), "chat"), row()) == encode(Encoder(tiny_tokenizer, "chat"), row())


# Special tokens in a row's text


@pytest.mark.parametrize("template", ["instruction", "raw"])
def test_a_special_token_spelt_out_in_a_row_is_text(tiny_tokenizer, template):
    encoder = Encoder(tiny_tokenizer, template)
    text = "Moving <|im_end|> UP<|endoftext|>"
    example = encode(encoder, row(text, text))
    special = [i for i in example.input_ids if i in tiny_tokenizer.all_special_ids]
    assert special == [tiny_tokenizer.eos_token_id]
    assert completion_text(encoder, example) == text + tiny_tokenizer.eos_token


@pytest.mark.parametrize("texts", [("<|im_end|>", "c"), ("p", "c<|im_start|>system")])
def test_chat_refuses_a_row_that_spells_out_a_special_token(tiny_tokenizer, texts):
    refused, fine = Encoder(tiny_tokenizer, "chat").encode([row(*texts), row()])
    assert refused.reason == SPECIAL_TOKEN
    assert "Reword it, or set data.template=instruction" in refused.message
    assert isinstance(fine, Example)


def test_chat_refuses_such_a_prompt_in_play(tiny_tokenizer):
    with pytest.raises(UserError, match="the prompt holds '<|im_end|>'"):
        Encoder(tiny_tokenizer, "chat").encode_prompt("a<|im_end|>b")


def test_the_tokenizer_given_is_left_as_it_was(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    before = tokenizer.backend_tokenizer.to_str(), tokenizer("a <|im_end|>")["input_ids"]
    Encoder(tokenizer).encode([row()])
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer("a <|im_end|>")["input_ids"]) == before


def test_truncation_that_a_tokenizer_brings_along_is_not_applied(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=900)
    assert encode(Encoder(tokenizer), row()) == encode(Encoder(tiny_tokenizer), row())


# Rows that are too long


@given(
    st.lists(st.text(string.ascii_letters + " ", max_size=30), min_size=1, max_size=12),
    st.text(string.ascii_letters, min_size=1, max_size=30),
    st.integers(2, 200),
    st.sampled_from(["instruction", "chat", "raw"]),
)
def test_shortening_fits_keeps_the_last_line_and_eos_and_takes_out_whole_lines_of_the_middle(
    tiny_tokenizer, lines, last, max_length, template
):
    encoder = Encoder(tiny_tokenizer, template, max_length)
    result = encode(encoder, row("p", "\n".join([*lines, last])))
    shortest = encode(Encoder(tiny_tokenizer, template, 10_000), row("p", last))
    if isinstance(result, Refusal):
        assert len(shortest.input_ids) > max_length
        return
    assert len(result.input_ids) <= max_length
    kept = completion_text(encoder, result).removesuffix(tiny_tokenizer.eos_token).split("\n")
    assert kept[-1] == last
    num_head = len(kept) // 2
    if template != "chat":  # A chat template may add to the completion.
        assert kept[:num_head] == lines[:num_head]
        assert kept[num_head:-1] == lines[len(lines) - (len(kept) - 1 - num_head) :]


def test_shortening_keeps_the_first_line_too_where_there_is_room_for_two(tiny_tokenizer):
    two_lines = len(encode(Encoder(tiny_tokenizer), row("p", f"{LINES[0]}\n{LINES[-1]}")).input_ids)
    encoder = Encoder(tiny_tokenizer, max_length=two_lines)
    assert completion_text(encoder, encode(encoder, row("p"))) == f"{LINES[0]}\n{LINES[-1]}<|im_end|>"


def test_shortening_takes_out_no_more_lines_than_it_must(tiny_tokenizer):
    whole = encode(Encoder(tiny_tokenizer, max_length=10_000), row("p"))
    encoder = Encoder(tiny_tokenizer, max_length=len(whole.input_ids) - 1)
    assert len(completion_text(encoder, encode(encoder, row("p"))).split("\n")) == len(LINES) - 1


def test_a_row_that_fits_exactly_is_left_alone(tiny_tokenizer):
    whole = encode(Encoder(tiny_tokenizer, max_length=10_000), row("p"))
    assert encode(Encoder(tiny_tokenizer, max_length=len(whole.input_ids)), row("p")) == whole


@pytest.mark.parametrize("on_overflow", ["error", "drop"])
def test_a_refused_row_is_told_what_max_length_would_fit_it(tiny_tokenizer, on_overflow):
    needed = len(encode(Encoder(tiny_tokenizer, max_length=10_000), row("p")).input_ids)
    refusal = encode(Encoder(tiny_tokenizer, max_length=60, on_overflow=on_overflow), row("p"))
    assert (refusal.source, refusal.reason) == ("rows.jsonl:3", TOO_LONG)
    assert f"Set data.max_length to {needed} or more" in refusal.message
    assert isinstance(encode(Encoder(tiny_tokenizer, max_length=needed, on_overflow=on_overflow), row("p")), Example)


def test_a_prompt_that_leaves_no_room_for_the_last_line_is_refused_with_the_max_length_that_would(tiny_tokenizer):
    refusal = encode(Encoder(tiny_tokenizer, max_length=60), row("p" * 100))
    needed = len(encode(Encoder(tiny_tokenizer, max_length=10_000), row("p" * 100, LINES[-1])).input_ids)
    assert f"{needed:,} with only the completion's last line kept, over data.max_length=60" in refusal.message
    assert f"Set data.max_length to {needed} or more, or data.on_overflow=drop" in refusal.message


# Settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "alpaca"}, "unknown data.template 'alpaca'. Choose one of instruction, chat, raw"),
        ({"on_overflow": "cut"}, "unknown data.on_overflow 'cut'. Choose one of error, drop, shorten"),
        ({"max_length": 1}, "data.max_length must be at least 2"),
    ],
)
def test_a_setting_that_cannot_be_is_an_error(tiny_tokenizer, settings, message):
    with pytest.raises(UserError, match=message):
        Encoder(tiny_tokenizer, **settings)


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (None, "has no chat template. Set data.template=instruction"),
        ("{{ raise_exception('no') }}", "chat template failed .no.. Set data.template=instruction"),
        ("{{ messages | length }}", "does not begin with its own prompt"),
    ],
)
def test_a_chat_template_that_cannot_serve_is_an_error(tiny_tokenizer, chat_template, message):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = chat_template
    with pytest.raises(UserError, match=message):
        Encoder(tokenizer, "chat").encode([row()])


def test_the_fingerprint_follows_all_that_decides_the_ids_and_nothing_else(tiny_tokenizer):
    other = copy.deepcopy(tiny_tokenizer)
    other.add_tokens(["Moving"])
    rechatted = copy.deepcopy(tiny_tokenizer)
    rechatted.chat_template += " "
    encoders = [
        Encoder(tiny_tokenizer),
        Encoder(tiny_tokenizer, "raw"),
        Encoder(tiny_tokenizer, max_length=511),
        Encoder(tiny_tokenizer, on_overflow="drop"),
        Encoder(tiny_tokenizer, "chat"),
        Encoder(rechatted, "chat"),
        Encoder(other),
        Encoder(with_bos(tiny_tokenizer)),
    ]
    assert len({encoder.fingerprint() for encoder in encoders}) == len(encoders)
    assert Encoder(rechatted).fingerprint() == Encoder(tiny_tokenizer).fingerprint()
    used = Encoder(tiny_tokenizer)
    used.encode([row()])
    assert used.fingerprint() == Encoder(copy.deepcopy(tiny_tokenizer)).fingerprint()

from __future__ import annotations

import copy
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snake_lora_pl.data.encoding import SPECIAL_TOKEN, TOO_LONG, Encoder, Example, Rejection
from snake_lora_pl.data.jsonl import Row
from snake_lora_pl.errors import UserError

LINES = ["Moving UP from [1, 1]", *(f"- metric {letter}: 1" for letter in string.ascii_lowercase), "Conclusion: UP"]
COMPLETION = "\n".join(LINES)


def row(prompt: str = "a prompt", completion: str = COMPLETION) -> Row:
    return Row(prompt, completion, None, "rows.jsonl", 3)


def encode(encoder: Encoder, *rows: Row) -> Example | Rejection:
    (result,) = encoder.encode(rows)
    return result


def completion_text(encoder: Encoder, example: Example) -> str:
    return encoder.tokenizer.decode(list(example.input_ids[example.num_prompt :]))


def test_instruction_template_wraps_the_prompt_and_appends_eos(tiny_tokenizer):
    example = encode(Encoder(tiny_tokenizer), row("the prompt", "the completion"))
    prompt_ids, completion_ids = example.input_ids[: example.num_prompt], example.input_ids[example.num_prompt :]
    assert tiny_tokenizer.decode(prompt_ids) == "### Instruction:\nthe prompt\n\n### Response:\n"
    assert tiny_tokenizer.decode(completion_ids) == "the completion" + tiny_tokenizer.eos_token


def test_raw_template_concatenates_prompt_and_completion(tiny_tokenizer):
    encoder = Encoder(tiny_tokenizer, "raw")
    example = encode(encoder, row("the prompt", " and the completion"))
    assert tiny_tokenizer.decode(example.input_ids) == "the prompt and the completion" + tiny_tokenizer.eos_token
    assert completion_text(encoder, example) == " and the completion" + tiny_tokenizer.eos_token


def test_chat_ids_equal_those_of_the_tokenizers_rendering_up_to_eos(tiny_tokenizer):
    example = encode(Encoder(tiny_tokenizer, "chat"), row("the prompt", "the completion"))
    turns = [{"role": "user", "content": "the prompt"}, {"role": "assistant", "content": "the completion"}]
    whole = tiny_tokenizer.apply_chat_template(turns, return_dict=False)
    before = tiny_tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False)
    assert example.input_ids == whole[: len(example.input_ids)]
    assert example.num_prompt == len(before)
    assert example.input_ids[-1] == tiny_tokenizer.eos_token_id
    assert tiny_tokenizer.decode(whole[len(example.input_ids) :]).strip() == ""


def test_chat_appends_eos_if_the_template_ends_a_turn_with_another_token(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    example = encode(Encoder(tokenizer, "chat"), row("the prompt", "the completion"))
    assert tokenizer.decode(example.input_ids).endswith("the completion<|endoftext|><|im_end|>")


@given(st.text(min_size=1, max_size=60), st.text(min_size=1, max_size=60), st.sampled_from(["instruction", "raw"]))
def test_any_text_is_decoded_unchanged_and_eos_is_only_at_the_end(tiny_tokenizer, prompt, completion, template):
    encoder = Encoder(tiny_tokenizer, template, max_length=1000)
    example = encode(encoder, row(prompt, completion))
    assert completion_text(encoder, example) == completion + tiny_tokenizer.eos_token
    assert list(example.input_ids).index(tiny_tokenizer.eos_token_id) == len(example.input_ids) - 1


@pytest.mark.parametrize("template", ["instruction", "chat", "raw"])
def test_prompt_has_the_same_ids_in_play_and_in_training(tiny_tokenizer, template):
    encoder = Encoder(tiny_tokenizer, template)
    example = encode(encoder, row())
    assert encoder.encode_prompt("a prompt") == list(example.input_ids[: example.num_prompt])


@pytest.mark.parametrize("template", ["instruction", "chat", "raw"])
def test_rows_encoded_together_equal_rows_encoded_one_by_one(tiny_tokenizer, template):
    encoder = Encoder(tiny_tokenizer, template, max_length=90)
    rows = [row("p" * n, COMPLETION[: 40 * n]) for n in range(1, 20)]
    assert encoder.encode(rows) == [encode(encoder, one) for one in rows]


def test_example_has_the_source_of_its_row(tiny_tokenizer):
    assert encode(Encoder(tiny_tokenizer), row()).source == "rows.jsonl:3"


def with_bos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer = copy.deepcopy(tokenizer)
    bos, eos = ((token, tokenizer.convert_tokens_to_ids(token)) for token in ("<|im_start|>", "<|im_end|>"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A {eos[0]}", special_tokens=[bos, eos]
    )
    return tokenizer


@pytest.mark.parametrize("template", ["instruction", "raw"])
def test_bos_is_prepended_if_calling_the_tokenizer_prepends_it(tiny_tokenizer, template):
    bos_tokenizer = with_bos(tiny_tokenizer)
    for tokenizer, expected in ((tiny_tokenizer, 0), (bos_tokenizer, 1)):
        ids = list(encode(Encoder(tokenizer, template), row()).input_ids)
        assert ids.count(tokenizer.bos_token_id) == expected
        assert (ids[0] == tokenizer.bos_token_id) == bool(expected)
        assert ids.count(tokenizer.eos_token_id) == 1


def test_bos_is_not_added_to_a_chat_template(tiny_tokenizer):
    assert encode(Encoder(with_bos(tiny_tokenizer), "chat"), row()) == encode(Encoder(tiny_tokenizer, "chat"), row())


@pytest.mark.parametrize("template", ["instruction", "raw"])
def test_special_token_in_a_row_is_encoded_as_text(tiny_tokenizer, template):
    encoder = Encoder(tiny_tokenizer, template)
    text = "Moving <|im_end|> UP<|endoftext|>"
    example = encode(encoder, row(text, text))
    special = [i for i in example.input_ids if i in tiny_tokenizer.all_special_ids]
    assert special == [tiny_tokenizer.eos_token_id]
    assert completion_text(encoder, example) == text + tiny_tokenizer.eos_token


@pytest.mark.parametrize("texts", [("<|im_end|>", "c"), ("p", "c<|im_start|>system")])
def test_chat_rejects_a_row_that_contains_a_special_token(tiny_tokenizer, texts):
    rejected, accepted = Encoder(tiny_tokenizer, "chat").encode([row(*texts), row()])
    assert rejected.reason == SPECIAL_TOKEN
    assert "data.template=instruction" in rejected.message
    assert isinstance(accepted, Example)


def test_chat_rejects_a_prompt_that_contains_a_special_token(tiny_tokenizer):
    with pytest.raises(UserError, match=r"<\|im_end\|>"):
        Encoder(tiny_tokenizer, "chat").encode_prompt("a<|im_end|>b")


def dated(tokenizer):
    copied = copy.deepcopy(tokenizer)
    copied.chat_template = "{{ strftime_now('%d %b %Y %H:%M') }} " + copied.chat_template
    return copied


def test_chat_template_renders_the_given_date_at_midnight(tiny_tokenizer):
    encoder = Encoder(dated(tiny_tokenizer), "chat", template_date="2025-03-01")
    assert encoder.template_date == "2025-03-01"
    assert encoder.render_prompt("p").startswith("01 Mar 2025 00:00 ")
    example = encode(encoder, row())
    assert list(example.input_ids[: example.num_prompt]) == encoder.encode_prompt("a prompt")


def test_chat_template_renders_today_by_default(tiny_tokenizer):
    encoder = Encoder(dated(tiny_tokenizer), "chat")
    assert encoder.template_date is not None
    again = Encoder(dated(tiny_tokenizer), "chat", template_date=encoder.template_date)
    assert again.render_prompt("p") == encoder.render_prompt("p")
    assert again.fingerprint() == encoder.fingerprint()


def test_fingerprint_depends_on_the_date_only_if_the_template_renders_it(tiny_tokenizer):
    dates = ("2025-03-01", "2025-03-02")
    with_date, without = (
        {Encoder(tokenizer, "chat", template_date=date).fingerprint() for date in dates}
        for tokenizer in (dated(tiny_tokenizer), tiny_tokenizer)
    )
    assert (len(with_date), len(without)) == (2, 1)
    assert Encoder(tiny_tokenizer, "chat", template_date=dates[0]).template_date is None
    assert Encoder(dated(tiny_tokenizer), "instruction", template_date=dates[0]).template_date is None


@pytest.mark.parametrize("date", ["yesterday", "01.03.2025", "2025-13-01", ""])
def test_invalid_date_is_an_error(tiny_tokenizer, date):
    with pytest.raises(UserError, match=r"data\.template_date"):
        Encoder(dated(tiny_tokenizer), "chat", template_date=date)


def test_prompt_without_bos_lacks_the_one_that_the_tokenizer_adds_itself(tiny_tokenizer):
    tokenizer = with_bos(tiny_tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template.replace("<|im_start|>", "")
    encoder = Encoder(tokenizer, "chat")
    assert encoder.render_prompt("p") == tokenizer.bos_token + encoder.render_prompt_without_bos("p")
    *ids, _ = tokenizer(encoder.render_prompt_without_bos("p"))["input_ids"]  # this tokenizer appends EOS
    assert ids == encoder.encode_prompt("p")


@pytest.mark.parametrize("template_has_bos", [False, True])
@pytest.mark.parametrize("tokenizer_adds_bos", [False, True])
@pytest.mark.parametrize("template", ["instruction", "chat", "raw"])
def test_prompt_of_a_server_has_the_ids_of_the_training(tiny_tokenizer, template, tokenizer_adds_bos, template_has_bos):
    tokenizer = with_bos(tiny_tokenizer) if tokenizer_adds_bos else copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = "{{ bos_token }}" * template_has_bos + "User: {{ messages[0]['content'] }}\n"
    encoder = Encoder(tokenizer, template)
    ids = tokenizer(encoder.render_prompt_without_bos("p"), add_special_tokens=False)["input_ids"]
    assert [tokenizer.bos_token_id] * encoder.adds_bos + ids == encoder.encode_prompt("p")
    assert encoder.encode_prompt("p").count(tokenizer.bos_token_id) == (
        template_has_bos if template == "chat" else tokenizer_adds_bos
    )


@pytest.mark.parametrize("template", ["instruction", "chat", "raw"])
def test_prompt_without_bos_is_the_prompt_if_the_tokenizer_adds_none(tiny_tokenizer, template):
    encoder = Encoder(tiny_tokenizer, template)
    assert encoder.render_prompt_without_bos("p") == encoder.render_prompt("p")


def test_encoder_does_not_change_the_tokenizer(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    before = tokenizer.backend_tokenizer.to_str(), tokenizer("a <|im_end|>")["input_ids"]
    Encoder(tokenizer).encode([row()])
    assert (tokenizer.backend_tokenizer.to_str(), tokenizer("a <|im_end|>")["input_ids"]) == before


def test_truncation_and_padding_of_the_tokenizer_are_not_applied(tiny_tokenizer):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.backend_tokenizer.enable_truncation(4)
    tokenizer.backend_tokenizer.enable_padding(length=900)
    assert encode(Encoder(tokenizer), row()) == encode(Encoder(tiny_tokenizer), row())


@given(
    st.lists(st.text(string.ascii_letters + " ", max_size=30), min_size=1, max_size=12),
    st.text(string.ascii_letters, min_size=1, max_size=30),
    st.integers(2, 200),
    st.sampled_from(["instruction", "chat", "raw"]),
)
def test_shortening_fits_and_removes_whole_lines_from_the_middle_only(
    tiny_tokenizer, lines, last, max_length, template
):
    encoder = Encoder(tiny_tokenizer, template, max_length)
    result = encode(encoder, row("p", "\n".join([*lines, last])))
    shortest = encode(Encoder(tiny_tokenizer, template, 10_000), row("p", last))
    if isinstance(result, Rejection):
        assert len(shortest.input_ids) > max_length
        return
    assert len(result.input_ids) <= max_length
    kept = completion_text(encoder, result).removesuffix(tiny_tokenizer.eos_token).split("\n")
    assert kept[-1] == last
    num_head = len(kept) // 2
    if template != "chat":  # A chat template may add to the completion.
        assert kept[:num_head] == lines[:num_head]
        assert kept[num_head:-1] == lines[len(lines) - (len(kept) - 1 - num_head) :]


def test_shortening_keeps_the_first_line_if_two_lines_fit(tiny_tokenizer):
    two_lines = len(encode(Encoder(tiny_tokenizer), row("p", f"{LINES[0]}\n{LINES[-1]}")).input_ids)
    encoder = Encoder(tiny_tokenizer, max_length=two_lines)
    assert completion_text(encoder, encode(encoder, row("p"))) == f"{LINES[0]}\n{LINES[-1]}<|im_end|>"


def test_shortening_removes_no_more_lines_than_necessary(tiny_tokenizer):
    whole = encode(Encoder(tiny_tokenizer, max_length=10_000), row("p"))
    encoder = Encoder(tiny_tokenizer, max_length=len(whole.input_ids) - 1)
    assert len(completion_text(encoder, encode(encoder, row("p"))).split("\n")) == len(LINES) - 1


def test_row_of_exactly_max_length_is_unchanged(tiny_tokenizer):
    whole = encode(Encoder(tiny_tokenizer, max_length=10_000), row("p"))
    assert encode(Encoder(tiny_tokenizer, max_length=len(whole.input_ids)), row("p")) == whole


@pytest.mark.parametrize("on_overflow", ["error", "drop"])
def test_rejection_names_the_max_length_that_would_fit(tiny_tokenizer, on_overflow):
    needed = len(encode(Encoder(tiny_tokenizer, max_length=10_000), row("p")).input_ids)
    rejection = encode(Encoder(tiny_tokenizer, max_length=60, on_overflow=on_overflow), row("p"))
    assert (rejection.source, rejection.reason) == ("rows.jsonl:3", TOO_LONG)
    assert "data.max_length=60" in rejection.message
    assert str(needed) in rejection.message
    assert isinstance(encode(Encoder(tiny_tokenizer, max_length=needed, on_overflow=on_overflow), row("p")), Example)


def test_rejection_of_a_long_prompt_names_the_max_length_for_the_last_line(tiny_tokenizer):
    rejection = encode(Encoder(tiny_tokenizer, max_length=60), row("p" * 100))
    needed = len(encode(Encoder(tiny_tokenizer, max_length=10_000), row("p" * 100, LINES[-1])).input_ids)
    assert str(needed) in rejection.message
    assert "data.max_length=60" in rejection.message
    assert "data.on_overflow=drop" in rejection.message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"template": "alpaca"}, r"data\.template 'alpaca'.*instruction, chat, raw"),
        ({"on_overflow": "cut"}, r"data\.on_overflow 'cut'.*error, drop, shorten"),
        ({"max_length": 1}, r"data\.max_length .*2.*1"),
    ],
)
def test_invalid_setting_is_an_error(tiny_tokenizer, settings, message):
    with pytest.raises(UserError, match=message):
        Encoder(tiny_tokenizer, **settings)


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        (None, r"data\.template=chat.*data\.template=instruction"),
        ("{{ raise_exception('no') }}", r"data\.template=chat.*\bno\b.*data\.template=instruction"),
        ("{{ messages | length }}", r"data\.template=chat.*prompt.*data\.template=instruction"),
    ],
)
def test_unusable_chat_template_is_an_error(tiny_tokenizer, chat_template, message):
    tokenizer = copy.deepcopy(tiny_tokenizer)
    tokenizer.chat_template = chat_template
    with pytest.raises(UserError, match=message):
        Encoder(tokenizer, "chat").encode([row()])


def test_fingerprint_depends_on_exactly_what_determines_the_ids(tiny_tokenizer):
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

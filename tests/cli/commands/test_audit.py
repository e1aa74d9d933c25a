import json

import pytest

from snake_lora_pl.__main__ import main


def test_text_lists_rows_games_claims_and_tokens(bfs512_sample_path, tiny_llama_dir, capsys):
    assert main(["audit", str(bfs512_sample_path), "--base_model", str(tiny_llama_dir), "--max_length", "450"]) == 0
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(line.strip() for line in lines)
    for expected in (
        "rows                     354 (354 on 10x10)",
        "games                    4",
        "illegal moves            0",
        "claim: valid_moves       354, false: 0",
        "rows over 450 tokens",
        "[[Moving ",
        "Conclusion: The move is: UP<|im_end|>]]",
    ):
        assert expected in text


def test_json_holds_the_same_counts(bfs512_sample_path, tiny_llama_dir, capsys):
    assert main(["audit", str(bfs512_sample_path), "--base_model", str(tiny_llama_dir), "--json"]) == 0
    audit = json.loads(capsys.readouterr().out)
    assert audit["num_rows"] == 354
    assert audit["moves"]["num_illegal"] == 0
    assert sum(count for *_, count in audit["tokens"]["histogram"]) == 354


def test_tokens_are_not_counted_when_no_base_model_is_cached(bfs512_sample_path, capsys):
    assert main(["audit", str(bfs512_sample_path)]) == 0
    output = capsys.readouterr().out
    assert "--base_model" in output
    assert "rows over" not in output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "F.jsonl"),
        (["nowhere.jsonl"], "nowhere.jsonl"),
        (["{sample}", "--template", "chatt"], "--template 'chatt'"),
        (["{sample}", "--base_model", "smollm"], "'smollm2-135m'"),
        (["{sample}", "--jsn"], "'--json'"),
        (["{sample}", "--memory"], "snake_lora_pl memory --config"),
    ],
)
def test_user_error_is_one_line(bfs512_sample_path, capsys, arguments, message):
    assert main(["audit", *(argument.format(sample=bfs512_sample_path) for argument in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line

import json
import time

import pytest

from snake_lora_pl.__main__ import main
from snake_lora_pl.data.generated_rows import write_dataset


def test_the_text_says_what_is_in_the_file(bfs512_sample_path, tiny_llama_dir, capsys):
    assert main(["audit", str(bfs512_sample_path), "--base_model", str(tiny_llama_dir), "--max_length", "450"]) == 0
    lines = capsys.readouterr().out.splitlines()
    text = "\n".join(line.strip() for line in lines)
    for expected in (
        "rows                     354 (354 on 10x10)",
        "games                    4",
        "illegal moves            0",
        "said: valid_moves        354, false: 0",
        "rows over 450 tokens",
        "[[Moving ",
        "Conclusion: The move is: UP<|im_end|>]]",
    ):
        assert expected in text


def test_json_is_for_machines(bfs512_sample_path, tiny_llama_dir, capsys):
    assert main(["audit", str(bfs512_sample_path), "--base_model", str(tiny_llama_dir), "--json"]) == 0
    audit = json.loads(capsys.readouterr().out)
    assert audit["num_rows"] == 354
    assert audit["moves"]["num_illegal"] == 0
    assert sum(count for *_, count in audit["tokens"]["histogram"]) == 354


def test_without_a_model_at_hand_nothing_is_fetched_and_tokens_are_not_counted(bfs512_sample_path, capsys):
    assert main(["audit", str(bfs512_sample_path)]) == 0
    assert "not counted; name a model with --base_model" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: F.jsonl"),
        (["nowhere.jsonl"], "no such file"),
        (["{sample}", "--template", "chatt"], "unknown --template 'chatt'"),
        (["{sample}", "--base_model", "smollm"], "did you mean 'smollm2-135m'"),
        (["{sample}", "--jsn"], "Did you mean --json?"),
    ],
)
def test_a_mistake_is_one_line(bfs512_sample_path, capsys, arguments, message):
    assert main(["audit", *(argument.format(sample=bfs512_sample_path) for argument in arguments)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


@pytest.mark.slow
def test_five_thousand_rows_take_less_than_ten_seconds(tmp_path, tiny_llama_dir):
    path = tmp_path / "rows.jsonl"
    assert write_dataset(path, 22) > 5_000
    start = time.process_time()
    assert main(["audit", str(path), "--base_model", str(tiny_llama_dir), "--max_length", "1200"]) == 0
    assert time.process_time() - start < 10


MEMORY = ("--memory", "--config", "balanced.yaml", "--data.max_length=1200", "--trainer.accelerator=cpu")


def memory(tiny_llama_dir, capsys, *arguments):
    """What ``audit --memory --json`` prints."""
    model = f"--model.base_model={tiny_llama_dir}"
    assert main(["audit", *MEMORY, model, "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_memory_is_that_of_the_step_that_the_options_of_fit_describe(
    bfs512_sample_path, tiny_llama_dir, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    four = memory(tiny_llama_dir, capsys, str(bfs512_sample_path), "--data.batch_size", "4")
    assert four["rows"] == 4
    assert four["total_bytes"] == sum(four["parts_bytes"].values())
    eight = memory(tiny_llama_dir, capsys, "--data.batch_size=8", str(bfs512_sample_path))
    assert eight["parts_bytes"]["activations"] == pytest.approx(2 * four["parts_bytes"]["activations"], rel=0.1)
    wider = memory(tiny_llama_dir, capsys, str(bfs512_sample_path), "--data.batch_size=4", "--model.lora.rank=32")
    assert wider["parts_bytes"]["optimizer"] == 2 * four["parts_bytes"]["optimizer"]
    assert list(tmp_path.iterdir()) == [], "no run, no directory"


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("free_bytes", "words"),
    [
        (2**40, "1024.00 GiB are free on this machine: it fits."),
        (2**20, "it does not fit. `fit` with --data.batch_size=auto"),
    ],
)
def test_memory_is_held_against_what_is_free(
    bfs512_sample_path, tiny_llama_dir, monkeypatch, capsys, free_bytes, words
):
    monkeypatch.setattr("snake_lora_pl.cli.commands.memory.available_bytes", lambda device: free_bytes)
    model = f"--model.base_model={tiny_llama_dir}"
    assert main(["audit", str(bfs512_sample_path), *MEMORY, model, "--data.batch_size=2"]) == 0
    printed = capsys.readouterr().out
    assert words in printed
    assert "for the 2 longest rows as a batch" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.batch_sise=2"], "Did you mean 'data.batch_size'?"),
        (["--data.batch_size=auto"], "data.batch_size=auto takes what there is. Give a number to estimate"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_a_mistake_in_the_options_of_fit_is_one_line(bfs512_sample_path, tiny_llama_dir, capsys, arguments, message):
    model = f"--model.base_model={tiny_llama_dir}"
    assert main(["audit", str(bfs512_sample_path), *MEMORY, model, *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]

"""Shared fixtures: a tiny random Llama with its tokenizer, real rows, and an isolated cache.

No test reaches a network unless it is marked `network`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.browser import CHROMIUM, Tab, chromium_tab

# Workers of pytest-xdist share the cores, and so do the programs that tests start; set before torch is imported.
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

# The same examples in every run, and no deadlines: a busy machine is not a defect.
settings.register_profile("repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("repeatable")

SAMPLE_DIR = Path(__file__).parent / "data" / "heuristics_v0.04"


@pytest.fixture(autouse=True)
def _no_leaked_environment() -> Iterator[None]:
    """Fail a test that leaves an environment variable behind."""
    before = dict(os.environ)
    yield
    leaked = {k for k in os.environ if os.environ.get(k) != before.get(k)} - {"PYTEST_CURRENT_TEST"}
    # Libraries set these at their first import, whichever test happens to import them.
    leaked -= {
        k
        for k in leaked
        if k.startswith(
            ("PL_", "KMP_", "OMP_", "TORCH", "PYTORCH_", "TF_", "CUDA_MODULE", "NVIDIA_", "BNB_", "PYGAME_", "_TORCH")
        )
    }
    assert not leaked, f"environment variables leaked: {sorted(leaked)}"


@pytest.fixture(autouse=True)
def _isolated_cache(
    _no_leaked_environment: None, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Keep every test away from the user's cache and from model hubs."""
    monkeypatch.setenv("SNAKE_LORA_PL_CACHE", str(tmp_path_factory.mktemp("cache")))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture(scope="session")
def bfs512_sample_path() -> Path:
    """Four whole games (354 rows) of real ``bfs-512`` rows on a 10x10 grid."""
    return SAMPLE_DIR / "grid-size-10" / "bfs-512" / "BFS-512_dataset.jsonl"


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory, bfs512_sample_path: Path) -> Path:
    """A Hugging Face directory with a two-layer random Llama and a byte-level BPE tokenizer of 384 tokens.

    Like SmolLM2 it ties its embeddings and pads with EOS, and its tokenizer has a chat template.
    """
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    directory = tmp_path_factory.mktemp("tiny-llama")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=384,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(bfs512_sample_path.read_text().splitlines(), trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>"
    )
    fast.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    fast.save_pretrained(directory)

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=384,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
        # A random model needs logits that differ, or every comparison of outputs passes.
        initializer_range=0.3,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_tokenizer(tiny_llama_dir: Path):
    """The tokenizer of the tiny Llama."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama_dir)


@pytest.fixture
def tiny_smollm2(tiny_llama_dir: Path, _isolated_cache: None) -> str:
    """The short name of the default base model, behind which the cache holds the tiny Llama: examples run verbatim."""
    from snake_lora_pl.models import wheel
    from snake_lora_pl.paths import base_model_cache_dir

    directory = base_model_cache_dir(wheel.SMOLLM2_135M.short_name)
    shutil.copytree(tiny_llama_dir, directory)
    wheel._write_manifest(directory, wheel.SMOLLM2_135M)
    return wheel.SMOLLM2_135M.short_name


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    """Return a tab of a headless Chromium."""
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed (apt install chromium)")
    with chromium_tab() as tab:
        yield tab

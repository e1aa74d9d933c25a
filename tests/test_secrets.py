from __future__ import annotations

import pytest

from snake_lora_pl.secrets import MASK, mask_arguments, mask_secrets, redact_config


def test_config_entries_named_like_secrets_are_dropped_and_others_kept() -> None:
    config = {
        "logger": [{"init_args": {"api_key": "a", "project": "p"}}],
        "hub_token": "t",
        "model": {"max_new_tokens": 64, "loss_chunk_tokens": 512, "tokenizer": "x"},
    }
    assert redact_config(config) == {"logger": [{"init_args": {"project": "p"}}], "model": config["model"]}


def test_values_of_secret_options_are_masked_in_texts() -> None:
    assert mask_secrets("no secret12 here", ["push", "--token", "secret12"]) == f"no {MASK} here"
    assert mask_secrets("no secret12 here", ["fit", "--a.password=secret12"]) == f"no {MASK} here"
    assert mask_secrets("it is 512", ["fit", "--model.loss_chunk_tokens=512"]) == "it is 512"


@pytest.mark.parametrize(
    "name", ["AWS_SECRET_ACCESS_KEY", "NEPTUNE_API_TOKEN", "MLFLOW_TRACKING_PASSWORD", "MY_PASSWD"]
)
def test_secrets_in_the_environment_are_recognized_by_their_names(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "theKeyOfSomeService")
    assert mask_secrets("refused theKeyOfSomeService", []) == f"refused {MASK}"
    assert redact_config({"run": "theKeyOfSomeService", name.lower(): "x"}) == {"run": MASK}


def test_secrets_with_a_recognizable_form_are_masked() -> None:
    token = "hf_" + "aB3" * 10
    config = {"revision": token, "uri": ["https://me:dear@host/x", "s3://bucket/a@b", "me@host"]}
    assert redact_config(config) == {
        "revision": MASK,
        "uri": [f"https://{MASK}@host/x", "s3://bucket/a@b", "me@host"],
    }
    text = "Got {'api_key': 'dear-to-me', 'project': 'snake-lora'}, num_tokens: 12345678, password=dear-to-me"
    masked = f"Got {{'api_key': '{MASK}', 'project': 'snake-lora'}}, num_tokens: 12345678, password={MASK}"
    assert mask_secrets(text, []) == masked
    assert mask_arguments(["fit", "--hub_tokn", "dear-to-me", "--data.max_length=512"]) == [
        "fit", "--hub_tokn", MASK, "--data.max_length=512"
    ]  # fmt: skip

"""Model cards of adapters and merged models."""

from __future__ import annotations

import os
from typing import Any

from snake_lora_pl.adapters.metadata import AdapterMetadata, is_number
from snake_lora_pl.adapters.registry import saved_conventions
from snake_lora_pl.adapters.vllm import vllm_command, vllm_obstacles

# Statistics of games: label and format.
_STATISTICS = {
    "num_games": ("games", "{:.0f}"),
    "apples_mean": ("apples, mean", "{:.1f}"),
    "apples_low": ("95% interval, lower bound", "{:.1f}"),
    "apples_high": ("95% interval, upper bound", "{:.1f}"),
    "apples_median": ("apples, median", "{:.0f}"),
    "win_rate": ("games won", "{:.0%}"),
    "steps_mean": ("steps, mean", "{:,.0f}"),
    "fatal_move_rate": ("fatal moves", "{:.2%}"),
    "trap_rate": ("traps taken", "{:.2%}"),
    "unparseable_rate": ("completions without a move", "{:.2%}"),
    "teacher_agreement": ("agreement with the teacher", "{:.1%}"),
}
# Metrics in the model index of the card's YAML header, with their labels.
_INDEXED_METRICS = {
    "val/loss": "validation loss",
    "val/move_accuracy": "move accuracy",
    "play/apples_mean": "apples per game",
}


def model_card(metadata: AdapterMetadata) -> str:
    """Return the model card of an adapter directory."""
    lines = [
        *_yaml_header(metadata, library="peft", relation="adapter"),
        f"# A {metadata.adapter_type} adapter that plays Snake",
        "",
        f"Trained on {_base_link(metadata)} for {metadata.step:,} optimizer steps with snake_lora_pl "
        f"{metadata.packages.get('snake_lora_pl', '')}. {_base_identity(metadata)}",
        "",
        "## Load",
        "",
        "```python",
        "from peft import PeftModel",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        f"base = AutoModelForCausalLM.from_pretrained({metadata.base_model!r})",
        'model = PeftModel.from_pretrained(base, "path/to/this/directory")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")',
        "```",
        "",
        *_serving(metadata),
        *_body(metadata),
    ]
    return "\n".join(lines)


def merged_model_card(metadata: AdapterMetadata, dtype: str) -> str:
    """Return the model card of a merged model.

    Args:
        metadata: The adapter's metadata.
        dtype: Dtype of the merged weights.
    """
    lines = [
        *_yaml_header(metadata, library="transformers", relation="finetune"),
        "# A language model that plays Snake",
        "",
        f"{_base_link(metadata)} with a merged {metadata.adapter_type} adapter, in {dtype}. The adapter was trained "
        f"with snake_lora_pl and has sha256 `{metadata.weights_sha256}`. {_base_identity(metadata)}",
        "",
        "## Load",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")',
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/directory")',
        "```",
        "",
        *_body(metadata),
    ]
    return "\n".join(lines)


def _yaml_header(metadata: AdapterMetadata, library: str, relation: str) -> list[str]:
    from huggingface_hub import EvalResult, ModelCardData

    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=str(metadata.data.get("prompt_format") or "rows"),
            dataset_name=f"Snake, {metadata.grid_size}x{metadata.grid_size}" if metadata.grid_size else "Snake",
            metric_type=name,
            metric_name=label,
            metric_value=metadata.metrics[name],
        )
        for name, label in _INDEXED_METRICS.items()
        if name in metadata.metrics
    ]
    on_hub = not os.path.isabs(metadata.base_model)
    data = ModelCardData(
        base_model=metadata.base_model if on_hub else None,
        base_model_relation=relation if on_hub else None,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["snake", metadata.adapter_type],
        model_name=f"snake-{metadata.adapter_type}" if results else None,
        eval_results=results or None,
    )
    return ["---", data.to_yaml(), "---", ""]


def _base_link(metadata: AdapterMetadata) -> str:
    name = metadata.base_model
    return f"`{name}`" if os.path.isabs(name) else f"[`{name}`](https://huggingface.co/{name})"


def _base_identity(metadata: AdapterMetadata) -> str:
    if metadata.base_sha256:
        name = f" (`{metadata.base_model_name}`)" if metadata.base_model_name != metadata.base_model else ""
        return f"The base weights{name} have sha256 `{metadata.base_sha256}`."
    return f"The revision of the base is `{metadata.base_revision}`." if metadata.base_revision else ""


def _serving(metadata: AdapterMetadata) -> list[str]:
    obstacles = vllm_obstacles(metadata.peft_config)
    if obstacles:
        return ["## Serve", "", f"vLLM cannot serve this adapter ({'; '.join(obstacles)}): merge it first.", ""]
    command = vllm_command(metadata.peft_config, metadata.base_model, "path/to/this/directory")
    return ["## Serve", "", "```", command, "```", "", *_quantization_note(metadata)]


def _quantization_note(metadata: AdapterMetadata) -> list[str]:
    if not metadata.quantization:
        return []
    return [
        f"The adapter was trained on a {metadata.quantization['bits']}-bit base. On the full weights, as above, its "
        "completions differ slightly; `python -m snake_lora_pl merge` writes the exact model.",
        "",
    ]


def _body(metadata: AdapterMetadata) -> list[str]:
    settings = metadata.peft_config
    labels = saved_conventions(metadata.adapter_type).card_settings
    layers = settings.get("target_modules") or []
    size = f"{metadata.grid_size}x{metadata.grid_size}" if metadata.grid_size else "unknown"
    return [
        "## Data",
        "",
        *_table("rows", {"board": size, **metadata.data}),
        "## Settings",
        "",
        *_table(
            "setting",
            {
                **{label: settings[key] for key, label in labels.items() if settings.get(key) is not None},
                "layers": layers if isinstance(layers, str) else ", ".join(sorted(layers)),
                "trained parameters": f"{metadata.trainable_parameters:,} of {metadata.total_parameters:,}",
                "epoch": metadata.epoch,
                **({"base quantization": metadata.quantization} if metadata.quantization else {}),
            },
        ),
        "## Metrics",
        "",
        *_table("metric", {name: f"{value:.4g}" for name, value in sorted(metadata.metrics.items())}),
        *_games(metadata.play),
        "## Versions",
        "",
        ", ".join(f"{name} {version}" for name, version in metadata.packages.items())
        + f"; written {metadata.training_timestamp}.",
        "",
    ]


def _table(title: str, values: dict[str, Any]) -> list[str]:
    rows = [f"| {name} | {_cell(value)} |" for name, value in values.items()]
    return [f"| {title} | |", "|---|---|", *rows, ""]


def _cell(value: Any) -> str:
    if isinstance(value, dict):
        value = ", ".join(f"{name}: {count}" for name, count in value.items()) or "none"
    return str(value).replace("|", "\\|").replace("\n", " ")


def _games(play: dict[str, Any]) -> list[str]:
    if not play:
        return []
    players = play["players"]
    statistics = {name: shown for name, shown in _STATISTICS.items() if any(name in p for p in players.values())}
    return [
        "## Games",
        "",
        f"All players played the same games; this adapter is `{play['player']}`.",
        "",
        "| | " + " | ".join(players) + " |",
        "|---|" + "---|" * len(players),
        *(
            f"| {label} | " + " | ".join(_format(p.get(name), form) for p in players.values()) + " |"
            for name, (label, form) in statistics.items()
        ),
        "",
        *_table("setting", play.get("settings", {})),
    ]


def _format(value: Any, form: str) -> str:
    return form.format(value) if is_number(value) else "-"

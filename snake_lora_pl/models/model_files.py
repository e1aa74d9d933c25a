"""Checks of the files in a model directory, made before transformers reads them."""

from __future__ import annotations

from pathlib import Path

from snake_lora_pl.errors import UserError
from snake_lora_pl.untrusted import read_json_object


def weight_paths(model_dir: Path) -> list[Path]:
    """Return the safetensors files of a model directory, sorted by name."""
    return sorted(model_dir.glob("*.safetensors"))


def stored_dtype(model_dir: Path) -> str:
    """Return the dtype that ``config.json`` gives for the weights; ``float32`` if it gives none."""
    config = read_json_object(model_dir / "config.json")
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


def check_is_model_dir(directory: Path) -> None:
    """Check that a directory holds a readable ``config.json``.

    Raises:
        UserError: If it does not.
    """
    path = directory / "config.json"
    if path.is_file():
        try:
            read_json_object(path)
        except (ValueError, OSError) as error:
            raise UserError(f"{path}: damaged ({error}). Copy the model's files again.") from error
        return
    if (directory / "adapter_config.json").is_file():
        raise UserError(
            f"{directory} holds an adapter, not a base model. Pass the base model it was trained on, or merge it first."
        )
    raise UserError(f"{directory} is not a model directory: config.json is missing.")


def check_weights(model_dir: Path) -> None:
    """Check that a model directory holds complete safetensors weights of a plausible size.

    Raises:
        UserError: If there are none, a shard is missing, or ``config.json`` describes a far larger model.
    """
    for index_path in model_dir.glob("*.safetensors.index.json"):
        _check_shards(index_path)
    if paths := weight_paths(model_dir):
        _check_sizes(model_dir / "config.json", sum(path.stat().st_size for path in paths))
        return
    others = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.gguf") for p in model_dir.glob(pattern))
    if not others:
        raise UserError(f"{model_dir} has no weights: model.safetensors is missing.")
    raise UserError(
        f"{model_dir} has no safetensors weights, only {', '.join(others[:3])}; pickled weights can run code when they "
        "are loaded. Convert a model you trust: load it with transformers and call save_pretrained(NEW_DIRECTORY)."
    )


def _check_sizes(config_path: Path, num_bytes: int) -> None:
    """Reject a config that describes a far larger model than the weights, before any memory is allocated for it."""
    config = read_json_object(config_path)

    def size(*names: str) -> int:
        return next((value for name in names if isinstance(value := config.get(name), int)), 0)

    num_layers, width = size("num_hidden_layers", "n_layer", "num_layers"), size("hidden_size", "n_embd")
    # Lower bounds in bytes for parts of every model, at the minimum of four bits per weight.
    bounds = {
        f"vocab_size={size('vocab_size')} and hidden_size={width}": size("vocab_size") * width // 2,
        f"hidden_size={width}": width * width // 2,
        f"num_hidden_layers={num_layers}": num_layers * max(width, 16),
    }
    for setting, bound in bounds.items():
        if bound > max(num_bytes, 2**20):
            raise UserError(
                f"{config_path}: {setting} requires at least {bound / 2**30:,.1f} GiB, but the weights have "
                f"{num_bytes / 2**30:,.3f} GiB. Copy all of the model's files again."
            )


def _check_shards(index_path: Path) -> None:
    """Reject an index with missing shards, or with shards outside the directory, which the model's hash would miss."""
    try:
        weight_map = read_json_object(index_path).get("weight_map")
    except (ValueError, OSError) as error:
        raise UserError(f"{index_path}: damaged ({error}). Copy the model's files again.") from error
    if not isinstance(weight_map, dict):
        raise UserError(f"{index_path}: damaged (no weight_map). Copy the model's files again.")
    for shard in dict.fromkeys(map(str, weight_map.values())):
        if Path(shard).name != shard or not (index_path.parent / shard).is_file():
            raise UserError(
                f"{index_path}: shard {shard} is not a file in the same directory. Copy all of the model's files again."
            )

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from snake_lora_pl.errors import UserError
from snake_lora_pl.training import base_compute
from snake_lora_pl.training import module as module_file
from snake_lora_pl.training.base_compute import int8_obstacle, measure_speedup
from snake_lora_pl.training.memory.estimate import blank_batch, estimate_memory
from snake_lora_pl.training.torch_internals import has_vnni
from tests.training.conftest import make_loader, make_rows, make_trainer

needs_vnni = pytest.mark.skipif(not has_vnni(), reason="needs AVX512-VNNI")


def test_int8_needs_a_cpu_with_vnni_and_a_suitable_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base_compute, "has_vnni", lambda: True)
    assert int8_obstacle("cpu", torch.float32) is None
    assert int8_obstacle("cpu", torch.bfloat16) is None
    assert "cuda" in str(int8_obstacle("cuda", torch.float32))
    assert "float16" in str(int8_obstacle("cpu", torch.float16))
    monkeypatch.setattr(base_compute, "has_vnni", lambda: False)
    assert "AVX512-VNNI" in str(int8_obstacle("cpu", torch.float32))


@needs_vnni
def test_speedup_is_measured_once_and_small_models_are_not_measured() -> None:
    config: Any = SimpleNamespace(hidden_size=256, intermediate_size=64)
    assert measure_speedup(config, torch.float32) > 0
    assert measure_speedup(config, torch.float32) == measure_speedup(config, torch.float32)
    assert measure_speedup(SimpleNamespace(hidden_size=64, intermediate_size=64), torch.float32) == 0  # type: ignore[arg-type]


@needs_vnni
@pytest.mark.parametrize(("speedup", "expected"), [(2.0, True), (1.0, False)])
def test_auto_chooses_what_is_faster(
    make_module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, speedup: float, expected: bool
) -> None:
    monkeypatch.setattr(module_file, "measure_speedup", lambda config, dtype: speedup)
    module = make_module(base_compute="auto")
    make_trainer(tmp_path, max_steps=1).fit(module, make_loader(make_rows(4), 2))
    assert module.trains_in_int8 == expected


@needs_vnni
@pytest.mark.parametrize("speedup_after", [0.5, 2.0])
@pytest.mark.parametrize("speedup_before", [0.5, 2.0])
def test_auto_resumes_with_the_choice_of_the_checkpoint(
    make_module, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, speedup_before: float, speedup_after: float
) -> None:
    loader = make_loader(make_rows(4), 2)
    monkeypatch.setattr(module_file, "measure_speedup", lambda config, dtype: speedup_before)
    trainer = make_trainer(tmp_path, max_epochs=1)
    trainer.fit(make_module(base_compute="auto"), loader)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    monkeypatch.setattr(module_file, "measure_speedup", lambda config, dtype: speedup_after)
    resumed = make_module(base_compute="auto")
    make_trainer(tmp_path, max_epochs=2).fit(resumed, loader, ckpt_path=tmp_path / "half.ckpt")
    assert resumed.trains_in_int8 == (speedup_before > 1)


@needs_vnni
def test_another_setting_is_kept_on_resume_and_reported(
    make_module, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loader = make_loader(make_rows(4), 2)
    trainer = make_trainer(tmp_path)
    trainer.fit(make_module(base_compute="int8"), loader)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = make_module(base_compute="float")
    make_trainer(tmp_path, max_epochs=2).fit(resumed, loader, ckpt_path=tmp_path / "half.ckpt")
    assert not resumed.trains_in_int8
    assert any(record.levelname == "WARNING" and "int8" in record.getMessage() for record in caplog.records)


@needs_vnni
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_in_int8_follows_training_in_float(make_module, tmp_path: Path, dtype: str) -> None:
    losses = []
    for name in ("float", "int8"):
        module = make_module(base_compute=name, dtype=dtype)
        trainer = make_trainer(tmp_path, max_epochs=8)
        trainer.fit(module, make_loader(make_rows(6), 3), make_loader(make_rows(6), 3))
        losses.append(float(trainer.callback_metrics["val/loss"]))
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)


@pytest.mark.parametrize("settings", [{"fused_layers": "never"}, {"dtype": "float16"}, {"adapter_type": "adalora"}])
def test_int8_that_is_impossible_is_refused_and_auto_uses_float(make_module, settings: dict[str, Any]) -> None:
    module = make_module(base_compute="int8", **settings)
    module.configure_model()
    with pytest.raises(UserError, match=r"^model\.base_compute is 'int8'"):
        module.choose_base_compute("cpu")
    module = make_module(base_compute="auto", **settings)
    module.configure_model()
    module.choose_base_compute("cpu")
    assert not module.trains_in_int8


@needs_vnni
def test_memory_estimate_counts_both_copies(make_module) -> None:
    estimates = [estimate_memory(make_module(base_compute=name), blank_batch(2, 16, 8)) for name in ("float", "int8")]
    module = make_module()
    module.configure_model()
    layers = module.peft_model.get_base_model().base_model.layers
    num_weights = sum(p.numel() for name, p in layers.named_parameters() if p.ndim == 2 and "lora" not in name)
    num_bytes = estimates[1].weights - estimates[0].weights
    assert num_bytes < 2.1 * num_weights  # no more than in bfloat16, and the scales
    first = layers[0].self_attn
    num_without_gradient = sum(p.weight.numel() for p in (first.q_proj, first.k_proj, first.v_proj))
    assert num_bytes > 2 * num_weights - num_without_gradient

"""Every adapter type and LoRA option trains, resumes exactly from small checkpoints, and loads again."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import PeftModel

from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.config import AdaLoRAConfig, LoRAConfig
from snake_lora_pl.adapters.factory import AdapterFactory
from snake_lora_pl.errors import UserError
from snake_lora_pl.models import QuantizationConfig
from snake_lora_pl.models.quantization import quantization_of
from snake_lora_pl.training.callbacks.adapter_checkpoint import AdapterCheckpoint
from snake_lora_pl.training.module import LoRALightningModule
from tests.training.conftest import collate, make_loader, make_rows, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")

ROWS = make_rows(12)
VAL_ROWS = make_rows(4, seed=5)
IDS = collate(ROWS)["input_ids"]

ADALORA = AdaLoRAConfig(initial_steps=2, final_steps=4)
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("lora", {}),
    "rslora": ("lora", {"use_rslora": True}),
    "dora": ("lora", {"use_dora": True}),
    "gaussian": ("lora", {"init_lora_weights": "gaussian"}),
    "orthogonal": ("lora", {"init_lora_weights": "orthogonal"}),
    "pissa": ("lora", {"init_lora_weights": "pissa"}),
    "pissa_niter": ("lora", {"init_lora_weights": "pissa_niter_4"}),
    "olora": ("lora", {"init_lora_weights": "olora"}),
    "pissa rslora patterns": (
        "lora",
        {
            "init_lora_weights": "pissa",
            "use_rslora": True,
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"v_proj": 3.0},
        },
    ),
    "rank pattern": ("lora", {"rank_pattern": {"q_proj": 2, r"layers\.1\..*v_proj": 6}}),
    "alpha pattern": ("lora", {"alpha_pattern": {"q_proj": 16.0}}),
    "loraplus": ("lora", {"loraplus_lr_ratio": 4.0}),
    "qlora": ("qlora", {}),
    "qlora 8 bits": ("qlora", {"quantization": QuantizationConfig(bits=8)}),
    "qlora bfloat16 storage": ("qlora", {"quantization": QuantizationConfig(storage_dtype="bfloat16")}),
    "qlora dora": ("qlora", {"use_dora": True}),
    "qlora pissa": ("qlora", {"init_lora_weights": "pissa"}),
    "qlora olora": ("qlora", {"init_lora_weights": "olora"}),
    "adalora": ("adalora", {"adalora": ADALORA}),
    "miss": ("miss", {"alpha": LoRAConfig().alpha}),
    "miss rank that divides no layer": ("miss", {"alpha": LoRAConfig().alpha, "rank": 5, "dropout": 0.1}),
    "shira": ("shira", {"alpha": LoRAConfig().alpha, "dropout": LoRAConfig().dropout}),
    "adalora loraplus": ("adalora", {"adalora": ADALORA, "loraplus_lr_ratio": 4.0}),
}


@pytest.fixture
def make(make_module):
    def make_variant(variant: str, **settings: Any) -> LoRALightningModule:
        adapter_type, options = VARIANTS[variant]
        lora = LoRAConfig(**{"rank": 4, "alpha": 8, "dropout": 0.0, **options})
        return make_module(**{"adapter_type": adapter_type, "lora": lora, "learning_rate": 2e-2, **settings})

    return make_variant


def fit(
    module: pl.LightningModule, root: Path, ckpt_path: Path | None = None, callbacks: tuple = (), **settings: Any
) -> AdapterCheckpoint:
    checkpoint = AdapterCheckpoint(str(root / "run" / "checkpoints"), monitor=None, save_every_n_steps=0)
    trainer = make_trainer(
        root,
        enable_checkpointing=True,
        callbacks=[checkpoint, *callbacks],
        **{"max_steps": 12, "max_epochs": -1, **settings},
    )
    trainer.fit(module, make_loader(ROWS, 4), make_loader(VAL_ROWS, 4), ckpt_path=ckpt_path)
    return checkpoint


def mean_loss(module: LoRALightningModule) -> float:
    with torch.no_grad(), module.compute_context():
        loss = module.training_step(collate(ROWS), 0)
    module.step_loss.clear()
    return float(loss)


def logits(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.parametrize("variant", VARIANTS)
def test_adapter_starts_at_the_base_model_learns_and_loads_with_equal_logits(
    make, variant: str, tmp_path: Path
) -> None:
    module = make(variant)
    module.configure_model()
    with module.peft_model.disable_adapter():
        base = logits(module.peft_model)
    torch.testing.assert_close(logits(module.peft_model), base, rtol=1e-4, atol=1e-4)
    module.train()
    before = mean_loss(module)
    checkpoint = fit(module, tmp_path)
    module.train()
    assert mean_loss(module) < 0.98 * before

    trained = logits(module.peft_model)
    assert (trained - base).abs().max() > 0.1
    loaded = AdapterFactory.load(checkpoint.adapter_dir, dtype="float32")
    # Factors that are saved with another rank are summed in another order.
    is_same_shape = module.adapter_type != "adalora" and not module.lora.starts_from_base
    tolerance = {"rtol": 0, "atol": 0} if is_same_shape else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(logits(loaded), trained, **tolerance)
    with module.peft_model.disable_adapter():
        assert torch.equal(logits(module.peft_model), base), "disabling the adapter does not restore the base"


@pytest.mark.parametrize(
    "variant",
    [
        "loraplus",
        "dora",
        "pissa_niter",
        "olora",
        "qlora",
        "qlora 8 bits",
        "adalora",
        "adalora loraplus",
        "miss",
        "shira",
    ],
)
@pytest.mark.e2e
def test_checkpoint_holds_only_the_adapter_and_a_resumed_run_is_bit_equal(make, variant: str, tmp_path: Path) -> None:
    uninterrupted = make(variant)
    fit(uninterrupted, tmp_path / "uninterrupted")

    class Stop(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
            trainer.should_stop = trainer.global_step == 6  # the loader does not save its position in an epoch

    fit(make(variant), tmp_path / "stopped", callbacks=(Stop(),))
    last = tmp_path / "stopped" / "run" / "checkpoints" / "last.ckpt"
    content = torch.load(last, weights_only=True)
    assert content["global_step"] == 6
    num_base = sum(p.numel() for p in uninterrupted.parameters() if not p.requires_grad)
    assert sum(t.numel() for t in content["state_dict"].values()) < 0.5 * num_base
    assert not any("base_layer" in name or "embed" in name or "norm" in name for name in content["state_dict"])

    resumed = make(variant)
    pl.seed_everything(99, verbose=False)  # the initial adapter must come from the checkpoint
    fit(resumed, tmp_path / "stopped", ckpt_path=last)
    expected, actual = uninterrupted._adapter_tensors(), resumed._adapter_tensors()
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_loraplus_gives_b_a_higher_learning_rate_than_a_throughout_the_schedule(make, tmp_path: Path) -> None:
    module = make("loraplus", warmup_steps=2)
    checkpoint = fit(module, tmp_path, max_steps=6)
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    (optimizer,) = module.trainer.optimizers
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert rates.keys() == {name for name, p in module.named_parameters() if p.requires_grad}
    assert checkpoint.adapter_dir is not None
    for name, rate in rates.items():
        assert rate == pytest.approx(4 * rates[name.replace("lora_B", "lora_A")] if "lora_B" in name else rate)
    assert len(set(rates.values())) == 2


@pytest.mark.parametrize("variant", ["qlora", "qlora 8 bits"])
def test_validation_does_not_change_gradients_through_a_quantized_base(make, variant: str, tmp_path: Path) -> None:
    module = make(variant)
    trainer = make_trainer(tmp_path)
    trainer.validate(module, make_loader(VAL_ROWS, 4), verbose=False)  # loads the model
    module.train()

    def gradients() -> list[torch.Tensor]:
        module.zero_grad()
        module.training_step(collate(ROWS), 0).backward()
        return [p.grad.clone() for p in module.parameters() if p.grad is not None]

    before = gradients()
    trainer.validate(module, make_loader(VAL_ROWS, 4), verbose=False)
    module.train()
    after = gradients()
    assert before
    assert any(gradient.any() for gradient in before)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_qlora_adapter_loads_on_its_quantized_base_or_on_the_full_base(make, tmp_path: Path) -> None:
    module = make("qlora bfloat16 storage")
    checkpoint = fit(module, tmp_path)
    assert checkpoint.adapter_dir is not None
    trained = logits(module.peft_model)
    saved = store.read_metadata(checkpoint.adapter_dir).quantization
    assert saved == {"bits": 4, "quant_type": "nf4", "double_quant": True, "storage_dtype": "bfloat16"}

    again = make("lora", adapter_path=str(checkpoint.adapter_dir))
    again.configure_model()
    assert quantization_of(again.peft_model.get_base_model()) == QuantizationConfig(storage_dtype="bfloat16")
    assert torch.equal(logits(again.peft_model), trained)
    assert again.adapter_metadata().quantization == saved

    full = make("lora", adapter_path=str(checkpoint.adapter_dir), full_precision_base=True)
    full.configure_model()
    assert quantization_of(full.peft_model.get_base_model()) is None
    assert not torch.allclose(logits(full.peft_model), trained, atol=1e-3)
    assert full.adapter_metadata().quantization == {}


def test_qlora_logs_the_size_of_the_base_before_and_after_quantization(make, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="snake_lora_pl"):
        make("qlora").configure_model()
    assert any("4-bit base" in m and m.count("MiB") == 2 for m in caplog.messages)


def test_saved_adapter_replaces_the_one_in_memory(make, tmp_path: Path) -> None:
    for variant in ("adalora", "pissa", "qlora", "miss", "shira"):
        module = make(variant)
        checkpoint = fit(module, tmp_path / variant)
        assert checkpoint.adapter_dir is not None
        trained = logits(module.peft_model)
        for parameter in module.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter)
        module.load_adapter(checkpoint.adapter_dir)
        torch.testing.assert_close(logits(module.peft_model), trained, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("adapter_type", "options", "keys"),
    [
        ("lora", {"quantization": QuantizationConfig(bits=8)}, {"model.lora.quantization"}),
        ("lora", {"adalora": ADALORA}, {"model.lora.adalora"}),
        ("qlora", {"adalora": ADALORA}, {"model.lora.adalora"}),
        (
            "adalora",
            {"use_rslora": True, "init_lora_weights": "pissa"},
            {"model.lora.use_rslora", "model.lora.init_lora_weights"},
        ),
        ("adalora", {"rank_pattern": {"q_proj": 2}}, {"model.lora.rank_pattern"}),
        ("miss", {"alpha": 8.0, "use_dora": True}, {"model.lora.alpha", "model.lora.use_dora"}),
        ("miss", {"loraplus_lr_ratio": 4.0}, {"model.lora.loraplus_lr_ratio"}),
        (
            "shira",
            {"dropout": 0.1, "init_lora_weights": "pissa"},
            {"model.lora.dropout", "model.lora.init_lora_weights"},
        ),
        ("shira", {"quantization": QuantizationConfig(bits=8)}, {"model.lora.quantization"}),
    ],
)
def test_setting_without_effect_on_the_adapter_type_is_refused(
    make_module, adapter_type: str, options: dict[str, Any], keys: set[str]
) -> None:
    with pytest.raises(UserError, match=rf"'{adapter_type}'") as error:
        make_module(adapter_type=adapter_type, lora=LoRAConfig(**options))
    assert set(re.findall(r"model\.lora\.\w+", str(error.value))) == keys


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_optimizer_of_qlora_is_paged_on_a_gpu_and_its_run_resumes(make, tmp_path: Path) -> None:
    module = make("qlora")
    fit(module, tmp_path, max_steps=6, accelerator="gpu", devices=1)
    assert type(module.trainer.optimizers[0]).__name__ == "PagedAdamW32bit"
    resumed = make("qlora")
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    fit(resumed, tmp_path, ckpt_path=last, max_steps=9, accelerator="gpu", devices=1)
    assert resumed.trainer.global_step == 9

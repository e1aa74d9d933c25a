from __future__ import annotations

import math
import multiprocessing
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor
from torchmetrics import Metric

from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.errors import UserError
from snake_lora_pl.models import repeated_layers
from snake_lora_pl.training.module import LoRALightningModule
from tests.training.conftest import PAD, collate, make_loader, make_rows, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")


def adapter_weights(module: pl.LightningModule) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}


def plain_gradients(module: pl.LightningModule, rows: list) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the gradients from whole logits with an attention mask, as the mean over all target tokens at once."""
    batch = collate(rows)
    lengths = torch.tensor([len(ids) for ids, _ in rows])
    mask = (torch.arange(batch["input_ids"].shape[1]) < lengths[:, None]).long()
    logits = module.peft_model(input_ids=batch["input_ids"], attention_mask=mask).logits
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(loss, [p for _, p in named])
    return loss.detach(), dict(zip([n for n, _ in named], grads, strict=True))


@pytest.mark.parametrize(("batch_size", "accumulate"), [(8, 1), (1, 8), (2, 4), (3, 3)])
def test_loss_and_gradient_are_means_over_all_targets_of_the_step_for_any_split_into_batches(
    make_module, tmp_path: Path, batch_size: int, accumulate: int
) -> None:
    rows = make_rows(8)
    module = make_module()
    module.configure_model()
    torch.nn.init.normal_(module.peft_model.get_base_model().model.layers[0].self_attn.q_proj.lora_B["default"].weight)
    expected_loss, expected = plain_gradients(module, rows)
    trainer = make_trainer(tmp_path, accumulate_grad_batches=accumulate)
    trainer.fit(module, make_loader(rows, batch_size))

    torch.testing.assert_close(trainer.callback_metrics["train/loss"], expected_loss, rtol=1e-5, atol=1e-6)
    norm = torch.stack([g.norm() for g in expected.values()]).norm()
    torch.testing.assert_close(trainer.callback_metrics["train/gradient_norm"], norm, rtol=1e-4, atol=1e-6)
    assert trainer.global_step == 1


def test_optimizer_steps_with_the_gradient_of_the_mean(make_module, tmp_path: Path) -> None:
    rows = make_rows(6)
    module = make_module()
    module.configure_model()
    _, expected = plain_gradients(module, rows)

    class Compare(pl.Callback):
        seen = False

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
            if trainer.global_step == 1:
                self.seen = True
                for name, parameter in module.named_parameters():
                    if parameter.requires_grad:
                        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)

    compare = Compare()
    trainer = make_trainer(tmp_path, accumulate_grad_batches=3, callbacks=[compare])
    trainer.fit(module, make_loader(rows, 2))
    assert compare.seen


def test_training_lowers_the_loss_and_changes_only_the_adapter(make_module, tmp_path: Path) -> None:
    rows = make_rows(8)
    module = make_module()
    module.configure_model()
    base_before = {n: p.clone() for n, p in module.named_parameters() if not p.requires_grad}
    first, _ = plain_gradients(module, rows)
    make_trainer(tmp_path, max_epochs=30).fit(module, make_loader(rows, 4))
    last, _ = plain_gradients(module, rows)

    assert last < first - 0.5
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            assert torch.equal(parameter, base_before[name]), name


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_every_lora_factor_is_trained_with_and_without_gradient_checkpointing(
    make_module, tmp_path: Path, gradient_checkpointing: bool
) -> None:
    module = make_module(gradient_checkpointing=gradient_checkpointing)
    module.configure_model()
    before = adapter_weights(module)
    make_trainer(tmp_path, max_epochs=2).fit(module, make_loader(make_rows(8), 4))
    unchanged = [name for name, weight in adapter_weights(module).items() if torch.equal(weight, before[name])]
    assert before
    assert not unchanged


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradient_checkpointing_trains_the_same_adapter(make_module, tmp_path: Path, dtype: str) -> None:
    results = []
    for gradient_checkpointing in (False, True):
        module = make_module(gradient_checkpointing=gradient_checkpointing, dtype=dtype)
        make_trainer(tmp_path, max_epochs=2).fit(module, make_loader(make_rows(8), 4))
        results.append(adapter_weights(module))
    for name, weight in results[0].items():
        torch.testing.assert_close(weight, results[1][name], rtol=1e-5, atol=1e-6)


def test_padding_does_not_change_hidden_states(make_module) -> None:
    module = make_module()
    module.configure_model()
    module.eval()
    short, long = make_rows(2, seed=3)
    alone = module._hidden(collate([short])["input_ids"])
    padded = module._hidden(collate([short, (long[0] * 3, long[1])])["input_ids"])[:1, : alone.shape[1]]
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-5)


class CollectText(Metric):
    """Keeps the texts of its updates."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("count", torch.tensor(0), dist_reduce_fx="sum")
        self.texts: list[tuple[str, str, str]] = []

    def update(self, prompts: list[str], targets: list[str], predictions: list[str]) -> None:
        self.texts += zip(prompts, targets, predictions, strict=True)
        self.count += len(prompts)

    def compute(self) -> dict[str, Tensor]:
        return {"rows": self.count.float(), "unreadable": torch.tensor(math.nan)}


def test_validation_metrics_weigh_all_target_tokens_and_rows_equally(make_module, tmp_path: Path) -> None:
    rows = make_rows(7)
    collect = CollectText()
    module = make_module(text_metrics=collect)
    module.configure_model()
    module.eval()
    batch = collate(rows)
    with torch.no_grad():
        logits = module.peft_model(input_ids=batch["input_ids"]).logits[:, :-1]
    labels = batch["labels"][:, 1:]
    losses = F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    is_target = labels != -100
    hits = (logits.argmax(-1) == labels) | ~is_target

    trainer = make_trainer(tmp_path)
    (result,) = trainer.validate(module, make_loader(rows, 2), verbose=False)

    expected_loss = (losses.sum() / is_target.sum()).item()
    assert result["val/loss"] == pytest.approx(expected_loss, rel=1e-5)
    assert result["val/perplexity"] == pytest.approx(math.exp(expected_loss), rel=1e-4)
    assert result["val/token_accuracy"] == pytest.approx(hits[is_target].float().mean().item())
    assert result["val/exact_match"] == pytest.approx(hits.all(dim=1).float().mean().item())
    assert result["val/rows"] == len(rows)
    assert "val/unreadable" not in result
    decode = module.tokenizer.decode
    for (prompt, target, _), (ids, num_prompt) in zip(collect.texts, rows, strict=True):
        assert prompt == decode(ids[:num_prompt], skip_special_tokens=True)
        assert target == decode(ids[num_prompt:], skip_special_tokens=True)


def test_run_stopped_by_max_steps_ends_with_a_validation(make_module, tmp_path: Path) -> None:
    module = make_module()
    trainer = make_trainer(tmp_path, max_steps=2, max_epochs=-1, num_sanity_val_steps=0)
    trainer.fit(module, make_loader(make_rows(32), 2), make_loader(make_rows(4, seed=9), 2))
    assert trainer.global_step == 2
    assert "val/loss" in trainer.callback_metrics


def test_predict_generates_greedy_completions_independent_of_padding(make_module, tmp_path: Path) -> None:
    module = make_module(max_new_tokens=6)
    module.configure_model()
    module.eval()
    prompts = [ids for ids, _ in make_rows(3)]
    batch = {"input_ids": prompts, "prompts": ["a", "b", "c"], "sources": ["f:1", "f:2", "f:3"]}
    together = module.predict_step(batch, 0)
    for i, ids in enumerate(prompts):
        text = []
        tokens = list(ids)
        for _ in range(6):
            with torch.no_grad():
                token = int(module.peft_model(input_ids=torch.tensor([tokens])).logits[0, -1].argmax())
            if token == module.tokenizer.eos_token_id:
                break
            tokens.append(token)
            text.append(token)
        assert together[i]["completion"] == module.tokenizer.decode(text, skip_special_tokens=True)
    assert [row["source"] for row in together] == ["f:1", "f:2", "f:3"]


def test_bfloat16_base_has_a_float32_adapter_and_nearly_the_float32_loss(make_module) -> None:
    batch = collate(make_rows(6))
    losses = []
    for dtype in ("float32", "bfloat16"):
        module = make_module(dtype=dtype)
        module.configure_model()
        assert {p.dtype for p in module.parameters() if p.requires_grad} == {torch.float32}
        loss = module.training_step(batch, 0)
        loss.backward()
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in module.parameters() if p.requires_grad)
        losses.append(loss.detach())
    torch.testing.assert_close(losses[1], losses[0], rtol=2e-2, atol=0)


def test_final_eos_is_a_target_even_if_it_is_the_pad_token(make_module) -> None:
    module = make_module()
    module.configure_model()
    assert module.tokenizer.eos_token_id == PAD
    rows = [([5, 6, 7, PAD], 2), ([5, 6, 7, 8, 9, PAD], 2)]
    module.training_step(collate(rows), 0)
    assert int(module.step_loss.micro_batches[0].num_targets) == 2 + 4


def test_number_of_trained_parameters_is_logged(make_module, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="snake_lora_pl"):
        make_module(lora=LoRAConfig()).configure_model()
    assert any("parameters" in message and "%" in message for message in caplog.messages)


@pytest.mark.parametrize("share_prefix", [False, True])
def test_fused_layers_train_the_same_adapter_as_the_models_own(make_module, tmp_path: Path, share_prefix: bool) -> None:
    rows = make_rows(8)
    if share_prefix:
        rows = [([5, 6, 7, 8, *ids], prompt + 4) for ids, prompt in rows]
    weights, losses = [], []
    for fused_layers in ("always", "never"):
        module = make_module(fused_layers=fused_layers)
        trainer = make_trainer(tmp_path, max_epochs=3, accumulate_grad_batches=2)
        trainer.fit(module, make_loader(rows, 2), make_loader(rows, 3))
        assert (module.packs_rows) == (fused_layers == "always")
        weights.append(adapter_weights(module))
        losses.append({k: v for k, v in trainer.callback_metrics.items() if k.startswith(("train", "val"))})
    for name, weight in weights[0].items():
        torch.testing.assert_close(weight, weights[1][name], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-5)


def test_obstacle_to_fused_layers_is_an_error_if_they_are_required(make_module) -> None:
    module = make_module(fused_layers="always")
    module.configure_model()
    module.peft_model.base_model.disable_adapter_layers()
    with pytest.raises(UserError, match=r"model\.fused_layers.*always.*auto"):
        module._fuse()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_compiled_layers_train_the_same_adapter(tiny_llama_dir: Path, tmp_path: Path) -> None:
    # In another process: setuptools, which the compiler's front end imports, refuses to be imported after the standard
    # library's distutils.
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        losses = [
            pool.submit(_loss_of_own_layers, str(tiny_llama_dir), tmp_path, compiled).result()
            for compiled in (True, False)
        ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def _loss_of_own_layers(base_model: str, directory: Path, compiled: bool) -> float:
    pl.seed_everything(7, verbose=False)
    module = LoRALightningModule(
        base_model, lora=LoRAConfig(rank=4, alpha=8, dropout=0.0), dtype="float32", learning_rate=1e-2, warmup_steps=0,
        compile_layers=compiled, fused_layers="auto" if compiled else "never",
    )  # fmt: skip
    trainer = make_trainer(directory, max_epochs=2)
    trainer.fit(module, make_loader(make_rows(6), 3))
    layers = repeated_layers(module.peft_model.get_base_model())
    assert all((layer._compiled_call_impl is not None) == compiled for layer in layers)
    return float(trainer.callback_metrics["train/loss"])


def test_peft_model_before_configure_model_is_a_clear_error(make_module) -> None:
    with pytest.raises(RuntimeError, match="configure_model"):
        _ = make_module().peft_model

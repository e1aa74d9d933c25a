"""AdaLoRA in a training loop, compared with PEFT's implementation where possible."""

from __future__ import annotations

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
from snake_lora_pl.training.callbacks.adapter_checkpoint import AdapterCheckpoint
from snake_lora_pl.training.module import LoRALightningModule
from tests.training.conftest import collate, make_loader, make_rows, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")

ROWS = make_rows(12)
IDS = collate(ROWS)["input_ids"]
NUM_LAYERS = 8  # four projections in two blocks


@pytest.fixture
def make(tiny_llama_dir: Path):
    def make_adalora(adapter_path: str | None = None, **adalora: Any) -> LoRALightningModule:
        pl.seed_everything(7, verbose=False)
        adalora = {"initial_steps": 2, "final_steps": 4, **adalora}
        lora = LoRAConfig(rank=4, alpha=8, dropout=0.0, adalora=AdaLoRAConfig(**adalora))
        return LoRALightningModule(
            str(tiny_llama_dir), "adalora", lora, 2e-2, warmup_steps=0, dtype="float32", adapter_path=adapter_path
        )

    return make_adalora


class Watch(pl.Callback):
    """Records the metrics of each optimizer step and the number of nonzero singular values after it."""

    def __init__(self, stop_at: int | None = None) -> None:
        self.logged: list[dict[str, float]] = []
        self.nonzero: list[int] = []
        self.stop_at = stop_at

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
        if trainer.global_step > len(self.logged):
            self.logged.append({name: float(value) for name, value in trainer.callback_metrics.items()})
            self.nonzero.append(sum(int(values.count_nonzero()) for values in singular_values(module.peft_model)))
        if trainer.global_step == self.stop_at:
            trainer.should_stop = True


def singular_values(model: PeftModel) -> list[torch.Tensor]:
    return [p.detach() for name, p in model.named_parameters() if ".lora_E." in name]


def fit(module: LoRALightningModule, root: Path, *callbacks: pl.Callback, **settings: Any) -> AdapterCheckpoint:
    ckpt_path = settings.pop("ckpt_path", None)
    checkpoint = AdapterCheckpoint(str(root / "run" / "checkpoints"), monitor=None)
    settings = {"max_steps": 12, "max_epochs": -1, **settings}
    trainer = make_trainer(root, enable_checkpointing=True, callbacks=[checkpoint, *callbacks], **settings)
    # A plain loader keeps no position; a checkpoint written after an epoch's validation needs none.
    trainer.fit(module, make_loader(ROWS, 4), make_loader(ROWS[:4], 4), ckpt_path=ckpt_path)
    return checkpoint


def logits(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def test_regularizer_equals_the_term_that_peft_adds_to_the_loss(make) -> None:
    module = make(orthogonal_weight=0.7)
    module.configure_model()
    model = module.peft_model
    module._adapter_hooks.start(model, module.lora, 12)
    peft_loss = model(input_ids=IDS, labels=IDS).loss
    plain_loss = model.get_base_model()(input_ids=IDS, labels=IDS).loss
    regularizer = module._adapter_hooks.regularizer(model)
    torch.testing.assert_close(regularizer, peft_loss - plain_loss, rtol=1e-4, atol=1e-5)
    assert regularizer > 0.1


@pytest.mark.parametrize("accumulate", [1, 3])
def test_gradient_is_that_of_mean_loss_plus_regularizer_for_any_accumulation(
    make, tmp_path: Path, accumulate: int
) -> None:
    module = make()
    module.configure_model()
    # E is initialized to zero, which makes all gradients zero except that of E.
    for name, parameter in module.named_parameters():
        if ".lora_E." in name:
            torch.nn.init.normal_(parameter)
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    batch = collate(ROWS)
    out = module.peft_model.get_base_model()(input_ids=batch["input_ids"])
    loss = torch.nn.functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    regularizer = module._adapter_hooks.regularizer(module.peft_model)
    expected = dict(zip(named, torch.autograd.grad(loss + regularizer, named.values()), strict=True))

    class Compare(pl.Callback):
        seen = False

        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *args: Any) -> None:
            if trainer.global_step == 1 and not self.seen:
                self.seen = True
                for name, parameter in named.items():
                    torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)

    compare = Compare()
    trainer = make_trainer(
        tmp_path, max_steps=8, max_epochs=-1, accumulate_grad_batches=accumulate, callbacks=[compare]
    )
    trainer.fit(module, make_loader(ROWS, 12 // accumulate))
    assert compare.seen


def test_losses_exclude_the_regularizer_which_is_logged_separately(make, tmp_path: Path) -> None:
    losses = []
    for weight in (0.0, 5.0):
        module, watch = make(orthogonal_weight=weight), Watch()
        trainer = make_trainer(tmp_path, max_steps=8, max_epochs=-1, callbacks=[watch])
        trainer.fit(module, make_loader(ROWS, 12))
        (validated,) = trainer.validate(make(orthogonal_weight=weight), make_loader(ROWS, 4), verbose=False)
        losses.append((watch.logged[0]["train/loss"], validated["val/loss"]))
        assert ("train/regularizer" in watch.logged[0]) == (weight > 0)
    assert losses[0] == losses[1]
    assert losses[0][0] == pytest.approx(losses[0][1], rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_ranks_decrease_from_the_initial_to_the_target_budget_in_optimizer_steps(
    make, tmp_path: Path, accumulate: int
) -> None:
    watch = Watch()
    fit(make(initial_rank=6), tmp_path, watch, accumulate_grad_batches=accumulate)
    budgets = [logged["train/rank_budget"] for logged in watch.logged]
    assert len(budgets) == 12
    assert budgets[:2] == [6 * NUM_LAYERS] * 2
    assert budgets[2] < budgets[1]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[7:] == [4 * NUM_LAYERS] * 5
    for budget, logged, nonzero in zip(budgets, watch.logged, watch.nonzero, strict=True):
        assert logged["train/rank"] == budget
        # The step prunes before other callbacks see the model.
        assert nonzero <= budget
    assert watch.nonzero[-1] == 4 * NUM_LAYERS


# Before, during and after pruning.
@pytest.mark.parametrize("stop_at", [3, 6, 9])
@pytest.mark.e2e
def test_resumed_run_is_bit_identical_in_every_phase(make, tmp_path: Path, stop_at: int) -> None:
    schedule = {"initial_steps": 4, "final_steps": 4, "allocate_every_n_steps": 2}
    straight = make(**schedule)
    fit(straight, tmp_path / "straight")
    fit(make(**schedule), tmp_path / "stopped", Watch(stop_at))
    last = tmp_path / "stopped" / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == stop_at
    resumed = make(**schedule)
    fit(resumed, tmp_path / "stopped", ckpt_path=last)
    ours, theirs = straight._adapter_tensors(), resumed._adapter_tensors()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert ours.keys() == theirs.keys()
    patterns = [m.peft_model.peft_config["default"].rank_pattern for m in (straight, resumed)]
    assert patterns[0] == patterns[1]


def test_resume_restores_importance_scores(make, tmp_path: Path) -> None:
    """In a small model, ranks can agree although the scores differ."""
    schedule = {"initial_steps": 4, "final_steps": 4}
    straight = make(**schedule)
    fit(straight, tmp_path / "straight", Watch(7))
    fit(make(**schedule), tmp_path / "stopped", Watch(6))
    resumed = make(**schedule)
    last = tmp_path / "stopped" / "run" / "checkpoints" / "last.ckpt"
    fit(resumed, tmp_path / "stopped", Watch(7), ckpt_path=last)
    ours, theirs = (module._adapter_hooks.state(module.peft_model) for module in (straight, resumed))
    assert ours["schedule"] == theirs["schedule"]
    assert ours["rank_pattern"] == theirs["rank_pattern"]
    assert ours["scores"].keys() == {"ipt", "exp_avg_ipt", "exp_avg_unc"}
    for key, scores in ours["scores"].items():
        assert len(scores) == 3 * NUM_LAYERS
        assert all(torch.equal(theirs["scores"][key][name], score) for name, score in scores.items())


def test_longer_resumed_run_keeps_the_original_schedule(make, tmp_path: Path) -> None:
    fit(make(), tmp_path, Watch(6))
    watch = Watch()
    resumed = make()
    fit(resumed, tmp_path, watch, ckpt_path=tmp_path / "run" / "checkpoints" / "last.ckpt", max_steps=14)
    assert watch.logged[0]["train/rank_budget"] == 4 * NUM_LAYERS  # step 7, as in a run of 12 steps
    assert resumed.peft_model.peft_config["default"].total_step == 12


@pytest.mark.parametrize("stop_at", [1, 5, 7, 12])
def test_adapter_saved_in_any_phase_loads_with_equal_logits(make, tmp_path: Path, stop_at: int) -> None:
    module = make(allocate_every_n_steps=3)
    checkpoint = fit(module, tmp_path, Watch(stop_at))
    assert checkpoint.adapter_dir is not None
    trained = logits(module.peft_model)
    loaded = AdapterFactory.load(checkpoint.adapter_dir, dtype="float32")
    torch.testing.assert_close(logits(loaded), trained, rtol=1e-4, atol=1e-4)


def test_saved_adapter_has_the_remaining_ranks_even_if_a_layer_has_none(make, tmp_path: Path) -> None:
    module = make(initial_rank=8)
    checkpoint = fit(module, tmp_path)
    assert checkpoint.adapter_dir is not None
    values = singular_values(module.peft_model)
    values[0].zero_()
    store.save(module.peft_model, checkpoint.adapter_dir, store.read_metadata(checkpoint.adapter_dir))
    loaded = AdapterFactory.load(checkpoint.adapter_dir, dtype="float32")
    ranks = [len(v) for v in singular_values(loaded)]
    assert ranks == [int(v.count_nonzero()) for v in values]
    assert ranks[0] == 0
    assert len(set(ranks)) > 1
    torch.testing.assert_close(logits(loaded), logits(module.peft_model), rtol=1e-4, atol=1e-4)


def test_untrained_adapter_can_be_saved_and_trained(make, tmp_path: Path) -> None:
    module = make()
    module.configure_model()
    store.save(module.peft_model, tmp_path / "a", module.adapter_metadata())
    again = make(adapter_path=str(tmp_path / "a"))
    watch = Watch()
    fit(again, tmp_path, watch)
    assert watch.logged[-1]["train/rank_budget"] == 4 * NUM_LAYERS


def test_further_training_of_a_finished_adapter_keeps_its_ranks(
    make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = make()
    first_dir = fit(first, tmp_path / "first").adapter_dir
    assert first_dir is not None
    second = make(adapter_path=str(first_dir))
    second.configure_model()
    torch.testing.assert_close(logits(second.peft_model), logits(first.peft_model), rtol=1e-4, atol=1e-4)
    second.train()
    before = [v.clone() for v in singular_values(second.peft_model)]
    # Too short for a schedule, but final ranks need none.
    second_dir = fit(second, tmp_path / "second", max_steps=3).adapter_dir
    assert second_dir is not None
    with caplog.at_level("INFO", logger="snake_lora_pl"):
        fit(make(adapter_path=str(first_dir)), tmp_path / "third", max_steps=1)
    assert any("adalora" in m and f"step 12 in {first_dir}" in m for m in caplog.messages)
    after = singular_values(second.peft_model)
    assert [len(v) for v in after] == [len(v) for v in before]
    assert not any(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    loaded = AdapterFactory.load(second_dir, dtype="float32")
    assert torch.equal(logits(loaded), logits(second.peft_model))


@pytest.mark.e2e
def test_resumed_run_with_final_ranks_is_bit_identical(make, tmp_path: Path) -> None:
    first_dir = fit(make(), tmp_path / "first").adapter_dir
    straight = make(adapter_path=str(first_dir))
    fit(straight, tmp_path / "straight", max_steps=6)
    fit(make(adapter_path=str(first_dir)), tmp_path / "stopped", Watch(3), max_steps=6)
    last = tmp_path / "stopped" / "run" / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 3
    resumed = make(adapter_path=str(first_dir))
    fit(resumed, tmp_path / "stopped", ckpt_path=last, max_steps=6)
    ours, theirs = straight._adapter_tensors(), resumed._adapter_tensors()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("adalora", "steps", "message"),
    [
        (
            {"initial_steps": 8, "final_steps": 4},
            12,
            "8 .* 4 .* 12 .* at least 13 steps",
        ),
        ({"initial_steps": None, "final_steps": None}, 1, r" 1 steps.* at least 2 steps .*max_epochs\)\.$"),
        (
            {"initial_steps": 20, "final_steps": None},
            12,
            r"20 .* 5 .* 12 .*model.lora.adalora.initial_steps\.$",
        ),
    ],
)
def test_run_too_short_for_its_phases_is_rejected_with_the_minimum(
    make, adalora: dict[str, Any], steps: int, message: str
) -> None:
    module = make(**adalora)
    module.configure_model()
    with pytest.raises(UserError, match=message):
        module._adapter_hooks.start(module.peft_model, module.lora, steps)


def test_schedule_follows_the_length_of_the_run_in_the_trainer(make, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r" 4 .* run of 6 "):
        fit(make(), tmp_path, max_steps=-1, max_epochs=2)
    module = make(initial_steps=None, final_steps=None)
    fit(module, tmp_path, max_steps=-1, max_epochs=4)
    config = module.peft_model.peft_config["default"]
    assert (config.total_step, config.tinit, config.tfinal) == (12, 1, 5)


def test_time_limit_requires_a_number_of_steps(make, tmp_path: Path) -> None:
    limit = {"max_time": "00:01:00:00"}
    with pytest.raises(UserError, match=r"trainer\.max_time.*trainer\.max_steps"):
        fit(make(), tmp_path, max_steps=-1, max_epochs=4, **limit)
    module = make()
    fit(module, tmp_path, **limit)
    assert module.peft_model.peft_config["default"].total_step == 12


def test_run_that_ends_before_its_ranks_reach_the_target_logs_a_warning(
    make, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fit(make(initial_rank=6), tmp_path, Watch(5))
    assert any("step 5" in m and "step 8" in m for m in caplog.messages)
    caplog.clear()
    fit(make(), tmp_path)
    assert not any("--ckpt_path last" in m for m in caplog.messages)


def test_all_invalid_settings_are_reported_at_once() -> None:
    with pytest.raises(UserError, match="initial_steps.*final_steps.*allocate_every_n_steps.*beta1.*beta2"):
        AdaLoRAConfig(initial_steps=-1, final_steps=-1, allocate_every_n_steps=0, beta1=0.0, beta2=1.0)
    with pytest.raises(UserError, match="adalora.initial_rank.*4.*4"):
        LoRAConfig(rank=4, adalora=AdaLoRAConfig(initial_rank=4))


def test_shortest_allowed_run_reaches_the_target(make, tmp_path: Path) -> None:
    watch = Watch()
    fit(make(initial_steps=None, final_steps=None, initial_rank=6), tmp_path, watch, max_steps=2)
    assert watch.nonzero[-1] == 4 * NUM_LAYERS


def test_dry_run_of_one_step_does_not_require_a_long_run(make, tmp_path: Path) -> None:
    module = make(initial_steps=20, final_steps=20)
    trainer = make_trainer(tmp_path, fast_dev_run=True)
    trainer.fit(module, make_loader(ROWS, 4))
    assert trainer.global_step == 1

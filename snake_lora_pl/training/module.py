"""LoRALightningModule: one optimization step of an adapter on a frozen causal language model.

It knows nothing of Snake: what reads moves reaches it as ``text_metrics``. It never reads a file of rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Timer
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import Metric
from torchmetrics.aggregation import MeanMetric

from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.adapter_type import AdapterType, adapter_tensors
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.factory import AdapterFactory
from snake_lora_pl.collectives import gather_objects
from snake_lora_pl.constants import DEFAULT_BASE_MODEL
from snake_lora_pl.errors import UserError, one_line
from snake_lora_pl.models import BaseModelSpec, choose_dtype, load_tokenizer, repeated_layers, resolve_base_model
from snake_lora_pl.models.quantization import compute_dtype, quantization_of
from snake_lora_pl.models.transformers_internals import commit_hash
from snake_lora_pl.training.allocator import give_back_freed_memory, keep_freed_memory
from snake_lora_pl.training.float16 import is_scaled, scale_gradients
from snake_lora_pl.training.fused import FusedDecoder, fusion_obstacle
from snake_lora_pl.training.loss import Targets, completion_loss, completion_predictions, select_targets
from snake_lora_pl.training.packing import pack
from snake_lora_pl.training.resume.checkpoint_state import explain_damage
from snake_lora_pl.training.sharding import (
    FullyShardedStrategy,
    check_strategy,
    is_sharded,
    load_saved,
    local_parts,
    shard,
    total_norm,
)
from snake_lora_pl.training.step_watch import OnNonfinite, StepWatch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from peft import PeftModel

    from snake_lora_pl.models import BaseModelSource

logger = logging.getLogger(__name__)

_REHEARSED_STEPS = 10_000
_MOST_TOKENS = 2**20  # to write in one go, or to hold logits of
# Settings of the product's scale, and what PEFT calls them.
_SCALES = {"alpha": "lora_alpha", "use_rslora": "use_rslora", "alpha_pattern": "alpha_pattern"}


class LoRALightningModule(pl.LightningModule):
    """Trains an adapter on prompt/completion batches; the loss covers completions only.

    Args:
        base_model: Short name, local directory or hub id of the model underneath.
        adapter_type: Adapter type, as registered in ``AdapterFactory``.
        lora: Rank, scale, dropout and layers of the adapter, and what its adapter type needs.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay of AdamW on the adapter's parameters.
        betas: Decay rates of AdamW's two moments.
        warmup_steps: Optimizer steps over which the learning rate rises linearly; at most a tenth of the run is used.
        final_learning_rate_fraction: Share of the peak that the cosine ends on. It runs over the steps of the run, or
            over ``trainer.max_time`` where that ends first.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about 1.5 times slower.
        dtype: Type that the frozen base computes in: ``auto`` (bfloat16 where the hardware computes it fast, else
            float32), ``float32``, ``bfloat16`` or ``float16``, whose gradients are scaled. The adapter itself stays in
            float32.
        adapter_path: Adapter directory to start from instead of a fresh adapter; ``adapter_type`` and ``lora`` are
            then read from it.
        full_precision_base: Load the base unquantized for an ``adapter_path`` that was trained on a quantized one.
        revision: Commit, branch or tag of a hub model.
        trust_remote_code: Whether code that comes with a hub model may run.
        max_new_tokens: Longest completion that ``predict`` writes, in tokens.
        loss_chunk_tokens: Target tokens whose logits are alive at a time.
        fused_layers: ``auto`` runs the layers over packed rows, with forward and backward passes written out for a
            frozen base, where architecture and adapter allow it, and the model's own code elsewhere (the log says
            why); ``always`` makes the latter an error; ``never`` runs the model's own code.
        compile_layers: Compile the model's own layers with ``torch.compile``: minutes at the start, for a long run on
            a GPU. ``data.pad_to_multiple_of`` at ``data.max_length`` gives every batch one shape. Excludes fused
            layers.
        on_nonfinite: What becomes of a step whose loss or gradient is not finite: ``error`` names its rows and stops,
            ``skip`` leaves it out and counts it in ``train/skipped_steps``; ten in a row stop the run all the same. In
            validation ``error`` does the same, ``skip`` leaves out what is not finite and names its rows.
        text_metrics: Metrics that read text: ``update(prompts, targets, predictions)`` takes three lists of strings
            and ``compute()`` returns a dict of scalars, logged as ``val/NAME``; a NaN says that nothing could be read.
    """

    def __init__(
        self,
        base_model: str = DEFAULT_BASE_MODEL,
        adapter_type: str = "lora",
        lora: LoRAConfig = LoRAConfig(),  # noqa: B008 - jsonargparse reads the default; it is copied below
        learning_rate: float = 2e-4,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
        warmup_steps: int = 20,
        final_learning_rate_fraction: float = 0.1,
        gradient_checkpointing: bool = False,
        dtype: str = "auto",
        adapter_path: str | None = None,
        full_precision_base: bool = False,
        revision: str | None = None,
        trust_remote_code: bool = False,
        max_new_tokens: int = 192,
        loss_chunk_tokens: int = 512,
        fused_layers: Literal["auto", "always", "never"] = "auto",
        compile_layers: bool = False,
        on_nonfinite: OnNonfinite = "error",
        text_metrics: Metric | None = None,
    ) -> None:
        super().__init__()
        _check_settings(learning_rate, weight_decay, warmup_steps, final_learning_rate_fraction, adapter_type, betas,
                        max_new_tokens=max_new_tokens, loss_chunk_tokens=loss_chunk_tokens)  # fmt: skip
        AdapterFactory.get_adapter_type(adapter_type).check(adapter_type, lora)
        self.base_model = base_model
        self.adapter_type = adapter_type
        self.lora = lora
        self.learning_rate = learning_rate
        self.weight_decay = weight_decay
        self.betas = betas
        self.warmup_steps = warmup_steps
        self.final_learning_rate_fraction = final_learning_rate_fraction
        self.gradient_checkpointing = gradient_checkpointing
        self.dtype_name = dtype
        self.adapter_path = adapter_path
        self.full_precision_base = full_precision_base
        self.revision = revision
        self.trust_remote_code = trust_remote_code
        self.max_new_tokens = max_new_tokens
        self.loss_chunk_tokens = loss_chunk_tokens
        self.fused_layers = fused_layers
        self.compile_layers = compile_layers
        self.on_nonfinite = on_nonfinite
        self.text_metrics = text_metrics

        self._fused: FusedDecoder | None = None
        self.model: PeftModel | None = None
        self.tokenizer: Any = None
        self.val_loss = MeanMetric()
        self.val_token_accuracy = MeanMetric()
        self.val_exact_match = MeanMetric()
        # Adapter checkpoints hold no base weights; on_load_checkpoint checks that every adapter key is there.
        self.strict_loading = False
        self._adapter_state: dict[str, Any] | None = None
        self.watch = StepWatch(on_nonfinite)
        self._bad_val_rows: list[str] = []

    # ------------------------------------------------------------------ the model

    def configure_model(self) -> None:
        """Load the base and put the adapter on it, once; every process calls this after the data is prepared."""
        if self.model is not None:
            return
        if self._trainer is not None:
            check_strategy(self._trainer.strategy)
        options: dict[str, Any] = {
            "dtype": self.dtype_name if self.dtype_name != "auto" else self._auto_dtype_name(),
            "device": self._root_device,
        }
        self.tokenizer = load_tokenizer(self.base_spec)
        if self.adapter_path is not None:
            metadata = store.read_metadata(self.adapter_path)
            self.adapter_type = metadata.adapter_type
            self.model = AdapterFactory.load(
                self.adapter_path,
                self.base_spec,
                is_trainable=True,
                full_precision_base=self.full_precision_base,
                **options,
            )
            if self._trainer is not None and self._trainer.state.fn == "fit":
                logger.info(
                    "Training on from the %s adapter of step %d in %s: type, ranks and layers are read from it, "
                    "whatever model.adapter_type and model.lora say",
                    metadata.adapter_type, metadata.step, self.adapter_path,
                )  # fmt: skip
        else:
            self.model = AdapterFactory.create(self.adapter_type, self.base_spec, self.lora, **options)
        self.prepare_for_training()
        self._check_head()
        if self._sharding is not None:
            self._check_shardable()
            shard(self.model, self._sharding)
        if self._trainer is not None and self._trainer.state.fn == "fit" and self._compute_dtype == torch.float16:
            scale_gradients(self._trainer)

    @property
    def base_spec(self) -> BaseModelSpec:
        """The base model to load."""
        return BaseModelSpec(self.base_model, self.revision, self.trust_remote_code)

    @property
    def _sharding(self) -> FullyShardedStrategy | None:
        strategy = self._trainer.strategy if self._trainer is not None else None
        return strategy if isinstance(strategy, FullyShardedStrategy) else None

    def prepare_for_training(self) -> None:
        """Set up, once the model is there, what does not depend on its weights."""
        # Weights load in eval mode; Lightning keeps the mode it finds.
        self.peft_model.train()
        self._fused = self._fuse()
        if self._fused is None:
            self._prepare_own_layers()

    def _fuse(self) -> FusedDecoder | None:
        if self.fused_layers == "never" or self.compile_layers:
            return None
        obstacle = "processes share its weights in slices" if self._sharding else fusion_obstacle(self.peft_model)
        if obstacle is None:
            return FusedDecoder(self.peft_model, gradient_checkpointing=self.gradient_checkpointing)
        if self.fused_layers == "always":
            raise UserError(f"model.fused_layers is 'always', but {obstacle}. Set it to 'auto'.")
        logger.info("The model's own layers are trained, not fused ones: %s", obstacle)
        return None

    def _prepare_own_layers(self) -> None:
        if self.gradient_checkpointing:
            self.peft_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            # The frozen embedding's output needs a gradient, or a checkpointed layer has no input that does and its
            # adapter stays untrained.
            self.peft_model.enable_input_require_grads()
        if self.compile_layers:
            # Layer by layer: they are alike, so that one compilation serves them all.
            for layer in repeated_layers(self.peft_model.get_base_model()):
                layer.compile()

    def _check_shardable(self) -> None:
        """Refuse what does not work in slices: a base in 8 bits, and an adapter of which a part is not trained.

        bitsandbytes finds its 8-bit weights by an attribute that slices do not have; its 4-bit layers are made for
        slices, of any storage type. And only what is trained is gathered from slices and saved.
        """
        quantization = quantization_of(self.peft_model.get_base_model())
        if quantization is not None and quantization.bits == 8:
            raise UserError(
                "trainer.strategy: a base in 8 bits cannot be cut into slices. Use --config ddp.yaml, or "
                "--model.lora.quantization.bits=4, which can."
            )
        frozen = [name for name, tensor in adapter_tensors(self.peft_model).items() if not tensor.requires_grad]
        if frozen:
            raise UserError(
                f"trainer.strategy: this adapter ({self.adapter_type}, init_lora_weights="
                f"{self.lora.init_lora_weights}) cannot be cut into slices: {frozen[0]} is not trained and would not "
                "be saved. Use --config ddp.yaml."
            )

    def load_adapter(self, adapter_dir: str | os.PathLike[str]) -> None:
        """Put a saved adapter in the place of the one in memory; the base stays as it is loaded."""
        if is_sharded(self.peft_model):
            load_saved(self.peft_model, adapter_dir)
            return
        # Anew, not the weights alone: what is saved may differ in shape from what was trained.
        base = self.peft_model.unload()
        self.model = AdapterFactory.load(adapter_dir, base).to(self.device)
        self._fused = self._fuse()

    @property
    def _adapter_hooks(self) -> AdapterType:
        return AdapterFactory.get_adapter_type(self.adapter_type)

    @property
    def _root_device(self) -> torch.device | None:
        return self.trainer.strategy.root_device if self._trainer is not None else None

    def _auto_dtype_name(self) -> str:
        device = self._root_device
        return str(choose_dtype("auto", None if device is None else device.type)).removeprefix("torch.")

    @property
    def peft_model(self) -> PeftModel:
        """The wrapped model; there once ``configure_model`` has run."""
        if self.model is None:
            raise RuntimeError("The model is loaded by configure_model(); call it, or let a Trainer call it, first.")
        return self.model

    def _check_head(self) -> None:
        """Refuse a model whose logits are not its output head applied to its last hidden state.

        A few architectures scale or cap their logits on the way; training past that would optimize another function.
        What is compared is the path that training takes.
        """
        model = self.peft_model
        ordinary = {*self.tokenizer.get_vocab().values()} - {*self.tokenizer.all_special_ids}
        num_ids = 1 + max(self.tokenizer.eos_token_id, self.tokenizer.pad_token_id, *ordinary)
        if num_ids > (num_rows := model.get_input_embeddings().weight.shape[0]):
            raise UserError(
                f"model.base_model {self.base_model}: its tokenizer knows {num_ids:,} tokens, its weights have "
                f"room for {num_rows:,}. They are not of one model: copy its files again, all of them."
            )
        was_training = model.training
        model.eval()
        # Spread over the vocabulary: the first ids are often special tokens, on which a trained adapter's states are so
        # large that 16 bits say nothing of the logits.
        ids = torch.tensor([[1, 2, 3, 4], [1, 2, 5, 6]], device=self._head.weight.device) * (
            len(self._head.weight) // 8
        )
        with torch.no_grad(), self.compute_context():
            own = self._head(self._target_states({"input_ids": ids, "labels": ids}, select_targets(ids)))
            whole = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1)
        model.train(was_training)
        if not whole.isfinite().all():
            damaged = f"--adapter {self.adapter_path}" if self.adapter_path else f"model.base_model {self.base_model}"
            raise UserError(
                f"{damaged}: the model's logits are not finite, so its weights are damaged or overflow in "
                f"{str(self._compute_dtype).removeprefix('torch.')}. Copy its files again, or set model.dtype=float32."
            )
        # The two sum in another order. In 16 bits single positions may differ by their whole size, but most do not.
        tolerance = 1e-3 if own.dtype == torch.float32 else 0.1
        difference = (own - whole).float().norm(dim=-1) / whole.float().norm(dim=-1)
        if not difference.median() <= tolerance:
            raise UserError(
                f"model.base_model {self.base_model}: {type(model.get_base_model()).__name__} changes its logits after "
                "the output head (a soft cap or a scale), which this trainer does not support. Choose another base."
            )

    @property
    def _head(self) -> Any:
        return self.peft_model.get_base_model().get_output_embeddings()

    def _target_states(self, batch: dict[str, Any], targets: Targets) -> Tensor:
        """Hidden state that predicts each target; shape (num_targets, hidden_size)."""
        if self._fused is None:
            return self._hidden(batch["input_ids"])[:, :-1][targets.mask]
        packed = batch["packed"] if "packed" in batch else pack(batch["input_ids"], batch["labels"])
        if packed is None:  # no row here carries loss; a graph there must be, for the gradients' exchange
            zero = sum(
                (p.sum() * 0.0 for p in self.parameters() if p.requires_grad), torch.zeros((), device=self.device)
            )
            return zero.expand(0, self._head.in_features)
        return self._fused.target_states(packed)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Lay the rows end to end while they are still on the CPU: it takes sizes that only their content tells."""
        if self._fused is not None and "labels" in batch:
            batch["packed"] = pack(batch["input_ids"], batch["labels"])
        return batch

    def _hidden(self, input_ids: Tensor) -> Tensor:
        """Last hidden state, shape (batch, length, hidden_size).

        No attention mask goes in: rows are padded on the right and attention is causal, so no real token can see
        padding, and without a mask scaled-dot-product attention stays on its fast causal path.
        """
        return self.peft_model.get_base_model().base_model(input_ids=input_ids, use_cache=False).last_hidden_state

    @property
    def _compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.peft_model.get_base_model())

    @contextlib.contextmanager
    def compute_context(self) -> Iterator[None]:
        """Compute in the base's type while the adapter's weights stay in float32."""
        dtype = self._compute_dtype
        if dtype == torch.float32:
            yield
            return
        with torch.autocast(self._head.weight.device.type, dtype=dtype), self._without_casts():
            yield

    @contextlib.contextmanager
    def _without_casts(self) -> Iterator[None]:
        """Leave it to autocast, not to PEFT, in which type an adapter computes."""
        from peft.helpers import disable_input_dtype_casting

        if self._compute_dtype == torch.float32:
            yield
            return
        # Without autocast PEFT would cast every adapter's input to float32 and its product back.
        with disable_input_dtype_casting(self.peft_model):
            yield

    # ------------------------------------------------------------------ training

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the *sum* of the loss over the micro-batch's target tokens; ``on_before_optimizer_step`` divides."""
        targets = select_targets(batch["labels"])
        with self.compute_context():
            hidden = self._target_states(batch, targets)
            loss = completion_loss(hidden, targets.token_ids, self._head, self.loss_chunk_tokens)
        self.watch.add(loss, targets.mask.sum(), batch["sources"])
        return loss

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """As Lightning does; checkpointed layers, which compute again here, find the settings of the forward pass."""
        # torch.utils.checkpoint restores autocast's state but knows nothing of PEFT's.
        with self._without_casts():
            super().backward(loss, *args, **kwargs)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn summed gradients into the mean over every target token of this optimizer step, on all ranks.

        Runs before gradient clipping, on gradients that are no longer scaled. Lightning has divided by the number of
        accumulated batches and the strategy by the number of ranks; both are taken back.

        Raises:
            UserError: If the loss or a gradient is not finite; the message names the rows.
        """
        loss_sum, num_targets = self.watch.totals(self.trainer)
        loss = (loss_sum / num_targets).float()
        scale = self.trainer.accumulate_grad_batches * self.trainer.world_size / num_targets.float()
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        torch._foreach_mul_(local_parts(gradients), scale)
        self._add_regularizer(optimizer)
        gradient_norm = total_norm(gradients)
        scales = is_scaled(self.trainer)
        if not self.watch.judge(self.trainer, loss, gradient_norm, is_scaled=scales):
            optimizer.zero_grad(set_to_none=True)  # optimisers leave alone what has no gradient
        self.watch.clear()
        self.log("train/loss", loss, prog_bar=True, batch_size=1)
        self.log("train/gradient_norm", gradient_norm, batch_size=1)
        self.log("train/learning_rate", optimizer.param_groups[0]["lr"], batch_size=1)
        self.log("train/loss_spikes", float(self.watch.num_spikes), batch_size=1)
        if scales or self.watch.on_nonfinite == "skip":
            self.log("train/skipped_steps", float(self.watch.num_skipped), batch_size=1)

    def _add_regularizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the gradient of the regularizer, which is the same on all ranks (gradients are no longer exchanged)."""
        term = self._adapter_hooks.regularizer(self.peft_model)
        if term is None:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = torch.autograd.grad(term, parameters, allow_unused=True, materialize_grads=True)
        torch._foreach_add_([p.grad for p in parameters], gradients)
        self.log("train/regularizer", term.detach(), batch_size=1)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, then run the adapter type's per-step work: before anything is saved, while gradients are there."""
        super().optimizer_step(*args, **kwargs)
        if self.watch.num_skipped_in_a_row:
            for parameter in (p for p in self.parameters() if p.requires_grad):
                parameter.grad = torch.zeros_like(parameter)
        # The trainer counts the step when this has returned.
        figures = self._adapter_hooks.after_step(self.peft_model, self.trainer.global_step + 1)
        self.log_dict(figures, batch_size=1)

    def on_fit_start(self) -> None:
        """Settle the process for training on a CPU."""
        if self.device.type == "cpu":
            # Who recomputes activations is short of memory, not of time.
            give_back_freed_memory() if self.gradient_checkpointing else keep_freed_memory()

    def on_train_start(self) -> None:
        """Drop what an interrupted step left behind; restore the adapter type's state."""
        self.watch.clear()
        if self._adapter_state is not None:
            with explain_damage(self.trainer.ckpt_path):
                self._adapter_hooks.load_state(self.peft_model, self._adapter_state)
            self._adapter_state = None
            self._settle_optimizer()

    def _settle_optimizer(self) -> None:
        """Let settings of the optimizer that were changed for a resumed run have their effect.

        A checkpoint brings those that it was written with, and the optimizer would go on with them without a word.
        """
        schedule: Any = self.lr_schedulers()
        changed = {}
        for index, fresh in enumerate(self._optimizer().param_groups):
            group = schedule.optimizer.param_groups[index]
            if (was := schedule.base_lrs[index]) != fresh["lr"]:
                changed["learning_rate"] = (was, fresh["lr"])
                group["lr"] *= fresh["lr"] / was
                group["initial_lr"] = schedule.base_lrs[index] = fresh["lr"]
            for name in ("betas", "weight_decay"):
                if (was := group[name]) != fresh[name]:
                    changed[name] = (was, fresh[name])
                    group[name] = fresh[name]
        for name, (was, now) in changed.items():
            logger.warning("model.%s was %s in the checkpoint and is %s from here on.", name, was, now)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Let a run that ends in the middle of an epoch end with a validation."""
        if self.trainer.global_step == self.trainer.max_steps:
            self.trainer.should_stop = True

    def on_train_end(self) -> None:
        """Let the adapter type report what an interrupted run did not finish."""
        self._adapter_hooks.end(self.peft_model, self.trainer.global_step)

    def configure_optimizers(self) -> Any:
        """AdamW on the adapter's parameters; linear warm-up, then a cosine."""
        try:
            total_steps = self.trainer.estimated_stepping_batches
        except ValueError as error:  # Lightning looks at its settings of validation here
            raise UserError(f"trainer: {one_line(error)}.") from error
        timer = next((c for c in self.trainer.callbacks if isinstance(c, Timer)), None)  # type: ignore[attr-defined]
        # A time limit beside a given number of steps is a safeguard; without one it is what ends the run.
        is_length_known = math.isfinite(total_steps) and (timer is None or self.trainer.max_steps != -1)
        # A rehearsal is the beginning of a run of any length.
        planned_steps = _REHEARSED_STEPS if self.trainer.fast_dev_run else total_steps  # type: ignore[attr-defined]
        self._adapter_hooks.start(self.peft_model, self.lora, int(planned_steps) if is_length_known else None)
        optimizer = self._optimizer()

        def factor(step: int) -> float:
            elapsed_share = _elapsed_share(timer)
            if timer is not None:
                # Clocks differ from process to process; learning rates must not, or the adapters drift apart.
                elapsed_share = self.trainer.strategy.broadcast(elapsed_share)
            return self._learning_rate_factor(step, total_steps, elapsed_share)

        schedule = {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def _optimizer(self) -> torch.optim.Optimizer:
        parameters = [p for p in self.parameters() if p.requires_grad]
        optimizer_class, options = self._adapter_hooks.optimizer_class(parameters)
        options = {"lr": self.learning_rate, "betas": self.betas, **options}
        if self.lora.loraplus_lr_ratio == 1:
            return optimizer_class(parameters, weight_decay=self.weight_decay, **options)
        from peft.optimizers import create_loraplus_optimizer

        return create_loraplus_optimizer(
            self.peft_model,
            optimizer_class,
            loraplus_lr_ratio=self.lora.loraplus_lr_ratio,
            loraplus_weight_decay=self.weight_decay,
            **options,
        )

    def _learning_rate_factor(self, step: int, total_steps: float, elapsed_share: float) -> float:
        """Share of the peak learning rate at an optimizer step.

        Args:
            step: Steps done.
            total_steps: Steps of the run, or infinity.
            elapsed_share: Share of the time limit that is used up; 0 without one.
        """
        warmup_steps = min(self.warmup_steps, math.ceil(0.1 * total_steps) if math.isfinite(total_steps) else math.inf)
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        by_steps = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        progress = min(1.0, max(by_steps, elapsed_share))
        floor = self.final_learning_rate_fraction
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    # ------------------------------------------------------------------ validation

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Teacher-forced metrics: at each target, what the model would have said after the true text before it."""
        targets = select_targets(batch["labels"])
        with self.compute_context():
            # Also where a rank has no row left: ranks that share one model in slices go through it together.
            hidden = self._target_states(batch, targets)
            if targets.token_ids.numel() == 0:
                return
            losses, predicted = completion_predictions(hidden, targets.token_ids, self._head, self.loss_chunk_tokens)
        row_sizes = targets.mask.sum(dim=1).tolist()
        hits = predicted == targets.token_ids
        is_finite = losses.isfinite()
        if not is_finite.all():
            self._bad_val_rows += batch["sources"]
        self.val_loss.update(losses[is_finite])
        self.val_token_accuracy.update(hits.float())
        self.val_exact_match.update(torch.stack([row.all() for row in hits.split(row_sizes)]).float())
        if self.text_metrics is not None:
            prompts = [
                self._decode(ids[: int(mask.nonzero()[0, 0]) + 1])
                for ids, mask in zip(batch["input_ids"], targets.mask, strict=True)
                if mask.any()
            ]
            sizes = [size for size in row_sizes if size]
            self.text_metrics.update(
                prompts,
                [self._decode(ids) for ids in targets.token_ids.split(sizes)],
                [self._decode(ids) for ids in predicted.split(sizes)],
            )

    def _decode(self, token_ids: Tensor | Sequence[int]) -> str:
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def on_validation_epoch_end(self) -> None:
        """Log what the epoch's batches add up to, weighted by token or row and over all ranks.

        Raises:
            UserError: If a loss was not finite, unless such rows are to be left out; the message names them.
        """
        bad_rows = [row for rows in gather_objects(self.trainer, self._bad_val_rows) for row in rows]
        self._bad_val_rows = []
        if bad_rows:
            found = f"step {self.trainer.global_step}: the loss of validation is not finite in a batch of the rows "
            found += ", ".join(bad_rows)
            if self.on_nonfinite == "error":
                raise UserError(
                    f"{found}. If these rows are like others, training went wrong before: lower model.learning_rate "
                    "and go on from an earlier checkpoint. Or leave such rows out with model.on_nonfinite=skip."
                )
            if self.trainer.is_global_zero:
                logger.warning("%s; what is not finite is left out", found)
        loss = self.val_loss.compute()
        values = {
            "val/loss": loss,
            "val/perplexity": loss.exp(),
            "val/token_accuracy": self.val_token_accuracy.compute(),
            "val/exact_match": self.val_exact_match.compute(),
        }
        metrics: list[Metric] = [self.val_loss, self.val_token_accuracy, self.val_exact_match]
        if self.text_metrics is not None:
            # torchmetrics' default sync makes every rank hold the same value; a NaN is then dropped on all of them.
            read = self.text_metrics.compute()
            values |= {f"val/{name}": value for name, value in read.items() if not torch.isnan(value)}
            metrics.append(self.text_metrics)
        self.log_dict(values, batch_size=1)
        for metric in metrics:
            metric.reset()

    # ------------------------------------------------------------------ prediction

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Greedy completions for a batch of prompts.

        Args:
            batch: ``input_ids`` (a list of lists of token ids), ``prompts`` and ``sources``, one entry a row.
            batch_idx: Not used.

        Returns:
            A dict with ``prompt``, ``completion`` and ``source`` for each row.
        """
        width = max(len(ids) for ids in batch["input_ids"])
        most = getattr(self.peft_model.get_base_model().config, "max_position_embeddings", None)
        if most is not None and width > most:
            longest = max(range(len(batch["input_ids"])), key=lambda row: len(batch["input_ids"][row]))
            raise UserError(
                f"{batch['sources'][longest]}: a prompt of {width:,} tokens, but the model reads {most:,} at most. "
                "Shorten it, or leave it out."
            )
        pad_id = self.tokenizer.pad_token_id
        # Left padding: generation goes on from the last position of every row.
        ids = torch.tensor([[pad_id] * (width - len(row)) + list(row) for row in batch["input_ids"]])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch["input_ids"]])
        with torch.no_grad(), self.compute_context():
            output = self.peft_model.generate(
                input_ids=ids.to(self.device),
                attention_mask=mask.to(self.device),
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=pad_id,
            )
        completions = [self._decode(row[width:]) for row in output]
        return [
            {"prompt": prompt, "completion": completion, "source": source}
            for prompt, completion, source in zip(batch["prompts"], completions, batch["sources"], strict=True)
        ]

    # ------------------------------------------------------------------ checkpoints

    @functools.cached_property
    def _base_source(self) -> BaseModelSource:
        # Once: a directory's weights are read through for their hash.
        return resolve_base_model(self.base_spec)

    def adapter_metadata(self) -> store.AdapterMetadata:
        """What is known here of the adapter; step, metrics and data are the caller's to add."""
        source = self._base_source
        trainable, total = self.peft_model.get_nb_trainable_parameters()
        base = self.peft_model.get_base_model()
        quantization = quantization_of(base)
        return store.AdapterMetadata(
            adapter_type=self.adapter_type,
            base_model=source.canonical_id,
            base_model_name=self.base_model,
            base_revision=commit_hash(base),
            base_sha256=source.sha256,
            trainable_parameters=trainable,
            total_parameters=total,
            quantization={} if quantization is None else dataclasses.asdict(quantization),
        )

    def _adapter_tensors(self) -> dict[str, Tensor]:
        return {f"model.{name}": tensor for name, tensor in adapter_tensors(self.peft_model).items()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapter's weights and state only: every checkpoint of this module is a few megabytes."""
        keys = self._adapter_tensors().keys()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keys}
        checkpoint["adapter_state"] = self._adapter_hooks.state(self.peft_model)
        if self.trainer.is_global_zero:  # which alone writes
            checkpoint["adapter_identity"] = self._identity()
        checkpoint["step_watch"] = self.watch.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that a checkpoint holds exactly this adapter, of this base.

        Raises:
            UserError: If a key is missing, unknown or of another shape, or it was trained on another base or scaled
                otherwise.
        """
        saved = checkpoint["state_dict"]
        own = self._adapter_tensors()
        different = sorted(saved.keys() ^ own.keys()) or sorted(k for k in own if saved[k].shape != own[k].shape)
        if different:
            raise UserError(
                f"The checkpoint does not hold this adapter: {len(different)} parameters differ, such as "
                f"{different[0]}. Use the config it was trained with (config.yaml in its run directory)."
            )
        if "adapter_identity" in checkpoint:  # not in one that was written before there was any
            self._check_identity(checkpoint["adapter_identity"])
        self._adapter_state = checkpoint.get("adapter_state")
        if "step_watch" in checkpoint:
            self.watch.load_state_dict(checkpoint["step_watch"])

    def _identity(self) -> dict[str, Any]:
        """What the adapter's weights mean nothing without and their names and shapes do not tell."""
        metadata = self.adapter_metadata()
        peft_config = self.peft_model.peft_config["default"]
        return {
            "model.adapter_type": metadata.adapter_type,
            "model.base_model": metadata.base_sha256 or metadata.base_revision or metadata.base_model,
            "model.lora.quantization": metadata.quantization,
            **{f"model.lora.{key}": getattr(peft_config, name, None) for key, name in _SCALES.items()},
        }

    def _check_identity(self, saved: dict[str, Any]) -> None:
        own = self.trainer.strategy.broadcast(self._identity() if self.trainer.is_global_zero else {})
        for key, value in own.items():
            if saved.get(key) != value:
                raise UserError(
                    f"The checkpoint was written by a run with another {key} ({_in_words(saved.get(key))}, here "
                    f"{_in_words(value)}): what it holds would compute something else. Use the config it was trained "
                    "with (config.yaml in its run directory)."
                )


def _in_words(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {item}" for name, item in value.items()) or "none"
    return f"{value!s:.60}"


def _elapsed_share(timer: Timer | None) -> float:
    """Share of ``trainer.max_time`` that training has used up."""
    if timer is None or timer._duration is None:
        return 0.0
    return timer.time_elapsed() / timer._duration if timer._duration > 0 else 1.0


def _check_settings(
    learning_rate: float,
    weight_decay: float,
    warmup_steps: int,
    final_fraction: float,
    adapter_type: str,
    betas: tuple[float, float],
    **sizes: int,
) -> None:
    problems = []
    if not (learning_rate > 0 and math.isfinite(learning_rate)):
        problems.append(f"model.learning_rate must be a number above 0, not {learning_rate}")
    if not weight_decay >= 0:
        problems.append(f"model.weight_decay must be at least 0, not {weight_decay}")
    if warmup_steps < 0:
        problems.append(f"model.warmup_steps must be at least 0, not {warmup_steps}")
    if not 0 <= final_fraction <= 1:
        problems.append(f"model.final_learning_rate_fraction must lie in [0, 1], not {final_fraction}")
    if adapter_type not in AdapterFactory.registered():
        known = ", ".join(AdapterFactory.registered())
        problems.append(f"model.adapter_type must be one of {known}, not '{adapter_type}'")
    if not all(0 <= beta < 1 for beta in betas):
        problems.append(f"model.betas must be at least 0 and below 1, not {list(betas)}")
    problems += [f"model.{name} must be at least 1, not {size}" for name, size in sizes.items() if size < 1]
    problems += [f"model.{n} must be at most {_MOST_TOKENS:,}, not {s}" for n, s in sizes.items() if s > _MOST_TOKENS]
    if problems:
        raise UserError("; ".join(problems) + ".")

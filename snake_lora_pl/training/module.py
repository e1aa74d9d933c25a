"""Training, validation and prediction steps of an adapter on a frozen causal language model.

The module knows nothing of Snake: metrics that read text are passed in as ``text_metrics``.
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
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.aggregation import MeanMetric
from typing_extensions import override

from snake_lora_pl.adapters import store
from snake_lora_pl.adapters.adapter_type import AdapterType, adapter_tensors
from snake_lora_pl.adapters.config import LoRAConfig
from snake_lora_pl.adapters.factory import AdapterFactory
from snake_lora_pl.adapters.metadata import AdapterMetadata
from snake_lora_pl.collectives import gather_objects
from snake_lora_pl.constants import DEFAULT_BASE_MODEL
from snake_lora_pl.decoding.generate_decoder import GenerateDecoder
from snake_lora_pl.errors import UserError
from snake_lora_pl.models import BaseModelSpec, choose_dtype, load_tokenizer, repeated_layers, resolve_base_model
from snake_lora_pl.models.limits import ModelLimits, context_length
from snake_lora_pl.models.quantization import compute_dtype, quantization_of
from snake_lora_pl.models.text_decoder import text_decoder
from snake_lora_pl.models.transformers_internals import commit_hash, enable_activation_checkpointing
from snake_lora_pl.training import checks
from snake_lora_pl.training.allocator import give_back_freed_memory, keep_freed_memory
from snake_lora_pl.training.base_compute import MIN_SPEEDUP, BaseCompute, int8_obstacle, measure_speedup
from snake_lora_pl.training.float16 import is_scaled, scale_gradients
from snake_lora_pl.training.fused import FusedDecoder, fusion_obstacle
from snake_lora_pl.training.lightning_internals import decide_time_limit
from snake_lora_pl.training.logit_transform import IDENTITY, candidate_transforms
from snake_lora_pl.training.loss import Targets, completion_loss, completion_predictions, select_targets
from snake_lora_pl.training.loss_normalization import StepLoss, clip_gradients, normalize_gradients
from snake_lora_pl.training.nonfinite import NonfiniteGuard, OnNonfinite
from snake_lora_pl.training.optimizer import (
    apply_changed_hyperparameters,
    build_optimizer,
    build_schedule,
    find_timer,
    plan_steps,
)
from snake_lora_pl.training.packing import pack
from snake_lora_pl.training.probe import probe_model
from snake_lora_pl.training.resume.checkpoint_state import explain_damaged_checkpoint
from snake_lora_pl.training.sharding import (
    FullyShardedStrategy,
    check_strategy,
    is_sharded,
    load_saved,
    shard,
    total_norm,
)
from snake_lora_pl.training.step_exchange import StepExchange

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from peft import PeftModel

    from snake_lora_pl.models import BaseModelSource

logger = logging.getLogger(__name__)

_FLOAT_USES = "The adapter is validated, played and saved for the float base."
# Fields of the PEFT config that scale the adapter's output, by their names in LoRAConfig.
_SCALE_FIELDS = {"alpha": "lora_alpha", "use_rslora": "use_rslora", "alpha_pattern": "alpha_pattern"}


class LoRALightningModule(pl.LightningModule):
    """Trains an adapter on prompt/completion batches; the loss covers completions only.

    Args:
        base_model: Base model: a short name, a local directory or a hub id.
        adapter_type: Adapter type, as registered in ``AdapterFactory``.
        lora: Rank, scale, dropout and target modules of the adapter, and options of its adapter type.
        learning_rate: Peak learning rate of AdamW.
        weight_decay: Decoupled weight decay of AdamW on the adapter's parameters.
        betas: Decay rates of AdamW's two moments.
        warmup_steps: Optimizer steps of linear learning rate warmup; at most a tenth of the run is used.
        final_learning_rate_fraction: Fraction of the peak learning rate at the end of the cosine schedule. The schedule
            ends with the steps of the run or with ``trainer.max_time``, whichever comes first.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about 1.5 times slower.
        dtype: Data type in which the frozen base computes: ``auto`` (bfloat16 if the hardware computes it fast, else
            float32), ``float32``, ``bfloat16`` or ``float16`` (with gradient scaling). The adapter stays in float32.
        adapter_path: Adapter directory to start from instead of a new adapter; ``adapter_type`` and ``lora`` are read
            from it.
        full_precision_base: Load the base unquantized for an ``adapter_path`` that was trained on a quantized one.
        revision: Commit, branch or tag of a hub model.
        trust_remote_code: Whether code that ships with a hub model may run.
        max_new_tokens: Maximum length of a completion that ``predict`` generates, in tokens.
        loss_chunk_tokens: Number of target tokens whose logits are in memory at a time.
        fused_layers: Whether packed rows run through layers with hand-written forward and backward passes for a frozen
            base. ``auto`` uses them if architecture and adapter allow it (the log gives the reason if not), ``always``
            fails if they do not, ``never`` uses the model's own layers.
        base_compute: Type of products with the frozen base in training: ``float`` (that of ``dtype``), ``int8`` (on
            CPUs with AVX512-VNNI, in fused layers; gradients become approximate), or ``auto``: int8 if a product
            measured at the start is faster in it. Validation, play and the saved adapter use the float base.
        compile_layers: Compile the model's own layers with ``torch.compile``, which takes minutes at the start and pays
            off in long runs on a GPU. Set ``data.pad_to_multiple_of`` to ``data.max_length`` so that all batches have
            one shape. Excludes fused layers.
        on_nonfinite: How to handle a step whose loss or gradient is not finite. ``error`` stops and names its rows.
            ``skip`` skips the step and counts it in ``train/skipped_steps``; ten in a row stop the run. In validation,
            ``skip`` drops the losses that are not finite and logs their rows.
        text_metrics: Metrics of decoded text: ``update(prompts, targets, predictions)`` takes three lists of strings,
            ``compute()`` returns a dict of scalars, logged as ``val/NAME`` unless they are NaN.
    """

    def __init__(
        self,
        base_model: str = DEFAULT_BASE_MODEL,
        adapter_type: str = "lora",
        lora: LoRAConfig = LoRAConfig(),  # noqa: B008 - jsonargparse reads the default
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
        base_compute: BaseCompute = "float",
        compile_layers: bool = False,
        on_nonfinite: OnNonfinite = "error",
        text_metrics: Metric | None = None,
    ) -> None:
        super().__init__()
        checks.check_settings(
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            betas=betas,
            warmup_steps=warmup_steps,
            final_learning_rate_fraction=final_learning_rate_fraction,
            adapter_type=adapter_type,
            lora=lora,
            max_new_tokens=max_new_tokens,
            loss_chunk_tokens=loss_chunk_tokens,
        )
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
        self.base_compute = base_compute
        self.compile_layers = compile_layers
        self.on_nonfinite = on_nonfinite
        self.text_metrics = text_metrics

        self._fused: FusedDecoder | None = None
        self._trains_in_int8 = False
        self._logit_transform = IDENTITY
        self.model: PeftModel | None = None
        self.tokenizer: Any = None
        self.val_loss = MeanMetric()
        self.val_token_accuracy = MeanMetric()
        self.val_exact_match = MeanMetric()
        # Checkpoints hold no base weights; on_load_checkpoint checks that they hold every tensor of the adapter.
        self.strict_loading = False
        self._adapter_state: dict[str, Any] | None = None
        self.step_loss = StepLoss()
        self.step_exchange = StepExchange()
        self._gradient_norm: Tensor | None = None
        self._nonfinite = NonfiniteGuard(on_nonfinite)
        self._nonfinite_val_rows: list[str] = []

    @override
    def configure_model(self) -> None:
        if self.model is not None:
            return
        trainer = self._attached_trainer
        if trainer is not None:
            check_strategy(trainer.strategy)
            checks.check_precision(trainer.precision)
        device = trainer.strategy.root_device if trainer is not None else None
        options: dict[str, Any] = {
            "dtype": choose_dtype(self.dtype_name, None if device is None else device.type),
            "device": device,
        }
        is_fit = trainer is not None and trainer.state.fn == "fit"
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
            if is_fit:
                logger.info(
                    "Training continues from the %s adapter of step %d in %s; model.adapter_type and model.lora are "
                    "ignored.",
                    metadata.adapter_type,
                    metadata.step,
                    self.adapter_path,
                )
        else:
            self.model = AdapterFactory.create(self.adapter_type, self.base_spec, self.lora, **options)
        if trainer is not None and is_fit:
            self.choose_base_compute(trainer.strategy.root_device.type)
        self.prepare_for_training()
        self._check_model()
        data: Any = getattr(trainer, "datamodule", None)
        if trainer is not None and trainer.state.fn in ("fit", "validate") and hasattr(data, "extreme_rows"):
            self.check_rows(data.extreme_rows())
        if self._sharded_strategy is not None:
            checks.check_shardable(self.model, self.adapter_type, self.lora)
            shard(self.model, self._sharded_strategy)
        if trainer is not None and is_fit and self._compute_dtype == torch.float16:
            scale_gradients(trainer)

    @property
    def base_spec(self) -> BaseModelSpec:
        """The base model to load."""
        return BaseModelSpec(self.base_model, self.revision, self.trust_remote_code)

    @property
    def peft_model(self) -> PeftModel:
        """The base model with the adapter.

        Raises:
            RuntimeError: If ``configure_model`` has not run yet.
        """
        if self.model is None:
            raise RuntimeError("The model is not loaded. Call configure_model() first, or let a Trainer call it.")
        return self.model

    @property
    def packs_rows(self) -> bool:
        """True if training packs rows without padding; known once the model is prepared for training."""
        return self._fused is not None

    @property
    def _attached_trainer(self) -> pl.Trainer | None:
        try:
            return self.trainer
        except RuntimeError:
            return None

    @property
    def _sharded_strategy(self) -> FullyShardedStrategy | None:
        strategy = self._attached_trainer.strategy if self._attached_trainer is not None else None
        return strategy if isinstance(strategy, FullyShardedStrategy) else None

    @property
    def _adapter_hooks(self) -> AdapterType:
        return AdapterFactory.get_adapter_type(self.adapter_type)

    @property
    def _lm_head(self) -> Any:
        return self.peft_model.get_base_model().get_output_embeddings()

    @property
    def _compute_dtype(self) -> torch.dtype:
        return compute_dtype(self.peft_model.get_base_model())

    def prepare_for_training(self) -> None:
        """Choose fused or own layers and set up gradient checkpointing; needs the model but not its weights."""
        # Weights load in eval mode, and Lightning keeps the mode it finds.
        self.peft_model.train()
        # An estimate of memory ends here; with weights, the probe of the model chooses one of the candidates.
        self._logit_transform = candidate_transforms(self.peft_model.get_base_model().config)[0]
        self._fused = self._fuse()
        if self._fused is None:
            self._prepare_own_layers()

    def choose_base_compute(self, device_type: str) -> None:
        """Choose float or int8 for products with the base; needs the model but not its weights.

        Args:
            device_type: Device that trains.

        Raises:
            UserError: If int8 is set and impossible.
        """
        if self.base_compute == "float":
            return
        obstacle = self._int8_obstacle(device_type)
        if obstacle is not None:
            if self.base_compute == "int8":
                raise UserError(f"model.base_compute is 'int8', but {obstacle}. Set 'auto' or 'float'.")
            logger.info("Products with the base are computed in float: %s.", obstacle)
            return
        if self.base_compute == "int8":
            self._trains_in_int8 = True
            logger.info("Products with the base are computed in int8 (model.base_compute). %s", _FLOAT_USES)
            return
        speedup = measure_speedup(self.peft_model.get_base_model().config, self._compute_dtype)
        trainer = self._attached_trainer
        if trainer is not None:  # ranks must agree
            speedup = min(gather_objects(trainer, speedup))
        self._trains_in_int8 = speedup >= MIN_SPEEDUP
        logger.info(
            "Products with the base are computed in %s: int8 is %.2f times as fast as %s (at least %.1f is needed). %s",
            "int8" if self._trains_in_int8 else "float",
            speedup,
            str(self._compute_dtype).removeprefix("torch."),
            MIN_SPEEDUP,
            _FLOAT_USES if self._trains_in_int8 else "",
        )

    @property
    def trains_in_int8(self) -> bool:
        """True if products with the base are computed in int8."""
        return self._trains_in_int8

    def _int8_obstacle(self, device_type: str) -> str | None:
        if self.fused_layers == "never" or self.compile_layers:
            return "fused layers are off (model.fused_layers, model.compile_layers)"
        obstacle = self._fusion_obstacle()
        if obstacle is not None:
            return f"the model cannot be fused: {obstacle}"
        return int8_obstacle(device_type, self._compute_dtype)

    def _fusion_obstacle(self) -> str | None:
        return "its weights are sharded" if self._sharded_strategy else fusion_obstacle(self.peft_model)

    def _restore_base_compute(self, was_int8: bool) -> None:
        """Resume with the choice of the run that wrote the checkpoint, unless the setting is another one."""
        if was_int8 == self._trains_in_int8:
            return
        obstacle = self._int8_obstacle(self.device.type) if was_int8 else None
        if self.base_compute != "auto" or obstacle is not None:
            logger.warning(
                "The run that wrote the checkpoint computed products with the base in %s; it resumes in %s%s.",
                "int8" if was_int8 else "float",
                "int8" if self._trains_in_int8 else "float",
                "" if obstacle is None else f": {obstacle}",
            )
            return
        self._trains_in_int8 = was_int8
        self._fused = self._fuse()
        logger.info("Products with the base are computed in %s, as before the resume.", "int8" if was_int8 else "float")

    def _fuse(self) -> FusedDecoder | None:
        if self.fused_layers == "never" or self.compile_layers:
            return None
        obstacle = self._fusion_obstacle()
        if obstacle is None:
            return FusedDecoder(
                self.peft_model,
                gradient_checkpointing=self.gradient_checkpointing,
                trains_in_int8=self._trains_in_int8,
            )
        if self.fused_layers == "always":
            raise UserError(f"model.fused_layers is 'always', but the model cannot be fused: {obstacle}. Set 'auto'.")
        logger.info("Training uses the model's own layers, not fused ones: %s.", obstacle)
        return None

    def _prepare_own_layers(self) -> None:
        if self.gradient_checkpointing:
            enable_activation_checkpointing(self.peft_model.get_base_model())
            # Without a gradient at the frozen embedding's output, the first checkpointed layer has no input that needs
            # one and its adapter stays untrained.
            self.peft_model.enable_input_require_grads()
        if self.compile_layers:
            # Layer by layer: the layers are identical in structure, so one compilation serves all of them.
            for layer in repeated_layers(self.peft_model.get_base_model()):
                layer.compile()

    def _check_model(self) -> None:
        def fused_states(input_ids: Tensor) -> Tensor:
            return self._target_states({"input_ids": input_ids, "labels": input_ids}, select_targets(input_ids))

        checks.check_vocabulary(self.peft_model, self.tokenizer, self.base_model)
        source = f"--adapter {self.adapter_path}" if self.adapter_path else f"model.base_model {self.base_model}"
        with torch.no_grad(), self.compute_context():
            self._logit_transform = probe_model(
                self.peft_model, self._hidden, None if self._fused is None else fused_states, source
            )

    def load_adapter(self, adapter_dir: str | os.PathLike[str]) -> None:
        """Replace the adapter in memory by a saved one; the base stays loaded."""
        if is_sharded(self.peft_model):
            load_saved(self.peft_model, adapter_dir)
            return
        # A new adapter, not only new weights: a saved adapter may have other shapes than the trained one.
        base = self.peft_model.unload()
        self.model = AdapterFactory.load(adapter_dir, base).to(self.device)
        self._fused = self._fuse()

    def _target_states(self, batch: dict[str, Any], targets: Targets) -> Tensor:
        """Return the hidden state that predicts each target; shape (num_targets, hidden_size)."""
        if self._fused is None:
            # Padding to a multiple can exceed the number of positions; rows do not.
            hidden = self._hidden(batch["input_ids"][:, : context_length(self.peft_model.config)])
            return hidden[targets.rows, targets.positions]
        packed = batch["packed"] if "packed" in batch else pack(batch["input_ids"], batch["labels"])
        if packed is None:  # no target on this rank; the exchange of gradients still needs a graph
            zero = sum(
                (p.sum() * 0.0 for p in self.parameters() if p.requires_grad), torch.zeros((), device=self.device)
            )
            return zero.expand(0, self._lm_head.in_features)
        return self._fused.target_states(packed)

    @override
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if "labels" not in batch:
            return batch
        # On the CPU: both compute sizes from the data, for which the host would wait if the data were on a GPU.
        batch["targets"] = select_targets(batch["labels"])
        if self._fused is not None:
            batch["packed"] = pack(batch["input_ids"], batch["labels"])
        if self.device.type == "cuda":
            batch = apply_to_collection(batch, Tensor, Tensor.pin_memory)
        return batch

    def _hidden(self, input_ids: Tensor) -> Tensor:
        """Return the last hidden state of the model's own layers; shape (B, T, hidden_size).

        There is no attention mask: rows are padded on the right and attention is causal, so no token sees padding, and
        without a mask scaled dot product attention keeps its fast causal path.
        """
        output = text_decoder(self.peft_model.get_base_model())(input_ids=input_ids, use_cache=False)
        hidden: Tensor = output.last_hidden_state
        return hidden

    @contextlib.contextmanager
    def compute_context(self) -> Iterator[None]:
        """Compute in the base's data type while the adapter's weights stay in float32."""
        dtype = self._compute_dtype
        if dtype == torch.float32:
            yield
            return
        with torch.autocast(self._lm_head.weight.device.type, dtype=dtype), self._without_peft_casts():
            yield

    @contextlib.contextmanager
    def _without_peft_casts(self) -> Iterator[None]:
        """Leave the adapter's data type to autocast; PEFT would cast its input to float32 and back."""
        from peft.helpers import disable_input_dtype_casting

        if self._compute_dtype == torch.float32:
            yield
            return
        with disable_input_dtype_casting(self.peft_model):
            yield

    @override
    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss summed over target tokens; ``on_before_optimizer_step`` divides the gradient."""
        targets = _targets(batch)
        with self.compute_context():
            hidden = self._target_states(batch, targets)  # (num_targets, hidden_size)
            loss = completion_loss(
                hidden, targets.token_ids, self._lm_head, self.loss_chunk_tokens, self._logit_transform
            )
        self.step_loss.add(loss, len(targets.token_ids), batch["sources"])
        return loss

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        # Checkpointed layers compute again here. torch.utils.checkpoint restores autocast, but not PEFT's setting.
        with self._without_peft_casts():
            super().backward(loss, *args, **kwargs)

    @override
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Turn summed gradients into the mean over all target tokens of the step; runs before gradient clipping.

        Raises:
            UserError: If the loss or a gradient is not finite; the message names the rows.
        """
        totals = self.step_exchange.sum_over_ranks(self.trainer, self.step_loss.loss_sum, self.step_loss.num_targets)
        gradients = _gradients(optimizer)
        normalize_gradients(gradients, totals[1].float(), self.trainer)
        self._add_regularizer(optimizer)
        self._gradient_norm = total_norm(gradients)
        # Here the host waits for the device, once per step. All that follows are numbers of the host.
        gradient_norm, loss_sum, num_targets, *shared = torch.cat([self._gradient_norm.reshape(1), totals]).tolist()
        self.step_exchange.read(shared)
        loss = loss_sum / num_targets if num_targets else math.nan
        scaled = is_scaled(self.trainer)
        if not self._nonfinite.accepts_step(
            self.trainer, self.step_loss.micro_batches, loss, gradient_norm, is_scaled=scaled
        ):
            optimizer.zero_grad(set_to_none=True)  # an optimizer does not touch parameters without a gradient
        self.step_loss.clear()
        self.log("train/loss", torch.tensor(loss), prog_bar=True, batch_size=1)
        self.log("train/gradient_norm", torch.tensor(gradient_norm), batch_size=1)
        self.log("train/learning_rate", torch.tensor(optimizer.param_groups[0]["lr"]), batch_size=1)
        if scaled or self.on_nonfinite == "skip":
            self.log("train/skipped_steps", torch.tensor(float(self._nonfinite.num_skipped)), batch_size=1)

    @override
    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip with the gradient norm that ``on_before_optimizer_step`` has computed."""
        if not gradient_clip_val or gradient_clip_algorithm == "value" or self._gradient_norm is None:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        clip_gradients(_gradients(optimizer), self._gradient_norm, gradient_clip_val)

    def _add_regularizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Add the gradient of the adapter type's regularizer, which is the same on all ranks."""
        term = self._adapter_hooks.regularizer(self.peft_model)
        if term is None:
            return
        parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients = torch.autograd.grad(term, parameters, allow_unused=True, materialize_grads=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad += gradient
        self.log("train/regularizer", term.detach(), batch_size=1)

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self._nonfinite.num_skipped_in_a_row:
            for parameter in (p for p in self.parameters() if p.requires_grad):
                parameter.grad = torch.zeros_like(parameter)
        # Here, because gradients still exist and nothing has been saved yet. The trainer counts the step afterwards.
        metrics = self._adapter_hooks.after_step(self.peft_model, self.trainer.global_step + 1)
        self.log_dict({name: torch.tensor(value) for name, value in metrics.items()}, batch_size=1)

    @override
    def on_fit_start(self) -> None:
        if self.device.type == "cpu":
            # Gradient checkpointing trades time for memory, so freed memory is given back as well.
            give_back_freed_memory() if self.gradient_checkpointing else keep_freed_memory()

    @override
    def on_train_start(self) -> None:
        self.step_loss.clear()
        timer = find_timer(self.trainer)
        if timer is not None and self.trainer.world_size > 1:
            decide_time_limit(timer, lambda: self.step_exchange.elapsed_fraction == 1.0)
        if self._adapter_state is not None:
            with explain_damaged_checkpoint(self.trainer.ckpt_path):
                self._adapter_hooks.load_state(self.peft_model, self._adapter_state)
            self._adapter_state = None
            schedule: Any = self.lr_schedulers()
            apply_changed_hyperparameters(schedule, self._build_optimizer())

    @override
    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        # Ends a run of max_steps through the same path as an epoch, so that a validation follows.
        if self.trainer.global_step == self.trainer.max_steps:
            self.trainer.should_stop = True

    @override
    def on_train_end(self) -> None:
        self._adapter_hooks.end(self.peft_model, self.trainer.global_step)

    @override
    def configure_optimizers(self) -> Any:
        self._adapter_hooks.start(self.peft_model, self.lora, plan_steps(self.trainer))
        optimizer = self._build_optimizer()
        schedule = build_schedule(
            optimizer,
            self.trainer,
            warmup_steps=self.warmup_steps,
            final_fraction=self.final_learning_rate_fraction,
            shared_elapsed_fraction=lambda: self.step_exchange.elapsed_fraction,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def _build_optimizer(self) -> torch.optim.Optimizer:
        return build_optimizer(
            self.peft_model,
            self._adapter_hooks,
            learning_rate=self.learning_rate,
            betas=self.betas,
            weight_decay=self.weight_decay,
            loraplus_lr_ratio=self.lora.loraplus_lr_ratio,
        )

    @override
    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Update the metrics with the prediction of each target token, given the true tokens before it."""
        targets = _targets(batch)
        with self.compute_context():
            # Also without a target on this rank: ranks that share a sharded model run its forward pass together.
            hidden = self._target_states(batch, targets)  # (num_targets, hidden_size)
            if targets.token_ids.numel() == 0:
                return
            losses, predicted = completion_predictions(
                hidden, targets.token_ids, self._lm_head, self.loss_chunk_tokens, self._logit_transform
            )
        is_correct = predicted == targets.token_ids  # (num_targets,)
        is_finite = losses.isfinite()
        if not is_finite.all():
            self._nonfinite_val_rows += batch["sources"]
        self.val_loss.update(losses[is_finite])
        self.val_token_accuracy.update(is_correct.float())
        self.val_exact_match.update(torch.stack([row.all() for row in is_correct.split(targets.row_sizes)]).float())
        if self.text_metrics is not None:
            sizes = [size for size in targets.row_sizes if size]
            rows, positions, token_ids, predicted = (
                tensor.cpu().split(sizes) for tensor in (targets.rows, targets.positions, targets.token_ids, predicted)
            )
            input_ids = batch["input_ids"].cpu()
            # A prompt ends where the first target is predicted.
            prompts = [input_ids[row[0], : position[0] + 1] for row, position in zip(rows, positions, strict=True)]
            self.text_metrics.update(*([self._decode(ids) for ids in part] for part in (prompts, token_ids, predicted)))

    def _decode(self, token_ids: Tensor | Sequence[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))

    @override
    def on_validation_epoch_end(self) -> None:
        """Log metrics weighted by token or row over all ranks.

        Raises:
            UserError: If a loss is not finite and ``on_nonfinite`` is ``error``; the message names the rows.
        """
        nonfinite_rows, self._nonfinite_val_rows = self._nonfinite_val_rows, []
        self._nonfinite.check_validation(self.trainer, nonfinite_rows)
        loss = self.val_loss.compute()
        values = {
            "val/loss": loss,
            "val/perplexity": loss.exp(),
            "val/token_accuracy": self.val_token_accuracy.compute(),
            "val/exact_match": self.val_exact_match.compute(),
        }
        metrics: list[Metric] = [self.val_loss, self.val_token_accuracy, self.val_exact_match]
        if self.text_metrics is not None:
            # torchmetrics synchronizes the values, so a NaN is dropped on all ranks or on none.
            read = self.text_metrics.compute()
            values |= {f"val/{name}": value for name, value in read.items() if not torch.isnan(value)}
            metrics.append(self.text_metrics)
        # On the CPU, because the progress bar reads them at each step.
        self.log_dict({name: value.float().cpu() for name, value in values.items()}, batch_size=1)
        for metric in metrics:
            metric.reset()

    def check_prompts(self, prompts: Mapping[str, Sequence[int]]) -> None:
        """Check that the model can read and complete prompts, given as token ids by source.

        Raises:
            UserError: If it cannot; the message names a prompt.
        """
        checks.check_prompts(prompts, self.peft_model, self.tokenizer, self.max_new_tokens)

    def check_rows(self, rows: Sequence[Any]) -> None:
        """Check that the model can read encoded rows, of which one has the most tokens and one the largest id.

        Raises:
            UserError: If it cannot; the message names a row.
        """
        checks.check_rows(rows, self.peft_model, self.tokenizer)

    @override
    def on_predict_start(self) -> None:
        """Check all prompts before the first is completed.

        Raises:
            UserError: If the model cannot read or complete one; the message names the longest.
        """
        longest: tuple[str, Sequence[int]] = ("", [])
        for batch in self.trainer.predict_dataloaders or ():
            prompts = dict(zip(batch["sources"], batch["input_ids"], strict=True))
            ModelLimits.of(self.peft_model).check_ids(prompts, self.tokenizer)
            longest = max(longest, *prompts.items(), key=lambda item: len(item[1]))
        self.check_prompts(dict([longest]))

    @override
    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> list[dict[str, Any]]:
        """Generate greedy completions for a batch of prompts.

        Args:
            batch: ``input_ids`` (a list of lists of token ids), ``prompts`` and ``sources``, one entry per row.
            batch_idx: Unused.

        Returns:
            A dict with ``prompt``, ``completion`` and ``source`` for each row.
        """
        self.check_prompts(dict(zip(batch["sources"], batch["input_ids"], strict=True)))
        with torch.no_grad(), self.compute_context():
            completions = self._generator.complete(batch["input_ids"])
        return [
            {"prompt": prompt, "completion": self._decode(completion.tokens), "source": source}
            for prompt, completion, source in zip(batch["prompts"], completions, batch["sources"], strict=True)
        ]

    @functools.cached_property
    def _generator(self) -> GenerateDecoder:
        # Cached, because it remembers whether the architecture can complete prompts in batches.
        return GenerateDecoder(
            self.peft_model,
            pad_id=int(self.tokenizer.pad_token_id),
            eos_id=int(self.tokenizer.eos_token_id),
            max_new_tokens=self.max_new_tokens,
        )

    @functools.cached_property
    def _base_source(self) -> BaseModelSource:
        # Cached, because hashing a directory reads all of its weights.
        return resolve_base_model(self.base_spec)

    def adapter_metadata(self) -> AdapterMetadata:
        """Return the metadata known to the module; the caller adds step, metrics and data."""
        source = self._base_source
        trainable, total = self.peft_model.get_nb_trainable_parameters()
        base = self.peft_model.get_base_model()
        quantization = quantization_of(base)
        return AdapterMetadata(
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

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapter's tensors and state only, so that a checkpoint is a few megabytes."""
        keys = self._adapter_tensors().keys()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in keys}
        checkpoint["adapter_state"] = self._adapter_hooks.state(self.peft_model)
        if self.trainer.is_global_zero:  # the only rank that writes
            checkpoint["adapter_identity"] = self._identity()
        checkpoint["nonfinite"] = self._nonfinite.state_dict()
        checkpoint["trains_in_int8"] = self._trains_in_int8

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore a checkpoint of exactly this adapter.

        Raises:
            UserError: If a tensor is missing, unknown or of another shape, or the base model or scale differs.
        """
        checks.check_checkpoint_tensors(checkpoint["state_dict"], self._adapter_tensors())
        if "adapter_identity" in checkpoint:
            own = self.trainer.strategy.broadcast(self._identity() if self.trainer.is_global_zero else {})
            checks.check_checkpoint_identity(checkpoint["adapter_identity"], own)
        self._adapter_state = checkpoint.get("adapter_state")
        if self.trainer.state.fn == "fit":
            self._restore_base_compute(checkpoint.get("trains_in_int8", False))
        if "nonfinite" in checkpoint:
            self._nonfinite.load_state_dict(checkpoint["nonfinite"])

    def _identity(self) -> dict[str, Any]:
        """Return what changes the adapter's effect but not the names and shapes of its tensors."""
        metadata = self.adapter_metadata()
        peft_config = self.peft_model.peft_config["default"]
        return {
            "model.adapter_type": metadata.adapter_type,
            "model.base_model": metadata.base_sha256 or metadata.base_revision or metadata.base_model,
            "model.lora.quantization": metadata.quantization,
            **{f"model.lora.{field}": getattr(peft_config, name, None) for field, name in _SCALE_FIELDS.items()},
        }


def _targets(batch: dict[str, Any]) -> Targets:
    return batch["targets"] if "targets" in batch else select_targets(batch["labels"])


def _gradients(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]

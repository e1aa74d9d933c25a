"""Llama-like decoder with hand-written forward and backward passes for a frozen base with LoRA."""

from snake_lora_pl.training.fused.decoder import FusedDecoder, fusion_obstacle

__all__ = ["FusedDecoder", "fusion_obstacle"]

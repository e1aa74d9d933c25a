"""A decoder of the Llama family whose forward and backward passes are written out for a frozen base and LoRA."""

from snake_lora_pl.training.fused.decoder import FusedDecoder, why_not_fused

__all__ = ["FusedDecoder", "why_not_fused"]

"""Register LoHa (https://arxiv.org/abs/2108.06098) as an adapter type, then run any command.

python examples/custom_adapter.py fit --config balanced.yaml --model.adapter_type loha
"""

from peft import LoHaConfig, get_peft_model

from snake_lora_pl import AdapterFactory
from snake_lora_pl.__main__ import main


def build(base_model, config):
    loha = LoHaConfig(r=config.rank, alpha=config.alpha, target_modules=config.target_modules, task_type="CAUSAL_LM")
    return get_peft_model(base_model, loha)


AdapterFactory.register("loha", build)

if __name__ == "__main__":
    raise SystemExit(main())

"""Whether transformers' continuous batching writes what `generate` writes, on a CPU and with an adapter.

python bench/batching.py
"""

import logging
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, set_seed

PROMPTS = [[5, 6, 7], [9] * 20, [4, 8, 11, 3, 6]]
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 300,
                         "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2}  # fmt: skip
MLP, GROUPED = {"intermediate_size": 64}, {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16}
KINDS: dict[str, dict[str, Any]] = {
    "llama": MLP, "gpt2": {}, "gpt_neox": MLP, "gpt_bigcode": {}, "mistral": GROUPED, "qwen2": GROUPED,
    "gemma": GROUPED, "gptj": {"rotary_dim": 8}, "falcon": {}, "openai-gpt": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2, "num_heads": 2},
}  # fmt: skip


def main() -> None:
    """Print one line an architecture."""
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    config = GenerationConfig(max_new_tokens=16, do_sample=False, eos_token_id=2, pad_token_id=0)
    for kind, sizes in KINDS.items():
        set_seed(0)
        fitting = {k: v for k, v in SIZES.items() if kind != "gpt_neo" or not k.startswith("num_")}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **(fitting | sizes)))
        lora = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear", init_lora_weights=False)
        model = get_peft_model(model, lora).eval()
        alone = [model.generate(input_ids=torch.tensor([ids]), generation_config=config)[0, len(ids) :].tolist()
                 for ids in PROMPTS]  # fmt: skip
        answers = model.get_base_model().generate_batch(inputs=PROMPTS, generation_config=config, progress_bar=False)
        batched = [answer.generated_tokens for answer in answers.values()]
        lengths = sorted(map(len, batched))
        print(f"{kind:12} {'equal' if sorted(alone) == sorted(batched) else f'other text, of {lengths} tokens'}")


if __name__ == "__main__":
    main()

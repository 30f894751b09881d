"""Run by test_profile_script as a user's script: models whose routing is not that of plain decoders."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import transformers as tf

torch.set_num_threads(1)
IDS = torch.arange(22).view(2, 11)


def llama4() -> None:
    torch.manual_seed(0)
    config = tf.Llama4TextConfig(
        vocab_size=32, hidden_size=16, intermediate_size=8, intermediate_size_mlp=8, num_hidden_layers=4, head_dim=8,
        num_attention_heads=2, num_key_value_heads=2, num_local_experts=4, moe_layers=[1, 3], pad_token_id=0,
        bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    tf.Llama4ForCausalLM(config).eval()(input_ids=IDS)


def switch() -> None:
    torch.manual_seed(0)
    config = tf.SwitchTransformersConfig(
        vocab_size=32, d_model=8, d_ff=8, d_kv=4, num_heads=2, num_layers=4, num_decoder_layers=4, num_experts=4,
        encoder_sparse_step=2, decoder_sparse_step=2, decoder_start_token_id=0,
    )  # fmt: skip
    model = tf.SwitchTransformersForConditionalGeneration(config).eval()
    model.generate(IDS, max_new_tokens=3, min_new_tokens=3, do_sample=False)


def looped() -> None:
    sys.path[:0] = [str(Path(__file__).parents[2] / "benchmarks")]
    import families

    families.build(*families.families()["inkling2_loop"])(input_ids=IDS)


def masked() -> None:
    config = tf.NllbMoeConfig(
        d_model=8, encoder_layers=2, decoder_layers=2, encoder_ffn_dim=8, decoder_ffn_dim=8, num_experts=4,
        encoder_attention_heads=1, decoder_attention_heads=1, encoder_sparse_step=2, decoder_sparse_step=2,
        vocab_size=32,
    )  # fmt: skip
    tf.NllbMoeForConditionalGeneration(config).eval()(input_ids=IDS, labels=IDS[:, :7].contiguous())


if __name__ == "__main__":
    with torch.no_grad():
        {"llama4": llama4, "switch": switch, "looped": looped, "masked": masked}[sys.argv[1]]()

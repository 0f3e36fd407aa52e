"""A model in one GGUF file is the model that was written into it."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from training.errors import UserError
from training.models.loading import load_policy, load_scalar_model
from training.models.pretrained import Pretrained
from training.stage_config import model_path_faults

ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
TOKENS = ["<|endoftext|>", "<s>", "</s>", *ALPHABET, "ab"]
EOS = 2
HEADS, KEY_HEADS, WIDTH, LAYERS = 4, 2, 32, 2
NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=64,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KEY_HEADS,
        max_position_embeddings=64,
        initializer_range=0.2,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=EOS,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def gguf_file(model: LlamaForCausalLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`model` as llama.cpp's converter writes it, with a byte-level tokenizer."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(64)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEY_HEADS)
    writer.add_layer_norm_rms_eps(model.config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_merges(["a b"])
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * 257)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(EOS)
    writer.add_pad_token_id(EOS)
    writer.add_unk_token_id(0)
    for name, tensor in model.state_dict().items():
        writer.add_tensor(gguf_name(name), as_stored(name, tensor))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def gguf_name(name: str) -> str:
    whole = {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
    if name in whole:
        return whole[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest.removesuffix('.weight')]}.weight"


def as_stored(name: str, tensor: torch.Tensor) -> np.ndarray:
    """llama.cpp keeps the two halves of a rotary pair side by side."""
    heads = HEADS if "q_proj" in name else KEY_HEADS if "k_proj" in name else None
    if heads is not None:
        halves = tensor.reshape(heads, 2, -1, tensor.shape[1])
        tensor = halves.swapaxes(1, 2).reshape(tensor.shape)
    return tensor.contiguous().numpy()


@torch.no_grad()
def test_policy_and_reward_model_from_a_gguf_file(
    gguf_file: Path, model: LlamaForCausalLM, tmp_path: Path
) -> None:
    tokenizer = Pretrained(str(gguf_file)).tokenizer
    assert tokenizer.pad_token_id == len(TOKENS)  # not the file's own, which is its EOS
    ids = torch.tensor([[1, *tokenizer("ab cab", add_special_tokens=False)["input_ids"], EOS]])
    assert ids.tolist()[0][1] == TOKENS.index("ab")
    policy = load_policy(Pretrained(str(gguf_file)), tokenizer)
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[:, 0] = False
    logp, _ = policy(ids, torch.ones_like(ids), scored)

    def own_logps(of: LlamaForCausalLM) -> torch.Tensor:
        logits = of(input_ids=ids).logits[0, :-1].double()
        return logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)

    # The pad token's row is new, and takes a little of the probability.
    expected = own_logps(model)
    extra = torch.logsumexp(policy.model(input_ids=ids).logits[0, :-1].double(), -1)
    known = torch.logsumexp(model(input_ids=ids).logits[0, :-1].double(), -1)
    torch.testing.assert_close(logp[0, 1:].double(), expected + known - extra, atol=1e-5, rtol=0)

    policy.model.save_pretrained(tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(own_logps(saved), logp[0, 1:].double(), atol=1e-5, rtol=0)

    reward = load_scalar_model(Pretrained(str(gguf_file)), tokenizer, new_head=True)
    assert (reward(ids, torch.ones_like(ids)) == 0).all()
    own = reward.model.model.layers[1].self_attn.k_proj.weight
    assert torch.equal(own, model.model.layers[1].self_attn.k_proj.weight)


def test_eos_row_gets_its_gradient_where_the_file_calls_it_padding(gguf_file: Path) -> None:
    tokenizer = Pretrained(str(gguf_file)).tokenizer
    policy = load_policy(Pretrained(str(gguf_file)), tokenizer)
    ids = torch.tensor([[1, 5, EOS, 7]])
    scored = torch.tensor([[False, True, True, True]])
    logp, _ = policy(ids, torch.ones_like(ids), scored)
    logp[:, 3].sum().backward()  # what follows EOS depends on EOS's own embedding
    assert policy.model.get_input_embeddings().weight.grad[EOS].norm() > 0


def test_faults_name_the_file(tmp_path: Path) -> None:
    missing = tmp_path / "missing.gguf"
    assert model_path_faults("model_name_or_path", str(missing)) == [
        f"model_name_or_path: {missing} does not exist"
    ]
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF, but no more")
    with pytest.raises(UserError, match=r"broken\.gguf"):
        _ = Pretrained(str(broken)).tokenizer
    other = tmp_path / "weights.bin"
    other.write_bytes(b"")
    (fault,) = model_path_faults("model_name_or_path", str(other))
    assert fault.endswith("is a file; name a model directory or a .gguf file")

"""peft's LoRA on every class: training, saving, merging into dense layers and back, and QLoRA against dense weights."""

import copy
import warnings

import pytest
import torch
from layer_cases import CASES, PACKED_CASES, K, N, assert_same_state, inputs, make

import qlinear

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")

import hf_models  # noqa: E402

from qlinear import peft as adapters  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread", "packed_if_the_case_is", "registered")
every_case = pytest.mark.parametrize("case", CASES + PACKED_CASES, ids=repr)


@pytest.fixture
def registered():
    adapters.register()
    yield
    adapters.unregister()


def config(**options):
    return peft.LoraConfig(**{"target_modules": ["0"], "r": 4, "lora_alpha": 8} | options)


def network(case, **options):
    return torch.nn.Sequential(make(case, **options), torch.nn.ReLU(), torch.nn.Linear(N, 4))


def with_lora(model, **options):
    torch.manual_seed(11)
    return peft.get_peft_model(model, config(**options))


def filled(model, scale=0.02):
    """The model with adapters that do something: peft begins with zeros."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return model


def steps(model, count, rate=1e-2):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = (model(inputs(32, K)) - inputs(32, 4, seed=2)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@every_case
def test_trains_saves_and_loads(case, tmp_path):
    model = network(case)
    packed = copy.deepcopy(model[0]).state_dict()
    plain = model(inputs(3, K)).detach()
    trained = with_lora(model)
    assert type(trained.base_model.model[0]) is adapters.LoraQuantizedLinear
    # B begins with zeros.
    assert torch.equal(trained(inputs(3, K)), plain)
    losses = steps(trained, 12)
    assert losses[-1] < 0.9 * losses[0]
    learned = {name for name, p in trained.named_parameters() if p.requires_grad}
    assert learned == {f"base_model.model.0.lora_{part}.default.weight" for part in "AB"}
    assert_same_state(trained.base_model.model[0].base_layer.state_dict(), packed)
    out = trained(inputs(3, K)).detach()

    trained.save_pretrained(str(tmp_path))
    files = {path.name for path in tmp_path.iterdir()}
    assert "adapter_model.safetensors" in files
    fresh = network(case)
    fresh[2].load_state_dict(model[2].state_dict())
    loaded = peft.PeftModel.from_pretrained(fresh, str(tmp_path))
    assert torch.equal(loaded(inputs(3, K)), out)
    with loaded.disable_adapter():
        assert torch.equal(loaded(inputs(3, K)), plain)


@every_case
def test_merges_into_a_dense_layer_and_back(case):
    trained = filled(with_lora(network(case)))
    layer = trained.base_model.model[0]
    quantized, packed = layer.base_layer, copy.deepcopy(layer.base_layer).state_dict()
    x = inputs(5, K)
    out = trained(x).detach()
    weight = quantized.dequantize(torch.float32) + layer.get_delta_weight("default")

    trained.merge_adapter()
    dense = layer.base_layer
    assert type(dense) is torch.nn.Linear
    assert torch.equal(dense.weight, weight)
    assert not dense.weight.requires_grad
    merged = trained(x)
    # What remains is what quantizing x does in the formats that do it.
    assert (merged - out).abs().max() < (0.1 if case.name.startswith(("int8", "fp8")) else 1e-4)

    trained.unmerge_adapter()
    assert layer.base_layer is quantized
    assert_same_state(quantized.state_dict(), packed)
    assert torch.equal(trained(x), out)

    unloaded = copy.deepcopy(trained).merge_and_unload()
    assert type(unloaded[0]) is torch.nn.Linear
    assert torch.equal(unloaded(x), merged)
    back = trained.unload()
    assert back[0] is quantized


def test_several_adapters_merge_in_any_order():
    model = filled(with_lora(network(CASES[0])))
    model.add_adapter("second", config(r=2))
    layer = filled(model).base_model.model[0]
    quantized = layer.base_layer
    both = quantized.dequantize(torch.float32) + layer.get_delta_weight("default") + layer.get_delta_weight("second")
    layer.merge(adapter_names=["second"])
    layer.merge(safe_merge=True, adapter_names=["default"])
    assert torch.allclose(layer.base_layer.weight, both, rtol=1e-6, atol=1e-7)
    assert layer.merged_adapters == ["second", "default"]
    layer.unmerge()
    assert layer.base_layer is quantized
    assert layer.merged_adapters == []
    layer.merge()
    model.eval()
    layer.unmerge()
    assert not quantized.training
    with pytest.warns(UserWarning, match="unmerged"):
        layer.unmerge()


def test_a_safe_merge_of_a_broken_adapter_changes_nothing():
    layer = filled(with_lora(network(CASES[0]))).base_model.model[0]
    quantized = layer.base_layer
    with torch.no_grad():
        layer.lora_A["default"].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        layer.merge(safe_merge=True)
    assert layer.base_layer is quantized
    assert not layer.merged


@pytest.mark.parametrize("bias", [True, False])
def test_an_adapter_with_a_bias(bias):
    model = filled(with_lora(network(CASES[0], bias=bias), lora_bias=True))
    layer, x = model.base_model.model[0], inputs(3, K)
    out = model(x)
    if not bias:
        with pytest.raises(RuntimeError, match="bias"):
            model.merge_adapter()
        assert isinstance(layer.base_layer, qlinear.EETQLinear)
        return
    model.merge_adapter()
    assert torch.allclose(model(x), out, rtol=1e-4, atol=1e-4)


@every_case
def test_merged_weights_have_the_dtype_that_they_had(case):
    layer = filled(with_lora(network(case, dtype=torch.bfloat16))).base_model.model[0]
    quantized = layer.base_layer
    layer.merge()
    assert layer.base_layer.weight.dtype == quantized.natural_dtype() == torch.bfloat16
    expected = quantized.dequantize(torch.float32) + layer.get_delta_weight("default")
    assert torch.equal(layer.base_layer.weight, expected.bfloat16())
    # In a model that works in another dtype, that one: an nn.Linear takes no other.
    layer.unmerge()
    out = layer(inputs(3, K))
    layer.merge()
    assert layer.base_layer.weight.dtype == out.dtype == torch.float32
    assert layer(inputs(3, K)).dtype == torch.float32


@pytest.mark.parametrize(
    "options", [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}]
)
def test_what_needs_the_dense_weight_is_refused(options):
    with pytest.raises(ValueError, match=r"variant|base weight"):
        with_lora(network(CASES[0]), **options)


def test_without_registration():
    adapters.unregister()
    with pytest.raises(ValueError, match="not supported"):
        with_lora(network(CASES[0]))
    own = config()
    own._register_custom_module(adapters.LORA_LAYERS)
    model = peft.get_peft_model(network(CASES[0]), own)
    assert type(model.base_model.model[0]) is adapters.LoraQuantizedLinear
    plain = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(K, N)), config())
    assert type(plain.base_model.model[0]).__name__ == "Linear"


def test_compiles_whole():
    model = filled(with_lora(network(CASES[0])))
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 5):
        x, twin = (inputs(rows, K).requires_grad_() for _ in range(2))
        out, expected = compiled(x), model(twin)
        assert torch.allclose(out, expected, rtol=1e-5, atol=1e-5)
        out.sum().backward()
        expected.sum().backward()
        assert torch.allclose(x.grad, twin.grad, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


def test_other_layers_keep_peft_own():
    model = with_lora(network(CASES[0]), target_modules=["0", "2"])
    kinds = [type(model.base_model.model[i]) for i in (0, 2)]
    assert kinds == [adapters.LoraQuantizedLinear, peft.tuners.lora.layer.Linear]


# ---- QLoRA ----


def token_losses(model, count):
    """The losses of `count` steps on sequences that can be learned: each token follows from the one before."""
    torch.manual_seed(5)
    tuned = peft.get_peft_model(
        model,
        peft.LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"),
    )
    starts = torch.arange(16)
    tokens = (starts[:, None] * 5 + torch.arange(24)[None] * 7) % hf_models.VOCABULARY
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=3e-3)
    losses = []
    for _ in range(count):
        optimizer.zero_grad()
        loss = tuned(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return tuned, losses


QLORA = {
    "nf4": ("bitsandbytes-nf4", {}),
    "fp4": ("bitsandbytes-fp4", {}),
    "gptq": ("gptq", {"group_size": 32}),
    "awq": ("awq", {"group_size": 32}),
    "eetq": ("eetq", {}),
}


@pytest.mark.parametrize("form", QLORA)
def test_qlora_has_the_losses_of_the_dequantized_model(form):
    quantize, options = QLORA[form]
    model = hf_models.dense("llama")
    report = qlinear.replace_linear(model, quantize, **options)
    assert len(report.replaced) == 14
    dense = copy.deepcopy(model)
    assert len(qlinear.dequantize(dense, torch.float32).replaced) == 14
    count = 16 if form == "nf4" else 6
    tuned, losses = token_losses(model, count)
    _, expected = token_losses(dense, count)
    assert losses == pytest.approx(expected, rel=2e-5)
    assert losses[-1] < (0.9 if form == "nf4" else 0.98) * losses[0]
    assert sum(isinstance(m, adapters.LoraQuantizedLinear) for m in tuned.modules()) == 14


def test_qlora_with_gradient_checkpointing_in_bfloat16():
    model = hf_models.dense("llama").to(torch.bfloat16)
    qlinear.replace_linear(model, "bitsandbytes-nf4")
    plain = token_losses(copy.deepcopy(model), 4)[1]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    assert token_losses(model, 4)[1] == plain


@pytest.mark.parametrize("to", ["gptq-4", "nf4", "fp8"])
def test_a_checkpoint_by_way_of_transformers(tmp_path, to):
    """As QLoRA is run: transformers' from_pretrained, peft's preparation, training, merging and back."""
    hf_models.dense("llama").to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    qlinear.quantize_checkpoint(tmp_path / "dense", tmp_path / "quantized", to, group_size=32)
    qlinear.hf.register()
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")
    finally:
        qlinear.hf.unregister()
    tuned, losses = token_losses(peft.prepare_model_for_kbit_training(model), 4)
    assert losses[-1] < losses[0]
    tuned.eval()
    tokens = torch.tensor([[5, 12, 19]])
    out = tuned(input_ids=tokens).logits
    tuned.merge_adapter()
    assert (tuned(input_ids=tokens).logits - out).abs().max() < (0.1 if to == "fp8" else 1e-4) * out.abs().max()
    tuned.unmerge_adapter()
    assert torch.equal(tuned(input_ids=tokens).logits, out)


def test_a_tuned_model_merges_and_generates_the_same():
    model = hf_models.dense("llama")
    qlinear.replace_linear(model, "bitsandbytes-nf4")
    tuned, _ = token_losses(model, 8)
    tuned.eval()
    prompt = torch.tensor([[5, 12, 19]])
    expected = tuned.generate(input_ids=prompt, max_new_tokens=12, do_sample=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        merged = tuned.merge_and_unload()
    assert not any(isinstance(m, qlinear.Linear4bit) for m in merged.modules())
    assert torch.equal(merged.generate(input_ids=prompt, max_new_tokens=12, do_sample=False), expected)

"""replace_linear and dequantize on whole models."""

import copy
import gc
import weakref

import pytest
import torch
from layer_cases import assert_same_state
from torch import nn

import qlinear
from qlinear import model as models
from qlinear.layers._module import QuantizedLinear

K = 128


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(K, 2 * K)
        self.down = nn.Linear(2 * K, K, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(K)
        self.lm_head = nn.Linear(K, 32)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(self.norm(x))


LINEARS = ["layers.0.up", "layers.0.down", "layers.1.up", "layers.1.down"]
KINDS = {
    "eetq": qlinear.EETQLinear,
    "gptq": qlinear.QuantLinear,
    "awq": qlinear.AWQLinear,
    "bitsandbytes": qlinear.Linear8bitLt,
    "bitsandbytes-nf4": qlinear.Linear4bit,
    "bitsandbytes-fp4": qlinear.Linear4bit,
    "fp8": qlinear.Fp8Linear,
}


def new_model(seed=0):
    torch.manual_seed(seed)
    return Model().eval()


@pytest.mark.parametrize(("quantize", "kind"), KINDS.items())
def test_replaces_reports_and_undoes(quantize, kind):
    model = new_model()
    original = copy.deepcopy(model)
    x = torch.randn(5, K)
    report = qlinear.replace_linear(model, quantize)
    assert report.replaced == LINEARS
    assert report.skipped == [("lm_head", "in skip: lm_head")]
    assert all(type(model.get_submodule(name)) is kind for name in LINEARS)
    assert type(model.lm_head) is nn.Linear
    linears = [original.get_submodule(name) for name in LINEARS]
    assert report.bytes_before == sum(4 * p.numel() for linear in linears for p in linear.parameters())
    assert report.bytes_after == sum(model.get_submodule(name).nbytes for name in LINEARS)
    assert report.bytes_after < 0.3 * report.bytes_before
    assert "4 layers replaced" in str(report)
    assert not model.layers[0].up.training
    out = model(x)
    assert (out - original(x)).abs().max() < 0.35 * original(x).abs().max()

    back = qlinear.dequantize(model)
    assert back.replaced == LINEARS
    assert back.bytes_after == report.bytes_before
    assert list(model.state_dict()) == list(original.state_dict())
    for name in LINEARS:
        linear = model.get_submodule(name)
        assert type(linear) is nn.Linear
        assert linear.weight.dtype == torch.float32
        assert linear.weight.requires_grad
    assert torch.allclose(model(x), out, atol=0.02 * out.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dequantize_gives_back_the_dtype(dtype):
    for quantize in KINDS:
        model = new_model().to(dtype)
        qlinear.replace_linear(model, quantize)
        assert model(torch.randn(2, K).to(dtype)).dtype == dtype
        qlinear.dequantize(model)
        assert {p.dtype for p in model.parameters()} == {dtype}
    model = new_model()
    qlinear.replace_linear(model, "eetq")
    qlinear.dequantize(model, dtype)
    assert model.layers[0].up.weight.dtype == dtype
    assert model.layers[0].up.bias.dtype == dtype


def test_options():
    model = new_model()
    report = qlinear.replace_linear(model, "gptq", skip=(), bits=8, group_size=64)
    assert "lm_head" in report.replaced
    assert model.lm_head.bits == 8
    assert model.lm_head.groupsize == 64
    model = new_model()
    qlinear.replace_linear(model, "bitsandbytes", threshold=2.0)
    assert model.layers[0].up.threshold == 2.0
    model = new_model()
    qlinear.replace_linear(model, "bitsandbytes-nf4", blocksize=128)
    assert model.layers[0].up.blocksize == 128
    model = new_model()
    qlinear.replace_linear(model, "bitsandbytes-fp4", compress_statistics=False, quant_storage=torch.bfloat16)
    assert not model.layers[0].up.compress_statistics
    assert model.layers[0].up.weight.dtype == torch.bfloat16
    model = new_model()
    qlinear.replace_linear(model, "fp8", input_scale_ub=2.5)
    assert model.layers[0].up.input_scale_ub == 2.5


def test_the_default_device_has_no_say():
    model = new_model()
    with torch.device("meta"):
        assert qlinear.replace_linear(model, "eetq").replaced == LINEARS


def test_skip_and_filter():
    model = new_model()
    report = qlinear.replace_linear(model, "eetq", skip=["layers.0", "up"])
    assert report.replaced == ["layers.1.down", "lm_head"]
    assert dict(report.skipped)["layers.0.up"] == "in skip: layers.0"
    assert dict(report.skipped)["layers.1.up"] == "in skip: up"
    model = new_model()
    report = qlinear.replace_linear(model, "eetq", filter=lambda name, module: module.out_features == K)
    assert report.replaced == ["layers.0.down", "layers.1.down"]
    assert dict(report.skipped)["layers.0.up"] == "filter"
    # Part of a name between dots is not a name.
    assert qlinear.replace_linear(new_model(), "eetq", skip=("ayers", "lm")).replaced == [*LINEARS, "lm_head"]


def test_wrong_arguments_change_nothing():
    model = new_model()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(NotImplementedError, match="Quantization `int3` is not implemented yet"):
        qlinear.replace_linear(model, "int3")
    with pytest.raises(NotImplementedError, match="bits"):
        qlinear.replace_linear(model, "gptq", bits=5)
    with pytest.raises(ValueError, match="group_size"):
        qlinear.replace_linear(model, "awq", group_size=0)
    with pytest.raises(ValueError, match="threshold"):
        qlinear.replace_linear(model, "bitsandbytes", threshold=-1.0)
    with pytest.raises(ValueError, match="blocksize"):
        qlinear.replace_linear(model, "bitsandbytes-fp4", blocksize=100)
    with pytest.raises(TypeError, match="skip"):
        qlinear.replace_linear(model, "eetq", skip="lm_head")
    assert_same_state(model.state_dict(), before)
    assert all(type(model.get_submodule(name)) is nn.Linear for name in LINEARS)


def test_a_layer_that_the_format_cannot_hold_stays():
    model = nn.Sequential(nn.Linear(64, 100), nn.Linear(100, 64), nn.Linear(64, 64, dtype=torch.float64))
    report = qlinear.replace_linear(model, "eetq")
    assert report.replaced == ["0"]
    assert [name for name, _ in report.skipped] == ["1", "2"]
    assert "64" in report.skipped[0][1]
    assert "float64" in report.skipped[1][1]
    assert type(model[1]) is nn.Linear


def test_an_error_leaves_a_working_model(monkeypatch):
    model = new_model()
    x = torch.randn(2, K)
    real, calls = models.EETQLinear, []

    def fails_late(weight, bias):
        calls.append(1)
        if len(calls) == 4:
            raise MemoryError
        return real(weight, bias)

    monkeypatch.setattr(models, "EETQLinear", fails_late)
    with pytest.raises(MemoryError):
        qlinear.replace_linear(model, "eetq")
    kinds = [type(model.get_submodule(name)) for name in LINEARS]
    assert kinds == [real, real, nn.Linear, nn.Linear]
    assert torch.isfinite(model(x)).all()


def test_tied_weights_stay():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(64, K)
            self.output = nn.Linear(K, 64, bias=False)
            self.output.weight = self.embedding.weight
            self.free = nn.Linear(K, K)

    model = Tied()
    report = qlinear.replace_linear(model, "eetq", skip=())
    assert report.replaced == ["free"]
    assert "tied" in dict(report.skipped)["output"]
    assert model.output.weight is model.embedding.weight


def test_a_module_in_two_places_is_replaced_once():
    shared = nn.Linear(K, K)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    report = qlinear.replace_linear(model, "eetq")
    assert report.replaced == ["a"]
    assert isinstance(model["a"], qlinear.EETQLinear)
    assert model["b"][0] is model["a"]
    assert qlinear.dequantize(model).replaced == ["a"]
    assert model["b"][0] is model["a"]
    assert type(model["a"]) is nn.Linear


def test_attention_keeps_the_weights_that_it_reads_itself():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(K, 4), "block": nn.TransformerEncoderLayer(K, 4)})
    report = qlinear.replace_linear(model, "eetq")
    assert not report.replaced
    reasons = dict(report.skipped)
    assert "subclass of nn.Linear" in reasons["attention.out_proj"]
    assert "reads its weight itself" in reasons["block.linear1"]
    model["block"].eval()(torch.randn(2, 3, K))


def test_other_reasons_to_stay():
    class Special(nn.Linear):
        pass

    model = nn.ModuleDict(
        {
            "special": Special(K, K),
            "meta": nn.Linear(K, K, device="meta"),
            "lazy": nn.LazyLinear(K),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(K, K)),
            "hooked": nn.Linear(K, K),
        }
    )
    model["hooked"].register_forward_hook(lambda *_: None)
    report = qlinear.replace_linear(model, "eetq")
    assert not report.replaced
    reasons = dict(report.skipped)
    assert "Special" in reasons["special"]
    assert "meta" in reasons["meta"]
    assert set(reasons) == {"special", "meta", "lazy", "normed", "hooked"}
    linear = nn.Linear(K, K)
    assert "the model itself" in dict(qlinear.replace_linear(linear, "eetq").skipped)[""]
    layer = qlinear.EETQLinear(linear.weight, None)
    assert "the model itself" in dict(qlinear.dequantize(layer).skipped)[""]


def test_conv1d_of_transformers():
    Conv1D = pytest.importorskip("transformers.pytorch_utils").Conv1D
    torch.manual_seed(0)
    model = nn.Sequential(Conv1D(96, K))
    nn.init.normal_(model[0].weight, std=0.1)
    x = torch.randn(3, K)
    expected = model(x)
    for quantize in KINDS:
        twin = copy.deepcopy(model)
        assert qlinear.replace_linear(twin, quantize).replaced == ["0"]
        assert (twin[0].in_features, twin[0].out_features) == (K, 96)
        assert (twin(x) - expected).abs().max() < 0.25 * expected.abs().max()


def test_each_weight_is_freed_before_the_next():
    model = new_model()
    weights = [weakref.ref(model.get_submodule(name).weight) for name in LINEARS]
    alive = []

    class Recorder:
        def __call__(self, weight, bias):
            alive.append([ref() is not None for ref in weights])
            return qlinear.EETQLinear(weight, bias)

    gc.collect()
    gc.disable()
    real = models.makers
    try:
        models.makers = lambda **options: real(**options) | {"eetq": Recorder()}
        qlinear.replace_linear(model, "eetq")
    finally:
        models.makers = real
        gc.enable()
    # The first call is the probe of the options.
    assert alive[1:] == [[i >= done for i in range(4)] for done in range(4)]


def test_progress_bar(capsys, monkeypatch):
    qlinear.replace_linear(new_model(), "eetq")
    assert capsys.readouterr().err == ""
    qlinear.replace_linear(new_model(), "eetq", progress=True)
    assert "4/4" in capsys.readouterr().err
    monkeypatch.setattr(models, "_PROGRESS_AFTER_SECONDS", -1.0)
    qlinear.replace_linear(new_model(), "eetq")
    assert "4/4" in capsys.readouterr().err
    qlinear.replace_linear(new_model(), "eetq", progress=False)
    assert capsys.readouterr().err == ""


def test_state_dict_of_a_replaced_model_loads_into_another():
    for quantize in KINDS:
        one, other = new_model(0), new_model(1)
        qlinear.replace_linear(one, quantize)
        qlinear.replace_linear(other, quantize)
        other.load_state_dict(one.state_dict(), strict=True)
        assert_same_state(other.state_dict(), one.state_dict())
        x = torch.randn(2, K)
        assert torch.equal(one(x), other(x))
        assert sum(isinstance(m, QuantizedLinear) for m in one.modules()) == 4

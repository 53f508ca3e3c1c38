"""A configuration's values: a value that would ruin a run, or end in a traceback, is refused by the name of its key."""

import math

import pytest

from dcdit.checkpoints.folder import save_checkpoint
from dcdit.data.image_folder import ImageFolder
from dcdit.data.sources import Latents
from dcdit.errors import ConfigError, DataError
from dcdit.model.config import DCDiTConfig, preset
from dcdit.model.dcdit import DCDiT
from dcdit.model.plain_dit import PlainDiT
from dcdit.sampling.edits import read_edit
from dcdit.training.config import TrainConfig, load_config
from dcdit.training.config_groups import DataConfig, OptimConfig
from dcdit.training.objectives import DDPM, FlowMatching
from dcdit.training.resume import check_allowed
from dcdit.training.transformers.config import TransformerConfig
from dcdit.training.unused import unused


@pytest.fixture
def digits(tmp_path):
    """The smallest config file that fits together."""
    (tmp_path / "digits.yaml").write_text("model: {preset: digits}")
    return tmp_path / "digits.yaml"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lr=nan", "optim.lr must be finite, got nan"),
        ("optim.lr=.inf", "optim.lr must be finite, got inf"),
        ("optim.lr=-1", "optim.lr must not be negative, got -1.0"),
        ("optim.weight_decay=-1", "optim.weight_decay must not be negative"),
        ("optim.grad_clip=-1", "optim.grad_clip must not be negative"),
        ("optim.beta2=1", "optim.beta2 must be in [0, 1), got 1.0"),
        ("optim.ema_decay=2", "optim.ema_decay must be in [0, 1], got 2.0"),
        ("optim.ema_decay=[]", "optim.ema_decay needs one or several different values"),
        ("optim.ema_decay=[0.9,0.9]", "optim.ema_decay needs one or several different values"),
        ("optim.warmup_steps=-1", "optim.warmup_steps must not be negative, got -1"),
        ("drop_warmup=-1", "drop_warmup must not be negative, got -1"),
        ("codec.factor=0", "codec.factor must be at least 1, got 0"),
        ("batch_size=100000000000", "batch_size must be at most 1048576, got 100000000000"),
        ("num_classes=3", "unknown config key 'num_classes'; did you mean 'model.num_classes'?"),
        ("learning_rate=1", "unknown config key 'learning_rate'; known: output, kind"),
        ("device=cuda", "unknown config key 'device'; known: output, kind"),
        ("model.patch_size=2", "unknown model key 'patch_size'; did you mean 'input_size'? known: input_size, in_"),
        ("model.dropout=0.1", "unknown model key 'dropout'; known: input_size"),
        ("output=", "output must be text, got None"),
        ('output=""', "output must be a folder, got an empty name"),
        ("optim={lr: 1, lr: 2}", "cannot read the value of"),
        ("drop_fractions=" + "[" * 5000, "cannot read the value of"),
        ("ratio_weight=-0.1", "ratio_weight must not be negative"),
        ("max_minutes=-1", "max_minutes must not be negative"),
        ("upcycle.distill_weight=nan", "upcycle.distill_weight must be finite"),
        ("upcycle.distill_weight=-1", "upcycle.distill_weight must not be negative"),
        ("seed=9223372036854775808", "seed must be below 2**63, got 9223372036854775808"),
        ("data.workers=-1", "data.workers must not be negative"),
        ("data.workers=1000", "data.workers must be at most 256, got 1000"),
        ("steps=5 # five", "steps must be an integer, got '5 # five'"),
        ("data.size=0", "data.size must be at least 1, got 0"),
        ("drop_fractions=[0,nan]", "drop_fractions must be finite"),
        ("drop_fractions=0.99999999", "drop_fractions must lie in [0, 1), got 0.99999999"),
        ("model.sigma=inf", "model.sigma must be finite"),
        ("model.mlp_ratio=0.001", "mlp_ratio must be finite and at least 1/hidden_size = 1/96, got 0.001"),
    ],
)
def test_values_that_ruin_a_run_are_named(override, message, digits):
    with pytest.raises(ConfigError) as error:
        load_config(digits, [override])
    assert message in str(error.value)


@pytest.mark.parametrize("name", ["mlp_ratio", "target_ratio", "sigma"])
@pytest.mark.parametrize("value", [math.inf, math.nan, -1.0])
def test_sizes_of_a_model_are_finite_and_positive(name, value):
    """From a checkpoint's config.json too, where JSON has Infinity and NaN."""
    with pytest.raises(ConfigError, match=f"^{name} .*finite.*, got {value}$"):
        DCDiTConfig.from_dict({name: value})


def test_keys_that_stand_twice_are_refused(tmp_path):
    file = tmp_path / "twice.yaml"
    file.write_text("model: {preset: digits}\nsteps: 3\nsteps: 4\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml is not YAML: the key steps is there twice"):
        load_config(file)
    file.write_text("model: " + "[" * 5000)
    with pytest.raises(ConfigError, match="is not YAML"):
        load_config(file)
    file.write_text("defaults: &d {lr: 1.0}\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="unknown config key 'defaults'"):
        load_config(file)


def test_latents_need_the_autoencoder_that_made_them(digits):
    with pytest.raises(ConfigError, match=r"data\.kind=latents needs the autoencoder that made them"):
        load_config(digits, ["data.kind=latents", "data.path=x"])


def test_the_ends_of_the_ranges_are_taken(digits):
    ends = ["optim.lr=0", "optim.beta2=0", "optim.ema_decay=1", "seed=9223372036854775807", "drop_fractions=0.9999999"]
    config = load_config(digits, ends)
    assert config.seed == 2**63 - 1 and config.optim.ema_decay == (1,) and config.drop_fractions == (0.9999999,)


def test_the_defaults_fit_each_other(tmp_path):
    """An empty file trains digits; a user's model names its objective's requirements."""
    (tmp_path / "empty.yaml").touch()
    assert load_config(tmp_path / "empty.yaml").model == preset("digits")
    with pytest.raises(ConfigError, match=r"set model\.learn_sigma=false or objective=ddpm$"):
        load_config(tmp_path / "empty.yaml", ["model.hidden_size=96"])
    own = load_config(tmp_path / "empty.yaml", ["objective=ddpm", "model.num_classes=5"]).model
    assert own == DCDiTConfig(num_classes=5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["time_shift=0"], "time_shift must be positive, got 0"),
        (["time_shift=3", "objective=ddpm"], "time_shift is of objective flow, this run has ddpm"),
        (["min_snr=5"], "min_snr is of objective ddpm, this run has flow"),
        (["min_snr=-1", "objective=ddpm"], "min_snr must not be negative"),
    ],
)
def test_weights_and_shifts_belong_to_an_objective(overrides, message, digits):
    with pytest.raises(ConfigError, match=message):
        load_config(digits, overrides)


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("output=#12", "#12"),
        ("output=runs/a #3", "runs/a #3"),
        ('output="a #3"', "a #3"),
        ("output=a#3", "a#3"),
        ("output='#'", "#"),
    ],
)
def test_an_override_has_no_comment(override, value, digits):
    assert load_config(digits, [override]).output == value


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], []),
        (["codec.scale=0.5", "codec.pretrained=a"], ["codec.pretrained", "codec.scale"]),
        (["data.size=16", "data.background=red", "data.path=a"], ["data.size", "data.background", "data.path"]),
        (["data.kind=folder", "data.size=16", "data.path=a"], []),
        (["upcycle.distill_steps=5", "validation.items=2"], ["upcycle.distill_steps", "validation.items"]),
        (["from=a", "upcycle.distill_steps=5", "validation.every=1", "validation.items=2"], []),
        (["validation.every=1", "validation.steps=3"], ["validation.steps"]),
        (["kind=sparse", "drop_warmup=3"], ["drop_warmup"]),
        (["kind=sparse", "model.predict_clean=true"], ["model.predict_clean"]),
        (["model.router=guess", "ratio_weight=1"], ["ratio_weight"]),
        (["ratio_weight=1"], []),
    ],
)
def test_keys_that_a_run_does_not_read(overrides, names, digits):
    assert [line.split(" is of ")[0] for line in unused(load_config(digits, overrides))] == names


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: TrainConfig(steps="2"), "steps must be an integer, got '2'"),
        (lambda: TrainConfig(drop_fractions=("a",)), "drop_fractions must be a number, got 'a'"),
        (lambda: TrainConfig(optim=OptimConfig(lr=None)), "optim.lr must be a number, got None"),
        (lambda: TrainConfig(data=DataConfig(kind="folders")), "data.kind must be one of digits, folder"),
        (lambda: TrainConfig(optim={"lr": 1e-3}), "optim must be a OptimConfig, got a dict"),
        (lambda: TransformerConfig(source="a", latents="b", batch_size=2.5), "batch_size must be an integer, got 2.5"),
        (lambda: check_allowed("optim.lr", {}), "allow must be a list of keys, got 'optim.lr'"),
        (lambda: FlowMatching(0), "shift must be positive and finite, got 0"),
        (lambda: FlowMatching("3"), "shift must be positive and finite, got '3'"),
        (lambda: DDPM(True, min_snr=-1), "min_snr must be finite and not negative, got -1"),
        (lambda: PlainDiT(DCDiTConfig(), patch=3), "patch must divide input_size (32, 32), got 3"),
        (lambda: PlainDiT(DCDiTConfig(), patch=0), "patch must divide input_size (32, 32), got 0"),
        (lambda: ImageFolder(".", "16"), "size must be from 1 to 16384 pixels, got '16'"),
        (lambda: ImageFolder(".", 20_000), "size must be from 1 to 16384 pixels, got 20000"),
        (lambda: Latents(".", 4), "shape must be that of each latent, (C, H, W), got 4"),
        (lambda: read_edit("a", "b", None, None, 28, "cpu"), "pixels must be (height, width) of the pictures"),
        (lambda: save_checkpoint("a", DCDiT(preset("digits")), extra="flow"), "extra must be a dict, got a str"),
    ],
)
def test_values_from_python_are_looked_at_as_those_from_yaml_are(make, message):
    with pytest.raises((ConfigError, DataError)) as error:
        make()
    assert message in str(error.value)


def test_python_may_give_what_yaml_may():
    config = TrainConfig(drop_fractions=[0, 0.5], optim=OptimConfig(lr=1, ema_decay=0.9))
    assert config.drop_fractions == (0.0, 0.5) and config.optim == OptimConfig(lr=1.0, ema_decay=(0.9,))

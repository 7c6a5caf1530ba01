import math

import pytest
import torch
import yaml

from gossamer.errors import ConfigurationError
from gossamer.learning_rate import CosineSchedule, MultiStepSchedule
from gossamer.penalties import L0, as_penalty
from gossamer.recipe import METHODS, OPTIMIZERS, Recipe, load_recipe, parse_recipe, shipped
from gossamer.schedule import EpochPeriods
from gossamer.source import Source, dump
from gossamer.weights import DSR, GMP, RigL

TEXT = """\
description: a test
data:
  name: digits
  batch_size: 32
model:
  name: mnist_mlp
  width: 0.5
optimizer:
  name: SGD
  lr: 1e-1
  momentum: 0.9
schedule: {type: multistep, milestones: [2, 4]}
epochs: 8
methods:
  - type: dsr
    sparsity: 0.9
    every: 20
  - type: gmp
    sparsity: 0.5
    end: 75%
"""


def parse(*changes: tuple[str, str]) -> Recipe:
    text = TEXT
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return parse_recipe("t.yaml", text)


def refusal(*changes: tuple[str, str]) -> str:
    with pytest.raises(ConfigurationError) as caught:
        parse(*changes).build_methods(1000, 100, 0)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("old", "new", "place", "said"),
    [
        ("epochs: 8", "epoch: 8", "t.yaml:13: epoch:", "unknown key; did you mean 'epochs'?"),
        ("batch_size: 32", "batchsize: 32", "t.yaml:4: data.batchsize:", "did you mean 'batch_size'?"),
        ("  momentum: 0.9", "  momemtum: 0.9", "t.yaml:11: optimizer.momemtum:", "did you mean 'momentum'?"),
        ("every: 20", "evry: 20", "t.yaml:17: methods.0.evry:", "did you mean 'every'?"),
        ("milestones: [2, 4]", "milestons: [2]", "t.yaml:12: schedule.milestons:", "did you mean 'milestones'?"),
        ("epochs: 8", "epochs: eight", "t.yaml:13: epochs:", "must be a valid integer, got 'eight'"),
        ("epochs: 8", "epochs: true", "t.yaml:13: epochs:", "must be a valid integer, got True"),
        ("epochs: 8", "epochs: 8.5", "t.yaml:13: epochs:", "got 8.5"),
        ("epochs: 8", "epochs: 0", "t.yaml:13: epochs:", "must be greater than or equal to 1, got 0"),
        ("epochs: 8", "epochs: '8'", "t.yaml:13: epochs:", "must be a valid integer, got '8'"),
        ("epochs: 8\n", "", "t.yaml:1: epochs:", "missing"),
        ("[2, 4]", "[2, four]", "t.yaml:12: schedule.milestones.1:", "got 'four'"),
        ("type: multistep", "type: cosin", "t.yaml:12: schedule:", "got type 'cosin'; allowed are 'constant', 'multis"),
        ("type: multistep, ", "", "t.yaml:12: schedule:", "'type' is missing"),
        ("  name: SGD\n", "", "t.yaml:8: optimizer.name:", "missing"),
        ("  name: SGD", "  name: Adamm", "t.yaml:9: optimizer.name:", "did you mean 'Adam'?"),
        ("  name: SGD", "  name: LBFGS", "t.yaml:9: optimizer.name:", "flat vectors"),
        ("lr: 1e-1", "lr: fast", "t.yaml:10: optimizer.lr:", "expected a finite number, got 'fast'"),
        ("lr: 1e-1", "lr: -1", "t.yaml:10: optimizer.lr:", "SGD: Invalid lr: -1"),
        ("lr: 1e-1", "nesterov: 1", "t.yaml:10: optimizer.nesterov:", "expected true or false, got 1"),
        ("sparsity: 0.9", "sparsity: 1.5", "t.yaml:16: methods.0.sparsity:", "[0, 1), got 1.5"),
        ("sparsity: 0.9", "sparsity: most", "t.yaml:16: methods.0.sparsity:", "got 'most'"),
        ("every: 20", "heuristic: best", "t.yaml:17: methods.0.heuristic:", "'paper', 'within'"),
        ("every: 20", "every: 0", "t.yaml:17: methods.0.every:", "at least 1, got 0"),
        ("every: 20", "every: often", "t.yaml:17: methods.0.every:", "got 'often'; allowed are a number of optimizer"),
        ("every: 20", "every: {0: 20}", "t.yaml:17: methods.0.every:", "periods: {0: 100"),
        ("every: 20", "every: {periods: {0: 9}, end: 2}", "t.yaml:17: methods.0.every:", "unknown key 'end'"),
        ("every: 20", "every: {periods: {1: 9}}", "t.yaml:17: methods.0.every:", "from epoch 0"),
        ("end: 75%", "end: 175%", "t.yaml:20: methods.1.end:", "got '175%'"),
        ("    end: 75%\n", "", "t.yaml:18: methods.1:", "gmp needs 'end'"),
        (
            "type: gmp",
            "type: gpm",
            "t.yaml:18: methods.1.type:",
            "did you mean 'gmp'?; allowed are continuous, dsr, gmp",
        ),
        ("    end: 75%", "    end: 500\n    begin: 600", "t.yaml:", "methods.1"),
        ("description: a test", "seeds: [1, 1]", "t.yaml:1: seeds:", "given twice"),
        ("description: a test", "seeds: []", "t.yaml:1: seeds:", "at least 1"),
        ("description: a test", "seeds: [-1]", "t.yaml:1: seeds.0:", "got -1"),
        ("description: a test", "precision: fp8", "t.yaml:1: precision:", "'fp32' or 'bf16', got 'fp8'"),
        ("description: a test", "clip_grad_norm: .inf", "t.yaml:1: clip_grad_norm:", "finite"),
        ("description: a test", "seeds: [9223372036854775808]", "t.yaml:1: seeds.0:", "9223372036854775807, got 92"),
        ("every: 20", "seed: 99999999999999999999", "t.yaml:17: methods.0.seed:", "at most 9223372036854775807, got 9"),
        ("description: a test", "threads: 100000", "t.yaml:1: threads:", "less than or equal to 1024, got 100000"),
        ("epochs: 8", "epochs: " + "9" * 400, "t.yaml:13: epochs:", "less than or equal to 1000000000"),
        ("lr: 1e-1", "lr: .nan", "t.yaml:10: optimizer.lr:", "expected a finite number, got nan"),
        ("  momentum: 0.9", "  momentum: .inf", "t.yaml:11: optimizer.momentum:", "expected a finite number, got inf"),
        ("lr: 1e-1", "lr: " + "9" * 400, "t.yaml:10: optimizer.lr:", "expected a finite number"),
        ("lr: 1e-1", "foreach: all", "t.yaml:10: optimizer.foreach:", "expected true, false or null, got 'all'"),
        ("lr: 1e-1", "fused: 1", "t.yaml:10: optimizer.fused:", "expected true, false or null, got 1"),
        ("lr: 1e-1", "differentiable: true", "t.yaml:10: optimizer.differentiable:", "unknown key"),
        ("description: a test", "epochs: 9", "t.yaml:13: epochs:", "given twice"),
        ("description: a test", "description: a\0b", "t.yaml:1:", "not valid YAML: unacceptable character #x0000"),
        ("epochs: 8", "epochs: 8\nseeds: [\0]", "t.yaml:14:", "not valid YAML: unacceptable character #x0000"),
        ("epochs: 8", "epochs: !!int x", "t.yaml:13:", "not valid YAML: 'x' cannot be read as int"),
        ("epochs: 8", "epochs: !!int ''", "t.yaml:13:", "'' cannot be read as int"),
        ("epochs: 8", "epochs: !!bool x", "t.yaml:13:", "'x' cannot be read as bool"),
        ("epochs: 8", "epochs: !!timestamp x", "t.yaml:13:", "'x' cannot be read as timestamp"),
        ("lr: 1e-1", "lr: !!float abc", "t.yaml:10:", "'abc' cannot be read as float"),
        ("epochs: 8", "epochs: 2020-13-45", "t.yaml:13: epochs:", "must be a valid integer, got '2020-13-45'"),
        ("epochs: 8", "epochs: " + "9" * 5000, "t.yaml:13:", "cannot be read as int"),
        ("epochs: 8", "epochs: 1:30", "t.yaml:13: epochs:", "must be a valid integer, got '1:30'"),
        (TEXT, "[" * 10_000, "t.yaml:1:", "not valid YAML: nested too deeply"),
        ("epochs: 8", "epochs: 8\n~: 6", "t.yaml:14: None:", "unknown key"),
        ("epochs: 8", "epochs: 8\ntrue: 6", "t.yaml:14: True:", "unknown key"),
        ("description: a test", "a: [1", "t.yaml:2:", "not valid YAML"),
        ("description: a test", "a: !!python/name:os.system", "t.yaml:1:", "not valid YAML"),
        (TEXT, "- a list", "t.yaml:1:", "expected a mapping"),
        (TEXT, "", "t.yaml:1:", "expected a mapping"),
        ("data:\n  name: digits\n  batch_size: 32", "data: digits", "t.yaml:2: data:", "must be a mapping"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused_with_its_place(old, new, place, said):
    message = refusal((old, new))
    assert message.startswith(place)
    assert said in message


def test_a_step_that_cannot_work_is_refused_once_the_length_of_the_run_is_known():
    recipe = parse(("    end: 75%", "    end: 200\n    begin: 50%"))
    with pytest.raises(ConfigurationError, match=r"^t.yaml:\d+: methods\.1.* got 200"):
        recipe.build_methods(1000, 100, 0)
    assert len(recipe.build_methods(100, 10, 0)) == 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("optimizer.lr=fast", "command line 'optimizer.lr=fast': optimizer.lr: expected a finite number"),
        ("methods.0.sparsity=2", "command line 'methods.0.sparsity=2': methods.0.sparsity:"),
        ("methods.2.sparsity=0.5", "methods is a list of 2, it has no item '2'"),
        ("methods.last.sparsity=0.5", "it has no item 'last'"),
        ("epochs.value=3", "epochs is 8, which has no 'value'"),
        ("epochs", "expected key=value"),
        ("=3", "expected key=value"),
        ("epochs=[1", "command line 'epochs=[1': not valid YAML"),
        ("epochs=!!int x", "command line 'epochs=!!int x': not valid YAML: 'x' cannot be read as int"),
        ("epochs=2020-13-45", "epochs: must be a valid integer, got '2020-13-45'"),
        ("epochs=" + "9" * 5000, "cannot be read as int"),
        (
            "optimizer={name: Adam, betas: [a, b]}",
            "optimizer.betas: expected a list of 2 finite numbers, got ['a', 'b']",
        ),
        ("optimizer={name: Adam, betas: [0.9, .nan]}", "optimizer.betas: expected a list of 2 finite numbers"),
        ("optimizer={name: Adam, capturable: true}", "optimizer.capturable: unknown key"),
        ("optimizer={name: SGD, lr: 0.1, lr: 0.2}", "lr: this key is given twice"),
        ("optimizer.name=sgd", "no optimizer 'sgd'; did you mean 'SGD'?"),
        ("schedule=cosine", "schedule: must be a mapping of keys to values, such as {type: cosine}, got 'cosine'"),
        ("methods." + "9" * 5000 + "=1", "methods is a list of 2, it has no item '999"),
        ("0=1", "command line '0=1': 0: unknown key"),
        ("optimizer.lr=1e39", "optimizer.lr: expected a number that weights can be multiplied by, got 1e+39"),
        ("\udcff=1", r"command line '\udcff=1': is no UTF-8 text"),
        ("methods.0={type: set, sparsity: 0.9, drop_score: size}", "methods.0.drop_score: SET: drop_score: got 'size'"),
        (
            "methods.0={type: rigl, sparsity: 0.9, skip_step: 'no'}",
            "methods.0.skip_step: RigL: skip_step: expected True or False, got 'no'",
        ),
        ("epoch=3", "command line 'epoch=3': epoch: unknown key; did you mean 'epochs'?"),
        ("schedule={type: cosine, final: 2}", "schedule.final: must be less than or equal to 1, got 2"),
    ],
)
def test_an_override_that_cannot_work_is_refused_as_such(override, said):
    with pytest.raises(ConfigurationError) as caught:
        parse_recipe("t.yaml", TEXT, [override])
    assert str(caught.value).startswith("command line")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("override", "place"),
    [
        ("optimizer.nesterov=true", "t.yaml:8 with 'optimizer.nesterov=true' on the command line: optimizer: SGD:"),
        ("epochs=9", "t.yaml:8: optimizer: SGD:"),
        (
            "optimizer.name=Adam",
            "t.yaml:11 with 'optimizer.name=Adam' on the command line: optimizer.nesterov: unknown",
        ),
    ],
)
def test_an_error_of_a_whole_section_tells_what_was_changed_in_it(override, place):
    text = TEXT.replace("  momentum: 0.9", "  nesterov: true") if override != "optimizer.nesterov=true" else TEXT
    text = text.replace("  momentum: 0.9\n", "")
    with pytest.raises(ConfigurationError) as caught:
        parse_recipe("t.yaml", text, [override])
    assert str(caught.value).startswith(place)


def test_overrides_change_values_at_any_depth_and_add_keys():
    overrides = [
        "optimizer.lr=5e-3",
        "optimizer.nesterov=true",
        "methods.0.sparsity=0.98",
        "methods.1.end=3 epochs",
        "methods.0.every={periods: {0: 10}}",
        "methods.0.every.periods.5=20",
        "data.augment.crop=2",
        "seeds=[3, 4]",
        "description=a=b",
    ]
    recipe = parse_recipe("t.yaml", TEXT, overrides)
    assert recipe.optimizer.arguments == {"lr": 0.005, "momentum": 0.9, "nesterov": True}
    dsr, gmp = recipe.build_methods(1000, 100, 0)
    assert isinstance(dsr, DSR)
    assert isinstance(gmp, GMP)
    assert (dsr.sparsity, gmp.end) == (0.98, 300)
    assert dsr.every == EpochPeriods({0: 10, 5: 20}, steps_per_epoch=100)
    assert recipe.data.augment is not None
    assert recipe.data.augment.crop == 2
    assert (recipe.seeds, recipe.description) == ([3, 4], "a=b")


def test_later_overrides_win():
    assert parse_recipe("t.yaml", TEXT, ["epochs=3", "epochs=5"]).epochs == 5


@pytest.mark.parametrize(
    ("written", "steps"),
    [("75%", 750), ("12.5 %", 125), ("30 epochs", 3000), ("1 epoch", 100), ("0.5 epochs", 50), ("17", 17)],
)
def test_steps_are_counted_in_percent_of_the_run_or_in_epochs(written, steps):
    (method,) = parse_recipe("t", TEXT, [f"methods=[{{type: rigl, sparsity: 0.5, until: {written}}}]"]).build_methods(
        1000, 100, 0
    )
    assert isinstance(method, RigL)
    assert method.until == steps


def test_a_run_gives_its_seed_to_methods_that_have_none():
    methods = parse(("every: 20", "seed: 7")).build_methods(1000, 100, seed=3)
    assert [getattr(method, "seed", None) for method in methods] == [7, 3]


def test_numbers_with_an_exponent_need_no_point():
    assert parse().optimizer.arguments["lr"] == 0.1


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("2:4", "2:4"),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("2020-12-31", "2020-12-31"),
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("-1.5E+3", -1500.0),
        (".5", 0.5),
        ("1_000", 1000),
        ("0x10", 16),
        (".inf", math.inf),
        ("-7", -7),
        ("true", True),
        ("'1e5'", "1e5"),
        ("75%", "75%"),
    ],
)
def test_plain_values_are_read_as_they_look_and_written_as_they_were_read(written, read):
    data = Source("t", f"a: {written}").data
    assert data == {"a": read}
    assert type(data["a"]) is type(read)
    again = Source("t", dump(data)).data
    assert again == data
    assert type(again["a"]) is type(read)


def test_an_n_of_m_structure_needs_no_quotes():
    (method,) = parse_recipe("t", TEXT, ["methods=[{type: rigl, structure: 2:4}]"]).build_methods(100, 10, 0)
    assert isinstance(method, RigL)
    assert method.structure == "2:4"


def test_the_resolved_recipe_reads_back_as_the_same():
    recipe = parse_recipe("t.yaml", TEXT, ["methods.0.every={periods: {0: 10, 5: 20}, until: 6}", "clip_grad_norm=2"])
    again = parse_recipe("again.yaml", recipe.to_yaml())
    assert again.model_dump() == recipe.model_dump()
    assert again.to_yaml() == recipe.to_yaml()
    assert yaml.safe_load(recipe.to_yaml())["accumulate"] == 1


def test_a_file_is_read_from_its_path(tmp_path):
    (tmp_path / "mine.yaml").write_text(TEXT)
    recipe = load_recipe(tmp_path / "mine.yaml", ["epochs=1"])
    assert (recipe.name, recipe.epochs) == ("mine", 1)


def test_a_file_that_is_not_there_is_refused_with_the_nearest_shipped_recipe():
    with pytest.raises(ConfigurationError, match=r"^digit: no such file, .* did you mean 'digits'\?; shipped are"):
        load_recipe("digit")


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigurationError, match="cannot be read as a text file"):
        load_recipe(tmp_path / "a.yaml")
    with pytest.raises(ConfigurationError, match="cannot be read as a text file"):
        load_recipe(tmp_path)


def test_aliases_may_repeat_a_part_of_a_recipe():
    recipe = parse_recipe(
        "t", TEXT.replace("    sparsity: 0.9", "    sparsity: &s 0.9").replace("sparsity: 0.5", "sparsity: *s")
    )
    assert [method.arguments["sparsity"] for method in recipe.methods] == [0.9, 0.9]


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_valid_and_described_on_one_line(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert 20 < len(recipe.description) < 120
    assert len(recipe.build_methods(10_000, 500, 0)) == len(recipe.methods)


def test_recipes_are_of_something_sparse():
    dense = [name for name in shipped() if not load_recipe(name).methods]
    assert dense == ["cifar10_resnet_bottleneck"]  # sparse by its model
    assert load_recipe(dense[0]).model.arguments["spatial_bottleneck"] == "structured"


def test_the_published_protocol_of_wrn_28_2_is_kept():
    recipe = load_recipe("cifar10_wrn28_2")
    steps_per_epoch = 50_000 // recipe.data.batch_size
    (dsr,) = recipe.build_methods(200 * steps_per_epoch, steps_per_epoch, 0)
    assert isinstance(dsr, DSR)
    updates = [step for step in range(1, 200 * steps_per_epoch + 1) if dsr.due(step)]
    # periods 100, 200 from epoch 25, 400 from 80, 800 from 140, until 190: at 500 steps an epoch
    assert len([step for step in updates if step <= 25 * 500]) == 125
    assert len([step for step in updates if 25 * 500 < step <= 80 * 500]) == 138
    assert len([step for step in updates if 80 * 500 < step <= 140 * 500]) == 75
    assert len([step for step in updates if step > 140 * 500]) == 31
    assert max(updates) <= 190 * 500
    assert (dsr.sparsity, dsr.prune_count, dsr.threshold) == (0.9, 20_000, 1e-3)
    factors = [recipe.schedule.factor(epoch * 500, 500, 200) for epoch in (0, 59, 60, 119, 120, 160, 199)]
    assert factors == pytest.approx([1, 1, 0.2, 0.2, 0.04, 0.008, 0.008])


def test_the_published_protocol_of_resnet_20_is_kept():
    recipe = load_recipe("cifar10_resnet20")
    steps = math.ceil((50_000 - 5_000) / 128)
    assert recipe.data.validation == 5_000
    assert recipe.epochs * steps == pytest.approx(64_000, rel=0.002)
    factors = [recipe.schedule.factor(count, steps, recipe.epochs) for count in range(recipe.epochs * steps)]
    for at, factor in ((32_000, 0.1), (48_000, 0.01)):
        assert next(i for i, each in enumerate(factors) if each <= 1.01 * factor) == pytest.approx(at, rel=0.003)
    assert recipe.optimizer.arguments == {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}


@pytest.mark.parametrize("final", [0.0, 0.1])
def test_the_cosine_is_that_of_torch(final):
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    reference = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30, eta_min=final)
    schedule = CosineSchedule(type="cosine", final=final)
    for count in range(30):
        assert schedule.factor(count, 10, 3) == pytest.approx(reference.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        reference.step()


def test_warm_up_rises_in_equal_steps_and_then_the_schedule_begins():
    schedule = CosineSchedule(type="cosine", warmup=2)
    per_step = [schedule.factor(count, 5, 6) for count in range(30)]
    assert per_step[:10] == pytest.approx([(count + 1) / 10 for count in range(10)])
    assert per_step[10:] == pytest.approx([(1 + math.cos(math.pi * past / 20)) / 2 for past in range(20)])
    per_epoch = [schedule.factor(epoch, 1, 6) for epoch in range(6)]
    assert per_epoch[:3] == pytest.approx([0.5, 1.0, 1.0])


def test_milestones_are_epochs_whatever_the_unit():
    schedule = MultiStepSchedule(type="multistep", milestones=[2, 3], gamma=0.5)
    assert [schedule.factor(epoch, 1, 4) for epoch in range(4)] == [1, 1, 0.5, 0.25]
    assert [schedule.factor(step, 10, 4) for step in (0, 19, 20, 29, 30, 39)] == [1, 1, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_can_be_named(name):
    recipe = (
        parse_recipe("t", TEXT, [f"optimizer={{name: {name}, lr: 0.01, weight_decay: 0}}"])
        if name != "Rprop"
        else (parse_recipe("t", TEXT, ["optimizer={name: Rprop, lr: 0.01, etas: [0.4, 1.3]}"]))
    )
    optimizer = recipe.optimizer.build([torch.nn.Parameter(torch.zeros(2, 2))])
    assert type(optimizer).__name__ == name
    assert optimizer.param_groups[0]["lr"] == 0.01


@pytest.mark.parametrize("name", METHODS)
def test_every_method_can_be_named(name):
    needed = {
        "continuous": "length: 50%",
        "gmp": "sparsity: 0.5, end: 50%",
        "hard_concrete": "penalty: 0.1",
        "imp": "sparsity: 0.5, length: 2 epochs",
        "lossy_threshold": "strength: 0.5",
        "str": "penalty: 0.1",
    }
    arguments = needed.get(name, "sparsity: 0.5")
    recipe = parse_recipe("t", TEXT, [f"methods=[{{type: {name}, {arguments}}}]"])
    assert type(recipe.build_methods(100, 10, 0)[0]) is METHODS[name]


def test_steps_of_a_list_are_parts_of_training_too():
    methods = "methods=[{type: lossy_threshold, norm: 'l0:0.05', double_at: [2 epochs, 50%, 70]}]"
    (method,) = parse_recipe("t", TEXT, [methods]).build_methods(100, 10, 0)
    assert method.double_at == [20, 50, 70]
    assert as_penalty(method.norm) == L0(0.05)
    with pytest.raises(ConfigurationError, match=r"double_at: got '5 days'"):
        parse_recipe("t", TEXT, ["methods=[{type: lossy_threshold, double_at: [5 days]}]"]).build_methods(100, 10, 0)


@pytest.mark.parametrize("b", [".05", "5E-2", "0.05"])
def test_the_smoothing_of_l0_is_any_number(b):
    assert as_penalty(f"l0:{b}") == L0(0.05)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ("norm: 'l0:0'", r"norm: got 'l0:0'; after 'l0:' comes its b"),
        ("norm: 'l0:x'", r"norm: got 'l0:x'"),
        ("norm: l3", r"norm: got 'l3'; allowed are 'l0', 'l1'"),
        ("double_at: 3", r"double_at: expected a list of numbers of steps, got 3"),
        ("sharpness: null", r"sharpness: expected a number in .* got None"),
        ("strength: {1: 2}", r"strength: expected globs over names of sites, got 1"),
        ("eps: 1.0e+39", r"eps: expected a number in .* got 1e\+39"),
        ("until: 5 days, final_sharpness: 2", r"until: got '5 days'"),
    ],
)
def test_wrong_arguments_of_thresholds_are_named(arguments, named):
    with pytest.raises(ConfigurationError, match=named):
        parse_recipe("t", TEXT, [f"methods=[{{type: lossy_threshold, {arguments}}}]"]).build_methods(100, 10, 0)


def test_seeds_can_be_replaced_by_valid_ones_only():
    recipe = parse()
    assert recipe.with_seeds([4, 2]).seeds == [4, 2]
    assert recipe.seeds == [0]
    for seeds in ([], [-1], [1, 1], [2**63]):
        with pytest.raises(ConfigurationError, match="different integers"):
            recipe.with_seeds(seeds)

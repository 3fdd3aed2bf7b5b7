"""Plans as data: files, merging, designs for a budget."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sgl_diffusion_accel import CachePlan, ConfigError, ConfigTypeError, MagnitudeRatios, TeaCacheCoefficients
from sgl_diffusion_accel.calibration.plan_checks import Check
from sgl_diffusion_accel.loop.scheduler_response import euler
from test_design import smooth

FIT = TeaCacheCoefficients(
    (1.0, -2.0, 0.5, 1 / 3, 0.1), thresholds={2.0: 0.15, 3.0: 0.3}, low=0.01, high=0.5, r_squared=0.9
)

RATIOS = MagnitudeRatios(
    {"transformer": {"cond": [None, *[1 / 3] * 10, None], "uncond": [None, *[1.01] * 10, None]}},
    {"transformer": {"cond": 0.1, "uncond": 1e-5}},
    calls=6,
)


def ratios_of(steps: int) -> MagnitudeRatios:
    """Of two transformers and three branches."""
    branches = {branch: [None, *[1 / 3] * (steps - 1)] for branch in ("cond", "uncond", "skip")}
    return MagnitudeRatios({"transformer": branches, "transformer_2": branches})


def made(steps: int = 12, seed: int = 0, **fields: Any) -> CachePlan:
    outputs = smooth(steps, seed)
    sigmas = np.linspace(1, 0, steps + 1)
    given: dict[str, Any] = {
        "pipeline": "WanPipeline",
        "transformers": ("WanTransformer3DModel",),
        "config": "0123456789abcdef",
        "scheduler": "FlowMatchEulerDiscreteScheduler",
        "timesteps": tuple((1000 * sigmas[:-1]).tolist()),
        "guidance": 4.0,
        "latents": (1, 4, 2, 8, 8),
        "calls": 1,
        "gram": tuple((outputs @ outputs.T / outputs.shape[1])[np.triu_indices(steps)].tolist()),
        "response": tuple(euler(sigmas.tolist())[1:][np.tril_indices(steps)].tolist()),
        **fields,
    }
    return CachePlan(**given)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    made(teacache=FIT, magnitudes=RATIOS).save(path)
    return path


@pytest.mark.parametrize(
    "plan",
    [
        made(),
        made(1),
        made(teacache=FIT),
        made(checks=(Check(4, 0.01, 0.03, 2), Check(6, 0.005, 0.004, 2))),
        made(teacache=dataclasses.replace(FIT, secondary=FIT)),
        made(magnitudes=RATIOS),
        made(teacache=FIT, magnitudes=ratios_of(12)),
        made(guidance=None, transformers=("WanTransformer3DModel",) * 2),
    ],
    ids=["plain", "one step", "teacache", "checks", "teacache of two", "magnitudes", "all of them", "two experts"],
)
def test_plan_comes_back_from_its_file_exactly(plan: CachePlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    loaded = CachePlan.load(str(tmp_path / "plan.json"))
    assert loaded == plan
    assert hash(loaded) == hash(plan)
    np.testing.assert_array_equal(loaded.moments.response, plan.moments.response)
    np.testing.assert_array_equal(loaded.gram_matrix, plan.gram_matrix)


def test_matrices_are_those_that_were_given() -> None:
    outputs = smooth(12)
    np.testing.assert_allclose(made().gram_matrix, outputs @ outputs.T / outputs.shape[1])
    np.testing.assert_allclose(made().moments.response, euler(np.linspace(1, 0, 13).tolist()))


def test_file_is_small_readable_and_holds_no_code(file: Path) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    assert content["format"] == 1
    assert content["library"]
    assert made(50).steps == 50
    big = file.with_name("big.json")
    made(50, teacache=FIT, magnitudes=ratios_of(50)).save(big)
    assert big.stat().st_size <= 100 * 1024


def test_file_grows_with_the_square_of_the_steps(tmp_path: Path) -> None:
    made(100).save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").stat().st_size <= 250 * 1024


def changed(**fields: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {**content, **fields}


def without(name: str) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {key: value for key, value in content.items() if key != name}


def element(name: str, index: int, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    def change(content: dict[str, Any]) -> dict[str, Any]:
        content[name][index] = value
        return content

    return change


DAMAGED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "a list": (lambda content: [content], "no field 'format'"),
    "a number": (lambda _: 3, "no field 'format'"),
    "no format": (without("format"), "no field 'format'"),
    "later format": (changed(format=2), "format is 2"),
    "format as text": (changed(format="1"), "format is '1'"),
    "no gram": (without("gram"), "missing: gram"),
    "unknown field": (changed(extra=1), "unknown: extra"),
    "no timesteps": (changed(timesteps=[]), "timesteps"),
    "timesteps as text": (changed(timesteps="12"), "timesteps"),
    "timesteps as object": (changed(timesteps={"0": 1}), "timesteps"),
    "huge": (changed(timesteps=list(range(5000, 0, -1))), "timesteps"),
    "timesteps that rise": (element("timesteps", 3, 2000.0), "do not fall"),
    "timestep of text": (element("timesteps", 3, "x"), r"timesteps\[3\]='x' is a str"),
    "timestep null": (element("timesteps", 3, None), r"timesteps\[3\]=None"),
    "timestep nan": (element("timesteps", 3, float("nan")), r"timesteps\[3\]=nan; allowed: a finite"),
    "timestep infinite": (element("timesteps", 0, float("inf")), r"timesteps\[0\]=inf"),
    "gram too short": (lambda c: {**c, "gram": c["gram"][:-1]}, "gram has 77 elements.*the 78 numbers of 12"),
    "gram too long": (lambda c: {**c, "gram": [*c["gram"], 1.0]}, "gram has 79 elements.*the 78 numbers of 12"),
    "gram as text": (changed(gram="x" * 78), "gram is a str; allowed: a list of the 78"),
    "gram nan": (element("gram", 5, float("nan")), r"gram\[5\]=nan"),
    "gram infinite": (element("gram", 5, float("-inf")), r"gram\[5\]=-inf"),
    "gram null": (element("gram", 5, None), r"gram\[5\]=None is a NoneType"),
    "gram of lists": (element("gram", 5, [1.0]), r"gram\[5\]=\[1.0\] is a list"),
    "no Gram matrix": (element("gram", 1, 1e6), "no Gram matrix"),
    "negative gram": (lambda c: {**c, "gram": [-value for value in c["gram"]]}, "no Gram matrix"),
    "zero gram": (lambda c: {**c, "gram": [0.0] * 78}, "no Gram matrix"),
    "response too short": (lambda c: {**c, "response": c["response"][:-1]}, "response has 77 elements"),
    "response nan": (element("response", 5, float("nan")), r"response\[5\]=nan"),
    "calls 0": (changed(calls=0), "calls=0; allowed"),
    "calls of a fraction": (changed(calls=1.5), "calls=1.5 is a float"),
    "calls true": (changed(calls=True), "calls=True is a bool"),
    "latents of text": (changed(latents=["a"]), r"latents\[0\]='a' is a str"),
    "latents null": (changed(latents=None), "latents is a NoneType"),
    "transformers null": (changed(transformers=None), "transformers is a NoneType"),
    "guidance of text": (changed(guidance="x"), "guidance='x' is a str"),
    "checks of text": (changed(checks="x"), "checks is a str"),
    "check of numbers": (changed(checks=[[4, 0.1, 0.1, 1]]), r"checks\[0\] is damaged"),
    "check without calls": (changed(checks=[{"computed_steps": 4, "expected": 0.1, "measured": 0.1}]), "calls"),
    "check of half a step": (lambda c: _check(c, computed_steps=0.5), "computed_steps=0.5 is a float"),
    "check that is not finite": (lambda c: _check(c, measured=float("inf")), "measured=inf; allowed: a finite"),
    "check with a negative error": (lambda c: _check(c, expected=-1.0), "expected=-1.0; allowed: .* from 0"),
    "check with a strange field": (lambda c: _check(c, strange=1), r"checks\[0\] is damaged"),
    "check null": (changed(checks=[None]), r"checks\[0\] is a NoneType"),
    "check of more steps than there are": (lambda c: _check(c, computed_steps=13), "computed_steps=13; .* 1 to 12"),
    "checks as an empty object": (changed(checks={}), "checks is a dict"),
    "no magnitudes": (without("magnitudes"), "missing: magnitudes"),
    "magnitudes of text": (changed(magnitudes="x"), "damaged"),
    "magnitudes empty": (changed(magnitudes={}), "damaged"),
    "magnitudes with a strange field": (lambda c: _mag(c, strange=1), "damaged"),
    "magnitudes without calls": (lambda c: _mag(c, calls=0), "magnitudes is damaged: calls=0"),
    "magnitude of text": (lambda c: _mag(c, ratios={"transformer": {"cond": ["1"]}}), "magnitudes is damaged"),
    "magnitude nan": (lambda c: _mag(c, ratios={"transformer": {"cond": [float("nan")]}}), "magnitudes is damaged"),
    "magnitudes as a list": (lambda c: _mag(c, ratios=[1.0]), "magnitudes is damaged"),
    "magnitudes without a spread": (lambda c: _mag(c, spread={"transformer": {}}), "magnitudes is damaged"),
    "teacache of text": (changed(teacache="x"), "damaged"),
    "teacache empty": (changed(teacache={}), "damaged"),
    "teacache with a coefficient too few": (lambda c: _tea(c, coefficients=[1, 2]), "teacache is damaged"),
    "teacache with a strange field": (lambda c: _tea(c, strange=1), "damaged"),
    "teacache thresholds": (lambda c: _tea(c, thresholds=[1]), "damaged"),
    "teacache without thresholds": (lambda c: _tea(c, thresholds=None), "teacache is damaged"),
    "teacache with a coefficient of text": (lambda c: _tea(c, coefficients=["1"] * 5), "coefficients has '1'"),
    "teacache of text for the second": (lambda c: _tea(c, secondary="x"), "teacache is damaged"),
}


def _check(content: dict[str, Any], **fields: Any) -> dict[str, Any]:
    good = {"computed_steps": 4, "expected": 0.1, "measured": 0.1, "calls": 1}
    return {**content, "checks": [{**good, **fields}]}


def _mag(content: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**content, "magnitudes": {**content["magnitudes"], **fields}}


def _tea(content: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {**content, "teacache": {**content["teacache"], **fields}}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_file_is_refused_and_told_why(name: str, file: Path) -> None:
    change, why = DAMAGED[name]
    file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(ConfigError, match=why) as told:
        CachePlan.load(file)
    assert str(told.value).startswith(f"{file} is no plan that can be used: ")
    assert str(told.value).endswith(". Make one: calibrate(pipe, calls, path=...)")
    assert ".. " not in str(told.value)


GRAM, RESPONSE = made().gram, made().response
REFUSED: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "pipeline that is none": ({"pipeline": None}, ConfigTypeError, "pipeline=None is a NoneType; allowed: text"),
    "library of a number": ({"library": 1}, ConfigTypeError, "library=1"),
    "transformers of text": ({"transformers": "Wan"}, ConfigTypeError, "transformers is a str; allowed: a list"),
    "no transformers": ({"transformers": ()}, ConfigError, "transformers has 0 elements"),
    "transformer of a number": ({"transformers": ("Wan", 3)}, ConfigTypeError, r"transformers\[1\]=3 is a int"),
    "no timesteps": ({"timesteps": ()}, ConfigError, "timesteps has 0 elements; allowed: a list of 1 to 1000"),
    "too many timesteps": ({"timesteps": (0,) * 1001}, ConfigError, "timesteps has 1001 elements"),
    "timesteps that rise": ({"timesteps": range(12)}, ConfigTypeError, "timesteps is a range"),
    "timesteps that do not fall": ({"timesteps": [*range(11, 0, -1), 7]}, ConfigError, "1 is followed by 7 at step 11"),
    "timestep of truth": ({"timesteps": [True] * 12}, ConfigTypeError, r"timesteps\[0\]=True"),
    "guidance nan": ({"guidance": float("nan")}, ConfigError, "guidance=nan; allowed: a finite number, or None"),
    "no latents": ({"latents": ()}, ConfigError, "latents has 0 elements"),
    "latents of nothing": ({"latents": (1, 0)}, ConfigError, r"latents\[1\]=0; allowed: a whole number from 1"),
    "calls 0": ({"calls": 0}, ConfigError, "calls=0"),
    "calls of a fraction": ({"calls": 1.0}, ConfigTypeError, "calls=1.0"),
    "gram of other steps": ({"gram": made(5).gram}, ConfigError, "gram has 15 elements; .*the 78 numbers of 12 steps"),
    "gram of a matrix": ({"gram": made().gram_matrix}, ConfigTypeError, "gram is a ndarray"),
    "gram nan": ({"gram": (float("nan"), *GRAM[1:])}, ConfigError, r"gram\[0\]=nan"),
    "gram too large": ({"gram": (1e308,) * 78}, ConfigError, "no Gram matrix"),
    "gram of zeros": ({"gram": (0.0,) * 78}, ConfigError, "no Gram matrix: its eigenvalues go from 0 to 0"),
    "negative gram": ({"gram": tuple(-value for value in GRAM)}, ConfigError, "no Gram matrix"),
    "response of zeros": ({"response": (0.0,) * 78}, ConfigError, "no step any weight"),
    "response of no weight at the end": ({"response": (*RESPONSE[:-12], *[0.0] * 12)}, ConfigError, "any weight"),
    "checks of one": ({"checks": Check(4, 0.1, 0.1, 1)}, ConfigTypeError, "checks is a Check; allowed: a list"),
    "checks of numbers": ({"checks": [(4, 0.1, 0.1, 1)]}, ConfigTypeError, r"checks\[0\] is a tuple; allowed: a Check"),
    "check of too many steps": ({"checks": [Check(13, 0.1, 0.1, 1)]}, ConfigError, "computed_steps=13"),
    "teacache of numbers": ({"teacache": (1, 2, 3, 4, 5)}, ConfigTypeError, "allowed: TeaCacheCoefficients, or None"),
    "magnitudes of a dict": ({"magnitudes": {}}, ConfigTypeError, "magnitudes is a dict; allowed: MagnitudeRatios"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_plan_that_cannot_be_is_not_made(name: str) -> None:
    fields, error, why = REFUSED[name]
    with pytest.raises(error, match=why):
        made(**fields)
    with pytest.raises(error, match=why):
        dataclasses.replace(made(), **fields)


def test_plan_keeps_numbers_of_python_in_tuples() -> None:
    plan, given = made(), {}
    for name in ("timesteps", "gram", "response"):
        given[name] = [np.float64(value) for value in getattr(plan, name)]
    other = made(**given, guidance=4, calls=np.int64(1), latents=[1, 4, 2, 8, 8], transformers=list(plan.transformers))
    assert other == plan
    assert hash(other) == hash(plan)
    assert {type(value) for value in (*other.timesteps, *other.gram, *other.response, other.guidance)} == {float}
    assert type(other.calls) is int


@pytest.mark.parametrize(
    ("fields", "error", "why"),
    [
        ({"computed_steps": 0}, ConfigError, "computed_steps=0; allowed: a whole number from 1"),
        ({"computed_steps": 2.0}, ConfigTypeError, "computed_steps=2.0 is a float"),
        ({"expected": -0.1}, ConfigError, "expected=-0.1; allowed: a finite number from 0"),
        ({"measured": float("nan")}, ConfigError, "measured=nan"),
        ({"measured": "0.1"}, ConfigTypeError, "measured='0.1' is a str"),
        ({"calls": True}, ConfigTypeError, "calls=True"),
    ],
)
def test_check_that_cannot_be_is_not_made(fields: dict[str, Any], error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        Check(**{"computed_steps": 4, "expected": 0.1, "measured": 0.1, "calls": 1, **fields})


UNSEEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "transformers of text": (changed(transformers="WanTransformer3DModel"), "taken apart into letters"),
    "pipeline of a number": (changed(pipeline=3), "made a string"),
    "guidance infinite": (changed(guidance=float("inf")), "not looked at"),
    "response of zeros": (lambda c: {**c, "response": [0.0] * 78}, "0 divided by 0 in every design"),
    "timestep of digits": (element("timesteps", 0, "1000"), "made a number"),
    "gram true": (element("gram", 0, True), "made a number"),
}


@pytest.mark.parametrize(
    "name",
    UNSEEN,
)
def test_subtly_damaged_file_is_refused(name: str, file: Path) -> None:
    file.write_text(json.dumps(UNSEEN[name][0](json.loads(file.read_text()))))
    with pytest.raises(ConfigError):
        CachePlan.load(file)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.99])
def test_truncated_file_is_refused(share: float, file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: int(share * len(content))])
    with pytest.raises(ConfigError, match="not JSON"):
        CachePlan.load(file)


FOREIGN: dict[str, bytes] = {
    "pickle": pickle.dumps({"format": 1}),
    "binary": bytes(range(256)),
    "utf-16": '{"format": 1}'.encode("utf-16"),
    "nested": b"[" * 100_000,
    "text": b"a plan",
}


@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_file_is_refused(name: str, file: Path) -> None:
    file.write_bytes(FOREIGN[name])
    with pytest.raises(ConfigError, match=r"not JSON|no field 'format'"):
        CachePlan.load(file)


def test_huge_file_is_refused_before_it_is_read(file: Path) -> None:
    with file.open("r+b") as opened:
        opened.truncate(64 << 20)
    with pytest.raises(ConfigError, match="larger than 16 MiB"):
        CachePlan.load(file)


def test_missing_file_is_told_as_such(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        CachePlan.load(tmp_path / "none.json")


def test_write_that_breaks_leaves_the_old_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = file.read_bytes()
    write = Path.write_text

    def breaks(path: Path, data: str, *args: Any, **kwargs: Any) -> int:
        write(path, data[: len(data) // 2], *args, **kwargs)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", breaks)
    with pytest.raises(OSError, match="No space"):
        made().save(file)
    assert file.read_bytes() == before


def test_plan_of_a_scheduler_that_repeats_timesteps_comes_back(tmp_path: Path) -> None:
    plan = made(timesteps=tuple(float(1000 - 100 * ((step + 1) // 2)) for step in range(12)))
    plan.save(tmp_path / "plan.json")
    assert CachePlan.load(tmp_path / "plan.json") == plan


def test_merging_is_like_calibrating_on_all_calls() -> None:
    parts = [made(seed=seed, calls=calls) for seed, calls in ((0, 1), (1, 2), (2, 3))]
    merged = parts[0].merge(*parts[1:])
    assert merged.calls == 6
    wanted = sum(part.gram_matrix * part.calls for part in parts) / 6
    np.testing.assert_allclose(merged.gram_matrix, wanted, rtol=1e-12)
    again = parts[2].merge(parts[0]).merge(parts[1])
    np.testing.assert_allclose(again.gram_matrix, wanted, rtol=1e-12)
    assert made().merge() == made()


def test_merged_plan_has_the_ratios_of_all_parts_that_have_some() -> None:
    other = MagnitudeRatios({"transformer": {"cond": [None, *[1.0] * 10, None]}}, calls=2)
    merged = made(magnitudes=RATIOS).merge(made(), made(magnitudes=other)).magnitude_ratios
    assert merged == RATIOS.merge(other)
    assert merged.of("transformer", "cond")[1] == pytest.approx((6 / 3 + 2) / 8)
    assert made().merge(made()).magnitudes is None


def test_merged_plan_has_the_coefficients_of_the_larger_part() -> None:
    assert made(calls=9).merge(made(teacache=FIT)).teacache == FIT
    other = dataclasses.replace(FIT, r_squared=0.5)
    assert made(teacache=FIT).merge(made(calls=4, teacache=other)).teacache == other


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("pipeline", "FluxPipeline"),
        ("transformers", ("FluxTransformer2DModel",)),
        ("config", "f" * 16),
        ("scheduler", "UniPCMultistepScheduler"),
        ("timesteps", tuple(range(12, 0, -1))),
        ("guidance", 5.0),
        ("guidance", None),
        ("latents", (1, 4, 2, 8, 9)),
    ],
)
def test_unlike_plans_are_not_merged(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=field):
        made().merge(made(**{field: value}))


def test_plans_of_schedulers_with_other_settings_are_not_merged() -> None:
    other = tuple(2 * weight for weight in made().response)
    with pytest.raises(ConfigError):
        made().merge(made(response=other))


@pytest.mark.parametrize("computed", [1, 5, 12, np.int64(5)])
def test_design_computes_as_many_steps_as_asked(computed: Any) -> None:
    plan = made()
    assert sum(plan.design(computed).mask) == computed
    assert plan.design(computed) is plan.design(computed), "made once"


@pytest.mark.parametrize("computed", [0, -1, 13, 10**9])
def test_number_of_steps_that_cannot_be_is_refused(computed: int) -> None:
    with pytest.raises(ConfigError, match="computed_steps"):
        made().design(computed)


@pytest.mark.parametrize("computed", [True, 2.0, "5", None])
def test_number_of_steps_of_a_wrong_type_is_refused(computed: Any) -> None:
    with pytest.raises(ConfigTypeError, match="computed_steps"):
        made().design(computed)


@pytest.mark.parametrize("error", [1e-3, 0.01, 0.05, 10])
def test_steps_for_an_error_are_the_fewest(error: float) -> None:
    plan = made()
    found = plan.steps_for(error)
    assert plan.design(found).error <= error
    assert found == 1 or plan.design(found - 1).error > error


def test_error_that_nothing_meets_takes_all_steps() -> None:
    assert made().steps_for(1e-30) == 12


@pytest.mark.parametrize("error", [0, -1, float("nan")])
def test_error_that_is_not_positive_is_refused(error: float) -> None:
    with pytest.raises(ConfigError, match="max_error"):
        made().steps_for(error)


@pytest.mark.parametrize("error", [True, "0.1", None])
def test_error_of_a_wrong_type_is_refused(error: Any) -> None:
    with pytest.raises(ConfigTypeError, match="max_error"):
        made().steps_for(error)


def test_coefficients_that_were_not_recorded_are_told_of() -> None:
    assert made(teacache=FIT).teacache_coefficients is FIT
    with pytest.raises(ConfigError, match="teacache=True"):
        _ = made().teacache_coefficients


def test_ratios_that_were_not_recorded_are_told_of() -> None:
    assert made(magnitudes=RATIOS).magnitude_ratios is RATIOS
    with pytest.raises(ConfigError, match="magnitudes=True"):
        _ = made().magnitude_ratios


def test_plan_prints_what_each_budget_costs() -> None:
    text = str(made())
    assert "WanPipeline" in text
    assert "12 steps" in text
    assert "2.0x    6 steps computed" in text
    assert text.count("expected error") == 5
    assert "guidance" not in str(made(guidance=None))


def test_plan_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        made().calls = 3  # type: ignore[misc]

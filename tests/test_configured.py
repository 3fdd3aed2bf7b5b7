"""`python -m sgl_diffusion_accel check`: folders, names of classes, the Hub's local cache; without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

from invariants.families import present
from sgl_diffusion_accel import ConfigError, MissingPackageError, UnsupportedModelError, check_pipeline
from sgl_diffusion_accel.__main__ import main
from sgl_diffusion_accel.auto.checking.configured import configured
from zoo.wan import CONFIG


def answers(pipe: Any) -> dict[str, str]:
    return {each.patch: each.answer for each in check_pipeline(pipe).patches}


def written(path: Path, given: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(given if isinstance(given, str) else json.dumps(given))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Wan2.2 as `save_pretrained` lays it out, without any weights."""
    transformer = {"_class_name": "WanTransformer3DModel", **CONFIG, "patch_size": [1, 2, 2]}
    index = {
        "_class_name": "WanPipeline",
        "_diffusers_version": "0.35.0",
        "boundary_ratio": 0.875,
        "expand_timesteps": False,
        "scheduler": ["diffusers", "UniPCMultistepScheduler"],
        "text_encoder": ["transformers", "UMT5EncoderModel"],
        "tokenizer": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "WanTransformer3DModel"],
        "transformer_2": ["diffusers", "WanTransformer3DModel"],
        "vae": ["diffusers", "AutoencoderKLWan"],
    }
    written(tmp_path / "model_index.json", index)
    written(tmp_path / "transformer" / "config.json", transformer)
    written(tmp_path / "transformer_2" / "config.json", transformer)
    scheduler = {
        "_class_name": "UniPCMultistepScheduler",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
    }
    written(tmp_path / "scheduler" / "scheduler_config.json", scheduler)
    return tmp_path


def test_folder_of_a_pipeline_is_as_the_pipeline(folder: Path) -> None:
    pipe = configured(str(folder))
    report, real = check_pipeline(pipe), check_pipeline(present("wan22").make())
    assert all(each.device.type == "meta" for each in pipe.transformer.parameters())
    assert report.pipeline == "WanPipeline"
    assert [each.component for each in report.denoisers] == ["transformer", "transformer_2"]
    assert [each.parameters for each in report.denoisers] == [each.parameters for each in real.denoisers]
    assert [each.attention for each in report.denoisers] == [each.attention for each in real.denoisers]
    assert report.loop == real.loop
    assert report.scheduler == real.scheduler
    assert report.patches == real.patches


def test_nothing_is_loaded(folder: Path) -> None:
    (found, _) = check_pipeline(configured(str(folder))).denoisers
    assert not found.is_loaded
    assert found.weights == {"bfloat16": 2 * found.parameters, "float32": 4 * found.parameters}
    assert "(not loaded)" in str(check_pipeline(configured(str(folder))))


def test_folder_of_a_transformer(folder: Path) -> None:
    report = check_pipeline(configured(str(folder / "transformer")))
    assert report.pipeline == "WanTransformer3DModel"
    assert report.loop.is_placed is False


@pytest.mark.parametrize("name", ["QwenImagePipeline", "StableDiffusion3Pipeline", "WanTransformer3DModel"])
def test_name_of_a_class(name: str) -> None:
    report = check_pipeline(configured(name))
    assert report.pipeline == name
    assert report.denoisers[0].parameters > 8 * 10**8
    assert report.verdict("adaptive").answer == "yes"


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ("no/such-model", "hf download OWNER/NAME"),
        ("not a name", "nothing is fetched"),
        ("QwenImagePipelin", "Did you mean 'QwenImagePipeline'"),
    ],
)
def test_what_is_nowhere(model: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=says):
        configured(model)
    assert main(["check", model]) == 2
    assert says in capsys.readouterr().err


def test_model_in_the_local_cache_of_the_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def found(model: str, name: str) -> str | None:
        return str(folder / name) if (folder / name).exists() and model == "owner/wan" else None

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", found)
    assert check_pipeline(configured("owner/wan")).pipeline == "WanPipeline"


def test_folders_that_are_none(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"model_index.json nor config.json"):
        configured(str(tmp_path / "empty"))
    written(folder / "transformer" / "config.json", {"_class_name": "NewTransformer9DModel"})
    with pytest.raises(UnsupportedModelError, match="NewTransformer9DModel"):
        configured(str(folder))
    written(folder / "transformer" / "config.json", {"_class_name": "WanTransformer3DModel", "num_layers": "many"})
    with pytest.raises(UnsupportedModelError, match=r"check_pipeline\(pipe\)"):
        configured(str(folder))
    written(folder / "transformer" / "config.json", "{")
    with pytest.raises(ConfigError, match="cannot be read"):
        configured(str(folder))
    written(folder / "model_index.json", "[]")
    with pytest.raises(ConfigError, match="list"):
        configured(str(folder))


def test_command_shows_text_or_json(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = torch.get_rng_state()
    assert main(["check", str(folder)]) == 0
    assert "dbcache" in capsys.readouterr().out
    assert main(["check", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["patch"]: each["answer"] for each in found["patches"]} == answers(configured(str(folder)))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("lost", ["transformer_2/config.json", "scheduler/scheduler_config.json"])
def test_missing_file_is_named(folder: Path, lost: str) -> None:
    (folder / lost).unlink()
    with pytest.raises(ConfigError, match=rf"{lost} is missing.*hf download"):
        configured(str(folder))


def test_parts_and_settings_of_another_version_are_left_out(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    new = {"is_new": True, "guide": ["diffusers", "NewGuide"], "other": ["one"]}
    expected = check_pipeline(configured(str(folder)))
    written(folder / "model_index.json", index | new)
    assert check_pipeline(configured(str(folder))) == expected


def test_transformer_of_the_models_own_code_is_named(folder: Path) -> None:
    index = json.loads((folder / "model_index.json").read_text())
    written(folder / "model_index.json", index | {"transformer": ["my_code", "MyTransformer"]})
    with pytest.raises(UnsupportedModelError, match="transformer is a MyTransformer of my_code"):
        configured(str(folder))


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("model_index.json", "WanTransformer3DModel"),
        ("model_index.json", "DiffusionPipeline"),
        ("transformer/config.json", "UniPCMultistepScheduler"),
        ("scheduler/scheduler_config.json", "WanTransformer3DModel"),  # made here, its defaults would fill 56 GB
    ],
)
def test_class_of_another_kind_is_refused(folder: Path, path: str, name: str) -> None:
    written(folder / path, json.loads((folder / path).read_text()) | {"_class_name": name})
    with pytest.raises(UnsupportedModelError, match=rf"{path} is of class '{name}', which is no"):
        configured(str(folder))


def classes_that_lack_packages() -> list[str]:
    found = [name for name in dir(diffusers) if type(getattr(diffusers, name, None)).__name__ == "DummyObject"]
    return [name for name in found if name.endswith("Pipeline")]


def test_packages_that_diffusers_lacks_for_a_class_are_named(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lacking = classes_that_lack_packages()
    if not lacking:
        pytest.skip("all packages that diffusers has a use for are installed")
    assert main(["check", lacking[0]]) == 2
    assert f"{lacking[0]} requires the " in capsys.readouterr().err
    index = folder / "model_index.json"
    written(index, json.loads(index.read_text()) | {"_class_name": lacking[0]})
    with pytest.raises(MissingPackageError, match=f"{lacking[0]} requires the "):
        configured(str(folder))


def test_modular_and_automatic_pipelines_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("ModularPipeline", "AutoPipelineForText2Image", "DiffusionPipeline"):
        assert main(["check", name]) == 2
        assert name in capsys.readouterr().err
    (folder / "model_index.json").rename(folder / "modular_model_index.json")
    with pytest.raises(UnsupportedModelError, match=r"modular.*check_pipeline\(pipe\)"):
        configured(str(folder))

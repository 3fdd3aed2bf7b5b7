"""What the package offers: names, documentation, version, and what importing it does not do."""

from __future__ import annotations

import ast
import dataclasses
import doctest
import importlib
import inspect
import json
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sgl_diffusion_accel as package
from sgl_diffusion_accel import errors

ROOT = Path(package.__file__).parent
MODULES = sorted(name for _, name, _ in pkgutil.walk_packages([str(ROOT)], "sgl_diffusion_accel."))
FRONT = [name for name in package.__all__ if not name.startswith("__")]


def objects(module):
    """The public functions and classes that a module defines, and the public methods of the classes."""
    for name, found in vars(module).items():
        if name.startswith("_") or getattr(found, "__module__", None) != module.__name__:
            continue
        if inspect.isfunction(found) or inspect.isclass(found):
            yield name, found
        if inspect.isclass(found):
            for method, value in vars(found).items():
                function = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
                function = function.fget if isinstance(function, property) else function
                if not method.startswith("_") and inspect.isfunction(function):
                    yield f"{name}.{method}", function


def test_all_is_what_is_public():
    found = {
        name
        for name, value in vars(package).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }  # fmt: skip
    assert set(package.__all__) == found | {"__version__"}
    assert sorted(package.__all__) == list(package.__all__)


def test_errors_are_offered_and_stay_what_they_specialise():
    defined = {name for name, value in vars(errors).items() if inspect.isclass(value) and issubclass(value, Exception)}
    assert defined <= set(package.__all__)
    assert all(issubclass(getattr(package, name), package.AccelError) for name in defined)
    assert issubclass(package.ConfigError, ValueError)
    assert issubclass(package.ConfigTypeError, TypeError)
    assert issubclass(package.UnsupportedModelError, ValueError)
    assert issubclass(package.MissingPackageError, ImportError)


def test_version_is_that_of_the_changelog_and_of_the_installed_package():
    changelog = ROOT.parent / "CHANGELOG.md"
    if changelog.exists():
        released = re.findall(
            r"^## \[(\d\S*)\] - \d{4}-\d\d-\d\d$", changelog.read_text(encoding="utf-8"), re.MULTILINE
        )
        assert released[0] == package.__version__
    from importlib.metadata import version

    assert version("sgl-diffusion-accel") == package.__version__


def test_package_is_marked_as_typed():
    assert (ROOT / "py.typed").exists()


def test_every_module_says_what_it_is_for():
    modules = [importlib.import_module(name) for name in MODULES]
    assert [one.__name__ for one in modules if Path(one.__file__).stat().st_size and not one.__doc__] == []


def test_everything_public_is_documented():
    missing = [
        f"{module}: {name}"
        for module in MODULES
        for name, found in objects(importlib.import_module(module))
        if not (inspect.getdoc(found) or "").strip() or inspect.getdoc(found).startswith(f"{name}(")
    ]
    assert missing == []


@pytest.mark.parametrize("name", [name for name in FRONT if inspect.isfunction(getattr(package, name))])
def test_front_functions_document_arguments_errors_and_an_example(name):
    function = inspect.unwrap(getattr(package, name))  # the names that it shows are documented with their config
    document = inspect.getdoc(function)
    for parameter in inspect.signature(function).parameters:
        assert re.search(rf"^    \**{parameter}: ", document, re.MULTILINE), parameter
    assert "Raises:" in document
    assert "Example:" in document
    if inspect.signature(function).return_annotation not in (None, "None"):
        assert "Returns:" in document


def test_documented_arguments_exist():
    """A name under "Args:" is a parameter of the function, or of the class's constructor."""
    wrong = []
    everything = [
        (f"{module}: {name}", found) for module in MODULES for name, found in objects(importlib.import_module(module))
    ]
    for name, found in everything:
        section = re.search(r"^Args:\n((?:    .*\n?|\n)+)", inspect.getdoc(found) or "", re.MULTILINE)
        if section is None:
            continue
        named = re.findall(r"^    \**(\w+): ", section.group(1), re.MULTILINE)
        parameters = inspect.signature(inspect.unwrap(found)).parameters  # without the settings that it shows
        wrong += [f"{name}: {argument}" for argument in named if argument not in parameters]
        wrong += [f"{name}: no {argument}" for argument in parameters if argument not in (*named, "self", "cls")]
    assert wrong == []


@pytest.mark.parametrize(
    "name",
    [
        "AdaptiveConfig",
        "AutoConfig",
        "CacheDiTConfig",
        "LosslessConfig",
        "MagCacheConfig",
        "StepsMask",
        "TeaCacheConfig",
    ],
)
def test_every_field_of_a_config_is_documented(name):
    cls = getattr(package, name)
    fields = [field.name for field in dataclasses.fields(cls) if not field.name.startswith("_")]
    assert fields == re.findall(r"^    (\w+): ", inspect.getdoc(cls).split("Raises:")[0], re.MULTILINE)


def test_examples_of_the_pure_modules_run():
    """Examples that need a pipeline are run with one elsewhere."""
    failed, without = [], []
    for module in MODULES:
        runner = doctest.DocTestRunner()
        for example in doctest.DocTestFinder(exclude_empty=True).find(
            importlib.import_module(module), extraglobs={"torch": torch}
        ):
            if not any("pipe" in step.source for step in example.examples):
                runner.run(example)
        failed += [module] * bool(runner.summarize(verbose=False).failed)
        without += [module] * (not runner.tries)
    assert failed == []
    assert not {module.rpartition(".")[2] for module in without} & {"masks", "predictors", "signals"}


def fresh(code):
    """What a fresh interpreter prints as JSON."""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=300)
    return json.loads(done.stdout.splitlines()[-1]), done


def test_importing_reads_no_setting_patches_no_class_and_needs_no_optional_package():
    code = """
import json, os, sys
import diffusers, torch
from torch import nn
OPTIONAL = "yaml matplotlib rich flash_attn sageattention xformers kernels peft cache_dit IPython torchmetrics".split()
OPTIONAL.append("transformers")
before = {name for name in OPTIONAL if name in sys.modules}
classes = {cls: dict(vars(cls)) for cls in (nn.Module, nn.ModuleList, torch.Tensor)}
read = []
class Environ(dict):
    def __getitem__(self, key): read.append(key); return super().__getitem__(key)
    def get(self, key, default=None): read.append(key); return super().get(key, default)
    def __contains__(self, key): read.append(key); return super().__contains__(key)
    def __iter__(self): read.append("all of them"); return super().__iter__()
os.environ = Environ(os.environ)
os.environ["SGLANG_CACHE_DIT_FN"] = "nonsense"
import sgl_diffusion_accel
print(json.dumps({
    "optional": sorted({name for name in OPTIONAL if name in sys.modules} - before),
    "read": [key for key in read if key.startswith("SGL") or key == "all of them"],
    "patched": [cls.__name__ for cls, attributes in classes.items() if dict(vars(cls)) != attributes],
}))
"""
    told, done = fresh(code)
    assert told == {"optional": [], "read": [], "patched": []}
    assert "sgl" not in done.stderr.lower()


def sources():
    return [(path.relative_to(ROOT.parent), ast.parse(path.read_text(encoding="utf-8"))) for path in ROOT.rglob("*.py")]


def test_nothing_is_printed_and_nothing_that_users_do_is_asserted():
    found = [
        f"{path}:{node.lineno}"
        for path, tree in sources()
        for node in ast.walk(tree)
        if isinstance(node, ast.Assert)
        or (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print")
    ]
    assert found == []


def test_parts_know_no_pipeline_and_no_front_door():
    """Arrows point one way: front doors, engine, parts."""
    others = {"diffusers", "blocks", "outputs", "cache_dit", "cache_patch", "adaptive", "intercept", "patch", "targets"}
    seen, wrong = set(), []
    for path, tree in sources():
        if path.parent.name != "parts":
            continue
        seen.add(path.stem)
        for node in ast.walk(tree):
            imported = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            imported += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            wrong += [f"{path}: {name}" for name in imported if others & {*name.split(".")}]
    assert wrong == []
    assert seen >= {"history", "masks", "policies", "predictors", "signals", "stats"}


@pytest.mark.parametrize(
    ("seen", "nearest"),
    [("residual_dif_threshold", "residual_diff_threshold"), ("FN_compute_blocks", "fn_compute_blocks")],
)
def test_unknown_name_is_told_with_the_nearest_the_place_and_all_that_are_known(seen, nearest):
    known = ["residual_diff_threshold", "fn_compute_blocks"]
    message = str(errors.unknown_name("knob", seen, known, "there"))
    assert message == (
        f"unknown knob '{seen}' in there. Did you mean '{nearest}'? Known: fn_compute_blocks, residual_diff_threshold."
    )


def test_unknown_name_that_is_near_nothing_gets_no_guess():
    assert "Did you mean" not in str(errors.unknown_name("knob", "zzzz", ["fn_compute_blocks"]))
